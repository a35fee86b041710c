"""A session: hooks on a subject for the length of a with block, and what they found."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from dreamreader.engine.cache import Activation, Row
from dreamreader.engine.checkpointing import recomputed_as_before
from dreamreader.engine.clock_schedule import Instant
from dreamreader.engine.firing import Firing, FiringReport
from dreamreader.engine.lm_tracker import LanguageTracker, reads_text
from dreamreader.engine.notes import Notes
from dreamreader.engine.now import Now
from dreamreader.engine.place import RowSet
from dreamreader.engine.probs import ProbsMode
from dreamreader.engine.recorder import Memory, Recorder
from dreamreader.engine.request import EditRequest, Record, Request, Stream, Watch
from dreamreader.engine.selection import described
from dreamreader.engine.sites import Site, find
from dreamreader.engine.station import SiteRun, Station
from dreamreader.engine.step_caches import StepCaches, cache_hooks, caches_batch
from dreamreader.engine.stream import Streamer
from dreamreader.engine.subject import Subject, is_compiled, parts
from dreamreader.engine.threads import Owner
from dreamreader.engine.tracker import ModuleTracker, PipelineTracker, Tracker
from dreamreader.engine.watch import Watcher
from dreamreader.engine.words import Words
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired, UnknownName


class Shared:
    """What the stations of one session have in common."""

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
        self._is_here = Owner().here
        self.seen_elsewhere = False
        self.probs = ProbsMode()
        self.step_caches = StepCaches()
        self.requests: list[tuple[str, Request]] = []
        self.branches_seen: dict[str, None] = {}
        self.steps_seen: dict[int, None] = {}
        self.drops_branch = False
        self.serial = -1
        self.timeless = -1
        self.placeless = -1
        self._serials: dict[tuple, int] = {}
        self.prompts_of: dict[int, Sequence[str] | None] = {}
        self.again: Now | None = None  # what ran when a part was called that is computed again
        self.latest: Now | None = None  # what `serial`, `timeless` and `placeless` are of
        self._checked_run = -1

    def ours(self) -> bool:
        """Whether a call that a hook sees is to be edited and recorded."""
        if self.subject.paused:
            return False
        if self._is_here():
            return True
        self.seen_elsewhere = True
        return False

    def current(self, site: Site) -> Now:
        """What is running.

        `serial` stands for its kind of call, `timeless` for it at any time, `placeless` for it at
        any time and decoding position.
        """
        now = self.tracker.now or self.again
        if now is None:
            now = self.tracker.outside(site.component)
        if now is not self.latest:
            self.latest = now
            self.prompts_of.setdefault(now.run, self.tracker.prompts)
            self.serial = self._serials.setdefault(now.stamp, len(self._serials))
            self.timeless = self._serials.setdefault(now.shape_key, len(self._serials))
            self.placeless = self._serials.setdefault(now.placeless_key, len(self._serials))
            if isinstance(now.branches, tuple):
                self.branches_seen.update(dict.fromkeys(now.branches))
            if isinstance(now.instant, Instant):
                self.steps_seen[now.instant.step] = None
            if now.phase == "denoise" and now.run != self._checked_run:
                self._check_windows(now)
        return now

    def is_active(self, request: Request, now: Now, site: str) -> bool:
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
        if not isinstance(now.instant, Instant):
            raise ClockUnknown(f"{site}: a step window was asked for. {now.instant}")
        if now.phase == "language" and (request.timesteps or request.sigmas or request.fraction):
            raise ClockUnknown(
                f"{site}: a language model has decoding steps, no timesteps or noise"
            )
        return request.runs_at(now.instant, self.tracker.total())

    def moments(self, request: Request, now: Now) -> int:
        """How many steps of this run a recording will keep, as far as the schedule tells."""
        schedule = self.tracker.schedule()
        if now.phase != "denoise" or not schedule:
            return 1
        total = self.tracker.total()
        return sum(request.runs_at(each, total) for each in schedule)

    def row(self, number: int, prompts: Sequence[str] | None = None) -> Row:
        """A row of the running or latest run, or of given prompts, with what is known of it."""
        prompts = self.prompts or self.tracker.prompts or () if prompts is None else prompts
        seeds = self.seeds or ()
        return Row(
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
        now: Now,
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
        self, word: str, now: Now, site: Site, branch: str, wanted: list[bool]
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

    def _check_windows(self, now: Now) -> None:
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


class Session(AbstractContextManager):
    """Edits and recordings on a subject, from the start of a with block to its end.

    Args:
        subject: what is hooked.
        edits, records: requests in the order in which they apply; `records` holds watches and
            streams too.
        rowset: the rows of the run, where a plan exists.
        prompts, seeds: of these rows.
        prompt_length: tokens of a language model's padded prompt.
        memory_limit: bytes that recordings may hold; most of the free memory by default. A `Memory`
            goes on with what earlier sessions hold.
        shapes: gets the shapes that sites had.
        require: whether an edit or recording that never fires is an error at the end.
    """

    def __init__(
        self,
        subject: Subject,
        edits: Sequence[EditRequest] = (),
        records: Sequence[Record | Watch | Stream] = (),
        *,
        rowset: RowSet | None = None,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        prompt_length: int | None = None,
        memory_limit: int | Memory | None = None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        tokenizer: Any = None,
    ):
        self.subject = subject
        self.edits = list(edits)
        self.records = list(records)
        self.report = FiringReport()
        self.recorders: list[Recorder] = []
        self._shapes = shapes if shapes is not None else {}
        self._memory = memory_limit if isinstance(memory_limit, Memory) else Memory(memory_limit)
        self._runs: dict[str, SiteRun] = {}
        self._stack: ExitStack | None = None
        tracker = _tracker(subject, prompt_length)
        if prompts is not None and rowset is not None:  # a pipeline says its own once it runs
            tracker.prompts = list(prompts[rowset.start :][: rowset.count])
        words = Words(tracker, subject, tokenizer)
        self._shared = Shared(tracker, subject, rowset or RowSet(), prompts, seeds, words)

    def __enter__(self) -> Self:
        modules = self.subject.modules()
        stations = self._resolve(modules)
        shared = self._shared
        with ExitStack() as stack:
            every = _parts(self.subject)
            if any(map(is_compiled, every)):
                # Hooks are not seen by code that is compiled already: run the modules as they are.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                self.report.notes.append(
                    "compiled modules ran uncompiled while hooks were attached"
                )
            if self.edits:
                stack.enter_context(recomputed_as_before(shared, every))
            stack.enter_context(shared.tracker)
            taps = [
                (run.site.name, run.site.tap.module, run.site.tap.side)
                for run in self._runs.values()
            ]
            shared.step_caches.watch(taps, stack)
            hooked = [each for each in modules.values() if "_diffusers_hook" in vars(each)]
            caches = sorted({name for each in hooked for name in cache_hooks(each)})
            if caches:
                self.report.notes.append(f"step caches are on: {', '.join(caches)}")
            if any("probs" in station.sides() for station in stations):
                stack.enter_context(shared.probs)
            for station in stations:
                _attach(station, stack)
            self._stack = stack.pop_all()
        shared.drops_branch = any(map(caches_batch, self.subject.components().values()))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        self._finish()
        if kind is None:
            self._require()

    def activations(self, rows: Sequence[Row] | None = None) -> list[Activation]:
        """What the recordings kept, in the order they were asked for."""
        described = self._rows if rows is None else lambda run: rows
        found = [each.activation(described) for each in self.recorders]
        return [each for each in found if each is not None]

    def _resolve(self, modules: Mapping[str, nn.Module]) -> list[Station]:
        """Sites of every request; stations in the order in which modules were first named."""
        stations: dict[nn.Module, Station] = {}
        number = 0
        for request in [*self.edits, *self.records]:
            named: dict[str, Site] = {}
            for text in request.sites:
                named |= {site.name: site for site in find(modules, text)}
            for name, site in named.items():
                run = self._runs.get(name)
                if run is None:
                    run = self._runs[name] = SiteRun(site, self._shared)
                    module = site.tap.module
                    if module not in stations:
                        stations[module] = Station(module, self._shared)
                    stations[module].runs.append(run)
                kind = "edit" if isinstance(request, EditRequest) else "record"
                self.report.firings.append(Firing(request.describe(), kind, name, number))
                if isinstance(request, EditRequest):
                    run.edits.append((number, request))
                elif isinstance(request, Record):
                    self._record(request, name, number, run)
                elif isinstance(request, Watch):
                    run.watchers.append(Watcher(request, number))
                elif isinstance(request, Stream):
                    run.streamers.append(Streamer(request, number, site, self._shared))
                self._shared.requests.append((site.component, request))
            number += 1
        return list(stations.values())

    def _record(self, request: Record, name: str, number: int, run: SiteRun) -> None:
        if any(each.name == name for each in self.recorders):
            raise InvalidInput(f"{name} is recorded twice; ask for it once")
        recorder = Recorder(request, name, number, self._memory)
        self.recorders.append(recorder)
        run.recorders.append(recorder)

    def _rows(self, run: int) -> list[Row]:
        shared = self._shared
        prompts = shared.prompts or shared.prompts_of.get(run) or ()
        count = shared.rowset.total or max(len(prompts), len(shared.seeds or ()))
        return [shared.row(number, prompts) for number in range(count)]

    def _finish(self) -> None:
        """Turn what the stations noted into the firing report."""
        lines = {(each.number, each.site): each for each in self.report.firings}
        for name, run in self._runs.items():
            if run.shape is not None:
                self._shapes[name] = run.shape
            for now, plan in run.fired:
                _count(lines, name, now, plan)
            for now, numbers in run.skipped:
                for number in numbers:
                    step = now.instant.step if isinstance(now.instant, Instant) else 0
                    lines[number, name].not_computed[step] += 1
            _note_unchanged(lines, name, run)
            _note_overflow(lines, name, run)
            run.release()
            run.fired.clear()
            run.skipped.clear()
        if self._shared.seen_elsewhere:
            self.report.notes.append(_ELSEWHERE)
        _note_missing_steps(self.report, self.edits + self.records, self._shared)

    def _require(self) -> None:
        """Raise for what never fired.

        Raises:
            UnknownName: a branch that the pipeline does not have.
            NeverFired: a request without any call, or an explicit site that never ran.
        """
        seen, rows = self._shared.branches_seen, self._shared.rowset
        partial = rows.count != rows.total
        for number, request in enumerate([*self.edits, *self.records]):
            if request.is_empty:
                continue
            unknown = [each for each in request.branches or () if each not in seen]
            if unknown and seen:
                raise UnknownName(
                    "branch",
                    unknown[0],
                    seen,
                    f"{request.describe()}: this run had {', '.join(seen)}",
                )
            mine = [each for each in self.report.firings if each.number == number]
            explicit = {text for text in request.sites if not any(c in text for c in "*[?")}
            for each in mine:
                if partial and each.missed and getattr(request, "rows", None) is not None:
                    continue  # its rows may be in another batch: see `FiringReport.require_hits`
                if each.calls == 0 and (each.site in explicit or not any(m.calls for m in mine)):
                    raise NeverFired(self._why_never(request, each))

    def _why_never(self, request: Request, line: Firing) -> str:
        said = f"{request.describe()} never fired at {line.site}: "
        steps = ", ".join(map(str, sorted(self._shared.steps_seen)))
        if line.not_computed:
            return said + "a step cache skipped the module at every step that was asked for"
        run = self._runs[line.site]
        if line.missed:
            return said + self._why_missed(request, line, run)
        if run.shape is not None:
            branches = ", ".join(self._shared.branches_seen)
            return said + (
                f"the module ran, but not in the selection; steps that ran: {steps or 'unknown'}; "
                f"branches: {branches or 'unknown'}"
            )
        ran = [name for name, each in self._runs.items() if each.shape is not None]
        return said + (
            "the module was not called in this run"
            + (f"; steps that ran: {steps}" if steps else "; no part of the subject was run")
            + (f"; sites that did run: {', '.join(ran[:5])}" if ran else "")
            + _nearby(self.subject, line.site)
            + (f"; {_ELSEWHERE}" if self._shared.seen_elsewhere else "")
        )

    def _why_missed(self, request: Request, line: Firing, run: SiteRun) -> str:
        asked = [
            f"{name}={described(getattr(request, name))}"
            for name in ("tokens", "rows", "heads", "channels")
            if getattr(request, name, None) is not None
        ]
        shape = run.shape or ()
        had = f"[{', '.join(map(str, shape))}]"
        axes = "rows, tokens, heads, features" if len(shape) == 4 else "rows, tokens, features"
        return (
            f"it was active in {line.missed} calls, but {' and '.join(asked) or 'its selection'} "
            f"matched no element of the {had} values there ({axes})"
        )


_ELSEWHERE = "calls of other threads were neither edited nor recorded"


def _tracker(subject: Subject, prompt_length: int | None) -> Any:
    if subject.kind == "pipeline":
        return PipelineTracker(subject)
    if subject.kind == "language" or reads_text(subject.components()[""]):
        return LanguageTracker(subject, prompt_length)
    return ModuleTracker(subject)


def _parts(subject: Subject) -> list[nn.Module]:
    if subject.kind != "pipeline":
        return parts(subject.model)
    components = [each for each in subject.model.components.values() if isinstance(each, nn.Module)]
    return [module for component in components for module in parts(component)]


def _attach(station: Station, stack: ExitStack) -> None:
    sides = station.sides()
    module = station.module
    if sides & {"in", "delta", "probs"}:
        stack.callback(module.register_forward_pre_hook(station.before, with_kwargs=True).remove)
    if sides & {"out", "delta", "probs"}:
        stack.callback(module.register_forward_hook(station.after).remove)
        _observers_last(module)


def _observers_last(module: nn.Module) -> None:
    """Let the hooks by which transformers collects `hidden_states` see what edits give.

    It installs them for good at the first call that asks for hidden states, so from the second run
    on they would stand before ours, and a pipeline that reads hidden_states[-2] would lose edits.
    """
    for number, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__qualname__", "").endswith("output_capturing_hook"):
            module._forward_hooks[number] = module._forward_hooks.pop(number)


def _count(lines: dict[tuple[int, str], Firing], name: str, now: Now, plan: Any) -> None:
    step = now.instant.step if isinstance(now.instant, Instant) else None
    hits = {each.number: each for each in plan.edits.hits} if plan.edits else {}
    for number in plan.active:
        line = lines[number, name]
        if number in plan.missed:
            line.missed += 1
            continue
        line.calls += 1
        if step is not None:
            line.steps[step] += 1
        if number in plan.passed:
            line.passed_over += 1
        elif number in hits:
            line.branches.update(hits[number].branches)
            line.rows.update(hits[number].rows)
    kept = [(each.number, cut) for each, cut, _ in plan.cuts]
    for number, cut in kept + [(each.number, cut) for each, cut in [*plan.watched, *plan.flows]]:
        line = lines[number, name]
        line.branches.update(cut.branches)
        line.rows.update(cut.rows)


def _note_unchanged(lines: dict[tuple[int, str], Firing], name: str, run: SiteRun) -> None:
    changed = run.notes.changed() if run.edits else set()
    for number, _ in run.edits:
        line = lines[number, name]
        if line.calls > line.passed_over and number not in changed:
            line.note("strength above 0, but no value changed")


def _note_overflow(lines: dict[tuple[int, str], Firing], name: str, run: SiteRun) -> None:
    from dreamreader.engine.firing import ranges

    steps = {
        now.instant.step if isinstance(now.instant, Instant) else 0
        for now in run.notes.overflowed()
    }
    if steps:
        for number, _ in run.edits:
            lines[number, name].note(f"overflow to infinity at steps {ranges(steps)}")
    run.notes = Notes()


def _note_missing_steps(report: FiringReport, requests: Sequence[Request], shared: Shared) -> None:
    total = shared.tracker.total()
    for number, request in enumerate(requests):
        if total is None or not isinstance(
            request.steps, int | list | tuple | set | frozenset | range
        ):
            continue
        wanted = [request.steps] if isinstance(request.steps, int) else list(request.steps)
        beyond = [each for each in wanted if not -total <= each < total]
        for line in report.firings:
            if beyond and line.number == number:
                line.note(f"steps {', '.join(map(str, beyond))} do not exist: the run had {total}")


def describe_schedule(schedule: Sequence[Instant]) -> str:
    """The steps of a run in words."""
    first, last = schedule[0], schedule[-1]
    sigma = "" if first.sigma is None else f", sigma {first.sigma:.4g} .. {last.sigma or 0:.4g}"
    return (
        f"this run has steps {first.step} .. {last.step} (timestep {first.timestep:g} .. "
        f"{last.timestep:g}{sigma}, fraction {first.fraction:.3g} .. {last.fraction:.3g})"
    )


def _nearby(subject: Subject, site: str) -> str:
    from dreamreader.errors import nearest

    path = site.partition(":")[0]
    near = [each for each in nearest(path, subject.modules(), 4) if each != path]
    return f"; nearest sites: {', '.join(near)}" if near else ""


__all__ = ["Session", "Shared", "describe_schedule"]
