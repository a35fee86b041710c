"""Batches of stored activations through the reader of SAELens; in its own environment.

Reads one line of JSON (see benchmarks/loader.py) and prints one: for each round its seconds and the
first number of every row that came, which says where the row was.
"""

import json
import sys
import time
import warnings
from importlib import metadata

import torch
from sae_lens.training.activations_store import ActivationsStore


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore", message="All samples in the training dataset")
    rounds = [read(job) for _ in range(job["rounds"] + 1)][1:]  # the first one warms up
    names = ("sae-lens", "datasets", "torch")
    report = {
        "versions": {name: metadata.version(name) for name in names},
        "seconds": [seconds for seconds, _ in rounds],
        "places": rounds[-1][1],
    }
    print(json.dumps(report), flush=True)


def read(job: dict) -> tuple[float, list[list[int]]]:
    """Seconds for the batches, and the place that each row says it has."""
    store = ActivationsStore(
        model=torch.nn.Identity(),  # type: ignore  # not run: activations are read
        dataset=None,
        streaming=False,
        hook_name=job["column"],
        hook_head_index=None,
        context_size=job["context"],
        d_in=job["width"],
        n_batches_in_buffer=job["buffer"] // job["context"],
        total_training_tokens=job["rows"],
        store_batch_size_prompts=32,
        train_batch_size_tokens=job["batch"],
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=job["folder"],
    )
    places = []
    begun = time.perf_counter()
    for _ in range(job["batches"]):
        places.append(store.next_batch()[:, :2])
    seconds = time.perf_counter() - begun
    return seconds, torch.cat(places).int().tolist()


if __name__ == "__main__":
    main()
