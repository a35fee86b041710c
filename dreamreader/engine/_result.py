"""What a run gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dreamreader.engine import _html as html
from dreamreader.engine._cache import Activation, Cache, RunRow
from dreamreader.engine._firing import FiringReport
from dreamreader.engine._recorded import join_rows


@dataclass(eq=False)
class RunResult:
    """What one run gave.

    Attributes:
        output: the pictures, or what a language model gave: its logits output, or generated tokens.
        cache: recorded activations by site.
        firing: where and when edits and recordings took effect.
        rows: prompt and seed of each row.
        text: generated text of a language model, without the prompt: one for each row, or, with
            `num_return_sequences=n`, the n of row 0, those of row 1, and so on, as in `output`.
    """

    output: Any
    cache: Cache
    firing: FiringReport
    rows: tuple[RunRow, ...]
    text: list[str] | None = None

    @property
    def images(self) -> Any:
        """The pictures of a pipeline, in the order of the rows."""
        return self.output

    def __repr__(self) -> str:
        shown = [f"RunResult of {len(self.rows)} rows", repr(self.firing)]
        return "\n".join(shown + ([repr(self.cache)] if self.cache else []))

    def _repr_html_(self) -> str:
        rows = [(str(r.index), r.prompt or "", str(r.seed)) for r in self.rows]
        table = html.table(("row", "prompt", "seed"), rows)
        return table + self.firing._repr_html_() + (self.cache._repr_html_() if self.cache else "")


def merged(found: Sequence[list[Activation]]) -> list[Activation]:
    """The same sites of several batches, joined along the rows of the batches that have them."""
    parts: dict[str, list[Activation]] = {}
    for each in chain.from_iterable(found):
        parts.setdefault(each.site, []).append(each)
    return list(map(join_rows, parts.values()))
