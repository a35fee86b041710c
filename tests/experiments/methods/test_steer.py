"""Steering in experiments: directions of `dreamreader.steering`, strengths and controls."""

import pytest
import torch

from dreamreader.engine import Record
from dreamreader.errors import InvalidInput
from dreamreader.experiments import Experiment
from dreamreader.steering import Directions, fit_pairs
from dreamreader.zoo import SETTINGS

from ..conftest import PAIRS

SITE = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
FIT = {"pairs": [{"source": f"a red {s}", "target": f"a blue {s}"} for s in ("star", "ring")]}
STEPS = {**SETTINGS, "num_inference_steps": 2, "output_type": "pt"}


def steer(**changes):
    return {
        "kind": "steer",
        "sites": SITE,
        "fit": FIT,
        "fit_seeds": [7, 8],
        "branch": "cond",
        "strengths": [0.0, 2.0],
        **changes,
    }


def recorded(reader, key):
    prompts = [pair[key] for pair in FIT["pairs"] for _ in (7, 8)]
    record = Record(SITE, branch="cond", reduce=lambda x: x.float().mean(1, keepdim=True))
    with torch.inference_mode():
        return reader.run(prompts, record=record, seeds=[7, 8] * 2, **STEPS).cache


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("direction", ["mean", "caa", "pca"])
def test_directions_are_those_of_fit_pairs(experiment, reader, tmp_path, per_step, direction):
    made = experiment(method=steer(per_step=per_step, direction=direction), batch={"rows": 6})
    results = made.run(tmp_path / "run")
    found = Directions.load(results.spec.method.directions_file(tmp_path / "run"))
    expected = fit_pairs(
        recorded(reader, "source"),
        recorded(reader, "target"),
        direction,
        steps="each" if per_step else "shared",
    )
    assert found.method == direction and list(found) == [SITE]
    assert found[SITE].shape == expected[SITE].shape == ((2, 96) if per_step else (96,))
    assert torch.allclose(found[SITE], expected[SITE], atol=1e-3 * float(expected[SITE].norm()))


def test_rows_strengths_and_controls(experiment, tmp_path) -> None:
    made = experiment(data={"pairs": PAIRS}, method=steer(), batch={"rows": 4})
    results = made.run(tmp_path / "run")
    assert results.conditions == [
        "unedited",
        "target_prompt",
        "edited",
        "random_direction",
        "shuffled_labels",
    ]
    for condition in results.conditions[2:]:
        assert results.mean(condition, "pixel_distance", strength=0.0).value < 1e-5
        assert results.mean(condition, "pixel_distance", strength=2.0).value > 1e-4
    assert [row["prompt"] for row in results.of("target_prompt")] == [p["target"] for p in PAIRS]
    directions = made.job.memory["directions"]
    norms = [directions[name][SITE].norm(dim=-1) for name in directions]
    assert len(norms) == 3 and all(torch.allclose(norms[0], each, rtol=1e-4) for each in norms)
    flat = [directions[name][SITE].flatten() for name in directions]
    cosines = torch.corrcoef(torch.stack(flat))
    assert cosines[0, 1].abs() < 0.99 and cosines[0, 2].abs() < 0.5


def test_strength_0_is_bit_equal_in_a_batch_of_the_same_rows(experiment, tmp_path) -> None:
    results = experiment(method=steer(strengths=[0.0], controls=[]), batch={"rows": 2}).run(
        tmp_path / "run"
    )
    digests = [[r["digest"] for r in results.of(c)] for c in ("unedited", "edited")]
    assert digests[0] == digests[1]


def test_only_what_is_asked_for_is_fitted(experiment, tmp_path) -> None:
    results = experiment(method=steer(controls=["random_direction"])).run(tmp_path / "run")
    assert results.conditions == ["unedited", "edited", "random_direction"]
    files = [f.name for f in (tmp_path / "run" / "artifacts").glob("*.safetensors")]
    assert files == ["directions.safetensors"]


def test_the_pairs_of_the_fit_are_part_of_the_fingerprint(experiment, tmp_path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a red star", "target": "a blue star"}\n')
    fit = {"file": str(path)}
    experiment(method=steer(fit=fit)).run(tmp_path / "run")
    path.write_text('{"source": "a red star", "target": "a green star"}\n')
    with pytest.raises(InvalidInput, match="holds another run: settings.inputs.fit was "):
        experiment(method=steer(fit=fit)).run(tmp_path / "run")


def test_damaged_directions_are_named(experiment, tmp_path) -> None:
    experiment(method=steer()).run(tmp_path / "run")
    file = tmp_path / "run" / "artifacts" / "directions.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (tmp_path / "run" / "rows.parquet").unlink()
    with pytest.raises(InvalidInput, match="directions.safetensors is no safetensors file, or onl"):
        experiment(method=steer()).run(tmp_path / "run")


def test_the_asymmetric_rule_runs(experiment, tmp_path) -> None:
    """Asyrp changes the picture less than the same direction in both terms."""
    moved = {}
    for asymmetric in (False, True):
        results = experiment(
            method=steer(sites="unet.up_blocks.2", asymmetric=asymmetric, controls=[])
        ).run(tmp_path / str(asymmetric))
        moved[asymmetric] = results.mean("edited", "pixel_distance", strength=2.0).value
    assert moved[True] > 1e-5 and moved[True] != pytest.approx(moved[False], rel=0.01)


def test_a_language_model_at_its_last_token(language, tmp_path) -> None:
    made = Experiment(
        name="last token",
        reader=language,
        data={"prompts": [{"prompt": "a red cat", "answer": 40, "wrong_answer": 41}]},
        method={
            "kind": "steer",
            "sites": "transformer.h.1",
            "tokens": -1,
            "fit": {"pairs": [{"source": "a blue cat", "target": "a dog on a red tree"}]},
            "strengths": [0.0, 1.0],
            "controls": ["random_direction"],
        },
        metrics=["logit_difference"],
    )
    results = made.run(tmp_path / "run")
    found = Directions.load(tmp_path / "run" / "artifacts" / "directions.safetensors")
    ends = []
    for prompt in ("a blue cat", "a dog on a red tree"):
        ids = language.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            ends.append(language.subject(ids, output_hidden_states=True).hidden_states[2][0, -1])
    assert torch.allclose(found["transformer.h.1"].flatten(), ends[1] - ends[0], atol=1e-4)
    ids = language.tokenizer("a red cat", return_tensors="pt").input_ids

    def add(module, args, out):
        new = (out[0] if isinstance(out, tuple) else out).clone()
        new[0, -1] += ends[1] - ends[0]
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = language.subject.transformer.h[1].register_forward_hook(add)
    with torch.no_grad():
        last = language.subject(ids).logits[0, -1]
    handle.remove()
    row = results.of("edited", strength=1.0)[0]
    assert row["logit_difference"] == pytest.approx(float(last[40] - last[41]), abs=1e-3)
    base = results.of("unedited")[0]["logit_difference"]
    assert abs(base - row["logit_difference"]) > 1e-2
    assert results.of("edited", strength=0.0)[0]["logit_difference"] == pytest.approx(
        base, abs=1e-5
    )


def test_what_steering_needs(experiment, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="method.fit: entry '0' has no target prompt"):
        experiment(method=steer(fit={"prompts": ["a"]})).run(tmp_path / "run")
    with pytest.raises(InvalidInput, match="is steered at different tokens"):
        experiment(method=steer(tokens=[0, 1])).run(tmp_path / "run")
    with pytest.raises(InvalidInput, match="give one of fit and directions"):
        experiment(method=steer(fit=None))
    given = {"fit": None, "directions": {"file": "d.safetensors"}}
    with pytest.raises(InvalidInput, match="have no labels to shuffle; leave shuffled_labels out"):
        experiment(method=steer(**given))
    with pytest.raises(InvalidInput, match="method.directions: .*d.safetensors"):
        experiment(method=steer(**given, controls=[])).run(tmp_path / "run")


def test_directions_of_a_file_do_what_fitted_ones_do(experiment, tmp_path) -> None:
    controls = ["random_direction"]
    fitted = experiment(method=steer(controls=controls)).run(tmp_path / "fitted")
    file = fitted.spec.method.directions_file(tmp_path / "fitted")
    given = {"fit": None, "directions": {"file": str(file)}, "controls": controls}
    again = experiment(method=steer(**given)).run(tmp_path / "again")
    assert [row["digest"] for row in again.rows] == [row["digest"] for row in fitted.rows]
    bare = tmp_path / "bare" / file.name
    bare.parent.mkdir()
    Directions({SITE: torch.ones(96)}, "red", "blue", "mean", "none").save(bare)
    other = experiment(method=steer(**{**given, "directions": {"file": str(bare)}}))
    with pytest.raises(InvalidInput, match="holds another run: settings.inputs.directions"):
        other.run(tmp_path / "again")
    other.run(tmp_path / "other")  # without evidence
    assert "AUC" not in (tmp_path / "other" / "report.html").read_text()
