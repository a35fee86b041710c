"""The options that say which model is opened, where and in which dtype."""

from typing import Annotated

import typer

MODEL_HELP = "Embedded or fetched model, folder of diffusers or transformers, or hub id."

Device = Annotated[str, typer.Option(help="Where it computes: cpu, cuda, cuda:1, mps and so on.")]
Dtype = Annotated[
    str,
    typer.Option(help="Of the weights: float32, bfloat16, float16, float64, or auto as stored."),
]
SpecDevice = Annotated[
    str | None, typer.Option("--device", help="As subject.device=...: cpu, cuda, cuda:1, mps.")
]
SpecDtype = Annotated[
    str | None, typer.Option("--dtype", help="As subject.dtype=...: float32, bfloat16, auto.")
]


def with_subject(
    overrides: list[str] | None, device: str | None, dtype: str | None
) -> tuple[str, ...]:
    """Overrides of a spec, with device and dtype of its subject among them."""
    given = {"subject.device": device, "subject.dtype": dtype}
    own = [f"{key}={value}" for key, value in given.items() if value is not None]
    return (*(overrides or ()), *own)
