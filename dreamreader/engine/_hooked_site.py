"""The edits and readings of one site: what to do in each kind of call, and doing it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, is_grad_enabled

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._compile import ActiveEdit, Compiled, compile_edits
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._notes import Notes
from dreamreader.engine._placement import Placement
from dreamreader.engine._probs import Attention
from dreamreader.engine._recorder import Recorder
from dreamreader.engine._request import Request
from dreamreader.engine._resolved import Selection
from dreamreader.engine._session_state import SessionState
from dreamreader.engine._site_view import SiteView
from dreamreader.engine._sites import Site
from dreamreader.engine._stream import Streamer
from dreamreader.engine._watch import AttentionCall, Watcher
from dreamreader.errors import InvalidInput


@dataclass(eq=False)
class SitePlan:
    """What to do at one site in one kind of call.

    Attributes:
        view: how the site's values are read; None where nothing is done.
        passed: edits that select something, with nothing to change (strength 0).
        missed: requests whose selection holds no element here.
        active: all requests at work.
    """

    view: SiteView | None
    edits: Compiled | None
    recorded: list[tuple[Recorder, Selection, int]]
    watched: list[tuple[Watcher, Selection]]
    streamed: list[tuple[Streamer, Selection]]
    passed: frozenset[int]
    missed: frozenset[int]
    active: tuple[int, ...]

    @property
    def has_graph(self) -> bool:
        """Whether gradients flow into what was made for it: then it holds for one call."""
        return self.edits is not None and self.edits.has_graph


_IDLE = SitePlan(None, None, [], [], [], frozenset(), frozenset(), ())
_Reading = Recorder | Watcher | Streamer


class HookedSite:
    """The edits and readings of one site during a session."""

    def __init__(self, site: Site, shared: SessionState):
        self.site = site
        self.name = site.name
        self.shared = shared
        self.edits: list[tuple[int, EditRequest]] = []
        self.recorders: list[Recorder] = []
        self.watchers: list[Watcher] = []
        self.streamers: list[Streamer] = []
        self.fired: list[tuple[CallContext, SitePlan]] = []
        self.skipped: list[tuple[CallContext, tuple[int, ...]]] = []
        self.notes = Notes()
        self.shape: tuple[int, ...] | None = None
        self._plans: dict[Any, SitePlan] = {}
        self._latest: tuple[Any, SitePlan] = (None, _IDLE)
        self._shared_plans: dict[Any, SitePlan] = {}

    def visit(self, value: Tensor, given: Any = None, minus: Tensor | None = None) -> Tensor | None:
        """Edit and record `value`; the edited value, or None where it stays as it is.

        `minus`, of the same shape, is taken off first; streams of an unedited site get the two
        apart, so that nothing is computed for them. `given` is what the module was called with.
        """
        now, plan = self._planned(value, given)
        view = plan.view
        if view is None:
            return None
        plain = view.is_plain
        x, y = value if plain else view.read(value), None
        off = None if minus is None else view.read(minus)
        if self.shared.subject.rehearsing:
            y = None if plan.edits is None else plan.edits.run(_less(x, off))
            return None if y is None else view.back(y, value)
        self.fired.append((now, plan))
        seen = x if off is None or (plan.edits is None and not plan.recorded) else x - off
        if plan.edits is not None:
            self.shared.subject.edited += 1
            y = seen = plan.edits.run_noted(seen, now, self.notes)
        for recorder, held, moments in plan.recorded:
            recorder.keep(seen, held, now, moments)
        for streamer, kept in plan.streamed:
            if y is None:
                streamer.hand_on(x, off, kept, now)
            else:
                streamer.hand_on(y, None, kept, now)
        return y if plain or y is None else view.back(y, value)

    def visit_attention(self, attention: Attention) -> None:
        """Record and watch an attention; probabilities are formed for recordings alone."""
        now, plan = self._planned(attention.outline(), None)
        if not plan.active:
            return
        if attention.is_start:
            self.fired.append((now, plan))
        if plan.recorded:
            x = attention.probabilities().transpose(1, 2)
            for recorder, held, moments in plan.recorded:
                recorder.keep(x, held, now, moments)
        for watcher, held in plan.watched:
            call = AttentionCall(held, attention.shape[3], now, self.shared)
            watcher.request.callback(attention.of(held.entries), call)

    def _planned(self, value: Tensor, given: Any) -> tuple[CallContext, SitePlan]:
        """What is running, and what to do then."""
        shared = self.shared
        now = shared.tracker.now
        if now is None or now is not shared.latest:
            now = shared.current(self.site)
        call = getattr(shared, self._kind_of_call)
        run = now.run if self._follows_prompt else None
        shape, dtype, device = value.shape, value.dtype, value.device
        grad = is_grad_enabled()  # a program without gradients has none
        known, plan = self._latest
        key = (call, run, shape, dtype, device, grad)
        if key == known:
            return now, plan
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(now, value, given)
            if plan.has_graph:
                return now, plan
            self._plans[key] = plan
        self._latest = (key, plan)
        return now, plan

    def pass_over(self) -> None:
        """A step cache skipped the site: nothing is edited or recorded, but it is reported."""
        now = self.shared.current(self.site)
        active, wanted = self._at_work(now)
        numbers = tuple(n for n, _ in active) + tuple(each.number for each in wanted)
        if numbers:
            self.skipped.append((now, numbers))

    def _at_work(self, now: CallContext) -> tuple[list[tuple[int, EditRequest]], list[_Reading]]:
        """The edits and the readings whose selection holds in this call."""
        if now.phase == "aside":  # a callback's own call: it is not the run
            return [], []
        name, is_active = self.site.name, self.shared.is_active
        edits = [(n, each) for n, each in self.edits if is_active(each, now, name)]
        return edits, [each for each in self._readings() if is_active(each.request, now, name)]

    def _readings(self) -> list[_Reading]:
        return [*self.recorders, *self.watchers, *self.streamers]

    def release(self) -> None:
        """Let go of everything that is not a result."""
        self._plans.clear()
        self._latest = (None, _IDLE)
        self._shared_plans.clear()
        self.fired.clear()
        self.skipped.clear()
        self.notes = Notes()

    def _plan(self, now: CallContext, value: Tensor, given: Any) -> SitePlan:
        active, wanted = self._at_work(now)
        if not active and not wanted:
            self.shape = self.shape or tuple(value.shape)
            return _IDLE
        view = self._view(now, value, given)
        self.shape = view.canonical
        # Steps with the same requests at work share a plan, unless an edit differs from step to
        # step.
        time = now.stamp[1] if any(n in self._moving for n, _ in active) else None
        run = now.run if self._follows_prompt else None
        numbers = tuple(n for n, _ in active) + tuple(each.number for each in wanted)
        key = (numbers, time, run, self._any_time(), value.shape, value.dtype, value.device)
        key = (*key, is_grad_enabled())
        found = self._shared_plans.get(key)
        if found is None:
            found = self._made(now, value, view, active, wanted, numbers, key)
            if not found.has_graph:
                self._shared_plans[key] = found
        return found

    def _made(
        self,
        now: CallContext,
        value: Tensor,
        view: SiteView,
        active: list[tuple[int, EditRequest]],
        wanted: list[_Reading],
        numbers: tuple[int, ...],
        key: tuple[Any, ...],
    ) -> SitePlan:
        x = view.outline(value)
        edits, empty = self._programs(now, view, x, active, key) if active else (None, set())
        hit = edits.numbers if edits else frozenset()
        recorded, watched, streamed = [], [], []
        at = Placement(self.site, now, view, x, self.shared) if wanted else None
        for each in wanted:
            assert at is not None
            held = at.select(each.request)
            if isinstance(each, Streamer):
                if (kept := each.kept(held, x)) is not None:
                    streamed.append((each, kept))
            elif held.entries and (held.columns is None or held.columns.shape[-1]):
                if isinstance(each, Recorder):
                    recorded.append((each, held, self.shared.moments(each.request, now)))
                else:
                    watched.append((each, held))
        read = {each.number for each, *_ in [*recorded, *watched, *streamed]}
        missed = empty | ({each.number for each in wanted} - read)
        return SitePlan(
            view,
            edits if hit else None,
            recorded,
            watched,
            streamed,
            frozenset(n for n, _ in active if n not in hit and n not in empty),
            frozenset(missed - hit),
            numbers,
        )

    def _programs(
        self,
        now: CallContext,
        view: SiteView,
        x: Tensor,
        active: list[tuple[int, EditRequest]],
        key: tuple[Any, ...],
    ) -> tuple[Compiled, set[int]]:
        """Programs of the edits, and which edits select nothing; sites that can share them do."""
        common = None
        if self.site.tap.stream is None and not isinstance(view.map, Exception):
            if all(each.is_same_everywhere and each.tokens is None for _, each in active):
                heads, by_head = self.site.heads or view.heads, view.heads is not None
                common = (*key, x.shape, view.map, view.is_sequence, heads, by_head)
                if common in self.shared.programs:
                    return self.shared.programs[common]
        at = Placement(self.site, now, view, x, self.shared)
        works = [ActiveEdit(n, each, at.place(each)) for n, each in active]
        empty = {each.number for each in works if not bool((each.place.selected != 0).any())}
        found = self._compiled(works, x), empty
        if common is not None and not found[0].has_graph:
            self.shared.programs[common] = found
        return found

    def _view(self, now: CallContext, value: Tensor, given: Any) -> SiteView:
        layouts = {each.layout for each in self._requests() if each.layout is not None}
        if len(layouts) > 1:
            raise InvalidInput(
                f"{self.site.name}: its requests name different layouts: {', '.join(layouts)}"
            )
        layout = next(iter(layouts), None)
        return SiteView.of(self.site, now, value, given, layout)

    @cached_property
    def _moving(self) -> frozenset[int]:
        """Edits that themselves, not only their selection, differ from step to step."""
        return frozenset(n for n, each in self.edits if each.changes_with_step)

    @cached_property
    def _timeless(self) -> bool:
        """Whether every step has the same plan."""
        return not self._moving and not any(each.needs_time for each in self._requests())

    def _any_time(self) -> int:
        """What stands for the calls that differ in nothing but the time."""
        return self.shared.timeless if self._selects_tokens else self.shared.placeless

    @cached_property
    def _kind_of_call(self) -> str:
        """Which number of the session stands for the calls of one plan."""
        if not self._timeless:
            return "serial"
        return "timeless" if self._selects_tokens else "placeless"

    @cached_property
    def _selects_tokens(self) -> bool:
        return any(each.tokens is not None for each in self._requests())

    @cached_property
    def _follows_prompt(self) -> bool:
        """Whether a plan holds for one run only: the place of a word changes with the prompt."""
        return any(isinstance(each.tokens, str | tuple) for each in self._requests())

    def _requests(self) -> list[Request]:
        return [*(each for _, each in self.edits), *(each.request for each in self._readings())]

    def _compiled(self, works: list[ActiveEdit], x: Tensor) -> Compiled:
        if not x.is_floating_point():
            raise InvalidInput(
                f"{self.site.name}: holds {x.dtype}, only floating point can be edited"
            )
        if self.site.port == "probs":
            raise InvalidInput(
                f"{self.site.name}: probs can be recorded, not edited; edit q, k or heads"
            )
        return compile_edits(works, tuple(x.shape))  # pyright: ignore


def _less(x: Tensor, minus: Tensor | None) -> Tensor:
    return x if minus is None else x - minus
