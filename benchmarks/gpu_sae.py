"""Times selections, encoding, sparse products and training steps on a GPU, as gpu.py does.

    python benchmarks/gpu_sae.py [--rounds 9] [--output FILE]
    python benchmarks/gpu_sae.py --check     # no times; on the CPU where there is no GPU

Selections stand beside one read of the matrix, which is larger than the second cache, encoding
beside the bare product of cuBLAS, with the peak of its memory, products beside the form that
sparsify has in torch: a bag of embeddings, and gradients through [rows, k, d]. A training step is
that of `train_sae`, in samples per second. Nothing is timed unless the results are right.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_edits import measure
from paired import environment, write
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

sys.path.append(str(Path(__file__).parents[1]))

from gpu import DEVICE, checked, parser_of  # noqa: E402

from dreamreader import _register, ops  # noqa: E402
from dreamreader.sae import AuxK, BatchTopK, SparseAutoencoder  # noqa: E402
from tests.cases._matrices import identical  # noqa: E402

GPU = DEVICE == "cuda"
K = 64
SELECTED = [(4096, 65_536), (4096, 16_384)] if GPU else [(64, 4096)]  # rows, width
ENCODED = [(4096, 2304, 65_536), (4096, 1280, 16_384)] if GPU else [(64, 32, 4096)]
TRAINED = [(768, 4096), (1280, 16_384)] if GPU else [(32, 256)]
TOKENS = 8192 if GPU else 64
STEPS = 20  # of one timing
# At most this many times the baseline, or at least as many times its speed or samples a second.
GOALS = {
    "batch_topk": 1.35,
    "encode batch_topk": 1.10,
    "decode": 1.7,
    "backward": 5.0,
    "samples": 400_000,
}
Calls = dict[str, Callable[[], Any]]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same normal numbers in each run."""
    g = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=g, device=DEVICE).to(dtype)


def same_selection(found: ops.SparseRows, wanted: tuple[Tensor, ...]) -> None:
    """Raises AssertionError unless an operator gave what its definition gives."""
    values, *threshold, row_ptr, columns = wanted
    mine = [found.values, *([found.threshold] if threshold else []), found.row_ptr, found.columns]
    identical(None, mine, [values, *threshold, row_ptr, columns], [])  # type: ignore[list-item]


def select_calls(rows: int, width: int, dtype: torch.dtype) -> Calls:
    """Selections beside one read."""
    x = draw(rows, width, dtype=dtype)
    hard = {
        "all equal": torch.full_like(x, 2.5),
        "half ties": torch.where(torch.rand(x.shape, device=DEVICE) < 0.5, 1.0, x.float()).to(
            dtype
        ),
    }
    words, count, high = x.view(torch.int32), K * rows, torch.tensor(2.5, device=DEVICE)
    same_selection(ops.batch_topk(x, count), ops.batch_topk_reference(x, count, None))
    same_selection(ops.topk(x, K), ops.topk_reference(x, K))
    for each in hard.values():
        same_selection(ops.batch_topk(each, count), ops.batch_topk_reference(each, count, None))
    return {
        "read": words.amax,
        "batch_topk": lambda: ops.batch_topk(x, count),
        "torch topk of all": lambda: x.flatten().topk(count, sorted=False),
        "topk": lambda: ops.topk(x, K),
        "torch topk of rows": lambda: x.topk(K, dim=1, sorted=False),
        "threshold_select": lambda: ops.threshold_select(x, high, 4 * count),
        "column_scores": lambda: ops.column_scores(x, "l2"),
    } | {f"batch_topk, {name}": partial(ops.batch_topk, each, count) for name, each in hard.items()}


def encode_calls(rows: int, d: int, width: int, dtype: torch.dtype) -> Calls:
    """Encoding with a selection beside the bare product."""
    x, weight, bias = (draw(*size, dtype=dtype) for size in ((rows, d), (width, d), (width,)))
    out, high = torch.empty(rows, width, dtype=dtype, device=DEVICE), torch.tensor(2.5 * d**0.5)
    encode = partial(ops.encode_select, x, weight, bias)
    torch.addmm(bias, x, weight.T, out=out)
    wanted = ops.batch_topk(out, K * rows)
    place = [each.row_of() * width + each.columns for each in (encode(count=K * rows), wanted)]
    shared = torch.isin(*place).float().mean()  # products round differently by shape
    assert float(shared) > 0.99, f"{float(shared):.4f} of the entries are those of the product"
    return {
        "product": lambda: torch.addmm(bias, x, weight.T, out=out),
        "encode batch_topk": lambda: encode(count=K * rows),
        "encode topk": lambda: encode(rule="topk", count=K),
        "encode threshold": partial(
            encode, rule="threshold", threshold=high.to(DEVICE), slots=4 * K * rows
        ),
    }


def product_calls(rows: int, d: int, width: int, dtype: torch.dtype) -> Calls:
    """The decoder and all gradients of both matrices beside the forms of sparsify."""
    codes = ops.topk(draw(rows, width, dtype=dtype), K)
    weight, grad, x = (draw(*size, dtype=dtype) for size in ((width, d), (rows, d), (rows, d)))
    columns, values = codes.columns.view(rows, K), codes.values.view(rows, K)

    def decode() -> Tensor:
        return ops.sparse_decode(codes, weight)

    def decode_by_bags() -> Tensor:
        return embedding_bag(columns, weight, mode="sum", per_sample_weights=values)

    def backward() -> tuple[Tensor, ...]:
        found = torch.ops.dreamreader.sparse_decode_backward(
            grad, codes.row_ptr, codes.columns, codes.values, weight
        )
        changed = ops.SparseRows(codes.row_ptr, codes.columns, found[0], width)
        return *found, ops.sparse_outer(changed, x), ops.sparse_column_sums(changed)

    def backward_by_gathers() -> tuple[Tensor, ...]:
        flat = columns.flatten()
        d_values = (weight[columns] * grad.unsqueeze(1)).sum(2)
        terms = (values.unsqueeze(2) * grad.unsqueeze(1)).flatten(0, 1)  # [rows k, d]
        d_weight = torch.zeros_like(weight).index_add_(0, flat, terms)
        terms = (d_values.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)  # [rows k, d]
        d_encoder = torch.zeros_like(weight).index_add_(0, flat, terms)
        d_bias = weight.new_zeros(width).index_add_(0, flat, d_values.flatten())
        return d_values.flatten(), d_weight, d_encoder, d_bias

    exact = embedding_bag(columns, weight.double(), mode="sum", per_sample_weights=values.double())
    torch.testing.assert_close(decode().double(), exact, rtol=0.02, atol=0.02)
    for mine, theirs in zip(backward(), backward_by_gathers(), strict=True):
        scale = 4 * torch.finfo(dtype).eps * float(theirs.abs().max()) * 8
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=scale)
    return {
        "decode": decode,
        "decode by bags": decode_by_bags,
        "backward": backward,
        "backward by gathers": backward_by_gathers,
    }


def train_step(d: int, width: int, dtype: torch.dtype) -> Callable[[], None]:
    """A step of training, as `train_sae` makes it."""
    sae = SparseAutoencoder(d, width, BatchTopK(K if GPU else 4), aux=AuxK(weight=0.0))
    sae.to(DEVICE, dtype).train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4, fused=True)
    x = draw(TOKENS, d, dtype=dtype)

    def step() -> None:
        result = sae.loss(x)
        result.total.backward()
        sae.before_step()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(result)
        last.append(float(result.mse) if len(last) < 2 else 0.0)

    last: list[float] = []
    step()
    step()
    assert last[1] < last[0], f"the error went from {last[0]} to {last[1]}"
    return step


def samples_per_second(step: Callable[[], None], rounds: int) -> float:
    """The median over rounds, in eager mode with all of Python."""
    found = []
    for _ in range(rounds + 1):  # the first warms up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        found.append(TOKENS * STEPS / (begin.elapsed_time(end) / 1e3))
    return statistics.median(found[1:])


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call holds at most beyond those that were there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def row_of(name: str, dtype: torch.dtype, base: str, calls: Calls, rounds: int) -> dict[str, Any]:
    """Times of one group of calls, and their ratios to the first of them."""
    calls = {"copy": calls[base], **calls}
    row = measure(calls, rounds)
    row["to_base"] = {key: value for key, value in row.pop("to_copy").items() if key != "copy"}
    row["microseconds"].pop("copy")
    return {"case": name, "dtype": str(dtype), "base": base} | row


def groups(dtype: torch.dtype) -> dict[str, tuple[str, Callable[[], Calls]]]:
    """What is timed together: its baseline, and what makes the calls and checks them."""
    made: dict[str, tuple[str, Callable[[], Calls]]] = {}
    for size in SELECTED:
        made["select " + "x".join(map(str, size))] = ("read", partial(select_calls, *size, dtype))
    for size in ENCODED:
        name = "x".join(map(str, size))
        made[f"encode {name}"] = ("product", partial(encode_calls, *size, dtype))
        made[f"sparse {name}"] = ("decode by bags", partial(product_calls, *size, dtype))
    return made


def main() -> None:
    arguments = checked(parser_of(__doc__, ["bfloat16", "float32"]))
    rows: list[dict[str, Any]] = []
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        for name, (base, make) in groups(dtype).items():
            calls = make()
            if arguments.check:
                print(name, dtype, "right on", DEVICE, flush=True)
                continue
            row = row_of(name, dtype, base, calls, min(9, arguments.rounds))
            if base == "product":
                row["peak_megabytes"] = round(peak_of(calls["encode batch_topk"]) / 1e6)
            rows.append(row)
            print(name, dtype, row["microseconds"], row.get("peak_megabytes", ""), flush=True)
        for d, width in TRAINED:
            step = train_step(d, width, dtype)
            if arguments.check:
                print("training", d, width, dtype, "right on", DEVICE, flush=True)
                continue
            speed = round(samples_per_second(step, 5))
            rows.append({"case": f"training {d}x{width}", "dtype": str(dtype), "samples": speed})
            print("training", d, width, dtype, speed, "samples/s", flush=True)
        if arguments.output and rows:  # what was measured until here stays
            backends = {
                name: _register.active[name]["CUDA"].backend
                for name in ("batch_topk", "topk", "encode_select", "sparse_decode")
            }
            result = {"environment": environment(), "backends": backends, "goals": GOALS}
            write(result | {"rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
