"""Sparse autoencoders: rows of activations as few active latents, and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dreamreader.artifacts import Artifact
from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows
from dreamreader.sae.codec import SparseCodec, check_switch
from dreamreader.sae.encoder import FixedEncoder, encode_dead
from dreamreader.sae.inputs import check_mask, layout_of
from dreamreader.sae.jump import drop_zeros, encode_near
from dreamreader.sae.loss import (
    AUX_RULES,
    AuxK,
    SaeLoss,
    fraction_unexplained,
    residual_error,
    split_columns,
    squared_error,
)
from dreamreader.sae.norms import align_rows_, remove_parallel_, unit_rows_
from dreamreader.sae.rules import resolve_rule
from dreamreader.sae.selection import (
    JumpReLU,
    Selection,
    TopK,
    check_selection,
    describe_selection,
    selection_from,
)
from dreamreader.sae.threshold import (
    THRESHOLD_RULES,
    ThresholdRule,
    find_smallest,
    update_threshold,
)


class SparseAutoencoder(SparseCodec, Artifact, kind="sae"):
    """Encodes rows of activations as few active latents, and decodes them.

    Formula: z = N(x); A = (z - b_dec) W_enc + b_enc, each column times |W_dec_j| if `rescale`;
        codes f = the part of relu(A) that the selection keeps;
        x_hat = N^-1(f W_dec + b_dec), with f_j / |W_dec_j| if `rescale`.

    In `train()` mode the selection keeps; in `eval()` mode the threshold does, where there is one
    (`inference`). Thresholds and counters keep their precision, whatever dtype weights get.

    Args:
        d_in: width of the activations. d_sae: number of latents.
        selection: `TopK(k)`, `BatchTopK(k)`, `SampledTopK(k, l, ...)` or `JumpReLU()`.
        groups: widths of Matryoshka prefixes, ascending; d_sae is added at the end.
        group_weights: of the errors of prefixes, d_sae's too; 1 each by default.
        rescale: selects on activations times the length of their decoder row.
        apply_b_dec_to_input: b_dec is taken from inputs.
        normalise: `none`, `average_norm`, `standardise` (both from `fit_normalisation`),
            `constant_norm` or `layer_norm` of each row.
        reshape: `hook_z` takes inputs [..., heads, d_in / heads] too.
        unit_decoder: `after_step` keeps decoder rows at length 1; by default unless `rescale`.
        aligned: `after_step` keeps <w_enc_j, w_dec_j> at 1.
        threshold_rule: `dictionary_learning`, `saelens` or a `ThresholdRule`.
        aux: `dictionary_learning`, `saelens`, `none` or an `AuxK`.
        inference: `threshold` or `selection`, in `eval()` mode; by default `selection` for TopK.
        decoder_norm: of decoder rows in the beginning. tied: the encoder begins as their transpose.
        seed: of the decoder in the beginning.
        dtype, device: of the weights.
        metadata: plain values that files keep, such as the site.

    Attributes:
        W_enc: [d_in, d_sae], whose transpose lies contiguous. b_enc: [d_sae].
        W_dec: [d_sae, d_in]. b_dec: [d_in].
        tokens_since_fired: int64 [d_sae]. steps: int64, of `after_step`.
        statistics: values [d_sae] of activations that a file had, such as `mean`.
        compute_dtype: in which it multiplies; that of the weights where None.

    Raises:
        InvalidInput, UnknownName: a value cannot be right.

    Example:
        >>> from dreamreader.sae import BatchTopK
        >>> sae = SparseAutoencoder(8, 32, BatchTopK(4))
        >>> x = torch.randn(16, 8)
        >>> sae.encode(x).count_nonzero().item(), sae(x).shape
        (64, torch.Size([16, 8]))
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        selection: Selection,
        *,
        groups: Sequence[int] | None = None,
        group_weights: Sequence[float] | None = None,
        rescale: bool = False,
        apply_b_dec_to_input: bool = True,
        normalise: str = "none",
        reshape: str = "none",
        unit_decoder: bool | None = None,
        aligned: bool = False,
        threshold_rule: str | ThresholdRule = "dictionary_learning",
        aux: str | AuxK = "dictionary_learning",
        inference: str | None = None,
        decoder_norm: float = 1.0,
        tied: bool = True,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        for name, value in (("aligned", aligned), ("unit_decoder", unit_decoder)):
            check_switch(name, value)
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidInput(f"SparseAutoencoder: metadata are values by name, got {metadata!r}")
        own_rule = resolve_rule(
            threshold_rule, ThresholdRule, THRESHOLD_RULES, "threshold_rule", "threshold rule"
        )
        super().__init__(
            d_in,
            d_sae,
            selection,
            rescale=rescale,
            apply_b_dec_to_input=apply_b_dec_to_input,
            normalise=normalise,
            reshape=reshape,
            inference=inference,
            threshold_start=own_rule.start,
            decoder_norm=decoder_norm,
            tied=tied,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        self.groups = resolve_widths(groups, d_sae)
        self.group_weights = _weights(group_weights, len(self.groups))
        self.unit_decoder = not rescale if unit_decoder is None else unit_decoder
        self.aligned = aligned
        self.threshold_rule = own_rule
        self.aux = resolve_rule(aux, AuxK, AUX_RULES, "aux", "aux rule")
        self.metadata = dict(metadata or {})
        self.statistics: dict[str, Tensor] = {}
        if aligned:
            self.constrain()

    def loss(
        self,
        x: Float[Tensor, "*batch"],
        mask: Bool[Tensor, "..."] | None = None,
        selection: Selection | None = None,
    ) -> SaeLoss:
        """The loss of a batch, in the space of normalised inputs.

        Formula: sum over prefixes of weight * mean |z - z_hat|^2, plus aux-k of the dead latents.

        Args:
            x: [..., d_in]. mask: [...], False for tokens that do not count.
            selection: in place of its own, such as with another k.

        Raises:
            InvalidInput: x or mask has another shape, or no token counts.
        """
        if selection is not None:
            check_selection(selection, self.d_sae)
            if self.learns_thresholds and selection != self.selection:
                raise InvalidInput(
                    f"SparseAutoencoder: thresholds of {self.selection} learn from its own "
                    f"selection, not from {selection}"
                )
        layout = layout_of(x, self.d_in, self.reshape)
        rows = x.reshape(-1, self.d_in)
        if mask is not None:
            rows = rows[check_mask(mask, layout.batch)]
        if not len(rows):
            raise InvalidInput("SparseAutoencoder: no token counts in this batch")
        z = self._affine(rows).apply(rows)
        fixed, whole, penalty = None, len(self.groups) == 1, None
        if self.training and self.learns_thresholds:
            near, penalty = self._codes_to_learn_from(*self._encoder(z))
            codes, kept = self._unscale(near), drop_zeros(near)
        else:
            fixed = self._fixed_encoder(z)
            kept = self._codes(fixed.rows, fixed.weight, fixed.bias, selection or self.selection)
            codes = self._attach(kept, fixed, z)
        rebuilt = [self._decode_unscaled(codes)] if whole else self._prefixes(codes)
        errors = torch.stack([squared_error(z, each) for each in rebuilt])
        fired = kept.column_counts() > 0
        idle = self.tokens_since_fired
        if not self.aux.lagged:
            idle = torch.where(fired, 0, idle + len(rows))
        residual = (z - rebuilt[-1]).detach()
        aux = self._aux_loss(z, fixed, residual, idle)
        weights = torch.tensor(self.group_weights, device=errors.device)
        return SaeLoss(
            (errors * weights).sum() + aux + (0.0 if penalty is None else penalty),
            errors[-1].detach(),
            aux.detach(),
            fraction_unexplained(z, errors[-1].detach()),
            kept.count() / len(rows),
            (idle >= self.aux.dead_after).float().mean(),
            errors.detach(),
            fired,
            find_smallest(kept, by_row=isinstance(self.selection, TopK)),
            len(rows),
            None if penalty is None else penalty.detach(),
        )

    def _codes_to_learn_from(
        self, rows: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[SparseRows, Tensor]:
        """Codes with those of 0 near their threshold, and what active ones cost."""
        selection = self.selection
        assert isinstance(selection, JumpReLU)
        codes, count = encode_near(rows, weight, bias, self.log_threshold, selection.bandwidth)
        return codes, selection.weight(int(self.steps)) * count

    @torch.no_grad()
    def before_step(self) -> None:
        """Between backward and the optimiser: what would change the length of decoder rows goes."""
        if self.unit_decoder and self.W_dec.grad is not None:
            remove_parallel_(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def after_step(self, result: SaeLoss) -> None:
        """After the optimiser: keeps constraints, counts idle tokens, moves the threshold.

        Args:
            result: of the batch that the step learned from.
        """
        self.constrain()
        if self.learns_thresholds:
            self.thresholds.copy_(self.log_threshold.float().exp())
        idle = self.tokens_since_fired + result.tokens
        self.tokens_since_fired.copy_(torch.where(result.fired, 0, idle))
        fitted = not isinstance(self.selection, JumpReLU)  # whose thresholds stay
        if fitted and int(self.steps) >= self.threshold_rule.after:
            mean = update_threshold(self.threshold_rule, self.threshold_mean, result.smallest)
            self.threshold_mean.copy_(mean)
            self.thresholds.copy_(mean.float().expand(self.d_sae))
        self.steps += 1

    @torch.no_grad()
    def constrain(self) -> None:
        """Puts weights back to what `unit_decoder` and `aligned` ask for."""
        if self.unit_decoder:
            unit_rows_(self.W_dec)
        if self.aligned:
            align_rows_(self.W_enc.T, self.W_dec)

    def describe(self) -> dict[str, Any]:
        """What it was made with, as plain values."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "selection": describe_selection(self.selection),
            "groups": list(self.groups),
            "group_weights": list(self.group_weights),
            "rescale": self.rescale,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "normalise": self.normalise,
            "reshape": self.reshape,
            "unit_decoder": self.unit_decoder,
            "aligned": self.aligned,
            "threshold_rule": asdict(self.threshold_rule),
            "aux": asdict(self.aux),
            "inference": self.inference,
            "metadata": dict(self.metadata),
        }

    def extra_repr(self) -> str:
        kept = (f"d_in={self.d_in}, d_sae={self.d_sae}", f"selection={self.selection}")
        return ", ".join(kept)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        extra = {f"statistics.{name}": each for name, each in self.statistics.items()}
        return tensors | extra, {"sae": self.describe(), "statistics": list(self.statistics)}

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        own = dict(content["sae"])
        rules = {
            "selection": selection_from(own.pop("selection")),
            "threshold_rule": ThresholdRule(**own.pop("threshold_rule")),
            "aux": AuxK(**own.pop("aux")),
        }
        made = cls(**own, **rules, dtype=tensors["W_dec"].dtype)
        made.set_tensors({name: tensors[name] for name in made.state_dict()})
        for name in content["statistics"]:
            made.statistics[name] = tensors[f"statistics.{name}"]
        return made.eval()  # to be used; call train() to go on

    def _prefixes(self, codes: SparseRows) -> list[Tensor]:
        """Reconstructions from the latents of each prefix."""
        parts = [
            self._decode_unscaled(each, biased=number == 0)
            for number, each in enumerate(split_columns(codes, self.groups))
        ]
        for number in range(1, len(parts)):
            parts[number] = parts[number] + parts[number - 1]
        return parts

    def _aux_loss(
        self, z: Tensor, fixed: FixedEncoder | None, residual: Tensor, idle: Tensor
    ) -> Tensor:
        none = torch.zeros((), device=z.device)
        if not self.aux.weight or not self.training:
            return none
        dead = (idle >= self.aux.dead_after).nonzero().squeeze(1).int()
        if not len(dead):
            return none
        fixed = self._fixed_encoder(z) if fixed is None else fixed
        kept = encode_dead(self.aux, fixed.rows, fixed.weight, fixed.bias, dead)
        rebuilt = self._decode_unscaled(self._attach(kept, fixed, z), biased=False)
        return residual_error(self.aux, self.d_in, len(dead), residual, rebuilt)


def resolve_widths(groups: Sequence[int] | None, d_sae: int) -> tuple[int, ...]:
    """Where Matryoshka prefixes end, d_sae the last.

    Raises:
        InvalidInput: they are no ascending widths.
    """
    listed = groups is None or isinstance(groups, Sequence)
    widths = tuple(groups or ()) if listed else ()
    if not widths or widths[-1] != d_sae:
        widths = (*widths, d_sae)
    whole = listed and all(isinstance(each, int) and not isinstance(each, bool) for each in widths)
    if not whole or any(a >= b for a, b in zip((0, *widths), widths, strict=False)):
        raise InvalidInput(
            f"SparseAutoencoder: groups are ascending widths up to d_sae={d_sae}, got {groups}"
        )
    return widths


def _weights(weights: Sequence[float] | None, groups: int) -> tuple[float, ...]:
    found = [1.0] * groups if weights is None else weights
    numbers = isinstance(found, Sequence) and all(
        isinstance(each, int | float) and 0 <= each < math.inf for each in found
    )
    if not numbers or len(found) != groups or not any(found):
        raise InvalidInput(
            f"SparseAutoencoder: group_weights are {groups} numbers, at least 0, one for each "
            f"prefix and d_sae, got {weights}"
        )
    return tuple(float(each) for each in found)
