"""diffusers' step caches skip modules and hand out old values: telling what was really computed.

A skipped module's own hooks still fire, those of its children do not. So every module under a step
cache gets a sentinel on its children.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn

from dreamreader.errors import InvalidInput

# hooks of diffusers that neither skip a module nor hand out old values; any other may
_HARMLESS = (
    "cp_input",
    "cp_output",
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
    "smoothed_energy_guidance",
    "SmoothedEnergyGuidance",
    "layer_skip",
    "SkipLayerGuidance",
    "AutoGuidance",
    "PerturbedAttentionGuidance",
)
_LEADER = "fbc_leader_block_hook"


class StepCaches:
    """Sentinels for the modules of one session that are under a step cache."""

    def __init__(self) -> None:
        self._ran: dict[nn.Module, bool] = {}

    def watch(self, modules: Iterable[tuple[str, nn.Module, str]], stack: ExitStack) -> None:
        """Set sentinels where needed.

        Args:
            modules: name, module and side of every tap.
            stack: removes the sentinels at its end.

        Raises:
            InvalidInput: it could not be told whether a module was computed.
        """
        for name, module, side in modules:
            names = cache_hooks(module)
            if not names:
                continue
            if side == "in":
                raise InvalidInput(
                    f"{name}: the module is under a step cache ({', '.join(names)}), which may "
                    "pass its input on without using it; take its out, or a site inside it"
                )
            if module in self._ran:
                continue
            children = _callable_children(module)
            if not children:
                raise InvalidInput(
                    f"{name}: the module is under a step cache ({', '.join(names)}) and has no "
                    "parts that would show whether it was computed; take the block around it"
                )
            self._ran[module] = False
            stack.enter_context(_Handle(module.register_forward_pre_hook(self._starts)))
            for child in children:
                hook = self._sentinel(module)
                stack.enter_context(_Handle(child.register_forward_pre_hook(hook)))

    @property
    def are_on(self) -> bool:
        """Whether any of the watched modules is under one."""
        return bool(self._ran)

    def has_computed(self, module: nn.Module) -> bool:
        """Whether the call of the module that just ended computed its own result."""
        if not self._ran or module not in self._ran:
            return True
        return self._ran[module] and not _adds_old_residual(module)

    def _starts(self, module: nn.Module, args: Any) -> None:
        self._ran[module] = False

    def _sentinel(self, module: nn.Module):
        def hook(child: nn.Module, args: Any) -> None:
            self._ran[module] = True

        return hook


class _Handle:
    """A hook handle as a context manager that only removes."""

    def __init__(self, handle: Any):
        self._handle = handle

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def cache_hooks(module: nn.Module) -> list[str]:
    """Names of the step caches that sit on this very module."""
    registry = vars(module).get("_diffusers_hook")  # getattr takes ten times as long to say no
    if registry is None:
        return []
    names = list(getattr(registry, "hooks", {}))
    return [name for name in names if not name.startswith(_HARMLESS)]


def caches_batch(module: nn.Module) -> bool:
    """Whether FasterCache drops the unconditional half inside this denoiser."""
    return any(name.startswith("faster_cache_denoiser") for name in cache_hooks(module))


def _adds_old_residual(module: nn.Module) -> bool:
    """FirstBlockCache: where it skips, the first block runs but adds an old residual."""
    hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get(_LEADER)
    if hook is None:
        return False
    return not hook.state_manager.get_state().should_compute


def _callable_children(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        inside = _callable_children(child) if isinstance(child, nn.ModuleList) else [child]
        found += inside
    return found
