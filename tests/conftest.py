"""Fixtures for all tests."""

import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

# Triton warns while this is unset, and its default is about to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import numpy
import pytest
import torch

from dreamreader import _alloc
from dreamreader._register import native
from dreamreader.zoo import fetch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no process works alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def reseeded() -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """Calls a function twice, after different global seeds, which must not matter to it."""

    def call(function: Callable[[], Any]) -> tuple[Any, Any]:
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            numpy.random.seed(seed)
            random.seed(seed)
            found.append(function())
        return found[0], found[1]

    return call


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN (integers: their smallest value), so that an unwritten element shows."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)

    empty, empty_like = _alloc.empty, _alloc.empty_like
    monkeypatch.setattr(_alloc, "empty", lambda *args, **kw: fill(empty(*args, **kw)))
    monkeypatch.setattr(_alloc, "empty_like", lambda x: fill(empty_like(x)))
    monkeypatch.setattr(_alloc, "empty_like_of", lambda x: lambda x: fill(empty_like(x)))


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels of one instruction set, for as long as the test runs."""
    module = native()[0]
    if module is None:
        pytest.skip("the native module is not built")
    try:
        module.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.use_isa("best")


@pytest.fixture(scope="session")
def unpacked_once() -> Iterator[None]:
    """Language models of GGUF files are unpacked once for all tests: each takes 20 seconds."""
    unpack = cache(fetch.load_language_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fetch,
            "load_language_model",
            lambda path, dtype="float32": unpack(path, str(dtype).removeprefix("torch.")),
        )
        yield


@pytest.fixture(scope="session")
def smollm2(unpacked_once: None) -> None:
    """The real language model, where it is there."""
    pytest.importorskip("gguf", reason="needs the extra [llm]")
    if fetch.installed("smollm2-135m") is None:
        pytest.skip("needs `dreamreader zoo fetch smollm2-135m`")
