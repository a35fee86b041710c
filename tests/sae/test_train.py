"""Training: against a loop written out, resumed to the bit, and on all kinds of batches."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting.toy import SITE, write_store
from safetensors.torch import load_file
from torch import Tensor

from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.fitting import ByStep, NonFiniteLoss
from dreamreader.sae import (
    AuxK,
    BatchTopK,
    SampledTopK,
    SparseAutoencoder,
    ThresholdRule,
    TopK,
    train_sae,
)
from dreamreader.sae.objective import ScoreCurve
from dreamreader.sae.optimizer import StridedAdam
from dreamreader.store import StoreDataset


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def progress(event: Any) -> None:
        if event.done == step:
            raise Stop

    return progress


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def data(step: int) -> Tensor:
    """Rows of few directions of twelve."""
    codes = draw(48, 12, seed=step).clamp(min=0.8) - 0.8
    return 3 * codes @ torch.nn.functional.normalize(draw(12, 8, seed=77), dim=1)


BATCHES = ByStep(data, of="data of this file")


def differences(one: SparseAutoencoder, other: SparseAutoencoder) -> list[str]:
    wanted = other.state_dict()
    return [name for name, each in one.state_dict().items() if not torch.equal(each, wanted[name])]


def test_a_few_steps_are_those_of_a_loop_that_is_written_out():
    sae = SparseAutoencoder(8, 24, TopK(3), threshold_rule=ThresholdRule(after=3))
    w_enc, b_enc = sae.W_enc.detach().clone(), torch.zeros(24)
    w_dec = sae.W_dec.detach().clone()
    x = data(0)
    b_dec = x.mean(0)
    for _ in range(200):
        weights = 1 / (x - b_dec).norm(dim=1, keepdim=True)
        b_dec = (weights * x).sum(0) / weights.sum()
    made = [each.requires_grad_() for each in (w_dec, w_enc, b_enc, b_dec)]
    optimiser = torch.optim.Adam(made, lr=0.01)
    losses, threshold = [], -1.0
    for step in range(10):
        x = data(step)
        for group in optimiser.param_groups:  # up in 2 steps, down in the last 2
            group["lr"] = 0.01 * min((step + 1) / 2, 1.0, (10 - step) / 2)
        acts = ((x - b_dec) @ w_enc + b_enc).relu()
        best = acts.topk(3, dim=1)
        codes = torch.zeros_like(acts).scatter(1, best.indices, best.values)
        loss = (x - codes @ w_dec - b_dec).square().sum(1).mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec.detach()
        torch.nn.utils.clip_grad_norm_(made, 1.0)
        optimiser.step()
        w_dec.data /= w_dec.data.norm(dim=1, keepdim=True)
        if step >= 3:
            rows = best.values.detach()[(best.values > 0).any(1)]
            least = torch.where(rows > 0, rows, torch.inf).amin(1).mean().item()
            threshold = least if threshold < 0 else 0.999 * threshold + 0.001 * least
    history = train_sae(sae, BATCHES, steps=10, lr=0.01, warmup=2, progress=False)
    assert history.losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(sae.W_dec, w_dec, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sae.W_enc, w_enc, rtol=1e-3, atol=1e-4)
    assert sae.threshold is not None
    assert sae.threshold[0].item() == pytest.approx(threshold, rel=1e-4)
    assert int(sae.steps) == 10 and not sae.training


TRAINED = sorted((Path(__file__).parent / "data" / "trained").glob("*.safetensors"))


@pytest.mark.parametrize("file", TRAINED, ids=lambda each: each.stem)
def test_twelve_steps_are_those_of_the_packages(file: Path):
    """Loss, aux-k, gradients, thresholds: written by benchmarks/peers/sae_*.py."""
    package, kind = file.stem.split("-")
    found = load_file(file)
    groups = [6, 12] if kind == "matryoshka" else None
    options: dict[str, Any] = {"groups": groups, "threshold_rule": package}
    if package == "saelens":  # dead after more than 3 steps of 12 rows without firing
        aux = AuxK(1.0, None, 4 * 12, relative=False, scaled=True, positive=False, lagged=True)
        options |= {"rescale": True, "aux": aux}
    else:
        options |= {"threshold_rule": ThresholdRule(after=5), "aux": AuxK(dead_after=40)}
        options |= {"group_weights": [1 / 9] * 3 if groups else None}
    sae = SparseAutoencoder(8, 24, TopK(3) if kind == "topk" else BatchTopK(3), **options)
    sae.set_tensors({name: found[f"start.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    dead: list[float] = []
    history = train_sae(
        sae,
        list(found["batches"]),
        steps=12,
        lr=0.01,
        warmup=0,
        schedule="constant",
        optimizer={"Adam": {"eps": 1e-3}},
        center=package != "saelens",
        progress=lambda event: dead.append(event.numbers["dead"]),
    )
    assert history.losses == pytest.approx(found["losses"].tolist(), rel=1e-5)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(
            getattr(sae, name).detach(), found[f"end.{name}"], rtol=1e-4, atol=1e-5, msg=name
        )
    if package == "dictionary_learning" or kind != "topk":  # SAELens has none for TopK
        assert sae.threshold[0].item() == pytest.approx(found["threshold"].item(), rel=1e-4)
    assert max(dead) > 0  # aux-k had a part


def several() -> dict[str, SparseAutoencoder]:
    options = {"threshold_rule": "saelens", "aux": AuxK(dead_after=200)}
    return {
        "batch": SparseAutoencoder(12, 40, BatchTopK(3), groups=[8], **options),
        "sampled": SparseAutoencoder(
            12,
            37,
            SampledTopK(3, l=2, rule="sampled", update_every=4),
            normalise="standardise",
            rescale=True,
            **options,
        ),
    }


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_stopped_inside_an_epoch_it_goes_on_to_the_same_bits(tmp_path: Path, compute: str):
    def train(folder: Path, saes: Any, progress: Any = False) -> Any:
        rows = StoreDataset(tmp_path / "store", SITE, batch_size=32, seed=0, dtype=torch.float32)
        how: dict[str, Any] = {
            "epochs": 2,
            "lr": 0.01,
            "compute": compute,
            "k_start": 6,
            "k_steps": 9,
        }
        return train_sae(saes, rows, folder=folder, save_every=4, progress=progress, **how)

    write_store(tmp_path / "store")
    whole = several()
    wanted = train(tmp_path / "whole", whole)
    with pytest.raises(Stop):
        train(tmp_path / "halves", several(), stop_at(7))
    again, seen = several(), []
    found = train(tmp_path / "halves", again, lambda event: seen.append(event))
    assert seen[0].done == 5 and found == wanted
    for name, sae in again.items():
        assert not differences(sae, whole[name])
        assert sae.W_enc.dtype == torch.float32 and sae.compute_dtype is None
    assert {"batch: fvu", "sampled: l0", "batch: dead"} <= set(seen[-1].numbers)
    assert max(seen[-1].numbers[f"{name}: dead"] for name in again) > 0  # aux-k had a part


def test_in_one_pass_each_learns_as_it_would_alone():
    rows = [draw(32, 12, seed=step) for step in range(5)]
    together = several()
    train_sae(together, rows, epochs=2, progress=False)
    for name, alone in several().items():
        train_sae(alone, rows, epochs=2, progress=False)
        assert not differences(together[name], alone)


def test_bfloat16_learns_what_float32_learns():
    losses = {}
    for compute in ("float32", "bfloat16"):
        sae = SparseAutoencoder(8, 24, BatchTopK(3))
        history = train_sae(sae, BATCHES, steps=90, lr=0.005, compute=compute, progress=False)
        losses[compute] = sum(history.losses[-20:]) / 20
        assert losses[compute] < 0.4 * history.losses[0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_the_recipe_is_that_of_the_field_unless_another_is_given():
    sae, rates = SparseAutoencoder(8, 2**6, TopK(2)), []

    class Watched(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    own = {"optimizer": lambda each: Watched(each, lr=2e-4 / math.sqrt(2**6 / 2**14))}
    train_sae(sae, BATCHES, steps=100, progress=False, **own)
    top = 2e-4 * 16
    assert rates[0] == pytest.approx(top / 10) and rates[9] == pytest.approx(top)
    assert rates[79] == pytest.approx(top) and rates[90] == pytest.approx(top / 2)
    assert rates[99] == pytest.approx(top / 20)


def test_k_falls_to_that_of_the_selection():
    seen = []
    sae = SparseAutoencoder(8, 24, BatchTopK(2))
    train_sae(
        sae,
        BATCHES,
        steps=8,
        k_start=10,
        k_steps=4,
        center=False,
        progress=lambda event: seen.append(event.numbers["l0"]),
    )
    assert seen == pytest.approx([10, 8, 6, 4, 2, 2, 2, 2], abs=0.6)
    assert sae.selection == BatchTopK(2)


def test_tokens_outside_of_a_mask_teach_nothing():
    def masked(step: int) -> tuple[Tensor, Tensor]:
        x = data(step).reshape(6, 8, 8).clone()
        mask = torch.arange(48).reshape(6, 8) % 3 > 0
        x[~mask] = 1e6
        return x, mask

    def alone(step: int) -> Tensor:
        x, mask = masked(step)
        return x[mask]

    one, other = (SparseAutoencoder(8, 24, BatchTopK(2)) for _ in range(2))
    train_sae(one, ByStep(masked), steps=5, progress=False)
    train_sae(other, ByStep(alone), steps=5, progress=False)
    assert not differences(one, other)


def test_batches_by_name_and_by_site():
    saes = {
        "a": SparseAutoencoder(8, 24, TopK(2)),
        "b": SparseAutoencoder(4, 24, TopK(2), metadata={"site": "unet.mid_block"}),
    }

    def both(epoch: int) -> Iterator[dict[str, Tensor]]:  # an iterator without an end
        step = 0
        while True:
            yield {"a": data(step), "unet.mid_block": data(step)[:, :4]}
            step += 1

    histories = train_sae(saes, both, steps=4, progress=False)
    assert [len(each.losses) for each in histories.values()] == [4, 4]
    alone = SparseAutoencoder(8, 24, TopK(2))
    train_sae(alone, BATCHES, steps=4, progress=False)
    assert not differences(saes["a"], alone)


def test_the_best_on_validation_is_kept_and_validated_in_eval_mode():
    sae, modes, found = SparseAutoencoder(8, 24, BatchTopK(2)), [], []

    def validate() -> float:
        modes.append(sae.training)
        found.append(sae.loss(data(999)).mse.item())
        return found[-1]

    history = train_sae(
        sae, BATCHES, steps=20, lr=0.01, validate=validate, validate_every=5, progress=False
    )
    assert modes == [False] * 4 and [step for step, _ in history.validation] == [5, 10, 15, 20]
    assert sae.loss(data(999)).mse.item() == min(found)


def test_a_store_with_keys_gives_rows(tmp_path: Path):
    write_store(tmp_path / "store")
    rows = StoreDataset(tmp_path / "store", SITE, batch_size=32, keys=True, dtype=torch.float32)
    history = train_sae(SparseAutoencoder(12, 24, TopK(2)), rows, epochs=1, progress=False)
    assert len(history.losses) == len(rows)


def test_what_cannot_be_right_is_refused(tmp_path: Path):
    sae = SparseAutoencoder(8, 24, TopK(2))
    write_store(tmp_path / "store")
    store = StoreDataset(tmp_path / "store", SITE, batch_size=32)
    for batches, options, said in (
        (store, {"epochs": 1}, "have width 12, the autoencoder has d_in=8"),
        ([draw(4, 5)], {"epochs": 1}, r"x must be \[..., 8\], got \[4, 5\]"),
        (["rows"], {"epochs": 1}, "a batch is x .* got str"),
        ([], {"epochs": 1}, "there are no batches"),
        (iter([draw(4, 8)]), {"steps": 1}, "can be read only once"),
        (BATCHES, {"steps": 0}, "steps must be at least 1"),
        (BATCHES, {"steps": 3, "compute": "float16"}, "unknown compute"),
        (BATCHES, {"steps": 3, "k_start": 4}, "belong together"),
        (BATCHES, {"steps": 3, "k_start": 0, "k_steps": 4}, "k_start is positive"),
        (BATCHES, {"steps": 3, "momentum": 4}, "unknown option of train_sae 'momentum'"),
        (BATCHES, {"steps": 3, "decay": 0}, "decay is a share above 0"),
    ):
        with pytest.raises(DreamreaderError, match=said):
            train_sae(sae, batches, progress=False, **options)
    with pytest.raises(DreamreaderError, match="compute='bfloat16', which keeps them as float32"):
        train_sae(SparseAutoencoder(8, 24, TopK(2)).bfloat16(), BATCHES, steps=1)
    with pytest.raises(DreamreaderError, match="a SparseAutoencoder is trained"):
        train_sae(torch.nn.Linear(8, 8), BATCHES, steps=1)
    with pytest.raises(DreamreaderError, match="no rows of|unknown site|site"):
        StoreDataset(tmp_path / "store", "unet.nowhere", batch_size=32)


def test_arguments_of_another_type_are_refused():
    sae, rows = SparseAutoencoder(8, 24, TopK(2)), draw(4, 8)
    for batches, options, said in (
        (BATCHES, {"steps": "5"}, "steps is a whole number, got '5'"),
        (BATCHES, {"steps": 3, "center": "no"}, "center is True or False"),
        (BATCHES, {"steps": 3, "validate": 5}, "validate is a function"),
        (BATCHES, {"steps": 3, "curve": 5}, "curve is a ScoreCurve"),
        (BATCHES, {"steps": 3, "of": 5}, "of is plain values by name"),
        (BATCHES, {"steps": 3, "compute": None}, "unknown compute"),
        (BATCHES, {"steps": 3, "k_start": "a", "k_steps": 4}, "k_start is positive"),
        (BATCHES, {"steps": 3, "k_start": 4, "k_steps": 1.5}, "k_steps at least 1, got 4, 1.5"),
        (5, {"steps": 3}, "batches are a list, a dataset"),
        ([(rows, torch.ones(4))], {"steps": 1}, r"mask must be bool \[4\].*got torch.float32"),
        ([(rows, torch.ones(3) > 0)], {"steps": 1}, r"mask must be bool \[4\].*bool \[3\]"),
        ([(rows, torch.zeros(4) > 0)], {"steps": 1}, "no token counts in the first batch"),
    ):
        with pytest.raises(DreamreaderError, match=said):
            train_sae(sae, batches, progress=False, **options)
    with pytest.raises(InvalidInput, match="names of autoencoders are text, got 1"):
        train_sae({1: sae}, BATCHES, steps=1)
    with pytest.raises(InvalidInput, match="ScoreCurve: steps are whole numbers of at least 1"):
        ScoreCurve([0], lambda name, sae: {})
    assert bool(sae.b_dec.isfinite().all())


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
def test_adam_steps_transposed_weights_to_the_bits_of_torch(options: dict[str, Any]):
    kinds = (torch.optim.Adam, StridedAdam)
    shapes = (draw(5), draw(6, 40).T, draw(40, 6))
    own = [[torch.nn.Parameter(each.clone()) for each in shapes] for _ in kinds]
    made = [kind(p, lr=0.1, fused=True, **options) for kind, p in zip(kinds, own, strict=True)]
    assert own[1][1].stride() == (1, 40)
    for step in range(3):
        for parameters, optimizer in zip(own, made, strict=True):
            for number, each in enumerate(parameters):
                gradient = draw(*each.shape, seed=10 * step + number) / 100**step  # averages fall
                each.grad = torch.empty_like(each).copy_(gradient)
            if step == 2:  # another layout than that of the weights
                parameters[1].grad = parameters[1].grad.contiguous()
            optimizer.step()
    for theirs, ours in zip(*own, strict=True):
        assert torch.equal(theirs, ours)
    assert made[1].state[own[1][1]]["exp_avg"].shape == own[1][1].shape


def test_rows_that_are_not_finite_stop_it_and_name_the_step():
    def broken(step: int) -> Tensor:
        return data(step) * (math.nan if step == 3 else 1)

    sae = SparseAutoencoder(8, 24, BatchTopK(2), threshold_rule="saelens")
    with pytest.raises(NonFiniteLoss, match="step 3: the loss is nan.*part: squared error"):
        train_sae(sae, ByStep(broken), steps=9, progress=False)
    assert bool(sae.W_enc.isfinite().all()) and bool(sae.thresholds.isfinite().all())


def test_batches_without_a_name_of_it_teach_nothing_and_say_so():
    sae = SparseAutoencoder(4, 8, TopK(2))
    with pytest.raises(InvalidInput, match="no batch had rows for a: batches by name need"):
        train_sae({"a": sae}, [{"b": torch.randn(8, 4)}] * 5, steps=5, progress=False)
