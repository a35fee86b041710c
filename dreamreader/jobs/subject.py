"""What a subject is: its weights, and beside them all that decides what it computes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dreamreader._hashing import class_of, hash_tensors, tensors_of
from dreamreader.errors import InvalidInput

# Of a configuration: where it came from, not what it says.
_ORIGIN = ("transformers_version", "name_or_path", "original_name_or_path")


def hash_weights(subject: Any) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter and buffer of a subject.

    Args:
        subject: a module, or a pipeline whose `components` hold modules. Buffers that are not
            saved with a model count too: what they hold was computed from its configuration.

    Returns:
        64 hexadecimal digits, the same wherever the weights lie.

    Raises:
        InvalidInput: when there is no module in the subject.
    """
    digest = hashlib.sha256()
    for name, part in _modules(subject):
        own = {f"{name}.{key}": tensor for key, tensor in tensors_of(part).items()}
        hash_tensors(own, digest)
    return digest.hexdigest()


def describe_subject(subject: Any, tokenizer: Any = None) -> dict[str, str]:
    """SHA-256 of what a subject computes with its weights, part by part.

    Args:
        subject: a module or a pipeline. tokenizer: that a language model is used with.

    Returns:
        `modules`: class and own settings (such as the epsilon of a norm) of every module;
        `configuration`: of every part that has one, a scheduler among them; `tokenizer`.

    Raises:
        InvalidInput: when there is no module in the subject.
    """
    modules = [
        f"{name}.{inner}: {class_of(module)}({module.extra_repr()})"
        for name, part in _modules(subject)
        for inner, module in part.named_modules(remove_duplicate=False)
    ]
    parts = _parts(subject)
    told = {name: [class_of(part), _configuration(part)] for name, part in sorted(parts.items())}
    readers = {name: part for name, part in parts.items() if hasattr(part, "get_vocab")}
    if tokenizer is not None:
        readers["tokenizer"] = tokenizer
    return {
        "modules": _digest([class_of(subject), *modules]),
        "configuration": _digest(told),
        "tokenizer": _digest({name: _tokenizer(each) for name, each in sorted(readers.items())}),
    }


def _parts(subject: Any) -> dict[str, Any]:
    """The subject, or the components of a pipeline."""
    if isinstance(subject, nn.Module):
        return {"": subject}
    return {k: v for k, v in getattr(subject, "components", {}).items() if v is not None}


def _modules(subject: Any) -> Iterator[tuple[str, nn.Module]]:
    found = [(k, v) for k, v in sorted(_parts(subject).items()) if isinstance(v, nn.Module)]
    if not found:
        raise InvalidInput(f"hash_weights: {type(subject).__name__} holds no module")
    yield from found


def _configuration(part: Any) -> Any:
    """Plain values of the configurations of a part: its own, and that of `generate`."""
    found = []
    for name in ("config", "generation_config"):
        config = getattr(part, name, None)
        content = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
        if isinstance(content, Mapping):
            found.append(_without_origin(content))
    # transformers leaves it out of what a configuration writes
    found.append(getattr(getattr(part, "config", None), "_attn_implementation", None))
    if not isinstance(part, nn.Module) and not hasattr(part, "config") and hasattr(part, "to_dict"):
        found.append(_without_origin(part.to_dict()))  # a processor of pictures
    return found


def _without_origin(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {
            str(key): _without_origin(value)
            for key, value in content.items()
            if not str(key).startswith("_") and str(key) not in _ORIGIN
        }
    if isinstance(content, list | tuple):
        return [_without_origin(each) for each in content]
    return content


def _tokenizer(tokenizer: Any) -> Any:
    """What decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = [sorted(tokenizer.get_vocab().items()), _settings_of(tokenizer)]
    else:
        content = json.loads(backend.to_str())
        content = {k: v for k, v in content.items() if k not in ("truncation", "padding")}
    names = ("padding_side", "truncation_side", "model_max_length", "chat_template")
    own = [getattr(tokenizer, name, None) for name in names]
    return [class_of(tokenizer), content, own, getattr(tokenizer, "special_tokens_map", None)]


def _settings_of(tokenizer: Any) -> Any:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    given = getattr(tokenizer, "init_kwargs", {})
    return [{k: str(v) for k, v in added.items()}, _without_origin(given)]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=_describe_value)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe_value(value: Any) -> str:
    """A value that JSON has no form for; never with the address of an object."""
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    shown = repr(value)
    return class_of(value) if " at 0x" in shown else shown
