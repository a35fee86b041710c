"""Runs a small training of autoencoders as one process of several; see test_sae_ranks.py."""

import json
import os
import sys
from pathlib import Path

import torch

from dreamreader.training import SaeJob


def main(spec: str, folder: str, stop: int) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")

    def report(event) -> None:
        if event.stage == "training" and event.done == stop:
            os._exit(7)  # as if it was killed

    job = SaeJob(json.loads(spec))
    found = job.run(folder, progress=report)["known answers"]
    (Path(folder).parent / f"{Path(folder).name}-seen-{rank}").write_text(repr(sorted(found)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
