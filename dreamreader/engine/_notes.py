"""What edits did to the values of a site, written down by the passes that made them."""

import torch
from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.ops.intervention import CHANGED, NOT_FINITE, OVERFLOWED, look

_ROOM = 256  # visits in one table
_NO_TABLE = torch.empty(0, dtype=torch.int32)
HALF = (torch.float16, torch.bfloat16)


class Notes:
    """Whether the edits of one site changed or overflowed anything; read when it is asked for.

    Each visit has a place in a table on the device of the values, so that no visit waits for one.
    """

    def __init__(self) -> None:
        self._changed: set[int] = set()
        self._overflowed: list[CallContext] = []
        self._device: torch.device | None = None  # of the table in use
        self._table = _NO_TABLE
        self._at = 0  # next place there
        self._open: list[tuple[CallContext | None, tuple[int, ...], Tensor, int]] = []

    def place(
        self, now: CallContext | None, numbers: tuple[int, ...], x: Tensor
    ) -> tuple[Tensor, int]:
        """A place for what the edits `numbers` do to x; `now` None: overflow is of no concern."""
        device = x.device
        if self._at == _ROOM:
            self._read()  # so that what is open stays small, however long a block is
        if device != self._device or self._at == _ROOM:
            self._device, self._at = device, 0
            with torch.inference_mode(False):  # a block may begin inside and end outside of it
                self._table = torch.zeros(_ROOM, dtype=torch.int32, device=device)
        at = self._at
        self._at = at + 1
        self._open.append((now, numbers, self._table, at))
        return self._table, at

    def look(self, now: CallContext | None, numbers: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        """Compare what something else than a program gave."""
        compare = not self.knows(numbers)
        if compare or y.dtype in HALF:
            look(x, y, *self.place(now, numbers, y), compare)

    def knows(self, numbers: tuple[int, ...]) -> bool:
        """Whether each of these edits has changed a value so far; waits while that is unknown."""
        if self._changed.issuperset(numbers):
            return True
        self._read()
        return self._changed.issuperset(numbers)

    def changed(self) -> set[int]:
        """Numbers of the edits that changed a value."""
        self._read()
        return self._changed

    def overflowed(self) -> list[CallContext]:
        """The calls in which an edit made values infinite or NaN that were not."""
        self._read()
        return self._overflowed

    def _read(self) -> None:
        tables: dict[int, list[int]] = {}
        for now, numbers, table, at in self._open:
            bits = tables.get(id(table)) or tables.setdefault(id(table), table.tolist())
            if bits[at] & CHANGED and len(numbers) == 1:
                self._changed.update(numbers)
            if now is not None and bits[at] & (OVERFLOWED | NOT_FINITE) == OVERFLOWED:
                self._overflowed.append(now)
        self._open.clear()
