"""The Triton kernel of the attention maps of words, as tests/test_triton.py does it."""

import re

import pytest
import torch

from tests.cases._compare import assert_close, same_bits
from tests.cases.attention_words import LONG, SMALL, TEXT, Case, Sizes
from tests.ops.test_attention_words import cases_for, expected
from tests.test_triton import compiled, interpret, interpreted, within_limits

triton = pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@compiled
@pytest.mark.slow
def test_interpreted():
    interpret(__file__)


# numpy, which interprets, warns where a query has no key or a case holds NaN on purpose.
@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@by_dtype
def test_interpreter_agrees_with_the_reference(dtype: torch.dtype):
    from dreamreader.triton_kernels.attention_words import attention_words

    cases = cases_for(dtype)
    for number, case in enumerate(cases if dtype == torch.float32 else cases[::3] + cases[-1:]):
        factor = float(number % 2)
        out, operands = case.out(dtype, factor), case.operands(dtype)
        around = None if out._base is None else out._base.clone()
        attention_words(out, *operands)
        assert_close(out, *expected(case, dtype, factor))
        if around is not None:  # memory between the elements of out
            where = (out.size(), out.stride(), out.storage_offset())
            assert same_bits(around.as_strided_scatter(out, *where), out._base), case.name


def machine_code(case: Case, dtype: str, arch: int):
    """The kernel of a case with heads seen through a view, for compute capability arch / 10."""
    from dreamreader.triton_kernels import attention_words as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    operands = case.operands(torch.float32)
    *_, queries, keys, width, _ = case.sizes
    masked = case.mask is not None
    settings = module.launch_settings(NAMES[dtype], queries, keys, width, masked=masked)
    rows = ("i64", "i64", "i64", "constexpr")
    signature = {
        "out_ptr": "*fp32",
        "query_ptr": f"*{dtype}",
        "key_ptr": f"*{dtype}",
        "weights_ptr": "*fp32",
        "mask_ptr": "*i1" if case.mask == "bool" else f"*{dtype}",
        **dict.fromkeys(("heads", "queries", "keys", "width", "words", "groups"), "i32"),
        "scale": "fp32",
        **dict.fromkeys(("out_strides", "query_strides", "key_strides", "mask_strides"), rows),
        "weight_strides": ("i64", "i64", "constexpr"),
    }
    constants = {
        "MASK": module.mask_kind(operands.mask),
        "CAUSAL": case.causal,
        "WIDEN": False,
        "ONE_TILE": keys <= settings.block_k,
        "WORDS": module.WORDS,
        "BLOCK_Q": settings.block_q,
        "BLOCK_K": settings.block_k,
        "BLOCK_D": settings.block_d,
    }
    kernel = module._attention_words_kernel
    place = {name: number for number, name in enumerate(kernel.arg_names)}
    assert set(signature) | set(constants) == set(place)
    units = {
        (place[name], len(strides) - 1): 1
        for name, strides in signature.items()
        if isinstance(strides, tuple)
    }
    even = [(place[name],) for name in ("out_ptr", "query_ptr", "key_ptr", "width")]
    even += [(place[name], axis) for name in ("query_strides", "key_strides") for axis in range(3)]
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=units | {(place[name],): value for name, value in constants.items()},
        attrs={where: [["tt.divisibility", 16]] for where in even},
    )
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": settings.warps, "num_stages": 1}
    return triton.compile(source, target=target, options=options)


AHEAD = {
    "text": Case("text", Sizes(1, 16, 16, 4096, 77, 64, 5)),
    "causal": Case("causal", TEXT, causal=True),
    "bool": Case("bool", TEXT, mask="bool"),
    "added": Case("added", LONG, mask="added"),
    "joint": Case("joint", Sizes(1, 4, 4, 64, 1178, 64, 5)),
    "narrow": Case("narrow", SMALL),
}


@compiled
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", AHEAD)
def test_compiles_within_limits(name: str, dtype: str, arch: int):
    code = machine_code(AHEAD[name], dtype, arch)
    within_limits(code, arch)
    if dtype != "fp32" and name == "text":  # products on the tensor cores, 16 bytes at a time
        assert re.search(r"mma(\.sync|_async)", code.asm["ptx"])
        assert re.search(r"(ld\.global[.\w:]*\.v(4\.b32|2\.b64)|cp\.async)", code.asm["ptx"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@compiled
@by_dtype
def test_gpu_agrees_with_the_reference_and_repeats(dtype: torch.dtype):
    from dreamreader.triton_kernels.attention_words import attention_words

    for case in cases_for(dtype):
        operands = [
            each.cuda() if isinstance(each, torch.Tensor) else each for each in case.operands(dtype)
        ]
        out, again = (case.out(dtype).cuda() for _ in range(2))
        attention_words(out, *operands)
        attention_words(again, *operands)
        assert_close(out.cpu(), *expected(case, dtype))
        assert same_bits(out, again), case.name
