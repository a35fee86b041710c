"""Spec files: what they become, and what is said about those that cannot be right."""

from pathlib import Path

import pytest

from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment, check_spec, load_spec

SEEDS = "seeds: {count: 2}"
GOOD = """\
name: half the middle
subject: shapes-unet
data:
  prompts:
    - a red circle
    - {prompt: a blue square, id: blue}
seeds: {count: 2}
pipeline: {num_inference_steps: 2}
method:
  kind: edit
  edits:
    - {kind: scale, site: unet.mid_block, factor: $factor}
  sweep:
    factor: [1, 0.5]
metrics: [detector, {tint: {source: red, target: blue}}]
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


def refused(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(InvalidInput) as error:
        load_spec(path, overrides)
    return str(error.value).replace(f"{path.parent}/", "").splitlines()


def test_a_spec_has_its_values_and_defaults(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, GOOD))
    assert spec.subject.model == "shapes-unet" and spec.subject.dtype == "float32"
    assert list(spec.seed_list) == [0, 1] and spec.batch.rows == "auto"
    assert spec.method.kind == "edit" and spec.save.images
    assert check_spec(spec.model_dump(mode="json")) == spec


def test_the_same_spec_as_an_object(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, GOOD))
    fields = spec.model_dump(mode="json")
    metrics = fields.pop("metrics")
    assert Experiment(**fields, metrics=metrics).spec == spec
    with pytest.raises(InvalidInput, match="Experiment: sedes: unknown field; nearest: seeds"):
        Experiment(**fields, sedes=3)


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (SEEDS, "sedes: 2", "spec.yaml:7: sedes: unknown field; nearest: seeds"),
        ("prompts:", "promts:", "spec.yaml:4: data.promts: unknown field; nearest: prompts"),
        (
            "factor: $factor}",
            "factr: $factor}",
            "spec.yaml:12: method.edits.0.factr: unknown field; nearest: factor",
        ),
        (
            "kind: edit",
            "kind: edti",
            "spec.yaml:9: method: unknown kind 'edti'; nearest: edit, reft, stitch; all: edit, "
            "steer, reft, guide, patch, ablate, windows, lens, heatmap",
        ),
        ("kind: edit", "stepz: 3", "spec.yaml:9: method: kind is missing: it says which one"),
        (
            "kind: scale",
            "kind: scael",
            "spec.yaml:12: method.edits.0: unknown kind 'scael'; nearest: scale",
        ),
        (
            "num_inference_steps: 2}",
            "num_inference_steps: 2}\nbatch: {rows: many}",
            "spec.yaml:9: batch.rows: input should be a valid integer, unable to parse string as "
            "an integer, got 'many'; or input should be 'auto', got 'many'",
        ),
        (
            SEEDS,
            "seeds: [1, -1]",
            "spec.yaml:7: seeds.1: input should be greater than or eq",
        ),
        (SEEDS, "seeds: [1, 2, 1]", "spec.yaml:7: seeds: seed 1 is there twice"),
        (SEEDS, "seeds: []", "spec.yaml:7: seeds: list should have at least 1 item"),
        (
            SEEDS,
            "seeds: {from: 2}",
            "spec.yaml:7: seeds.from: unknown field; nearest: start",
        ),
        ("name: half the middle\n", "", "spec.yaml:1: name: field required"),
        (
            "data:\n",
            "data:\n  file: x.csv\n",
            "spec.yaml:3: data: give exactly one of prompts, pairs, file and scenes, got "
            "['prompts', 'file']",
        ),
        ("[1, 0.5]", "[]", "spec.yaml:9: method: sweep.factor is empty"),
        ("factor: [1", "facter: [1", "spec.yaml:9: method: $factor is in an edit, but sweep has n"),
        ("[1, 0.5]", "[1, 2]\n    more: [3]", "spec.yaml:9: method: sweep.more: no edit has $more"),
        ("[1, 0.5]", "[1, 1]", "spec.yaml:9: method: sweep.factor has a value twice"),
        ("factor: $factor}", "factor: twice}", "spec.yaml:12: method.edits.0.factor: "),
        ("metrics: [", "metrics: [{a: , b: }, ", "spec.yaml:15: metrics: a metric is a name, or"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, old, new, expected) -> None:
    assert old in GOOD
    lines = refused(written(tmp_path, GOOD.replace(old, new, 1)))
    assert any(line.startswith(expected) for line in lines), lines


def test_an_axis_cannot_have_the_name_of_a_column(tmp_path: Path) -> None:
    text = GOOD.replace("$factor", "$seed").replace("factor: [", "seed: [")
    [line] = refused(written(tmp_path, text))
    assert line.startswith("spec.yaml:9: method: sweep.seed: every row has a column seed")


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    text = GOOD.replace(SEEDS, "sedes: 2").replace("kind: scale", "kind: scael")
    lines = refused(written(tmp_path, text.replace("name: half the middle", "name: 5")))
    assert [line.split(": ")[:2] for line in lines] == [
        ["spec.yaml:1", "name"],
        ["spec.yaml:12", "method.edits.0"],
        ["spec.yaml:7", "sedes"],
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        (SEEDS, "spec.yaml:8: seeds is given twice, first in line 7"),
        ("data: {}", "spec.yaml:8: data is given twice, first in line 3"),
    ],
)
def test_a_key_that_is_given_twice(tmp_path: Path, text: str, expected: str) -> None:
    assert refused(written(tmp_path, GOOD.replace(SEEDS, f"{SEEDS}\n{text}"))) == [expected]


def test_a_nested_key_that_is_given_twice(tmp_path: Path) -> None:
    text = GOOD.replace("factor: $factor}", "factor: $factor, factor: 2}")
    [line] = refused(written(tmp_path, text))
    assert line == "spec.yaml:12: method.edits.0.factor is given twice, first in line 12"


def test_files_that_are_no_specs(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="none.yaml: no such spec file"):
        load_spec(tmp_path / "none.yaml")
    assert refused(written(tmp_path, "a: [1\nb: 2"))[0].startswith("spec.yaml:2: no YAML: ")
    assert refused(written(tmp_path, "- a")) == ["spec.yaml: a spec is a mapping, got list"]
    assert refused(written(tmp_path, "")) == ["spec.yaml: a spec is a mapping, got NoneType"]
    path = tmp_path / "spec.yaml"
    path.write_bytes(GOOD.replace("circle", "kreisförmig").encode("latin-1"))
    assert refused(path)[0].startswith("spec.yaml: no UTF-8 text")


def test_a_spec_runs_no_code(tmp_path: Path) -> None:
    text = GOOD.replace("half the middle", f"!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert refused(written(tmp_path, text))[0].startswith("spec.yaml:1: no YAML: ")
    assert not (tmp_path / "made").exists()


def test_overrides_set_values_in_mappings_and_lists(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    spec = load_spec(
        path,
        [
            "seeds=[3, 4]",
            "data.prompts.1.id=other",
            "method.sweep.factor=[0]",
            "method.edits.0.site=unet.**.attn2",
            "batch.rows=3",
            "subject.device=cpu",
            "subject.model=shapes-dit",
        ],
    )
    assert list(spec.seed_list) == [3, 4] and spec.batch.rows == 3
    assert spec.subject.model == "shapes-dit"
    fields = spec.model_dump()
    assert fields["data"]["prompts"][1] == {"prompt": "a blue square", "id": "other"}
    assert fields["method"]["edits"][0]["site"] == "unet.**.attn2"
    assert fields["method"]["sweep"] == {"factor": [0]}


@pytest.mark.parametrize(
    "override, expected",
    [
        ("seeds", "override 'seeds': write key=value, for example seeds.count=4"),
        ("=4", "override '=4': write key=value, for example seeds.count=4"),
        ("sedes=4", "override 'sedes=4': sedes: unknown field; nearest: seeds"),
        ("methd.kind=edit", "override 'methd.kind=edit': methd: unknown field; nearest: method"),
        ("batch.row=4", "override 'batch.row=4': batch.row: unknown field; nearest: rows"),
        ("seeds=many", "override 'seeds=many': seeds: "),
        ("data.prompts.2=x", "override 'data.prompts.2=x': 2 is no entry of a list of 2"),
        ("data.prompts.x=x", "override 'data.prompts.x=x': x is no entry of a list of 2"),
        ("seeds=[1", "override 'seeds=[1': the value is no YAML"),
    ],
)
def test_overrides_that_cannot_be_right(tmp_path, override, expected) -> None:
    lines = refused(written(tmp_path, GOOD), (override,))
    assert any(line.startswith(expected) for line in lines), lines


def test_an_override_below_a_plain_value_keeps_what_that_stands_for(tmp_path: Path) -> None:
    spec = load_spec(
        written(tmp_path, GOOD),
        [
            "subject.device=cuda",
            "subject.dtype=bfloat16",
            "seeds.start=10",
            "data.prompts.0.id=first",
            "data.prompts.1.prompt=a star",
            "metrics.0.detector.target=red",
        ],
    ).model_dump()
    subject = {"model": "shapes-unet", "device": "cuda", "dtype": "bfloat16", "adapter": None}
    assert spec["subject"] == subject
    assert spec["seeds"] == {"start": 10, "count": 2}
    assert spec["data"]["prompts"][0] == {"prompt": "a red circle", "id": "first"}
    assert spec["data"]["prompts"][1] == {"prompt": "a star", "id": "blue"}
    assert spec["metrics"][0] == {"detector": {"target": "red"}}


def test_an_override_below_a_value_without_parts_is_refused(tmp_path: Path) -> None:
    lines = refused(written(tmp_path, GOOD), ("name.first=x",))
    assert "name is 'half the middle', which has no first; give name as a whole" in lines[0]


def test_files_are_meant_from_the_folder_of_the_spec(tmp_path: Path) -> None:
    text = GOOD.replace(
        "factor: $factor}",
        "factor: 1}\n"
        "    - {kind: steer, site: unet, direction: {file: d.safetensors}, alpha: $factor}",
    )
    start, rest = text.split("  prompts:")
    text = f"{start}  file: prompts.txt\nseeds:{rest.split('seeds:')[1]}"
    spec = load_spec(written(tmp_path, text)).model_dump()
    assert spec["data"]["file"] == str(tmp_path / "prompts.txt")
    assert spec["method"]["edits"][1]["direction"]["file"] == str(tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (SEEDS, "seeds: '4'", "spec.yaml:7: seeds: seeds are whole numbers from 0 on without"),
        (SEEDS, "seeds: [a, 1]", "spec.yaml:7: seeds: seeds are whole numbers from 0 on without"),
        (SEEDS, "seeds: ['4']", "spec.yaml:7: seeds: seeds are whole numbers from 0 on without"),
        (SEEDS, "seeds: [1.5]", "spec.yaml:7: seeds: seeds are whole numbers from 0 on without"),
        (SEEDS, "seeds: {count: '4'}", "spec.yaml:7: seeds: count is a whole number without"),
        (SEEDS, "seeds: 4", "spec.yaml:7: seeds: 4 could be one seed or a number of seeds: write"),
        (SEEDS, "seeds: 4", "write [4] for the seed 4, {count: 4} for the seeds from 0 on"),
        (SEEDS, "seeds: [yes]", "seeds: no truth value is taken here (YAML reads yes, no, on, off"),
        ("factor: $factor", "factor: yes", "factor: no truth value is taken here"),
        (SEEDS, "seeds: {count: 010}", "spec.yaml:7: no YAML: 010 is read as another number"),
        ("factor: $factor", "factor: 010", "or as a text in quotes (field method.edits.0.factor)"),
        ("factor: $factor", "factor: '010'", "'010' is no plain number: write it without"),
    ],
)
def test_numbers_that_could_be_others(tmp_path: Path, old: str, new: str, text: str) -> None:
    with pytest.raises(InvalidInput) as error:
        load_spec(written(tmp_path, GOOD.replace(old, new)))
    assert text in str(error.value)
