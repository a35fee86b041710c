"""Steps of a scheduler through a function, for one scheduler object and the length of a block."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stepping(
    scheduler: Any, around: Callable[[Callable[..., Any], inspect.BoundArguments], Any]
) -> Iterator[None]:
    """Let this one scheduler object step through a function; it is as before after the block.

    Args:
        scheduler: of diffusers.
        around: called as `around(step, call)` in place of each step. `step` is the scheduler's own,
            `call` holds its arguments by name; what it gives is the result of the step.

    Example:
        >>> class Halving:
        ...     def step(self, model_output, timestep):
        ...         return model_output / 2
        >>> scheduler = Halving()
        >>> with stepping(scheduler, lambda step, call: step(*call.args) + 1):
        ...     scheduler.step(4, timestep=0)
        3.0
        >>> scheduler.step(4, timestep=0)
        2.0
    """
    own, original = vars(scheduler), scheduler.step
    earlier = own.get("step")
    signature = inspect.signature(original)

    @functools.wraps(original)  # pipelines look at its parameters
    def step(*args: Any, **kwargs: Any) -> Any:
        return around(original, signature.bind(*args, **kwargs))

    own["step"] = step
    try:
        yield
    finally:
        if own.get("step") is step:
            del own["step"]
            if earlier is not None:
                own["step"] = earlier
