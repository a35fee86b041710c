"""The modules of a subject: what there is now, however it came there."""

import copy
import gc
import pickle
import sys
import weakref
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dreamreader as dr
from dreamreader.engine import _subject
from dreamreader.engine._subject import Subject, carriers, tree_of, unwrap
from dreamreader.errors import UnknownName


@pytest.fixture(autouse=True, params=["native", "python"])
def tree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways to look again at a tree."""
    if request.param == "python":
        monkeypatch.setattr(_subject, "_tree_of", None)
    elif _subject._tree_of is None:
        pytest.skip("no native module")
    return _subject._tree_of or tree_of


def model() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.Sequential(OrderedDict(a=inner, b=nn.Linear(4, 4), list=nn.ModuleList([nn.ReLU()])))


def expected(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """By torch's own walk."""
    named = [(name, each) for name, each in root.named_modules() if name]
    bare = [(name.replace("._orig_mod", ""), unwrap(each)) for name, each in named]
    return list(dict(bare).items())


def insert(m: Any) -> None:
    m.list.insert(0, nn.Tanh())  # past every hook of torch's registration


def reorder(m: Any) -> None:
    first = next(iter(m._modules))
    m._modules[first] = m._modules.pop(first)


def swap(m: Any) -> None:
    m._modules["a"], m._modules["b"] = m._modules["b"], m._modules["a"]


def swap_names(m: Any) -> None:
    m.a._modules = {"1": m.a[0], "0": m.a[1]}


CHANGES = {
    "replaced": lambda m: setattr(m, "b", nn.Linear(4, 4)),
    "replaced below": lambda m: m.a.__setitem__(0, nn.Linear(4, 4)),
    "added": lambda m: m.a.add_module("more", nn.Linear(4, 4)),
    "added to a leaf": lambda m: setattr(m.b, "lora", nn.Linear(4, 4)),
    "wrapped": lambda m: setattr(m, "b", nn.Sequential(m.b)),
    "compiled": lambda m: setattr(m, "b", torch.compile(m.b, backend="eager")),
    "deleted": lambda m: delattr(m, "b"),
    "deleted below": lambda m: m.a.__delitem__(0),
    "set to none": lambda m: setattr(m, "b", None),
    "inserted": insert,
    "moved": lambda m: (setattr(m.a, "b", m.b), delattr(m, "b")),
    "in another order": reorder,
    "swapped": swap,
    "renamed": swap_names,
    "one twice": lambda m: setattr(m, "b", m.a),
    "of another class": lambda m: setattr(m.b, "__class__", type("Other", (nn.Linear,), {})),
    "emptied": lambda m: setattr(m.a, "_modules", {}),
    "in a dictionary of another kind": lambda m: setattr(
        m, "_modules", OrderedDict(reversed(m._modules.items()))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_looks_is_seen(change: str) -> None:
    root = model()
    subject = Subject(root)
    assert list(subject.modules().items()) == expected(root)
    assert list(subject.modules().items()) == expected(root)
    CHANGES[change](root)
    for _ in range(2):
        found = subject.modules()
        assert list(found.items()) == expected(root)
        assert found.every == list(root.modules())
        assert found.kinds == set(map(type, root.modules()))
        assert found.root is root


@pytest.mark.parametrize("change", CHANGES)
def test_sites_follow_a_change_between_two_blocks(change: str) -> None:
    root = model()
    reader = dr.Reader(root)
    texts = ("**", "a.*", "?", "a.**")
    for text in (*texts, *texts):
        reader.sites(text)
    CHANGES[change](root)
    for text in texts:
        assert places(reader, text) == places(dr.Reader(root), text), text


def places(reader: dr.Reader, text: str) -> list[tuple[str, int, list[int]]]:
    """Names of the sites that a pattern finds, with the modules there and around."""
    try:
        found = reader.sites(text)
    except UnknownName:
        return []
    return [(each.name, id(each.tap.module), list(map(id, each.around))) for each in found]


def test_a_component_that_is_replaced_or_taken_away_is_seen_and_let_go() -> None:
    pipe = SimpleNamespace(components={"unet": nn.Sequential(nn.ReLU()), "vae": nn.ReLU()})
    subject = Subject(pipe)
    assert list(subject.modules()) == list(subject.modules()) == ["unet", "unet.0", "vae"]
    gone = weakref.ref(pipe.components.pop("vae"))
    gc.collect()
    assert gone() is None  # what was found before keeps nothing alive
    assert list(subject.modules()) == ["unet", "unet.0"]
    pipe.components["unet"] = nn.Linear(2, 2)
    assert subject.modules() == {"unet": pipe.components["unet"]}
    pipe.components = {"b": pipe.components["unet"]}
    assert list(subject.modules()) == ["b"]


def test_what_a_caller_does_with_the_modules_is_its_own() -> None:
    reader = dr.Reader(model())
    want = list(reader.modules.items())
    reader.modules.clear()
    reader._subject.modules().every.clear()
    assert list(reader.modules.items()) == want


def test_a_look_gives_all_modules_and_those_with_marks(tree: Any) -> None:
    root: Any = model()
    every = list(root.modules())
    look, before = tree(every), [sys.getrefcount(each) for each in every]
    for _ in range(3):
        assert look() == (every, [])
    assert [sys.getrefcount(each) for each in every] == before
    root.a._compiled_call_impl = None
    root.a[0]._diffusers_hook = None
    vars(root.list)["_gradient_checkpointing_func"] = None
    assert look() == (every, [root.a, root.a[0], root.list])
    root.b = nn.Linear(4, 4)
    assert look() is None
    wrapper: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    every = list(wrapper.modules())
    assert tree(every)() == (every, carriers(every)) and carriers(every)[0] is wrapper


def test_a_module_that_is_gone_is_no_part_of_a_tree(tree: Any) -> None:
    look = tree([nn.ReLU()])
    gc.collect()
    assert look() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_modules_of_its_own(copied: Any) -> None:
    subject = Subject(model())
    subject.modules()
    other = copied(subject)
    assert other.modules()["a.0"] is other.model.a[0] is not subject.model.a[0]


def test_blocks_see_marks_that_come_between_them() -> None:
    root: Any = model()[:2].eval()
    reader = dr.Reader(root)
    edit = dr.Steer("b", torch.ones(4))
    x = torch.randn(1, 2, 4)
    for compiled in (False, True, False):
        root.a._compiled_call_impl = root.a._call_impl if compiled else None
        with torch.no_grad(), reader.editing(edit) as report:
            root(x)
        assert any("uncompiled" in note for note in report.notes) == compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_of_torchscript_are_found():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    reader = dr.Reader(nn.Sequential(scripted, nn.Linear(3, 3)))
    for _ in range(2):
        assert {"0", "0.0", "1"} <= set(reader.modules)
