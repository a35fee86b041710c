"""The example specs of language models, on the real one."""

from pathlib import Path

import pytest

from dreamreader.experiments import Experiment
from dreamreader.experiments.pages.chunked import effects

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.llm
def test_the_country_is_at_its_own_token_first_and_at_the_last_one_later(smollm2, tmp_path) -> None:
    layers = ["model.layers.2", "model.layers.29"]
    overrides = [f"method.sites=[{', '.join(layers)}]", "method.controls=[resampled]"]
    found = Experiment.from_file(EXAMPLES / "language-patch.yaml", overrides).run(tmp_path / "run")
    grid = effects(found, "patched")
    pairs = zip(grid.cells, grid.effects, strict=True)
    effect = {(cell.name, cell.tokens): each.value for cell, each in pairs}
    assert effect[layers[0], 3] > 0.9 and effect[layers[1], 7] > 0.9
    assert abs(effect[layers[0], 7]) < 0.1 and abs(effect[layers[1], 3]) < 0.1
    control = effects(found, "resampled")
    # another country takes the wrong answer away too, but does not bring the right one
    assert max(each.value for each in control.effects) < 0.8


@pytest.mark.llm
def test_a_fitted_direction_makes_the_next_word_happier(smollm2, tmp_path) -> None:
    overrides = ["method.sites=[model.layers.20]", "method.strengths=[0, 4]"]
    found = Experiment.from_file(EXAMPLES / "language-steer.yaml", overrides).run(tmp_path / "run")
    name = "logit_difference"
    base = found.mean("unedited", name).value
    assert found.mean("edited", name, strength=0.0).value == pytest.approx(base, abs=1e-4)
    gained = found.mean("edited", name, strength=4.0).value - base
    for control in ("random_direction", "shuffled_labels"):
        assert gained > 2 * abs(found.mean(control, name, strength=4.0).value - base)
