"""A carried probe tells of activations what the probe tells of their map back."""

import pytest
import torch

from dreamreader import probes
from dreamreader.errors import InvalidInput
from dreamreader.mapping import AffineMap, MLPMap

LABELS = ["red", "blue", "green"] * 8


def backward(d_target: int = 6, d_source: int = 4) -> AffineMap:
    return AffineMap(torch.zeros(d_target), torch.randn(d_source, d_target), torch.randn(d_source))


@pytest.mark.parametrize("per_step", ["each", "shared", "noise"])
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_it_tells_what_the_probe_tells_of_the_map_back(per_step, hidden, tmp_path) -> None:
    x, back = torch.randn(24, 3, 4), backward()
    probe = probes.fit(x, LABELS, hidden=hidden, per_step=per_step, epochs=2, controls=False)
    found = probes.map_probe(probe, back, site="unet.up_blocks.1", subject="other")
    y = torch.randn(7, 6)
    for step in range(3):
        options = {"step": step, "fraction": step / 3}
        torch.testing.assert_close(
            found.probabilities(y, **options),
            probe.probabilities(back.apply(y), **options),
            atol=1e-5,
            rtol=1e-4,
        )
        assert found.predict(y, **options) == probe.predict(back.apply(y), **options)
    assert (found.width, found.site, found.card.subject) == (6, "unet.up_blocks.1", "other")
    assert probe.card.held_out and found.card.held_out == {} == found.card.controls
    found.save(tmp_path / "probe.safetensors")
    assert probes.Probe.load(tmp_path / "probe.safetensors") == found
    assert "unet.up_blocks.1" in repr(found) and found.card.markdown()


def test_probes_that_cannot_be_carried() -> None:
    probe = probes.fit(torch.randn(24, 4), LABELS, epochs=1, controls=False)
    there = AffineMap(torch.zeros(4), torch.randn(6, 4), torch.zeros(6))
    with pytest.raises(InvalidInput, match="reads 4 features, .* gives 6; that is the map there"):
        probes.map_probe(probe, there)
    with pytest.raises(InvalidInput, match="reads 4 features, the map gives 5$"):
        probes.map_probe(probe, backward(6, 5))
    shapes = ((6,), (5, 6), (5,), (4, 5), (4,))
    with pytest.raises(InvalidInput, match="an affine map, got MLPMap; through another, give what"):
        probes.map_probe(probe, MLPMap(*map(torch.randn, shapes)))  # pyright: ignore
    with pytest.raises(InvalidInput, match=r"reads 4 features, .* \[4, 6\] and a bias \[5\]"):
        probe.mlps[0].after(torch.randn(4, 6), torch.randn(5))
    tokens = torch.randn(24, 1, 2, 4)
    flat = probes.fit(tokens, LABELS, pool="flat", epochs=1, controls=False)
    with pytest.raises(InvalidInput, match="reads the tokens of a row side by side"):
        probes.map_probe(flat, backward(6, 8))
