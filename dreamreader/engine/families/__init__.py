"""What a model does not say by itself: head split, streams, places of tokens.

One file per family.
`attention(module)` asks each family in turn. A new family is a new file and a line in `_FAMILIES`.
"""

from torch import nn

from dreamreader.engine.families import decoders, diffusers_attention, gpt2, neox, t5
from dreamreader.engine.taps import AttentionFacts

_FAMILIES = (diffusers_attention, gpt2, neox, t5, decoders)


def attention(module: nn.Module) -> AttentionFacts | None:
    """Facts of an attention module of any known family; None where `module` is no attention."""
    for family in _FAMILIES:
        facts = family.attention(module)
        if facts is not None:
            return facts
    return None
