"""What edits did to the values of a site, written down by the passes that made them."""

import torch
from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.ops.intervention import CHANGED, NOT_FINITE, OVERFLOWED, look

_ROOM = 256  # visits in one table
HALF = (torch.float16, torch.bfloat16)


class NoteTable:
    """Places on one device for what edits do, one for each visit; read all at once."""

    __slots__ = ("values", "used", "_here", "_read")

    def __init__(self, device: torch.device):
        with torch.inference_mode(False):  # a block may begin inside and end outside of it
            self.values = torch.zeros(_ROOM, dtype=torch.int32, device=device)
        self._here = self.values.numpy().data if self.values.is_cpu else None
        self.used = 0
        self._read: list[int] = []

    def bits(self, at: int) -> int:
        """What was written at a place; waits for the device where it was not read since."""
        if self._here is not None:
            return self._here[at]
        if at >= len(self._read):
            self._read = self.values[: self.used].tolist()
        return self._read[at]


class Notes:
    """Whether the edits of one site changed or overflowed anything; read when it is asked for.

    Args:
        tables: in use by device; the sites of a session share them.
    """

    def __init__(self, tables: dict[torch.device, NoteTable]) -> None:
        self.known_changed: set[int] = set()  # numbers of edits
        self._overflowed: list[CallContext] = []
        self._tables = tables
        self._open: list[tuple[CallContext | None, tuple[int, ...], NoteTable, int]] = []

    def place(
        self, now: CallContext | None, numbers: tuple[int, ...], x: Tensor
    ) -> tuple[Tensor, int]:
        """A place for what the edits `numbers` do to x; `now` None: overflow is of no concern."""
        device = x.device
        table = self._tables.get(device)
        if table is None or table.used == _ROOM:
            table = self._tables[device] = NoteTable(device)
        if len(self._open) == _ROOM:
            self._read()  # so that what is open stays small, however long a block is
        at = table.used
        table.used = at + 1
        self._open.append((now, numbers, table, at))
        return table.values, at

    def look(self, now: CallContext | None, numbers: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        """Compare what something else than a program gave."""
        compare = not self.knows(numbers)
        if compare or y.dtype in HALF:
            look(x, y, *self.place(now, numbers, y), compare)

    def knows(self, numbers: tuple[int, ...]) -> bool:
        """Whether each of these edits has changed a value so far; waits while that is unknown."""
        if self.known_changed.issuperset(numbers):
            return True
        self._read()
        return self.known_changed.issuperset(numbers)

    def find_changed(self) -> set[int]:
        """Numbers of the edits that changed a value."""
        self._read()
        return self.known_changed

    def find_overflowed(self) -> list[CallContext]:
        """The calls in which an edit made values infinite or NaN that were not."""
        self._read()
        return self._overflowed

    def _read(self) -> None:
        for now, numbers, table, at in self._open:
            bits = table.bits(at)
            if bits & CHANGED and len(numbers) == 1:
                self.known_changed.update(numbers)
            if now is not None and bits & (OVERFLOWED | NOT_FINITE) == OVERFLOWED:
                self._overflowed.append(now)
        self._open.clear()
