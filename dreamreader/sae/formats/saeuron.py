"""SAeUron: the files of sparsify, with `batch_topk`, `sample_topk` and `input_unit_norm`.

Whatever it was trained with, its own code encodes with the k largest of each row, and so does what
is read here; `metadata["trained_with"]` says the former. With `input_unit_norm` its `forward`
normalises each row and its `encode` alone does not; here both do.

Reference:
    `SAE/sae.py` of SAeUron, arXiv:2501.18052.
"""

from pathlib import Path

from dreamreader.sae.formats.files import check_keys, option, read_json
from dreamreader.sae.formats.sparsify import CONFIG, KEYS, WEIGHTS, is_of_saeuron, read_coder
from dreamreader.sae.model import SparseAutoencoder

_OWN = ("batch_topk", "sample_topk", "input_unit_norm")


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file() and is_of_saeuron(path)


def read(path: Path) -> SparseAutoencoder:
    """Reads a folder of SAeUron.

    Raises:
        FileNotFoundError: a file is missing.
        InvalidInput: keys or shapes do not fit.
    """
    file = path / CONFIG
    config = read_json(file)
    check_keys(file, config, (*KEYS, *_OWN))
    rules = [name for name in _OWN[:2] if option(file, config, name, bool, False)]
    each_row = option(file, config, "input_unit_norm", bool, False)
    return read_coder(
        path,
        config,
        normalise="layer_norm" if each_row else "none",
        metadata={"trained_with": rules[0] if rules else "topk"},
    )
