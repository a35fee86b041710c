"""Autoencoders of ours in the files of another library, with what we make of some inputs.

python benchmarks/peers/sae_written.py FOLDER saelens
python benchmarks/peers/sae_saelens.py check FOLDER    # in its environment
"""

import itertools
import sys
from pathlib import Path

from sae_common import D_IN, D_SAE, keep, rows, scramble

from dreamreader.sae import BatchTopK, JumpReLU, SampledTopK, SparseAutoencoder, TopK, write_sae

SELECTIONS = {
    "topk": TopK(3),
    "batchtopk": BatchTopK(3),
    "sampled": SampledTopK(3, l=2),
    "jumprelu": JumpReLU(),
}
OPTIONS = {
    "plain": {},
    "rescaled": {"rescale": True},
    "standardised": {"rescale": True, "normalise": "standardise"},
    "average-norm": {"normalise": "average_norm", "apply_b_dec_to_input": False},
    "layer-norm": {"normalise": "layer_norm"},
    "groups": {"groups": [6, 12]},
}


def main(folder: Path, format: str) -> None:
    for (name, selection), (which, options) in itertools.product(
        SELECTIONS.items(), OPTIONS.items()
    ):
        if which == "layer-norm" and format != "saelens":
            continue
        sae = SparseAutoencoder(D_IN, D_SAE, selection, **options)
        scramble(sae)
        if sae.normalise in ("standardise", "average_norm"):
            sae.fit_normalisation(rows())
        if name != "topk":
            sae.threshold = 0.45
        sae.eval()
        own = folder / f"{name}-{which}"
        write_sae(sae, own, format)
        keep(own, rows(), sae.encode(rows()), sae(rows()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
