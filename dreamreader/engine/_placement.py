"""Resolves requests at one site in one kind of call: batch entries, rows and tokens."""

from dataclasses import replace

import torch
from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._edit_context import EditContext
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._request import Request
from dreamreader.engine._resolved import Selection
from dreamreader.engine._selection import mask_of
from dreamreader.engine._session_state import SessionState
from dreamreader.engine._site_view import SiteView
from dreamreader.engine._sites import Site
from dreamreader.engine._stream import Stream
from dreamreader.engine._token_layout import RowsUnknown
from dreamreader.engine._tokens import SiteTokens, select, site_tokens
from dreamreader.errors import ClockUnknown, InvalidInput


class Placement:
    """What requests hold at one site in one kind of call."""

    def __init__(
        self, site: Site, now: CallContext, view: SiteView, x: Tensor, shared: SessionState
    ):
        self.site = site
        self.now = now
        self.shared = shared
        self.x = x
        self.view = view
        batch = x.shape[0]
        self.branches = now.names
        self.regular = now.batch is None or now.batch == batch
        self.beams = getattr(now.tokens, "beams", 1)
        if not self.regular or batch % (len(self.branches) * self.beams):
            self.branches, self.beams = ("unknown",), 1
        shape, stream = (x.shape[1], batch, view.hw), site.tap.stream
        found = site_tokens(site.name, *shape, stream, now, self._crosses)
        self.tokens: SiteTokens = replace(found, map=view.map)
        rows = batch // (len(self.branches) * self.beams)
        rowset = shared.rowset.resolve(rows)
        self.total = rowset.total or rows
        self.rows = range(rowset.start, rowset.start + rows)  # numbers in the run

    def _crosses(self) -> bool | None:
        """Whether the attention around the site reads the text; None where there is no word."""
        modules, parts = self.shared.subject.modules(), self.site.path.split(".")
        for stop in range(len(parts), 0, -1):
            found = getattr(modules.get(".".join(parts[:stop])), "is_cross_attention", None)
            if found is not None:
                return found
        return None

    def place(self, request: EditRequest) -> EditContext:
        """What an edit may ask of the site in this call, with what it selects there."""
        rows, x, view = self.rows, self.x, self.view
        return EditContext(
            self.site.name,
            x.shape[-1] if x.dim() == 3 else x.shape[-1] * x.shape[-2],
            self.site.heads or view.heads,
            len(rows),
            self.total,
            rows.start,
            self.branches,
            self.tokens,
            self.now.instant if not isinstance(self.now.instant, Exception) else None,
            x.device,
            x.dtype,
            self.shared.seeds,
            self.beams,
            view.heads is not None,
            self.select(request),
        )

    def select(self, request: Request) -> Selection:
        """What a request holds of the batch."""
        rows, branches, beams = self.rows, self.branches, self.beams
        self._check_rows(request, len(rows))
        wanted, chosen = request.branches, list(rows)
        if request.rows is not None:
            label = f"{request.label}: rows at {self.site.name}"
            mask = mask_of(request.rows, self.total, label).tolist()
            chosen = [row for row in rows if row < self.total and mask[row]]
        within = [(row - rows.start) * beams + beam for row in chosen for beam in range(beams)]
        size = len(rows) * beams
        held = [
            (n, name)
            for n, name in enumerate(branches)
            if within and (wanted is None or name in wanted)
        ]
        entries = [n * size + entry for n, _ in held for entry in within]
        asked = None
        if wanted is not None or request.rows is not None:
            asked = torch.zeros(size * len(branches))
            asked[entries] = 1
        words = None
        if isinstance(request.tokens, str | tuple):
            words = self.shared.words_for(self.now, self.site, branches, len(rows), beams, asked)
        tokens = select(request.tokens, self.tokens, words, asked)
        strength = torch.ones(1, 1) if tokens is None else torch.atleast_2d(tokens)
        return Selection(
            self.site,
            tuple(name for _, name in held),
            tuple(row for row in chosen for _ in range(beams)),
            entries,
            strength if asked is None else strength * asked.reshape(-1, 1),
            self.tokens,
            len(rows),
            request.tokens is None,
            self.site.heads or self.view.heads,
            self.x.device,
        )

    def _check_rows(self, request: Request, rows: int) -> None:
        """A request that names rows needs a batch whose entries are the rows of the run."""
        if isinstance(request, EditRequest) and not (
            request.row_lengths() or request.rows is not None or request.branch is not None
        ):
            return
        named = request.rows is not None or (
            isinstance(request, EditRequest) and bool(request.row_lengths())
        )
        if named and isinstance(self.view.map, ClockUnknown) and self.view.is_sequence:
            raise ClockUnknown(f"{self.site.name}: rows are asked for. {self.view.map}")
        if isinstance(request, Stream) and self.now.phase == "denoise":
            if not isinstance(self.now.branches, tuple):
                return  # refused for the step or branch that it lacks, before it is handed on
        rowset = self.shared.rowset
        count = rowset.count if rowset.total is not None else self.shared.rows_asked()
        unknown = self.view.map if isinstance(self.view.map, RowsUnknown) else None
        if self.regular and unknown is not None and not rows == unknown.rows == 1:
            raise ClockUnknown(
                f"{self.site.name}: which of its {rows} entries are which row is asked for. "
                f"{unknown}; where there is one for each row, say so with "
                'layout="rows tokens features"'
            )
        if self.regular and rows == count:
            return
        if self.regular and count is None:
            if isinstance(self.now.branches, tuple) or not self.shared.has_branches:
                return
            if self.now.run == 0 and request.branch is None:
                return  # no call of the pipeline: the batch is the caller's own, as of any module
            raise ClockUnknown(
                f"{self.site.name}: which entries of its batch of {rows} are which row is asked "
                f"for. {self.now.branches}"
            )
        got = self.x.shape[0]
        want = self.now.batch if not self.regular else f"{count} rows"
        message = (
            f"{self.site.name}: its batch has {got} entries where {want} are expected, so rows and "
            "branches cannot be told apart there. "
        )
        if isinstance(self.now.branches, ClockUnknown) and self.now.phase == "denoise":
            raise ClockUnknown(message + str(self.now.branches))
        raise InvalidInput(message + _why_irregular(self.now, self.shared))


def _why_irregular(now: CallContext, shared: SessionState) -> str:
    if now.phase == "denoise" and shared.drops_branch:
        return "FasterCache leaves out the unconditional half inside the denoiser: disable it"
    if now.phase == "outside":
        return "Slicing (enable_vae_slicing) splits the batch: disable it"
    return "The module does not work on one entry for each row"
