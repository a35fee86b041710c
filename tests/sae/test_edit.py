"""Edits of latents: the identities of their formula, and a run through a pipeline."""

import numpy as np
import pytest
import torch

import dreamreader as dr
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.sae import (
    BatchTopK,
    JumpReLU,
    SAEEdit,
    SampledTopK,
    SparseAutoencoder,
    TopK,
    unlearn,
)

SITE = "layer"


class Model(torch.nn.Module):
    """One site, whose output is its input."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Identity()

    def forward(self, x):
        return self.layer(x)


def autoencoder(selection=None, **options) -> SparseAutoencoder:
    sae = SparseAutoencoder(12, 40, selection or TopK(5), seed=3, **options)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(40, generator=torch.Generator().manual_seed(1)) * 0.1)
        sae.b_dec.copy_(torch.randn(12, generator=torch.Generator().manual_seed(2)))
    if options.get("normalise") in ("average_norm", "standardise"):
        sae.fit_normalisation(activations(50))
    if not isinstance(selection, TopK | None):
        sae.threshold = 0.4
    return sae.eval()


def activations(rows: int = 6, tokens: int = 7, dtype=torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return (2 * torch.randn(rows, tokens, 12, generator=g) + 0.5).to(dtype)


def edited(edit: SAEEdit, x: torch.Tensor) -> torch.Tensor:
    reader = dr.Reader(Model())
    with reader.editing(edit):
        return reader.subject(x)


EVERY = [
    pytest.param(TopK(5), {}, id="topk"),
    pytest.param(BatchTopK(5), {}, id="threshold"),
    pytest.param(JumpReLU(), {"rescale": True}, id="rescaled"),
    pytest.param(TopK(5), {"normalise": "layer_norm"}, id="layer_norm"),
    pytest.param(TopK(5), {"normalise": "constant_norm"}, id="constant_norm"),
    pytest.param(BatchTopK(5), {"normalise": "standardise"}, id="standardise"),
]


@pytest.mark.parametrize(("selection", "options"), EVERY)
@pytest.mark.parametrize("op", ["add", "scale", "set", "ablate"])
def test_it_adds_what_changed_codes_change_in_the_reconstruction(selection, options, op):
    sae, x = autoencoder(selection, **options), activations()
    if options.get("rescale"):
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, 2, 40).unsqueeze(1))
    features = sae.encode(x).flatten(0, 1).sum(0).topk(3).indices.tolist()
    value = None if op == "ablate" else torch.tensor([1.5, -0.5, 2.0])
    z = sae.encode(x)
    new = z.clone()
    for at, feature in enumerate(features):
        column = new[..., feature]
        new[..., feature] = {
            "add": lambda c, v: c + v,
            "scale": lambda c, v: c * v,
            "set": lambda c, v: torch.full_like(c, v),
            "ablate": lambda c, v: torch.zeros_like(c),
        }[op](column, None if value is None else float(value[at]))
    want = x + 0.7 * (sae.decode(new, x) - sae.decode(z, x))
    found = edited(SAEEdit(SITE, sae, features, op, value, alpha=0.7), x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, x)


def test_tokens_of_which_no_latent_changes_stay_bit_for_bit():
    sae, x = autoencoder(), activations(dtype=torch.bfloat16)
    z = sae.encode(x.float())
    feature = int((z > 0).flatten(0, 1).sum(0).argsort()[-8])  # active on some tokens
    found = edited(SAEEdit(SITE, sae, feature, "ablate"), x)
    active = z[..., feature] > 0
    assert 0 < active.sum() < active.numel()
    assert torch.equal(found[~active], x[~active])
    assert (found[active] != x[active]).any(-1).all()
    assert found.dtype == torch.bfloat16


def test_a_gate_opens_above_its_value_only():
    sae, x = autoencoder(), activations()
    z = sae.encode(x)
    feature = int(z.flatten(0, 1).sum(0).argmax())
    usual = float(z[..., feature][z[..., feature] > 0].median().detach())
    found = edited(SAEEdit(SITE, sae, feature, "set", 9.0, gate=usual), x)
    high = z[..., feature] > usual
    assert torch.equal((found != x).any(-1), high) and high.any() and not high.all()


def test_other_latents_say_where():
    sae, x = autoencoder(), activations()
    z = sae.encode(x)
    one, other = (z > 0).flatten(0, 1).sum(0).argsort(descending=True)[:2].tolist()
    free = next(j for j in range(40) if j not in (one, other))
    found = edited(SAEEdit(SITE, sae, free, "add", 3.0, where=[one, other]), x)
    marked = (z[..., [one, other]] > 0).any(-1)
    assert torch.equal((found != x).any(-1), marked) and marked.any() and not marked.all()
    torch.testing.assert_close(found[marked], (x + 3 * sae.W_dec[free])[marked])
    alone = edited(SAEEdit(SITE, sae, free, "add", 3.0, where=one), x)
    assert torch.equal((alone != x).any(-1), z[..., one] > 0)
    bare = SAEEdit(SITE, sae, free, "add", 3.0, where=one, keep_error=False)
    assert torch.equal(edited(bare, x)[~(z[..., one] > 0)], x[~(z[..., one] > 0)])


def test_without_the_error_it_is_the_reconstruction():
    sae, x = autoencoder(), activations()
    torch.testing.assert_close(edited(SAEEdit(SITE, sae, op="reconstruct"), x), sae(x))
    z = sae.encode(x)
    feature = int(z.flatten(0, 1).sum(0).argmax())
    z[..., feature] = 0
    found = edited(SAEEdit(SITE, sae, feature, "ablate", keep_error=False), x)
    torch.testing.assert_close(found, sae.decode(z))


def test_without_the_error_rows_are_encoded_once(monkeypatch):
    sae, x, encoded = autoencoder(), activations(), []
    real = SparseAutoencoder._encoder
    monkeypatch.setattr(
        SparseAutoencoder, "_encoder", lambda *given: encoded.append(1) or real(*given)
    )
    edited(SAEEdit(SITE, sae, [4, 1], "set", [1.0, 2.0], keep_error=False), x)
    assert len(encoded) == 1


def test_unlearning_turns_round_what_is_unusually_high():
    sae, x = autoencoder(), activations()
    z = sae.encode(x)
    features = z.flatten(0, 1).sum(0).topk(2).indices.tolist()
    mean, usual = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])
    new = z.clone()
    for at, feature in enumerate(features):
        own = z[..., feature]
        new[..., feature] = torch.where(own > usual[at], -4 * mean[at] * own, own)
    found = edited(unlearn(SITE, sae, features, mean, usual, multiplier=-4.0), x)
    torch.testing.assert_close(found, x + sae.decode(new) - sae.decode(z), rtol=1e-5, atol=1e-4)


def test_rows_take_their_own_strength_and_know_nothing_of_each_other():
    sae, x = autoencoder(BatchTopK(5)), activations()
    edit = SAEEdit(SITE, sae, [1, 2], "set", 3.0, alpha=[0.0, 1.0, 2.0, 0.0, 1.0, -1.0])
    found = edited(edit, x)
    assert torch.equal(found[[0, 3]], x[[0, 3]])
    alone = edited(SAEEdit(SITE, sae, [1, 2], "set", 3.0, alpha=2.0), x[2:3])
    torch.testing.assert_close(found[2:3], alone, rtol=1e-6, atol=1e-6)


def test_in_a_pipeline_at_a_delta_with_steps_tokens_and_branch():
    reader = dr.load("shapes-unet")
    site = "unet.mid_block.attentions.0"
    settings = dr.zoo.settings(num_inference_steps=4)
    plain = reader.run("a red circle", record=f"{site}:delta", seeds=1, **settings)
    width = plain.cache[f"{site}:delta"].shape[-1]
    sae = SparseAutoencoder(width, 2 * width, TopK(4)).eval()
    options = {"steps": range(1, 3), "branch": "cond", "tokens": dr.engine.Box(0, 0, 0.5, 0.5)}
    nothing = SAEEdit(f"{site}:delta", sae, 5, "set", 8.0, alpha=0.0, **options)
    same = reader.run("a red circle", edits=nothing, seeds=1, **settings)
    assert np.array_equal(np.asarray(same.images[0]), np.asarray(plain.images[0]))
    edit = SAEEdit(f"{site}:delta", sae, 5, "set", 8.0, **options)
    changed = reader.run("a red circle", edits=edit, seeds=1, **settings)
    assert not np.array_equal(np.asarray(changed.images[0]), np.asarray(plain.images[0]))
    assert changed.firing[0].calls == 2


def test_it_comes_back_from_a_file(tmp_path):
    edit = SAEEdit(SITE, autoencoder(BatchTopK(5)), [4, 9], "set", [1.0, 3.0], 0.5, gate=0.1)
    dr.edits.save(tmp_path / "edit.safetensors", edit)
    (found,) = dr.edits.load(tmp_path / "edit.safetensors")
    assert found.sites == edit.sites and found.features == (4, 9)
    x = activations()
    assert torch.equal(edited(found, x), edited(edit, x))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(features=40, value=1.0), "latent 40 of 40 does not exist"),
        (dict(features=[1, 2, 1], value=1.0), "latent 1 is named twice"),
        (dict(features=None, value=1.0), "add needs features"),
        (dict(features=1), "add needs value"),
        (dict(features=1, op="ablate", value=1.0), "ablate takes no value"),
        (dict(features=[1, 2], value=[1.0, 2.0, 3.0]), "one for each of 2 latents"),
        (dict(features=1, value=float("nan")), "not finite"),
        (dict(features=1, value=1.0, gate=float("nan")), "gate is NaN"),
        (dict(features=1, op="reconstruct"), "reconstruct takes no features"),
        (dict(features=1, value=1.0, alpha=float("inf")), "alpha must be a finite number"),
        (dict(features=1, value=1.0, alpha="a"), "one for each row, got 'a'"),
        (dict(features=1, value=1.0, alpha=[1.0, "a"]), r"one for each row, got \[1.0, 'a'\]"),
        (dict(features=1, value=1.0, alpha=True), "one for each row, got True"),
        (dict(features=1, value=1.0, keep_error="no"), "keep_error is True or False, got 'no'"),
        (
            dict(features=1, value="a"),
            "value must be a number or one for each of 1 latents, got 'a'",
        ),
        (dict(features=1, value={"a": 1}), "value must be a number"),
        (dict(features=1, value=1j), "value must be a number"),
        (dict(features=1, op="ablate", gate="a"), "gate must be a number or one for each"),
        (dict(features=1, op="ablate", gate=[[1.0]]), r"of 1 latents, got shape \[1, 1\]"),
        (dict(features=1, op="ablate", where=40), "latent 40 of 40 does not exist"),
        (dict(features=1, op="ablate", where=[]), "where needs features, numbers of latents"),
        (dict(features="blue", op="ablate"), "needs features, numbers of latents, got 'blue'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, text):
    with pytest.raises(InvalidInput, match=text):
        SAEEdit(SITE, autoencoder(), **arguments)


def test_what_depends_on_the_batch_is_refused():
    with pytest.raises(UnknownName, match="op of SAEEdit"):
        SAEEdit(SITE, autoencoder(), 1, "multiply", 2.0)
    with pytest.raises(InvalidInput, match="sae.eval"):
        SAEEdit(SITE, autoencoder().train(), 1, "ablate")
    for selection in (BatchTopK(4), SampledTopK(4)):
        with pytest.raises(InvalidInput, match="depend on the batch around it"):
            SAEEdit(SITE, SparseAutoencoder(12, 40, selection).eval(), 1, "ablate")
    with pytest.raises(InvalidInput, match="d_in=12, the site has 10"):
        edited(SAEEdit(SITE, autoencoder(), 1, "ablate"), torch.randn(2, 3, 10))


def test_bfloat16_codes_are_cut_where_encode_cuts_them():
    sae = SparseAutoencoder(12, 40, JumpReLU(), dtype=torch.bfloat16).eval()
    sae.threshold = 0.4
    x = activations(dtype=torch.bfloat16).flatten(0, 1)
    own = sae.encode_features(x, torch.arange(40))
    assert torch.equal(own > 0, sae.encode(x) > 0) and (own > 0).any()


def test_learning_again_is_seen_at_the_run_and_codes_are_numbers():
    sae = autoencoder()
    edit = SAEEdit(SITE, sae, 1, "ablate")
    sae.train()
    with pytest.raises(InvalidInput, match="sae.eval"):
        edited(edit, activations())
    with pytest.raises(InvalidInput, match="codes must be floating point, got torch.int64"):
        sae.decode(torch.nn.functional.one_hot(torch.tensor([3]), 40))
    for features in ("35", [3.7], True, [[3]], [None]):
        with pytest.raises(InvalidInput, match="needs features, numbers of latents"):
            SAEEdit(SITE, autoencoder(), features, "ablate")
    assert SAEEdit(SITE, autoencoder(), torch.tensor([3, 5]), "ablate").features == (3, 5)
