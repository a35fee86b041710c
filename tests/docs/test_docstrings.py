"""Every example of a docstring gives what it says, in a folder with what the examples are about."""

import doctest
import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import dreamreader
from dreamreader import Record
from dreamreader.report import Curves, Section, Series
from dreamreader.sweep import grid

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ROOT = Path(__file__).parents[2]


def docstrings() -> Iterator[doctest.DocTest]:
    """Those with an example, of all modules."""
    finder = doctest.DocTestFinder()
    for info in pkgutil.walk_packages(dreamreader.__path__, "dreamreader."):
        if info.name.startswith(
            ("dreamreader._C", "dreamreader.triton_kernels", "dreamreader.__m")
        ):
            continue
        module = importlib.import_module(info.name)
        yield from (each for each in finder.find(module, info.name) if each.examples)


EXAMPLES = {each.name: each for each in docstrings()}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples take for granted, where their module does not say what it is."""
    reader = dreamreader.load("shapes-unet")
    prompts, mid = ["a red circle", "a blue circle"], Record("unet.mid_block", branch="cond")
    _, cache = reader.run_with_cache(prompts, sites=mid, seeds=0, num_inference_steps=2)
    (site,) = cache
    return {
        "dreamreader": dreamreader,
        "torch": torch,
        "grid": grid,
        "reader": reader,
        "cache": cache,
        "site": site,
        "picture": Image.new("RGB", (4, 4)),
        "curves": Curves("Redness", [Series("red", [0.0, 1.0], [0.2, 0.8])], "step"),
        "Section": Section,
        "train": lambda batch: None,
        "redness": lambda result: [0.0 for _ in result.rows],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, names: dict[str, Any]) -> Path:
    """A run and stores under the names of the examples, and the specs of the repository."""
    here = tmp_path_factory.mktemp("examples")
    (here / "examples").symlink_to(ROOT / "examples")
    before = Path.cwd()
    os.chdir(here)
    try:
        run("dreamreader.experiments.experiment.Experiment", names)
        run("dreamreader.harvest.harvest.Harvest", names)
        for number, name in enumerate(("colours", "shapes")):
            dreamreader.Harvest(
                name=name,
                subject="shapes-unet",
                data={"prompts": ["a red circle", "a blue star"][number:]},
                capture=[{"sites": "unet.mid_block", "tokens": {"random": 0.1}}],
            ).run(name)
    finally:
        os.chdir(before)
    return here


def run(name: str, names: dict[str, Any]) -> None:
    """Raises unless the example of a docstring gives what it says."""
    example, said = EXAMPLES[name], []
    example.globs = {**names, **vars(importlib.import_module(example.globs["__name__"]))}
    failed = (
        doctest.DocTestRunner(optionflags=FLAGS)
        .run(example, out=said.append, clear_globs=False)
        .failed
    )
    assert not failed, "".join(said)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    run(name, names)
