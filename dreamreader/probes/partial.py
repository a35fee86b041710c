"""Evaluates a denoiser up to one site, with or without gradient checkpointing."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dreamreader.engine.site_view import read_site
from dreamreader.engine.sites import Site
from dreamreader.engine.taps import Argument, pick
from dreamreader.errors import InvalidInput


class _Reached(Exception):
    """The site has its value: nothing further is computed."""

    def __init__(self, value: Tensor):
        super().__init__("reached")
        self.value = value


def value_at(
    site: Site, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Float[Tensor, "batch tokens features"]:
    """The value of a site, heads side by side; the denoiser is left as soon as it is there.

    The hooks that sessions have on modules inside act as ever, and before this one looks.

    Raises:
        InvalidInput: the denoiser does not reach the site.
    """
    with ExitStack() as stack:
        stack.enter_context(_watched(site))
        try:
            denoiser.forward(*args, **kwargs)  # not the module's call: the clock hears of one
        except _Reached as reached:
            value = reached.value
        else:
            raise InvalidInput(f"latent_guidance: {site.name} was not reached in the denoiser")
    return read_site(site, value)


@contextmanager
def _watched(site: Site) -> Iterator[None]:
    tap, armed = site.tap, True
    argument = Argument(tap.module, tap.argument) if tap.side in ("in", "delta") else None
    given: list[Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not armed or argument is None:  # checkpointing evaluates a part once more
            return
        value = argument.get(args, kwargs)
        if tap.side == "in":
            raise _Reached(value)
        given.append(value)

    def after(_: nn.Module, args: tuple, output: Any) -> None:
        if armed and tap.side != "in":
            value = pick(output, tap.element, site.name)
            raise _Reached(value - given.pop() if tap.side == "delta" else value)

    hooks = (
        tap.module.register_forward_pre_hook(before, with_kwargs=True),
        tap.module.register_forward_hook(after),
    )
    try:
        yield
    finally:
        armed = False
        for each in hooks:
            each.remove()


@contextmanager
def checkpointed(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser's own gradient checkpointing, as it was before afterwards.

    Raises:
        InvalidInput: this class has none.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (each, {name: vars(each)[name] for name in names if name in vars(each)})
        for each in denoiser.modules()
    ]
    try:
        try:
            denoiser.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
        except (AttributeError, ValueError) as error:
            raise InvalidInput(
                f"latent_guidance: {type(denoiser).__name__} has no gradient checkpointing"
            ) from error
        yield
    finally:
        for each, values in before:
            for name in names:
                vars(each).pop(name, None)
            vars(each).update(values)
