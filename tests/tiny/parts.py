"""Components of tiny pipelines by family: any class of a family is put together from them.

`assemble(class, family, **extra)` gives a class whatever of the family's components its
constructor asks for. The components of a family are built once a process; every pipeline gets
copies.
"""

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from . import controls, mmdit, more, unets, video
from .weights import settle

__all__ = ["assemble", "parts_of", "settle"]


def _of(name: str) -> Callable[[], dict[str, Any]]:
    def build() -> dict[str, Any]:
        from . import pipeline

        return dict(pipeline(name).components)

    return build


_PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        name: _of(name)
        for name in (
            "sd sdxl sd3 flux flux-true-cfg qwen-image aura-flow pixart-sigma sana cogview4 lumina2"
        ).split()
    },
    **unets.PARTS,
    **mmdit.PARTS,
    **controls.PARTS,
    **more.PARTS,
    **video.PARTS,
}

_NEVER = {  # parts that change what a pipeline returns, or load what is not there
    "requires_safety_checker": False,
    "safety_checker": None,
    "feature_extractor": None,
    "image_encoder": None,
    "image_processor": None,
    "add_watermarker": False,
    "watermarker": None,
}


_FTFY = types.SimpleNamespace(fix_text=str)  # mends broken texts; not installed here


@functools.cache
def parts_of(family: str) -> dict[str, Any]:
    """The components of a family by name; built once."""
    return _PARTS[family]()


def assemble(name: str, family: str, **extra: Any) -> Any:
    """A pipeline of the diffusers class `name` from the components of `family`, and `extra`."""
    import diffusers

    own = getattr(diffusers, name)
    if not hasattr(module := sys.modules[own.__module__], "ftfy"):
        module.ftfy = _FTFY  # pyright: ignore[reportAttributeAccessIssue]
    given = {**_NEVER, **parts_of(family), **extra}
    wanted = list(inspect.signature(own.__init__).parameters)[1:]
    found = {key: given[key] for key in wanted if key in given}
    for key, value in found.items():
        if key.endswith("scheduler") or isinstance(value, nn.Module):
            found[key] = copy.deepcopy(value)  # perturbed attention leaves its processors behind
    pipe = own(**found)
    pipe.set_progress_bar_config(disable=True)
    return pipe
