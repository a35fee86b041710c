"""Writes the checkpoints of pyreft on which our loader is tested; in pyreft's environment.

    python benchmarks/peers/peer_pyreft_checkpoint.py tests/reft/pyreft

A folder for each kind, as `ReftModel.save` makes it, for a tiny Llama with random weights. Beside
it expected.safetensors: an input, and what every intervention makes of it, by its key.
"""

import sys
from pathlib import Path

import torch
from pyreft import (
    DireftIntervention,
    LoreftIntervention,
    NoreftIntervention,
    ReftConfig,
    ReftModel,
    get_reft_model,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, RANK = 16, 4
PLACES = ({"layer": 0, "component": "block_output"}, {"component": "model.layers[1].mlp.output"})
KINDS = {
    "loreft": (LoreftIntervention, {"dtype": torch.float32}),
    "loreft-bfloat16": (LoreftIntervention, {}),  # the default: W and b in bfloat16, R in float32
    "direft": (DireftIntervention, {"dtype": torch.float32}),
    "noreft": (NoreftIntervention, {"dtype": torch.float32, "add_bias": True}),
}


def main(folder: Path) -> None:
    for name, (kind, options) in KINDS.items():
        torch.manual_seed(0)
        model = adapted(kind, options)
        x = torch.randn(2, 3, WIDTH)
        if options.get("dtype") is None:
            x = x.bfloat16()
        for intervention in model.interventions.values():
            train(intervention, x)
        model.save(str(folder / name))
        outputs = {key: each(x).detach() for key, each in model.interventions.items()}
        save_file({"input": x, **outputs}, folder / name / "expected.safetensors")


def adapted(kind: type, options: dict) -> ReftModel:
    """A tiny Llama with an intervention at each of `PLACES`."""
    llama = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    places = [
        {
            **place,
            "low_rank_dimension": RANK,
            "intervention": kind(embed_dim=WIDTH, low_rank_dimension=RANK, **options),
        }
        for place in PLACES
    ]
    return get_reft_model(LlamaForCausalLM(llama), ReftConfig(representations=places))


def train(intervention: torch.nn.Module, x: Tensor) -> None:
    """A few steps towards other rows, so that nothing is left as it was made."""
    optimiser = torch.optim.SGD(intervention.parameters(), lr=0.1)
    for _ in range(10):
        optimiser.zero_grad()
        (intervention(x) - x.roll(1, 1)).float().square().mean().backward()
        optimiser.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
