"""What other libraries refuse of a call, as an error of ours that says it in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dreamreader.errors import DreamreaderError, InvalidInput, first_line

_ERRORS = (ValueError, TypeError, AttributeError, IndexError, KeyError, ZeroDivisionError)
_ERRORS += (RuntimeError,)
_NOT_OF_ARGUMENTS = (DreamreaderError, torch.OutOfMemoryError, torch.AcceleratorError)


@contextmanager
def refusals(what: str, *places: str) -> Iterator[None]:
    """Turns an argument's error into one line, where the code that checks arguments raises it.

    Args:
        what: is called, for the message.
        places: parts of the paths of that code, such as `diffusers/schedulers`. What a model, a
            hook or a function of the caller raises is left as it is.

    Raises:
        InvalidInput: the call was refused.
    """
    try:
        yield
    except _ERRORS as error:
        where = _find_source(error)
        if isinstance(error, _NOT_OF_ARGUMENTS) or not any(f"/{each}" in where for each in places):
            raise
        raise InvalidInput(f"{what}: {first_line(error)}") from error


def _find_source(error: BaseException) -> str:
    """The file whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename.replace("\\", "/")
