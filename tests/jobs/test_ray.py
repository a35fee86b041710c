"""Jobs with Ray: on a cluster of this machine, with workers that are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harvest.jobs import MIDDLE, content, pictures
from tiny.embedded import untrained

from dreamreader._progress import ProgressEvent, silent
from dreamreader.cli.jobs import engine_of
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment
from dreamreader.harvest import Harvest, RayEngine
from dreamreader.harvest.folder import HarvestFolder
from dreamreader.harvest.plan import HarvestPlan
from dreamreader.jobs.job import Work
from dreamreader.jobs.ray import ByteBudget, Machine, WorkerPool, threads_of
from dreamreader.jobs.ray_worker import ComputedUnit, JobWorker, WorkerOrder
from dreamreader.store import Manifest, Store
from dreamreader.training import ReftJob
from tests.training.jobs import REFT

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
PROMPTS = [f"a {c} {s}" for c in ("red", "blue") for s in ("circle", "square", "star")]
COUNT = len(PROMPTS)

# Python reads it at the start of every worker: what the file CONTROL names happens once.
CUSTOMIZE = """
import json, os, signal, sys, time

def audit(event, about):
    if event == "import" and about[0] == "dreamreader.jobs.ray_worker":
        act("start")
    elif event == "os.rename" and os.path.exists(CONTROL):
        act(os.path.basename(os.fspath(about[1])))

def act(name):
    try:
        wanted = json.load(open(CONTROL))
    except OSError:
        return
    if name != wanted["at"]:
        return
    if name == "start":
        os.close(os.open(wanted["mark"] + str(os.getpid()), os.O_CREAT))
        os.kill(os.getpid(), signal.SIGKILL)
    if "error" in wanted:
        raise RuntimeError(wanted["error"])
    try:
        mark = os.open(wanted["mark"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(mark, str(os.getpid()).encode())
    os.close(mark)
    time.sleep(600)  # until it is killed

sys.addaudithook(audit)
"""


def units(**changes: Any) -> Harvest:
    """A harvest in units of one sample, that a worker opens by itself."""
    fields: dict[str, Any] = {
        "reader": None,
        "data": {"prompts": PROMPTS},
        "seeds": {"count": 1},
        "pipeline": {"num_inference_steps": 2},
        "capture": [{"sites": MIDDLE, "tokens": {"random": 0.5}}],
        "store": {"unit": 1},
    }
    return pictures(**(fields | changes))


def steering(**changes: Any) -> Experiment:
    """An experiment that fits directions first, and whose batches are compared with others."""
    pairs = [{"source": f"a red {s}", "target": f"a blue {s}"} for s in ("circle", "star")]
    fields: dict[str, Any] = {
        "name": "steering",
        "subject": "shapes-unet",
        "data": {"pairs": pairs},
        "pipeline": {"num_inference_steps": 2},
        "method": {
            **{"kind": "steer", "sites": MIDDLE, "branch": "cond", "strengths": [0.0, 1.0]},
            "fit": {"pairs": pairs},
        },
        "metrics": ["pixel_distance"],
        "batch": {"rows": 2},
    }
    return Experiment(**(fields | changes))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums may depend on the threads that share them: as many here as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Iterator[Path]:
    """The file that says what happens to workers; they read it through their sitecustomize."""
    folder = tmp_path_factory.mktemp("workers")
    file = folder / "control.json"
    (folder / "sitecustomize.py").write_text(f"CONTROL = {str(file)!r}\n{CUSTOMIZE}")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [before])])
    yield file
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def cluster(control: Path) -> Iterator[None]:
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, **options)
    yield
    ray.shutdown()


@pytest.fixture
def kill_at(control: Path, tmp_path: Path) -> Iterator[Callable[[str], list[int]]]:
    """Kills the first worker that is about to give a file this name; gives whom it killed."""
    over, killers = threading.Event(), []

    def start(name: str) -> list[int]:
        mark, killed = tmp_path / "mark", []
        control.write_text(json.dumps({"at": name, "mark": str(mark)}))

        def kill() -> None:
            while not over.wait(0.05):
                if mark.is_file() and (text := mark.read_text()):
                    os.kill(int(text), signal.SIGKILL)
                    killed.append(int(text))
                    return

        killers.append(threading.Thread(target=kill))
        killers[-1].start()
        return killed

    yield start
    over.set()
    for each in killers:
        each.join()
    control.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_job_whose_workers_all_die_says_so(tmp_path: Path, cluster, control: Path):
    control.write_text(json.dumps({"at": "start", "mark": str(tmp_path / "killed-")}))
    try:
        with pytest.raises(InvalidInput) as error:
            units().run(tmp_path / "store", engine=RayEngine(1))
    finally:
        control.unlink()
    assert str(error.value).startswith("3 workers in a row were lost starting, 3 in all; the last")
    assert str(error.value).endswith("the same command goes on there")
    assert len(list(tmp_path.glob("killed-*"))) == 3
    assert Manifest.there(tmp_path / "store")


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path, cluster, one_thread, kill_at):
    seen: list[ProgressEvent] = []
    whole = units().run(tmp_path / "local")
    killed = kill_at("000003")
    store = units().run(tmp_path / "ray", engine=RayEngine(2), progress=seen.append)
    assert len(killed) == 1
    assert [each.done for each in seen] == list(range(COUNT + 1))
    last = seen[-1].numbers
    assert (last["lost"], last["rows"], last["stored"]) == (1, whole.rows, whole.nbytes)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert store.index.equals(whole.index)
    assert store.manifest == whole.manifest and store.manifest.complete
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_an_experiment_is_equal_to_the_bit_whoever_is_killed(
    tmp_path: Path, cluster, one_thread, kill_at
):
    steering().run(tmp_path / "local")
    killed = kill_at("batch-000001.parquet")
    seen: list[ProgressEvent] = []
    results = steering().run(tmp_path / "ray", engine=RayEngine(2), progress=seen.append)
    assert len(killed) == 1 and seen[-1].numbers["lost"] == 1
    assert seen[-1].done == seen[-1].total == len(results.rows) == 16
    names = [f for f in (tmp_path / "local").rglob("*") if f.is_file() and f.name != ".lock"]
    assert len(names) > 12
    for file in names:
        other = tmp_path / "ray" / file.relative_to(tmp_path / "local")
        assert other.read_bytes() == file.read_bytes(), file
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_the_command_goes_on_with_a_running_cluster_and_without(
    tmp_path: Path, cluster, one_thread
):
    whole = units().run(tmp_path / "whole")
    unit, folder = whole.nbytes / COUNT / 1e9, tmp_path / "store"
    units().run(folder, limit_gb=2.5 * unit)
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert len(made) == 2
    spec = tmp_path / "spec.json"
    spec.write_text(units().spec.model_dump_json())
    address = ray.get_runtime_context().gcs_address
    options = [
        "--limit-gb",
        str(5.5 * unit),
        "--engine",
        "ray",
        "--workers=2",
        "--address",
        address,
    ]
    command = [sys.executable, "-m", "dreamreader", "harvest", spec, "-o", folder, *options]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6 samples (2 are there) in 6 units of 1" in said.stderr
    assert "in 5 of 6 units\nnot complete; the same command" in said.stdout
    store = Store(folder)
    assert list(store.units) == [0, 1, 2, 3, 4] and not store.manifest.complete
    assert units().run(folder).manifest.complete
    assert content(folder) == content(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == at for file, at in made.items())


@pytest.mark.slow
def test_an_error_of_the_harvest_ends_it_with_the_same_words(tmp_path: Path, cluster):
    pipe = untrained()
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = torch.nan
    pipe.save_pretrained(tmp_path / "model")
    job = units(subject=str(tmp_path / "model"))
    with pytest.raises(InvalidInput, match="a row is not finite at step 0, prompt '0'") as local:
        job.run(tmp_path / "local")
    with pytest.raises(InvalidInput) as error:
        job.run(tmp_path / "ray", engine=RayEngine(1))
    assert str(error.value) == str(local.value)
    assert not content(tmp_path / "ray") and not list(tmp_path.rglob("*.part"))
    assert _is_free(cpus=2), error  # also while an error is held whose frames refer to the workers


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_ends_the_workers_too(tmp_path: Path, cluster, control: Path):
    control.write_text(json.dumps({"at": "000001", "error": "the moon is full"}))
    try:
        with pytest.raises(RuntimeError, match="the moon is full") as error:
            units(data={"prompts": PROMPTS[:2]}).run(tmp_path / "store", engine=RayEngine(1))
    finally:
        control.unlink()
    assert _is_free(cpus=2), error
    assert list(Store(tmp_path / "store").units) == [0]


@pytest.mark.slow
def test_a_worker_has_its_cores_and_its_gpu_for_itself(tmp_path: Path, cluster):
    harvest = units(data={"prompts": PROMPTS[:1]})
    harvest.run(tmp_path / "store")
    pool = WorkerPool(_work(harvest, tmp_path / "store"), workers=1, threads=2, cuda=True)
    assert _is_free(cpus=0, gpus=0)
    pool.dismiss()
    assert _is_free(cpus=2, gpus=1)


def _is_free(cpus: int, gpus: int = 1) -> bool:
    """Whether the cluster comes to have so much free."""
    for _ in range(600):
        free = ray.available_resources()
        if (free.get("CPU", 0), free.get("GPU", 0)) == (cpus, gpus):
            return True
        time.sleep(0.1)
    return False


def test_without_ray_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidInput, match=r"needs the package ray: pip install ray"):
        RayEngine()


def test_refuses_what_cannot_be_right(tmp_path: Path):
    with pytest.raises(InvalidInput, match="workers=0: must be positive"):
        RayEngine(0)
    with pytest.raises(InvalidInput, match="--workers and --address are of --engine ray"):
        engine_of("local", 2, None)
    with pytest.raises(InvalidInput, match="a reader of your own cannot go there"):
        pictures().run(tmp_path, engine=RayEngine(1))
    with pytest.raises(InvalidInput, match="ReftJob: an engine is for jobs whose units are indep"):
        ReftJob(**REFT).run(tmp_path, engine=RayEngine(1))
    from dreamreader.metrics.pixel_distance import PixelDistance

    with pytest.raises(InvalidInput, match="opens the metrics in other processes, by their names"):
        steering(metrics=[PixelDistance()]).run(tmp_path, engine=RayEngine(1))
    with pytest.raises(InvalidInput, match="subject.device=meta: workers with Ray take cpu or"):
        RayEngine()(_work(units(subject={"model": "shapes-unet", "device": "meta"}), tmp_path))


def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidInput, match=f"no Ray cluster at {address}: .*refused"):
            RayEngine(1, address)(_work(units(), tmp_path))
        with pytest.raises(InvalidInput, match=f"at ray://{address}: give host:port of its head"):
            RayEngine(1, f"ray://{address}")(_work(units(), tmp_path))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InvalidInput, match=f"no Ray cluster at {address}: .*refused"):
            RayEngine(1)(_work(units(), tmp_path))


@pytest.mark.parametrize(
    "machines, workers, cuda, threads",
    [
        ([(8, 0)], 2, False, 4),
        ([(8, 0)], 3, False, 2),
        ([(4, 0), (4, 0)], 1, False, 4),
        ([(3, 0), (3, 0)], 3, False, 1),
        ([(5, 0), (2, 0)], 3, False, 2),
        ([(8, 0), (1, 0)], 2, False, 4),
        ([(16, 2), (16, 0)], 2, True, 8),
        ([(16, 2), (4, 2)], 4, True, 2),
    ],
)
def test_cores_of_a_worker(machines: list[tuple[int, int]], workers: int, cuda: bool, threads: int):
    assert threads_of([Machine(*each) for each in machines], workers, cuda) == threads


def test_a_cluster_that_is_too_small_is_named():
    with pytest.raises(InvalidInput, match="workers=3: the cluster has 2 cores; a worker needs"):
        threads_of([Machine(2, 0)], 3, cuda=False)
    with pytest.raises(InvalidInput, match="workers=2: the cluster has 8 cores and 1 GPUs"):
        threads_of([Machine(8, 1)], 2, cuda=True)


def test_units_under_way_never_have_more_than_the_limit(tmp_path: Path):
    work = _work(units(), tmp_path, limit=100)
    budget = ByteBudget(work)
    assert budget.take(0, 2) and budget.take(1, 1)
    assert (budget.of(0), budget.of(1)) == (50, 50)
    budget.retry_alone(0)
    assert not budget.take(0, 1), "a unit of its own must wait for the others"
    budget.free(1)
    work.stored, work.done = 40, 1
    assert budget.take(0, 2) and budget.of(0) == 60
    budget.retry_alone(0)
    assert work.stopped


def test_a_unit_that_nothing_is_left_for_is_not_started(tmp_path: Path):
    work = _work(units(), tmp_path, limit=100)
    work.stored, work.done = 60, 2
    budget = ByteBudget(work)
    assert budget.take(2, 2) and budget.of(2) == 40, "half of what is left is too little"
    budget.free(2)
    work.stored, work.done = 90, 3
    assert not budget.take(3, 2)
    assert work.stopped


def test_a_share_that_is_just_enough_is_taken(tmp_path: Path):
    work = _work(units(), tmp_path, limit=114)
    work.stored, work.done = 60, 2
    budget = ByteBudget(work)
    assert budget.take(2, 2) and budget.take(3, 1)
    assert budget.of(2) == budget.of(3) == 27 == work.job.expected_bytes(work, 2)


def _work(harvest: Harvest, store: Path, limit: int | None = None) -> Work:
    plan = HarvestPlan(9, 1, 1)
    return Work(harvest, HarvestFolder(store), plan, list(range(9)), silent, total=9, limit=limit)


@pytest.fixture
def order(tmp_path: Path) -> Callable[..., WorkerOrder]:
    """What a worker is asked for, of a small store that is there."""
    harvest = units(data={"prompts": PROMPTS[:1]})
    harvest.run(tmp_path / "store")
    run = Manifest.read(tmp_path / "store").jobs[0].run
    store, threads = str(tmp_path / "store"), torch.get_num_threads()
    asked = WorkerOrder("harvest", harvest.spec, os.getcwd(), store, run, threads)
    return lambda **changes: replace(asked, **changes)


def test_a_worker_counts_what_is_in_each_unit(tmp_path: Path, order: Callable[..., WorkerOrder]):
    before, threads = content(tmp_path / "store"), torch.get_num_threads()
    worker = JobWorker(order())
    assert worker.open() is None and torch.get_num_threads() == threads
    found = [worker.compute(0, None) for _ in range(2)]
    assert found[0] == found[1] and isinstance(found[0], ComputedUnit)
    whole = Store(tmp_path / "store")
    assert found[0].numbers["rows"] == whole.rows > 0 and found[0].bytes == whole.nbytes
    assert content(tmp_path / "store") == before
    assert worker.compute(0, found[0].bytes - 1) is None


def test_a_worker_says_what_it_sees_otherwise(tmp_path: Path, order: Callable[..., WorkerOrder]):
    assert JobWorker(order()).open() is None
    for changes, text in (
        ({"folder": str(tmp_path)}, "has no manifest.json here; it must be a folder that all"),
        ({"run": "1" * 64}, "is another one here, of run"),
        (
            {"spec": units(data={"prompts": PROMPTS[1:2]}).spec},
            "holds another harvest: settings.prompts was",
        ),
    ):
        found = JobWorker(order(**changes)).open()
        assert found is not None and found.kind is InvalidInput
        assert text in str(found.error()) and str(found.error()).startswith("worker on ")
