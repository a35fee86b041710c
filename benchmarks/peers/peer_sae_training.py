"""Times training steps of one library beside ours, in one process; see benchmarks/sae_training.py.

Reads a job as JSON from stdin, and prints a report as JSON.
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from paired import interleaved  # noqa: E402
from sae_steps import PEERS, Case  # noqa: E402
from torch import Tensor  # noqa: E402

CHECKED = 4  # steps in which the losses have to go the same way
PACKAGES = {
    "dictionary_learning": "dictionary-learning",
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
}


def batches(case: Case, tokens: int, count: int) -> list[Tensor]:
    """Rows of few directions each, as activations of a trained model have them."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2 * case.d_in, case.d_in, generator=g))
    found = []
    for _ in range(count):
        active = torch.rand(tokens, len(directions), generator=g) < 16 / len(directions)
        size = torch.rand(tokens, len(directions), generator=g) + 0.5
        found.append(((active * size) @ directions).to(case.dtype))
    return found


def measure(peer: str, case: Case, tokens: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    theirs, ours = PEERS[peer](case)
    x = batches(case, tokens, CHECKED)
    losses = {"peer": [theirs(each) for each in x], "dreamreader": [ours(each) for each in x]}
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-3
    apart = [abs(a / b - 1) for a, b in zip(*losses.values(), strict=True)]
    row = {
        "peer": peer,
        "d_in": case.d_in,
        "d_sae": case.d_sae,
        "k": case.k,
        "tokens": tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "losses": losses,
    }
    if max(apart) > tolerance:
        return row | {"problem": f"losses of {peer} and ours differ by {max(apart):.1e}"}
    calls = {"dreamreader": lambda: ours(x[0]), "peer": lambda: theirs(x[0])}
    times, left_out = interleaved(calls, rounds)
    return row | {"times": times, "left_out": left_out}


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    rows = [
        measure(
            job["peer"],
            Case(each["d_in"], each["d_sae"], each["k"], getattr(torch, each["dtype"])),
            each["tokens"],
            job["rounds"],
        )
        for each in job["cases"]
    ]
    version = metadata.version(PACKAGES[job["peer"]])
    print(json.dumps({"version": version, "rows": rows}))


if __name__ == "__main__":
    main()
