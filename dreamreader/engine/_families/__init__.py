"""What a model does not say by itself: head split, streams, places of tokens.

One file per family. A family takes a module by its class, or by projections whose sizes agree with
what the module and its configuration state; what disagrees is refused with the numbers.
`attention_facts(module)` asks each family in turn. A new family is a new file and a line in `_FAMILIES`.

What the ports are, per family:

| family | q, k | v | heads |
| --- | --- | --- | --- |
| separate projections (Llama, Gemma, Qwen, Phi, OPT, BERT, CLIP, T5, ...) | results of the projections, before a norm and the rotation | result of the projection | input of the output projection; the result of a module that has none (BERT) |
| with a norm of v (Gemma3n, Gemma4) | the same | behind the norm | the same |
| with an output gate (Qwen3-Next, Afmoe, ...) | q without the gate | result of the projection | behind the gate |
| BitNet | the same | result of the projection | before the norm over all heads |
| one projection (GPT-2, NeoX, BLOOM, Falcon, MPT, Phi-3, CodeGen, ...) | their share of it, before a norm and the rotation | its share of it | input of the output projection |
| latent attention (DeepSeek) | q before the rotation; k without the features that all heads share | its share of kv_b_proj | input of the output projection |
| diffusers | results of the projections (their shares once these are fused), before a norm and the rotation | the same | input of the output projection, per stream where the streams have one each |

`probs` are what the model multiplies v with: without the column of an attention sink, before
dropout. Where v is changed between its projection and the attention, it is refused.
"""  # noqa: E501

from torch import nn

from dreamreader.engine._families import diffusers_attention, fused, latent, separate
from dreamreader.engine._families.sizes import PortsRefused
from dreamreader.engine._taps import AttentionFacts

_FAMILIES = (diffusers_attention, fused, latent, separate)


def attention_facts(module: nn.Module) -> AttentionFacts | None:
    """Facts of an attention module of any known family; None where `module` is no attention.

    Where its sizes contradict each other the facts have no ports, and `refused` says why.
    """
    if not module._modules:  # a layer: asked for thousands of times
        return None
    for family in _FAMILIES:
        try:
            facts = family.attention(module)
        except PortsRefused as reason:
            why = str(reason)
            return AttentionFacts({}, 0, no_probs=why, refused={"": why})
        if facts is not None:
            return facts
    return None
