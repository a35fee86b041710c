"""Every Python block of README and docs runs, in order, page by page; links and commands exist."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SKIPPED = "# not run:"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line of its first line, text) of the blocks in a language."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in BLOCK.finditer(text)
        if match[1] == language
    ]


@each_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        if text.startswith(SKIPPED):
            continue
        source = "\n" * (line - 1) + text  # a traceback names the line of the page
        exec(compile(source, str(page), "exec"), names)


@each_page
def test_commands_exist(page: Path) -> None:
    from typer.main import get_command

    from dreamreader.cli.app import app

    root = get_command(app)
    text = page.read_text()
    spoken = re.findall(r"`dreamreader\s+([a-z][^`]*)`", text)
    typed = [line for _, block in blocks(page, "bash") for line in block.splitlines()]
    typed = [match[1] for line in typed if (match := re.search(r"dreamreader (\w.*)$", line))]
    for words in map(str.split, spoken + typed):
        command = root
        while words and hasattr(command, "commands"):
            offered = words[0].split("|")
            assert set(offered) <= set(command.commands), f"{page.name}: dreamreader {words}"
            command, words = command.commands[offered[0]], words[1:]
        known = {name for each in command.params for name in each.opts}
        asked = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
        assert asked <= known | {"--help"}, f"{page.name}: {asked - known}"


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_results_of_the_examples_are_those_that_were_measured(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import examples

    found = json.loads((examples.RESULTS / "examples-cpu.json").read_text())["specs"]
    assert set(found) == {spec.stem for spec in (ROOT / "examples").glob("*.yaml")}
    text = examples.PAGE.read_text()
    assert text == examples.page(text, found)
