"""Diffusion Lens in experiments."""

import pytest
import torch

from dreamreader.experiments import Experiment
from dreamreader.localise import lens

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}


def test_pictures_are_those_of_the_lens(experiment, reader, tmp_path) -> None:
    results = experiment(method={"kind": "lens"}, batch={"rows": 48}).run(tmp_path / "run")
    found = lens(reader, ["a red circle", "a blue square"], seeds=[0, 0], **SETTINGS)
    layers = sorted({row["layer"] for row in results.of("lens")})
    assert layers == sorted(set(found.layers))
    assert len(results.of("lens")) == len(found.layers)
    for layer, row, image in zip(found.layers, found.rows, found.images, strict=True):
        mine = results.of("lens", layer=layer, prompt=row.prompt)[0]
        kept = torch.tensor(list(results.image(mine).tobytes())).reshape(64, 64, 3).permute(2, 0, 1)
        assert (kept / 255 - image).abs().max() < 2 / 255
    # the last layer is what the pipeline draws from
    assert results.mean("lens", "pixel_distance", layer=layers[-1]).value < 1e-4
    assert results.mean("lens", "pixel_distance", layer=0).value > 1e-3


def test_some_layers_and_unknown_encoders(experiment, language, tmp_path) -> None:
    plan = experiment(method={"kind": "lens", "layers": [0, 2]}).plan()
    assert plan.conditions == {"unedited": 2, "lens": 4}
    with pytest.raises(LookupError, match="text_encoder_2"):
        experiment(method={"kind": "lens", "encoder": "text_encoder_2"}).plan()
    with pytest.raises(ValueError, match="layer"):
        experiment(method={"kind": "lens", "layers": [99]}).plan()
    with pytest.raises(LookupError, match="text_encoder"):
        Experiment(
            name="x", reader=language, data={"prompts": ["a"]}, method={"kind": "lens"}
        ).plan()
