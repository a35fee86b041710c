"""What is measured: anything that encodes rows as latents and decodes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamreader.errors import InvalidInput
from dreamreader.ops import SparseRows


class Coder(Protocol):
    """Rows as latents and back. `encode_sparse(x) -> SparseRows` is used where there is one."""

    W_dec: Any  # [d_sae, d_in]

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, codes: Any, /) -> Tensor: ...


@contextmanager
def inference(sae: Coder) -> Iterator[None]:
    """In `eval()` mode and without gradients; the mode is put back."""
    modules = sae.modules() if isinstance(sae, nn.Module) else ()
    training = [each for each in modules if each.training]
    for each in training:
        each.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for each in training:
            each.training = True


def encode_rows(sae: Coder, x: Float[Tensor, "rows d_in"]) -> SparseRows:
    """The latents of rows.

    Raises:
        InvalidInput: x is not [rows, d_in].
    """
    return encode_and_decode(sae, x, decode=False)[0]


def encode_and_decode(
    sae: Coder, x: Float[Tensor, "rows d_in"], decode: bool = True
) -> tuple[SparseRows, Tensor]:
    """The latents of rows and what they decode to; an empty tensor with `decode=False`."""
    if x.dim() != 2 or x.shape[1] != sae.W_dec.shape[1]:
        raise InvalidInput(
            f"rows must be [rows, {sae.W_dec.shape[1]}], as wide as the decoder, "
            f"got {list(x.shape)}"
        )
    sparse = getattr(sae, "encode_sparse", None)
    codes = sae.encode(x) if sparse is None else sparse(x)
    found = sae.decode(codes) if decode else x.new_empty(0)
    return codes if isinstance(codes, SparseRows) else SparseRows.from_dense(codes), found
