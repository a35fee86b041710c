"""From the edits active at a site to programs: one pass over memory where possible."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._edit_context import EditContext
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._notes import HALF, Notes
from dreamreader.ops import Instruction, Program, intervene
from dreamreader.ops.intervention import intervene_seen, intervention_of

_MOST = 32  # instructions of one program
_PATCHES = 8


@dataclass(eq=False)
class ActiveEdit:
    """One edit at work: its number in the session, its place with its selection."""

    number: int
    edit: EditRequest
    place: EditContext


@dataclass(eq=False)
class Hit:
    """Which branches and rows an edit touches with a strength above 0, worked out when compiled."""

    number: int
    branches: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(eq=False)
class Stage:
    """One pass: a program, or an edit that is a function.

    `alone` has one stage for each edit of a program of several, to tell whether each changes
    anything.
    """

    numbers: tuple[int, ...]
    program: Program | None = None
    active: ActiveEdit | None = None
    alone: "tuple[Stage, ...]" = ()

    def run(self, x: Tensor) -> Tensor:
        if self.program is not None:
            return intervene(x, self.program)
        assert self.active is not None
        if self.active.edit.selects:
            return self.active.edit.apply(x, self.active.place)
        return _blend(x, self.active)


@dataclass(eq=False)
class Compiled:
    """Stages in order, and what they touch."""

    stages: list[Stage]
    hits: list[Hit]

    def __post_init__(self):
        self.numbers = frozenset(each.number for each in self.hits)
        programs = [each.program for each in self.stages if each.program is not None]
        self.has_graph = any(each.requires_grad for each in programs)
        self.has_function = len(programs) < len(self.stages)
        # the program and its edits, where there is nothing else to do
        lone = len(self.stages) == len(programs) == 1 and not self.has_graph
        self._lone = (programs[0], self.stages[0].numbers) if lone else None

    def run(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage.run(x)
        return x

    def run_noted(self, x: Tensor, now: CallContext, notes: Notes) -> Tensor:
        """Like `run`; notes say later what each edit did to the values."""
        for stage in self.stages:
            if stage.program is not None:
                compare = not notes.knows(stage.numbers)  # reads, so before there is a new place
                if compare or x.dtype in HALF:
                    table, at = notes.place(now, stage.numbers, x)
                    y = intervene_seen(x, stage.program, table, at, compare)
                else:  # it has changed values, and cannot overflow: nothing is left to learn
                    y = intervene(x, stage.program)
            else:
                y = stage.run(x)
                notes.look(now, stage.numbers, x, y)
            if stage.alone and not notes.knows(stage.numbers):
                with torch.no_grad():
                    for each in stage.alone:
                        assert each.program is not None
                        x = intervene_seen(x, each.program, *notes.place(None, each.numbers, x))
            x = y
        return x

    def settle(self, x: Tensor, notes: Notes) -> Callable[[Tensor], Tensor] | None:
        """`run` for values of the form of x where nothing is left to learn of the edit, else None.

        It has changed values, and in single precision and above it cannot overflow.
        """
        if self._lone is None or x.dtype in HALF:
            return None
        program, numbers = self._lone
        return intervention_of(program, x) if notes.knows(numbers) else None

    def specialize(self, x: Tensor, notes: Notes) -> Callable[[Tensor, CallContext], Tensor]:
        """`run_noted` for values of the form of x: its choices are made once."""

        def general(x: Tensor, now: CallContext) -> Tensor:
            return self.run_noted(x, now, notes)

        if self._lone is None:
            return general
        program, numbers = self._lone
        apply, changed = intervention_of(program, x), notes.known_changed
        known = False  # whether each edit has changed a value so far: then it stays so

        def run(x: Tensor, now: CallContext) -> Tensor:
            nonlocal known
            known = known or changed.issuperset(numbers)
            return apply(x) if known else general(x, now)

        def run_half(x: Tensor, now: CallContext) -> Tensor:
            nonlocal known
            known = known or changed.issuperset(numbers)
            return apply(x, *notes.place(now, numbers, x)) if known else general(x, now)

        return run_half if x.dtype in HALF else run


def compile_edits(active: Sequence[ActiveEdit], shape: tuple[int, int, int]) -> Compiled:
    """Programs for the edits in their order; edits without any strength take no part.

    A new program begins before an edit that restores norms, since it means the norm before itself,
    after a function, and where a program is full.
    """
    stages: list[Stage | list[_Work]] = []
    hits: list[Hit] = []
    for each in active:
        each.edit.check(each.place)
        if each.edit.is_function:
            hit = _hit(each, each.edit.touched(each.place))
            if hit is not None:
                stages.append(Stage((each.number,), active=each))
                hits.append(hit)
            continue
        instructions = [one for one in each.edit.instructions(each.place) if _acts(one)]
        hit = _hit(each, _union(instructions)) if instructions else None
        if hit is None and not any(_learns(one) for one in instructions):
            continue
        hits.append(hit or Hit(each.number, (), ()))
        last = stages[-1] if stages else None
        if isinstance(last, list) and not each.edit.keeps_norm and _fits(last, instructions):
            last.append((each, instructions))
        else:
            stages.append([(each, instructions)])
    done = [each if isinstance(each, Stage) else _stage(each, shape) for each in stages]
    return Compiled(done, hits)


_Work = tuple[ActiveEdit, list[Instruction]]


def _stage(group: list[_Work], shape: tuple[int, int, int]) -> Stage:
    numbers = tuple(each.number for each, _ in group)
    alone = tuple(_stage([each], shape) for each in group) if len(group) > 1 else ()
    flat = [one for _, instructions in group for one in instructions]
    rows, tokens, width = shape
    device = group[0][0].place.device
    program = Program(flat, rows=rows, tokens=tokens, width=width, device=device)
    return Stage(numbers, program, alone=alone)


def _fits(group: list[_Work], more: list[Instruction]) -> bool:
    flat = [one for _, instructions in group for one in instructions] + more
    patches = sum(one.kind == "patch" for one in flat)
    return len(flat) <= _MOST and patches <= _PATCHES


def _acts(one: Instruction) -> bool:
    """Whether any strength differs from 0; one that wants a gradient always takes part."""
    if isinstance(one.strength, Tensor):
        return _learns(one) or bool((one.strength != 0).any())
    return one.strength != 0


def _learns(one: Instruction) -> bool:
    return isinstance(one.strength, Tensor) and one.strength.requires_grad


def _union(instructions: Sequence[Instruction]) -> Tensor:
    strengths = [torch.as_tensor(one.strength).detach().cpu() for one in instructions]
    touched = strengths[0] != 0
    for each in strengths[1:]:
        touched = touched | (each != 0)
    return touched


def _hit(each: ActiveEdit, touched: Tensor) -> Hit | None:
    place = each.place
    touched = touched.detach().cpu() != 0
    if touched.dim() < 2:
        touched = touched.reshape(-1, 1)
    entries = touched.any(1).expand(place.batch)  # [batch]
    if not bool(entries.any()):
        return None
    by_branch = entries.reshape(len(place.branches), place.rows, place.beams).any(2)
    names = [name for name, rows in zip(place.branches, by_branch, strict=True) if rows.any()]
    rows = by_branch.any(0).nonzero().flatten() + place.first
    return Hit(each.number, tuple(names), tuple(rows.tolist()))


def _blend(x: Tensor, active: ActiveEdit) -> Tensor:
    """A function's result where the selection is 1, the input bit for bit where it is 0."""
    y = active.edit.apply(x, active.place)
    share = active.place.selected.to(x.device).unsqueeze(-1)  # [batch or 1, tokens or 1, 1]
    if y is x or bool((share == 1).all()):
        return y
    soft = bool(((share != 0) & (share != 1)).any())
    mixed = x + share.to(x.dtype) * (y - x) if soft else y
    return torch.where(share == 0, x, torch.where(share == 1, y, mixed))
