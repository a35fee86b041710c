"""Jobs: plans, units and samples in their order, limits, and what is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
import torch
from pyarrow import parquet

from dreamreader import Edit
from dreamreader._checked import read_json, write_json
from dreamreader._files import lock_folder
from dreamreader._progress import ProgressEvent
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.store import Manifest, Store
from dreamreader.store.layout import unit_folder
from dreamreader.store.merge import merge
from dreamreader.store.unit import read_unit

from .jobs import LAYER, MIDDLE, PROMPTS, TEXTS, content, gpt2, pictures, texts, unet


def test_a_plan_says_what_will_be_there(tmp_path: Path) -> None:
    capture = [{"sites": ["unet.**.attn2", "unet.mid_block"], "tokens": {"random": 0.5}}]
    harvest = pictures(capture=capture)
    shown = repr(harvest.plan())
    assert "samples   6\nunits     2 of up to 4 samples, in batches of up to 3" in shown
    store = harvest.run(tmp_path / "s")
    assert f"rows      about {store.rows:,}" in shown
    found = re.search(r"disk      about (\S+) GB", shown)
    assert found and float(found[1]) * 1e9 == pytest.approx(store.nbytes - 2 * 8 * 8192, rel=0.2)
    assert (
        "sites     8\n          3 of width 96, bfloat16, 128 rows a sample: unet.down_blocks.1."
        in shown
    )


def test_the_size_of_a_unit_follows_from_that_of_its_rows() -> None:
    harvest = texts(store={"unit": "auto", "shard_mb": 0.002}, batch={"rows": 1})
    plan = harvest.plan()
    assert plan.estimate is not None
    assert plan.unit == int(0.002 * 2**20 // plan.estimate.bytes) == 2
    assert texts(store={"unit": "auto"}).plan().unit == 4  # all there are
    assert pictures(batch={"rows": "auto", "memory": 1e6}).plan().batch == 48


def test_samples_are_prompts_times_seeds_in_their_order(tmp_path: Path) -> None:
    data = {
        "prompts": [{"prompt": each, "tag": n, "id": f"p{n}"} for n, each in enumerate(PROMPTS)]
    }
    store = pictures(data=data).run(tmp_path / "s")
    assert store.units == [0, 1] and store.manifest.complete
    tables = [store.samples(unit).to_pylist() for unit in store.units]
    assert [len(each) for each in tables] == [4, 2]
    assert [*tables[0], *tables[1]] == [
        {"id": f"p{n}", "prompt": each, "seed": seed, "tag": n}
        for n, each in enumerate(PROMPTS)
        for seed in (0, 1)
    ]
    job = store.manifest.jobs[0]
    assert job.units == (0, 2) and job.spec["seeds"] == {"start": 0, "count": 2}
    assert job.fingerprint["digest"] == job.run
    assert job.fingerprint["settings"]["sites"] == [MIDDLE]
    assert parquet.read_table(tmp_path / "s" / "index.parquet").num_rows == store.index.num_rows


def test_prompts_come_from_files(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "source": ["web"] * 4})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=1)
    store = texts(data={"file": str(tmp_path / "p.parquet")}).run(tmp_path / "s")
    assert store.samples(1).to_pylist() == [
        {"id": "3", "prompt": TEXTS[3], "seed": 0, "source": "web"}
    ]
    plain = texts().run(tmp_path / "t")
    assert torch.equal(store.read(LAYER).values, plain.read(LAYER).values)


def test_pictures_are_decoded_only_for_sites_of_the_decoder() -> None:
    assert pictures().job.settings["output_type"] == "latent"
    decoder = [{"sites": "vae.decoder.mid_block"}]
    assert "output_type" not in pictures(capture=decoder).job.settings
    own = {"num_inference_steps": 2, "output_type": "np"}
    assert pictures(pipeline=own).job.settings["output_type"] == "np"


def test_a_complete_store_is_left_as_it_is(tmp_path: Path) -> None:
    texts().run(tmp_path / "s")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "s").rglob("*") if f.name != ".lock"}
    seen: list[Any] = []
    texts().run(tmp_path / "s", progress=seen.append)
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert [(each.done, each.total) for each in seen] == [(4, 4)]


def test_progress_counts_what_is_written(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float]] = []

    def follow(event: ProgressEvent) -> None:
        if event.numbers:
            seen.append((int(event.done), event.numbers["rows"], event.numbers["bytes"]))

    store = pictures().run(tmp_path / "s", progress=follow)
    assert [each[0] for each in seen] == [3, 4, 6]
    assert seen[-1][1] == store.rows and seen[-1][2] == store.nbytes
    assert seen == sorted(seen)


def test_a_limit_stops_before_the_unit_that_goes_beyond_it(tmp_path: Path) -> None:
    whole = texts(store={"unit": 1}).run(tmp_path / "whole")
    sizes = [read_unit(whole.path / "shards" / unit_folder(unit)).bytes for unit in range(4)]
    store = texts(store={"unit": 1}).run(tmp_path / "s", limit_gb=(sum(sizes[:2]) + 10) / 1e9)
    assert store.units == [0, 1] and not store.manifest.complete
    assert store.nbytes == sum(sizes[:2])
    again = texts(store={"unit": 1}).run(tmp_path / "s", limit_gb=(sum(sizes[:2]) + 10) / 1e9)
    assert again.units == [0, 1]
    more = texts(store={"unit": 1}).run(tmp_path / "s", limit_gb=sum(sizes) / 1e9)
    assert more.units == [0, 1, 2, 3] and more.manifest.complete
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    none = texts().run(tmp_path / "none", limit_gb=1e-6)
    assert none.units == [] and none.rows == 0


def test_long_texts_are_cut(tmp_path: Path) -> None:
    count = len(gpt2().tokenizer(TEXTS[1]).input_ids)
    store = texts(max_tokens=4).run(tmp_path / "s")
    assert store.rows == sum(min(4, len(gpt2().tokenizer(each).input_ids)) for each in TEXTS)
    assert count > 4 and set(store.read(LAYER).keys["token"].to_pylist()) == {0, 1, 2, 3}
    context = texts(data={"prompts": ["a " * 300]}).run(tmp_path / "t")
    assert context.rows == 128
    assert gpt2().max_tokens is None
    with pytest.raises(InvalidInput, match="max_tokens: 500 do not fit the model, which takes 128"):
        texts(max_tokens=500).plan()
    with pytest.raises(InvalidInput, match="max_tokens: the subject is no language model"):
        pictures(max_tokens=5).plan()


def test_another_job_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    texts().run(tmp_path / "s")
    before = content(tmp_path / "s")
    text = r"s holds another harvest: settings.spec.capture was .*int8"
    with pytest.raises(InvalidInput, match=text):
        texts(capture=[{"sites": LAYER, "dtype": "int8"}]).run(tmp_path / "s")
    with pytest.raises(InvalidInput, match="settings.prompts was .*, is "):
        texts(data={"prompts": TEXTS[:3]}).run(tmp_path / "s")
    with pytest.raises(InvalidInput, match="settings.unit was 3, is 2"):
        texts(store={"unit": 2}).run(tmp_path / "s")
    other = Reader(*tiny.language_model("gpt2"))
    with torch.no_grad():
        other.subject.transformer.wte.weight[0, 0] += 1
    with pytest.raises(InvalidInput, match="weights was .*, is .*Give another folder, or delete"):
        texts(reader=other).run(tmp_path / "s")
    assert content(tmp_path / "s") == before
    texts(name="another title", store={"unit": 3, "not_finite": "keep"}).run(tmp_path / "s")


def test_a_merged_part_of_a_harvest_does_not_go_on(tmp_path: Path) -> None:
    whole = texts().run(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "shards" / unit_folder(0))  # as Ray may leave it
    merge([whole.path], tmp_path / "t")
    with pytest.raises(InvalidInput, match="t was merged from a part of this harvest, its units"):
        texts().run(tmp_path / "t")
    assert texts().run(tmp_path / "s").units == whole.units


def test_a_second_job_on_one_store_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "s"):
        with pytest.raises(InvalidInput, match="s: another process runs here"):
            texts().run(tmp_path / "s")
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_a_unit_of_another_harvest_is_not_taken_for_the_own(tmp_path: Path) -> None:
    texts(store={"unit": 1}).run(tmp_path / "other", limit_gb=1)
    own = texts(store={"unit": 1}, seeds=[7])
    one = own.run(tmp_path / "one").nbytes
    own.run(tmp_path / "s", limit_gb=0.6 * one / 1e9)
    there = tmp_path / "s" / "shards"
    free = there / unit_folder(len(list(there.glob("[0-9]*"))))
    shutil.copytree(tmp_path / "other" / "shards" / "000000", free)
    with pytest.raises(InvalidInput, match=f"{free.name} is unit 0 of another harvest"):
        own.run(tmp_path / "s")
    shutil.rmtree(free)
    shutil.copytree(there / "000000", free)
    with pytest.raises(InvalidInput, match=f"{free.name} is unit 0 of this harvest; take it away"):
        own.run(tmp_path / "s")
    shutil.rmtree(free)
    assert own.run(tmp_path / "s").nbytes == one


def test_a_model_with_another_epsilon_does_not_go_on(tmp_path: Path) -> None:
    reader = Reader(*tiny.language_model("gpt2"))
    texts(reader=reader, store={"unit": 1}).run(tmp_path / "s", limit_gb=1e-6)
    for module in reader.subject.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    with pytest.raises(InvalidInput, match="s holds another harvest: subject.modules was"):
        texts(reader=reader, store={"unit": 1}).run(tmp_path / "s")


def test_stores_that_cannot_go_on(tmp_path: Path) -> None:
    texts().run(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    whole = read_json(file)
    write_json(file, whole | {"format": 7})
    with pytest.raises(InvalidInput, match="manifest.json is of format 7, this version of dreamre"):
        texts().run(tmp_path / "s")
    write_json(file, whole | {"jobs": whole["jobs"] * 2})
    with pytest.raises(InvalidInput, match="s holds 2 harvests, so none of them goes on there"):
        texts().run(tmp_path / "s")
    file.unlink()
    with pytest.raises(InvalidInput, match="s has files, but no manifest.json that says of what"):
        texts().run(tmp_path / "s")


class Broken(Reader):
    """Puts an infinite value into one token of the text "b"."""

    def run(self, prompts: Any, **kw: Any) -> Any:
        def breaking(x: torch.Tensor, place: Any) -> torch.Tensor:
            x = x.clone()
            for row, prompt in enumerate(prompts):
                if prompt == "b":
                    x[row, -1, 3] = torch.inf
            return x

        return super().run(prompts, edits=[Edit(LAYER, breaking)], **kw)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every harvest of texts has one row that is not finite."""
    monkeypatch.setattr("dreamreader.harvest.job.Reader", Broken)


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_a_row_that_is_not_finite_is_refused(tmp_path: Path, broken: None, pool: str) -> None:
    harvest = texts(capture=[{"sites": LAYER, "pool": pool}], store={"unit": 2})
    text = (
        f"{LAYER}: a row is not finite at step 0, prompt '2', seed 0; 1 rows of unit 1 are not. "
        "store.not_finite=keep stores and counts them"
    )
    with pytest.raises(InvalidInput, match=re.escape(text)):
        harvest.run(tmp_path / "s")
    assert [each.name for each in (tmp_path / "s" / "shards").iterdir()] == ["000000"]
    kept = texts(
        capture=[{"sites": LAYER, "pool": pool}], store={"unit": 2, "not_finite": "keep"}
    ).run(tmp_path / "s")
    assert kept.manifest.complete
    assert [(each.site, each.step, each.rows) for each in kept.manifest.not_finite] == [
        (LAYER, 0, 1)
    ]
    bad = ~kept.read(LAYER).values.float().isfinite().all(1)
    assert int(bad.sum()) == 1
    assert kept.read(LAYER).keys.filter(pa.array(bad.tolist()))["prompt"].to_pylist() == ["b"]


def test_the_index_is_brought_up_to_date_on_the_way(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("dreamreader.harvest.harvest._REFRESHED", 0.0)
    seen: list[int] = []

    def look(event: ProgressEvent) -> None:
        if event.done == 4 and not seen:  # the first unit is sealed, the second one not yet
            seen.append(parquet.read_table(tmp_path / "s" / "index.parquet").num_rows)
            assert not Manifest.read(tmp_path / "s").complete
            assert Store(tmp_path / "s").units == [0]

    texts(store={"unit": 2}).run(tmp_path / "s", progress=look)
    assert len(seen) == 1 and seen[0] > 0


def test_the_subject_of_another_name_is_only_named(tmp_path: Path) -> None:
    assert pictures(reader=unet()).spec.subject.model == "shapes-unet"
    assert texts(subject="mine").run(tmp_path / "s").manifest.jobs[0].spec["subject"]["model"] == (
        "mine"
    )
