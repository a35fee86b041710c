"""The lowest versions: the same in pyproject.toml, in what is tested, and in what is said."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    given = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: Version(str(each.specifier).removeprefix("==")) for each in given}


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_the_bound_is_the_lowest_version_that_is_tested(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {each.name: each for each in map(Requirement, project["dependencies"])}
    lowest, pinned = pins("constraints-lowest.txt")[package], pins("constraints.txt")[package]
    assert str(required[package].specifier) == f">={lowest.major}.{lowest.minor}"
    assert lowest.micro == 0 and lowest < pinned
    for page in ("README.md", "CONTRIBUTING.md"):
        said = re.findall(rf"{package} (\d+\.\d+)", (ROOT / page).read_text())
        assert f"{lowest.major}.{lowest.minor}" in said, page


def test_hints_to_install_name_what_exists() -> None:
    texts = [*(ROOT / "dreamreader").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
    for file in (*texts, ROOT / "README.md"):
        assert not re.search(r"pip install [^`&\n]*dreamreader", file.read_text()), file
