"""What the tests of selections in Triton share: kernels ahead of time, and small blocks."""

from importlib import import_module
from typing import Any

import pytest
import torch

from dreamreader._register import register
from tests.triton_kernels.harness import compile_ahead, within_limits

WORDS = {"bf16": "i16", "fp32": "i32"}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALUES = ("x_ptr", "weight_ptr", "bias_ptr")
LONG = ("cursor_ptr", "histogram_ptr", "place_ptr", "end_ptr", "row_ptr", "bound_ptr")
SIZES = ("width", "count", "d")
by_type = pytest.mark.parametrize(("dtype", "arch"), [("bf16", 90), ("fp32", 80)], ids=str)


def compile_selection(
    kernel: Any, dtype: str, arch: int, warps: int, types: dict[str, str], **constants: Any
) -> str:
    """A kernel within the limits, as PTX.

    Args:
        kernel: of a selection.
        dtype: of the activations.
        arch: 80 or 90.
        warps: of a program instance.
        types: of arguments that are no integers as others have them.
        constants: of the kernel.
    """
    module = import_module("dreamreader.triton_kernels._selection")
    form = module.FORMS[TYPES[dtype]].constants()
    fixed = {name: each for name, each in form.items() if name in kernel.arg_names} | constants
    signature: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name in types:
            signature[name] = types[name]
        elif name in ("x_ptr", "value_ptr", "threshold_ptr"):
            signature[name] = f"*{WORDS[dtype]}"
        elif name in LONG:
            signature[name] = "*i64"
        elif name not in fixed:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
    even = [(each,) for each in signature if each.endswith(("ptr", "stride")) or each in SIZES]
    held = {(name,): value for name, value in fixed.items()}
    code = compile_ahead(kernel, signature, held, even, arch, num_warps=warps)
    within_limits(code, arch)
    return code.asm["ptx"]


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small matrices have many blocks, parts and strata."""
    shared, found = (
        import_module(f"dreamreader.triton_kernels.{name}")
        for name in ("_selection", "_candidates")
    )
    monkeypatch.setattr(shared, "LEAST", 32)
    monkeypatch.setattr(shared, "BLOCK", 32)
    monkeypatch.setattr(found, "SAMPLE", 64)
    monkeypatch.setattr(found, "LIST", 16)
    monkeypatch.setattr(found, "TILES", 5)


def registered(module: Any, schema: str) -> Any:
    """The operator of a module, with its Triton implementation on the CPU."""
    name = module.__name__.rpartition(".")[2]
    return register(
        f"{name}_interpreted",
        schema,
        reference=module._triton,
        fake=module._fake,
        setup_context=getattr(module, "_setup_context", None) or module.setup_context,
        backward=module._backward if hasattr(module, "_backward") else module.backward,
    )
