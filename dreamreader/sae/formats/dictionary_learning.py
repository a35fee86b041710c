"""dictionary_learning: `ae.pt`, the state_dict of a class that `config.json` names.

Reference:
    `dictionary.py` and `trainers/` of dictionary_learning 0.1.0.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sae.fold import fold
from dreamreader.sae.formats.files import (
    assemble,
    check_tensors,
    copy_plain,
    read_json,
    read_pickle,
    write_json,
    write_pickle,
)
from dreamreader.sae.inputs import PER_ROW
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import BatchTopK, JumpReLU, TopK

CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
# of each class: what its tensors are, those beside them, and whether b_dec is taken from inputs
_CLASSES: dict[str, tuple[dict[str, str], tuple[str, ...], bool]] = {
    "AutoEncoder": (_LINEAR | {"bias": "b_dec"}, (), True),
    "AutoEncoderNew": (_LINEAR | {"decoder.bias": "b_dec"}, (), False),
    "AutoEncoderTopK": (_LINEAR | {"b_dec": "b_dec"}, ("k", "threshold"), True),
    "BatchTopKSAE": (_LINEAR | {"b_dec": "b_dec"}, ("k", "threshold"), True),
    "MatryoshkaBatchTopKSAE": (_PLAIN, ("k", "threshold", "group_sizes"), True),
    "JumpReluAutoEncoder": (_PLAIN, ("threshold",), False),
}
_LATER = ("threshold",)  # that earlier versions of the package did not write


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def read(path: Path, *, dict_class: str | None = None) -> SparseAutoencoder:
    """Reads a folder of dictionary_learning.

    Where a BatchTopKSAE has no threshold yet (-1) it keeps, as in training, the largest of a batch;
    the package keeps all that is positive.

    Args:
        dict_class: where there is no `config.json`, such as `BatchTopKSAE`.

    Raises:
        FileNotFoundError: a file is missing.
        InvalidInput, UnknownName: another class, or keys or shapes that do not fit.
    """
    name = dict_class or _class_named(path)
    if name not in _CLASSES:
        raise UnknownName(f"dict_class in {path / CONFIG}", name, _CLASSES)
    names, beside, applied = _CLASSES[name]
    file = path / WEIGHTS
    found = read_pickle(file)
    optional = [each for each in beside if each in _LATER and name != "JumpReluAutoEncoder"]
    check_tensors(file, found, {*names, *beside} - set(optional), optional)
    weights = {own: found[theirs] for theirs, own in names.items()}
    if names is not _PLAIN and "encoder.weight" in names:
        weights |= {each: weights[each].T for each in ("W_enc", "W_dec")}
    options: dict[str, Any] = {"threshold_rule": "dictionary_learning"}
    threshold: Tensor | None = found.get("threshold")
    if name == "AutoEncoderTopK":
        selection = TopK(int(found["k"]))
    elif "k" in beside:
        selection = BatchTopK(int(found["k"]))
    else:
        selection = JumpReLU()
    if "group_sizes" in beside:
        options["groups"] = found["group_sizes"].cumsum(0).tolist()
        count = len(options["groups"])
        options["group_weights"] = [1 / count**2] * count  # the mean of errors weighted 1 / count
    if "k" in beside and threshold is not None and not bool(threshold >= 0):
        if bool(threshold.isnan()):
            raise InvalidInput(f"{file}: threshold is NaN")
        threshold = None
    return assemble(
        file,
        weights,
        selection,
        threshold,
        apply_b_dec_to_input=applied,
        metadata={"dict_class": name},
        **options,
    )


def write(sae: SparseAutoencoder, path: Path) -> None:
    """Writes a folder that dictionary_learning reads.

    TopK becomes AutoEncoderTopK; BatchTopK and SampledTopK with one threshold for all BatchTopKSAE,
    or MatryoshkaBatchTopKSAE with groups; everything else JumpReluAutoEncoder. Decoder norms and
    scales of inputs are folded into the weights.

    Raises:
        InvalidInput: the package has no such class, or a file cannot be written.
    """
    if sae.normalise in PER_ROW or sae.reshape != "none":
        raise InvalidInput(
            f"dictionary_learning has no autoencoder with normalise={sae.normalise!r} and "
            f"reshape={sae.reshape!r}"
        )
    folded = fold(sae)
    name, extra = _class_for(folded)
    names, _, applied = _CLASSES[name]
    weights = {each: getattr(folded, each).detach() for each in _PLAIN}
    if applied and not sae.apply_b_dec_to_input:
        weights["b_enc"] = weights["b_enc"] + weights["b_dec"] @ weights["W_enc"]
    if sae.apply_b_dec_to_input and not applied:
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    if names is not _PLAIN:
        weights |= {each: weights[each].T for each in ("W_enc", "W_dec")}
    tensors = {theirs: copy_plain(weights[own]) for theirs, own in names.items()}
    write_pickle(path / WEIGHTS, tensors | extra)
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    trainer |= {"k": int(sae.k)} if "k" in extra and sae.k is not None else {}
    write_json(path / CONFIG, {"trainer": trainer, "buffer": {}})


def _class_named(path: Path) -> str:
    if not (path / CONFIG).is_file():
        raise InvalidInput(
            f"{path} has no {CONFIG} that names the class; give dict_class=, one of "
            f"{', '.join(_CLASSES)}"
        )
    trainer = read_json(path / CONFIG).get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, Mapping) else None
    if not isinstance(name, str):
        raise InvalidInput(f"{path / CONFIG} names no class: trainer.dict_class is missing")
    return name


def _class_for(sae: SparseAutoencoder) -> tuple[str, dict[str, Tensor]]:
    """The class for a folded autoencoder, and the tensors beside its weights."""
    selection, thresholds = sae.selection, sae.thresholds.cpu()
    shared = bool((thresholds == thresholds[0]).all())
    if isinstance(selection, JumpReLU) or (not shared and sae.inference == "threshold"):
        return "JumpReluAutoEncoder", {"threshold": thresholds.clamp(min=0)}
    k = selection.k
    if k != int(k):
        raise InvalidInput(f"dictionary_learning has whole numbers k, got {selection}")
    extra = {"k": torch.tensor(int(k), dtype=torch.int), "threshold": thresholds[0].clone()}
    if isinstance(selection, TopK):
        return "AutoEncoderTopK", extra
    if len(sae.groups) > 1:
        sizes = torch.tensor(sae.groups).diff(prepend=torch.zeros(1, dtype=torch.int64))
        return "MatryoshkaBatchTopKSAE", extra | {"group_sizes": sizes}
    return "BatchTopKSAE", extra
