"""Experiments as objects."""

import pytest

from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment, check_spec

FIELDS = {
    "name": "Where: color & shape?",
    "data": {"prompts": ["a red circle"]},
    "method": {"kind": "heatmap", "word": "red"},
}


def test_a_reader_names_the_subject(reader) -> None:
    made = Experiment(reader=reader, **FIELDS)
    assert made.spec.subject.model == "StableDiffusionPipeline"
    assert repr(made) == "Experiment('Where: color & shape?': heatmap on StableDiffusionPipeline)"
    assert str(made.folder) == "runs/where-color-shape"


def test_fields_as_a_mapping_a_spec_or_by_name(reader) -> None:
    made = Experiment({**FIELDS, "subject": "shapes-unet"}, seeds={"count": 2})
    assert made.spec == check_spec({**FIELDS, "subject": "shapes-unet", "seeds": {"count": 2}})
    assert Experiment(made.spec).spec is made.spec
    assert Experiment(reader=reader, metrics=["detector"], **FIELDS).spec.metrics == ["detector"]


def test_fields_beside_a_whole_spec_are_refused() -> None:
    spec = check_spec({**FIELDS, "subject": "shapes-unet"})
    with pytest.raises(InvalidInput, match="a whole spec is given, and seeds beside it"):
        Experiment(spec, seeds={"count": 4})
    with pytest.raises(InvalidInput, match="a whole spec is given, and metrics beside it"):
        Experiment(spec, metrics=["detector"])


def test_an_unknown_subject_is_named() -> None:
    with pytest.raises(LookupError, match="unknown model 'shapes-unnet'; nearest: shapes-unet"):
        Experiment(subject="shapes-unnet", **FIELDS).plan()


def test_settings_are_those_of_the_embedded_models_where_it_is_one(reader) -> None:
    named = Experiment(subject="shapes-unet", reader=reader, **FIELDS).job
    assert named.settings == {"num_inference_steps": 20, "guidance_scale": 2.0}
    other = Experiment(reader=reader, pipeline={"num_inference_steps": 3}, **FIELDS).job
    assert other.settings == {"num_inference_steps": 3} and other.steps == 3
    assert Experiment(reader=reader, **FIELDS).job.steps == 50  # of the pipeline's own call
