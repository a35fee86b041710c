"""What the hooks of one session have in common."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamreader.engine._cache import RunRow
from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._edit_context import RowSet
from dreamreader.engine._lm_tracker import LanguageTracker
from dreamreader.engine._notes import NoteTable
from dreamreader.engine._probs import ProbsMode
from dreamreader.engine._request import Request
from dreamreader.engine._sites import Site
from dreamreader.engine._step_caches import StepCaches
from dreamreader.engine._subject import Subject
from dreamreader.engine._threads import Owner
from dreamreader.engine._tracker import Tracker
from dreamreader.engine._words import Words
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired

SERIAL, TIMELESS, PLACELESS = range(3)


class Traits(NamedTuple):
    """What the requests of a site have in common.

    Attributes:
        moving: edits that themselves, not only their selection, differ from step to step.
        kind: which of the session's numbers stands for the calls of one plan.
        any_time: the same, whatever the step.
        always: they are at work in every call.
        follows_prompt: a plan holds for one run only: the place of a word changes with the prompt.
        layouts: dimensions that they name.
    """

    moving: frozenset[int]
    kind: int
    any_time: int
    always: bool
    follows_prompt: bool
    layouts: tuple[str, ...]

    @classmethod
    def of(cls, requests: Iterable[Request], edits: Iterable[tuple[int, Any]]) -> "Traits":
        """Those of requests, and of the edits among them by their numbers."""
        moving = frozenset([n for n, each in edits if each.changes_with_step])
        any_time, timed, branched, follows_prompt = PLACELESS, False, False, False
        layouts: dict[str, None] = {}
        for each in requests:
            if each.tokens is not None:
                any_time = TIMELESS
                follows_prompt = follows_prompt or isinstance(each.tokens, str | tuple)
            timed = timed or each.needs_time
            branched = branched or each.branch is not None
            if each.layout is not None:
                layouts[each.layout] = None
        kind = SERIAL if timed or moving else any_time
        always = not (timed or branched)
        return cls(moving, kind, any_time, always, follows_prompt, tuple(layouts))


class SessionState:
    """What the hooked sites of one session have in common."""

    def __init__(
        self,
        tracker: Tracker,
        subject: Subject,
        rowset: RowSet,
        prompts: Sequence[str] | None,
        seeds: Sequence[int] | None,
        words: Words,
    ):
        self.tracker = tracker
        self.subject = subject
        self.rowset = rowset
        self.prompts = prompts
        self.seeds = None if seeds is None else tuple(seeds)
        self.words = words
        owner = Owner()
        self.thread, self._is_here = owner.ident, owner.here
        self.seen_elsewhere = False
        self.step_caches = StepCaches()
        self.requests: list[tuple[str, Request]] = []
        self.branches_seen: dict[str, None] = {}
        self.steps_seen: dict[int, None] = {}
        self.drops_branch = False
        self.programs: dict[tuple, Any] = {}  # of edits that are the same at many sites
        self.traits: dict[tuple[int, ...], Traits] = {}  # by the numbers of a site's requests
        self.tables: dict[torch.device, NoteTable] = {}
        self.numbers = [-1, -1, -1]  # of the latest call: its kind, at any time, at any place too
        self._serials: dict[tuple, int] = {}
        self.prompts_of: dict[int, Sequence[str] | None] = {}
        self.again: CallContext | None = None  # of a checkpointed part that is computed again
        self.latest: CallContext | None = None  # whose `numbers` these are
        self._checked_run = -1

    @cached_property
    def probs(self) -> ProbsMode:
        return ProbsMode()

    def ours(self) -> bool:
        """Whether a call that a hook sees is to be edited and recorded."""
        if self.subject.paused:
            return False
        if self._is_here():
            return True
        self.seen_elsewhere = True
        return False

    def current(self, site: Site) -> CallContext:
        """What is running.

        Of `numbers`, that at SERIAL stands for its kind of call, at TIMELESS for it at any time, at
        PLACELESS for it at any time and decoding position.
        """
        now = self.tracker.now or self.again
        if now is None:
            now = self.tracker.outside(site.component)
        if now is not self.latest:
            self.latest = now
            self.prompts_of.setdefault(now.run, self.tracker.prompts)
            known = self._serials
            for kind, key in enumerate((now.stamp, now.shape_key, now.placeless_key)):
                self.numbers[kind] = known.setdefault(key, len(known))
            if isinstance(now.branches, tuple):
                self.branches_seen.update(dict.fromkeys(now.branches))
            if isinstance(now.instant, StepInfo):
                self.steps_seen[now.instant.step] = None
            if now.phase == "denoise" and now.run != self._checked_run:
                self._check_windows(now)
        return now

    def is_active(self, request: Request, now: CallContext, site: str) -> bool:
        """Whether the request applies to a call.

        Raises:
            ClockUnknown: it asks for a time or branch that cannot be known there.
        """
        if request.branch is None and not request.needs_time:
            return True
        if request.is_empty:
            return False
        if request.branch is not None:
            if not isinstance(now.branches, tuple):
                raise ClockUnknown(
                    f"{site}: branch={request.branch!r} was asked for. {now.branches}"
                )
            if not set(request.branches or ()) & set(now.branches):
                return False
        if not request.needs_time:
            return True
        if not isinstance(now.instant, StepInfo):
            raise ClockUnknown(f"{site}: a step window was asked for. {now.instant}")
        if now.phase == "language" and (request.timesteps or request.sigmas or request.fraction):
            raise ClockUnknown(
                f"{site}: a language model has decoding steps, no timesteps or noise"
            )
        return request.runs_at(now.instant, self.tracker.total())

    def moments(self, request: Request, now: CallContext) -> int:
        """How many steps of this run a recording will keep, as far as the schedule tells."""
        schedule = self.tracker.schedule()
        if now.phase != "denoise" or not schedule:
            return 1
        total = self.tracker.total()
        return sum(request.runs_at(each, total) for each in schedule)

    def row(self, number: int, prompts: Sequence[str] | None = None) -> RunRow:
        """A row of the running or latest run, or of given prompts, with what is known of it."""
        prompts = self.prompts or self.tracker.prompts or () if prompts is None else prompts
        seeds = self.seeds or ()
        return RunRow(
            number,
            prompts[number] if number < len(prompts) else None,
            seeds[number] if number < len(seeds) else None,
        )

    @property
    def has_branches(self) -> bool:
        """Whether entries of a batch may be guidance branches, so that rows need their layout."""
        return self.subject.kind == "pipeline"

    def rows_asked(self) -> int | None:
        """Rows that the caller's own call has; None where its arguments do not say."""
        return self.tracker.rows

    def words_for(
        self,
        now: CallContext,
        site: Site,
        branches: tuple[str, ...],
        rows: int,
        beams: int = 1,
        asked: Tensor | None = None,
    ):
        """A function that finds the token numbers of a word for every batch entry.

        `asked`, [batch], is 0 at entries that the request leaves out: nothing is looked for there.
        """
        everywhere = torch.ones(len(branches), rows, beams) if asked is None else asked
        wanted = (everywhere.reshape(len(branches), rows, beams)[..., 0] != 0).tolist()

        def find_word(word: str) -> list[list[int]]:
            found: list[list[int]] = []
            for branch, where in zip(branches, wanted, strict=True):
                if not any(where):
                    found += [[]] * rows * beams
                    continue
                for places in self._word(word, now, site, branch, where):
                    found += [places] * beams
            return found

        return find_word

    def _word(
        self, word: str, now: CallContext, site: Site, branch: str, wanted: list[bool]
    ) -> list[list[int]]:
        """Token numbers of a word in the wanted rows of a branch; none in the others."""
        rows = len(wanted)
        places = self.words.positions(word, now, site.name, branch, rows) or [[]] * rows
        places = [each if asked else [] for each, asked in zip(places, wanted, strict=True)]
        if branch == "cond":
            missing = [row for row, each in enumerate(places) if wanted[row] and not each]
            if missing:
                text = self.words.text(now, branch, missing[0])
                raise InvalidInput(
                    f"{site.name}: the word {word!r} is not in the prompt of row {missing[0]}"
                    + (f": {text!r}" if text else "")
                )
        tracker = self.tracker
        own = tracker.own_of_prompt() if isinstance(tracker, LanguageTracker) else None
        if own is not None:  # indices of a language model count the row's own tokens
            places = [[int(own[row][at]) for at in each] for row, each in enumerate(places)]
        return places

    def _check_windows(self, now: CallContext) -> None:
        """Refuse a step window without any step of the schedule, before anything is computed."""
        self._checked_run = now.run
        schedule = self.tracker.schedule()
        total = self.tracker.total()
        for component, request in self.requests:
            if not request.needs_time or request.is_empty or component != now.component:
                continue
            if schedule and not any(request.runs_at(each, total) for each in schedule):
                raise NeverFired(
                    f"{request.describe()} can never fire: {describe_schedule(schedule)}"
                )


def describe_schedule(schedule: Sequence[StepInfo]) -> str:
    """The steps of a run in words."""
    first, last = schedule[0], schedule[-1]
    sigma = "" if first.sigma is None else f", sigma {first.sigma:.4g} .. {last.sigma or 0:.4g}"
    return (
        f"this run has steps {first.step} .. {last.step} (timestep {first.timestep:g} .. "
        f"{last.timestep:g}{sigma}, fraction {first.fraction:.3g} .. {last.fraction:.3g})"
    )
