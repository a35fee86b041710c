"""Blocks that return two streams: which entry of the tuple holds image tokens, which text."""

from torch import nn

from dreamreader.engine._families.classes import entry_of

# Beside what diffusers itself registers for its step caches.
_MORE = {"AuraFlowJointTransformerBlock": {"image": 1, "text": 0}}
_ARGUMENTS = {"image": "hidden_states", "text": "encoder_hidden_states"}


def streams(module: nn.Module) -> dict[str, int]:
    """Entry of the module's result per stream; empty where it returns one stream."""
    known = entry_of(type(module), _MORE, "forward")
    if known is not None:
        return known
    if not type(module).__module__.startswith("diffusers."):
        return {}
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        metadata = TransformerBlockRegistry.get(type(module))
    except (ImportError, ValueError):  # not a registered block, or a diffusers without the register
        return {}
    image, text = metadata.return_hidden_states_index, metadata.return_encoder_hidden_states_index
    return {} if image is None or text is None else {"image": image, "text": text}


def argument(stream: str) -> str:
    """Name of the argument that carries a stream into a block or a joint attention."""
    return _ARGUMENTS[stream]
