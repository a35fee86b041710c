"""Autoencoders of sparsify: writes the files of our tests, in its environment.

python benchmarks/peers/sae_sparsify.py write tests/sae/data/sparsify
"""

import os
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder for CPUs

import torch  # noqa: E402
from sae_common import D_IN, D_SAE, K, keep, main, rows, scramble  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

KINDS = {
    "topk": (SparseCoderConfig(num_latents=D_SAE, k=K), None),
    "bfloat16": (SparseCoderConfig(num_latents=D_SAE, k=K), torch.bfloat16),
    "expansion": (SparseCoderConfig(expansion_factor=3, k=K, normalize_decoder=False), None),
}


def write(folder: Path) -> None:
    for name, (config, dtype) in KINDS.items():
        sae = SparseCoder(D_IN, config, dtype=dtype)
        scramble(sae)
        sae.save_to_disk(folder / name)
        x = (1.3 * rows()).to(sae.dtype)  # without ties in bfloat16, which any order may win
        loaded = SparseCoder.load_from_disk(folder / name)
        with torch.no_grad():
            values, places, _ = loaded.encode(x)
            codes = torch.zeros(len(x), D_SAE, dtype=x.dtype).scatter(1, places, values)
            keep(folder / name, x, codes, loaded.decode(values, places))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(write)
