"""What runs a call that the native CUDA kernel does not take."""

from collections.abc import Iterator

import pytest
import torch

from dreamreader import _register
from dreamreader._register import Kernel, native

module = native()[0]
pytestmark = pytest.mark.skipif(module is None, reason="the native module is not built")


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    known: set[int] = set()
    monkeypatch.setattr(_register, "_without_code", known)
    monkeypatch.setattr(_register, "_available", lambda needs, backend: (True, needs))
    yield known


def call_with(error: str | None, triton: bool):
    """An operator of two tensors as `register` would choose it, and the calls of its kernels."""
    calls: list[str] = []

    def cuda(name: str, x: torch.Tensor) -> str:
        calls.append("cuda")
        if error:
            raise getattr(module, error)("the reason")
        return "cuda"

    kernels = [(Kernel("f_cuda", cuda), "native")]
    kernels += [(Kernel("f", lambda *_: "triton"), "triton")] * triton
    owner, call = _register._choose(*kernels, reference=lambda *_: "reference")
    assert owner.backend == "native" and call is not None
    return call, calls


@pytest.mark.parametrize("triton", [True, False])
def test_a_call_that_the_kernel_takes_stays_there(devices: set[int], triton: bool):
    call, calls = call_with(None, triton)
    assert call("f", torch.zeros(1)) == "cuda"
    assert calls == ["cuda"] and not devices


@pytest.mark.parametrize("triton", [True, False])
def test_sizes_that_the_kernel_leaves_run_on_the_reference(devices: set[int], triton: bool):
    call, calls = call_with("NotTaken", triton)
    assert [call("f", torch.zeros(1)) for _ in range(2)] == ["reference"] * 2
    assert calls == ["cuda"] * 2 and not devices  # the next call may be taken


@pytest.mark.parametrize("triton", [True, False])
def test_a_device_without_code_is_asked_once(devices: set[int], triton: bool):
    call, calls = call_with("NoCode", triton)
    x = torch.zeros(1)
    assert [call("f", x) for _ in range(3)] == ["triton" if triton else "reference"] * 3
    assert calls == ["cuda"] and devices == {x.get_device()}


def test_other_errors_of_a_kernel_are_raised(devices: set[int]):
    def cuda(x: torch.Tensor):
        raise RuntimeError("an illegal memory access")

    _, call = _register._choose((Kernel("f_cuda", cuda), "native"), reference=lambda x: x)
    assert call is not None
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        call(torch.zeros(1))


def test_a_module_for_the_cpu_says_why_it_runs_on_no_gpu():
    assert module is not None
    if module.build_info()["cuda"] is None:
        assert _register.why_not_on(0) == "built for CPU only"
