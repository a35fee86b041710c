"""Prompts are counted once and read from any place on; nothing but places stays in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from dreamreader.errors import InvalidInput
from dreamreader.harvest import prompts
from dreamreader.harvest.prompts import Prompts
from dreamreader.specs.parts import Data

COUNT = 37


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": f'prompt {n}, "quoted"\nin two lines', "tag": n, "id": f"i{n}"}
        for n in range(COUNT)
    ]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"p.{kind}"
    if kind == "txt":
        path.write_bytes(
            b"\xef\xbb\xbf" + "".join(f"prompt ä{n}\n\n" for n in range(COUNT)).encode()
        )
    elif kind == "csv":
        quoted = [str(row["prompt"]).replace('"', '""') for row in rows()]
        lines = [f'i{n},"{text}",{n}\n' for n, text in enumerate(quoted)]
        path.write_text("\ufeffid,prompt,tag\n" + "".join(lines), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows()))
    else:
        table = pa.Table.from_pylist(rows())
        parquet.write_table(table, path, row_group_size=5)
    return path


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are noted every four prompts."""
    monkeypatch.setattr(prompts, "_APART", 4)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_prompts_are_read_from_any_place_on(tmp_path: Path, near: None, kind: str) -> None:
    found = Prompts(Data(file=str(written(tmp_path, kind))))
    assert found.count == COUNT
    whole = found.read(0, COUNT)
    assert len({item.prompt for item in whole}) == COUNT
    if kind != "txt":
        assert [(item.prompt, item.id) for item in whole] == [
            (row["prompt"], row["id"]) for row in rows()
        ]
    for start in (36, 0, 17, 18, 4, 35, 5, 10, 9):  # there and back, from noted places and between
        assert found.read(start, start + 3) == whole[start : start + 3]
    assert len(found._places) == (8 if kind == "parquet" else 10)
    found.close()


def test_the_same_prompts_have_the_same_digest_in_every_kind_of_file(tmp_path: Path) -> None:
    found = [Prompts(Data(file=str(written(tmp_path, kind)))) for kind in ("jsonl", "parquet")]
    assert found[0].digest == found[1].digest == Prompts(Data(prompts=rows())).digest
    changed = rows()
    changed[20]["tag"] = 7
    assert Prompts(Data(prompts=changed)).digest != found[0].digest
    limited = Prompts(Data(file=str(tmp_path / "p.jsonl"), limit=5))
    assert limited.count == 5 and len(limited.read(3, 9)) == 2


def test_further_columns_have_one_type_in_every_table(tmp_path: Path) -> None:
    data: list[dict[str, Any] | str] = [
        {"prompt": "a", "n": 1, "x": 1, "s": "t", "deep": {"k": [1]}, "none": None, "b": True},
        {"text": "b", "x": 0.5},
    ]
    found = Prompts(Data(prompts=data))
    tables = [found.table(found.read(n, n + 1), [n]) for n in (0, 1)]
    assert tables[0].schema == tables[1].schema
    assert tables[0].schema.field("x").type == pa.float64()
    assert pa.concat_tables(tables).to_pylist() == [
        {
            **{"id": "0", "prompt": "a", "seed": 0, "n": 1, "x": 1.0, "s": "t"},
            **{"deep": '{"k": [1]}', "none": None, "b": True},
        },
        {
            **{"id": "1", "prompt": "b", "seed": 1, "n": None, "x": 0.5, "s": None},
            **{"deep": None, "none": None, "b": None},
        },
    ]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("p.txt", "\n\n", "data: there are no prompts"),
        ("p.txt", b"fine\n\xff\n", "{path}: no UTF-8 text (invalid start byte in line 2)"),
        ("p.csv", 'prompt,tag\n"a\nb",1\n,2\n', "{path}:4: prompt must be text, got ''"),
        ("p.csv", "prompt,tag\na,1\nb, c,1,2\n", "{path}:3: 2 more values than columns"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "{path}:2: no JSON: "),
        (
            "p.jsonl",
            '{"text": "a"}\n{"txt": "b", "n": 1}\n',
            "{path}:2: needs a column prompt or text, has",
        ),
        ("p.jsonl", '{"text": "a"}\n\n{"text": "  "}\n', "{path}:3: prompt must be text, got '  '"),
        ("p.jsonl", '{"prompt": "a", "text": "b"}', "{path}:1: prompt and text both name the"),
        ("p.jsonl", '{"prompt": "a", "seed": 1}', "{path}:1: the column 'seed' is made by the run"),
        (
            "p.jsonl",
            '{"prompt": "a", "t": 1}\n{"prompt": "a", "t": "x"}',
            "{path}:2: the column 't' holds str, but int in rows before",
        ),
        ("p.parquet", b"PAR1", "{path}: no whole Parquet file: "),
        ("p.csv", "id,prompt\na,x\nb,y\na,z\n", "{path}:4: {path}:2 has the id 'a' too"),
        ("p.jsonl", '"x"\n"y"\n{"prompt": "z", "id": 1}', "{path}:3: {path}:2 has the id '1' too"),
        ("p.csv", "prompt,prompt\na,b\n", "{path}: the column 'prompt' is there twice"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "{path}:1: no JSON that is read here: 'pro"),
        ("p.jsonl", '{"prompt": "a", "n": 18446744073709551616}', "{path}:1: no JSON that is read"),
        (
            "p.jsonl",
            '{"prompt": "\\ud800"}',
            "{path}:1: no JSON that is read here: this is no text",
        ),
        ("p.jsonl", "[" * 100_000, "{path}:1: no JSON that is read here: values stand more than"),
        (
            "p.jsonl",
            '{"prompt": "a", "n": 9007199254740993}\n{"prompt": "b", "n": 0.5}',
            "{path}:2: the column 'n' holds fractions and an integer beyond 2**53",
        ),
    ],
)
def test_a_file_that_cannot_be_right(tmp_path: Path, name: str, content: Any, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InvalidInput) as error:
        Prompts(Data(file=str(path)))
    assert str(error.value).startswith(text.format(path=path))


def test_ids_of_inline_prompts_are_unique() -> None:
    with pytest.raises(InvalidInput, match="data.prompts.1: an earlier entry has the id '0'"):
        Prompts(Data(prompts=["a", {"prompt": "b", "id": 0}]))


def test_only_the_ids_that_are_read_have_to_differ(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("id,prompt\na,x\nb,y\na,z\n")
    assert Prompts(Data(file=str(path), limit=2)).count == 2


def test_a_column_that_parquet_has_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(InvalidInput, match="the column 'prompt' is there twice"):
        Prompts(Data(file=str(tmp_path / "p.parquet")))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl")
    found = Prompts(Data(file=str(path)))
    found.read(0, 2)
    with path.open("a") as file:
        file.write('{"prompt": "more"}\n')
    with pytest.raises(InvalidInput, match="p.jsonl was changed while its prompts were read"):
        found.read(2, 4)


_SCRIPT = """
import sys
from dreamreader.harvest.prompts import Prompts
from dreamreader.specs.parts import Data

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

small = Prompts(Data(file=sys.argv[1], limit=1000))
small.read(0, 10)
before = peak()
large = Prompts(Data(file=sys.argv[1]))
assert large.read(large.count - 2, large.count)[1].id == str(large.count - 1), large.count
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("".join(f"a prompt with some words in it, number {n}\n" for n in range(60_000)))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert int(done.stdout) < 1024  # KiB; as items in memory they take 30 MiB
