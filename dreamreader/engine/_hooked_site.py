"""The edits and readings of one site: what to do in each kind of call, and doing it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import get_ident
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._compile import ActiveEdit, Compiled, compile_edits
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._form import form_of
from dreamreader.engine._notes import Notes
from dreamreader.engine._placement import Placement
from dreamreader.engine._probs import Attention
from dreamreader.engine._recorder import Keeper, Recorder
from dreamreader.engine._request import Request
from dreamreader.engine._resolved import Selection
from dreamreader.engine._session_state import SessionState, Traits
from dreamreader.engine._site_view import SiteView
from dreamreader.engine._sites import Site
from dreamreader.engine._stream import Streamer
from dreamreader.engine._subject import Subject
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
_Act = Callable[[Tensor, CallContext], Tensor | None]


def _do_nothing(x: Tensor, now: CallContext) -> None:
    return None


def _never(x: Tensor) -> bool:
    return False


@dataclass(slots=True, eq=False)
class _KnownVisit:
    """A kind of visit that was seen before.

    Attributes:
        key: what it has in common. plan: what is done then.
        call, run, grad: from the key; no call until there is an `act`.
        has_form: tells whether values are like those before.
        act: what is done with such values, without further checks.
    """

    key: tuple[Any, ...]
    plan: SitePlan
    call: int | None = None
    run: int | None = None
    grad: bool = False
    has_form: Callable[[Tensor], bool] = _never
    act: _Act = _do_nothing

    def allow(self, form: Callable[[Tensor], bool], act: _Act) -> None:
        self.call, self.run, *_, self.grad = self.key
        self.has_form, self.act = form, act


_NONE = _KnownVisit((), _IDLE)


class HookedSite:
    """The edits and readings of one site during a session."""

    def __init__(self, site: Site, shared: SessionState):
        self.site = site
        self.name = site.name
        self.shared = shared
        self.requests: dict[int, Request] = {}
        self.edits: list[tuple[int, EditRequest]] = []
        self.recorders: list[Recorder] = []
        self.watchers: list[Watcher] = []
        self.streamers: list[Streamer] = []
        self.fired: dict[SitePlan, list[CallContext]] = {}
        self.skipped: list[tuple[CallContext, tuple[int, ...]]] = []
        self.notes = Notes(shared.tables)
        self.shape: tuple[int, ...] | None = None
        self._known: dict[Any, _KnownVisit] = {}
        self._latest = _NONE
        self._repeats = False
        self._shared_plans: dict[Any, SitePlan] = {}

    def visit(self, value: Tensor, given: Any = None, minus: Tensor | None = None) -> Tensor | None:
        """Edit and record `value`; the edited value, or None where it stays as it is.

        `minus`, of the same shape, is taken off first; streams of an unedited site get the two
        apart, so that nothing is computed for them. `given` is what the module was called with.
        """
        now, plan = self._look_up(value, given)
        if self.shared.subject.rehearsing:
            return self._rehearse(plan, value, minus)
        return self._act(now, plan, value, minus)

    def hook(self, general: Callable[..., Any]) -> Callable[[nn.Module, tuple, Any], Any]:
        """A forward hook for a site that is the result of a module, with little in its way.

        A visit that is like the latest one takes nothing but the comparisons that tell so; any
        other goes to `visit`, or to `general` where it may be no visit at all.
        """
        shared, visit = self.shared, self.visit
        subject, tracker, thread = shared.subject, shared.tracker, shared.thread
        site, numbers, kind = self.site, shared.numbers, self._traits.kind
        self._repeats = True

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if type(output) is not Tensor or subject.paused or get_ident() != thread:
                return general(module, args, output)
            now, latest = tracker.now, self._latest
            if now is not None and now is not shared.latest:
                shared.current(site)  # says the numbers of the call
            if (
                now is not None
                and numbers[kind] == latest.call
                and is_grad_enabled() is latest.grad
                and (latest.run is None or latest.run == now.run)
                and not subject.rehearsing
                and latest.has_form(output)
            ):
                return latest.act(output, now)
            return visit(output, args[0] if args else None)

        return after

    def _act(
        self, now: CallContext, plan: SitePlan, value: Tensor, minus: Tensor | None = None
    ) -> Tensor | None:
        """Do at a visit what its plan says."""
        view = plan.view
        if view is None:
            return None
        plain = view.is_plain
        x, y = value if plain else view.read(value), None
        off = None if minus is None else view.read(minus)
        self._calls(plan).append(now)
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

    def _rehearse(self, plan: SitePlan, value: Tensor, minus: Tensor | None) -> Tensor | None:
        """Edit alone: nothing is recorded, streamed or reported."""
        view = plan.view
        if view is None or plan.edits is None:
            return None
        off = None if minus is None else view.read(minus)
        return view.back(plan.edits.run(_less(view.read(value), off)), value)

    def _specialize(self, plan: SitePlan, value: Tensor) -> _Act:
        """What `_act` does with a plan and values like these, its choices made."""
        view = plan.view
        if view is None:
            return _do_nothing
        is_function = plan.edits is not None and plan.edits.has_function
        if plan.streamed or plan.watched or is_function or not view.is_plain:
            return lambda x, now: self._act(now, plan, x)
        keep = [recorder.keeper(value, held, moments) for recorder, held, moments in plan.recorded]
        if plan.edits is not None:
            apply = None if keep else plan.edits.settle(value, self.notes)
            if apply is not None:
                return _edit_alone(apply, self._calls(plan), self.shared.subject)
            run = plan.edits.specialize(value, self.notes)
            return _edit(run, keep, self._calls(plan), self.shared.subject)
        return _record(keep, self._calls(plan))

    def _calls(self, plan: SitePlan) -> list[CallContext]:
        """The calls at which a plan was followed."""
        return self.fired.setdefault(plan, [])

    def visit_attention(self, attention: Attention) -> None:
        """Record and watch an attention; probabilities are formed for recordings alone."""
        now, plan = self._look_up(attention.outline(), None)
        if not plan.active:
            return
        if attention.is_start:
            self._calls(plan).append(now)
        if plan.recorded:
            x = attention.probabilities().transpose(1, 2)
            for recorder, held, moments in plan.recorded:
                recorder.keep(x, held, now, moments)
        for watcher, held in plan.watched:
            call = AttentionCall(held, attention.shape[3], now, self.shared)
            watcher.request.callback(attention.of(held.entries), call)

    def _look_up(self, value: Tensor, given: Any) -> tuple[CallContext, SitePlan]:
        """What is running, and what to do then."""
        shared = self.shared
        now = shared.tracker.now
        if now is None or now is not shared.latest:
            now = shared.current(self.site)
        traits = self._traits
        call = shared.numbers[traits.kind]
        run = now.run if traits.follows_prompt else None
        grad = is_grad_enabled()  # a program without gradients has none
        key = (call, run, value.shape, value.dtype, value.device, grad)
        known = self._latest
        if key != known.key:
            known = self._known.get(key)
            if known is None:
                plan = self._plan(now, value, given)
                if not plan.has_graph:
                    self._latest = self._known[key] = _KnownVisit(key, plan)
                return now, plan
            self._latest = known
        if self._repeats and not known.has_form(value):
            known.allow(form_of(value), self._specialize(known.plan, value))
        return now, known.plan

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
        if self._traits.always:
            return self.edits, self._readings()
        name, is_active = self.site.name, self.shared.is_active
        edits = [(n, each) for n, each in self.edits if is_active(each, now, name)]
        return edits, [each for each in self._readings() if is_active(each.request, now, name)]

    def _readings(self) -> list[_Reading]:
        return [*self.recorders, *self.watchers, *self.streamers]

    def release(self) -> None:
        """Let go of everything that is not a result."""
        self._known.clear()
        self._latest = _NONE
        self._shared_plans.clear()
        self.fired.clear()
        self.skipped.clear()
        self.notes = Notes({})

    def _plan(self, now: CallContext, value: Tensor, given: Any) -> SitePlan:
        active, wanted = self._at_work(now)
        if not active and not wanted:
            self.shape = self.shape or tuple(value.shape)
            return _IDLE
        view = self._view(now, value, given)
        self.shape = view.canonical
        # Steps with the same requests at work share a plan, unless an edit differs from step to
        # step.
        traits = self._traits
        moves = traits.moving and any(n in traits.moving for n, _ in active)
        time = now.stamp[1] if moves else None
        run = now.run if traits.follows_prompt else None
        numbers = tuple(n for n, _ in active) + tuple(each.number for each in wanted)
        any_time = self.shared.numbers[traits.any_time]
        key = (numbers, time, run, any_time, value.shape, value.dtype, value.device)
        key = (*key, is_grad_enabled())
        found = self._shared_plans.get(key)
        if found is None:
            found = self._make_plan(now, value, view, active, wanted, numbers, key)
            if not found.has_graph:
                self._shared_plans[key] = found
        return found

    def _make_plan(
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
                if (kept := each.select(held, x)) is not None:
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
        found = self._compile_edits(works, x), empty
        if common is not None and not found[0].has_graph:
            self.shared.programs[common] = found
        return found

    def _view(self, now: CallContext, value: Tensor, given: Any) -> SiteView:
        layouts = self._traits.layouts
        if len(layouts) > 1:
            raise InvalidInput(
                f"{self.site.name}: its requests name different layouts: {', '.join(layouts)}"
            )
        layout = layouts[0] if layouts else None
        return SiteView.of(self.site, now, value, given, layout)

    @cached_property
    def _traits(self) -> Traits:
        """What its requests have in common; sites with the same requests share it."""
        numbers, known = tuple(self.requests), self.shared.traits
        found = known.get(numbers)
        if found is None:
            found = known[numbers] = Traits.of(self.requests.values(), self.edits)
        return found

    def _compile_edits(self, works: list[ActiveEdit], x: Tensor) -> Compiled:
        if not x.is_floating_point():
            raise InvalidInput(
                f"{self.site.name}: holds {x.dtype}, only floating point can be edited"
            )
        if self.site.port == "probs":
            raise InvalidInput(
                f"{self.site.name}: probs can be recorded, not edited; edit q, k or heads"
            )
        return compile_edits(works, tuple(x.shape))  # pyright: ignore


def _record(keepers: list[Keeper], calls: list[CallContext]) -> _Act:
    keep = keepers[0] if keepers else None  # none where all are missed

    def record(x: Tensor, now: CallContext) -> None:
        calls.append(now)
        if keep is not None:
            keep(x, now)

    def record_all(x: Tensor, now: CallContext) -> None:
        calls.append(now)
        for each in keepers:
            each(x, now)

    return record if len(keepers) < 2 else record_all


def _edit_alone(
    apply: Callable[[Tensor], Tensor], calls: list[CallContext], subject: Subject
) -> _Act:
    def edit(x: Tensor, now: CallContext) -> Tensor:
        calls.append(now)
        subject.edited += 1
        return apply(x)

    return edit


def _edit(
    run: Callable[[Tensor, CallContext], Tensor],
    keepers: list[Keeper],
    calls: list[CallContext],
    subject: Subject,
) -> _Act:
    def edit(x: Tensor, now: CallContext) -> Tensor:
        calls.append(now)
        subject.edited += 1
        y = run(x, now)
        for keep in keepers:
            keep(y, now)
        return y

    return edit


def _less(x: Tensor, minus: Tensor | None) -> Tensor:
    return x if minus is None else x - minus
