"""The time of a denoiser's calls that are made again outside a run, as the caller tells it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from dreamreader.engine._clock import Clock, DenoiserCall
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.errors import ClockUnknown


class ToldClock(AbstractContextManager):
    """Stands for a `Clock` where no pipeline runs: says the time that it was told.

    Args:
        pipe: whose denoisers are called. moments: of all calls that come, in order of time.

    Attributes:
        moment: of the call that is made next; None where nothing is.

    Example:
        >>> clock = ToldClock(pipe, calls.moments)                     # doctest: +SKIP
        >>> with reader.recording(streams, clock=clock):               # doctest: +SKIP
        ...     for clock.moment in calls.moments:
        ...         calls(rows, ...)
    """

    def __init__(self, pipe: Any, moments: Sequence[DenoiserCall]):
        self.denoisers = Clock(pipe).denoisers
        self.beside: dict[str, Any] = {}
        self.text_encoders: dict[str, Any] = {}
        self.arguments: dict[str, Any] = {}
        self.entries: list[StepInfo] = list(moments)
        self.moment: DenoiserCall | None = None

    def __exit__(self, *error: object) -> None:
        self.moment = None

    @property
    def schedule(self) -> list[StepInfo]:
        """The calls without the later evaluations of a step."""
        return [each for each in self.entries if each.evaluation == 0]

    def time(self) -> DenoiserCall:
        """See `Clock.time`."""
        if self.moment is None:
            raise ClockUnknown("the time of this call was not told: it has no step")
        return self.moment

    def branches(self) -> tuple[str, ...]:
        """See `Clock.branches`."""
        return self.time().branches

    def aside(self) -> None:
        """Nothing is: see `Clock.aside`."""
        return None
