"""SAEEdit: changes what a model computes through the latents of a sparse autoencoder."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dreamreader.edits.files import savable
from dreamreader.engine import EditContext, EditRequest
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import SparseRows
from dreamreader.sae.model import SparseAutoencoder

OPS = ("add", "scale", "set", "ablate", "reconstruct")

Values = float | Sequence[float] | Tensor


@savable
@dataclass(frozen=True, eq=False)
class SAEEdit(EditRequest):
    """Adds to every selected token what a change of some latents changes in its reconstruction.

    Formula: x + alpha N'(sum_j (z'_j - z_j) w_j), with z the codes of x, w_j decoder rows and
        N' the scale of the autoencoder's inputs; z' = z + value (add), value z (scale), value (set)
        or 0 (ablate) where the gate is open, else z.

    Tokens whose latents stay as they are keep x bit for bit: the error of the reconstruction stays
    in x. With `keep_error=False` it is left out: x + alpha (decode(z') - x).

    Args:
        site: site string or several, such as `unet.**.attn2` or, for what a block adds to its
            input, `unet.mid_block.attentions.0:delta`.
        sae: in `eval()` mode, with a threshold or with `TopK`, so that a token's codes do not
            depend on other tokens.
        features: numbers of latents; none for `reconstruct`.
        op: what happens to them: `add`, `scale`, `set`, `ablate`, or `reconstruct`, which puts the
            whole reconstruction in place of x.
        value: for add, scale and set, one for all latents or one for each.
        alpha: strength of the change, one number or one for each row of the run; 0 changes nothing.
        gate: a latent is changed only where it is above this, one number or one for each; without,
            everywhere.
        keep_error: whether x keeps what the autoencoder does not explain.
        where: latents that say where: tokens at which none of them is active stay as they are.

    Raises:
        InvalidInput: a latent that does not exist or is named twice, values that are not finite or
            not one for each latent, an autoencoder in training or without a threshold; at the run,
            another width.
        UnknownName: of the op.

    Example:
        >>> from dreamreader.sae import SparseAutoencoder, TopK
        >>> sae = SparseAutoencoder(8, 32, TopK(4)).eval()
        >>> SAEEdit("unet.mid_block", sae, 3, "set", 2.0, alpha=[0.0, 1.0]).row_lengths()
        {'alpha': 2}

    Reference:
        Surkov et al., Unpacking SDXL Turbo, arXiv:2410.22366; Cywinski and Deja, SAeUron,
        arXiv:2501.18052, of which the error is kept here, not subtracted.
    """

    sae: SparseAutoencoder
    features: int | Sequence[int] | None = None
    op: str = "add"
    value: Values | None = None
    alpha: float | Sequence[float] | Tensor = 1.0
    gate: Values | None = field(default=None, kw_only=True)
    keep_error: bool = field(default=True, kw_only=True)
    where: int | Sequence[int] | None = field(default=None, kw_only=True)

    is_function = True

    def __post_init__(self):
        super().__post_init__()
        if self.op not in OPS:
            raise UnknownName("op of SAEEdit", str(self.op), OPS)
        _check_sae(self.sae)
        keep = object.__setattr__  # frozen
        keep(self, "features", _features(self.features, self.op, self.sae.d_sae))
        if self.where is not None:
            keep(self, "where", _features(self.where, "where", self.sae.d_sae))
        if not isinstance(self.keep_error, bool):
            raise InvalidInput(f"SAEEdit: keep_error is True or False, got {self.keep_error!r}")
        needs_value = self.op in ("add", "scale", "set")
        if needs_value != (self.value is not None):
            raise InvalidInput(f"SAEEdit: {self.op} {'needs' if needs_value else 'takes no'} value")
        if self.op == "reconstruct" and self.gate is not None:
            raise InvalidInput("SAEEdit: reconstruct changes no latents, so it takes no gate")
        for name in ("value", "gate"):
            given = getattr(self, name)
            if given is not None:
                keep(self, name, _vector(name, given, len(self._chosen)))
        alpha = _numbers(self.alpha)
        finite = alpha is not None and bool(alpha.isfinite().all())
        if alpha is None or alpha.dim() > 1 or not alpha.numel() or not finite:
            raise InvalidInput(
                f"SAEEdit: alpha must be a finite number or one for each row, got {self.alpha!r}"
            )
        keep(self, "_moved", {})  # the autoencoder on other devices

    @property
    def selects(self) -> bool:
        return True

    @property
    def _chosen(self) -> list[int]:
        return list(self.features or ())  # pyright: ignore[reportArgumentType]

    def row_lengths(self) -> dict[str, int]:
        alpha = torch.as_tensor(self.alpha)
        return {"alpha": alpha.numel()} if alpha.numel() > 1 else {}

    def touched(self, place: EditContext) -> Tensor:
        return place.strength(self.alpha, "alpha")

    def check(self, place: EditContext) -> None:
        _check_sae(self.sae)  # it may have gone on learning since
        if self.sae.d_in != place.width:
            raise InvalidInput(
                f"SAEEdit at {place.site}: the autoencoder has d_in={self.sae.d_in}, the site has "
                f"{place.width} features"
            )

    def apply(self, x: Tensor, place: EditContext) -> Tensor:
        sae = self._on(x.device)
        strength = place.strength(self.alpha, "alpha").to(x.device).expand(x.shape[:2])
        touched = strength != 0
        rows = x[touched]  # [n, d_in]
        wide = rows.to(torch.promote_types(rows.dtype, sae.W_dec.dtype))
        change = self._change(sae, wide)
        if self.where is not None:
            marked = sae.encode_features(wide, torch.tensor(self.where, device=x.device)) > 0
            change = torch.where(marked.any(-1, keepdim=True), change, 0)
        share = strength[touched].to(change.dtype).unsqueeze(-1)
        moved = (wide + share * change).to(x.dtype)
        same = (change == 0).all(-1, keepdim=True)
        return x.index_put((touched,), torch.where(same, rows, moved))

    def _change(
        self, sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_in"]:
        """What each row becomes at strength 1, less the row."""
        if self.op == "reconstruct":
            return sae(x) - x
        chosen = torch.tensor(self._chosen, device=x.device)
        if self.keep_error:
            return sae.decode_change(self._move(sae.encode_features(x, chosen)), chosen, x)
        codes = sae.encode_sparse(x)
        moved = sae.decode_change(self._move(_columns_of(codes, chosen)), chosen, x)
        return sae.decode(codes, x) - x + moved

    def _move(self, old: Float[Tensor, "rows m"]) -> Float[Tensor, "rows m"]:
        """By how much the codes of the chosen latents change."""
        value = torch.zeros(()) if self.value is None else torch.as_tensor(self.value)
        value = value.to(old)
        if self.op == "add":
            new = old + value
        elif self.op == "scale":
            new = old * value
        else:  # ablate has no value, so that it is 0
            new = value.expand_as(old)
        if self.gate is not None:
            new = torch.where(old > torch.as_tensor(self.gate).to(old), new, old)
        return new - old

    def _on(self, device: torch.device) -> SparseAutoencoder:
        if self.sae.W_dec.device == device:
            return self.sae
        moved: dict = self._moved  # pyright: ignore[reportAttributeAccessIssue]
        tensors = (*self.sae.parameters(), *self.sae.buffers())
        state = [None if each.is_inference() else each._version for each in tensors]
        if device not in moved or moved[device][0] != state:  # it may have gone on learning since
            moved[device] = state, copy.deepcopy(self.sae).to(device)
        return moved[device][1]


def unlearn(
    site: str | Sequence[str],
    sae: SparseAutoencoder,
    features: Sequence[int],
    mean: Float[Tensor, " features"],
    usual: Float[Tensor, " features"],
    *,
    multiplier: float = -1.0,
    alpha: float | Sequence[float] | Tensor = 1.0,
) -> SAEEdit:
    """The edit that takes a concept out: it turns its latents round where they are unusually high.

    Formula: z'_j = multiplier * mean_j * z_j where z_j > usual_j, else z_j.

    Args:
        site: see `SAEEdit`. sae: see there. features: latents of the concept.
        mean: of these latents over pictures of the concept.
        usual: of these latents over pictures of all concepts.
        multiplier: negative; styles -1, objects -1 to -30 in the reference.
        alpha: strength of the change.

    Returns:
        An edit; other tokens and pictures keep their values bit for bit.

    Raises:
        InvalidInput: mean or usual are not one finite number for each latent.

    Example:
        >>> from dreamreader.sae import SparseAutoencoder, TopK
        >>> sae = SparseAutoencoder(8, 32, TopK(4)).eval()
        >>> unlearn("unet.mid_block", sae, [3, 5], torch.ones(2), torch.zeros(2)).op
        'scale'

    Reference:
        Cywinski and Deja, SAeUron, arXiv:2501.18052.
    """
    return SAEEdit(
        site, sae, features, "scale", multiplier * torch.as_tensor(mean), alpha, gate=usual
    )


def _check_sae(sae: object) -> None:
    if not isinstance(sae, SparseAutoencoder):
        raise InvalidInput(f"SAEEdit: sae must be a SparseAutoencoder, got {type(sae).__name__}")
    if sae.training:
        raise InvalidInput("SAEEdit: the autoencoder is in training; call sae.eval() first")
    if not sae.encodes_rows_alone:
        raise InvalidInput(
            f"SAEEdit: with {sae.selection} and no threshold, the codes of a token depend on the "
            "batch around it; give sae.threshold a value, as training does, or use TopK"
        )


def _features(features: object, op: str, d_sae: int) -> tuple[int, ...] | None:
    if op == "reconstruct":
        if features is not None:
            raise InvalidInput("SAEEdit: reconstruct takes no features; give another op")
        return None
    listed: Any = [features] if isinstance(features, int) else features
    if isinstance(listed, Tensor) or hasattr(listed, "tolist"):
        listed = listed.tolist()
    whole = isinstance(listed, Sequence) and all(
        isinstance(each, int) and not isinstance(each, bool) for each in listed
    )
    numbers = list(listed) if whole else []
    if not numbers:
        raise InvalidInput(f"SAEEdit: {op} needs features, numbers of latents, got {features!r}")
    wrong = [each for each in numbers if not 0 <= each < d_sae]
    if wrong:
        raise InvalidInput(f"SAEEdit: latent {wrong[0]} of {d_sae} does not exist")
    if len(set(numbers)) < len(numbers):
        twice = next(each for each in numbers if numbers.count(each) > 1)
        raise InvalidInput(f"SAEEdit: latent {twice} is named twice")
    return tuple(numbers)


def _columns_of(codes: SparseRows, chosen: Int[Tensor, " m"]) -> Float[Tensor, "rows m"]:
    """Codes of some latents, zeros included."""
    place = torch.full((codes.width,), -1, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    at = torch.where(codes.columns < 0, -1, place[codes.columns.clamp(min=0).long()])
    wanted = at >= 0
    found = codes.values.new_zeros(len(codes.row_ptr) - 1, len(chosen))
    return found.index_put((codes.row_of()[wanted], at[wanted]), codes.values[wanted])


def _numbers(given: object) -> Tensor | None:
    """As float32; None where they are no numbers."""
    try:
        found = torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        return None
    real = found.dtype != torch.bool and not found.is_complex()
    return found.to(torch.float32) if real else None


def _vector(name: str, given: object, count: int) -> Tensor:
    found = _numbers(given)
    if found is None or found.shape not in ((), (1,), (count,)):
        got = repr(given) if found is None else f"shape {list(found.shape)}"
        raise InvalidInput(
            f"SAEEdit: {name} must be a number or one for each of {count} latents, got {got}"
        )
    if not bool(found.isfinite().all()) and name == "value":
        raise InvalidInput(f"SAEEdit: {name} has values that are not finite")
    if bool(found.isnan().any()):
        raise InvalidInput(f"SAEEdit: {name} is NaN")
    return found
