"""Where a run stands on its scheduler's trajectory.

The position is read from the scheduler (its step index, begin index or counter) and compared with
the `timestep` that the denoiser is given. Everything that lives on the device is copied to the host
once per run; nothing here waits for the device afterwards unless no other evidence exists.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine._families.solver import (
    begins_within_step,
    live_level,
    noise_levels,
    place,
    spare_entries,
)
from dreamreader.engine._families.timestep import KNOWN_FORMS, Form
from dreamreader.errors import ClockUnknown


@dataclass(frozen=True)
class StepInfo:
    """A place in time of a denoising run.

    Attributes:
        step: index of the solver's step in its full trajectory. It moves with the scheduler's place
            in its `timesteps`, `place // order`, so both evaluations of a step of a second-order
            solver share it. A run that begins on the way (img2img) begins with a step above 0:
            each entry of the schedule has the number that it has in a run from the start.
        timestep: the scheduler's own value there, whatever form the denoiser receives it in.
        sigma: noise level of the denoiser's input by the scheduler's table: `sigmas[place]`, or
            sqrt((1 - abar) / abar) for schedulers that only have `alphas_cumprod`; None where the
            scheduler has neither.
        fraction: share of the full trajectory that is done when the step begins, `step / number of
            steps`: 0 at pure noise.
        evaluation: place within the step: 0, and 1 for the second evaluation of second-order
            solvers.
    """

    step: int
    timestep: float
    sigma: float | None
    fraction: float
    evaluation: int


UNTIMED = StepInfo(-1, float("nan"), None, float("nan"), 0)
"""Of what runs outside the denoising, or at a step that is not known: it has no number."""


class Trajectory:
    """Host copy of one run's schedule, and the run's place on it."""

    def __init__(self, scheduler: Any, form: Form | None, config: Any, clean_tokens: bool = False):
        timesteps = scheduler.timesteps
        if not isinstance(timesteps, Tensor):
            timesteps = torch.as_tensor(timesteps)
        self.source = scheduler.timesteps
        self.scheduler = scheduler
        kept = len(timesteps) - spare_entries(scheduler)
        self.values: list[float] = timesteps[:kept].detach().to("cpu", torch.float64).tolist()
        self.sigmas = noise_levels(scheduler, self.values)
        self.forms: tuple[Form, ...] = KNOWN_FORMS if form is None else (form,)
        self.form_known = form is not None
        self.config = config
        self.clean_tokens = clean_tokens
        self.train = float(getattr(scheduler.config, "num_train_timesteps", 1000))
        self.total = place(scheduler, len(self.values) - 1)[0] + 1
        self.start: int | None = None
        self._timesteps = timesteps
        self._address = timesteps.data_ptr()
        self._stride = timesteps.element_size()
        self._has_index = hasattr(type(scheduler), "step_index")
        self._later: list[tuple[Tensor, int, float]] = []
        self._entries: list[StepInfo] = []
        self._steps: list[StepInfo] = []

    def locate(self, argument: Any, precision: float) -> int:
        """Entry of `scheduler.timesteps` at which the denoiser is being called.

        Args:
            argument: what the denoiser got as its timestep, or None when it takes none.
            precision: relative rounding error to expect in it.

        Raises:
            ClockUnknown: the scheduler and the denoiser's argument do not agree on one entry.
        """
        view = self._view_of(argument)
        index = self._from_scheduler(argument, view, precision)
        if not 0 <= index < len(self.values):
            raise ClockUnknown(
                f"the scheduler stands at entry {index}, but its schedule has {len(self.values)}: "
                "the denoiser was called after the last step, or another scheduler is driving it"
            )
        if self.start is None:
            if begins_within_step(self.scheduler, index):
                raise ClockUnknown(
                    f"the run begins at entry {index} of {type(self.scheduler).__name__}, inside a "
                    f"step that has {getattr(self.scheduler, 'order', 1)} evaluations: its steps "
                    "are not those of the full trajectory"
                )
            self.start = index
        if index < self.start:
            raise ClockUnknown(
                f"the scheduler went back to entry {index}; the run began at entry {self.start}"
            )
        self._compare(index, argument, view, precision)
        return index

    def instant(self, index: int) -> StepInfo:
        """The time at an entry of the schedule, in the run that `locate` has seen the start of."""
        step, evaluation = place(self.scheduler, index)
        sigma = None
        if self.sigmas is not None:
            sigma = self.sigmas[1 if evaluation else 0][index]
            if sigma is None:
                sigma = live_level(self.scheduler)
        return StepInfo(step, self.values[index], sigma, step / self.total, evaluation)

    def steps(self) -> list[StepInfo]:
        """The steps from the first of the run to the last of the schedule, at their beginnings."""
        if not self._steps:  # asked for at every call of every site
            self._steps = [each for each in self.entries() if each.evaluation == 0]
        return self._steps

    def entries(self) -> list[StepInfo]:
        """Like `steps`, with every evaluation of each."""
        if self.start is not None and not self._entries:
            self._entries = [self.instant(i) for i in range(self.start, len(self.values))]
        return self._entries

    def postpone(self, argument: Tensor, index: int, precision: float) -> None:
        """Keep an argument that lives on the device, to be compared with its entry by `settle`."""
        self._later.append((argument, index, precision))

    def settle(self) -> None:
        """Compare the arguments that were left on the device, waiting for it once.

        Raises:
            ClockUnknown: one of them contradicts the entry that the scheduler gave at that call.
        """
        later, self._later = self._later, []
        if not later:
            return
        ends = [torch.stack(self._ends(argument)) for argument, _, _ in later]
        found = torch.stack([each.to(torch.float64) for each in ends]).tolist()
        for (low, high), (_, index, precision) in zip(found, later, strict=True):
            self._agree(index, self._one(low, high, precision), precision)

    def _from_scheduler(self, argument: Any, view: int | None, precision: float) -> int:
        scheduler = self.scheduler
        if self._has_index:
            index = scheduler.step_index
            if index is None:
                # before its first step a scheduler starts where the pipeline told it to ...
                index = getattr(scheduler, "begin_index", None)
            if index is None:
                # ... or where it finds the first timestep, by its own rule for repeated values
                found = [view] if view is not None else self._matches(argument, precision)
                if self.values.count(self.values[found[0]]) > 1:
                    return int(scheduler.index_for_timestep(self._timesteps[found[0]]))
                if len(found) > 1:
                    raise ClockUnknown(self._unclear(argument, found))
                return found[0]
            return int(index)
        if hasattr(scheduler, "counter"):
            # PNDM repeats a value and tells the two apart by this counter
            if self.start is None:
                return self._only(argument, view, precision)
            return self.start + int(scheduler.counter)
        return self._only(argument, view, precision)

    def _only(self, argument: Any, view: int | None, precision: float) -> int:
        if view is not None:
            return view
        found = self._matches(argument, precision)
        if len(found) > 1:
            raise ClockUnknown(self._unclear(argument, found))
        return found[0]

    def _matches(self, argument: Any, precision: float) -> list[int]:
        """Entries that the denoiser's argument can mean; at least one."""
        if argument is None:
            raise ClockUnknown(
                f"{type(self.scheduler).__name__} keeps no step index, and the denoiser takes no "
                "timestep"
            )
        if not self.form_known:
            raise ClockUnknown(
                f"{type(self.scheduler).__name__} keeps no step index, and how this class of "
                "denoiser scales its timestep is not known (see engine/families/timestep.py)"
            )
        value = self._number(argument, precision)
        found = [i for i in range(len(self.values)) if self._fits(i, value, precision)]
        if not found:
            raise ClockUnknown(
                f"the denoiser was called with timestep {value:g}, which is not in the schedule of "
                f"{type(self.scheduler).__name__} ({self._range()})"
            )
        return found

    def _view_of(self, argument: Any) -> int | None:
        """Entry of which `argument` is a view: then the place is known without reading a value."""
        if type(argument) is not Tensor or argument.dtype != self._timesteps.dtype:
            return None
        offset, rest = divmod(argument.data_ptr() - self._address, self._stride)
        if rest or not 0 <= offset < len(self.values):
            return None
        if argument.numel() != 1 and any(argument.stride()):
            return None
        return offset

    def _compare(self, index: int, argument: Any, view: int | None, precision: float) -> None:
        if argument is None:
            return
        if view is not None:
            self._agree(index, self.values[view], precision)
        elif isinstance(argument, Tensor) and argument.device.type != "cpu":
            self.postpone(argument, index, precision)
        else:
            self._agree(index, self._number(argument, precision), precision)

    def _agree(self, index: int, value: float, precision: float) -> None:
        if not self._fits(index, value, precision):
            raise ClockUnknown(
                f"the scheduler stands at timestep {self.values[index]:g} (entry {index}), but the "
                f"denoiser was called with timestep {value:g}: they are not of the same "
                "run, or the pipeline hands its denoiser the time in a form that is not known"
            )

    def _number(self, argument: Any, precision: float) -> float:
        """The timestep of a call, of which all tokens have to be at the same one."""
        if not isinstance(argument, Tensor):
            return float(argument)
        if argument.numel() == 1:
            return float(argument)
        low, high = self._ends(argument)
        return self._one(float(low), float(high), precision)

    def _ends(self, argument: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest timestep in a call, without tokens that hold no noise."""
        low, high = argument.detach().aminmax()
        if self.clean_tokens:
            noisy = torch.where(argument.detach() > 0, argument.detach(), high)
            low = noisy.min()
        return low, high

    def _one(self, low: float, high: float, precision: float) -> float:
        if high - low > precision * abs(high):
            raise ClockUnknown(
                f"the call holds tokens at different noise levels (timesteps {low:g} to {high:g}): "
                "it has no single step"
            )
        return high

    def _fits(self, index: int, value: float, precision: float) -> bool:
        for form in self.forms:
            expected = form(self.values[index], self.train, self.config)
            # 1 - t / T loses precision relative to 1, not to its own size
            scale = max(abs(expected), 1.0 if form is KNOWN_FORMS[2] else 1e-6)
            if abs(value - expected) <= precision * scale:
                return True
        return False

    def _range(self) -> str:
        return f"{len(self.values)} entries from {self.values[0]:g} to {self.values[-1]:g}"

    def _unclear(self, argument: Any, found: list[int]) -> str:
        return (
            f"timestep {self._number(argument, 1e-6):g} stands at entries {found} of the schedule; "
            "which one is unknown"
        )
