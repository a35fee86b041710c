"""Gemma Scope 1: `params.npz`; and 2: `params.safetensors` with small names and `config.json`.

Both are JumpReLU, and b_dec is not taken from inputs.

Reference:
    Lieberum et al., Gemma Scope, arXiv:2408.05147; the cards of google/gemma-scope-2b-pt-res and of
    the repositories google/gemma-scope-2-*.
"""

from pathlib import Path

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae.formats.files import (
    assemble,
    check_tensors,
    read_json,
    read_npz,
    read_safetensors,
)
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import JumpReLU

ARRAYS, CONFIG, WEIGHTS = "params.npz", "config.json", "params.safetensors"
_SECOND = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")


def matches(path: Path) -> bool:
    return (path / ARRAYS).is_file() or (path / WEIGHTS).is_file()


def read(path: Path) -> SparseAutoencoder:
    """Reads a folder of Gemma Scope 1 or 2.

    Raises:
        FileNotFoundError: a file is missing.
        InvalidInput: a transcoder, another architecture, or keys or shapes that do not fit.
    """
    if (path / ARRAYS).is_file():
        file, found = path / ARRAYS, read_npz(path / ARRAYS)
        check_tensors(file, found, [_upper(each) for each in _SECOND])
        return _assemble(file, found, {})
    config, file = read_json(path / CONFIG), path / WEIGHTS
    kind = config.get("architecture")
    if kind != "jump_relu":
        raise InvalidInput(f"{path / CONFIG}: architecture={kind!r} is not read, 'jump_relu' is")
    found = read_safetensors(file)
    if "affine_skip_connection" in found or found.get("w_dec", found["w_enc"]).dim() != 2:
        raise InvalidInput(f"{file} is a transcoder, whose output is another activation; not read")
    check_tensors(file, found, _SECOND)
    known = ("model_name", "hf_hook_point_in", "width", "l0")
    metadata = {name: config[name] for name in known if name in config}
    return _assemble(file, {_upper(name): each for name, each in found.items()}, metadata)


def _upper(name: str) -> str:
    return f"W_{name[2:]}" if name.startswith("w_") else name


def _assemble(
    file: Path, found: dict[str, Tensor], metadata: dict[str, object]
) -> SparseAutoencoder:
    return assemble(
        file,
        {name: each for name, each in found.items() if name != "threshold"},
        JumpReLU(),
        found["threshold"],
        apply_b_dec_to_input=False,
        unit_decoder=False,
        metadata=metadata,
    )
