"""What was found in a source, as the same thing for a target: directions, MLPs, learned edits."""

from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from dreamreader.edits import LoReFT, Mlp
from dreamreader.errors import InvalidInput
from dreamreader.mapping.base import ActivationMap
from dreamreader.mapping.maps import AffineMap
from dreamreader.mapping.timed import StepMaps


def map_direction(
    forward: ActivationMap,
    vector: Float[Tensor, "*steps d_source"],
    alpha: float = 1.0,
    *,
    level: float | Float[Tensor, " steps"] | None = None,
) -> Float[Tensor, "*steps d_target"]:
    """A direction of the source as one of the target: map(r + alpha v) - map(r).

    Args:
        forward: from source to target. With a map for each step, a vector for each is mapped by its
            own; one for all steps is refused, but for that of a single noise level.
        vector: [d_source], or [steps, d_source], row i for step i of the scheduler; rows of zeros,
            of steps without a direction, stay zero.
        alpha: how far; of no meaning but a factor where the map is affine.
        level: ratio of noise to signal, of all or of each row; a map that depends on the noise
            needs it.

    Raises:
        InvalidInput: another width, the map has none for a step that has a direction, or it
            depends on the noise and no level is given.

    Example:
        >>> double = AffineMap(torch.zeros(2), 2 * torch.eye(2), torch.ones(2))
        >>> map_direction(double, torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    if not isinstance(forward, ActivationMap):
        raise InvalidInput(
            f"map_direction: a map from source to target is needed, got {type(forward).__name__}"
        )
    forward.check(vector, "a direction")
    if not isinstance(forward, StepMaps):
        return forward.direction(vector, alpha=alpha, level=level)
    if vector.dim() == 1 and level is not None:
        return forward.direction(vector, alpha=alpha, level=level)
    if vector.dim() != 2:
        raise InvalidInput(
            f"{forward.name}: it has a map for each step, so a direction is [steps, "
            f"{forward.d_source}], got {list(vector.shape)}; or give the level= of one"
        )
    found = vector.new_zeros(len(vector), forward.d_target)
    for step in vector.any(1).nonzero().flatten().tolist():
        found[step] = forward.at(step).direction(vector[step], alpha=alpha)
    return found


def map_mlp(mlp: Mlp, backward: AffineMap) -> Mlp:
    """A probe's MLP that reads the target: with x = G y + g, W_1 <- W_1 G and b_1 <- b_1 + W_1 g.

    Args:
        mlp: of the source. backward: from the target to the source.

    Raises:
        InvalidInput: the map leads to another width, or is not affine.

    Example:
        >>> back = AffineMap(torch.zeros(3), torch.ones(2, 3), torch.tensor([1.0, 0.0]))
        >>> own = map_mlp(Mlp([torch.eye(2)], [torch.zeros(2)]), back)
        >>> own.logits(torch.tensor([1.0, 1.0, 1.0])).tolist()
        [4.0, 3.0]
    """
    weight, bias = _affine("map_mlp", "backward", backward)
    if len(weight) != mlp.width:
        raise InvalidInput(
            f"map_mlp: the MLP reads {mlp.width} features, {backward.name} gives {len(weight)}"
        )
    return mlp.after(weight, bias)


def map_loreft(
    edit: LoReFT, forward: AffineMap, backward: AffineMap, site: str | None = None
) -> LoReFT:
    """A learned edit for the target: it reads through the map back, and writes through that there.

    Formula: with x = G y + g and F the weight of `forward`:
        y + alpha F U'(A (G y + g) + b), so A <- A G, b <- b + A g, U <- U F'

    Args:
        edit: of one site of the source. forward, backward: to the target, and from it.
        site: of the target; that on the card of `forward` by default.

    Raises:
        InvalidInput: widths do not fit, a map is not affine, the edit has several sites or is
            `diagonal`, or the site is not known.

    Example:
        >>> double = AffineMap(torch.zeros(2), 2 * torch.eye(2), torch.ones(2))
        >>> first = torch.tensor([[1.0, 0.0]])
        >>> edit = LoReFT("unet.mid_block", -first, torch.ones(1), first)
        >>> found = map_loreft(edit, double, double.inverse(), "unet.up_blocks.1")
        >>> found.down.tolist(), found.bias.tolist(), found.up.tolist()
        ([[-0.5, 0.0]], [1.5], [[2.0, 0.0]])
    """
    (f, _), (g, shift) = (
        _affine("map_loreft", name, own)
        for name, own in (("forward", forward), ("backward", backward))
    )
    place = site or forward.card.target_site
    if place is None:
        raise InvalidInput("map_loreft: the site of the target is not known; give site=")
    if edit.variant == "diagonal":
        raise InvalidInput("map_loreft: a diagonal edit is one of dimensions, which a map mixes")
    if len(edit.sites) != 1:
        raise InvalidInput(f"map_loreft: an edit of one site is mapped, got {len(edit.sites)}")
    tables = [_table(each, edit.sites[0]).double() for each in (edit.down, edit.bias, edit.up)]
    down, bias, up = tables
    if down.shape[-1] != f.shape[1] or g.shape != f.T.shape:
        raise InvalidInput(
            f"map_loreft: an edit of {down.shape[-1]} features needs forward [n, {down.shape[-1]}] "
            f"and backward [{down.shape[-1]}, n], got {list(f.shape)} and {list(g.shape)}"
        )
    made = (down @ g.to(down), bias + down @ shift.to(down), up @ f.T.to(up))
    one, two, three = (each.float() for each in made)
    return replace(edit, site=place, down=one, bias=two, up=three)


def _affine(what: str, name: str, own: ActivationMap) -> tuple[Tensor, Tensor]:
    if not isinstance(own, AffineMap):
        raise InvalidInput(f"{what}: {name} must be an affine map, got {type(own).__name__}")
    return own.weight.double(), own.bias.double()


def _table(table: Tensor | Mapping[str, Tensor], site: str) -> Tensor:
    return table[site] if isinstance(table, Mapping) else table
