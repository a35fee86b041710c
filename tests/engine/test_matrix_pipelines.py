"""The engine against plain hooks on every pipeline class that builds small.

A part of the classes by default, another one each day; all of them with `pytest -m matrix`.
"""

import datetime

import pytest

from .matrix_check import Verdict, check
from .matrix_pipelines import LINES, Line

PARTS = 4
_GRADES = ["wrong", "refused", "right"]
_verdicts: dict[str, Verdict] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "line" in metafunc.fixturenames:
        whole = "matrix" in (metafunc.config.getoption("-m") or "")
        part = datetime.date.today().toordinal() % PARTS
        chosen = [each for n, each in enumerate(LINES) if whole or n % PARTS == part]
        metafunc.parametrize(
            "line", chosen, ids=[f"{e.name}-{e.parts or e.family}" for e in chosen]
        )


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # those of many classes of diffusers, at their own calls
def test_engine_agrees_with_hooks(line: Line) -> None:
    verdict = check(line.build(), line.call_arguments(), line.all_sites, line.names, line.unused)
    _verdicts[f"{line.name}-{line.parts}"] = verdict
    said = "\n".join(verdict.reasons)
    assert _GRADES.index(verdict.outcome) >= _GRADES.index(line.expected), said


@pytest.mark.matrix
def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {grade: 0 for grade in reversed(_GRADES)}
    for verdict in _verdicts.values():
        counts[verdict.outcome] += 1
    with capsys.disabled():
        listed = ", ".join(f"{count} {grade}" for grade, count in counts.items())
        print(f"\n{len(_verdicts)} of {len(LINES)} pipelines: {listed}")
    expected = sum(each.expected == "wrong" for each in LINES)
    assert counts["wrong"] <= expected


def test_a_class_stands_once_with_the_same_parts() -> None:
    named = [(each.name, each.parts) for each in LINES]
    assert len(set(named)) == len(named)
    assert len({name for name, _ in named}) >= 60
