"""Writes the numbers of SAELens on which our known answers are tested; in SAELens' environment.

    python benchmarks/peers/peer_saelens_known.py tests/sae/saelens_known

known.safetensors has the parameters that a small synthetic model draws, a batch of it, and an
autoencoder with its latents; known.json its configuration and what SAELens measures on the batch.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic import evals
from sae_synthetic import published
from safetensors.torch import save_file

SMALL = {
    "num_features": 200,
    "hidden_dim": 24,
    "roots": 4,
    "branching": 3,
    "depth": 2,
    "rank": 6,
    "correlation": 0.45,
    "steps": 20,
    "lr": 0.01,
}
ROWS, LATENTS = 120, 48


def main(folder: Path) -> None:
    model = published(**SMALL)
    draws = model.activation_generator
    torch.manual_seed(0)
    x, truth = model.sample_with_features(ROWS)
    decoder, latents, rebuilt = autoencoder(model, x)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "directions": model.feature_dict.feature_vectors.data,
        "bias": model.feature_dict.bias.data,
        "probabilities": draws.firing_probabilities,
        "means": draws.mean_firing_magnitudes,
        "deviations": draws.std_firing_magnitudes,
        "factor": model.correlation_matrix.correlation_factor,
        "diagonal": model.correlation_matrix.correlation_diag,
        "x": x,
        "truth": truth,
        "decoder": decoder,
        "latents": latents,
        "rebuilt": rebuilt,
    }
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "known.safetensors"
    )
    result = {
        "sae-lens": metadata.version("sae-lens"),
        "torch": metadata.version("torch"),
        "config": SMALL,
        "scores": measure(
            decoder, latents, rebuilt, x, truth, model.feature_dict.feature_vectors.data
        ),
    }
    (folder / "known.json").write_text(json.dumps(result, indent=1) + "\n")


def autoencoder(model, x):
    """A poor one: noisy, doubled and random directions, some latents that never fire."""
    true = model.feature_dict.feature_vectors.data
    decoder = true[:LATENTS] + 0.08 * torch.randn(LATENTS, true.shape[1])
    decoder[40:44] = true[:4] + 0.02 * torch.randn(4, true.shape[1])
    decoder[44:] = torch.randn(4, true.shape[1])
    decoder /= decoder.norm(dim=1, keepdim=True)
    scores = (x - model.feature_dict.bias.data) @ decoder.T
    kept = scores.topk(6, dim=1)
    latents = torch.zeros_like(scores).scatter(1, kept.indices, kept.values.relu())
    latents[:, 5] = 0
    return decoder, latents, latents @ decoder + model.feature_dict.bias.data


def measure(decoder, latents, rebuilt, x, truth, directions):
    detection = evals.ClassificationMetricsCalculator(decoder, directions)
    l0, true_l0 = evals.L0Calculator(), evals.L0Calculator()
    dead = evals.DeadLatentsCalculator(len(decoder))
    shrinkage, explained = evals.ShrinkageCalculator(), ExplainedVarianceCalculator()
    for part in torch.arange(len(x)).split(50):
        detection.add_batch(latents[part], truth[part])
        l0.add_batch(latents[part])
        true_l0.add_batch(truth[part])
        dead.add_batch(latents[part])
        shrinkage.add_batch(rebuilt[part], x[part])
        explained.add_batch(rebuilt[part], x[part])
    found = detection.compute()
    return {
        "f1": found.f1_score,
        "precision": found.precision,
        "recall": found.recall,
        "accuracy": found.accuracy,
        "mcc": evals.mean_correlation_coefficient(decoder, directions),
        "uniqueness": evals.feature_uniqueness(decoder, directions),
        "explained_variance": explained.compute(),
        "shrinkage": shrinkage.compute(),
        "l0": l0.compute(),
        "true_l0": true_l0.compute(),
        "dead": dead.compute(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
