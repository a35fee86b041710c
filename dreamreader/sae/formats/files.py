"""Reading what other libraries wrote, with errors that say what is wrong with a file."""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamreader._files import explain_disk_errors, replacing, write_atomic
from dreamreader.errors import InvalidInput, first_line
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import Selection

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        InvalidInput: it holds no JSON object.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds no JSON object, but {type(found).__name__}")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        InvalidInput: it is no safetensors file, or a part of one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with open(path, "rb"):  # safetensors does not say which file it was
        pass
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InvalidInput(f"{path} is no whole safetensors file: {first_line(error)}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary of a file of torch.save, without running any code of it.

    Raises:
        FileNotFoundError: there is none.
        InvalidInput: it holds more than tensors and plain values, or no dictionary.
    """
    with open(path, "rb"):
        pass
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InvalidInput(
            f"{path} holds objects that run code when they are read, or is damaged; save the "
            "state_dict() of the module, tensors alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InvalidInput(f"{path} is no file of torch.save: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds no dictionary, but {type(found).__name__}")
    return found


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a .npz file.

    Raises:
        FileNotFoundError: there is none.
        InvalidInput: it is no such file, or an array holds objects.
    """
    import zipfile

    import numpy as np

    with open(path, "rb"):
        pass
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{path} is no .npz of numbers: {first_line(error)}") from error


def check_tensors(
    path: Path, found: Mapping[str, Any], needed: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Refuses what lacks a tensor, has one that is not known, or a value that is no tensor.

    Raises:
        InvalidInput: says which.
    """
    known = set(needed)
    lacking = sorted(known - found.keys())
    surplus = sorted(found.keys() - known - set(optional))
    if lacking or surplus:
        said = [f"lacks {', '.join(lacking)}"] if lacking else []
        said += [f"has {', '.join(surplus[:5])}, which no such file has"] if surplus else []
        raise InvalidInput(f"{path} {' and '.join(said)}; it holds {', '.join(sorted(found)[:12])}")
    for name, each in found.items():
        if not isinstance(each, Tensor):
            raise InvalidInput(f"{path}: {name} is no tensor, but {type(each).__name__}")


def check_keys(path: Path, found: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuses options that are not known, as they may change what is computed.

    Raises:
        InvalidInput: names them.
    """
    surplus = sorted(found.keys() - set(known))
    if surplus:
        raise InvalidInput(
            f"{path} has options that are not known here: {', '.join(surplus[:5])}; if they change "
            "no code, take them out of the file"
        )


def option(path: Path, found: Mapping[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """An option of a kind.

    Raises:
        InvalidInput: it is missing and has no default, or is of another kind.
    """
    value = found.get(name, default)
    wrong_bool = isinstance(value, bool) and kind is not bool
    if value is None or wrong_bool or not isinstance(value, kind):
        words = " or ".join(
            each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,))
        )
        said = "is missing" if name not in found else f"is {value!r:.40}"
        raise InvalidInput(f"{path}: {name} {said}, expected {words}")
    return value


def assemble(
    path: Path,
    weights: Mapping[str, Tensor],
    selection: Selection,
    threshold: Tensor | float | None = None,
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, int | None] | None = None,
    **options: Any,
) -> SparseAutoencoder:
    """An autoencoder of given weights, in `eval()` mode.

    Args:
        path: for errors.
        weights: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc`, `b_dec`.
        threshold: of inference. dtype: of the weights; that of W_dec where None.
        sizes: `d_in` and `d_sae` as another file names them.
        options: of `SparseAutoencoder`.

    Raises:
        InvalidInput: a shape does not fit the others, or a threshold is NaN; names the file.
    """
    w_enc = weights["W_enc"]
    if w_enc.dim() != 2:
        raise InvalidInput(f"{path}: W_enc must be [d_in, d_sae], got {list(w_enc.shape)}")
    d_in, d_sae = w_enc.shape
    for name, has in (("d_in", d_in), ("d_sae", d_sae)):
        said = (sizes or {}).get(name)
        if said is not None and said != has:
            raise InvalidInput(f"{path}: its options say {name}={said!r}, its weights have {has}")
    made_of = dtype or weights["W_dec"].dtype
    if not made_of.is_floating_point:
        raise InvalidInput(f"{path}: weights are {made_of}; floating point is needed")
    try:
        made = SparseAutoencoder(d_in, d_sae, selection, dtype=made_of, **options)
        made.set_tensors(weights)
        if threshold is not None:
            made.threshold = threshold
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    return made.eval()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with explain_disk_errors(path):
        write_atomic(path, json.dumps(content, indent=2) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with explain_disk_errors(path), replacing(path) as part:
        save_file({name: copy_plain(each) for name, each in tensors.items()}, part)


def write_pickle(path: Path, content: Mapping[str, Tensor]) -> None:
    """Writes tensors with torch.save, whole or not at all."""
    with explain_disk_errors(path), replacing(path) as part:
        torch.save({name: copy_plain(each) for name, each in content.items()}, part)


def copy_plain(tensor: Tensor) -> Tensor:
    """Contiguous memory of its own, on the CPU."""
    return tensor.detach().cpu().contiguous().clone()
