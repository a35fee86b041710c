"""Native module; absent where it was not built."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

class NotTaken(Exception):
    """A kernel leaves this call, for its sizes, to another back end."""

class NoCode(Exception):
    """The module has no code for this device."""

def build_info() -> dict[str, Any]: ...
def why_not_on(device: int) -> str: ...  # empty where the kernels run; in CUDA builds
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
def intervene_seen_cpu(
    x: Tensor,
    out: Tensor,
    code: str,
    strength: Tensor,
    vectors: Tensor,
    limits: Tensor,
    masks: Tensor,
    patches: Sequence[Tensor],
    threads: int,
    seen: Tensor,
    at: int,
) -> None: ...
def reused(bytes: int) -> Any: ...  # a capsule for torch.from_dlpack
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
def low_rank_cpu(
    x: Tensor,
    out: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    threads: int,
) -> None: ...
def low_rank_backward_cpu(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    dx: Tensor,
    d_down: Tensor,
    d_bias: Tensor,
    d_up: Tensor,
    d_strength: Tensor,
    threads: int,
) -> None: ...
def low_rank_cuda(
    x: Tensor, out: Tensor, down: Tensor, bias: Tensor, up: Tensor, strength: Tensor, index: Tensor
) -> None: ...
def low_rank_workspace_cuda(
    entries: int, tokens: int, width: int, rank: int, adapters: int
) -> int: ...
def low_rank_backward_cuda(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    bias: Tensor,
    up: Tensor,
    strength: Tensor,
    index: Tensor,
    dx: Tensor | None,
    d_down: Tensor | None,
    d_bias: Tensor | None,
    d_up: Tensor | None,
    d_strength: Tensor | None,
    workspace: Tensor,
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
def guide_cpu(
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    gram: Tensor,
    activation: int,
    coefficients: Tensor,
    strength: Tensor,
    gamma: float,
    iterations: int,
    trust: float,
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
def permuted_cpu(indices: Tensor, out: Tensor, n: int, seed: int) -> None: ...
def pack_cpu(
    out: Tensor,
    scales: Tensor | None,
    not_finite: Tensor | None,
    x: Tensor,
    places: Tensor,
    minus: Tensor | None,
    groups: Tensor | None,
    pool: int,
    stored: int,
    threads: int,
) -> None: ...
def pack_cuda(
    out: Tensor,
    scales: Tensor | None,
    not_finite: Tensor | None,
    x: Tensor,
    places: Tensor,
    minus: Tensor | None,
    groups: Tensor | None,
    pool: int,
    stored: int,
) -> None: ...
def choose_cpu(
    tokens: Tensor,
    offsets: Tensor,
    entries: Tensor,
    samples: Tensor,
    branches: Tensor,
    streams: Tensor,
    counts: Tensor | None,
    shift: Tensor | None,
    moment: int,
    places: Tensor,
    keys: Tensor,
) -> int: ...
def counts_of_budget_cpu(
    budget: int, calls: int, call: int, streams: Tensor, counts: Tensor
) -> None: ...

class Gather:
    open: int
    def __init__(
        self,
        names: list[str],
        file_rows: Tensor,
        file: Tensor,
        first: Tensor,
        start: Tensor,
        stored: int,
        width: int,
        most: int,
    ) -> None: ...
    def choose(self, rows: Tensor, begin: int, span: int, every: int, table: bytes) -> None: ...
    def count(self, counts: Tensor, threads: int) -> tuple[str, int, int, str] | None: ...
    def read(
        self,
        position: int,
        seed: int | None,
        out: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        keys: Tensor | None,
        checked: bool,
        threads: int,
    ) -> tuple[str, int, int, str] | None: ...

def crc32c(parts: Sequence[Any], out: Any) -> None: ...

class ShardWriter:
    def __init__(
        self,
        ring_bytes: int,
        slab_bytes: int,
        threads: int,
        pack_threads: int,
        leave_out: bool,
        wait_micro: int = 0,  # before each write; for tests, as a slow disk
    ) -> None: ...
    def close(self) -> None: ...
    def site(self, file: str, features: int, stored: int, pool: int) -> int: ...
    def begin(self, folder: str) -> None: ...
    def reserve(self, x: Tensor) -> None: ...
    def put(
        self,
        site: int,
        x: Tensor,
        places: Tensor,
        keys: Tensor,
        minus: Tensor | None,
        groups: Tensor | None,
    ) -> int: ...
    def flush(self) -> None: ...
    def used(self) -> list[int]: ...
    def rows(self, site: int) -> int: ...
    def segments(self, site: int) -> bytes: ...
    def not_finite(self, site: int) -> list[int]: ...
    def left_out(self, site: int) -> list[int]: ...
    def finish(
        self, site: int, header: bytes, moments: bytes, tail: tuple[int, int, int, int, int, int]
    ) -> None: ...
    def wait(self) -> None: ...
    def abandon(self) -> None: ...
    def info(self) -> dict[str, Any]: ...
