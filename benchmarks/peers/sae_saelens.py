"""Autoencoders of SAELens: writes the files of our tests, and checks that it reads ours.

python benchmarks/peers/sae_saelens.py write tests/sae/data/saelens
python benchmarks/peers/sae_saelens.py check FOLDER   # of sae_written.py FOLDER saelens
"""

import json
from pathlib import Path

import torch
from sae_common import D_IN, D_SAE, EPS, K, keep, keep_training, main, rows, scramble, seeded
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

SIZES = {"d_in": D_IN, "d_sae": D_SAE}
INFERENCE = {
    "standard": (StandardSAE, StandardSAEConfig(**SIZES)),
    "topk": (TopKSAE, TopKSAEConfig(**SIZES, k=K)),
    "topk-rescaled": (TopKSAE, TopKSAEConfig(**SIZES, k=K, rescale_acts_by_decoder_norm=True)),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig(**SIZES, apply_b_dec_to_input=False)),
    "layer-norm": (JumpReLUSAE, JumpReLUSAEConfig(**SIZES, normalize_activations="layer_norm")),
    "constant-norm": (
        JumpReLUSAE,
        JumpReLUSAEConfig(**SIZES, normalize_activations="constant_norm_rescale"),
    ),
    "bfloat16": (JumpReLUSAE, JumpReLUSAEConfig(**SIZES, dtype="bfloat16")),
    "hook-z": (JumpReLUSAE, JumpReLUSAEConfig(**SIZES, reshape_activations="hook_z")),
}
TRAINED = {
    "trained-topk": (TopKTrainingSAE, TopKTrainingSAEConfig(**SIZES, k=K)),
    "trained-batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig(**SIZES, k=K)),
    "trained-matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig(**SIZES, k=K, matryoshka_widths=[6, 12, D_SAE]),
    ),
}
FACTOR = 1.7  # of the normalisation that is folded in


def write(folder: Path) -> None:
    for name, (kind, config) in INFERENCE.items():
        sae = kind(config)
        scramble(sae)
        if hasattr(sae, "threshold"):
            sae.threshold.data = (0.2 + 0.2 * seeded(D_SAE, seed=7).abs()).to(sae.dtype)
        sae.save_model(folder / name)
        x = rows().to(sae.dtype)
        x = x.reshape(-1, 2, D_IN // 2) if name == "hook-z" else x
        loaded = SAE.load_from_disk(folder / name)
        keep(folder / name, x, loaded.encode(x), loaded(x))
    for name, (kind, config) in TRAINED.items():
        sae = kind(config)
        scramble(sae)
        for number in range(300):
            x = rows() * (1 + 0.1 * seeded(1, seed=number))
            sae.training_forward_pass(TrainStepInput(x, {}, None, number, False))
        if name != "trained-topk":
            sae.fold_activation_norm_scaling_factor(FACTOR)
        sae.save_inference_model(folder / name)
        loaded = SAE.load_from_disk(folder / name)
        x = rows() / (FACTOR if name != "trained-topk" else 1)
        keep(folder / name, x, loaded.encode(x), loaded(x))
        if name == "trained-batchtopk":  # as it stands in a checkpoint, on the same scaled inputs
            sae.save_model(folder / "checkpoint")
            keep(folder / "checkpoint", x, loaded.encode(x), loaded(x))
    write_before_6(folder)
    write_trainings(folder.parent / "trained")


def write_trainings(folder: Path) -> None:
    """Twelve steps of each at a constant rate, as `SAETrainer` makes them; dead after 3 idle."""
    batches = torch.stack([rows() + 0.5 * seeded(*rows().shape, seed=n) for n in range(12)])
    for name, (kind, config) in TRAINED.items():
        torch.manual_seed(0)
        sae = kind(config)
        optimiser = torch.optim.Adam(sae.parameters(), lr=0.01, eps=EPS)
        start = {key: each.detach().clone() for key, each in sae.named_parameters()}
        idle, losses = torch.zeros(D_SAE), []
        for number, x in enumerate(batches):
            found = sae.training_forward_pass(TrainStepInput(x, {}, idle > 3, number, False))
            idle = torch.where((found.feature_acts > 0).any(0), 0, idle + 1)
            losses.append(found.loss.item())
            optimiser.zero_grad()
            found.loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimiser.step()
        end = {key: each.detach() for key, each in sae.named_parameters()}
        threshold = float(getattr(sae, "topk_threshold", -1.0))
        short = name.removeprefix("trained-")
        file = folder / f"saelens-{short}.safetensors"
        keep_training(file, batches, start, end, losses, threshold)


def write_before_6(folder: Path) -> None:
    """The same weights as `topk` and `standard`, with configurations as versions 3 to 5 wrote."""
    common = {**SIZES, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small"}
    common |= {"context_size": 128, "normalize_activations": "none", "prepend_bos": True}
    for name, config in {
        "topk": {
            "hook_point": "blocks.8.hook_resid_pre",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": K},
        },
        "standard": {
            "hook_name": "blocks.8.hook_resid_pre",
            "activation_fn_str": "relu",
            "architecture": "standard",
            "sae_lens_training_version": "3.2.3",
        },
    }.items():
        old = folder / f"before-6-{name}"
        old.mkdir(exist_ok=True)
        weights = (folder / name / "sae_weights.safetensors").read_bytes()
        (old / "sae_weights.safetensors").write_bytes(weights)
        (old / "cfg.json").write_text(json.dumps(common | config))
        loaded = SAE.load_from_disk(old)
        keep(old, rows(), loaded.encode(rows()), loaded(rows()))


def read(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loaded = SAE.load_from_disk(folder)
    with torch.no_grad():
        return loaded.encode(x), loaded(x)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(write, read)
