"""Harvests with Ray: on a cluster of this machine, with workers that are killed."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dreamreader.cli.harvest import engine_of
from dreamreader.harvest.ray_engine import Machine, _Room, threads_of
from dreamreader.harvest.ray_worker import Order, Worker
from harvest.jobs import MIDDLE, content, pictures
from tiny.embedded import untrained

from dreamreader.errors import InvalidInput
from dreamreader.harvest import Harvest, RayEngine
from dreamreader.harvest.plan import Plan
from dreamreader.harvest.run import Progress, Work
from dreamreader.store import Manifest, Store

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
PROMPTS = [f"a {c} {s}" for c in ("red", "blue", "green") for s in ("circle", "square", "star")]


def nine(**changes: Any) -> Harvest:
    """Nine units of one sample, that a worker opens by itself."""
    fields: dict[str, Any] = {
        "reader": None,
        "data": {"prompts": PROMPTS},
        "seeds": 1,
        "pipeline": {"num_inference_steps": 3},
        "capture": [{"sites": MIDDLE, "tokens": {"random": 0.5}}],
        "store": {"unit": 1},
    }
    return pictures(**(fields | changes))


def processes(doing: str) -> list[int]:
    """Workers of our own clusters by what Ray says that they do."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue  # it has ended

    def is_ours(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return [n for n, title in titles.items() if title.startswith(doing) and is_ours(n)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums may depend on the threads that share them: as many here as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=2, object_store_memory=80 * 2**20, **options)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_harvest_whose_workers_all_die_ends_and_ends_its_cluster(tmp_path: Path):
    over, killed = threading.Event(), set()

    def kill() -> None:
        while not over.wait(0.2):
            for process in processes("ray::Worker"):
                killed.add(process)
                os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(InvalidInput) as error:
            nine().run(tmp_path, engine=RayEngine(1))
    finally:
        over.set()
        killer.join()
    assert str(error.value).startswith(
        "3 workers in a row were lost starting, 3 in all; the last one: The actor died"
    )
    assert str(error.value).endswith("the same command goes on there")
    assert len(killed) == 3
    assert not ray.is_initialized()
    assert Manifest.there(tmp_path)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path, cluster, one_thread):
    killed: list[int] = []

    def kill_another(progress: Progress) -> None:
        begun = list((tmp_path / "ray" / "shards").glob(".*.part"))
        if not killed and begun and (there := processes("ray::Worker.harvest")):
            killed.append(there[0])
            os.kill(there[0], signal.SIGKILL)

    seen: list[Progress] = []

    def advance(progress: Progress) -> None:
        seen.append(replace(progress))
        kill_another(progress)

    whole = nine().run(tmp_path / "local")
    store = nine().run(tmp_path / "ray", engine=RayEngine(2), advance=advance)
    assert killed
    assert [each.samples for each in seen] == list(range(1, 10))
    assert (seen[-1].lost, seen[-1].rows, seen[-1].stored) == (1, whole.rows, whole.nbytes)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert store.index.equals(whole.index)
    assert store.manifest == whole.manifest and store.manifest.complete
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_the_command_goes_on_with_a_running_cluster_and_without(
    tmp_path: Path, cluster, one_thread
):
    whole = nine().run(tmp_path / "whole")
    unit, folder = whole.nbytes / 9 / 1e9, tmp_path / "store"
    nine().run(folder, limit_gb=2.5 * unit)
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert len(made) == 2
    spec = tmp_path / "spec.json"
    spec.write_text(nine().spec.model_dump_json())
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
    assert "9 samples (2 are there) in 9 units of 1" in said.stderr
    assert "in 5 of 9 units\nstopped before the limit" in said.stdout
    store = Store(folder)
    assert list(store.units) == [0, 1, 2, 3, 4] and not store.manifest.complete
    assert nine().run(folder).manifest.complete
    assert content(folder) == content(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == at for file, at in made.items())


@pytest.mark.slow
def test_an_error_of_the_harvest_ends_it_with_the_same_words(tmp_path: Path, cluster):
    pipe = untrained()
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] = torch.nan
    pipe.save_pretrained(tmp_path / "model")
    job = nine(subject=str(tmp_path / "model"))
    with pytest.raises(InvalidInput, match="a row is not finite at step 0, prompt '0'") as local:
        job.run(tmp_path / "local")
    lost: list[Progress] = []
    with pytest.raises(InvalidInput) as error:
        job.run(tmp_path / "ray", engine=RayEngine(1), started=lambda _, found: lost.append(found))
    assert str(error.value) == str(local.value)
    assert lost[0].lost == 0
    assert not content(tmp_path / "ray") and not list(tmp_path.rglob("*.part"))


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
    with pytest.raises(InvalidInput, match="subject.device=meta: workers with Ray take cpu or"):
        RayEngine()(_work(nine(subject={"model": "shapes-unet", "device": "meta"}), tmp_path))


def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidInput, match=f"no Ray cluster at {address}: .*refused"):
            RayEngine(1, address)(_work(nine(), tmp_path))
        with pytest.raises(InvalidInput, match=f"at ray://{address}: give host:port of its head"):
            RayEngine(1, f"ray://{address}")(_work(nine(), tmp_path))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InvalidInput, match=f"no Ray cluster at {address}: .*refused"):
            RayEngine(1)(_work(nine(), tmp_path))


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
    work = _work(nine(), tmp_path, limit=100)
    room, progress = _Room(work), work.progress
    assert room.taken(0, 2) and room.taken(1, 1)
    assert (room.of(0), room.of(1)) == (50, 50)
    room.exceeded(0)
    assert not room.taken(0, 1), "a unit of its own must wait for the others"
    room.free(1)
    progress.stored, progress.samples = 40, 1
    assert room.taken(0, 2) and room.of(0) == 60
    room.exceeded(0)
    assert progress.stopped


def test_a_unit_that_nothing_is_left_for_is_not_started(tmp_path: Path):
    work = _work(nine(), tmp_path, limit=100)
    work.progress.stored, work.progress.samples = 60, 2
    room = _Room(work)
    assert room.taken(2, 2) and room.of(2) == 40, "half of what is left is too little"
    room.free(2)
    work.progress.stored, work.progress.samples = 90, 3
    assert not room.taken(3, 2)
    assert work.progress.stopped


def _work(harvest: Harvest, store: Path, limit: int | None = None) -> Work:
    job: Any = type("Opened", (), {"spec": harvest.spec})
    return Work(job, store, Plan(9, 1, 1), "0" * 64, list(range(9)), limit, Progress(9), print)


@pytest.fixture
def order(tmp_path: Path) -> Callable[..., Order]:
    """What a worker is told of a small store that is there."""
    harvest = nine(data={"prompts": PROMPTS[:1]})
    harvest.run(tmp_path / "store")
    run = Manifest.read(tmp_path / "store").jobs[0].run
    told = Order(
        harvest.spec,
        Plan(1, 1, 3),
        os.getcwd(),
        str(tmp_path / "store"),
        run,
        torch.get_num_threads(),
    )
    return lambda **changes: replace(told, **changes)


def test_a_worker_says_what_it_sees_otherwise(tmp_path: Path, order: Callable[..., Order]):
    assert Worker(order()).open() is None
    for changes, text in (
        ({"store": str(tmp_path)}, "has no manifest.json here; the store must be in a folder"),
        ({"run": "1" * 64}, "is another store here, of run"),
        (
            {"spec": nine(data={"prompts": PROMPTS[1:2]}).spec},
            "would harvest other rows than the command that started it: settings.prompts was",
        ),
    ):
        found = Worker(order(**changes)).open()
        assert found is not None and found.kind is InvalidInput
        assert text in str(found.error()) and str(found.error()).startswith("worker on ")
