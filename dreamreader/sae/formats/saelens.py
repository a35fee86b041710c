"""SAELens: `cfg.json` and `sae_weights.safetensors`, from version 6 on and before.

Reference:
    `SAE.save_model`, `SAE.load_from_disk` and `handle_pre_6_0_config` of SAELens 6.54.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sae.fold import fold
from dreamreader.sae.formats.files import (
    DTYPES,
    assemble,
    check_keys,
    check_tensors,
    option,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from dreamreader.sae.model import SparseAutoencoder
from dreamreader.sae.selection import BatchTopK, JumpReLU, Selection, TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # whose files are written

ARCHITECTURES = ("standard", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk")
_NORMALISE = {
    "none": "none",
    "expected_average_only_in": "average_norm",
    "constant_norm_rescale": "constant_norm",
    "layer_norm": "layer_norm",
}
_BASE = (
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input"),
    *("normalize_activations", "reshape_activations", "metadata"),
)
_MORE: dict[str, tuple[str, ...]] = {
    "topk": ("k", "rescale_acts_by_decoder_norm", "use_sparse_activations"),
    "batchtopk": ("k", "rescale_acts_by_decoder_norm", "use_sparse_activations"),
}
_MORE["matryoshka_batchtopk"] = (*_MORE["batchtopk"], "matryoshka_widths")
_TRAINING = (  # of no weight in what is computed
    *("decoder_init_norm", "aux_loss_coefficient", "topk_threshold_lr", "l1_coefficient"),
    *("use_matryoshka_aux_loss", "lp_norm", "l1_warm_up_steps", "l0_coefficient", "target_l0"),
    *("l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_init_threshold"),
    *("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
    "jumprelu_ste_to_input",
)


def matches(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def read(path: Path, *, input_scale: float | None = None) -> SparseAutoencoder:
    """Reads a folder of SAELens.

    Args:
        input_scale: what inputs were multiplied with, where the configuration says
            `expected_average_only_in`, as the file does not hold it.

    Raises:
        FileNotFoundError: a file is missing.
        InvalidInput, UnknownName: another architecture or version, or keys or shapes that do not
            fit.
    """
    file = path / CONFIG
    config, version = _upgrade_config(file, read_json(file))
    kind = config.get("architecture", "standard")
    if kind not in ARCHITECTURES:
        raise UnknownName(f"architecture in {file}", str(kind), ARCHITECTURES)
    if version is not None:
        check_keys(file, config, (*_BASE, *_MORE.get(kind, ()), *_TRAINING))
    tensors = _weights(path / WEIGHTS, kind, config)
    normalise = config.get("normalize_activations") or "none"
    if normalise not in _NORMALISE:
        raise UnknownName(f"normalize_activations in {file}", str(normalise), _NORMALISE)
    if (normalise == "expected_average_only_in") != (input_scale is not None):
        raise InvalidInput(
            f"{file}: normalize_activations={normalise!r}: "
            + (
                "give input_scale=, by which inputs are multiplied; the file does not hold it"
                if input_scale is None
                else "inputs are not multiplied, so input_scale= has no meaning"
            )
        )
    selection, options = _selection(file, kind, config)
    threshold = tensors.pop("threshold", tensors.pop("topk_threshold", None))
    if threshold is not None and kind != "jumprelu" and not bool(threshold > 0):
        threshold = None  # none yet
    name = option(file, config, "dtype", str, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UnknownName(f"dtype in {file}", name, DTYPES)
    made = assemble(
        path / WEIGHTS,
        {each: value.to(DTYPES[name]) for each, value in tensors.items()},
        selection,
        threshold,
        dtype=DTYPES[name],
        sizes={"d_in": config.get("d_in"), "d_sae": config.get("d_sae")},
        apply_b_dec_to_input=option(file, config, "apply_b_dec_to_input", bool, True),
        normalise=_NORMALISE[normalise],
        reshape=option(file, config, "reshape_activations", str, "none"),
        threshold_rule="saelens",
        aux="saelens",
        unit_decoder=False,
        metadata=config.get("metadata") or {},
        **options,
    )
    if input_scale is not None:
        made.input_scale.fill_(input_scale)
    return made


def write(sae: SparseAutoencoder, path: Path) -> None:
    """Writes a folder that SAELens reads: `jumprelu` with the thresholds, or `topk` for TopK.

    Decoder norms and scales of inputs are folded into the weights.

    Raises:
        InvalidInput: there is no threshold yet, or a file cannot be written.
    """
    plain = fold(sae)
    tensors = {name: getattr(plain, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    config: dict[str, Any] = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": {own: name for name, own in _NORMALISE.items()}[plain.normalise],
        "reshape_activations": sae.reshape,
        "metadata": {**sae.metadata, "sae_lens_version": VERSION},
    }
    if isinstance(sae.selection, TopK) and sae.inference == "selection":
        config |= {"architecture": "topk", "k": sae.selection.k}
        config |= {"rescale_acts_by_decoder_norm": False}
    else:
        threshold = sae.threshold
        if threshold is None:
            raise InvalidInput(
                "SAELens keeps what is above a threshold, and this autoencoder has none yet: train "
                "it longer than its threshold rule waits, or set sae.threshold"
            )
        tensors["threshold"] = threshold
    write_safetensors(path / WEIGHTS, tensors)
    write_json(path / CONFIG, config)


def _upgrade_config(file: Path, config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The configuration as version 6 writes it, and its version; None before 6."""
    metadata = config.get("metadata")
    inner = metadata if isinstance(metadata, Mapping) else {}
    version = config.get("sae_lens_version") or inner.get("sae_lens_version")
    if version is not None:
        major = re.match(r"(\d+)\.", str(version))
        if major is None or int(major[1]) > 6:
            raise InvalidInput(f"{file} is of SAELens {version}; versions up to 6 are read")
        if int(major[1]) == 6:
            return {name: each for name, each in config.items() if name != "sae_lens_version"}, (
                str(version)
            )
    return _rename_before_6(file, config), None


def _rename_before_6(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Names of before 6: `hook_point`, `activation_fn_str`, a boolean for the normalisation."""
    found = dict(config)
    for old, new in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if old in found:
            found.setdefault(new, found.pop(old))
    activation = found.get("activation_fn", "relu")
    keywords = found.get("activation_fn_kwargs") or {}
    if activation == "topk":
        found["architecture"], found["k"] = "topk", keywords.get("k", found.get("k"))
    elif activation != "relu":
        raise UnknownName(f"activation_fn in {file}", str(activation), ("relu", "topk"))
    if isinstance(found.get("normalize_activations"), bool):
        scaled = found["normalize_activations"]
        found["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    hook = str(found.get("hook_name") or "")
    found.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    known = ("hook_name", "hook_layer", "hook_head_index", "model_name", "context_size")
    found["metadata"] = {name: found[name] for name in known if name in found}
    return found


def _weights(file: Path, kind: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of such an architecture; a scaling factor of before 6 goes into the decoder."""
    tensors = read_safetensors(file)
    needed = ["W_enc", "W_dec", "b_enc", "b_dec"]
    needed += ["threshold"] if kind == "jumprelu" else []
    needed += ["topk_threshold"] if "batchtopk" in kind else []
    check_tensors(file, tensors, needed, ("scaling_factor",))
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        if not config.get("finetuning_scaling_factor"):
            raise InvalidInput(
                f"{file} has a scaling_factor, and {CONFIG} does not say finetuning_scaling_factor"
            )
        if factor.shape != tensors["b_enc"].shape:
            raise InvalidInput(f"{file}: scaling_factor is {list(factor.shape)}, not one a latent")
        tensors["W_dec"] = tensors["W_dec"] * factor.unsqueeze(1)
    return tensors


def _selection(
    file: Path, kind: str, config: Mapping[str, Any]
) -> tuple[Selection, dict[str, Any]]:
    if kind in ("standard", "jumprelu"):
        return JumpReLU(), {}
    k = option(file, config, "k", (int, float))
    trained = kind != "topk"
    options: dict[str, Any] = {
        "rescale": option(file, config, "rescale_acts_by_decoder_norm", bool, trained)
    }
    if kind == "matryoshka_batchtopk":
        options["groups"] = option(file, config, "matryoshka_widths", list)
    return (BatchTopK(k) if trained else TopK(k)), options
