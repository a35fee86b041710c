"""One LoReFT edit computed in several ways, each checked against a float64 run.

Imported in the environment of pyreft.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyreft import LoreftIntervention
from torch import Tensor

from dreamreader.ops import low_rank, orthonormal

BATCH = 8
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # of root mean square errors, relative
NAMES = ("edit", "dh", "dW", "db", "dR")


class Derived(torch.autograd.Function):
    """The folded formula with its gradient derived by hand, in plain torch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        x, a = h.float(), w - r
        s = torch.addmm(b, x, a.T)
        ctx.save_for_backward(h, a, r, s)
        return torch.addmm(x, s, r).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        h, a, r, s = ctx.saved_tensors
        x, g = h.float(), grads[0].float()
        ds = g @ r.T
        dw = ds.T @ x
        return torch.addmm(g, ds, a).to(h.dtype), dw, ds.sum(0), s.T @ g - dw


def folded(h: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    x = h if h.dtype == torch.float64 else h.float()
    return (x + (x @ (w - r).T + b) @ r).to(h.dtype)


def derived(h: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return Derived.apply(h, w, b, r)  # type: ignore[no-any-return]


def ours(h: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return low_rank(h.view(BATCH, -1, h.shape[-1]), w - r, b, r).view_as(h)


def thin_qr(x: Tensor) -> Tensor:
    """Orthonormal rows of the span of the rows, the sign such that the triangle is positive."""
    q, triangle = torch.linalg.qr(x.T)
    return (q * triangle.diagonal().sign()).T


Edit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "dreamreader": (ours, orthonormal),
    "autograd": (folded, thin_qr),
    "derived": (derived, thin_qr),
}


@dataclass
class Case:
    """pyreft's module, and leaves for the other ways, with the same W, b and R."""

    width: int
    rank: int
    dtype: torch.dtype
    tokens: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.module = LoreftIntervention(
            embed_dim=self.width, low_rank_dimension=self.rank, dtype=self.dtype
        )
        shape = (self.tokens, self.width)
        self.h = torch.randn(shape).to(self.dtype).requires_grad_()
        self.grad = torch.randn(shape).to(self.dtype)
        source = self.module.learned_source
        self.w, self.b = (p.detach().float().requires_grad_() for p in (source.weight, source.bias))
        self.r = self.module.rotate_layer.weight.detach().T.contiguous().requires_grad_()
        self.x = torch.randn(self.rank, self.width).requires_grad_()

    @property
    def label(self) -> str:
        return f"{self.tokens}x{self.width} rank {self.rank} {self.dtype}".replace("torch.", "")

    def forwards(self) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
        """How each way computes the result, orthonormality included, and what it trains."""
        module, (h, w, b, x) = self.module, (self.h, self.w, self.b, self.x)
        found: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
            "pyreft": (lambda: module(h), [h, *module.parameters()])
        }
        for name, (edit, rows_of) in WAYS.items():
            found[name] = (lambda e=edit, o=rows_of: e(h, w, b, o(x)), [h, w, b, x])
        return found

    def calls(self) -> dict[str, Callable[[], Any]]:
        """What is timed: forward in training mode, and forward with backward."""
        made: dict[str, Callable[[], Any]] = {}
        for name, (forward, leaves) in self.forwards().items():
            made[f"{name} forward"] = forward
            made[name] = lambda f=forward, p=leaves: torch.autograd.grad(f(), p, self.grad)
        return made

    def problems(self) -> list[str]:
        """In words, where a way's result or gradient is not that of the formula in float64."""
        leaves = [self.h, self.w, self.b, self.r]
        expected = self.derivatives(folded, [wide(each) for each in leaves])
        got = {name: self.derivatives(edit, leaves) for name, (edit, _) in WAYS.items()}
        got["pyreft"] = self.derivatives_of_pyreft()
        errors = {
            f"{way}: {what}": relative(a, b)
            for way, values in got.items()
            for what, a, b in zip(NAMES, values, expected, strict=True)
        }
        grad = torch.randn(self.x.shape)
        x = wide(self.x)
        (want,) = torch.autograd.grad(thin_qr(x), x, grad.double())
        for way, (_, rows_of) in WAYS.items():
            (dx,) = torch.autograd.grad(rows_of(self.x), self.x, grad)
            errors[f"{way}: dX"] = relative(dx, want)
        limit = LIMITS[self.dtype]
        return [
            f"{self.label}, {name}: off by {error:.1e}, at most {limit:.0e}"
            for name, error in errors.items()
            if not error <= limit
        ]

    def derivatives(self, edit: Edit, leaves: list[Tensor]) -> list[Tensor]:
        """What is added, and the gradients of h (less what passes through), W, b and R."""
        out, grad = edit(*leaves), self.grad.to(leaves[0].dtype)
        dh, dw, db, dr = torch.autograd.grad(out, leaves, grad)
        return [out.double() - leaves[0].double(), dh.double() - grad.double(), dw, db, dr]

    def derivatives_of_pyreft(self) -> list[Tensor]:
        module, h, source = self.module, self.h, self.module.learned_source
        with torch.nn.utils.parametrize.cached():  # one tensor for R, to have its gradient
            out, rotation = module(h), module.rotate_layer.weight
            leaves = [h, source.weight, source.bias, rotation]
            dh, dw, db, dr = torch.autograd.grad(out, leaves, self.grad)
        return [out.double() - h.double(), dh.double() - self.grad.double(), dw, db, dr.T]


def wide(leaf: Tensor) -> Tensor:
    return leaf.detach().double().requires_grad_()


def relative(got: Tensor, want: Tensor) -> float:
    want = want.detach()
    return float((got.detach().double() - want).norm() / want.norm())
