"""Widths of sites, from a run that is as short as possible."""

from collections.abc import Sequence
from typing import Any

import torch

from dreamreader.engine import Reader, Stream
from dreamreader.errors import InvalidInput


def widths_of(
    reader: Reader, sites: str | Sequence[str], arguments: dict[str, Any]
) -> tuple[dict[str, int], torch.device]:
    """Features at sites in the order of the model, and the device of the first.

    Args:
        reader: of a pipeline or language model. sites: site strings or patterns.
        arguments: of the run.

    Raises:
        UnknownName, NeverFired: a site is not there, or does not run.
        InvalidInput: the reader is of a plain module, which it cannot run.
    """
    listed = [sites] if isinstance(sites, str) else list(sites)
    names = list(dict.fromkeys(name for each in listed for name in reader.sites(each).names))
    kind = reader.kind
    if kind == "module":
        raise InvalidInput(
            "Reft.for_sites runs the model to see the widths, and a plain module has no prompts: "
            "give the widths, Reft({site: width})"
        )
    widths: dict[str, int] = {}
    devices: dict[str, torch.device] = {}

    def see(flowing: Any) -> None:
        widths[flowing.site.name] = flowing.x.shape[-1]
        devices[flowing.site.name] = flowing.x.device

    asked = dict(arguments)
    if kind == "pipeline":
        asked = {"num_inference_steps": 1, "output_type": "latent"} | asked
        asked["num_inference_steps"] = min(2, asked["num_inference_steps"])
    records = [Stream(name, see) for name in names]
    reader.run("a", record=records, seeds=0, progress=False, **asked)
    return {name: widths[name] for name in names}, devices[names[0]]
