"""Properties of the attention maps of words, and what must be refused."""

import re
import subprocess
import sys

import pytest
import torch

from dreamreader import _register
from dreamreader.errors import InvalidInput
from dreamreader.ops import attention_words_
from tests.cases._compare import same_bits
from tests.cases.attention_words import LONG, SMALL, TEXT, Case

NATIVE = _register.native()[0]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@by_dtype
def test_equals_torchs_own_attention_with_weights_for_values(dtype: torch.dtype):
    query, key, weights, mask, _, scale = Case("", TEXT, mask="bool").operands(dtype)
    mask = mask | (torch.arange(mask.shape[-1]) == 0)
    out = torch.zeros(2, 4, 3, 70, dtype=weights.dtype)
    attention_words_(out, query, key, weights, mask=mask)
    values = weights.double().transpose(1, 2).unsqueeze(1).expand(2, 4, -1, -1)
    explicit = torch.nn.functional.scaled_dot_product_attention(
        query.double(),
        key.double().repeat_interleave(2, dim=1),
        values,
        attn_mask=mask,
        scale=scale,
    )
    torch.testing.assert_close(out.double(), explicit.transpose(2, 3), rtol=0, atol=1e-6)
    assert explicit.abs().max() > 0.01


@pytest.mark.parametrize("sizes", [TEXT, LONG], ids=["text", "long"])
def test_calls_add_up(sizes):
    query, key, weights, *_ = Case("", sizes, weights="dense").operands(torch.float32)
    out = torch.zeros(*query.shape[:2], weights.shape[1], query.shape[2])
    once = attention_words_(out.clone(), query, key, weights)
    attention_words_(attention_words_(out, query, key, weights), query, key, weights)
    torch.testing.assert_close(out, 2 * once, rtol=1e-6, atol=1e-7)
    whole = attention_words_(torch.zeros_like(out), query, key, torch.ones_like(weights))
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [TEXT, LONG], ids=["text", "long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_does_not_depend_on_those_around(sizes, dtype: torch.dtype):
    query, key, weights, *_ = Case("", sizes).operands(dtype)
    shape = (*query.shape[:2], weights.shape[1], query.shape[2])
    out = attention_words_(torch.zeros(shape), query, key, weights)
    some = slice(13, 40)
    few = attention_words_(torch.zeros(shape)[..., some], query[:, :, some], key, weights)
    assert same_bits(few, out[..., some])


def test_nan_stays_in_its_rows_and_words():
    query, key, weights, *_ = Case("", TEXT).operands(torch.float32)
    query[0, 1, 7, 3] = torch.nan
    key[1, 1, 60, 5] = torch.nan  # a token without weight, in the sum all the same
    out = attention_words_(torch.zeros(2, 4, 3, 70), query, key, weights)
    odd = torch.zeros(2, 4, 3, 70, dtype=torch.bool)
    odd[0, 1, :2, 7] = odd[1, 2:, :2] = True  # the last word has no tokens
    assert torch.equal(out.isnan(), odd)
    left = attention_words_(torch.zeros_like(out), query, key, weights, mask=torch.arange(77) != 60)
    assert left[1].isfinite().all()


def test_groups_of_heads_share_a_key_head():
    case = Case("", TEXT._replace(heads=6, key_heads=2))
    query, key, weights, *_ = case.operands(torch.float32)
    shared = attention_words_(torch.zeros(2, 6, 3, 70), query, key, weights)
    repeated = key[:, [0, 0, 0, 1, 1, 1]]
    each = attention_words_(torch.zeros(2, 6, 3, 70), query, repeated, weights)
    assert same_bits(shared, each)


def test_in_place_bumps_the_version_and_gives_no_gradient():
    query, key, weights, *_ = Case("", SMALL).operands(torch.float32)
    query.requires_grad_()
    out = torch.zeros(2, 2, 3, 40)
    factor = torch.ones_like(out, requires_grad=True)
    product = (factor * out).sum()
    assert attention_words_(out, query, key, weights) is out
    assert out._version == 1 and not out.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


MEMORY = """
import resource, torch
from dreamreader.ops import attention_words_
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
query, key = torch.randn(1, 8, 4096, 16), torch.randn(1, 8, 2048, 16)
weights, out = torch.zeros(1, 2, 2048), torch.zeros(1, 8, 2, 4096)
weights[0, 0, 5] = weights[0, 1, 2000] = 1
attention_words_(out[..., :64], query[:, :, :64], key, weights)
before = peak()
attention_words_(out, query, key, weights)
print(peak() - before)
"""


@pytest.mark.skipif(NATIVE is None, reason="the native module is not built")
def test_peak_memory_is_that_of_the_result():
    """The scores would be 256 MiB; the result is 0.25 MiB."""
    assert _register.active["attention_words_"]["CPU"].backend == "native"
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4


def operands(**changes) -> dict:
    """Valid operands with some exchanged."""
    query, key, weights, *_ = Case("", TEXT).operands(torch.float32)
    valid = {"out": torch.zeros(2, 4, 3, 70), "query": query, "key": key, "weights": weights}
    return valid | changes


BAD: list[tuple[dict, str]] = [
    ({"query": torch.zeros(4, 70, 40)}, "expected query [batch, heads, queries, d], key [batch"),
    ({"key": torch.zeros(2, 4, 77, 41)}, "key must be [2, key_heads, keys, 40] as query is, got"),
    ({"key": torch.zeros(2, 3, 77, 40)}, "4 heads of query are no multiple of 3 heads of key"),
    ({"key": torch.zeros(2, 0, 77, 40)}, "4 heads of query are no multiple of 0 heads of key"),
    ({"weights": torch.zeros(1, 3, 76)}, "weights must be [2 or 1, words, 77], got [1, 3, 76]"),
    ({"weights": torch.zeros(3, 3, 77)}, "weights must be [2 or 1, words, 77], got [3, 3, 77]"),
    ({"out": torch.zeros(2, 4, 2, 70)}, "out must be [2, 4, 3, 70], got [2, 4, 2, 70]"),
    ({"query": torch.zeros(2, 4, 70, 40, dtype=torch.int64)}, "got torch.int64 and torch.float32"),
    ({"query": torch.zeros(2, 4, 70, 40).half()}, "must share a floating point type, got"),
    ({"out": torch.zeros(2, 4, 3, 70).half()}, "out and weights must be float32 (or float64 with"),
    (
        {"out": torch.zeros(2, 4, 3, 70).double(), "weights": torch.zeros(1, 3, 77).double()},
        "got torch.float64 and torch.float64 for torch.float32 queries",
    ),
    ({"key": torch.zeros(2, 4, 77, 40, device="meta")}, "query is on cpu, key on meta, weights"),
    ({"out": torch.zeros(2, 4, 3, 70, requires_grad=True)}, "out requires grad, and what is added"),
    ({"mask": torch.zeros(70, 76, dtype=torch.bool)}, "mask must broadcast to [2, 4, 70, 77], got"),
    (
        {"mask": torch.zeros(77, dtype=torch.int64)},
        "mask must be torch.bool, float32 or query's dtype",
    ),
    ({"mask": torch.zeros(77, device="meta")}, "mask is on meta, query on cpu"),
]


@pytest.mark.parametrize(("changes", "text"), BAD, ids=[text for _, text in BAD])
def test_bad_operands(changes: dict, text: str):
    with pytest.raises(InvalidInput, match=re.escape(text)) as raised:
        attention_words_(**operands(**changes))
    assert str(raised.value).startswith("attention_words_: ")


def test_out_that_shares_memory_with_itself_is_refused():
    shared = torch.zeros(1, 4, 3, 70).expand(2, 4, 3, 70)
    with pytest.raises((ValueError, RuntimeError), match="share memory|single memory location"):
        attention_words_(**operands(out=shared))
