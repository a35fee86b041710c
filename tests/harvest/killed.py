"""Harvests in processes that kill themselves, each going on where the last one stopped.

A script: `killed.py FOLDER`. The models are loaded once, then each run is a fork of this process,
with one thread. Writes what happened to FOLDER/log.json.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = [f"a text with {'very ' * (n % 5)}much in it, number {n}" for n in range(20)]
KILLS = {"texts": 44, "pictures": 6}
BATCHES = {"texts": 14, "pictures": 6}  # of a whole run


def main(folder: Path) -> None:
    import tiny
    import torch

    import dreamreader
    from dreamreader.engine import Reader
    from dreamreader.harvest import Harvest

    torch.set_num_threads(1)
    unet = dreamreader.load("shapes-unet")
    gpt2 = Reader(*tiny.language_model("gpt2"))

    def harvest(kind: str) -> Harvest:
        if kind == "texts":
            return Harvest(
                name=kind,
                reader=gpt2,
                data={"prompts": TEXTS},
                capture=[
                    {"sites": "transformer.h.*", "tokens": {"random": 0.5}},
                    {"sites": "transformer.h.1.attn:heads", "dtype": "int8"},
                ],
                batch={"rows": 2},
                store={"unit": 3, "ring_mb": 1},
            )
        return Harvest(
            name=kind,
            subject="shapes-unet",
            reader=unet,
            data={"prompts": ["a red circle", "a blue square"]},
            seeds={"count": 3},
            pipeline={"num_inference_steps": 1},
            capture=[{"sites": "unet.**.attn2", "tokens": {"random": 0.25}}],
            batch={"rows": 1},
            store={"unit": 2, "ring_mb": 1},
        )

    def killing(kind: str, draw: random.Random) -> Callable[[], None]:
        """Ends the process for good at a random moment: a call of the model, or of the system."""
        left = draw.randrange(1, 90)
        event = draw.choice(["call", "open", "os.rename", "os.mkdir", "any"])
        if event == "call":
            left = draw.randrange(2, BATCHES[kind] // 2 + 1)

        def count(*_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(name: str, about: Any) -> None:
            if name == event or (event == "any" and name.startswith(("os.", "open", "shutil."))):
                count()

        def watch() -> None:
            if event == "call":
                model = gpt2.subject if kind == "texts" else unet.subject.unet
                model.register_forward_pre_hook(count)
            else:
                sys.addaudithook(audit)

        return watch

    def forked(kind: str, out: Path, watch: Callable[[], None]) -> dict[str, Any]:
        """A run in a process of its own: what ended it, and the units before and after."""
        before = units(out)
        child = os.fork()
        if not child:
            try:
                watch()
                harvest(kind).run(out)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return {"ended": ended, "before": before, "after": units(out)}

    def units(out: Path) -> dict[str, int]:
        """Sealed units, with the time of their content."""
        found = (out / "shards").glob("[0-9]*/unit.json")
        return {file.parent.name: file.stat().st_mtime_ns for file in found}

    log: dict[str, Any] = {}
    draw = random.Random(0)
    for kind, kills in KILLS.items():
        harvest(kind).run(folder / kind)  # also imports what the forks need
        log[kind] = {"killed": [], "last": []}
        rounds = 0
        while len(log[kind]["killed"]) < kills:  # a store that is complete makes room for the next
            out = folder / f"{kind}-{rounds}"
            while len(log[kind]["killed"]) < kills:
                each = forked(kind, out, killing(kind, draw))
                if each["ended"] != signal.SIGKILL:
                    break
                log[kind]["killed"].append(each)
            log[kind]["last"].append(forked(kind, out, lambda: None))
            rounds += 1
    (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
