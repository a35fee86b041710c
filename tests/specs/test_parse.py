"""Texts that are no values, or mean more than they show, are refused with their place."""

import re
import time
from typing import Any

import pytest

from dreamreader.errors import InvalidInput
from dreamreader.specs.load import load_spec
from dreamreader.specs.parse import parse_json, parse_yaml
from dreamreader.specs.parts import Batch

_TENFOLD = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
_CHAIN = ["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 300))]


def test_plain_values() -> None:
    text = "a: &x [1, 2.5, yes, null, 2001-02-03]\nb: *x\nc: {d: 'e: f'}\n"
    value, root = parse_yaml(text, "f")
    assert value["a"] == value["b"] and value["a"][:4] == [1, 2.5, True, None]
    assert value["c"] == {"d": "e: f"} and root is not None
    assert parse_yaml("", "f") == (None, None)
    assert parse_json(b'{"a": [1, -9223372036854775808, "\xc3\xa4"]}', "f") == {
        "a": [1, -(2**63), "ä"]
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [*x]", "f:1: no YAML: an alias stands within what it stands for"),
        ("a: &x {b: *x}", "f:1: no YAML: an alias stands within what it stands for"),
        ("a: &x {<<: *x}", "f:1: no YAML: an alias stands within what it stands for"),
        ("[" * 3000 + "]" * 3000, "f:1: no YAML: values stand more than 64 deep"),
        ("\n".join(" " * n + "a:" for n in range(1500)), "f:64: no YAML: values stand more than"),
        ("\n".join(_CHAIN), "f:64: no YAML: values stand more than 64 deep"),
        ("\n".join(["a0: &a0 [1]", *_TENFOLD]), "f:7: no YAML: its aliases stand for more than"),
        ("b: 1\na: 2001-99-99", "f:2: no YAML: '2001-99-99' is no timestamp"),
        ("a: !!int abc", "f:1: no YAML: 'abc' is no int"),
        ("a: !!float abc", "f:1: no YAML: 'abc' is no float"),
        ("a: !!bool abc", "f:1: no YAML: 'abc' is no bool"),
        ("a: !!timestamp abc", "f:1: no YAML: 'abc' is no timestamp"),
        ("a: " + "9" * 5000, "f:1: no YAML: '999"),
        ("a: 36893488147419103232", "f:1: no YAML: an integer beyond 64 bits"),
        ('a: "\\ud800"', "f:1: no YAML: this is no text: character 0"),
        ("a: !!python/object/apply:os.system [x]", "f:1: no YAML: could not determine a construc"),
        ("a: \x01", "f: no YAML: unacceptable character"),
        ("{[1]: 2}", "f:1: no YAML: found unhashable key"),
        ("--- 1\n--- 2", "f:2: no YAML: but found another document"),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    start = time.process_time()
    with pytest.raises(InvalidInput) as error:
        parse_yaml(text, "f")
    assert str(error.value).startswith(said)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "f: no JSON that is read here: values stand more than 64 deep"),
        ("[" * 70 + "]" * 70, "f: no JSON that is read here: values stand more than 64 deep"),
        ('{"a": 1, "a": 2}', "f: no JSON that is read here: 'a' is given twice"),
        ("9" * 5000, "f: no JSON that is read here: an integer beyond 64 bits"),
        ('{"a": 9223372036854775808}', "f: no JSON that is read here: an integer beyond 64 bits"),
        ('{"\\ud800": 1}', "f: no JSON that is read here: this is no text"),
        (b"\xff", "f: no JSON that is read here: 'utf-8' codec"),
        ('{"a":\n\n}', "f: no JSON: Expecting value in line 3"),
    ],
)
def test_json_that_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_json(text, "f")
    assert str(error.value).startswith(said)


def test_a_spec_says_file_and_line(tmp_path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("rows: 1\nmemory: &x [*x]\n")
    with pytest.raises(InvalidInput, match="s.yaml:2: no YAML: an alias stands within"):
        load_spec(Batch, file)
    file.write_text("rows: 1\n")
    with pytest.raises(InvalidInput, match="override 'rows=\\[': the value is no YAML: "):
        load_spec(Batch, file, ["rows=["])


@pytest.mark.parametrize("text", ["010", "-010", "007", "0_7", "1:30", "1:30:00.5"])
def test_numbers_that_yaml_reads_as_others_are_refused(text: str):
    with pytest.raises(InvalidInput, match=re.escape(f"f:1: no YAML: {text} is read as another")):
        parse_yaml(f"x: {text}", "f")


@pytest.mark.parametrize("text, value", [("0", 0), ("0x10", 16), ("08", "08"), ("0.5", 0.5)])
def test_other_numbers_are_what_they_were(text: str, value: Any):
    assert parse_yaml(f"x: {text}", "f")[0] == {"x": value}
    assert parse_yaml(f"x: '{text}'", "f")[0] == {"x": text}
