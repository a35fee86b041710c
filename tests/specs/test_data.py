"""Prompts from every source, and what is said about those that are damaged."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.specs.data import RESERVED, Item, pairs_only, read_items
from dreamreader.specs.parts import Data
from dreamreader.zoo import scenes

ROWS = [{"id": "a", "prompt": "a red circle", "tag": 1}, {"id": "b", "prompt": "ein Quadrät, blau"}]


def of(**fields: Any) -> list[Item]:
    return read_items(Data(**fields))


def file_of(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_inline_prompts() -> None:
    found = of(prompts=["a red circle", {"prompt": "a star", "id": 7, "tag": [1, 2]}])
    assert found[0] == Item("0", "a red circle")
    assert found[1] == Item("7", "a star", None, {"tag": [1, 2]})
    assert of(prompts=["a", "b", "c"], limit=2) == [Item("0", "a"), Item("1", "b")]


def test_pairs_under_each_of_their_names() -> None:
    expected = [Item("0", "a", "b", {"answer": "x"})]
    assert of(pairs=[{"source": "a", "target": "b", "answer": "x"}]) == expected
    assert of(pairs=[{"corrupted": "a", "clean": "b", "answer": "x"}]) == expected
    assert of(prompts=[{"prompt": "a", "target": "b", "answer": "x"}]) == expected


def test_text_csv_jsonl_and_parquet_give_the_same_items(tmp_path: Path) -> None:
    text = file_of(tmp_path / "p.txt", "a red circle\n\n  ein Quadrät, blau  \n")
    assert [item.prompt for item in of(file=text)] == [row["prompt"] for row in ROWS]
    table = file_of(tmp_path / "p.csv", '\ufeffid,prompt\na,a red circle\nb,"ein Quadrät, blau"\n')
    expected = [Item(row["id"], row["prompt"]) for row in ROWS]
    assert of(file=table) == expected
    lines = '{"id": "a", "prompt": "a red circle"}\n\n{"prompt": "ein Quadrät, blau", "id": "b"}\n'
    assert of(file=file_of(tmp_path / "p.jsonl", lines)) == expected
    assert of(file=file_of(tmp_path / "q.jsonl", '"a"\n"b"'))[1] == Item("1", "b")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    found = of(file=str(tmp_path / "p.parquet"))
    assert found[0].columns == {"tag": 1} and [i.prompt for i in found] == [
        row["prompt"] for row in ROWS
    ]


def test_scenes_are_different_captions_that_training_shows() -> None:
    found = of(scenes={"count": 30, "source": {"color": "red"}})
    assert len({item.prompt for item in found}) == 30
    assert all(item.columns["source_color"] == "red" and "red" in item.prompt for item in found)
    shown = {(item.columns["source_color"], item.columns["source_shape"]) for item in found}
    assert not shown & set(scenes.HELD_OUT_PAIRS)
    assert of(scenes={"count": 30, "source": {"color": "red"}}) == found
    assert of(scenes={"count": 30, "source": {"color": "red"}, "seed": 1}) != found


def test_scenes_as_pairs_differ_in_what_is_asked_for() -> None:
    pair = {"source": {"color": "red"}, "target": {"color": "blue"}, "unsaid": ["size"]}
    for item in of(scenes={"count": 60, **pair}):
        shown = item.columns["target_color"], item.columns["target_shape"]
        assert shown not in scenes.HELD_OUT_PAIRS
        assert item.target == item.prompt.replace("red", "blue") != item.prompt
        assert item.columns["source"] == "red" and item.columns["target"] == "blue"
        assert item.columns["source_size"] not in item.prompt.split()
        for name in ("shape", "size", "place", "background", "frame"):
            assert item.columns[f"source_{name}"] == item.columns[f"target_{name}"]


@pytest.mark.parametrize(
    "wanted, text",
    [
        ({"source": {"colour": "red"}}, "unknown attribute of scenes 'colour'; nearest: color"),
        ({"target": {"color": "rde"}}, "unknown color of scenes 'rde'; nearest: red"),
    ],
)
def test_unknown_scenes(wanted: dict[str, Any], text: str) -> None:
    with pytest.raises(UnknownName, match=text):
        of(scenes={"count": 1, **wanted})


def test_sets_of_one_draw_share_no_scene() -> None:
    whole = of(scenes={"count": 7, "seed": 3})
    parts = [*of(scenes={"count": 4, "seed": 3}), *of(scenes={"count": 3, "seed": 3, "skip": 4})]
    assert [each.prompt for each in parts] == [each.prompt for each in whole]


def test_more_scenes_than_there_are() -> None:
    with pytest.raises(InvalidInput, match=r"data.scenes: 10000000 are asked for, there are \d+"):
        of(scenes={"count": 10_000_000})


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"prompts": ["a", " "]}, "data.prompts.1: prompt must be text, got ' '"),
        (
            {"prompts": [{"text": "a"}]},
            "data.prompts.0: needs a column source or prompt or corrupted, has text",
        ),
        ({"prompts": [{"prompt": 3}]}, "data.prompts.0: prompt must be text, got 3"),
        ({"pairs": [{"source": "a", "target": ""}]}, "data.pairs.0: target must be text, got ''"),
        (
            {"prompts": [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}]},
            "data: id '1' is that of entry 0 and of entry 1",
        ),
        (
            {"prompts": ["a", {"prompt": "b", "id": 0}]},
            "data: id '0' is that of entry 0 and of entry 1",
        ),
        (
            {"prompts": [{"prompt": "a", "source": "red", "target": "blue"}]},
            "data.prompts.0: source and prompt both name the prompt; rename one of the columns",
        ),
        (
            {"pairs": [{"source": "a", "target": "b", "clean": "c"}]},
            "data.pairs.0: target and clean both name the prompt",
        ),
    ],
)
def test_data_that_cannot_be_right(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput) as error:
        of(**fields)
    assert str(error.value).startswith(text)


def test_a_column_has_one_kind_of_values() -> None:
    rows = [{"prompt": "a", "tag": 1}, {"prompt": "b", "tag": None}, {"prompt": "c", "tag": 0.5}]
    assert len(of(prompts=rows)) == 3
    text = "data: the column 'tag' holds numbers, but str in entry '3'; a column has one kind"
    with pytest.raises(InvalidInput, match=text):
        of(prompts=[*rows, {"prompt": "d", "tag": "x"}])


@pytest.mark.parametrize("name", sorted(set(RESERVED) - {"prompt"}))
def test_a_reserved_column(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"data.prompts.0: the column '{name}' is made by the"):
        of(prompts=[{"prompt": "a", name: 1}])


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("p.txt", "\n \n", "data: there are no prompts"),
        ("p.csv", "prompt,tag\n", "data: there are no prompts"),
        (
            "p.csv",
            "promt\na\n",
            "{path}:2: needs a column source or prompt or corrupted, has promt",
        ),
        ("p.csv", 'prompt,tag\n"a\nb",1\n,2\n', "{path}:4: prompt must be text, got ''"),
        ("p.csv", "prompt,tag\na, big, one,1\n", "{path}:2: 2 more values than columns; a value"),
        ("p.csv", 'prompt\n"a', "{path}:2: no CSV: "),
        ("p.csv", "prompt\nk\xe4se\n".encode("latin-1"), "{path}: no UTF-8 text"),
        ("p.txt", b"\xff\xfe\x00", "{path}: no UTF-8 text"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "{path}:2: no JSON: "),
        ("p.jsonl", "[1]\n", "{path}:1: an object or a text expected, got [1]"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "{path}:3: needs a column source or pr"),
        ("p.jsonl", '{"prompt": "a", "seed": 1}', "{path}:1: the column 'seed' is made by the run"),
        ("p.parquet", b"PAR1 and no more", "{path}: no whole Parquet file: "),
        ("p.parquet", b"", "{path}: no whole Parquet file: "),
        ("p.xlsx", b"", "data.file: {path} ends in '.xlsx'; known: .txt .csv .jsonl .parquet"),
    ],
)
def test_a_file_that_cannot_be_right(tmp_path: Path, name, content, text) -> None:
    path = tmp_path / name
    with pytest.raises(InvalidInput) as error:
        of(file=file_of(path, content))
    assert str(error.value).startswith(text.format(path=path))


def test_a_parquet_file_that_was_cut_short_or_lacks_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), path)
    with pytest.raises(InvalidInput, match="p.parquet: row 1: prompt must be text, got None"):
        of(file=str(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match="p.parquet: no whole Parquet file"):
        of(file=str(path))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="data.file: .*/none.csv does not exist"):
        of(file=str(tmp_path / "none.csv"))


def test_data_without_pairs_is_refused_where_they_are_needed() -> None:
    pairs_only(of(pairs=[{"source": "a", "target": "b"}]), "data")
    with pytest.raises(InvalidInput, match="method.fit: entry 'x' has no target prompt; give pair"):
        pairs_only(of(prompts=[{"prompt": "a", "id": "x"}]), "method.fit")


def test_an_integer_that_no_column_holds() -> None:
    with pytest.raises(InvalidInput, match="data.prompts.0: n is beyond 64 bits"):
        of(prompts=[{"prompt": "a", "n": 2**70}])
