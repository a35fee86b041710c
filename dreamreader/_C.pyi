"""Native module; absent where it was not built."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def intervene_cpu(
    x: Tensor,
    out: Tensor,
    code: str,
    strength: Tensor,
    vectors: Tensor,
    limits: Tensor,
    masks: Tensor,
    patches: Sequence[Tensor],
    threads: int,
) -> None: ...
def intervene_cuda(
    x: Tensor,
    out: Tensor,
    code: str,
    strength: Tensor,
    vectors: Tensor,
    limits: Tensor,
    masks: Tensor,
    patches: Sequence[Tensor],
) -> None: ...
def moments_cpu(
    x: Tensor,
    labels: Tensor,
    shift: Tensor,
    rows: Tensor,
    total: Tensor,
    square: Tensor,
    threads: int,
) -> None: ...
def attention_words_cpu(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    threads: int,
) -> None: ...
def attention_words_cuda(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> None: ...
