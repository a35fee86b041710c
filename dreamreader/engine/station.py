"""Stations: the hooks on one module."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from dreamreader.engine.probs import entries_of
from dreamreader.engine.shared import Shared
from dreamreader.engine.site_run import SiteRun
from dreamreader.engine.taps import Argument, pick, put
from dreamreader.errors import InvalidInput


class Station:
    """The hooks on one module: edits first, recordings after, in the order they were given."""

    def __init__(self, module: nn.Module, shared: Shared):
        self.module = module
        self.shared = shared
        self.runs: list[SiteRun] = []
        self._arguments: dict[str | None, Argument] = {}
        self._inputs: dict[int, Tensor] = {}

    def sides(self) -> set[str]:
        return {each.site.tap.side for each in self.runs}

    def attach(self, stack: ExitStack) -> None:
        """Put the hooks on the module until the stack is closed."""
        sides, module = self.sides(), self.module
        if sides & {"in", "delta", "probs"}:
            stack.callback(module.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        if sides & {"out", "delta", "probs"}:
            stack.callback(module.register_forward_hook(self.after).remove)
            _observers_last(module)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.shared.ours():
            return None
        changed = False
        for run in self.runs:
            side = run.site.tap.side
            if side == "probs" and not self.shared.subject.rehearsing:
                # Kept whole where probabilities are recorded, else seen share by share.
                shares = None if run.recorders else run.visit_attention
                heads, batch = run.site.heads or 1, entries_of(args, kwargs)
                self.shared.probs.begin(run.site.name, heads, batch, shares)
            elif side in ("in", "delta"):
                argument = self._argument(run)
                value = self._input(run, argument.get(args, kwargs))
                if side == "delta":
                    self._inputs[id(run)] = value.clone()
                    continue
                new = run.visit(value, value)
                if new is not None:
                    args, kwargs = argument.replaced(args, kwargs, new)
                    changed = True
        return (args, kwargs) if changed else None

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not self.shared.ours():
            return None
        computed = self.shared.step_caches.computed(module)
        changed = False
        for run in self.runs:
            tap = run.site.tap
            side = tap.side
            if side == "in":
                continue
            if side == "probs":
                if not self.shared.subject.rehearsing:
                    self._probs(run, computed)
                continue
            value = output if type(output) is Tensor else pick(output, tap.element, run.name)
            if not computed:
                self._inputs.pop(id(run), None)
                run.pass_over()
                continue
            if side == "delta":
                new = self._delta(run, value, args)
            else:
                new = run.visit(value, args[0] if args else None)
            if new is not None:
                output = new if value is output else put(output, tap.element, new)
                changed = True
        return output if changed else None

    def _argument(self, run: SiteRun) -> Argument:
        name = run.site.tap.argument
        if name not in self._arguments:
            self._arguments[name] = Argument(self.module, name)
        return self._arguments[name]

    def _input(self, run: SiteRun, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            argument = self._argument(run).name
            raise InvalidInput(
                f"{run.site.name}: the argument {argument} is {type(value).__name__}, no tensor"
            )
        return value

    def _delta(self, run: SiteRun, value: Tensor, args: tuple) -> Tensor | None:
        given = self._inputs.pop(id(run))
        if given.shape != value.shape:
            raise InvalidInput(
                f"{run.site.name}: its input is {list(given.shape)}, its result "
                f"{list(value.shape)}; delta needs equal shapes"
            )
        if given.dtype != value.dtype:  # the difference has a type of its own
            new = run.visit(value - given, _first(args))
        else:
            new = run.visit(value, _first(args), minus=given)
        return None if new is None else given + new

    def _probs(self, run: SiteRun, computed: bool) -> None:
        if not computed:
            self.shared.probs.drop()
            run.pass_over()
            return
        attention = self.shared.probs.end()
        if attention is not None:
            run.visit_attention(attention)


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
