"""sparsify: `cfg.json` and `sae.safetensors`. b_dec is always taken from inputs.

Reference:
    `SparseCoder.load_from_disk` of eai-sparsify 1.3.3.
"""

from pathlib import Path
from typing import Any

from dreamreader.errors import InvalidInput
from dreamreader.sae.formats.files import (
    assemble,
    check_keys,
    check_tensors,
    option,
    read_json,
    read_safetensors,
)
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import TopK

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TENSORS = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}
KEYS = ("expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "d_in")
_OWN = ("activation", "skip_connection", "transcode", "signed")


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and not is_of_saeuron(path)


def is_of_saeuron(path: Path) -> bool:
    """SAeUron writes the same two files, with options of its own."""
    config = path / CONFIG
    return config.is_file() and "sample_topk" in read_json(config)


def read(path: Path) -> SparseAutoencoder:
    """Reads a folder of sparsify.

    Raises:
        FileNotFoundError: a file is missing.
        InvalidInput: a transcoder, a skip connection, another activation, or keys or shapes that do
            not fit.
    """
    file = path / CONFIG
    config = read_json(file)
    check_keys(file, config, (*KEYS, *_OWN))
    for name, plain in (
        ("activation", "topk"),
        ("skip_connection", False),
        ("transcode", False),
        ("signed", False),
    ):
        if config.get(name, plain) != plain:
            raise InvalidInput(f"{file}: {name}={config[name]!r} is not read, {plain!r} is")
    return read_coder(path, config)


def read_coder(path: Path, config: dict[str, Any], **options: Any) -> SparseAutoencoder:
    """The autoencoder of such a folder, with TopK."""
    found = read_safetensors(path / WEIGHTS)
    check_tensors(path / WEIGHTS, found, TENSORS)
    weights = {own: found[theirs] for theirs, own in TENSORS.items()}
    d_in = option(path / CONFIG, config, "d_in", int)
    d_sae = config.get("num_latents") or d_in * option(
        path / CONFIG, config, "expansion_factor", int
    )
    return assemble(
        path / WEIGHTS,
        weights | {"W_enc": weights["W_enc"].T},
        TopK(option(path / CONFIG, config, "k", int)),
        sizes={"d_in": d_in, "d_sae": d_sae},
        unit_decoder=bool(config.get("normalize_decoder", True)),
        **options,
    )
