"""The README's figures are those of the committed results."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_speed_table_is_that_of_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == report().written(readme), "run: python benchmarks/report.py --write"


def test_every_result_names_its_device_versions_and_commit() -> None:
    module = report()
    for result in module.found("*.json"):
        where = result["environment"]
        assert where["device"] and where["versions"]["torch"] and where["commit"] != "unknown"
