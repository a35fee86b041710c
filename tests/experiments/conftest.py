"""One embedded model and one small language model for all tests, and experiments on them."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny

from dreamreader import load
from dreamreader.engine import Reader
from dreamreader.experiments import Experiment

PROMPTS = ["a red circle", "a blue square"]
PAIRS = [
    {"source": "a small red circle", "target": "a small blue circle", "id": "circle"},
    {"source": "a large red square", "target": "a large blue square", "id": "square"},
]
MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="session")
def reader() -> Reader:
    return load("shapes-unet")


@pytest.fixture(scope="session")
def language() -> Reader:
    return Reader(*tiny.language_model("gpt2"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of tiny language models by name, for specs that name their subject."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> str:
        if not (folder / name).is_dir():
            for part in tiny.language_model(name):
                part.save_pretrained(folder / name)
        return str(folder / name)

    return path


@pytest.fixture(scope="session")
def experiment(reader: Reader) -> Callable[..., Experiment]:
    """Makes an experiment on the embedded model: two prompts, two steps, one edit over a sweep."""

    def made(metrics: Any = ("pixel_distance",), **changes: Any) -> Experiment:
        fields = {
            "name": "half the middle",
            "subject": "shapes-unet",
            "data": {"prompts": PROMPTS},
            "pipeline": {"num_inference_steps": 2},
            "method": {
                "kind": "edit",
                "edits": [{"kind": "scale", "site": "unet.mid_block", "factor": "$factor"}],
                "sweep": {"factor": [1.0, 0.5]},
            },
            "batch": {"rows": 4},
        }
        return Experiment(reader=reader, metrics=list(metrics), **(fields | changes))

    return made
