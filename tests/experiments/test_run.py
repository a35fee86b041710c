"""Rows of a run: batches, references, metrics, and folders that belong to something else."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny.embedded import untrained

from dreamreader._checked import read_table, write_table
from dreamreader._progress import ProgressEvent
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment, load_results
from dreamreader.experiments.plan import probe
from dreamreader.metrics import Outputs

from .conftest import PAIRS


class Brightness:
    """A metric of one's own."""

    name: ClassVar[str] = "brightness"
    needs: ClassVar[frozenset[str]] = frozenset({"images"})
    compares: ClassVar[bool] = False

    def __init__(self, column: str = "brightness", short: bool = False):
        self.column, self.short = column, short
        self.rows: list[int] = []

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, list[Any]]:
        self.rows += got.column("row")
        assert got.images is not None and reference is None
        found = got.images.mean((1, 2, 3)).tolist()
        return {self.column: found[1:] if self.short else found}


class Gap:
    """Remembers what it was compared with."""

    name: ClassVar[str] = "gap"
    needs: ClassVar[frozenset[str]] = frozenset({"images", "latents", "noise"})
    compares: ClassVar[bool] = True

    def __init__(self) -> None:
        self.own: dict[int, dict[str, torch.Tensor]] = {}
        self.reference: dict[int, dict[str, torch.Tensor]] = {}

    def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, list[Any]]:
        assert reference is not None
        for seen, outputs in ((self.own, got), (self.reference, reference)):
            assert outputs.images is not None and outputs.latents is not None
            for n, row in enumerate(got.column("row")):
                noise = {f"noise {step}": value[n] for step, value in outputs.noise.items()}
                parts = {"images": outputs.images[n], "latents": outputs.latents[n], **noise}
                seen[row] = {k: v.clone() for k, v in parts.items()}
        return {"base_prompt": [row["prompt"] for row in reference.rows]}


def digests(path: Path) -> list[str]:
    return [row["digest"] for row in load_results(path).rows]


def test_rows_are_what_the_pipeline_gives(experiment, reader, tmp_path) -> None:
    results = experiment(seeds=[3, 5]).run(tmp_path / "run")
    assert [row["row"] for row in results.rows] == list(range(12))
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    with torch.inference_mode():
        alone = reader.run("a blue square", seeds=[5], **settings).images[0]
    row = results.of("unedited", item="1", seed=5)[0]
    image = torch.tensor(list(results.image(row).tobytes())).reshape(64, 64, 3).permute(2, 0, 1)
    assert (image / 255 - alone).abs().max() < 2 / 255
    # factor 1 changes nothing: in a batch of the same shape to the bit
    same = [row["pixel_distance"] for row in results.of("edited", factor=1.0)]
    assert max(same) < 1e-5 < min(r["pixel_distance"] for r in results.of("edited", factor=0.5))


def test_alpha_0_is_bit_equal_in_a_batch_of_the_same_prompts(experiment, tmp_path) -> None:
    results = experiment(seeds={"count": 2}).run(tmp_path / "run")
    units: dict[int, list[Any]] = {}
    for row in results.rows:
        units.setdefault(row["unit"], []).append(row)
    assert len(units) == 3
    assert [r["digest"] for r in units[0]] == [r["digest"] for r in units[1]]
    assert not {r["digest"] for r in units[0]} & {r["digest"] for r in units[2]}


def test_a_finished_run_computes_nothing(experiment, reader, tmp_path) -> None:
    first = experiment().run(tmp_path / "run")
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*") if f.is_file()}
    calls: list[Any] = []
    handle = reader.subject.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    events: list[ProgressEvent] = []
    try:
        again = experiment().run(tmp_path / "run", progress=events.append)
    finally:
        handle.remove()
    assert calls == [] and again.rows == first.rows
    assert [(each.done, each.total) for each in events] == [(len(first.rows),) * 2]
    del files[tmp_path / "run" / ".lock"]
    assert files == {f: f.stat().st_mtime_ns for f in files}


def test_progress_counts_each_row_once(experiment, tmp_path) -> None:
    for method in (
        {"kind": "patch", "sites": "unet.mid_block"},
        {
            "kind": "steer",
            "sites": "unet.mid_block",
            "fit": {"pairs": PAIRS},
            "strengths": [1.0],
            "branch": "cond",
        },
    ):
        events: list[ProgressEvent] = []
        results = experiment(data={"pairs": PAIRS}, method=method).run(
            tmp_path / method["kind"], progress=events.append
        )
        assert {(each.stage, each.total) for each in events} == {("rows", len(results.rows))}
        assert events[0].text.startswith(f"{len(results.rows)} rows in ") and not events[0].done
        counts = [each.done for each in events]
        assert counts == sorted(counts) and counts[-1] == pytest.approx(len(results.rows))


def test_batches_keep_their_rows_whatever_the_memory(experiment, tmp_path, monkeypatch) -> None:
    """A run that began with batches of three goes on with them where only one row would fit."""

    class Stopping(Brightness):
        def measure(self, got: Outputs, reference: Outputs | None) -> dict[str, list[Any]]:
            if 3 in got.column("row"):
                raise KeyboardInterrupt
            return super().measure(got, reference)

    row = probe(experiment().job)
    free = {"bytes": 2 * 3.5 * row}
    monkeypatch.setattr("dreamreader.engine.available_memory", lambda: free["bytes"])
    auto = {"batch": {"rows": "auto"}}
    with pytest.raises(KeyboardInterrupt):
        experiment(metrics=[Stopping()], **auto).run(tmp_path / "run")
    assert len(list((tmp_path / "run" / "rows").iterdir())) == 1
    free["bytes"] = 2 * 1.5 * row
    rows = experiment(metrics=[Brightness()], **auto).run(tmp_path / "run").rows
    assert [row["unit"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert experiment(**auto).plan().batch == 1


def test_metrics_get_the_exact_outputs_of_the_base_row(experiment, tmp_path) -> None:
    """Across batches, and also where they come from the run folder."""
    gap = Gap()
    results = experiment(metrics=[gap], seeds={"count": 2}, batch={"rows": 3}).run(tmp_path / "run")
    assert len({row["unit"] for row in results.rows}) == 4
    for row in results.rows:
        base = row["row"] if row["base"] is None else row["base"]
        assert row["base_prompt"] == row["prompt"]
        own, seen = gap.own[base], gap.reference[row["row"]]
        assert own.keys() == seen.keys() == {"images", "latents", "noise 0", "noise 1"}
        assert all(torch.equal(own[name], seen[name]) for name in own)
    assert {row["base"] for row in results.of("edited")} == {0, 1, 2, 3}
    # the last batch anew, in a new process so to say
    again = Gap()
    folder = tmp_path / "run"
    table = read_table(folder / "rows.parquet")
    (folder / "rows").mkdir()
    for unit in range(3):
        rows = [row for row in table.to_pylist() if row["unit"] == unit]
        part = table.slice(rows[0]["row"], len(rows))
        write_table(folder / "rows" / f"batch-{unit:06d}.parquet", part)
    (folder / "rows.parquet").unlink()
    later = experiment(metrics=[again], seeds={"count": 2}, batch={"rows": 3}).run(folder)
    assert sorted(again.own) == [9, 10, 11] and later.rows == results.rows
    for number in again.own:
        base = gap.own[results.rows[number]["base"]]
        assert all(torch.equal(base[name], again.reference[number][name]) for name in base)


def test_references_that_are_missing_say_what_to_delete(experiment, tmp_path) -> None:
    made = experiment(batch={"rows": 2})
    made.run(tmp_path / "run")
    folder = tmp_path / "run"
    (folder / "artifacts" / "references" / "000000.safetensors").unlink()
    (folder / "rows").mkdir()
    rows = read_table(folder / "rows.parquet")
    write_table(folder / "rows" / "batch-000000.parquet", rows.slice(0, 2))
    (folder / "rows.parquet").unlink()
    text = r"references/000000.safetensors is missing; delete rows/batch-000000.parquet and run"
    with pytest.raises(InvalidInput, match=text):
        experiment(batch={"rows": 2}).run(folder)
    (folder / "rows" / "batch-000000.parquet").unlink()
    assert len(experiment(batch={"rows": 2}).run(folder).rows) == 6


def test_own_metrics_beside_those_of_the_spec(experiment, tmp_path) -> None:
    own = Brightness()
    results = experiment(metrics=["pixel_distance", own]).run(tmp_path / "run")
    assert own.rows == list(range(6)) and "brightness" in results.numbers
    taken = json.loads((tmp_path / "run" / "fingerprint.json").read_text())
    assert taken["settings"]["metrics"] == ["pixel_distance", "brightness"]


@pytest.mark.parametrize(
    "metrics, text",
    [
        ([Brightness("seed")], "a metric gives the column 'seed', which every row has already"),
        ([Brightness("factor")], "a metric gives the column 'factor', which every row has already"),
        ([Brightness(short=True)], "metrics: brightness gives 2 values of brightness for 3 rows"),
        (
            ["pixel_distance", Brightness("pixel_distance")],
            "metrics: brightness gives the column 'pixel_distance', which is there twice",
        ),
    ],
)
def test_columns_of_metrics_that_cannot_be(experiment, tmp_path, metrics, text) -> None:
    with pytest.raises(InvalidInput, match=text):
        experiment(metrics=metrics).run(tmp_path / "run")


def test_unknown_metrics_and_arguments_are_named(experiment, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="metrics.1: unknown metric 'tnit'; nearest: tint"):
        experiment(metrics=["detector", "tnit"]).run(tmp_path / "run")
    with pytest.raises(InvalidInput, match="metrics.0: unknown option of metric tint 'from'"):
        experiment(metrics=[{"tint": {"from": "red"}}]).run(tmp_path / "run")
    with pytest.raises(UnknownName, match="unknown argument of StableDiffusionPipeline 'guidance'"):
        experiment(pipeline={"guidance": 2}).run(tmp_path / "run")


def test_a_folder_of_another_run_is_refused_with_the_first_difference(experiment, tmp_path) -> None:
    folder = tmp_path / "run"
    before = experiment().run(folder)
    for changes, text in (
        ({"seeds": {"count": 2}}, "settings.spec.seeds.count was 1, is 2"),
        ({"data": {"prompts": ["a red circle", "a star"]}}, "settings.spec.data.prompts was "),
        ({"batch": {"rows": 3}}, "settings.spec.batch.rows was 4, is 3"),
        ({"pipeline": {"num_inference_steps": 3}}, "pipeline.num_inference_steps was 2, is 3"),
        ({"metrics": []}, r"settings.spec.metrics was \['pixel_distance'\], is \[\]"),
    ):
        with pytest.raises(InvalidInput, match=rf"run holds another run: .*{text}.*Give another"):
            experiment(**changes).run(folder)
    assert load_results(folder).rows == before.rows
    # the name and what is saved change no number
    assert experiment(name="other", save={"images": False}).run(folder).rows == before.rows


def test_other_weights_are_another_run(experiment, tmp_path) -> None:
    made = experiment()
    made.run(tmp_path / "run")
    other = Experiment(made.spec, reader=Reader(untrained()))
    with pytest.raises(InvalidInput, match="run holds another run: weights was [0-9a-f]{64}, is "):
        other.run(tmp_path / "run")


def test_prompts_of_a_file_count_not_its_folder(experiment, tmp_path) -> None:
    def run(folder: str, text: str) -> None:
        path = tmp_path / folder / "prompts.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        experiment(data={"file": str(path)}).run(tmp_path / "run")

    run("a", "a red circle\n")
    run("b", "a red circle\n")
    with pytest.raises(InvalidInput, match="holds another run: settings.prompts was "):
        run("a", "a blue circle\n")


def test_directions_that_an_edit_reads_are_part_of_the_fingerprint(experiment, tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "directions.safetensors"
    edit = {"kind": "steer", "site": "unet.mid_block", "direction": {"file": str(path)}, "alpha": 2}
    method = {"kind": "edit", "edits": [edit]}
    width = experiment().job.reader.subject.unet.config.block_out_channels[-1]
    save_file({"unet.mid_block": torch.ones(width)}, path)
    experiment(method=method).run(tmp_path / "run")
    save_file({"unet.mid_block": torch.zeros(width)}, path)
    with pytest.raises(InvalidInput, match="settings.inputs.edits.0.direction.unet.mid_block.tens"):
        experiment(method=method).run(tmp_path / "run")
    save_file({"unet.mid": torch.zeros(width)}, path)
    with pytest.raises(UnknownName, match="for site 'unet.mid_block'; nearest: unet.mid"):
        experiment(method=method).run(tmp_path / "other")


def test_one_experiment_can_run_into_two_folders(experiment, tmp_path) -> None:
    """What was kept of one folder is not taken for the other, also with other batches."""
    made = experiment(data={"pairs": PAIRS}, method={"kind": "patch", "sites": "unet.mid_block"})
    first = made.run(tmp_path / "a").rows
    assert made.run(tmp_path / "b").rows == first
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_seeds_decide_the_pictures(experiment, tmp_path) -> None:
    experiment(seeds=[1]).run(tmp_path / "a")
    experiment(seeds=[2]).run(tmp_path / "b")
    assert not set(digests(tmp_path / "a")) & set(digests(tmp_path / "b"))


def test_a_pipeline_has_no_perplexity(experiment, tmp_path) -> None:
    data = {"prompts": [{"prompt": "a red circle", "plain_text": "a text"}]}
    with pytest.raises(InvalidInput, match="perplexity needs a language model, and a text in the"):
        experiment(["perplexity"], data=data).run(tmp_path / "run")


def test_a_comparison_without_a_metric_is_refused_before_anything_runs(experiment, tmp_path):
    method = {"kind": "patch", "sites": "unet.mid_block", "windows": 1}
    made = experiment(data={"pairs": PAIRS}, method=method, metrics=[])
    with pytest.raises(InvalidInput, match="metrics: method patch compares its conditions by a me"):
        made.run(tmp_path / "run")
    assert not (tmp_path / "run" / "rows").exists()
