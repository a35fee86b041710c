import dataclasses
import math
from pathlib import Path

import pytest
import tiny
import torch

import dreamreader as dr
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.jobs import fingerprint, hash_weights
from dreamreader.jobs.fingerprint import machine_facts, plain, portable


@pytest.fixture
def module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def test_equal_inputs_give_equal_digests_and_every_part_changes_it(module):
    base = fingerprint(module, {"steps": 20, "sites": ["a", "b"]}, seeds=[0, 1])
    assert (
        fingerprint(module, {"sites": ("a", "b"), "steps": 20}, seeds=range(2)).digest
        == base.digest
    )
    others = [
        fingerprint(module, {"steps": 21, "sites": ["a", "b"]}, seeds=[0, 1]),
        fingerprint(module, {"steps": 20, "sites": ["b", "a"]}, seeds=[0, 1]),
        fingerprint(module, {"steps": 20, "sites": ["a", "b"]}, seeds=[0, 2]),
        dataclasses.replace(base, code="other"),
        dataclasses.replace(base, packages={**base.packages, "torch": "0"}),
    ]
    with torch.no_grad():
        module[0].weight[0, 0] += 1e-3
    others.append(fingerprint(module, {"steps": 20, "sites": ["a", "b"]}, seeds=[0, 1]))
    assert len({base.digest, *(other.digest for other in others)}) == len(others) + 1


def test_the_order_of_a_configuration_changes_no_digest(module):
    digests = []
    for config in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        module.config = config
        digests.append(fingerprint(module, {}, seeds=[0]).digest)
    assert digests[0] == digests[1] != digests[2]


def test_machine_is_beside_the_hash(module):
    base = fingerprint(module, {}, seeds=[0])
    moved = dataclasses.replace(base, machine={"processor": "another"})
    assert moved.digest == base.digest and moved.as_dict()["machine"] == {"processor": "another"}
    assert "machine" not in base.content and base.machine["cores"]


def test_a_machine_of_one_core_has_a_name(monkeypatch):
    told = "processor\t: 0\nmodel name\t: a chip @ 2 GHz\n"
    monkeypatch.setattr(Path, "read_text", lambda self: told)
    assert machine_facts()["processor"] == "a chip @ 2 GHz"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\n")
    assert machine_facts()["processor"]


def test_weights_hash_sees_buffers_names_and_dtype(module):
    seen = {hash_weights(module)}
    module[1].running_mean += 1
    seen.add(hash_weights(module))
    seen.add(hash_weights(module.to(torch.bfloat16)))
    seen.add(hash_weights(torch.nn.ModuleDict({"x": module[0], "y": module[1]})))
    assert len(seen) == 4


def test_a_pipelines_scheduler_enters_the_hash(module):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    class Pipe:
        components = {"unet": module, "scheduler": DDIMScheduler(), "safety_checker": None}

    before = fingerprint(Pipe(), {}, [0])
    Pipe.components = {**Pipe.components, "scheduler": EulerDiscreteScheduler()}
    after = fingerprint(Pipe(), {}, [0])
    assert after.weights == before.weights and after.digest != before.digest


def _epsilon(model, tokenizer):
    model.config.layer_norm_epsilon = 0.5


def _epsilon_of_one_norm(model, tokenizer):
    model.transformer.h[0].ln_1.eps = 0.5


def _activation(model, tokenizer):
    model.transformer.h[1].mlp.act = torch.nn.ReLU()


def _attention(model, tokenizer):
    model.config._attn_implementation = "eager"


def _generation(model, tokenizer):
    model.generation_config.repetition_penalty = 1.5


def _buffer(model, tokenizer):
    model.register_buffer("scale", torch.ones(1), persistent=False)


def _token(model, tokenizer):
    tokenizer.add_tokens(["unheard"])


def _padding_side(model, tokenizer):
    tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"


@pytest.mark.parametrize(
    "change",
    [
        *(_epsilon, _epsilon_of_one_norm, _activation, _attention, _generation, _buffer, _token),
        _padding_side,
    ],
)
def test_whatever_the_result_depends_on_changes_the_digest(change):
    model, tokenizer = tiny.language_model("gpt2")
    before = fingerprint(model, {}, [0], tokenizer)
    assert before == fingerprint(*_again(model, tokenizer))
    change(model, tokenizer)
    assert fingerprint(model, {}, [0], tokenizer).digest != before.digest


def _again(model, tokenizer):
    """The same after it was used."""
    reader = Reader(model, tokenizer)
    reader.run(["a cat", "a longer text of several words"], record=["transformer.h.1"])
    reader.run(["a cat"], max_new_tokens=3)
    return model, {}, [0], tokenizer


def test_a_pipeline_that_was_used_has_the_same_fingerprint():
    pipeline = tiny.pipeline("sd")
    before = fingerprint(pipeline, {}, [0])
    Reader(pipeline).run("a cat", num_inference_steps=2)
    assert fingerprint(pipeline, {}, [0]) == before
    pipeline.tokenizer.add_tokens(["unheard"])
    after = fingerprint(pipeline, {}, [0])
    assert after.subject["tokenizer"] != before.subject["tokenizer"]
    assert {**after.subject, "tokenizer": ""} == {**before.subject, "tokenizer": ""}


def test_a_folder_gives_the_fingerprint_of_what_was_saved(tmp_path):
    model, tokenizer = tiny.language_model("gpt2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one, two = (dr.load(str(tmp_path)) for _ in range(2))
    taken = [fingerprint(each.subject, {}, [0], each.tokenizer) for each in (one, two)]
    assert taken[0] == taken[1]


def test_settings_without_a_canonical_form_are_refused():
    with pytest.raises(InvalidInput, match="type function"):
        plain({"edit": lambda x: x})
    with pytest.raises(InvalidInput, match="nan"):
        plain([float("nan")])
    with pytest.raises(InvalidInput, match="holds no module"):
        hash_weights(Path("."))


def test_plain_forms():
    @dataclasses.dataclass
    class Window:
        first: int
        last: int

    assert plain(Window(0, 9)) == {"type": "Window", "first": 0, "last": 9}
    assert plain({3: range(2), "s": {"b", "a"}}) == {"3": [0, 1], "s": ["a", "b"]}
    one, same, other = plain(torch.ones(2)), plain(torch.ones(2).numpy()), plain(torch.zeros(2))
    assert one == same != other


def test_objects_of_a_configuration_enter_without_their_address(module):
    class Plain:
        pass

    class Named(Plain):
        def __init__(self, name: str):
            self.name = name

        def __repr__(self) -> str:
            return f"Named({self.name!r})"

    digests = []
    for value in (Plain(), Plain(), Named("a"), Named("a"), Named("b")):
        module.config = {"value": value}
        digests.append(fingerprint(module, {}, seeds=[0]).digest)
        module.held = [*getattr(module, "held", []), value]  # so that no address comes again
    assert digests[0] == digests[1] and digests[2] == digests[3]
    assert len(set(digests)) == 3


def test_a_module_in_two_places_counts_in_both():
    act = torch.nn.ReLU()
    shared, apart, fewer = (
        torch.nn.Sequential(torch.nn.Linear(2, 2), *each)
        for each in ((act, act), (act, torch.nn.ReLU()), (act,))
    )
    for each in (shared, apart, fewer):
        each.load_state_dict(shared.state_dict())
    digests = [fingerprint(each, {}, seeds=[0]).digest for each in (shared, apart, fewer)]
    assert digests[0] == digests[1] != digests[2]


def test_files_enter_by_name_and_numbers_that_json_lacks_as_text():
    given = {"file": "/a/b/x.pt", "rate": 0.5, "top": [math.inf, (-math.inf, math.nan)], "n": 2}
    assert portable(given) == {"file": "x.pt", "rate": 0.5, "top": ["inf", ["-inf", "nan"]], "n": 2}


def test_where_a_configuration_came_from_changes_no_digest(module):
    digests = []
    for origin in ({}, {"_commit_hash": "1f", "transformers_version": "5"}, {"name_or_path": "a"}):
        module.config = {"width": 4, "inner": {"depth": 2, **origin}, **origin}
        digests.append(fingerprint(module, {}, seeds=[0]).digest)
    module.config = {"width": 4, "inner": {"depth": 3}}
    assert len(set(digests)) == 1 and fingerprint(module, {}, seeds=[0]).digest != digests[0]
