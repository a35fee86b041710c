"""Tiny autoencoders for the scripts sae_*.py, which run in the environments of other libraries."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D_IN, D_SAE, ROWS, K = 8, 24, 12, 3
EPS = 1e-3  # of Adam, whose usual one makes steps of the rounding of gradients near 0


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows() -> Tensor:
    """Inputs with another mean and scale in each place."""
    return seeded(ROWS, D_IN, seed=99) * torch.linspace(0.5, 2, D_IN) + torch.linspace(-1, 1, D_IN)


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Moves parameters from where they begin, so that nothing is zero, tied or of length 1."""
    for number, each in enumerate(module.parameters()):
        each.add_(0.3 * seeded(*each.shape, seed=number).to(each.dtype))


def keep_training(
    file: Path, batches: Tensor, start: dict, end: dict, losses: list[float], threshold: float
) -> None:
    """Writes a training: its batches [steps, rows, d_in], weights before and after, losses."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"batches": batches, "losses": torch.tensor(losses)}
    tensors |= {"threshold": torch.tensor(threshold)}
    for when, weights in (("start", start), ("end", end)):
        tensors |= {f"{when}.{name}": each for name, each in weights.items()}
    save_file({name: each.contiguous().clone() for name, each in tensors.items()}, file)
    print(f"{file}: loss {losses[0]:.3f} to {losses[-1]:.3f}")


def keep(folder: Path, x: Tensor, codes: Tensor, output: Tensor) -> None:
    """Writes what the library makes of x beside its files."""
    tensors = {"x": x, "codes": codes, "output": output}
    plain = {name: each.detach().contiguous().clone() for name, each in tensors.items()}
    save_file(plain, folder / "expected.safetensors")
    print(f"{folder}: {(codes != 0).float().sum(-1).mean().item():.2f} active")


def main(write: Callable[[Path], None], read: Callable | None = None) -> None:
    """`write FOLDER`; or `check FOLDER`, which compares with what is expected in its folders."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(folder)
        return
    assert what == "check" and read is not None
    for each in sorted(folder.iterdir()):
        expected = load_file(each / "expected.safetensors")
        codes, output = read(each, expected["x"])
        torch.testing.assert_close(codes, expected["codes"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output, expected["output"], rtol=1e-4, atol=1e-4)
        print(f"{each}: equal")
