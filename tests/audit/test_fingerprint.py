import dataclasses
from pathlib import Path

import pytest
import torch

from dreamreader.audit import fingerprint, hash_weights
from dreamreader.audit.fingerprint import plain
from dreamreader.errors import InvalidInput


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


def test_machine_is_beside_the_hash(module):
    base = fingerprint(module, {}, seeds=[0])
    moved = dataclasses.replace(base, machine={"processor": "another"})
    assert moved.digest == base.digest and moved.as_dict()["machine"] == {"processor": "another"}
    assert "machine" not in base.content and base.machine["cores"]


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

    before = hash_weights(Pipe())
    Pipe.components = {**Pipe.components, "scheduler": EulerDiscreteScheduler()}
    assert hash_weights(Pipe()) != before


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
