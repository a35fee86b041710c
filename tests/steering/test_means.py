"""Means by label: differences, contrasts, subspaces and shares."""

import pytest
import torch
from steering.recorded import SITE, activation

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.steering import LabelMeans


def test_difference_is_the_difference_of_the_means_whatever_the_batches():
    x = torch.randn(6, 3, 5, 4) * 1e3
    labels = ["red", "blue", "red", "red", "blue", "red"]
    whole, parts = LabelMeans(), LabelMeans()
    whole.add({SITE: activation(x)}, labels)
    for i in (slice(3, 6), slice(0, 1), slice(1, 3)):
        parts.add({SITE: activation(x[i])}, labels[i])
    red = torch.tensor([label == "red" for label in labels])
    expected = x[~red].double().mean((0, 2)) - x[red].double().mean((0, 2))
    assert torch.equal(whole.difference(SITE, "red", "blue"), expected.float())
    assert torch.equal(parts.difference(SITE, "red", "blue"), expected.float())
    assert whole.sites == [SITE] and whole.labels == ["blue", "red"]


def test_tensors_are_means_over_tokens():
    x = torch.randn(2, 3, 5, 4)
    recorded, plain = LabelMeans(), LabelMeans()
    recorded.add({SITE: activation(x)}, ["a", "b"])
    plain.add({SITE: x.double().mean(2)}, ["a", "b"])
    assert torch.equal(plain.difference(SITE, "a", "b"), recorded.difference(SITE, "a", "b"))


def test_half_precision_is_summed_in_double():
    x = torch.full((4096, 1, 1, 2), 0.1, dtype=torch.bfloat16)
    means = LabelMeans()
    means.add({SITE: activation(x)}, ["a"] * 4096)
    assert torch.equal(means.mean(SITE, "a"), x[:1, 0, 0].double())


def test_contrast_and_subspace():
    base = torch.randn(8)
    vectors = {"red": torch.eye(8)[0] * 5, "blue": torch.eye(8)[1] * 3, "green": torch.eye(8)[2]}
    means = LabelMeans()
    for label, vector in vectors.items():
        means.add({SITE: activation((base + vector).reshape(1, 1, 1, 8))}, [label])
    expected = vectors["red"] - (vectors["blue"] + vectors["green"]) / 2
    assert torch.allclose(means.contrast(SITE, "red")[0], expected, atol=1e-5)
    basis = means.subspace(SITE, 2)
    assert torch.allclose(basis @ basis.T, torch.eye(2), atol=1e-5)
    for a in vectors.values():
        for b in vectors.values():
            assert torch.allclose((a - b) @ basis.T @ basis, a - b, atol=1e-4)
    with pytest.raises(InvalidInput, match="rank 3; 3 labels span at most 2"):
        means.subspace(SITE, 3)


def test_explained_is_one_minus_the_variance_within_labels():
    x = torch.randn(9, 2, 3, 4) + 5
    labels = list("aabbbcccc")
    means = LabelMeans()
    means.add({SITE: activation(x)}, labels)
    h = x.double().mean(2)  # [rows, steps, features]
    within = sum(
        (part - part.mean(0)).square().sum((0, 2))
        for label in "abc"
        for part in [h[[i for i, other in enumerate(labels) if other == label]]]
    )
    total = (h - h.mean(0)).square().sum((0, 2))
    assert torch.allclose(means.explained(SITE), (1 - within / total).float(), atol=1e-6)
    same = LabelMeans()
    same.add({SITE: activation(torch.ones(4, 2, 3, 4))}, list("aabb"))
    assert torch.equal(same.explained(SITE), torch.zeros(2))
    with pytest.raises(UnknownName, match="unknown site 'unet'"):
        means.explained("unet")


def test_heads_are_flattened():
    x = torch.randn(2, 1, 3, 4, 5)
    means = LabelMeans()
    means.add({SITE: activation(x)}, ["a", "b"])
    assert means.difference(SITE, "a", "b").shape == (1, 20)


@pytest.mark.parametrize(
    "add, text",
    [
        (lambda m: m.add({SITE: activation(torch.ones(2, 1, 1, 4))}, ["a"]), "1 labels for 2 rows"),
        (
            lambda m: m.add(
                {SITE: activation(torch.ones(1, 2, 1, 1, 4), ("uncond", "cond"))}, ["a"]
            ),
            "recorded for the branches uncond, cond; choose one",
        ),
        (
            lambda m: m.add({SITE: activation(torch.ones(1, 3, 1, 4))}, ["a"]),
            r"\[steps, features\] is \[3, 4\], before \[1, 4\]",
        ),
        (
            lambda m: m.add({SITE: activation(torch.full((1, 1, 1, 4), torch.inf))}, ["a"]),
            "not finite",
        ),
        (lambda m: m.contrast(SITE, "known"), "'known' is the only label"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(add, text):
    means = LabelMeans()
    means.add({SITE: activation(torch.zeros(1, 1, 1, 4))}, ["known"])
    with pytest.raises(InvalidInput, match=text):
        add(means)


def test_unknown_names_get_the_nearest():
    means = LabelMeans()
    means.add({SITE: activation(torch.zeros(2, 1, 1, 4))}, ["red", "blue"])
    with pytest.raises(UnknownName, match="unknown label 'rad'; nearest: red"):
        means.difference(SITE, "rad", "blue")
    with pytest.raises(UnknownName, match="unknown site 'unet.mid_block'; nearest: " + SITE):
        means.difference("unet.mid_block", "red", "blue")
