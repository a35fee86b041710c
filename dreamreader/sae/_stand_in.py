"""Plain torch in place of the operators of selection, until they are here."""

import torch
from torch import Tensor

from dreamreader.ops.sparse_rows import SparseRows


def _keep(dense: Tensor, keep: Tensor, threshold: Tensor | None = None) -> SparseRows:
    row, column = keep.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(dense))
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseRows(row_ptr, column.int(), dense[row, column], dense.shape[1], threshold)


def _key(x: Tensor) -> Tensor:
    return torch.where(x < 0, 0, x)


def _sort_key(x: Tensor) -> Tensor:
    return x.detach().float().nan_to_num(nan=torch.inf, posinf=torch.finfo(torch.float32).max)


def topk(x: Tensor, k: int) -> SparseRows:
    key = _key(x)
    order = _sort_key(key).sort(dim=1, descending=True, stable=True).indices[:, :k]
    keep = torch.zeros_like(key, dtype=torch.bool).scatter(1, order, True)
    return _keep(key, keep & ((key > 0) | key.isnan()))


def batch_topk(x: Tensor, count: int, pool: Tensor | None = None) -> SparseRows:
    key = _key(x)
    eligible = (key > 0) | key.isnan()
    if pool is not None:
        chosen = torch.zeros(x.shape[1], dtype=torch.bool)
        chosen[pool.long()] = True
        eligible = eligible & chosen
    sort = torch.where(eligible, _sort_key(key), -1).flatten()
    order = sort.sort(descending=True, stable=True).indices[:count]
    keep = torch.zeros_like(sort, dtype=torch.bool)
    keep[order] = True
    keep = keep.view_as(key) & eligible
    full = bool(keep.sum() == count) and count > 0
    last = key.detach().flatten()[order[-1]] if full else key.new_zeros(())
    return _keep(key, keep, last)


def threshold_select(x: Tensor, threshold: Tensor) -> SparseRows:
    key = _key(x)
    return _keep(key, (key.float() > threshold) | key.isnan())


def column_scores(x: Tensor, score: str) -> Tensor:
    a = _key(x.float())
    if score == "l2":
        return a.norm(dim=0)
    if score == "l2_squared":
        return a.square().sum(0)
    if score in ("entropy", "entropy_low"):
        total = a.sum(0)
        found = total.log() - torch.special.xlogy(a, a).sum(0) / total
        found = torch.where(total > 0, found, 0)
        return found if score == "entropy" else torch.where(total > 0, 1 / (1 + found), 0)
    if score == "uniform":
        return torch.ones(x.shape[1])
    gram = (a @ a.T).double() + 0.01 * torch.eye(len(a), dtype=torch.float64)
    return (a * torch.linalg.solve(gram, a.double()).float()).sum(0)


def choose_pool(
    scores: Tensor, size: int, rule: str = "top", generator: torch.Generator | None = None
) -> Tensor:
    if rule == "sampled":
        noise = -torch.log(-torch.log(torch.rand(len(scores), generator=generator)))
        scores = scores.log() + noise
    order = scores.sort(descending=True, stable=True).indices[:size]
    return order.sort().values.int()


def encode_select(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rule: str = "topk",
    count: int = 0,
    pool: Tensor | None = None,
    threshold: Tensor | None = None,
) -> SparseRows:
    dense = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
    if rule == "batch_topk":
        return batch_topk(dense, count, pool)
    if pool is not None:
        chosen = torch.zeros(len(weight), dtype=torch.bool)
        chosen[pool.long()] = True
        dense = dense.masked_fill(~chosen, 0)
    if rule == "topk":
        return topk(dense, count)
    assert threshold is not None
    return threshold_select(dense, threshold)
