"""Trains in processes that kill themselves, each going on where the last one stopped.

A script: `killed.py FOLDER`. The model is loaded once, then each training is a fork of this
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

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from training.jobs import DOWN, MIDDLE, PROBES, REFT

Moment = tuple[str, int]

# What kills the next process: the end of a step, or the n-th writing of a file of this name.
MOMENTS: dict[str, list[Moment]] = {
    "reft": [
        *[("fingerprint.json", 1), ("step", 1), ("training.safetensors", 3), ("step", 11)],
        *[("adapter.safetensors", 1), ("result.json", 1), ("report.html", 1)],
    ],
    "probes": [
        *[("plan.json", 1), (f"{DOWN}.json", 1), (f"{MIDDLE}.safetensors", 1)],
        *[("result.json", 1)],
    ],
}


def main(folder: Path) -> None:
    import torch

    import dreamreader
    from dreamreader.training import ProbeJob, ReftJob

    torch.set_num_threads(1)
    reader = dreamreader.load("shapes-unet")

    def run(kind: str, out: Path, killer: Moment | None, first: Callable[[int], Any]) -> int:
        calls = 0

        def called(*_: Any) -> None:
            nonlocal calls
            calls += 1

        reader.subject.unet.register_forward_pre_hook(called)
        told = watched(killer, first)
        if kind == "reft":
            ReftJob(reader=reader, **REFT).run(out, told=told)
        else:
            ProbeJob(reader=reader, **{**PROBES, "sites": [DOWN, MIDDLE]}).run(out)
        return calls

    def watched(killer: Moment | None, first: Callable[[int], Any]) -> Callable[..., None]:
        """Says which step came first, and ends the process for good at a moment."""
        name, left = killer or ("", 0)
        steps: list[int] = []

        def step(stage: str, done: int, *_: Any) -> None:
            if stage != "training":
                return
            if not steps:
                first(done)
            steps.append(done)
            if (name, left) == ("step", done):
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, about: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "os.rename" and Path(os.fspath(about[1])).name == name:
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        return step

    def forked(kind: str, out: Path, killer: Moment | None = None) -> dict[str, Any]:
        """A training in a process of its own: what ended it, its first step, its calls of the
        denoiser, and the probes that are there then."""
        ends, given = os.pipe()
        child = os.fork()
        if not child:
            try:
                calls = run(kind, out, killer, lambda n: os.write(given, b"%d;" % n))
                os.write(given, b"calls %d" % calls)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(given)
        with os.fdopen(ends) as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        first, calls = text.partition(";")[0], text.partition("calls ")[2]
        files = {
            each.name: each.stat().st_mtime_ns
            for each in (out / "probes").glob("[!.]*.safetensors")
        }
        first = int(first) if ";" in text else None
        return {"ended": ended, "first": first, "calls": calls, "files": files}

    log: dict[str, Any] = {}
    for kind, moments in MOMENTS.items():
        out = folder / f"{kind}-stopped"
        log[kind] = {"whole": forked(kind, folder / kind)}
        log[kind]["killed"] = [forked(kind, out, each) for each in moments]
        log[kind]["last"] = forked(kind, out)
        log[kind]["again"] = forked(kind, out)
    (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
