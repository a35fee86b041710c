"""Autoencoders of dictionary_learning: writes files of our tests, and checks that it reads ours.

python benchmarks/peers/sae_dictionary_learning.py write tests/sae/data/dictionary_learning
python benchmarks/peers/sae_dictionary_learning.py check FOLDER   # of sae_written.py
"""

import json
from pathlib import Path

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from sae_common import D_IN, D_SAE, EPS, K, keep, keep_training, main, rows, scramble, seeded

CLASSES = {
    each.__name__: each
    for each in (
        *(AutoEncoder, AutoEncoderNew, JumpReluAutoEncoder, AutoEncoderTopK),
        *(BatchTopKSAE, MatryoshkaBatchTopKSAE),
    )
}
ARGUMENTS = {
    "AutoEncoderTopK": {"k": K},
    "BatchTopKSAE": {"k": K},
    "MatryoshkaBatchTopKSAE": {"k": K, "group_sizes": [6, 6, 12]},
}


def write(folder: Path) -> None:
    for name, kind in CLASSES.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        sae = kind(D_IN, D_SAE, **ARGUMENTS.get(name, {}))
        scramble(sae)
        if name == "JumpReluAutoEncoder":
            sae.threshold.data = 0.2 + 0.2 * seeded(D_SAE, seed=7).abs()
        elif hasattr(sae, "threshold"):
            sae.threshold.fill_(0.45)
        torch.save(sae.state_dict(), own / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE}
        (own / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
        with torch.no_grad():
            keep(own, rows(), sae.encode(rows()), sae.decode(sae.encode(rows())))

    write_trainings(folder.parent / "trained")


def write_trainings(folder: Path) -> None:
    """Twelve steps of each trainer at a constant rate; latents are dead after 40 idle rows."""
    batches = torch.stack([rows() + 0.5 * seeded(*rows().shape, seed=n) for n in range(12)])
    common = {"steps": 100, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 0}
    common |= {"lm_name": "none", "lr": 0.01, "warmup_steps": 0, "threshold_start_step": 4}
    common |= {"seed": 0, "device": "cpu"}
    fractions = {"group_fractions": [0.25, 0.25, 0.5]}
    for name, kind, options in (
        ("topk", TopKTrainer, {}),
        ("batchtopk", BatchTopKTrainer, {}),
        ("matryoshka", MatryoshkaBatchTopKTrainer, fractions),
    ):
        trainer = kind(**common, **options)
        trainer.dead_feature_threshold = 40
        trainer.optimizer.param_groups[0]["eps"] = EPS
        start = weights_of(trainer.ae)
        losses = [trainer.update(step, x) for step, x in enumerate(batches)]
        end, threshold = weights_of(trainer.ae), float(trainer.ae.threshold)
        file = folder / f"dictionary_learning-{name}.safetensors"
        keep_training(file, batches, start, end, losses, threshold)


def weights_of(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By our names."""
    own = {name: each.detach().clone() for name, each in sae.named_parameters()}
    if "encoder.weight" in own:
        own["W_enc"], own["W_dec"] = own.pop("encoder.weight").T, own.pop("decoder.weight").T
        own["b_enc"] = own.pop("encoder.bias")
    return own


def read(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    sae = CLASSES[trainer["dict_class"]].from_pretrained(str(folder / "ae.pt"))
    with torch.no_grad():
        codes = sae.encode(x)
        return codes, sae.decode(codes)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(write, read)
