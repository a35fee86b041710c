"""The generator of known answers beside SAELens': the same parameters, the same statistics.

    python benchmarks/peers/sae_synthetic.py [--rows 20000] [--python PYTHON] [--write]

Each library runs in an environment of its own (PYTHON: one with sae-lens, else it is made as
run.py makes them) and saves sums over its samples; this compares them. Orthogonalisation runs for
`--steps` steps only, as SAELens' takes minutes for one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
FEATURES, ROOTS, BRANCHING, DEPTH = 16384, 128, 4, 3
TREES = ROOTS * sum(BRANCHING**level for level in range(DEPTH + 1))
LEVELS = {"roots": (0, 128), "children": (128, 640), "grandchildren": (640, 2688)}
LEVELS |= {"leaves": (2688, TREES), "lone": (TREES, FEATURES)}
BATCH = 500


def published(
    num_features: int = FEATURES,
    hidden_dim: int = 768,
    roots: int = ROOTS,
    branching: int = BRANCHING,
    depth: int = DEPTH,
    rank: int = 25,
    correlation: float = 0.1,
    steps: int = 100,
    lr: float = 3e-4,
) -> Any:
    """SAELens' model; as it stands, the configuration that SynthSAEBench-16k was published with."""
    from sae_lens import synthetic as s

    return s.SyntheticModel(
        s.SyntheticModelConfig(
            num_features=num_features,
            hidden_dim=hidden_dim,
            firing_probability=s.ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.4, min_prob=5e-4
            ),
            hierarchy=s.HierarchyConfig(
                total_root_nodes=roots,
                branching_factor=branching,
                max_depth=depth,
                mutually_exclusive_portion=1.0,
                mutually_exclusive_min_depth=0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            orthogonalization=s.OrthogonalizationConfig(num_steps=steps, lr=lr),
            correlation=s.LowRankCorrelationConfig(rank=rank, correlation_scale=correlation),
            mean_firing_magnitudes=s.LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=s.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=42,
        )
    )


def run_saelens(options: argparse.Namespace) -> dict[str, Tensor]:
    model = published(steps=options.steps)
    torch.manual_seed(0)
    sums = sum_up(lambda _: model.sample_with_features(BATCH), options.rows)
    draws = model.activation_generator
    return sums | {
        "parameter/directions": model.feature_dict.feature_vectors.data,
        "parameter/bias": model.feature_dict.bias.data,
        "parameter/probabilities": draws.firing_probabilities,
        "parameter/means": draws.mean_firing_magnitudes,
        "parameter/deviations": draws.std_firing_magnitudes,
        "parameter/factor": model.correlation_matrix.correlation_factor,
    }


def run_dreamreader(options: argparse.Namespace) -> dict[str, Tensor]:
    from dreamreader.sae.synthetic import SyntheticConfig, SyntheticFeatures, compensate

    world = SyntheticFeatures(SyntheticConfig(orthogonal_steps=options.steps))

    def batch(index: int) -> tuple[Tensor, Tensor]:
        x, codes = world.batch(index, BATCH)
        return x, codes.dense()

    sums = sum_up(batch, options.rows)
    begun = time.perf_counter()
    for index in range(8):
        world.batch(index, 1024)
    sums["seconds"] = torch.tensor([(time.perf_counter() - begun) / (8 * 1024)])
    return sums | {
        "parameter/directions": world.directions,
        "parameter/bias": world.bias,
        "parameter/probabilities": compensate(world.probabilities, world.parents),
        "parameter/means": world.means,
        "parameter/deviations": world.deviations,
        "parameter/factor": world.factor,
    }


def sum_up(batch: Any, rows: int) -> dict[str, Tensor]:
    """Sums of samples that all that is compared follows from."""
    count = torch.zeros(FEATURES, dtype=torch.float64)
    total, square, relative = count.clone(), count.clone(), count.clone()
    roots = torch.zeros(ROOTS, ROOTS, dtype=torch.float64)
    active, norms, levels = [], [], []
    second = torch.zeros(768, 768, dtype=torch.float64)
    first = torch.zeros(768, dtype=torch.float64)
    orphans = twins = seconds = 0.0
    child = torch.arange(ROOTS, TREES)
    parent = (child - ROOTS) // BRANCHING
    for index in range(rows // BATCH):
        begun = time.perf_counter()
        x, codes = batch(index)
        seconds += time.perf_counter() - begun
        fires = codes > 0
        count += fires.sum(0)
        total += codes.sum(0)
        square += codes.square().sum(0)
        orphans += float((fires[:, child] & ~fires[:, parent]).sum())
        family = fires[:, child].view(BATCH, -1, BRANCHING).sum(2)
        twins += float((family > 1).sum())
        relative[child] += (codes[:, child] / codes[:, parent].clamp(min=1e-9)).sum(0)
        own = fires[:, :ROOTS].double()
        roots += own.T @ own
        active.append(fires.sum(1))
        levels.append(torch.stack([fires[:, a:b].sum(1) for a, b in LEVELS.values()], 1))
        norms.append(x.norm(dim=1))
        first += x.double().sum(0)
        second += x.double().T @ x.double()
    n = rows // BATCH * BATCH
    mean = first / n
    return {
        "count": count,
        "strength": total,
        "square": square,
        "relative": relative,
        "roots": roots / n,
        "active": torch.cat(active).double(),
        "levels": torch.cat(levels).double(),
        "norms": torch.cat(norms).double(),
        "variances": torch.linalg.eigvalsh(second / n - torch.outer(mean, mean)).flip(0),
        "broken": torch.tensor([orphans, twins]),
        "seconds": torch.tensor([seconds / n]),
    }


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Both sides of each statistic, and standard errors where numbers can differ by chance."""
    found: dict[str, Any] = {}
    for name in sorted(key for key in ours if key.startswith("parameter/")):
        found[f"largest difference of {name[10:]}"] = float((ours[name] - theirs[name]).abs().max())
    n = len(ours["active"])
    sides = (ours, theirs)
    found["rows"] = n
    found["features active in a row"] = [_mean(s["active"]) for s in sides]
    found["its standard deviation"] = [float(s["active"].std()) for s in sides]
    cuts = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    found["its 5, 50, 95 % quantiles"] = [s["active"].quantile(cuts).tolist() for s in sides]
    for index, level in enumerate(LEVELS):
        found[f"active {level}"] = [_mean(s["levels"][:, index]) for s in sides]
    rates = [s["count"] / n for s in sides]
    error = (sum(r * (1 - r) for r in rates) / n).sqrt()
    z = ((rates[0] - rates[1]) / error)[error > 0]
    found["firing rates: mean square of z (1 expected), largest |z|"] = [
        float(z.square().mean()),
        float(z.abs().max()),
    ]
    for index, level in enumerate(LEVELS.values()):
        part = slice(*level)
        count = [s["count"][part].sum() for s in sides]
        means = [float(s["strength"][part].sum() / c) for s, c in zip(sides, count, strict=True)]
        spreads = [
            float((s["square"][part].sum() / c - m * m).sqrt())
            for s, c, m in zip(sides, count, means, strict=True)
        ]
        found[f"strength of {list(LEVELS)[index]}"] = means
        found[f"its spread, {list(LEVELS)[index]}"] = spreads
    part = slice(ROOTS, TREES)
    found["strength of children over their parent's"] = [
        float(s["relative"][part].sum() / s["count"][part].sum()) for s in sides
    ]
    found["children without parent, siblings together"] = [s["broken"].tolist() for s in sides]
    upper = torch.triu_indices(ROOTS, ROOTS, 1)
    correlations = [_correlations(s["roots"])[*upper] for s in sides]
    found["correlations of roots: standard deviation"] = [float(c.std()) for c in correlations]
    found["correlations of roots: r of both sides"] = float(
        torch.corrcoef(torch.stack(correlations))[0, 1]
    )
    found["length of activations"] = [_mean(s["norms"]) for s in sides]
    found["its spread"] = [float(s["norms"].std()) for s in sides]
    for k in (1, 10, 25, 100):
        shares = [float(s["variances"][:k].sum() / s["variances"].sum()) for s in sides]
        found[f"variance in the first {k} components"] = shares
    found["microseconds for a row"] = [float(s["seconds"]) * 1e6 for s in sides]
    return found


def _mean(values: Tensor) -> list[float]:
    """Mean and its standard error."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def _correlations(together: Tensor) -> Tensor:
    rate = together.diagonal()
    spread = (rate * (1 - rate)).sqrt()
    return (together - torch.outer(rate, rate)) / torch.outer(spread, spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=1, help="of orthogonalisation")
    parser.add_argument("--python", help="of an environment with sae-lens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    parser.add_argument("--side", choices=("saelens", "dreamreader"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        sides = {"saelens": run_saelens, "dreamreader": run_dreamreader}
        return save_file(sides[options.side](options), options.out)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from paired import environment, write
    from run import interpreter

    pythons = {"dreamreader": sys.executable}
    cache = Path.home() / ".cache" / "dreamreader" / "peers"
    pythons["saelens"] = options.python or str(interpreter("saelens_store", cache))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for side, python in pythons.items():
            out = Path(scratch) / f"{side}.safetensors"
            own = ["--side", side, "--out", out, "--rows", options.rows, "--steps", options.steps]
            command = [python, __file__, *own, "--threads", options.threads]
            subprocess.run([str(each) for each in command], check=True)
            found[side] = load_file(out)
    table = compare(found["dreamreader"], found["saelens"])
    for name, value in table.items():
        print(f"{name:60s} {json.dumps(value)}")
    if options.write:
        result = {"benchmark": "sae-synthetic", "environment": environment(), "table": table}
        print(write(result, "sae-synthetic"))


if __name__ == "__main__":
    main()
