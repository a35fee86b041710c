"""The autoencoder against plain dense formulas."""

import math

import pytest
import torch
from torch import Tensor

import dreamreader as dr
from dreamreader.artifacts.file import save_described
from dreamreader.errors import DreamreaderError, InvalidInput
from dreamreader.sae import (
    AuxK,
    BatchTopK,
    JumpReLU,
    SampledTopK,
    SparseAutoencoder,
    ThresholdRule,
    TopK,
)

SELECTIONS = [TopK(3), BatchTopK(3), BatchTopK(1.5), SampledTopK(3, l=2), JumpReLU()]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(selection=None, d_in=6, d_sae=20, seed=0, **options) -> SparseAutoencoder:
    """With biases and an encoder that is not the decoder's transpose."""
    chosen = BatchTopK(3) if selection is None else selection
    sae = SparseAutoencoder(d_in, d_sae, chosen, tied=False, seed=seed, **options)
    with torch.no_grad():
        sae.b_enc.copy_(0.3 * draw(d_sae, seed=seed + 1))
        sae.b_dec.copy_(0.3 * draw(d_in, seed=seed + 2))
    return sae


def kept(acts: Tensor, selection, thresholds: Tensor) -> Tensor:
    """What a selection keeps of positive activations, by sorting."""
    if isinstance(selection, JumpReLU):
        return torch.where(acts > thresholds, acts, 0)
    if isinstance(selection, TopK):
        least = acts.sort(1).values[:, -selection.k].unsqueeze(1)
        return torch.where(acts >= least, acts, 0)
    if isinstance(selection, SampledTopK):
        size = round(selection.k * selection.l)
        scores = acts.square().sum(0)
        acts = torch.where(scores >= scores.sort().values[-size], acts, 0)
    count = round(selection.k * len(acts))
    least = acts.flatten().sort().values[-count]
    return torch.where((acts >= least) & (acts > 0), acts, 0)


@pytest.mark.parametrize("options", [{}, {"rescale": True, "decoder_norm": 0.4}])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_codes_reconstruction_and_gradients_are_those_of_the_dense_formulas(selection, options):
    sae = make(selection, dtype=torch.float64, apply_b_dec_to_input=True, **options)
    if options:
        with torch.no_grad():
            sae.W_dec.mul_(draw(20, 1, seed=5).abs() + 0.5)
    x = draw(9, 6, dtype=torch.float64).requires_grad_()
    norms = sae.W_dec.norm(dim=1) if sae.rescale else torch.ones(20, dtype=torch.float64)
    acts = (((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms).relu()
    chosen = kept(acts.detach(), selection, sae.thresholds) > 0
    codes = acts * chosen
    rebuilt = codes / norms @ sae.W_dec + sae.b_dec
    assert torch.allclose(sae.encode(x), codes, atol=1e-12)
    assert torch.equal(sae.encode(x) > 0, chosen)
    assert torch.allclose(sae(x), rebuilt, atol=1e-12)
    assert torch.allclose(sae.decode(sae.encode(x)), rebuilt, atol=1e-12)
    assert torch.allclose(sae.decode(sae.encode_sparse(x)), rebuilt, atol=1e-12)

    error = (x - rebuilt).square().sum(1).mean()
    named = [*sae.named_parameters(), ("x", x)]
    wanted = torch.autograd.grad(error, [each for _, each in named])
    result = sae.loss(x)
    result.total.backward()
    assert result.total.item() == pytest.approx(error.item(), abs=1e-12)
    for (name, each), gradient in zip(named, wanted, strict=True):
        assert torch.allclose(each.grad, gradient, atol=1e-10), name
    assert result.fvu.item() == pytest.approx(
        ((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()).item()
    )
    assert result.l0.item() == pytest.approx(chosen.sum(1).double().mean().item())


def test_in_bfloat16_gradients_are_not_rounded_on_the_way_to_the_weights():
    sae, x = make(BatchTopK(2), rescale=True), draw(64, 6)
    sae.compute_dtype = torch.bfloat16
    result = sae.loss(x)
    result.total.backward()
    gradient = sae.W_enc.grad
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())
    sae.compute_dtype = None
    exact = torch.autograd.grad(sae.loss(x).total, [sae.W_enc])[0]
    assert (gradient - exact).norm() < 0.03 * exact.norm()


def test_three_dimensional_inputs_are_rows_and_k_is_of_a_token():
    for selection in (BatchTopK(2), SampledTopK(2, l=8), TopK(2)):
        sae, x = make(selection), draw(4, 7, 6)
        codes = sae.encode(x)
        assert codes.shape == (4, 7, 20)
        assert codes.count_nonzero().item() == 4 * 7 * 2  # not 4 * 2, the first axis alone
        assert sae.loss(x).l0.item() == 2 and sae.loss(x).tokens == 28
        assert torch.equal(codes.reshape(28, 20), sae.encode(x.reshape(28, 6)))
        assert sae(x).shape == x.shape and sae.encode_sparse(x).rows == 28


def test_tokens_outside_of_the_mask_have_no_codes_and_take_no_budget():
    sae, x = make(BatchTopK(2)), draw(3, 5, 6)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 2:] = mask[2, :4] = False
    x = torch.where(mask.unsqueeze(-1), x, 100.0)
    codes = sae.encode(x, mask)
    assert codes[~mask].count_nonzero() == 0
    assert torch.equal(codes[mask], sae.encode(x[mask]))
    assert torch.allclose(sae(x, mask)[~mask], sae.b_dec.expand(7, 6))
    result, alone = sae.loss(x, mask), sae.loss(x[mask])
    assert result.tokens == 8 and result.total.item() == alone.total.item()
    with pytest.raises(InvalidInput, match="no token counts"):
        sae.loss(x, torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(InvalidInput, match=r"mask must be bool \[3, 5\]"):
        sae.encode(x, mask.float())


def test_prefixes_have_a_loss_each():
    sae, x = make(BatchTopK(4), groups=[5, 12], group_weights=[0.5, 2, 1]), draw(10, 6)
    codes, losses = sae.encode(x), []
    for width in (5, 12, 20):
        rebuilt = codes[:, :width] @ sae.W_dec[:width] + sae.b_dec
        losses.append((x - rebuilt).square().sum(1).mean().item())
    result = sae.loss(x)
    assert result.groups.tolist() == pytest.approx(losses)
    wanted = 0.5 * losses[0] + 2 * losses[1] + losses[2]
    assert result.total.item() == pytest.approx(wanted)
    assert result.mse.item() == pytest.approx(losses[2])


def test_eval_keeps_what_is_above_the_threshold_where_there_is_one():
    sae, x = make(BatchTopK(3)).eval(), draw(9, 6)
    assert sae.threshold is None and sae.encode(x).count_nonzero() == 27
    sae.threshold = 0.5
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    assert torch.equal(sae.encode(x) > 0, acts > 0.5)
    sae.threshold = torch.linspace(-1, 2, 20)  # those below 0 keep what is positive
    assert torch.equal(sae.encode(x) > 0, acts > torch.linspace(-1, 2, 20).clamp(min=0))
    assert sae.train().encode(x).count_nonzero() == 27
    sae.inference = "selection"
    assert sae.eval().encode(x).count_nonzero() == 27


@pytest.mark.parametrize("rule", ["dictionary_learning", "saelens"])
def test_the_threshold_follows_the_published_rule(rule):
    after, steps = (3, 7) if rule == "dictionary_learning" else (0, 7)
    how = ThresholdRule(after=after) if rule == "dictionary_learning" else rule
    sae = make(BatchTopK(2), threshold_rule=how)
    wanted = -1.0 if rule == "dictionary_learning" else 0.0
    for step in range(steps):
        x = draw(8, 6, seed=step)
        if step == 5:
            x[0, 0] = math.nan  # may not enter
        codes = sae.encode(x)
        least = codes[codes > 0].min().item() if step != 5 else None
        sae.after_step(sae.loss(x))
        if step >= after and least is not None:
            if rule == "saelens":
                wanted = 0.99 * wanted + 0.01 * least
            else:
                wanted = least if wanted < 0 else 0.999 * wanted + 0.001 * least
        if wanted < 0:
            assert sae.threshold is None
        else:
            assert sae.threshold.dtype == torch.float32
            assert sae.threshold.tolist() == pytest.approx([wanted] * 20, rel=1e-6)


def test_a_step_without_active_latents_counts_as_each_rule_says():
    x = torch.zeros(4, 6)
    for rule, wanted in (("saelens", 0.8), ("dictionary_learning", 0.8 * 0.999)):
        how = rule if rule == "saelens" else ThresholdRule(after=0)
        sae = make(BatchTopK(2), threshold_rule=how)
        with torch.no_grad():
            sae.b_enc.fill_(-10)
        sae.threshold = 0.8
        sae.after_step(sae.loss(x))
        assert sae.threshold[0].item() == pytest.approx(wanted, rel=1e-6)


def test_thresholds_and_counters_stay_as_they_are_when_weights_are_cast():
    sae = make(BatchTopK(2))
    sae.threshold = 0.123456789
    sae.steps.fill_(7)
    for cast in (sae.bfloat16, sae.half, sae.double, sae.float, lambda: sae.to(torch.bfloat16)):
        cast()
        assert sae.threshold.dtype == torch.float32 and sae.threshold_mean.dtype == torch.float64
        assert sae.threshold[0].item() == torch.tensor(0.123456789).item()
    assert sae.W_enc.dtype == torch.bfloat16 and sae.W_enc.T.is_contiguous()
    x = draw(5, 6).bfloat16()
    assert sae(x).dtype == torch.bfloat16
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    codes = sae.eval().encode(x)
    assert torch.equal(codes > 0, acts.float() > 0.123456789)  # not above its bfloat16


def test_inference_keeps_k_on_average_after_training():
    how = ThresholdRule(after=0, decay=0.9)
    sae = SparseAutoencoder(16, 256, BatchTopK(20), threshold_rule=how)
    for step in range(40):
        with torch.no_grad():
            sae.after_step(sae.loss(draw(512, 16, seed=step)))
    found = sae.eval().loss(draw(4096, 16, seed=999)).l0.item()
    assert found == pytest.approx(20, rel=0.02)  # and not 21.2, as 106 for 100


@pytest.mark.parametrize("rule", ["dictionary_learning", "saelens"])
def test_dead_latents_rebuild_the_residual(rule):
    published = {"dictionary_learning": AuxK(dead_after=30), "saelens": None}[rule]
    how = published or AuxK(1.0, dead_after=30, relative=False, scaled=True, positive=False)
    sae = make(BatchTopK(2), dtype=torch.float64, aux=how)
    sae.tokens_since_fired[[1, 4, 7, 11]] = 25
    x = draw(10, 6, dtype=torch.float64)
    codes = sae.encode(x)
    idle = torch.where(codes.count_nonzero(0) > 0, 0, sae.tokens_since_fired + 10)
    dead = (idle >= 30).nonzero().squeeze(1)
    assert 0 < len(dead) < 4  # some of the four are active
    acts = (x - sae.b_dec) @ sae.W_enc[:, dead] + sae.b_enc[dead]
    acts = acts.relu() if how.positive else acts
    k = min(3, len(dead))
    acts = torch.where(acts >= acts.sort(1).values[:, -k].unsqueeze(1), acts, 0)
    residual = (x - codes @ sae.W_dec - sae.b_dec).detach()
    error = (residual - acts @ sae.W_dec[dead]).square().sum(1).mean()
    if rule == "saelens":
        wanted = error * min(len(dead) / 3, 1)
    else:
        wanted = error / 32 / (residual - residual.mean(0)).square().sum(1).mean()
    result = sae.loss(x)
    assert result.aux.item() == pytest.approx(wanted.item())
    assert result.dead.item() == pytest.approx(len(dead) / 20)
    gradients = torch.autograd.grad(wanted, [sae.W_enc, sae.b_enc], allow_unused=True)
    main = torch.autograd.grad(result.total - 0, [sae.W_enc, sae.b_enc])
    assert torch.allclose(main[0][:, dead], gradients[0][:, dead])
    assert torch.allclose(main[1][dead], gradients[1][dead])
    sae.after_step(result)
    assert torch.equal(sae.tokens_since_fired, idle)


def test_no_dead_latents_and_no_weight_give_no_term():
    x = draw(10, 6)
    assert make(BatchTopK(2)).loss(x).aux.item() == 0
    sae = make(BatchTopK(2), aux="none")
    sae.tokens_since_fired.fill_(10**9)
    assert sae.loss(x).aux.item() == 0 and sae.loss(x).dead.item() > 0


def test_constraints_of_the_decoder_and_the_encoder():
    sae = make(BatchTopK(2), aligned=True)
    sae.constrain()
    x, before = draw(10, 6), sae.W_dec.detach().clone()
    sae.loss(x).total.backward()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() > 1e-3
    sae.before_step()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-5
    with torch.no_grad():
        for each in sae.parameters():
            each -= 0.5 * each.grad
    sae.after_step(sae.loss(x))
    assert not torch.equal(before, sae.W_dec)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.allclose((sae.W_enc.T * sae.W_dec).sum(1), torch.ones(20), atol=1e-5)


def test_b_dec_begins_at_the_geometric_median():
    x = torch.cat([draw(30, 6), 1000 + draw(3, 6)])
    sae = SparseAutoencoder(6, 20, TopK(2))
    sae.center_on(x)
    directions = (x - sae.b_dec) / (x - sae.b_dec).norm(dim=1, keepdim=True)
    assert directions.sum(0).norm() < 1e-3  # where the sum of distances is least
    assert torch.equal(sae.W_enc, sae.W_dec.T)


@pytest.mark.parametrize("kind", ["average_norm", "standardise", "constant_norm", "layer_norm"])
def test_inputs_are_normalised_and_restored(kind):
    x = 5 + 3 * draw(40, 6) * torch.arange(1, 7)
    sae = make(BatchTopK(3), normalise=kind)
    if kind in ("average_norm", "standardise"):
        sae.fit_normalisation(x)
    if kind == "average_norm":
        z, back = (
            x * math.sqrt(6) / x.norm(dim=1).mean(),
            lambda z: z * x.norm(dim=1).mean() / 6**0.5,
        )
    elif kind == "standardise":
        z, back = (x - x.mean(0)) / x.std(0), lambda z: z * x.std(0) + x.mean(0)
    elif kind == "constant_norm":
        norm = x.norm(dim=1, keepdim=True)
        z, back = x * math.sqrt(6) / norm, lambda z: z * norm / math.sqrt(6)
    else:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        z, back = (x - mean) / (std + 1e-5), lambda z: z * std + mean
    plain = make(BatchTopK(3))
    assert torch.allclose(sae.encode(x), plain.encode(z), atol=1e-4)
    assert torch.allclose(sae(x), back(plain(z)), rtol=1e-4, atol=1e-3)
    assert sae.loss(x).total.item() == pytest.approx(plain.loss(z).total.item(), rel=1e-4)
    if kind in ("constant_norm", "layer_norm"):
        with pytest.raises(InvalidInput, match="the x that was encoded"):
            sae.decode(sae.encode(x))
    assert torch.allclose(sae.decode(sae.encode(x), x), sae(x), atol=1e-3)


def test_a_pool_of_all_columns_is_batch_topk_and_a_pool_is_kept_as_long_as_asked():
    x = draw(16, 6)
    assert torch.equal(make(SampledTopK(2, l=10)).encode(x), make(BatchTopK(2)).encode(x))
    sae = make(SampledTopK(2, l=2, rule="sampled", score="uniform", update_every=3))
    pools = []
    for step in range(7):
        result = sae.loss(draw(16, 6, seed=step))
        assert set(result.fired.nonzero().flatten().tolist()) <= set(sae.pool[:4].tolist())
        pools.append(sae.pool[: int(sae.pool_size)].tolist())
        sae.after_step(result)
    assert pools[0] == pools[1] == pools[2] != pools[3] == pools[4] == pools[5] != pools[6]
    assert all(len(each) == 4 and each == sorted(each) for each in pools)


def test_files_hold_all_of_it(tmp_path):
    sae = make(
        SampledTopK(2.5, l=1.5, score="entropy"),
        groups=[4],
        normalise="standardise",
        aux=AuxK(dead_after=5),
        threshold_rule="saelens",
        dtype=torch.bfloat16,
        metadata={"site": "unet.mid_block"},
    )
    sae.fit_normalisation(draw(50, 6))
    sae.statistics["mean"] = draw(20)
    for step in range(3):
        sae.after_step(sae.loss(draw(8, 6, seed=step)))
    dr.save(sae, tmp_path / "sae.safetensors")
    found = dr.load_artifact(tmp_path / "sae.safetensors")
    assert found.describe() == sae.describe()
    assert found.state_dict().keys() == sae.state_dict().keys()
    for name, each in sae.state_dict().items():
        assert torch.equal(found.state_dict()[name], each), name
        assert found.state_dict()[name].dtype == each.dtype
    assert torch.equal(found.statistics["mean"], sae.statistics["mean"])
    x = draw(7, 6).bfloat16()
    assert torch.equal(found.eval()(x), sae.eval()(x)) and found.W_enc.T.is_contiguous()


def test_a_file_with_a_nan_threshold_is_refused(tmp_path):
    sae = make()
    sae.thresholds[3] = math.nan
    sae.save(tmp_path / "sae.safetensors")
    with pytest.raises(InvalidInput, match=r"sae.safetensors: thresholds: 1 values are NaN"):
        SparseAutoencoder.load(tmp_path / "sae.safetensors")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t, c: t.pop("b_dec"), "tensor 'b_dec' is missing"),
        (lambda t, c: t.update(b_gate=torch.ones(20)), "tensors that no sae has: b_gate"),
        (lambda t, c: t.update(b_enc=torch.ones(19)), r"b_enc must be \[20\], got \[19\]"),
        (lambda t, c: c.update(version=2), "is of version 2, this reads 1; update dreamreader"),
        (lambda t, c: c["sae"].update(selection={"name": "TopP"}), "unknown selection 'TopP'"),
        (lambda t, c: c["sae"].update(selection={"name": "TopK", "q": 1}), "TopK takes k, got q"),
        (lambda t, c: c["sae"].update(temperature=1), "is no whole sae .*temperature"),
        (lambda t, c: c.pop("sae"), "is no whole sae"),
    ],
)
def test_files_that_are_not_right_are_refused(change, said, tmp_path):
    tensors, content = make().to_file()
    content = {"package": "dreamreader.sae", **content, "version": 1}
    change(tensors, content)
    version = content.pop("version")
    save_described(tmp_path / "sae.safetensors", "sae", tensors, content, version)
    with pytest.raises(InvalidInput, match=said):
        dr.load_artifact(tmp_path / "sae.safetensors")


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: TopK(0), "k is a whole number, at least 1, got 0"),
        (lambda: TopK(2.5), "whole number"),
        (lambda: BatchTopK(0), "k is a positive number, got 0"),
        (lambda: BatchTopK(math.nan), "positive number, got nan"),
        (lambda: SampledTopK(2, l=-1), "l is a positive number, got -1"),
        (lambda: SampledTopK(2, l=math.nan), "l is a positive number, got nan"),
        (lambda: SampledTopK(2, score="l3"), "unknown score of SampledTopK 'l3'; nearest: l2"),
        (lambda: SampledTopK(2, rule="best"), "unknown rule"),
        (lambda: SampledTopK(2, update_every=0), "update_every is at least 1, got 0"),
        (lambda: make(TopK(21)), "k is at most d_sae, which is 20"),
        (lambda: make("TopK"), "selection is one of TopK, BatchTopK"),
        (lambda: make(d_sae=0), "d_sae is at least 1, got 0"),
        (lambda: make(groups=[5, 5]), "ascending widths up to d_sae=20"),
        (lambda: make(groups=[25]), "ascending widths"),
        (lambda: make(groups=[5], group_weights=[1]), "group_weights are 2 numbers"),
        (lambda: make(normalise="whiten"), "unknown normalise"),
        (lambda: make(inference="batch"), "unknown inference"),
        (lambda: make(threshold_rule="openai"), "unknown threshold rule"),
        (lambda: make(aux=3), "aux is a name or an AuxK"),
        (lambda: AuxK(k=0), "k is at least 1"),
        (lambda: make().encode(draw(3, 5)), r"x must be \[..., 6\], got \[3, 5\]"),
        (lambda: make().encode(torch.ones(3, 6).long()), "floating point"),
        (lambda: make().decode(draw(3, 19)), "codes have 19 latents, it has d_sae=20"),
        (lambda: setattr(make(), "threshold", torch.zeros(3)), r"a number or \[20\], got \[3\]"),
        (lambda: setattr(make(), "threshold", math.nan), "thresholds are NaN"),
        (lambda: make().fit_normalisation(draw(3, 6)), "has nothing to fit"),
        (
            lambda: make(normalise="average_norm").fit_normalisation(torch.zeros(3, 6)),
            "no scale follows",
        ),
        (lambda: make(normalise="standardise").fit_normalisation(draw(1, 6)), "give more rows"),
        (lambda: make(groups=5), "ascending widths up to d_sae=20, got 5"),
        (lambda: make(group_weights="x"), "group_weights are 1 numbers"),
        (lambda: make(decoder_norm=0), "decoder_norm is a positive number, got 0"),
        (lambda: make(seed=1.5), "seed is a whole number, got 1.5"),
        (lambda: make(dtype=torch.int8), "dtype is a floating one of torch"),
        (lambda: make(device="abacus"), "device is one of torch, such as 'cuda', got 'abacus'"),
        (lambda: make(metadata=5), "metadata are values by name, got 5"),
        (lambda: make(rescale="no"), "rescale is True or False, got 'no'"),
        (lambda: make(aligned=1), "aligned is True or False, got 1"),
        (lambda: AuxK(k=True), "k is at least 1, got True"),
        (lambda: ThresholdRule(decay="slow"), "decay is from 0 to below 1, got 'slow'"),
        (lambda: ThresholdRule(start=math.nan), "start is a finite number, got nan"),
        (lambda: make().encode([1.0, 2.0]), r"x is a tensor \[..., 6\], got list"),
        (lambda: make().encode(draw(3, 6), [True] * 3), r"mask must be bool \[3\].*got list"),
        (lambda: make().decode([1.0]), "codes are a tensor .* or SparseRows, got list"),
        (lambda: make().loss(draw(3, 6), selection=5), "selection is one of TopK"),
        (lambda: setattr(make(), "threshold", "low"), r"a number or \[20\], got 'low'"),
    ],
)
def test_what_cannot_be_right_is_refused(wrong, said):
    with pytest.raises(DreamreaderError, match=said):
        wrong()


def test_odd_inputs_have_defined_results():
    sae = make(BatchTopK(3))
    assert sae.encode(torch.zeros(0, 6)).shape == (0, 20)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    assert sae.encode(draw(4, 6)).count_nonzero() == 0  # fewer positives than k: all of them
    assert torch.allclose(sae(draw(4, 6)), sae.b_dec.expand(4, 6))
    x = draw(4, 6)
    x[1, 2] = math.nan
    assert make(BatchTopK(3)).encode(x)[1].isnan().any()  # seen, not dropped
    assert make(BatchTopK(3)).loss(x).total.isnan()
    heads = make(BatchTopK(3), reshape="hook_z")
    y = draw(5, 2, 3)
    assert heads(y).shape == y.shape
    assert torch.equal(heads(y).reshape(5, 6), heads(y.reshape(5, 6)))
