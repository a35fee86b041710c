"""A session: hooks on a subject for the length of a with block, and what they found."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from dreamreader.engine._cache import Activation, RunRow
from dreamreader.engine._checkpointing import recompute_as_before
from dreamreader.engine._clock_told import ToldClock
from dreamreader.engine._edit_context import RowSet
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._firing import Firing, FiringReport
from dreamreader.engine._hook_point import HookPoint
from dreamreader.engine._hooked_site import HookedSite
from dreamreader.engine._lm_tracker import LanguageTracker, read_text
from dreamreader.engine._outcome import fill, require_fired
from dreamreader.engine._recorder import Memory, Recorder
from dreamreader.engine._request import Record, Request
from dreamreader.engine._session_state import SessionState
from dreamreader.engine._sites import find
from dreamreader.engine._step_caches import cache_hooks, caches_batch
from dreamreader.engine._stream import Stream, Streamer
from dreamreader.engine._subject import Modules, Subject, is_compiled
from dreamreader.engine._tracker import ModuleTracker, PipelineTracker
from dreamreader.engine._watch import Watch, Watcher
from dreamreader.engine._words import Words
from dreamreader.errors import InvalidInput


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
        clock: of a pipeline's calls that are made outside a run.
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
        clock: ToldClock | None = None,
    ):
        self.subject = subject
        self.edits = list(edits)
        self._requests: list[Request] = [*edits, *records]
        self.report = FiringReport()
        self.recorders: list[Recorder] = []
        self._shapes = shapes if shapes is not None else {}
        self._limit = memory_limit
        if memory_limit is not None and not isinstance(memory_limit, Memory):
            self._limit = Memory(memory_limit)  # refused at once where it is no number of bytes
        self._modules = subject.modules()
        self._runs: dict[str, HookedSite] = {}
        self._stack: ExitStack | None = None
        tracker = _tracker(subject, self._modules, prompt_length, clock)
        if prompts is not None and rowset is not None:  # a pipeline says its own once it runs
            tracker.prompts = list(prompts[rowset.start :][: rowset.count])
        words = Words(tracker, subject, tokenizer)
        self._shared = SessionState(tracker, subject, rowset or RowSet(), prompts, seeds, words)

    def __enter__(self) -> Self:
        modules = self._modules
        points = self._resolve(modules)
        shared = self._shared
        with ExitStack() as stack:
            marked = modules.marked
            if marked:
                self._run_as_written(marked, stack)
            stack.enter_context(shared.tracker)
            if marked:
                self._watch_caches([each for each in marked if each is not modules.root], stack)
            if any(run.site.port == "probs" for run in self._runs.values()):
                stack.enter_context(shared.probs)
            for point in points:
                point.attach(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        self._finish()
        if kind is None:
            require_fired(self.report, self._runs, self._requests, self._shared)

    def activations(self, rows: Sequence[RunRow] | None = None) -> list[Activation]:
        """What the recordings kept, in the order they were asked for."""
        described = self._rows if rows is None else lambda run: rows
        found = [each.activation(described) for each in self.recorders]
        return [each for each in found if each is not None]

    def _run_as_written(self, marked: list[nn.Module], stack: ExitStack) -> None:
        """Let compiled and checkpointed modules run in a way that hooks can follow."""
        if any(map(is_compiled, marked)):
            # Hooks are not seen by code that is compiled already: run the modules as they are.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.report.notes.append("compiled modules ran uncompiled while hooks were attached")
        if self.edits:
            stack.enter_context(recompute_as_before(self._shared, marked))

    def _watch_caches(self, hooked: list[nn.Module], stack: ExitStack) -> None:
        sites = [run.site for run in self._runs.values()]
        taps = [(site.name, site.tap.module, site.tap.side) for site in sites]
        self._shared.step_caches.watch(taps, stack)
        caches = sorted({name for each in hooked for name in cache_hooks(each)})
        if caches:
            self.report.notes.append(f"step caches are on: {', '.join(caches)}")
        self._shared.drops_branch = any(map(caches_batch, hooked))

    def _resolve(self, modules: Modules) -> list[HookPoint]:
        """Sites of every request; points in the order in which modules were first named."""
        points: dict[nn.Module, HookPoint] = {}
        shared, firings = self._shared, self.report.firings
        for number, request in enumerate(self._requests):
            named = {site.name: site for text in request.sites for site in find(modules, text)}
            described = request.describe()
            is_edit = isinstance(request, EditRequest)
            for name, site in named.items():
                run = self._runs.get(name)
                if run is None:
                    run = self._runs[name] = HookedSite(site, shared)
                    module = site.tap.module
                    if module not in points:
                        points[module] = HookPoint(module, shared)
                    points[module].sites.append(run)
                firings.append(Firing(described, "edit" if is_edit else "record", name, number))
                run.requests[number] = request
                if is_edit:
                    run.edits.append((number, request))
                elif isinstance(request, Record):
                    self._record(request, name, number, run)
                elif isinstance(request, Watch):
                    run.watchers.append(Watcher(request, number))
                elif isinstance(request, Stream):
                    run.streamers.append(Streamer(request, number, site, shared))
                shared.requests.append((site.component, request))
        return list(points.values())

    def _record(self, request: Record, name: str, number: int, run: HookedSite) -> None:
        if run.recorders:
            raise InvalidInput(f"{name} is recorded twice; ask for it once")
        recorder = Recorder(request, name, number, self._memory)
        self.recorders.append(recorder)
        run.recorders.append(recorder)

    @cached_property
    def _memory(self) -> Memory:
        return self._limit if isinstance(self._limit, Memory) else Memory(None)

    def _rows(self, run: int) -> list[RunRow]:
        shared = self._shared
        prompts = shared.prompts or shared.prompts_of.get(run) or ()
        count = shared.rowset.total or max(len(prompts), len(shared.seeds or ()))
        return [shared.row(number, prompts) for number in range(count)]

    def _finish(self) -> None:
        """Fill the report and let go of everything that is not a result."""
        fill(self.report, self._runs, self._requests, self._shared)
        for name, run in self._runs.items():
            if run.shape is not None:
                self._shapes[name] = run.shape
            run.release()
        self._shared.programs.clear()


def _tracker(
    subject: Subject, modules: Modules, prompt_length: int | None, clock: ToldClock | None
) -> Any:
    if subject.kind == "pipeline":
        return PipelineTracker(subject, clock)
    if subject.kind == "language" or read_text(modules.kinds):
        return LanguageTracker(subject, prompt_length)
    return ModuleTracker(subject)
