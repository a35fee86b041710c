"""Small trainings: of the embedded U-Net and of a tiny language model."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny

from dreamreader import load
from dreamreader.engine import Reader
from dreamreader.training import ProbeJob, ReftJob

from .jobs import PROBES, REFT


@pytest.fixture(scope="session")
def reader() -> Reader:
    return load("shapes-unet")


@pytest.fixture(scope="session")
def language() -> Reader:
    return Reader(*tiny.language_model("gpt2"))


@pytest.fixture
def reft(reader: Reader) -> Callable[..., ReftJob]:
    """Makes a job: four pairs, two steps; `training` and `data` take further options."""

    def made(training: Any = (), **changes: Any) -> ReftJob:
        fields = {**REFT, **changes, "training": {**REFT["training"], **dict(training)}}
        return ReftJob(**{"reader": reader, **fields})

    return made


@pytest.fixture
def probes(reader: Reader) -> Callable[..., ProbeJob]:
    """Makes a job: eighteen prompts, two steps; `probe` takes further options."""

    def made(probe: Any = (), **changes: Any) -> ProbeJob:
        fields = {**PROBES, **changes, "probe": {**PROBES["probe"], **dict(probe)}}
        return ProbeJob(**{"reader": reader, **fields})

    return made
