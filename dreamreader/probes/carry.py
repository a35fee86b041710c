"""A probe of one model's activations as one of another's, through an affine map back."""

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.probes.probe import Probe


class BackwardMap(Protocol):
    """x = G y + g, from the target to the source, such as an `AffineMap`."""

    @property
    def weight(self) -> Tensor: ...  # [d_source, d_target]

    @property
    def bias(self) -> Tensor: ...  # [d_source]


def map_probe(
    probe: Probe, backward: BackwardMap, *, site: str | None = None, subject: str | None = None
) -> Probe:
    """A probe of the target that tells of y what the given one tells of G y + g.

    Args:
        probe: of the source. A mean over tokens is mapped as the tokens are.
        backward: from the target to the source; the inverse of the map there, or one fitted on its
            own.
        site, subject: of the target, None where they have no name.

    Returns:
        A probe whose card says what it was trained on, with its new site and subject, and has no
        scores: those were of the source.

    Raises:
        InvalidInput: the map leads to another width or is not affine, or the probe reads tokens
            side by side.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from dreamreader import probes
        >>> x = torch.randn(60, 4)
        >>> names = ["high" if each[0] > 0 else "low" for each in x]
        >>> probe = probes.fit(x, names, hidden=(), epochs=5, controls=False)
        >>> turn = torch.linalg.qr(torch.randn(4, 4))[0]
        >>> back = SimpleNamespace(weight=turn.T, bias=-turn.T @ torch.ones(4))
        >>> y = x @ turn.T + 1
        >>> found = probes.map_probe(probe, back)
        >>> torch.allclose(found.logits(y), probe.logits(x), atol=1e-5)
        True
    """
    weight, bias = (getattr(backward, name, None) for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.dim() != 2:
        raise InvalidInput(
            f"map_probe: a probe becomes one through an affine map, got {type(backward).__name__}; "
            "through another, give what the map makes of activations to the probe itself"
        )
    if probe.pool == "flat":
        raise InvalidInput(
            "map_probe: the probe reads the tokens of a row side by side, which a map of single "
            "tokens does not give; fit it with pool='mean' or 'token'"
        )
    if len(weight) != probe.width:
        hint = (
            "; that is the map there, take the one back" if weight.shape[1] == probe.width else ""
        )
        raise InvalidInput(
            f"map_probe: the probe reads {probe.width} features, the map gives {len(weight)}{hint}"
        )
    mlps = tuple(each.after(weight, bias) for each in probe.mlps)
    card = replace(probe.card, site=site, subject=subject, held_out={}, controls={})
    return replace(probe, mlps=mlps, site=site, card=card)
