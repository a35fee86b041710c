"""sdxl-unbox: `state_dict.pth` and `config.json`; beside them mean and deviation of activations.

Reference:
    `SAE/sae.py` of sdxl-unbox, arXiv:2410.22366.
"""

from pathlib import Path

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.sae.formats.files import assemble, check_tensors, option, read_json, read_pickle
from dreamreader.sae.loss import AuxK
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import TopK

CONFIG, WEIGHTS = "config.json", "state_dict.pth"
_TENSORS = ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias")


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def read(path: Path) -> SparseAutoencoder:
    """Reads a folder of sdxl-unbox; `mean.pt` and `std.pt` become `statistics`, where they are.

    Raises:
        FileNotFoundError: a file is missing.
        InvalidInput: keys or shapes do not fit, or a file runs code.
    """
    config, file = read_json(path / CONFIG), path / WEIGHTS
    wrapped = read_pickle(file)
    found = wrapped.get("state_dict")
    if set(wrapped) != {"state_dict"} or not isinstance(found, dict):
        raise InvalidInput(f"{file} must hold {{'state_dict': ...}}, got {', '.join(wrapped)}")
    check_tensors(file, found, _TENSORS, ("stats_last_nonzero",))
    dead_k = config.get("auxk")
    made = assemble(
        file,
        {
            "W_enc": found["encoder.weight"].T,
            "W_dec": found["decoder.weight"].T,
            "b_enc": found["latent_bias"],
            "b_dec": found["pre_bias"],
        },
        TopK(option(path / CONFIG, config, "k", int)),
        sizes={"d_in": config.get("d_model"), "d_sae": config.get("n_dirs_local")},
        aux=AuxK(k=dead_k) if dead_k else "none",
    )
    for name in ("mean", "std"):
        if (path / f"{name}.pt").is_file():
            made.statistics[name] = _statistic(path / f"{name}.pt", made.d_sae)
    return made


def _statistic(file: Path, d_sae: int) -> Tensor:
    """A value of each latent."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(f"{file} is no tensor that torch.save wrote") from error
    if not isinstance(found, Tensor) or found.shape != (d_sae,):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInput(f"{file} must hold one number for each of {d_sae} latents, got {shape}")
    return found.float()
