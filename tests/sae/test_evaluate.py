"""Measures against SAELens' on the same numbers, by hand, and on data that was built for them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows
from dreamreader.sae import BatchTopK, SparseAutoencoder
from dreamreader.sae.evaluate import (
    probe_latents,
    score_absorption,
    score_known_answers,
    score_reconstruction,
    shuffle_features,
    with_random_decoder,
    with_random_encoder,
)
from dreamreader.sae.evaluate.coder import encode_and_decode, inference
from dreamreader.sae.evaluate.known_answers import DetectionCounts
from dreamreader.sae.evaluate.reconstruction import ReconstructionSums
from dreamreader.sae.matching import cosines, mean_correlation, uniqueness
from dreamreader.sae.synthetic import SyntheticConfig, SyntheticFeatures, compensate

KNOWN = Path(__file__).parent / "saelens_known"


class Linear(nn.Module):
    """relu(x W_enc) and back; dense codes, as a foreign autoencoder gives them."""

    def __init__(self, encoder: torch.Tensor, decoder: torch.Tensor | None = None):
        super().__init__()
        self.W_enc = nn.Parameter(encoder.clone())
        self.W_dec = nn.Parameter(encoder.T.clone() if decoder is None else decoder.clone())

    def encode(self, x):
        return (x @ self.W_enc).relu()

    def decode(self, codes):
        return codes @ self.W_dec


class Fixed:
    """Codes that are given, whatever comes."""

    def __init__(self, codes: torch.Tensor, decoder: torch.Tensor):
        self.codes, self.W_dec = codes, decoder

    def encode(self, x):
        return self.codes

    def decode(self, codes):
        return codes @ self.W_dec


def halves(rows: int) -> torch.Tensor:
    return torch.arange(rows) % 2 == 1


# Against SAELens


@pytest.fixture(scope="module")
def known():
    return load_file(KNOWN / "known.safetensors"), json.loads((KNOWN / "known.json").read_text())


def test_the_parameters_are_those_of_saelens(known):
    tensors, report = known
    c = report["config"]
    world = SyntheticFeatures(
        SyntheticConfig(
            features=c["num_features"],
            d_in=c["hidden_dim"],
            roots=c["roots"],
            branching=c["branching"],
            depth=c["depth"],
            rank=c["rank"],
            correlation=c["correlation"],
            orthogonal_steps=c["steps"],
            orthogonal_lr=c["lr"],
        )
    )
    ours = {
        "directions": world.directions,
        "bias": world.bias,
        "probabilities": compensate(world.probabilities, world.parents),
        "means": world.means,
        "deviations": world.deviations,
        "factor": world.factor,
        "diagonal": world.noise.square(),
    }
    for name, value in ours.items():
        torch.testing.assert_close(value, tensors[name], atol=2e-5, rtol=2e-5, msg=name)


def test_measures_are_those_of_saelens(known):
    tensors, report = known
    want = report["scores"]
    directions, decoder = tensors["directions"], tensors["decoder"]
    best = cosines(decoder, directions).abs().argmax(1)
    counts, sums = DetectionCounts(best, len(directions)), ReconstructionSums(decoder)
    for part in torch.arange(len(tensors["x"])).split(37):
        codes = SparseRows.from_dense(tensors["latents"][part])
        counts.add(codes, SparseRows.from_dense(tensors["truth"][part]))
        sums.add(tensors["x"][part], tensors["rebuilt"][part], codes)
    detection, rebuilt = counts.scores(), sums.scores()
    got = {
        name: float(getattr(detection, name).mean())
        for name in ("f1", "precision", "recall", "accuracy")
    }
    got |= {
        name: getattr(rebuilt, name) for name in ("explained_variance", "shrinkage", "l0", "dead")
    }
    got |= {
        "mcc": mean_correlation(decoder, directions),
        "uniqueness": uniqueness(decoder, directions),
    }
    assert want.keys() - got.keys() == {"true_l0"}
    for name, value in got.items():
        assert value == pytest.approx(want[name], rel=2e-6), name


# Reconstruction


def test_reconstruction_by_hand():
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [2.0, 2.0]])
    codes = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0], [1.0, 1.0, 0]])
    scores = score_reconstruction(Fixed(codes, torch.tensor([[1.0, 0], [0, 2.0], [3, 3]])), [x])
    # errors 1, 0, 0, 1 of a variance 4 * (1 + 1)
    assert scores.fvu == pytest.approx(2 / 8) and scores.explained_variance == pytest.approx(0.75)
    assert scores.l0 == 1 and scores.rows == 4 and scores.dead == 1
    assert scores.dead_share == pytest.approx(1 / 3)
    # the third row has no length; (1, 2) is sqrt(5) long, (2, 2) is sqrt(8)
    assert scores.shrinkage == pytest.approx((0.5 + 1 + (5 / 8) ** 0.5) / 3)
    assert scores.frequency.tolist() == [0.5, 0.5, 0]
    assert scores.strength.tolist() == [2, 2, 0] and scores.energy.tolist() == [2, 8, 0]


def test_batches_add_up_and_a_large_offset_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=generator)
    sae = Linear(torch.randn(6, 12, generator=generator) / 6)
    whole = score_reconstruction(sae, [x])
    parts = score_reconstruction(sae, [x[:7], x[:0], x[7:50], x[50:]])
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-9)
    assert torch.equal(parts.fired, whole.fired) and parts.l0 == whole.l0
    assert parts.shrinkage == pytest.approx(whole.shrinkage, rel=1e-9)
    moved = ReconstructionSums(sae.W_dec)
    error = 1e-2 * torch.randn(90, 6, generator=generator).double()
    for part in torch.arange(90).split(13):
        far = x[part].double() + 1e7
        moved.add(far, far + error[part], SparseRows.from_dense(torch.zeros(len(part), 12)))
    want = error.square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert moved.scores().fvu == pytest.approx(float(want), rel=1e-5)


def test_sparse_codes_are_used_where_there_are_some():
    class Sparse(Linear):
        def encode_sparse(self, x):
            return SparseRows.from_dense(self.encode(x))

        def decode(self, codes):
            assert isinstance(codes, SparseRows)
            return codes.dense() @ self.W_dec

    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 8, generator=generator), torch.randn(20, 4, generator=generator)
    dense, sparse = (score_reconstruction(kind(weight), [x]) for kind in (Linear, Sparse))
    assert sparse.fvu == dense.fvu and torch.equal(sparse.fired, dense.fired)


def test_the_mode_is_put_back():
    sae = Linear(torch.eye(3))
    sae.train()
    with pytest.raises(ZeroDivisionError), inference(sae):
        assert not sae.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert sae.training and torch.is_grad_enabled()
    sae.eval()
    with inference(sae):
        pass
    assert not sae.training


def test_histogram_counts_each_latent_once():
    codes = torch.zeros(1000, 5)
    for latent, count in enumerate((1000, 100, 10, 1)):
        codes[:count, latent] = 1
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    scores = score_reconstruction(Fixed(codes, torch.ones(5, 2)), [x])
    found = scores.histogram(bins=4, lowest=-4.0)
    assert found.edges.tolist() == [-4, -3, -2, -1, 0] and found.dead == 1
    assert found.counts.tolist() == [0, 1, 1, 2]  # bins begin at their left edge; the last has 0
    assert scores.histogram(bins=2, lowest=-1.0).counts.tolist() == [3, 1]
    with pytest.raises(InvalidInput, match="bins >= 1, lowest < 0, got 0 and 1.0"):
        scores.histogram(0, 1.0)


def test_lottery_sees_rare_strong_latents():
    codes = torch.zeros(100, 4)
    codes[:, 0], codes[:50, 1], codes[:2, 2] = 1.0, 2.0, 30.0
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    lottery = score_reconstruction(Fixed(codes, torch.ones(4, 2)), [x]).lottery()
    assert lottery.correlation == -1
    assert lottery.rare_share == pytest.approx(2 / 152)
    assert lottery.rare_energy == pytest.approx(1800 / (100 + 200 + 1800))
    fair = score_reconstruction(Fixed(codes.flip(1) * 0 + 1, torch.ones(4, 2)), [x]).lottery()
    assert fair.rare_share == 0 and fair.rare_energy == 0


@pytest.mark.parametrize(
    "batches, says",
    [
        ([], "batches are empty"),
        ([torch.zeros(0, 3)], "batches are empty"),
        ([torch.ones(4, 3)], "all 4 rows are equal"),
        ([torch.ones(4, 2)], r"rows must be \[rows, 3\], as wide as the decoder, got \[4, 2\]"),
        ([torch.ones(2, 4, 3)], r"rows must be \[rows, 3\].*got \[2, 4, 3\]"),
        ([torch.tensor([[1.0, 2, 3], [float("nan"), 0, 0]])], "not finite"),
        ([torch.tensor([[1.0, 2, 3], [float("inf"), 0, 0]])], "not finite"),
    ],
)
def test_rows_that_cannot_be_measured(batches, says):
    with pytest.raises(InvalidInput, match=says):
        score_reconstruction(Linear(torch.eye(3)), batches)


# Known answers


def test_detection_by_hand():
    # both latents stand for feature 1; the third for a feature that never fires, and it never does
    counts = DetectionCounts(torch.tensor([1, 1, 0]), width=3)
    truth = torch.tensor([[0.0, 5, 0], [0, 5, 1], [0, 0, 1], [0, 5, 0]])
    latents = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    for part in (slice(0, 3), slice(3, 4)):
        counts.add(SparseRows.from_dense(latents[part]), SparseRows.from_dense(truth[part]))
    scores = counts.scores()
    assert scores.precision.tolist() == [pytest.approx(2 / 3), 0.5, 0]
    assert scores.recall.tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 3), 0]
    assert scores.f1.tolist() == [pytest.approx(2 / 3), pytest.approx(0.4), 0]
    assert scores.accuracy.tolist() == [0.5, 0.25, 1]
    with pytest.raises(InvalidInput, match="latents of 4 rows, features of 2"):
        counts.add(SparseRows.from_dense(latents), SparseRows.from_dense(truth[:2]))


def test_the_truth_itself_scores_one_and_random_directions_little():
    world = SyntheticFeatures(
        SyntheticConfig(features=24, d_in=24, roots=2, branching=2, depth=2, orthogonal_steps=300)
    )
    inverse = torch.linalg.inv(world.directions)

    class Oracle:
        W_dec = world.directions[:20]

        def encode(self, x):
            exact = (x - world.bias) @ inverse
            return torch.where(exact > 1e-3, exact, 0)[:, :20]

        def decode(self, codes):
            return codes @ self.W_dec + world.bias

    found = score_known_answers(Oracle(), world, rows=3000, batch=700).summary()
    for name in ("f1", "precision", "recall", "mcc", "uniqueness"):
        assert found[name] == pytest.approx(1, abs=2e-3), name
    assert found["l0"] < found["true_l0"] and found["explained_variance"] > 0.9
    random = Oracle()
    random.W_dec = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    worse = score_known_answers(random, world, rows=3000, batch=700).summary()
    assert worse["f1"] < 0.4 and worse["mcc"] < 0.6


# Probing and absorption


def test_probe_finds_the_latents_of_an_attribute():
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(600, 30, generator=generator) < 0.2).float()
    codes *= torch.rand(600, 30, generator=generator) + 0.5
    labels = torch.stack([codes[:, 7] > 0, (codes[:, 3] > 0) | (codes[:, 11] > 0)], 1)
    probes = probe_latents(SparseRows.from_dense(codes), labels, halves(600), k=(1, 2))
    one, two = probes[1], probes[2]
    assert one.latents[0].tolist() == [7] and set(two.latents[1].tolist()) == {3, 11}
    assert float(one.accuracy[0]) == float(one.auroc[0]) == float(one.f1[0]) == 1
    assert float(one.auroc[1]) < 0.9 < 0.99 < float(two.auroc[1]) and float(two.accuracy[1]) > 0.98


def test_probe_is_the_penalised_optimum():
    generator = torch.Generator().manual_seed(1)
    codes = torch.rand(200, 4, generator=generator)
    noise = torch.randn(200, generator=generator)
    labels = (codes[:, 0] - codes[:, 1] + 0.3 * noise > 0)[:, None]
    held_out = halves(200)
    probe = probe_latents(SparseRows.from_dense(codes), labels, held_out, k=(2,), l2=0.5)[2]
    x = codes[~held_out][:, probe.latents[0]].double()
    y = labels[~held_out, 0].double()
    scale = x.std(0, correction=0)
    own = probe.weights[0] * scale
    offset = probe.offset[0] + (probe.weights[0] * x.mean(0)).sum()
    z = (x - x.mean(0)) / scale
    w = torch.cat([own, offset[None]]).requires_grad_()
    logit = z @ w[:-1] + w[-1]
    loss = nn.functional.binary_cross_entropy_with_logits(logit, y, reduction="sum")
    (loss + 0.25 * w[:-1].square().sum()).backward()
    assert float(w.grad.abs().max()) < 1e-4
    assert own.abs().min() > 0.3


def test_scores_of_a_probe_by_hand():
    # the latent is on in 3 of 4 rows with the attribute and in 1 of 4 without it
    on = [1, 1, 1, 0, 1, 0, 0, 0] * 2
    labels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0] * 2).bool()[:, None]
    held_out = torch.arange(16) >= 8
    codes = SparseRows.from_dense(torch.tensor(on).float()[:, None])
    probe = probe_latents(codes, labels, held_out, k=(1,))[1]
    assert float(probe.accuracy) == 0.75 and float(probe.f1) == 0.75
    assert float(probe.auroc) == pytest.approx((9 + 0.5 * 6) / 16)


def absorbed_data():
    """Latent 0 says what is general, but latent 1 says both where it is special."""
    generator = torch.Generator().manual_seed(2)
    general = torch.rand(400, generator=generator) < 0.5
    special = general & (torch.rand(400, generator=generator) < 0.25)
    other = torch.rand(400, generator=generator) < 0.3
    codes = torch.stack([general & ~special, special, other], 1).float()
    decoder = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0], [0, 0, 1.0]])
    return codes, decoder, torch.stack([general, special], 1)


def test_absorption_counts_rows_where_another_latent_speaks():
    codes, decoder, labels = absorbed_data()
    x, held_out = codes @ decoder, halves(400)
    scores = score_absorption(Fixed(codes, decoder), x, labels, held_out)
    taken = labels[held_out, 1].sum() / labels[held_out, 0].sum()
    assert float(scores.absorbed[0]) == float(scores.silent[0]) == pytest.approx(float(taken))
    assert scores.absorber.tolist() == [1, -1] and float(scores.absorbed[1]) == 0
    # a latent that points elsewhere, or carries too little, takes nothing over
    exact = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    for options in ({"least_cosine": 0.9}, {"least_share": 1.1}):
        none = score_absorption(
            Fixed(codes, decoder), x, labels, held_out, torch.tensor([0, 1]), exact, **options
        )
        assert float(none.absorbed[0]) == 0 and float(none.silent[0]) == pytest.approx(float(taken))
    spoken = torch.cat([codes[:, :1] + codes[:, 1:2] * 0.01, codes[:, 1:]], 1)
    none = score_absorption(Fixed(spoken, decoder), x, labels, held_out, torch.tensor([0, 1]))
    assert float(none.absorbed[0]) == float(none.silent[0]) == 0


def test_a_dead_main_latent_is_silent_but_nothing_is_absorbed():
    codes, decoder, labels = absorbed_data()
    main = torch.tensor([2, 1])
    codes[:, :2] = 0
    scores = score_absorption(
        Fixed(codes, decoder), codes @ decoder, labels, halves(400), main, torch.eye(3)[:2]
    )
    assert scores.absorbed.tolist() == [0, 0] and scores.absorber.tolist() == [-1, -1]
    assert float(scores.silent[1]) == 1


@pytest.mark.parametrize(
    "labels, held_out, k, says",
    [
        (
            torch.ones(6, 1),
            halves(6),
            (1,),
            r"labels must be bool \[6, .*float32 \[6, 1\]",
        ),
        (torch.ones(5, 1).bool(), halves(6), (1,), r"got bool \[5, 1\]"),
        (torch.ones(6, 1).bool(), halves(5), (1,), r"held_out must be bool \[6\], got bool \[5\]"),
        (torch.ones(6, 1).bool(), halves(6), (1,), "3 of 3 training rows have attribute 0"),
        (halves(6)[:, None], halves(6), (1,), "0 of 3 training rows have attribute 0"),
        (torch.arange(6)[:, None] < 2, halves(6), (0,), "k must be from 1 to 4, got 0"),
        (torch.arange(6)[:, None] < 2, halves(6), (5,), "k must be from 1 to 4, got 5"),
    ],
)
def test_labels_that_cannot_be_probed(labels, held_out, k, says):
    with pytest.raises(InvalidInput, match=says):
        probe_latents(SparseRows.from_dense(torch.eye(6)[:, :4]), labels, held_out, k)


# Controls


def test_random_halves_keep_lengths_and_do_not_learn():
    generator = torch.Generator().manual_seed(0)
    sae = Linear(torch.randn(5, 9, generator=generator), torch.randn(9, 5, generator=generator))
    decoder, encoder = with_random_decoder(sae, 1), with_random_encoder(sae, 1)
    assert not decoder.W_dec.requires_grad and decoder.W_enc.requires_grad
    assert not encoder.W_enc.requires_grad and encoder.W_dec.requires_grad
    assert torch.equal(decoder.W_enc, sae.W_enc) and torch.equal(encoder.W_dec, sae.W_dec)
    torch.testing.assert_close(decoder.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    torch.testing.assert_close(encoder.W_enc.norm(dim=0), sae.W_enc.norm(dim=0))
    similar = nn.functional.cosine_similarity(decoder.W_dec, sae.W_dec.detach())
    assert float(similar.abs().max()) < 0.95
    assert sae.W_dec.requires_grad and sae.W_enc.requires_grad
    assert torch.equal(with_random_decoder(sae, 1).W_dec, decoder.W_dec)
    assert not torch.equal(with_random_decoder(sae, 2).W_dec, decoder.W_dec)


def test_shuffled_features_keep_their_values_and_lose_each_other():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=generator) @ torch.ones(1, 4)
    (found,) = shuffle_features([x], seed=3)
    assert torch.equal(found.sort(0).values, x.sort(0).values)
    assert float((torch.corrcoef(found.T) - torch.eye(4)).abs().max()) < 0.1
    again, other = next(shuffle_features([x], seed=3)), next(shuffle_features([x], seed=4))
    assert torch.equal(found, again) and not torch.equal(found, other)


def test_encode_and_decode_gives_codes_alone():
    codes, none = encode_and_decode(Linear(torch.eye(3)), torch.eye(3), decode=False)
    assert torch.equal(codes.dense(), torch.eye(3)) and none.numel() == 0


# All of it, on what was learned


def learn(sae: SparseAutoencoder, world: SyntheticFeatures, steps: int = 300) -> SparseAutoencoder:
    optimizer = torch.optim.Adam([each for each in sae.parameters() if each.requires_grad], lr=3e-3)
    sae.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        result = sae.loss(world.batch(step, 256)[0])
        optimizer.zero_grad()
        result.total.backward()
        sae.before_step()
        optimizer.step()
        sae.after_step(result)
    return sae


def test_learned_features_are_found_and_random_halves_are_told_apart():
    world = SyntheticFeatures(
        SyntheticConfig(
            features=256,
            d_in=128,
            min_probability=2e-3,
            max_probability=0.1,
            roots=0,
            deviation=(0.5, 0.2),
            orthogonal_lr=3e-3,
        )
    )
    k = float(world.probabilities[:24].sum())
    fresh = SparseAutoencoder(128, 24, BatchTopK(k), inference="selection")
    kinds = {
        "learned": fresh,
        "random decoder": with_random_decoder(fresh),
        "random encoder": with_random_encoder(fresh),
    }
    found = {
        name: score_known_answers(learn(sae, world), world, rows=4096).summary()
        for name, sae in kinds.items()
    }
    learned = found.pop("learned")
    assert learned["f1"] > 0.9 and learned["mcc"] > 0.95 and learned["uniqueness"] > 0.95
    for name, control in found.items():
        assert control["f1"] < 0.5 and control["mcc"] < 0.6, name
        assert control["explained_variance"] < learned["explained_variance"] - 0.1, name


def test_controls_do_not_begin_where_an_autoencoder_of_their_seed_does():
    sae = SparseAutoencoder(8, 16, BatchTopK(2), seed=4)
    for control in (with_random_decoder(sae, seed=4), with_random_encoder(sae, seed=4)):
        changed = control.W_dec if control.W_enc.equal(sae.W_enc) else control.W_enc.T
        similar = nn.functional.cosine_similarity(changed.detach(), sae.W_dec.detach())
        assert float(similar.abs().max()) < 0.99
    assert control.W_enc.T.is_contiguous()
