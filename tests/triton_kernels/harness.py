"""Triton kernels in the interpreter and ahead of time.

The interpreter has to be chosen before Triton is imported, so the tests that need it run in a
Python of their own, started by `test_interpreter.py`.
"""

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
ROWS = ("i64", "i64", "constexpr")  # strides of rows whose innermost one is 1
WIDE = r"(ld\.global[.\w:]*\.v(4\.b32|2\.b64)|cp\.async)"
if INTERPRETED:
    from tests.triton_kernels.interpreter import shorten

    shorten()
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def interpreted(test: Any) -> Any:
    """Marks a test of the interpreter, where numpy warns of what a case holds on purpose."""
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
    only = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py")
    return pytest.mark.interpreter(only(quiet(test)))


def compile_ahead(
    kernel: Any,
    signature: dict[str, Any],
    constants: dict[tuple, Any],
    even: list[tuple],
    arch: int,
    **options: int,
) -> Any:
    """A kernel for compute capability arch / 10.

    Args:
        kernel: of Triton.
        signature: types by argument; the others are constants.
        constants: by argument and place in it.
        even: what is declared a multiple of 16, as Triton finds pointers and sizes where they are.
        arch: 80 or 90.
        options: of the compilation.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: number for number, name in enumerate(kernel.arg_names)}
    assert set(signature) | {name for name, *_ in constants} == set(place)
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(place[name], *rest): value for (name, *rest), value in constants.items()},
        attrs={(place[name], *rest): [["tt.divisibility", 16]] for name, *rest in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def ahead(
    kernel: Any, signature: dict[str, Any], constants: dict[str, Any], arch: int, **options: int
) -> Any:
    """The same for kernels over rows: pointers, widths, outer strides are multiples of 16."""
    rows = [name for name, kind in signature.items() if isinstance(kind, tuple) and len(kind) == 3]
    even: list[tuple] = [(name,) for name, kind in signature.items() if str(kind).startswith("*")]
    even += [(name,) for name in ("width", "hidden", "deep") if name in kernel.arg_names]
    even += [(name, axis) for name in rows for axis in (0, 1)]
    fixed = {(name, 2): 1 for name in rows} | {(name,): value for name, value in constants.items()}
    return compile_ahead(kernel, signature, fixed, even, arch, **options)


def within_limits(code: Any, arch: int) -> None:
    """No traffic with local memory, shared memory that a block can have."""
    assert not re.search(r"\b(ld|st)\.local", code.asm["ptx"])
    assert not re.search(r"\b(LDL|STL)\b", code.asm["sass"])
    assert code.metadata.shared <= SHARED_MEMORY[arch]
