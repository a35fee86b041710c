"""Recording paired prompts and fitting one direction per site and step."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dreamreader.demo.bench import Bench
from dreamreader.demo.data import SceneRow
from dreamreader.engine import Record
from dreamreader.errors import InvalidInput
from dreamreader.recording.labelled import mean_over_tokens
from dreamreader.steering import LabelMeans, random_like
from dreamreader.zoo import scenes


@dataclass(frozen=True)
class SiteGroup:
    """Sites that are steered together, each with its own direction."""

    name: str
    sites: Sequence[str]


def find_places(bench: Bench) -> list[SiteGroup]:
    """The cross-attention outputs of the denoiser, block by block, and all of them together.

    Raises:
        InvalidInput: the subject has no UNet with cross-attention.
    """
    if not hasattr(bench.reader.subject, "unet"):
        kind = type(bench.reader.subject).__name__
        raise InvalidInput(
            f"the demo needs a pipeline with a UNet of the embedded world, got {kind}"
        )
    sites = [site.name for site in bench.reader.sites("unet.**.attn2")]
    blocks: dict[str, list[str]] = {}
    for site in sites:
        blocks.setdefault(site.removeprefix("unet.").partition(".attentions")[0], []).append(site)
    return [
        *(SiteGroup(name, found) for name, found in blocks.items()),
        SiteGroup("all blocks", sites),
    ]


def find_readings(bench: Bench) -> list[str]:
    """Sites that are only read: both attentions and the output of every attention block."""
    patterns = ("unet.**.attentions.*", "unet.**.attn1", "unet.**.attn2")
    return [site.name for pattern in patterns for site in bench.reader.sites(pattern)]


def record(bench: Bench, rows: Sequence[SceneRow], sites: Sequence[str]) -> LabelMeans:
    """Draws every scene in every colour and sums what the sites give for the text branch.

    Only the mean over tokens is kept of each call, so memory does not grow with the resolution.

    Args:
        bench: the subject and its settings.
        rows: scenes; the same noise serves all colours of a scene.
        sites: where to record.
    """
    wanted = [Record(site, branch="cond", reduce=mean_over_tokens) for site in sites]
    means = LabelMeans()
    for color in scenes.COLORS:
        prompts = [row.prompt(color) for row in rows]
        result = bench.run(prompts, [row.seed for row in rows], record=wanted)
        means.add(result.cache, [color] * len(rows))
    return means


def difference(means: LabelMeans, place: SiteGroup, source: str, target: str) -> dict[str, Tensor]:
    """The direction of every site of a place, [steps, features]."""
    return {site: means.difference(site, source, target) for site in place.sites}


def controls(directions: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random directions of the same norms at the same sites."""
    return {site: random_like(v, seed + i) for i, (site, v) in enumerate(directions.items())}
