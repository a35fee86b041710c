"""Adapter: the parameters of a learned edit at one site."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dreamreader.errors import InvalidInput
from dreamreader.ops import low_rank
from dreamreader.reft.variants import Tables, initial, variant_of


class Adapter(nn.Module):
    """A learned edit of one site, or one for each denoising step, with float32 parameters.

    Args:
        site: name of the site. width: features there.
        rank: rows of the rotation; of no meaning for the variants `diagonal` and `bias`.
        variant: `loreft`, `direft`, `noreft`, `diagonal` or `bias`, see `variant_of`.
        steps: number of steps that have an adapter each; None: the same at any time.
        init: `identity`, `pyreft` or `zero`, see `initial`.
        generator: of the first values.
        device: of the parameters; the rotation is made orthonormal there, which is what makes an
            identity exact.

    Raises:
        UnknownName, InvalidInput: as `variant_of` and `initial`.

    Example:
        >>> sum(each.numel() for each in Adapter("0", 1280, 32).parameters())
        81952
    """

    def __init__(
        self,
        site: str,
        width: int,
        rank: int = 8,
        variant: str = "loreft",
        *,
        steps: int | None = None,
        init: str = "identity",
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        if steps is not None and steps < 1:
            raise InvalidInput(f"{site}: steps must be at least 1, got {steps}")
        self.site = site
        self.width = width
        self.variant = variant_of(variant)
        self.rank = 1 if self.variant.per_channel else rank
        self.steps = steps
        self._kept: tuple[tuple, Tables] | None = None
        made = generator or torch.Generator().manual_seed(0)
        try:
            first = initial(variant, init, steps or 1, rank, width, made)
        except InvalidInput as error:
            raise InvalidInput(f"{site}: {error}") from error
        for name, value in first.items():
            self.register_parameter(name, nn.Parameter(value.to(device)))
        if init == "identity" and variant in ("loreft", "noreft"):
            with torch.no_grad():
                self.get_parameter("weight").copy_(self.tables()[2])

    def tables(self) -> Tables:
        """down [n, rank, width], bias [n, rank] and up [n, rank, width]; n is 1 without steps.

        Rows of `up` are orthonormal where the variant says so. Without gradients the tables are
        made once for as long as the parameters stay the same.
        """
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if torch.is_grad_enabled() and any(each.requires_grad for each in parameters.values()):
            return self.variant.tables(parameters)
        key = tuple((each.data_ptr(), each._version) for each in parameters.values())
        kept = self._kept
        if kept is None or kept[0] != key:
            with torch.no_grad():
                # copies, as some tables are a parameter itself, which training changes in place
                down, bias, up = (each.clone() for each in self.variant.tables(parameters))
                kept = self._kept = (key, (down, bias, up))
        return kept[1]

    def forward(
        self, x: Float[Tensor, "batch tokens width"], steps: Sequence[int] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """Phi(x), the edited activation.

        Args:
            x: activations of any floating point type.
            steps: the step of each batch entry, where there is an adapter for each.

        Raises:
            InvalidInput: steps are needed and not given, or there is no adapter for one.
        """
        index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.steps is not None:
            if steps is None or not all(0 <= each < self.steps for each in steps):
                raise InvalidInput(
                    f"{self.site}: has adapters for steps 0 .. {self.steps - 1}, asked for {steps}"
                )
            index = torch.tensor(list(steps), device=x.device)
        down, bias, up = self.tables()
        if self.variant.name == "diagonal":
            wide = x.to(down.dtype)
            return (wide + down[index] * wide + up[index]).to(x.dtype)
        return low_rank(x, down, bias, up, 1.0, index)

    def _apply(self, fn, recurse: bool = True):
        """Moves to a device; a change of type is left out, the rotation needs float32."""

        def keep_wide(value: Tensor) -> Tensor:
            new = fn(value)
            return value.to(new.device) if new.dtype != value.dtype else new

        return super()._apply(keep_wide, recurse)

    def extra_repr(self) -> str:
        steps = "" if self.steps is None else f", steps={self.steps}"
        rank = "" if self.variant.per_channel else f", rank={self.rank}"
        return f"{self.site}, width={self.width}{rank}, variant={self.variant.name}{steps}"
