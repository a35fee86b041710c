"""What a session did: the firing report of its sites, and why a request never fired."""

from collections.abc import Mapping, Sequence

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._firing import Firing, FiringReport, ranges
from dreamreader.engine._hooked_site import HookedSite, SitePlan
from dreamreader.engine._pattern import parse
from dreamreader.engine._request import Request
from dreamreader.engine._selection import describe
from dreamreader.engine._session_state import SessionState
from dreamreader.engine._subject import Subject
from dreamreader.errors import NeverFired, UnknownName, nearest

_ELSEWHERE = "calls of other threads were neither edited nor recorded"


def fill(
    report: FiringReport,
    runs: Mapping[str, HookedSite],
    requests: Sequence[Request],
    shared: SessionState,
) -> None:
    """Turn what the sites noted into the lines of the report."""
    lines = {(each.number, each.site): each for each in report.firings}
    for name, run in runs.items():
        for plan, calls in run.fired.items():
            _count(lines, name, plan, calls)
        for now, numbers in run.skipped:
            for number in numbers:
                step = now.instant.step if isinstance(now.instant, StepInfo) else 0
                lines[number, name].not_computed[step] += 1
        _note_unchanged(lines, name, run)
        _note_overflow(lines, name, run)
    if shared.seen_elsewhere:
        report.notes.append(_ELSEWHERE)
    _note_missing_steps(report, requests, shared)


def require_fired(
    report: FiringReport,
    runs: Mapping[str, HookedSite],
    requests: Sequence[Request],
    shared: SessionState,
) -> None:
    """Raise for what never fired.

    Raises:
        UnknownName: a branch that the pipeline does not have.
        NeverFired: a request without any call, or an explicit site that never ran.
    """
    seen, rows = shared.branches_seen, shared.rowset
    partial = rows.count != rows.total
    silent = {each.number for each in report.firings if each.calls == 0}
    for number, request in enumerate(requests):
        if number not in silent and request.branch is None or request.is_empty:
            continue
        unknown = [each for each in request.branches or () if each not in seen]
        if unknown and seen:
            raise UnknownName(
                "branch",
                unknown[0],
                seen,
                f"{request.describe()}: this run had {', '.join(seen)}",
            )
        mine = [each for each in report.firings if each.number == number]
        explicit = {text for text in request.sites if not parse(text).is_glob}
        for each in mine:
            if partial and each.missed and getattr(request, "rows", None) is not None:
                continue  # its rows may be in another batch: see `FiringReport.require_hits`
            if each.calls == 0 and (each.site in explicit or not any(m.calls for m in mine)):
                raise NeverFired(_why_never(request, each, runs, shared))


def _why_never(
    request: Request, line: Firing, runs: Mapping[str, HookedSite], shared: SessionState
) -> str:
    said = f"{request.describe()} never fired at {line.site}: "
    steps = ", ".join(map(str, sorted(shared.steps_seen)))
    if line.not_computed:
        return said + "a step cache skipped the module at every step that was asked for"
    run = runs[line.site]
    if line.missed:
        return said + _why_missed(request, line, run)
    if run.shape is not None:
        branches = ", ".join(shared.branches_seen)
        return said + (
            f"the module ran, but not in the selection; steps that ran: {steps or 'unknown'}; "
            f"branches: {branches or 'unknown'}"
        )
    ran = [name for name, each in runs.items() if each.shape is not None]
    return said + (
        "the module was not called in this run"
        + (f"; steps that ran: {steps}" if steps else "; no part of the subject was run")
        + (f"; sites that did run: {', '.join(ran[:5])}" if ran else "")
        + _nearby(shared.subject, line.site)
        + (f"; {_ELSEWHERE}" if shared.seen_elsewhere else "")
    )


def _why_missed(request: Request, line: Firing, run: HookedSite) -> str:
    asked = [
        f"{name}={describe(getattr(request, name))}"
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


def _count(
    lines: dict[tuple[int, str], Firing], name: str, plan: SitePlan, calls: list[CallContext]
) -> None:
    """Add the visits with one plan."""
    times = len(calls)
    steps = [now.instant.step for now in calls if isinstance(now.instant, StepInfo)]
    hits = {each.number: each for each in plan.edits.hits} if plan.edits else {}
    for number in plan.active:
        line = lines[number, name]
        if number in plan.missed:
            line.missed += times
            continue
        line.calls += times
        if steps:
            line.steps.update(steps)
        if number in plan.passed:
            line.passed_over += times
        elif number in hits:
            _touch(line, hits[number].branches, hits[number].rows, times)
    for each, held, *_ in [*plan.recorded, *plan.watched, *plan.streamed]:
        _touch(lines[each.number, name], held.branches, held.rows, times)


def _touch(line: Firing, branches: Sequence[str], rows: Sequence[int], times: int) -> None:
    for branch in branches:
        line.branches[branch] += times
    line.rows.update(rows)


def _note_unchanged(lines: dict[tuple[int, str], Firing], name: str, run: HookedSite) -> None:
    changed = run.notes.find_changed() if run.edits else set()
    for number, _ in run.edits:
        line = lines[number, name]
        if line.calls > line.passed_over and number not in changed:
            line.note("strength above 0, but no value changed")


def _note_overflow(lines: dict[tuple[int, str], Firing], name: str, run: HookedSite) -> None:
    steps = {
        now.instant.step if isinstance(now.instant, StepInfo) else 0
        for now in run.notes.find_overflowed()
    }
    if steps:
        for number, _ in run.edits:
            lines[number, name].note(f"overflow to infinity at steps {ranges(steps)}")


def _note_missing_steps(
    report: FiringReport, requests: Sequence[Request], shared: SessionState
) -> None:
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


def _nearby(subject: Subject, site: str) -> str:
    path = site.partition(":")[0]
    near = [each for each in nearest(path, subject.modules(), 4) if each != path]
    return f"; nearest sites: {', '.join(near)}" if near else ""
