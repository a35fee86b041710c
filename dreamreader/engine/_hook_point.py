"""Hook points: the hooks on one module."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from dreamreader.engine._hooked_site import HookedSite
from dreamreader.engine._probs import entries_of
from dreamreader.engine._session_state import SessionState
from dreamreader.engine._taps import Argument, pick, put
from dreamreader.errors import InvalidInput


class HookPoint:
    """The hooks on one module: edits first, recordings after, in the order they were given."""

    def __init__(self, module: nn.Module, shared: SessionState):
        self.module = module
        self.shared = shared
        self.sites: list[HookedSite] = []
        self._arguments: dict[str | None, Argument] = {}
        self._inputs: dict[int, Tensor] = {}

    def sides(self) -> set[str]:
        return {each.site.tap.side for each in self.sites}

    def attach(self, stack: ExitStack) -> None:
        """Put the hooks on the module until the stack is closed."""
        sides, module = self.sides(), self.module
        if sides & {"in", "delta", "probs"}:
            stack.push(module.register_forward_pre_hook(self.before, with_kwargs=True))
        if sides & {"out", "delta", "probs"}:
            stack.push(module.register_forward_hook(self._last()))
            if len(module._forward_hooks) > 1:
                _observers_last(module)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.shared.ours():
            return None
        changed = False
        for hooked in self.sites:
            side = hooked.site.tap.side
            if side == "probs" and not self.shared.subject.rehearsing:
                # Kept whole where probabilities are recorded, else seen share by share.
                shares = None if hooked.recorders else hooked.visit_attention
                heads, batch = hooked.site.heads or 1, entries_of(args, kwargs)
                self.shared.probs.begin(hooked.site.name, heads, batch, shares)
            elif side in ("in", "delta"):
                argument = self._argument(hooked)
                value = self._input(hooked, argument.get(args, kwargs))
                if side == "delta":
                    self._inputs[id(hooked)] = value.clone()
                    continue
                new = hooked.visit(value, value)
                if new is not None:
                    args, kwargs = argument.replace(args, kwargs, new)
                    changed = True
        return (args, kwargs) if changed else None

    def _last(self) -> Callable[[nn.Module, tuple, Any], Any]:
        """`after`, without what it looks for in vain where one site is the result of a module."""
        hooked = self.sites[0]
        if len(self.sites) > 1 or hooked.site.tap.side != "out" or self.shared.step_caches.are_on:
            return self.after
        return hooked.hook(self.after)

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not self.shared.ours():
            return None
        computed = self.shared.step_caches.has_computed(module)
        changed = False
        for hooked in self.sites:
            tap = hooked.site.tap
            side = tap.side
            if side == "in":
                continue
            if side == "probs":
                if not self.shared.subject.rehearsing:
                    self._probs(hooked, computed)
                continue
            value = output if type(output) is Tensor else pick(output, tap.element, hooked.name)
            if not computed:
                self._inputs.pop(id(hooked), None)
                hooked.pass_over()
                continue
            if side == "delta":
                new = self._delta(hooked, value, args)
            else:
                new = hooked.visit(value, args[0] if args else None)
            if new is not None:
                output = new if value is output else put(output, tap.element, new)
                changed = True
        return output if changed else None

    def _argument(self, hooked: HookedSite) -> Argument:
        name = hooked.site.tap.argument
        if name not in self._arguments:
            self._arguments[name] = Argument(self.module, name)
        return self._arguments[name]

    def _input(self, hooked: HookedSite, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            argument = self._argument(hooked).name
            raise InvalidInput(
                f"{hooked.site.name}: the argument {argument} is {type(value).__name__}, no tensor"
            )
        return value

    def _delta(self, hooked: HookedSite, value: Tensor, args: tuple) -> Tensor | None:
        given = self._inputs.pop(id(hooked))
        if given.shape != value.shape:
            raise InvalidInput(
                f"{hooked.site.name}: its input is {list(given.shape)}, its result "
                f"{list(value.shape)}; delta needs equal shapes"
            )
        if given.dtype != value.dtype:  # the difference has a type of its own
            new = hooked.visit(value - given, _first(args))
        else:
            new = hooked.visit(value, _first(args), minus=given)
        return None if new is None else given + new

    def _probs(self, hooked: HookedSite, computed: bool) -> None:
        if not computed:
            self.shared.probs.drop()
            hooked.pass_over()
            return
        attention = self.shared.probs.end()
        if attention is not None:
            hooked.visit_attention(attention)


def _first(args: tuple) -> Any:
    """What a module was called with in the first place; None where it had names for all."""
    return args[0] if args else None


def _observers_last(module: nn.Module) -> None:
    """Let the hooks by which transformers collects `hidden_states` see what edits give.

    It installs them for good at the first call that asks for hidden states, so from the second run
    on they would stand before ours, and a pipeline that reads hidden_states[-2] would lose edits.
    """
    for number, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__qualname__", "").endswith("output_capturing_hook"):
            module._forward_hooks[number] = module._forward_hooks.pop(number)
