"""Runs an experiment in processes that kill themselves, each going on where the last one stopped.

A script: `killed.py FOLDER`. The model is loaded once, then each run is a fork of this
process, with one thread. Writes what happened to FOLDER/log.json.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAIRS = [
    {"source": "a small red circle", "target": "a small blue circle"},
    {"source": "a large red square", "target": "a large blue square"},
    {"source": "a red star", "target": "a blue star"},
]
SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
METHODS: dict[str, dict[str, Any]] = {
    "patch": {"kind": "patch", "sites": SITE, "windows": 2, "branch": "cond"},
    "steer": {
        "kind": "steer",
        "sites": SITE,
        "branch": "cond",
        "fit": {"pairs": PAIRS},
        "strengths": [0.0, 1.0],
    },
}
Moment = tuple[str, int | str]

# What kills the next process: the n-th event, or the first one about a file of this name.
MOMENTS: dict[str, list[Moment]] = {
    "patch": [
        *[("os.rename", n) for n in (1, 2, 3)],
        *[("call", 1), ("os.rename", 5), ("call", 4), ("os.rename", 6), ("call", 7)],
        *[("os.rename", "firing.json"), ("os.rename", "rows.parquet")],
        *[("os.remove", "batch-000002.parquet"), ("os.rename", "report.html")],
    ],
    "steer": [
        *[("call", 2), ("os.rename", "directions.safetensors")],
        *[("os.rename", "directions-shuffled.safetensors"), ("call", 3), ("os.rename", 6)],
        *[("call", 6), ("os.rename", "rows.parquet")],
    ],
}


def main(folder: Path) -> None:
    import torch

    import dreamreader
    from dreamreader.experiments import Experiment

    torch.set_num_threads(1)
    reader = dreamreader.load("shapes-unet")

    def run(kind: str, out: Path, watch: Callable[[], None]) -> int:
        calls = 0

        def called(*_: Any) -> None:
            nonlocal calls
            calls += 1

        reader.subject.unet.register_forward_pre_hook(called)
        watch()
        Experiment(
            name="killed",
            subject="shapes-unet",
            reader=reader,
            data={"pairs": PAIRS},
            pipeline={"num_inference_steps": 2},
            method=METHODS[kind],
            metrics=["pixel_distance", {"tint": {"source": "red", "target": "blue"}}, "detector"],
            batch={"rows": 3},
        ).run(out)
        return calls

    def killing(event: str, which: int | str) -> Callable[[], None]:
        """Ends the process for good at a moment."""
        left = which if isinstance(which, int) else 1

        def count(*_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(name: str, about: tuple[Any, ...]) -> None:
            if name == event:
                file = Path(os.fspath(about[1 if name == "os.rename" else 0])).name
                if isinstance(which, int) or file == which:
                    count()

        def watch() -> None:
            if event == "call":
                reader.subject.unet.register_forward_pre_hook(count)
            else:
                sys.addaudithook(audit)

        return watch

    def forked(kind: str, out: Path, watch: Callable[[], None]) -> dict[str, Any]:
        """A run in a process of its own: the signal that ended it, its calls of the denoiser, and
        the batches that were there before and after."""
        before = units(out)
        ends, given = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(given, str(run(kind, out, watch)).encode())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(given)
        with os.fdopen(ends) as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        complete = (out / "rows.parquet").is_file()
        states = {"before": before, "after": units(out), "complete": complete}
        return {"ended": ended, "calls": text, **states}

    def units(out: Path) -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in (out / "rows").glob("batch-*")}

    log: dict[str, Any] = {}
    for kind in METHODS:
        out = folder / f"{kind}-stopped"
        log[kind] = {"whole": forked(kind, folder / kind, lambda: None)}
        log[kind]["killed"] = [forked(kind, out, killing(*each)) for each in MOMENTS[kind]]
        log[kind]["parts"] = len(list(out.rglob("*.part")))
        log[kind]["last"] = forked(kind, out, lambda: None)
        log[kind]["again"] = forked(kind, out, lambda: None)
    (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
