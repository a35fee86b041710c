"""What few latents tell of attributes, and where one latent has taken the place of another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows
from dreamreader.sae.evaluate.coder import Coder, encode_rows, inference
from dreamreader.stats import ranks


@dataclass(frozen=True)
class SparseProbes:
    """Logistic probes on the k latents that differ the most with an attribute.

    Attributes:
        k: latents of each probe.
        latents: which, the largest difference of means first, int64 [attributes, k].
        weights: of the latents [attributes, k]. offset: [attributes].
        accuracy, auroc, f1: on the rows that did not train, [attributes].
    """

    k: int
    latents: Int[Tensor, "attributes k"]
    weights: Float[Tensor, "attributes k"]
    offset: Float[Tensor, " attributes"]
    accuracy: Float[Tensor, " attributes"]
    auroc: Float[Tensor, " attributes"]
    f1: Float[Tensor, " attributes"]


@dataclass(frozen=True)
class AbsorptionScores:
    """Attributes whose main latent stays silent where another one speaks for it.

    Attributes:
        absorbed: share of the attribute's rows in which that is so [attributes].
        silent: share in which the main latent is silent, for whatever reason [attributes].
        absorber: the latent that speaks most often in its place, -1 where none does.
    """

    absorbed: Float[Tensor, " attributes"]
    silent: Float[Tensor, " attributes"]
    absorber: Int[Tensor, " attributes"]


@torch.no_grad()
def probe_latents(
    codes: SparseRows,
    labels: Bool[Tensor, "rows attributes"],
    held_out: Bool[Tensor, " rows"],
    k: Sequence[int] = (1, 2, 5),
    l2: float = 1.0,
) -> dict[int, SparseProbes]:
    """Fits probes on the k latents whose means differ the most with each attribute.

    Latents are chosen by |mean with - mean without| on the training rows; the probe minimises
    sum_i log(1 + exp(-y_i (w z_i + b))) + l2/2 |w|^2 over standardised latents.

    Args:
        codes: latents of the rows.
        labels: which rows have which attribute, such as each colour on its own.
        held_out: rows that only measure.
        k: sizes of probes.
        l2: weight of the penalty.

    Returns:
        The probes by k.

    Raises:
        InvalidInput: shapes differ, k is not from 1 to the number of latents, or an attribute has
            not rows with and without it on both sides.

    Reference:
        Kantamneni et al., Are sparse autoencoders useful?, arXiv:2502.16681.
    """
    held_out = _check_labels("probe_latents", codes.rows, labels, held_out)
    for each in k:
        if not 1 <= each <= codes.width:
            raise InvalidInput(f"probe_latents: k must be from 1 to {codes.width}, got {each}")
    train = ~held_out
    difference = _difference(codes, labels & train[:, None], ~labels & train[:, None])
    order = difference.abs().topk(max(k), dim=1).indices  # [attributes, largest k]
    z = _columns(codes, order)  # [attributes, rows, largest k]
    return {each: _probe(z[..., :each], order[:, :each], labels, train, l2) for each in k}


@torch.no_grad()
def score_absorption(
    sae: Coder,
    x: Float[Tensor, "rows d_in"],
    labels: Bool[Tensor, "rows attributes"],
    held_out: Bool[Tensor, " rows"],
    main: Int[Tensor, " attributes"] | None = None,
    directions: Float[Tensor, "attributes d_in"] | None = None,
    least_cosine: float = 0.1,
    least_share: float = 0.4,
    codes: SparseRows | None = None,
) -> AbsorptionScores:
    """Measures how often another latent carries an attribute whose main latent is silent.

    A held-out row with the attribute counts as absorbed where the main latent is 0 and one other
    latent j, with cos(W_dec_j, p) >= `least_cosine`, carries at least `least_share` of the
    projection on the probe: z_j <W_dec_j, p> >= least_share <sum_i z_i W_dec_i, p> > 0.

    Args:
        sae: what has encode, decode and W_dec.
        x, labels: rows and their attributes, the truth.
        held_out: rows that are measured; the others choose main latents and directions.
        main: the main latent of each attribute; that of the probe with k = 1 if None.
        directions: p of each attribute; the difference of its means if None.
        codes: of the rows, such as means over the tokens of a picture whose mean activation is
            x; what `sae` gives for x if None.

    Raises:
        InvalidInput: shapes differ, or an attribute has not rows with and without it on both sides.

    Reference:
        After Chanin et al., A is for absorption, arXiv:2409.14507, with exact labels in place of
        first letters.
    """
    held_out = _check_labels("score_absorption", len(x), labels, held_out)
    if codes is None:
        with inference(sae):
            codes = encode_rows(sae, x)
    elif codes.rows != len(x):
        raise InvalidInput(f"score_absorption: codes of {codes.rows} rows for {len(x)} of x")
    if main is None:
        main = probe_latents(codes, labels, held_out, k=(1,))[1].latents[:, 0]
    if directions is None:
        train, wide = ~held_out, x.double()
        sides = [(labels & train[:, None]).double(), (~labels & train[:, None]).double()]
        have, lack = ((side.T @ wide) / side.sum(0)[:, None] for side in sides)
        directions = have - lack
    decoder = sae.W_dec.detach().double()
    probe = torch.nn.functional.normalize(directions.double(), dim=1)
    along = decoder @ probe.T  # [d_sae, attributes]
    cosine = along / decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
    found = [
        _absorbed(
            codes,
            labels[:, a] & held_out,
            int(main[a]),
            along[:, a],
            cosine[:, a] >= least_cosine,
            least_share,
        )
        for a in range(labels.shape[1])
    ]
    absorbed, silent, absorber = zip(*found, strict=True)
    return AbsorptionScores(torch.tensor(absorbed), torch.tensor(silent), torch.tensor(absorber))


def _absorbed(
    codes: SparseRows, rows: Tensor, main: int, along: Tensor, close: Tensor, share: float
) -> tuple[float, float, int]:
    row, column = codes.row_of(), codes.columns.long()
    inside = (row >= 0) & rows[row.clamp(min=0)]
    row, column, value = row[inside], column[inside], codes.values[inside].double()
    size = codes.rows
    speaks = torch.zeros(size, dtype=torch.bool, device=rows.device)
    speaks[row[(column == main) & (value != 0)]] = True
    silent = rows & ~speaks
    part = value * along[column]
    total = part.new_zeros(size).index_add_(0, row, part)
    carries = silent[row] & close[column]
    carries &= (part > 0) & (part >= share * total[row]) & (total[row] > 0)
    count = int(rows.sum())
    votes = torch.bincount(column[carries], minlength=codes.width)
    absorber = int(votes.argmax()) if bool(carries.any()) else -1
    return len(row[carries].unique()) / count, int(silent.sum()) / count, absorber


def _check_labels(name: str, rows: int, labels: Tensor, held_out: Tensor) -> Tensor:
    if labels.dim() != 2 or labels.shape[0] != rows or labels.dtype != torch.bool:
        raise InvalidInput(
            f"{name}: labels must be bool [{rows}, attributes], one line for each row, got "
            f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        )
    if held_out.shape != (rows,) or held_out.dtype != torch.bool:
        raise InvalidInput(
            f"{name}: held_out must be bool [{rows}], got "
            f"{str(held_out.dtype).removeprefix('torch.')} {list(held_out.shape)}"
        )
    for part, side in (("training", ~held_out), ("held-out", held_out)):
        have, size = labels[side].sum(0), int(side.sum())
        for attribute in ((have == 0) | (have == size)).nonzero().squeeze(1).tolist():
            raise InvalidInput(
                f"{name}: {int(have[attribute])} of {size} {part} rows have attribute {attribute}; "
                "rows with and without it are needed there"
            )
    return held_out


def _difference(codes: SparseRows, have: Tensor, lack: Tensor) -> Tensor:
    """Difference of the means of latents, [attributes, width] float64."""
    row, column = codes.row_of(), codes.columns.long()
    used = row >= 0
    row, column, value = row[used], column[used], codes.values[used].double()
    means = []
    for a in range(have.shape[1]):
        sides = []
        for side in (have[:, a], lack[:, a]):
            inside = side[row]
            total = torch.bincount(column[inside], value[inside], minlength=codes.width)
            sides.append(total / side.sum())
        means.append(sides[0] - sides[1])
    return torch.stack(means)


def _columns(codes: SparseRows, wanted: Tensor) -> Tensor:
    """Values of some columns for each attribute, [attributes, rows, k] float64."""
    names, place = wanted.unique(return_inverse=True)
    where = torch.full((codes.width,), -1, device=wanted.device)
    where[names] = torch.arange(len(names), device=wanted.device)
    row, column = codes.row_of(), codes.columns.long()
    kept = (row >= 0) & (where[column.clamp(min=0)] >= 0)
    table = torch.zeros(codes.rows, len(names), dtype=torch.float64, device=wanted.device)
    table[row[kept], where[column[kept]]] = codes.values[kept].double()
    return table[:, place].transpose(0, 1)


def _probe(z: Tensor, latents: Tensor, labels: Tensor, train: Tensor, l2: float) -> SparseProbes:
    y = labels.T.double()  # [attributes, rows]
    seen = z[:, train]
    mean, deviation = seen.mean(1, keepdim=True), seen.std(1, keepdim=True, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    z = (z - mean) / scale
    weights = _newton(z[:, train], y[:, train], l2)
    score = (z[:, ~train] @ weights[:, :-1, None]).squeeze(-1) + weights[:, -1:]
    truth, said = labels[~train].T, score > 0
    both = (truth & said).sum(1).double()
    own = weights[:, :-1] / scale.squeeze(1)
    return SparseProbes(
        z.shape[2],
        latents,
        own,
        weights[:, -1] - (own * mean.squeeze(1)).sum(1),
        (truth == said).double().mean(1),
        torch.tensor([_auroc(s, t) for s, t in zip(score, truth, strict=True)]),
        2 * both / (truth.sum(1) + said.sum(1)),
    )


def _newton(x: Tensor, y: Tensor, l2: float) -> Tensor:
    """Penalised logistic regressions side by side, [attributes, k + 1] with the offset last.

    Newton's steps, halved where they do not go down.
    """
    attributes, rows, k = x.shape
    x = torch.cat([x, x.new_ones(attributes, rows, 1)], -1)
    penalty = torch.full((k + 1,), l2, dtype=x.dtype, device=x.device)
    penalty[-1] = 0
    weights = x.new_zeros(attributes, k + 1)

    def loss(w: Tensor) -> Tensor:
        margin = (x @ w[..., None]).squeeze(-1)
        fit = torch.nn.functional.softplus(margin) - y * margin
        return fit.sum(1) + (penalty * w.square()).sum(1) / 2

    now = loss(weights)
    for _ in range(100):
        p = torch.sigmoid((x @ weights[..., None]).squeeze(-1))
        slope = ((p - y)[:, None] @ x).squeeze(1) + penalty * weights
        bend = (x * (p * (1 - p))[..., None]).mT @ x + penalty.diag()
        bend.diagonal(dim1=-2, dim2=-1).add_(1e-9 * rows)
        step = torch.linalg.solve(bend, slope)
        after = loss(weights - step)
        for _ in range(30):
            worse = after > now
            if not bool(worse.any()):
                break
            step = torch.where(worse[:, None], step / 2, step)
            after = loss(weights - step)
        better = after < now
        if not bool(better.any()):
            break
        weights = torch.where(better[:, None], weights - step, weights)
        now = torch.where(better, after, now)
    return weights


def _auroc(score: Tensor, truth: Tensor) -> float:
    """The chance that a row with the attribute scores above one without it; ties are half."""
    positive = int(truth.sum())
    total = ranks(score.cpu().numpy())[truth.cpu().numpy()].sum()
    below = total - positive * (positive + 1) / 2
    return float(below / (positive * (len(truth) - positive)))
