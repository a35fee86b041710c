"""Resolves requests at one site in one kind of call: batch entries, rows and tokens."""

from dataclasses import replace

import torch
from torch import Tensor

from dreamreader.engine.edit_request import EditRequest
from dreamreader.engine.now import Now
from dreamreader.engine.place import Place, row_mask
from dreamreader.engine.request import Request
from dreamreader.engine.shared import Shared
from dreamreader.engine.site_view import SiteView
from dreamreader.engine.sites import Site
from dreamreader.engine.stream import Stream
from dreamreader.engine.token_layout import RowsUnknown
from dreamreader.engine.tokens import SiteTokens, select, site_tokens
from dreamreader.errors import ClockUnknown, InvalidInput


class Placement:
    """Makes the place of each request at one site in one kind of call."""

    def __init__(self, site: Site, now: Now, view: SiteView, x: Tensor, shared: Shared):
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

    def _crosses(self) -> bool | None:
        """Whether the attention around the site reads the text; None where there is no word."""
        modules, parts = self.shared.subject.modules(), self.site.path.split(".")
        for stop in range(len(parts), 0, -1):
            found = getattr(modules.get(".".join(parts[:stop])), "is_cross_attention", None)
            if found is not None:
                return found
        return None

    def make(self, request: Request) -> Place:
        rows = self.x.shape[0] // (len(self.branches) * self.beams)
        self._check_rows(request, rows)
        rowset = self.shared.rowset.resolved(rows)
        width = self.x.shape[-1] if self.x.dim() == 3 else self.x.shape[-1] * self.x.shape[-2]
        place = Place(
            self.site.name,
            width,
            self.site.heads or self.view.heads,
            rows,
            rowset.total or rows,
            rowset.start,
            self.branches,
            self.tokens,
            self.now.instant if not isinstance(self.now.instant, Exception) else None,
            self.x.device,
            self.x.dtype,
            self.shared.seeds,
            self.beams,
            self.view.heads is not None,
        )
        entries = row_mask(request, place)
        words = None
        if isinstance(request.tokens, str | tuple):
            words = self.shared.words_for(
                self.now, self.site, self.branches, rows, self.beams, entries
            )
        tokens = select(request.tokens, self.tokens, words, entries)
        selected = torch.ones(1, 1) if tokens is None else torch.atleast_2d(tokens)
        if entries is not None:
            selected = selected * entries.reshape(-1, 1)
        place.selected = selected
        return place

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


def _why_irregular(now: Now, shared: Shared) -> str:
    if now.phase == "denoise" and shared.drops_branch:
        return "FasterCache leaves out the unconditional half inside the denoiser: disable it"
    if now.phase == "outside":
        return "Slicing (enable_vae_slicing) splits the batch: disable it"
    return "The module does not work on one entry for each row"
