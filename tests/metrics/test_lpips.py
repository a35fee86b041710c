"""LPIPS: what is missing is said; with the package, random weights against the formula."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics import Outputs, build

HERE = find_spec("lpips") is not None


@pytest.mark.skipif(HERE, reason="the package lpips is installed")
def test_without_the_package_the_error_says_how_to_get_it() -> None:
    with pytest.raises(InvalidInput, match="lpips is not installed; `pip install lpips`"):
        build({"lpips": {"weights": "alexnet.pth"}})


def test_an_unknown_network() -> None:
    with pytest.raises(UnknownName, match="unknown network of lpips 'alx'; nearest: alex"):
        build({"lpips": {"weights": "alexnet.pth", "net": "alx"}})


@pytest.mark.skipif(not HERE, reason="the package lpips is not installed")
def test_lpips_with_local_weights(tmp_path: Path) -> None:
    import lpips
    from torchvision.models import alexnet

    with pytest.raises(InvalidInput, match="there is no file .*nothing is downloaded"):
        build({"lpips": {"weights": str(tmp_path / "no.pth")}})
    torch.manual_seed(0)
    network = alexnet(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    a, b = torch.rand(2, 2, 3, 64, 64)
    b[1] = a[1]
    rows = [{}, {}]
    metric = build({"lpips": {"weights": str(tmp_path / "alexnet.pth")}})
    found = metric.measure(Outputs(rows, images=a), Outputs(rows, images=b))["lpips"]
    assert found[1] == 0.0

    heads = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).lins
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y = (((2 * each[:1] - 1) - shift) / scale for each in (a, b))
    total, head = 0.0, iter(heads)
    with torch.no_grad():
        for number, layer in enumerate(network.features):
            x, y = layer(x), layer(y)
            if number in (1, 4, 7, 9, 11):
                p, q = (each / (each.norm(dim=1, keepdim=True) + 1e-10) for each in (x, y))
                total += float(next(head).model((p - q) ** 2).mean())
    assert found[0] == pytest.approx(total, rel=1e-4) and total > 0
    with pytest.raises(InvalidInput, match="has no features.2.weight, so it is not of vgg16"):
        bad = build({"lpips": {"weights": str(tmp_path / "alexnet.pth"), "net": "vgg"}})
        bad.measure(Outputs(rows, images=a), Outputs(rows, images=b))
