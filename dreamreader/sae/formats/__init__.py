"""Autoencoders of other libraries: read as they compute, and written so that they read them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sae.formats import (
    dictionary_learning,
    gemma_scope,
    overcomplete,
    saelens,
    saeuron,
    sdxl_unbox,
    sparsify,
)
from dreamreader.sae.model import SparseAutoencoder

READERS: dict[str, Any] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "saeuron": saeuron,
    "sdxl_unbox": sdxl_unbox,
    "gemma_scope": gemma_scope,
    "overcomplete": overcomplete,
}
WRITERS: dict[str, Callable[[SparseAutoencoder, Path], None]] = {
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
}


def read_sae(
    path: str | os.PathLike[str], format: str | None = None, **options: Any
) -> SparseAutoencoder:
    """Reads an autoencoder that another library wrote, in `eval()` mode.

    Args:
        path: of its folder; of the file for `overcomplete`.
        format: `saelens`, `dictionary_learning`, `sparsify`, `saeuron`, `sdxl_unbox`, `gemma_scope`
            or `overcomplete`; found from the files of the folder where None.
        options: of the format: `input_scale` (saelens), `dict_class` (dictionary_learning), `k`,
            `threshold`, `normalization` (overcomplete).

    Returns:
        An autoencoder with the codes and reconstructions of that library. Nothing that is read can
        run code.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        InvalidInput, UnknownName: no format fits, or the file is none of it in some way.

    Example:
        >>> sae = read_sae("layer_12/width_16k")                          # doctest: +SKIP
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"there is no {folder}")
    if format is None:
        fitting = [name for name, each in READERS.items() if each.matches(folder)]
        if len(fitting) != 1:
            there = (
                sorted(each.name for each in folder.iterdir()) if folder.is_dir() else ["a file"]
            )
            raise InvalidInput(
                f"{folder}: files of {' and '.join(fitting) or 'no format'} are there "
                f"({', '.join(there[:8]) or 'none'}); give format=, one of {', '.join(READERS)}"
            )
        format = fitting[0]
    if format not in READERS:
        raise UnknownName("format of an autoencoder", format, READERS)
    reader = READERS[format].read
    known = reader.__kwdefaults__ or {}
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {format}", name, known)
    found = reader(folder, **options)
    found.steps.clamp_(min=1)  # it has learned: training on keeps its b_dec and scales
    return found


def write_sae(sae: SparseAutoencoder, path: str | os.PathLike[str], format: str) -> None:
    """Writes an autoencoder for another library; files that are there are replaced.

    Args:
        sae: decoder norms and scales of inputs are folded into its weights on the way.
        path: of a folder.
        format: `saelens` or `dictionary_learning`.

    Raises:
        UnknownName: no other library is written.
        InvalidInput: that library has nothing of the kind, or the folder cannot be written.

    Example:
        >>> from dreamreader.sae import TopK
        >>> sae = SparseAutoencoder(4, 16, TopK(2))
        >>> write_sae(sae, "sae-of-mine", "saelens")
        >>> bool((read_sae("sae-of-mine").W_dec == sae.W_dec).all())
        True
    """
    if format not in WRITERS:
        raise UnknownName("format that is written", format, WRITERS)
    WRITERS[format](sae, Path(path))
