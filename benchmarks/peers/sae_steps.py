"""A training step of a sparse autoencoder as other libraries make it, and ours from the same start.

Every pair begins with the same weights, sees the same batches, and has the same loss, optimiser,
clipping and constraints of the decoder. Imported in the environment of the peer.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.sae import AuxK, BatchTopK, SparseAutoencoder, TopK
from dreamreader.sae.optimizer import StridedAdam

LR = 3e-4
Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Case:
    """Widths, active latents of a row, and dtype of weights and batches."""

    d_in: int
    d_sae: int
    k: int
    dtype: torch.dtype


class Ours:
    """A step of our autoencoder, as `fit` makes it."""

    def __init__(self, case: Case, selection: Any, weights: dict[str, Tensor], **options: Any):
        self.sae = SparseAutoencoder(
            case.d_in, case.d_sae, selection, aux=AuxK(weight=0.0), **options
        )
        self.sae.set_tensors({name: each.float() for name, each in weights.items()})
        self.sae.to(case.dtype).train()
        self.optimizer = StridedAdam(self.sae.parameters(), lr=LR, fused=True)
        self.clip = 1.0

    def __call__(self, x: Tensor) -> float:
        result = self.sae.loss(x)
        result.total.backward()
        self.sae.before_step()
        nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.after_step(result)
        return float(result.mse)


def dictionary_learning(case: Case) -> tuple[Step, Step]:
    """Its BatchTopKTrainer, and ours by its rules."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(
        10**6, case.d_in, case.d_sae, case.k, 0, "", lr=LR, warmup_steps=0, seed=0, device="cpu"
    )
    trainer.ae.to(case.dtype)
    weights = {
        "W_enc": trainer.ae.encoder.weight.detach().T,
        "W_dec": trainer.ae.decoder.weight.detach().T,
    }
    ours = Ours(case, BatchTopK(case.k), weights)
    steps = 0

    def step(x: Tensor) -> float:
        nonlocal steps
        if steps == 0:  # it sets b_dec to the median of its first batch
            with torch.no_grad():
                ours.sae.b_dec.copy_(trainer.geometric_median(x))
        steps += 1
        return trainer.update(steps - 1, x)

    return step, ours


def saelens(case: Case) -> tuple[Step, Step]:
    """Its SAETrainer of a BatchTopKTrainingSAE, and ours by its rules."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = str(case.dtype).removeprefix("torch.")
    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=case.d_in, d_sae=case.d_sae, k=case.k, dtype=name, device="cpu"
        )
    )
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=4096,
        lr=LR,
        lr_end=LR,
        device="cpu",
    )
    trainer = SAETrainer(config, theirs, iter(()))
    weights = {key: getattr(theirs, key).detach() for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    ours = Ours(case, BatchTopK(case.k), weights, rescale=True, threshold_rule="saelens")

    def step(x: Tensor) -> float:
        found = trainer.step(x)
        trainer.n_training_steps += 1
        return float(found.losses["mse_loss"].detach())

    return step, ours


def sparsify(case: Case) -> tuple[Step, Step]:
    """Its SparseCoder with TopK in a plain loop with Adam, and ours."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes Triton for granted where it is installed
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    theirs = SparseCoder(
        case.d_in, SparseCoderConfig(num_latents=case.d_sae, k=case.k), dtype=case.dtype
    )
    optimizer = torch.optim.Adam(theirs.parameters(), lr=LR, fused=True)
    weights = {
        "W_enc": theirs.encoder.weight.detach().T,
        "b_enc": theirs.encoder.bias.detach(),
        "W_dec": theirs.W_dec.detach(),
    }
    ours = Ours(case, TopK(case.k), weights)

    def step(x: Tensor) -> float:
        out = theirs(x)
        error = (x - out.sae_out).float().square().sum(1).mean()
        error.backward()
        theirs.remove_gradient_parallel_to_decoder_directions()
        nn.utils.clip_grad_norm_(theirs.parameters(), ours.clip)
        optimizer.step()
        optimizer.zero_grad()
        theirs.set_decoder_norm_to_unit_norm()
        return float(error.detach())

    return step, ours


PEERS = {
    "dictionary_learning": dictionary_learning,
    "saelens": saelens,
    "sparsify": sparsify,
}
