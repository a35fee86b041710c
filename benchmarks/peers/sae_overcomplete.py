"""Autoencoders of overcomplete: writes the files of our tests, in its environment.

    python benchmarks/peers/sae_overcomplete.py write tests/sae/data/overcomplete

`torch.save(sae)`, as its training does, runs code when it is read; the state_dict does not.
"""

import json
import sys
import types
from pathlib import Path

# pictures of concepts, for which much would have to be installed
pictures = types.ModuleType("overcomplete.visualization")
pictures.__getattr__ = lambda name: None  # type: ignore[method-assign]
sys.modules["overcomplete.visualization"] = pictures

import torch  # noqa: E402
from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE  # noqa: E402
from sae_common import D_IN, D_SAE, ROWS, K, keep, main, rows, scramble  # noqa: E402

KINDS = {
    "sae": (SAE, {}),
    "topk": (TopKSAE, {"top_k": K}),
    "batchtopk": (BatchTopKSAE, {"top_k": K * ROWS}),
    "jump": (JumpSAE, {}),
    "multiplier": (
        TopKSAE,
        {"top_k": K, "dictionary_params": {"use_multiplier": True, "normalization": "max_l2"}},
    ),
}


def write(folder: Path) -> None:
    for name, (kind, options) in KINDS.items():
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        sae = kind(D_IN, D_SAE, **options)
        scramble(sae)
        if name == "jump":
            sae.thresholds.data += 2
        given = {} if name in ("sae", "jump") else {"k": K}
        with torch.no_grad():
            sae(rows())  # gives a BatchTopKSAE its threshold
            torch.save(sae.state_dict(), own / "sae.pt")
            sae.eval()
            if name == "batchtopk":
                given["threshold"] = sae.running_threshold.item()
            if name == "multiplier":
                given["normalization"] = "max_l2"
            (own / "options.json").write_text(json.dumps(given))
            _, codes = sae.encode(rows())
            keep(own, rows(), codes, sae.decode(codes))
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")  # a whole module, as train_sae saves


if __name__ == "__main__":
    torch.manual_seed(0)
    main(write)
