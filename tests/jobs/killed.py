"""Runs jobs in processes that kill themselves, each going on where the last one stopped.

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
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from training.jobs import DOWN, MATRIX, MIDDLE, PROBES, REFT, SAE

PAIRS = [
    {"source": "a small red circle", "target": "a small blue circle"},
    {"source": "a large red square", "target": "a large blue square"},
    {"source": "a red star", "target": "a blue star"},
]
METHODS: dict[str, dict[str, Any]] = {
    "patch": {"kind": "patch", "sites": MIDDLE, "windows": 2, "branch": "cond"},
    "steer": {
        "kind": "steer",
        "sites": MIDDLE,
        "branch": "cond",
        "fit": {"pairs": PAIRS},
        "strengths": [0.0, 1.0],
    },
}
TEXTS = [f"a text with {'very ' * (n % 5)}much in it, number {n}" for n in range(20)]


class Moment(NamedTuple):
    """What kills a process: the n-th event, or the n-th about a file of this name.

    Events are those of `sys.addaudithook`, `any` of them, `call` of the model, or `step`: the end
    of one of a training.
    """

    event: str
    name: str | None = None
    nth: int = 1


def renamed(name: str | None = None, nth: int = 1) -> Moment:
    return Moment("os.rename", name, nth)


def call(nth: int) -> Moment:
    return Moment("call", nth=nth)


MOMENTS: dict[str, list[Moment]] = {
    "patch": [
        *(renamed(nth=n) for n in (1, 2, 3)),
        *(call(1), renamed(nth=5), call(4), renamed(nth=6), call(7)),
        *(renamed("firing.json"), renamed("rows.parquet")),
        *(Moment("os.remove", "batch-000002.parquet"), renamed("report.html")),
    ],
    "steer": [
        *(call(2), renamed("directions.safetensors"), renamed("directions-shuffled.safetensors")),
        *(call(3), renamed(nth=6), call(6), renamed("rows.parquet")),
    ],
    "reft": [
        *(renamed("fingerprint.json"), Moment("step", nth=1), renamed("training.safetensors", 3)),
        *(Moment("step", nth=11), renamed("adapter.safetensors"), renamed("result.json")),
        renamed("report.html"),
    ],
    "probes": [
        *(renamed("plan.json"), renamed(f"{DOWN}.json"), renamed(f"{MIDDLE}.safetensors")),
        renamed("result.json"),
    ],
    "map-matrix": [
        *(renamed("fingerprint.json"), renamed("fit.safetensors"), call(4)),
        *(renamed("fit.safetensors"), renamed("score.safetensors"), renamed("result.json")),
        renamed("report.html"),
    ],
    "pairs": [
        *(renamed("manifest.json", 1), renamed("manifest.json", 2)),
        *(renamed("000000", 2), renamed("000001", 2), renamed("000002")),  # between two seals
        *(renamed("manifest.json", 3), renamed("report.html")),
    ],
    "sae": [
        *(renamed("fingerprint.json"), call(2), Moment("step", nth=3), Moment("step", nth=7)),
        *(renamed(f"{DOWN}-2.safetensors"), renamed(f"{DOWN}.json"), Moment("step", nth=4)),
        *(renamed(f"{MIDDLE}.json"), renamed("result.json"), renamed("report.html")),
    ],
}
KILLS = {"texts": 44, "pictures": 6}  # at moments that are drawn
BATCHES = {"texts": 14, "pictures": 6}  # of a whole run
KINDS = [*MOMENTS, *KILLS]
UNITS = {
    "reft": "none",
    "map-matrix": "none",  # sums that grow
    "probes": "probes/[!.]*.safetensors",
    "sae": "autoencoders/[!.]*.json",
    "pairs": "target/shards/[0-9]*/unit.json",  # which are sealed last
} | dict.fromkeys(KILLS, "shards/[0-9]*/unit.json")  # files of finished units


def drawn_moment(kind: str, draw: random.Random) -> Moment:
    nth = draw.randrange(1, 90)
    event = draw.choice(["call", "open", "os.rename", "os.mkdir", "any"])
    return Moment(event, nth=draw.randrange(2, BATCHES[kind] // 2 + 1) if event == "call" else nth)


def main(folder: Path) -> None:
    import tiny
    import torch

    import dreamreader
    from dreamreader._progress import ProgressEvent
    from dreamreader.engine import Reader
    from dreamreader.experiments import Experiment
    from dreamreader.harvest import Harvest
    from dreamreader.training import MapMatrixJob, ProbeJob, ReftJob, SaeJob

    torch.set_num_threads(1)
    other = dreamreader.load("shapes-unet-b")
    unet, gpt2 = dreamreader.load("shapes-unet"), Reader(*tiny.language_model("gpt2"))

    def job(kind: str) -> Any:
        common: dict[str, Any] = {"name": kind, "subject": "shapes-unet", "reader": unet}
        if kind == "reft":
            return ReftJob(reader=unet, **REFT)
        if kind == "probes":
            return ProbeJob(reader=unet, **{**PROBES, "sites": [DOWN, MIDDLE]})
        if kind == "sae":
            return SaeJob(reader=unet, **SAE)
        if kind == "map-matrix":
            return MapMatrixJob(reader=unet, target_reader=other, **MATRIX)
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
        if kind in ("pictures", "pairs"):
            target = {"subject": "shapes-unet-b", "trajectory": "target"}
            both = {"target": target, "target_reader": other} if kind == "pairs" else {}
            return Harvest(
                **common,
                **both,
                data={"prompts": ["a red circle", "a blue square"]},
                seeds={"count": 3},
                pipeline={"num_inference_steps": 1},
                capture=[{"sites": "unet.**.attn2", "tokens": {"random": 0.25}}],
                batch={"rows": 1},
                store={"unit": 2, "ring_mb": 1},
            )
        return Experiment(
            **common,
            data={"pairs": PAIRS},
            pipeline={"num_inference_steps": 2},
            method=METHODS[kind],
            metrics=["pixel_distance", {"tint": {"source": "red", "target": "blue"}}, "detector"],
            batch={"rows": 3},
        )

    def run(kind: str, out: Path, moment: Moment | None) -> dict[str, Any]:
        """A whole run: calls of the model, and the first step of a training."""
        seen: dict[str, Any] = {"calls": 0, "first": None}
        left = moment.nth if moment else 0

        def count() -> None:
            nonlocal left
            left -= 1
            if not left:
                os.write(given, json.dumps(seen).encode())
                os.kill(os.getpid(), signal.SIGKILL)

        def called(*_: Any) -> None:
            seen["calls"] += 1
            if moment and moment.event == "call":
                count()

        def follow(event: ProgressEvent) -> None:
            if event.stage != "training":
                return
            seen["first"] = seen["first"] or event.done
            if moment and moment.event == "step" and event.done == moment.nth:
                os.write(given, json.dumps(seen).encode())
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(name: str, about: tuple[Any, ...]) -> None:
            assert moment is not None
            wanted = name == moment.event
            if moment.event == "any":
                wanted = name.startswith(("os.", "open", "shutil."))
            if wanted and moment.name is not None:
                file = os.fspath(about[1 if name == "os.rename" else 0])
                wanted = Path(file).name == moment.name
            if wanted:
                count()

        given = pipe[1]
        model = gpt2.subject if kind == "texts" else unet.subject.unet
        model.register_forward_pre_hook(called)
        work = job(kind)
        if moment and moment.event not in ("call", "step"):
            sys.addaudithook(audit)
        work.run(out, progress=follow)
        return seen

    pipe = (0, 0)

    def forked(kind: str, out: Path, moment: Moment | None = None) -> dict[str, Any]:
        """A run in a process of its own: what ended it, what it did, and the finished units."""
        nonlocal pipe
        before, pipe = units(kind, out), os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(pipe[1], json.dumps(run(kind, out, moment)).encode())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(pipe[1])
        with os.fdopen(pipe[0]) as ends:
            text = ends.read()
        status = os.waitpid(child, 0)[1]
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        complete = (out / "rows.parquet").is_file()
        states = {"before": before, "after": units(kind, out), "complete": complete}
        return {"ended": ended, **states, **(json.loads(text) if text else {})}

    def units(kind: str, out: Path) -> dict[str, int]:
        """Finished units, with the time of their content."""
        found = out.glob(UNITS.get(kind, "rows/batch-*"))
        return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in found}

    def kill_all(kind: str, out: Path, draw: Callable[[], Moment | None]) -> list[dict[str, Any]]:
        found = []
        while (moment := draw()) is not None:
            found.append(forked(kind, out, moment))
            if found[-1]["ended"] != signal.SIGKILL:  # it ended before
                break
        return found

    log: dict[str, Any] = {}
    job("patch").run(folder / "before", progress=False)  # imports what the forks need
    for kind, moments in MOMENTS.items():
        out = folder / f"{kind}-0"
        log[kind] = {"whole": forked(kind, folder / kind)}
        left = iter(moments)
        log[kind]["killed"] = kill_all(kind, out, lambda left=left: next(left, None))
        log[kind]["parts"] = len(list(out.rglob("*.part")))
        log[kind]["last"] = [forked(kind, out)]
        log[kind]["again"] = forked(kind, out)
    draw = random.Random(0)
    for kind, kills in KILLS.items():
        job(kind).run(folder / kind, progress=False)
        log[kind] = {"killed": [], "last": []}
        while len(log[kind]["killed"]) < kills:  # a store that is complete makes room for the next
            out = folder / f"{kind}-{len(log[kind]['last'])}"
            there = iter(range(kills - len(log[kind]["killed"])))

            def next_moment(there: Any = there, kind: str = kind) -> Moment | None:
                return None if next(there, None) is None else drawn_moment(kind, draw)

            found = kill_all(kind, out, next_moment)
            log[kind]["killed"] += [each for each in found if each["ended"] == signal.SIGKILL]
            log[kind]["last"].append(forked(kind, out))
    (folder / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
