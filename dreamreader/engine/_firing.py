"""The firing report: where, when and on which rows every edit and recording took effect."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dreamreader.engine import _html as html
from dreamreader.errors import NeverFired


@dataclass
class Firing:
    """What one request did at one site.

    Attributes:
        request: the edit or recording in one line. kind: `edit` or `record`.
        site: full site name.
        calls: how often the site ran with the request active and an element selected.
        steps: for each step, how many such calls; empty keys where time is unknown.
        branches: for each branch, how many calls.
        rows: numbers of the rows that were touched.
        passed_over: calls of the site with the request active, but with nothing to change
            (strength 0).
        missed: calls of the site with the request active, but no element selected.
        not_computed: calls at which a step cache skipped the site.
        notes: anything that a reader has to know, such as an overflow.
    """

    request: str
    kind: str
    site: str
    number: int = 0
    calls: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    branches: Counter[str] = field(default_factory=Counter)
    rows: set[int] = field(default_factory=set)
    passed_over: int = 0
    missed: int = 0
    not_computed: Counter[int] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class FiringReport(Sequence[Firing]):
    """One line for each request and site; notes say what a number cannot.

    Attributes:
        notes: what concerns the run as a whole.
    """

    def __init__(self, firings: Sequence[Firing] = (), notes: Sequence[str] = ()):
        self.firings = list(firings)
        self.notes = list(notes)

    def __getitem__(self, index):  # pyright: ignore
        return self.firings[index]

    def __len__(self) -> int:
        return len(self.firings)

    def __iter__(self) -> Iterator[Firing]:
        return iter(self.firings)

    def of(self, site: str) -> list[Firing]:
        """The lines of one site."""
        return [each for each in self.firings if each.site == site]

    @property
    def warnings(self) -> list[str]:
        """Every note, with the site that it concerns."""
        return self.notes + [f"{each.site}: {note}" for each in self.firings for note in each.notes]

    def merge(self, other: "FiringReport") -> None:
        """Add the counts of a further batch of the same requests."""
        known = {(each.number, each.kind, each.site): each for each in self.firings}
        for each in other:
            mine = known.get((each.number, each.kind, each.site))
            if mine is None:
                self.firings.append(each)
                continue
            mine.calls += each.calls
            mine.passed_over += each.passed_over
            mine.missed += each.missed
            mine.steps.update(each.steps)
            mine.branches.update(each.branches)
            mine.not_computed.update(each.not_computed)
            mine.rows |= each.rows
            for text in each.notes:
                mine.note(text)
        self.notes += [text for text in other.notes if text not in self.notes]

    def require_hits(self) -> None:
        """Check all batches of a run together, as rows that are selected may be in any of them.

        Raises:
            NeverFired: a request was active, but its selection held nothing in any batch.
        """
        for number in {each.number: None for each in self.firings}:
            mine = [each for each in self.firings if each.number == number]
            missed = sum(each.missed for each in mine)
            if missed and not any(each.calls for each in mine):
                raise NeverFired(
                    f"{mine[0].request} never fired at {mine[0].site}: it was active in {missed} "
                    "calls, but its selection matched no element in any batch"
                )

    def _table(self) -> list[tuple[str, ...]]:
        return [
            (
                each.kind,
                each.request,
                each.site,
                str(each.calls),
                ranges(each.steps),
                ", ".join(each.branches),
                ranges(each.rows),
                "; ".join(_remarks(each)),
            )
            for each in self.firings
        ]

    def __repr__(self) -> str:
        lines = [html.text_table(_HEADER, self._table())] if self.firings else ["nothing asked for"]
        return "\n".join(lines + [f"note: {text}" for text in self.notes])

    def _repr_html_(self) -> str:
        return html.table(_HEADER, self._table(), "; ".join(self.notes))


_HEADER = ("kind", "request", "site", "calls", "steps", "branches", "rows", "notes")


def _remarks(each: Firing) -> list[str]:
    found = list(each.notes)
    if each.passed_over:
        found.append(f"{each.passed_over} calls at strength 0")
    if each.missed:
        found.append(f"{each.missed} calls without a selected element")
    if each.not_computed:
        found.append(f"not computed at steps {ranges(each.not_computed)} (step cache)")
    return found


def ranges(numbers) -> str:
    """Whole numbers as runs.

    Example:
        >>> ranges({0, 1, 2, 5})
        '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
