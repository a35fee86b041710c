"""The way from rows of activations to few active latents and back, with the weights it takes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.ops import SparseRows, sparse_decode
from dreamreader.sae.encoder import (
    FixedEncoder,
    attach_gradients,
    draw_pool,
    encode_above,
    encode_budget,
)
from dreamreader.sae.inputs import (
    NORMALISATIONS,
    PER_ROW,
    RESHAPES,
    Affine,
    check_mask,
    fit_affine,
    layout_of,
    row_affine,
)
from dreamreader.sae.norms import geometric_median, random_directions, row_norms, scale_rows
from dreamreader.sae.selection import JumpReLU, SampledTopK, Selection, TopK, check_selection

INFERENCES = ("threshold", "selection")
_ON_CPU = ("steps", "pool_size")  # read in each step, which must not wait for a device


class SparseCodec(nn.Module):
    """Encodes rows as few active latents and decodes them; `SparseAutoencoder` says how it learns.

    Args:
        threshold_start: what stands for no threshold of inference yet; see there for the others.
    """

    pool: Tensor
    pool_size: Tensor
    steps: Tensor
    thresholds: Tensor
    threshold_mean: Tensor
    tokens_since_fired: Tensor
    input_shift: Tensor
    input_scale: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        selection: Selection,
        *,
        rescale: bool,
        apply_b_dec_to_input: bool,
        normalise: str,
        reshape: str,
        inference: str | None,
        threshold_start: float,
        decoder_norm: float,
        tied: bool,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_sae", d_sae)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InvalidInput(f"SparseAutoencoder: {name} is at least 1, got {size!r}")
        check_selection(selection, d_sae)
        switches = {"rescale": rescale, "apply_b_dec_to_input": apply_b_dec_to_input, "tied": tied}
        for name, value in switches.items():
            check_switch(name, value)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise InvalidInput(f"SparseAutoencoder: seed is a whole number, got {seed!r}")
        if not (isinstance(decoder_norm, int | float) and 0 < decoder_norm < math.inf):
            raise InvalidInput(
                f"SparseAutoencoder: decoder_norm is a positive number, got {decoder_norm!r}"
            )
        _check_kind(dtype, device)
        chosen = inference or ("selection" if isinstance(selection, TopK) else "threshold")
        for what, given, known in (
            ("normalise", normalise, NORMALISATIONS),
            ("reshape", reshape, RESHAPES),
            ("inference", chosen, INFERENCES),
        ):
            if given not in known:
                raise UnknownName(f"{what} of an autoencoder", str(given), known)
        self.d_in, self.d_sae, self.selection = d_in, d_sae, selection
        self.rescale, self.apply_b_dec_to_input = rescale, apply_b_dec_to_input
        self.normalise, self.reshape, self.inference = normalise, reshape, chosen
        self.threshold_start = threshold_start
        self.compute_dtype: torch.dtype | None = None
        self._begin(decoder_norm, tied, seed, dtype, device)

    def _begin(
        self, norm: float, tied: bool, seed: int, dtype: torch.dtype | None, device: Any
    ) -> None:
        """Parameters and buffers."""
        draw = torch.Generator().manual_seed(seed)
        d_in, d_sae = self.d_in, self.d_sae
        decoder = random_directions(d_sae, d_in, norm, draw)
        encoder = decoder if tied else random_directions(d_sae, d_in, norm, draw)
        made = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.W_dec = nn.Parameter(decoder.to(**made, copy=True))
        self.W_enc = nn.Parameter(encoder.to(**made, copy=True).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **made))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **made))
        start = 0.0 if isinstance(self.selection, JumpReLU) else -1.0
        if self.learns_thresholds:
            assert isinstance(self.selection, JumpReLU)
            start = self.selection.start
            log = torch.full((d_sae,), math.log(start), device=device, dtype=torch.float32)
            self.log_threshold = nn.Parameter(log)
        wide = {"device": device, "dtype": torch.float32}
        self.register_buffer("thresholds", torch.full((d_sae,), start, **wide))
        mean = torch.tensor(self.threshold_start, dtype=torch.float64, device=device)
        self.register_buffer("threshold_mean", mean)
        idle = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", idle)
        pool = torch.full((d_sae,), -1, dtype=torch.int32, device=device)
        self.register_buffer("pool", pool)
        self.register_buffer("input_shift", torch.zeros(d_in, **wide))
        self.register_buffer("input_scale", torch.ones(d_in, **wide))
        for name in _ON_CPU:
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @property
    def learns_thresholds(self) -> bool:
        """Whether thresholds are trained, as `log_threshold`."""
        return isinstance(self.selection, JumpReLU) and self.selection.sparsity is not None

    @property
    def k(self) -> float | None:
        """Active latents that the selection asks for; None for JumpReLU."""
        return getattr(self.selection, "k", None)

    @property
    def threshold(self) -> Float[Tensor, " d_sae"] | None:
        """The threshold of each latent at inference, float32; None until one is fitted or set."""
        return None if bool((self.thresholds < 0).any()) else self.thresholds

    @threshold.setter
    def threshold(self, value: float | Tensor | None) -> None:
        if value is None:
            self.thresholds.fill_(-1.0)
            self.threshold_mean.fill_(self.threshold_start)
            return
        if not isinstance(value, Tensor | int | float | list | tuple):
            raise InvalidInput(
                f"SparseAutoencoder: threshold is a number or [{self.d_sae}], got {value!r}"
            )
        given = torch.as_tensor(value).detach().to(self.thresholds)
        if given.shape not in ((), (self.d_sae,)):
            raise InvalidInput(
                f"SparseAutoencoder: threshold is a number or [{self.d_sae}], got "
                f"{list(given.shape)}"
            )
        if bool(given.isnan().any()):
            raise InvalidInput(
                f"SparseAutoencoder: {int(given.isnan().sum())} thresholds are NaN; give numbers"
            )
        self.thresholds.copy_(given.clamp(min=0))  # what is not positive is never active
        if self.learns_thresholds:
            with torch.no_grad():
                self.log_threshold.copy_(self.thresholds.clamp(min=1e-12).log())
        if given.dim() == 0:
            self.threshold_mean.copy_(given.clamp(min=0))

    def forward(
        self, x: Float[Tensor, "*batch"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch"]:
        """The reconstruction, in shape and dtype of x.

        Args:
            x: [..., d_in]. mask: [...], False for tokens that take no part; they become what no
                active latent gives.
        """
        layout = layout_of(x, self.d_in, self.reshape)
        rows = x.reshape(-1, self.d_in)
        affine = self._affine(rows)
        codes = self._masked_codes(affine.apply(rows), mask, layout.batch)
        return layout.restore(affine.undo(self._decode_rows(codes)).to(x.dtype))

    def encode(
        self, x: Float[Tensor, "*batch"], mask: Bool[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*batch d_sae"]:
        """The codes, zeros included.

        Args:
            x: [..., d_in]. mask: [...], False for tokens that take no part and have no codes.

        Raises:
            InvalidInput: x or mask has another shape.
        """
        batch = layout_of(x, self.d_in, self.reshape).batch
        return self.encode_sparse(x, mask).dense().reshape(*batch, self.d_sae)

    def encode_sparse(
        self, x: Float[Tensor, "*batch"], mask: Bool[Tensor, "..."] | None = None
    ) -> SparseRows:
        """The codes as sparse rows, one for each token in the order of x; see `encode`."""
        layout = layout_of(x, self.d_in, self.reshape)
        rows = x.reshape(-1, self.d_in)
        return self._masked_codes(self._affine(rows).apply(rows), mask, layout.batch)

    def decode(
        self, codes: SparseRows | Float[Tensor, "*batch d_sae"], x: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction from codes, [rows, d_in] from sparse rows.

        Args:
            codes: as `encode` or `encode_sparse` gives them.
            x: what was encoded; needed where each row is normalised by itself.

        Raises:
            InvalidInput: codes have another width, or x is needed and not there.
        """
        if not isinstance(codes, SparseRows | Tensor):
            raise InvalidInput(
                "SparseAutoencoder: codes are a tensor [..., d_sae] or SparseRows, got "
                f"{type(codes).__name__}"
            )
        width = codes.width if isinstance(codes, SparseRows) else codes.shape[-1]
        if width != self.d_sae:
            raise InvalidInput(
                f"SparseAutoencoder: codes have {width} latents, it has d_sae={self.d_sae}"
            )
        values = codes.values if isinstance(codes, SparseRows) else codes
        if not values.is_floating_point():
            raise InvalidInput(
                f"SparseAutoencoder: codes must be floating point, got {values.dtype}; use .float()"
            )
        if x is None and self.normalise in PER_ROW:
            raise InvalidInput(
                f"SparseAutoencoder: with normalise={self.normalise!r} each row has its own scale: "
                "decode(codes, x) with the x that was encoded"
            )
        affine = self._affine(None if x is None else x.reshape(-1, self.d_in))
        if isinstance(codes, SparseRows):
            return affine.undo(self._decode_rows(codes)).to(codes.values.dtype)
        dense = codes.reshape(-1, self.d_sae)
        if self.rescale:
            dense = dense / row_norms(self.W_dec).to(dense.dtype)
        found = dense @ self.W_dec.to(dense.dtype) + self.b_dec.to(dense.dtype)
        found = affine.undo(found).to(dense.dtype)
        if x is not None:
            return found.reshape(x.shape)
        return found.reshape(*codes.shape[:-1], self.d_in)

    @property
    def encodes_rows_alone(self) -> bool:
        """Whether the codes of a row, in `eval()` mode, do not depend on the rows beside it."""
        by_threshold = self.inference == "threshold" and self.threshold is not None
        return by_threshold or isinstance(self.selection, TopK | JumpReLU)

    def encode_features(
        self, x: Float[Tensor, "rows d_in"], features: Int[Tensor, " m"]
    ) -> Float[Tensor, "rows m"]:
        """The codes of some latents; where thresholds decide, no others are computed.

        Args:
            x: [rows, d_in]. features: numbers of latents.
        """
        learned = isinstance(self.selection, JumpReLU)
        threshold = self.thresholds if learned else self.threshold
        by_threshold = not self.training and self.inference == "threshold"
        if threshold is None or not (learned or by_threshold):
            return self.encode(x)[:, features]
        rows, weight, bias = self._encoder(self._affine(x).apply(x), features)
        found = torch.addmm(bias, rows, weight.T)
        # in float32, as thresholds are
        return torch.where(found.float() <= threshold[features].clamp(min=0), 0, found)

    def decode_change(
        self,
        change: Float[Tensor, "rows m"],
        features: Int[Tensor, " m"],
        x: Float[Tensor, "rows d_in"],
    ) -> Float[Tensor, "rows d_in"]:
        """By how much reconstructions change where codes of some latents do.

        Args:
            change: of the codes. features: numbers of latents. x: what was encoded.
        """
        rows = self.W_dec[features].to(change.dtype)
        if self.rescale:
            rows = rows / row_norms(rows).unsqueeze(1)
        return (change @ rows) / self._affine(x).scale.to(change.dtype)

    @torch.no_grad()
    def fit_normalisation(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Takes the scale of `average_norm` or `standardise` from a sample of rows.

        Raises:
            InvalidInput: its normalisation has nothing to fit, or no scale follows from the rows.
        """
        if self.normalise not in ("average_norm", "standardise"):
            raise InvalidInput(f"normalise={self.normalise!r} has nothing to fit")
        affine = fit_affine(self.normalise, self._sample(x))
        self.input_shift.copy_(affine.shift)
        self.input_scale.copy_(affine.scale)

    @torch.no_grad()
    def center_on(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Sets b_dec to the geometric median of a sample of rows, as they are normalised."""
        rows = self._sample(x)
        self.b_dec.copy_(geometric_median(self._affine(rows).apply(rows)))

    @torch.no_grad()
    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets parameters and buffers by name.

        Raises:
            UnknownName: it has none of this name.
            InvalidInput: a shape is another one, or a threshold is NaN.
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in tensors.items():
            if name not in own:
                raise UnknownName("tensor of an autoencoder", name, own)
            if value.shape != own[name].shape:
                raise InvalidInput(
                    f"{name} must be {list(own[name].shape)}, got {list(value.shape)}"
                )
            if name in ("thresholds", "threshold_mean") and bool(value.isnan().any()):
                raise InvalidInput(f"{name}: {int(value.isnan().sum())} values are NaN")
            own[name].copy_(value)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self.named_buffers())
        learned = self.log_threshold.detach() if self.learns_thresholds else None
        super()._apply(fn, recurse)
        if learned is not None and self.log_threshold.dtype != learned.dtype:
            self.log_threshold.data = learned.to(self.log_threshold.device)
        for name, had in before.items():
            now = self.get_buffer(name)
            if name in _ON_CPU:
                setattr(self, name, had)
            elif now.dtype != had.dtype:  # thresholds would be rounded
                setattr(self, name, had.to(now.device))
        return self

    def _sample(self, x: Tensor) -> Tensor:
        layout_of(x, self.d_in, self.reshape)
        return x.detach().reshape(-1, self.d_in).to(self.W_dec.device)

    def _affine(self, rows: Tensor | None) -> Affine:
        if self.normalise in PER_ROW:
            assert rows is not None
            return row_affine(self.normalise, rows)
        if self.normalise == "none":
            return _IDENTITY
        return Affine(self.input_shift, self.input_scale)

    def _encoder(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Centred rows, rows of the encoder and its bias, in the dtype of computing.

        Args:
            features: numbers of latents; all where None.
        """
        dtype = self.compute_dtype or self.W_enc.dtype
        weight, bias, decoder, rows = self.W_enc.T, self.b_enc, self.W_dec, z.to(dtype)
        if features is not None:
            weight, bias, decoder = weight[features], bias[features], decoder[features]
        if self.rescale:
            norms = row_norms(decoder)
            weight, bias = weight * norms.unsqueeze(1), bias * norms
        if self.apply_b_dec_to_input:
            rows = rows - self.b_dec.to(dtype)
        return rows, weight.to(dtype), bias.to(dtype)

    @torch.no_grad()
    def _fixed_encoder(self, z: Tensor) -> FixedEncoder:
        """What `_encoder` gives, for a step that attaches gradients to what is kept."""
        dtype = self.compute_dtype or self.W_enc.dtype
        weight, bias, rows, norms = self.W_enc.detach().T, self.b_enc.detach(), z.to(dtype), None
        if self.rescale:
            norms = row_norms(self.W_dec)
            weight, bias = scale_rows(weight, norms, dtype), bias * norms
        if self.apply_b_dec_to_input:
            rows = rows - self.b_dec.to(dtype)
        return FixedEncoder(rows, weight.to(dtype), bias.to(dtype), norms)

    def _attach(self, kept: SparseRows, encoder: FixedEncoder, z: Tensor) -> SparseRows:
        center = self.b_dec if self.apply_b_dec_to_input else None
        return attach_gradients(kept, encoder, z, self.W_enc.T, self.b_enc, center)

    def _masked_codes(self, z: Tensor, mask: Tensor | None, batch: torch.Size) -> SparseRows:
        """Codes of all rows, of which those outside of the mask have none."""
        keep = None if mask is None else check_mask(mask, batch)
        rows = z if keep is None else z[keep]
        codes = self._codes(*self._encoder(rows), self.selection)
        if keep is None:
            return codes
        counts = torch.zeros(len(keep), dtype=torch.int64, device=z.device)
        counts[keep] = codes.row_counts()
        return replace(codes, row_ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def _codes(
        self, rows: Tensor, weight: Tensor, bias: Tensor, selection: Selection
    ) -> SparseRows:
        if isinstance(selection, JumpReLU):
            return encode_above(rows, weight, bias, self.thresholds)
        if not self.training and self.inference == "threshold":
            threshold = self.threshold
            if threshold is not None:
                return encode_above(rows, weight, bias, threshold)
        pool = None
        if isinstance(selection, SampledTopK):
            pool = self._current_pool(rows, weight, bias, selection)
        return encode_budget(rows, weight, bias, selection, pool)

    def _current_pool(
        self, rows: Tensor, weight: Tensor, bias: Tensor, selection: SampledTopK
    ) -> Tensor:
        size, step = int(self.pool_size), int(self.steps)
        if size and (not self.training or step % selection.update_every):
            return self.pool[:size]
        found = draw_pool(selection, rows.detach(), weight.detach(), bias.detach(), step)
        if self.training:
            self.pool.fill_(-1)
            self.pool[: len(found)] = found
            self.pool_size.fill_(len(found))
        return found

    def _decode_rows(self, codes: SparseRows) -> Tensor:
        """In the space of normalised inputs."""
        return self._decode_unscaled(self._unscale(codes))

    def _unscale(self, codes: SparseRows) -> SparseRows:
        """Codes as the decoder takes them."""
        if not self.rescale:
            return codes
        norms = row_norms(self.W_dec).to(codes.values.dtype)
        return replace(codes, values=codes.values / norms[codes.columns.clamp(min=0).long()])

    def _decode_unscaled(self, codes: SparseRows, biased: bool = True) -> Tensor:
        dtype = codes.values.dtype
        bias = self.b_dec.to(dtype) if biased else None
        return sparse_decode(codes, self.W_dec.to(dtype), bias)


def check_switch(name: str, value: Any) -> None:
    """Refuses what is neither True nor False, nor None where that is the default."""
    if not isinstance(value, bool) and not (name == "unit_decoder" and value is None):
        raise InvalidInput(f"SparseAutoencoder: {name} is True or False, got {value!r}")


def _check_kind(dtype: Any, device: Any) -> None:
    """Refuses dtypes and devices that weights cannot have."""
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not known:
        raise InvalidInput(
            f"SparseAutoencoder: dtype is a floating one of torch, such as torch.float32, got "
            f"{dtype!r}"
        )
    try:
        torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise InvalidInput(
            f"SparseAutoencoder: device is one of torch, such as 'cuda', got {device!r}"
        ) from error


class _Identity(Affine):
    def apply(self, x: Tensor) -> Tensor:
        return x

    def undo(self, z: Tensor) -> Tensor:
        return z


_IDENTITY = _Identity(torch.zeros(()), torch.ones(()))
