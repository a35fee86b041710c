"""Runs a subject and collects what latents respond to in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dreamreader._progress import Progress, part_of, show_progress
from dreamreader.engine import Reader, Record, plan_rows
from dreamreader.errors import InvalidInput
from dreamreader.sae.codec import SparseCodec
from dreamreader.sae.examples import FeatureExamples


@dataclass(eq=False)
class Collected:
    """What latents respond to, and the rows that it is about.

    Attributes:
        examples: of all rows. images: a picture for each row of a pipeline, else None.
        texts: pieces of text for each row of a language model, one for each token, else None.
    """

    examples: FeatureExamples
    images: list[Any] | None
    texts: list[list[str]] | None


def collect_examples(
    reader: Reader,
    sae: SparseCodec | Float[Tensor, "features d_in"],
    site: str,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] | None = 0,
    labels: Mapping[str, Sequence[Any]] | None = None,
    branch: str | None = None,
    steps: Any = None,
    top: int = 12,
    batch_size: int = 16,
    progress: Progress = True,
    **arguments: Any,
) -> Collected:
    """Runs prompts batch by batch and collects what latents respond to at a site.

    Args:
        reader: of a pipeline or language model.
        sae: in `eval()` mode, or directions [features, d_in].
        site: one site. prompts, seeds: rows, as in `Reader.run`.
        labels: attributes of each row by name, for correlations.
        branch: of guidance; needed where there are several. steps: as `Record` takes them.
        top: strongest rows that are kept of each latent.
        batch_size: rows run together; memory holds one batch of activations.
        progress: as in `Reader.run`.
        arguments: of the pipeline.

    Raises:
        InvalidInput: there are no rows, labels are not one for each, or several branches.

    Example:
        >>> found = collect_examples(
        ...     reader, sae, "unet.mid_block.attentions.0", prompts, branch="cond"
        ... )  # doctest: +SKIP
        >>> write_dashboard(found.examples, "latents.html", images=found.images)  # doctest: +SKIP
    """
    rows = plan_rows(prompts, seeds, [])
    examples, images, texts = FeatureExamples(sae, top), [], []
    of_text = reader.kind == "language"
    for name, values in (labels or {}).items():
        if len(values) != len(rows):
            raise InvalidInput(f"collect_examples: {name} has {len(values)} labels for {len(rows)}")
    with show_progress(progress) as report:
        for start in range(0, len(rows), batch_size):
            at = slice(start, start + batch_size)
            given = list(rows.prompts[at])
            result = reader.run(
                given,
                record=Record(site, branch=branch, steps=steps),
                seeds=None if of_text else list(rows.seeds[at]),
                progress=part_of(report, start, len(rows)),
                **arguments,
            )
            (activation,) = result.cache.values()
            own = {name: list(values)[at] for name, values in (labels or {}).items()}
            examples.add(activation, own)
            if of_text:
                texts += [_pieces(reader, prompt) for prompt in given]
            else:
                images += list(result.images)
    return Collected(examples, None if of_text else images, texts if of_text else None)


def _pieces(reader: Reader, prompt: str) -> list[str]:
    """The text of each token of a prompt."""
    tokens = reader.tokenizer(prompt)["input_ids"]
    return [reader.tokenizer.decode([each]) for each in tokens]
