"""Devices and dtypes by name, checked before anything is loaded or moved."""

from typing import Any

import torch

from dreamreader.errors import InvalidInput, UnknownName, first_line

DTYPES = ("float32", "bfloat16", "float16", "float64")


def device_of(device: str | int | torch.device) -> torch.device:
    """The device of a name, where this torch and this machine have it.

    Args:
        device: such as `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        InvalidInput: there is no such device here; says whether torch or the machine lacks it.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(
            f"device {device!r} is none of torch; expected cpu, cuda, cuda:1, mps or the like"
        ) from error
    kind = found.type
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise InvalidInput(
            f"device {found}: this torch has no CUDA (torch {torch.__version__}); install a build "
            "of torch with CUDA, or use cpu"
        )
    module = getattr(torch, kind, None)
    if kind != "cpu" and (module is None or not module.is_available()):
        raise InvalidInput(f"device {found}: torch {torch.__version__} finds no {kind} device here")
    if found.index is not None and found.index >= (count := module.device_count()):  # pyright: ignore[reportOptionalMemberAccess]
        raise InvalidInput(f"device {found}: there are {count} {kind} devices, numbered from 0")
    return found


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """The floating dtype of a name, `torch.` before it or not.

    Raises:
        UnknownName: it is none that models compute in.

    Example:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UnknownName("dtype", name, DTYPES)
    return getattr(torch, name)


def move(model: Any, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Moves a pipeline or model in place.

    Raises:
        InvalidInput: the device's memory is too small, or the model cannot be moved (quantised,
            or under the offload of accelerate).
    """
    target = [each for each in (device, dtype) if each is not None]
    said = " and ".join(map(str, target))
    try:
        for each in target:  # pipelines of diffusers take one of them at a time
            model.to(each)
    except torch.OutOfMemoryError as error:
        raise InvalidInput(
            f"{type(model).__name__} does not fit into the memory of {said}"
        ) from error
    except (ValueError, NotImplementedError) as error:
        raise InvalidInput(
            f"{type(model).__name__} cannot be moved to {said}: {first_line(error)}"
        ) from error
