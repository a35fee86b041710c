"""Adapters of PEFT, such as LoRA, merged into the weights of the model they were made for."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamreader.errors import InvalidInput, first_line

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"  # what PEFT writes beside a language model's adapter


def merge_adapter(model: Any, adapter: str | Path) -> Any:
    """The model with the adapter's changes in its own weights: W <- W + scale B A.

    Sites and their names stay those of the plain model. Weights keep their dtype, in which the sum
    is rounded once.

    Args:
        model: a language model of transformers, or a pipeline of diffusers.
        adapter: what PEFT saved for a language model (a folder with adapter_config.json), or LoRA
            weights of a pipeline (a folder or a .safetensors file).

    Raises:
        InvalidInput: peft is not installed, nothing is there, or it belongs to another model.
    """
    path = Path(adapter).expanduser()
    if not path.exists():
        raise InvalidInput(f"adapter: {path} does not exist")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InvalidInput(f"adapter: needs the package peft: pip install peft ({error})") from None
    if hasattr(model, "components"):
        return _merge_into_pipeline(model, path)
    return _merge_into_language_model(model, path)


def _merge_into_language_model(model: "torch.nn.Module", folder: Path) -> "torch.nn.Module":
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    if not (folder / CONFIG).is_file():
        raise InvalidInput(f"adapter: {folder} has no {CONFIG}, which PEFT writes")
    try:
        kind = PeftConfig.from_pretrained(str(folder))
        tokens_alone = kind.is_prompt_learning
        stored = set() if tokens_alone else set(load_peft_weights(str(folder), device="cpu"))
    except Exception as error:  # whatever PEFT says of a broken file
        raise InvalidInput(f"adapter: {folder}: no adapter of PEFT: {first_line(error)}") from error
    if tokens_alone:
        raise InvalidInput(
            f"adapter: {folder}: {kind.peft_type} adds tokens and changes no weights, so it cannot "
            "be merged; give the model with it to dreamreader.Reader"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys, which are compared below, and of transformers
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except Exception as error:  # whatever PEFT says of shapes and targets
            raise _foreign(folder, model, _cause(error)) from error
        if strange := sorted(stored ^ set(get_peft_model_state_dict(adapted))):
            where = "the adapter" if strange[0] in stored else "the model"
            raise _foreign(folder, model, f"{strange[0]} is of {where} alone")
        try:
            return adapted.merge_and_unload(safe_merge=True).eval()
        except Exception as error:  # adapters that hold NaN, or cannot be merged
            raise InvalidInput(f"adapter: {folder}: {first_line(error)}") from error


def _merge_into_pipeline(pipe: Any, path: Path) -> Any:
    if not hasattr(pipe, "load_lora_weights"):
        raise InvalidInput(f"adapter: {type(pipe).__name__} takes no LoRA weights")
    try:
        stored = _count_stored(pipe, path)
        pipe.load_lora_weights(str(path))
        if (held := _count_held(pipe)) != stored:
            raise ValueError(
                f"it has {stored} tensors, and {held} have a place in the pipeline: some are of "
                "another model, or lack their partner"
            )
        pipe.fuse_lora(safe_fusing=True)
        pipe.unload_lora_weights()
    except Exception as error:  # whatever diffusers and PEFT say of files, keys and shapes
        raise _foreign(path, pipe, first_line(error)) from error
    return pipe


def _count_stored(pipe: Any, path: Path) -> int:
    """Tensors of a file of LoRA weights, without their scales."""
    found = pipe.lora_state_dict(str(path))
    state = found[0] if isinstance(found, tuple) else found
    return sum(not name.endswith(".alpha") for name in state)


def _count_held(pipe: Any) -> int:
    """Tensors of adapters in all parts of a pipeline, where those that a file lacks are made up."""
    from peft import get_peft_model_state_dict

    parts = [each for each in pipe.components.values() if getattr(each, "peft_config", None)]
    return sum(
        len(get_peft_model_state_dict(each, adapter_name=name))
        for each in parts
        for name in each.peft_config
    )


def _cause(error: Exception) -> str:
    """The first line that says something: torch begins a list of weights with a heading."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(":")), first_line(error))


def _foreign(path: Path, model: Any, why: str) -> InvalidInput:
    return InvalidInput(f"adapter: {path} does not fit this {type(model).__name__}: {why}")
