"""Activations of labelled prompts, and their mean over tokens while they are recorded."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dreamreader.engine import Cache, Reader, Record, merged, token_means
from dreamreader.errors import InvalidInput

Draw = Callable[[list[str], list[int], Sequence[Any]], Cache]
"""Runs prompts with their seeds and gives what the recordings kept."""

POOLS = ("mean", None)


def mean_over_tokens(x: Tensor) -> Tensor:
    """Gives the mean over tokens as one token: what `Record(reduce=)` takes.

    Padding of a language model never comes here, so the mean is over a row's own tokens, as that of
    `token_means` from recordings that hold all of them.

    Args:
        x: [rows, tokens, features], or with heads apart.

    Returns:
        [rows, 1, features], float32.
    """
    return x.float().mean(1, keepdim=True)


@dataclass(eq=False)
class Labelled:
    """Recordings of labelled rows.

    Attributes:
        cache: activations, [rows, steps, tokens, features]. labels: one for each row.
    """

    cache: Cache
    labels: tuple[Hashable, ...]

    def of(self, label: Hashable) -> Cache:
        """The rows of one label.

        Raises:
            InvalidInput: no row has it.
        """
        rows = [row for row, each in enumerate(self.labels) if each == label]
        if not rows:
            known = ", ".join(map(repr, dict.fromkeys(self.labels)))
            raise InvalidInput(f"no row has the label {label!r}; the labels are {known}")
        return self.cache.select(rows=rows)

    def means(self, site: str) -> Float[Tensor, "rows steps features"]:
        """Mean over each row's own tokens, float64; see `token_means`."""
        return token_means(site, self.cache[site])


def record_labelled(
    reader: Reader,
    prompts: Sequence[str],
    labels: Sequence[Hashable],
    sites: str | Sequence[str],
    *,
    seeds: int | Sequence[int] | None = None,
    branch: str | None = None,
    steps: Any = None,
    tokens: Any = None,
    pool: str | None = "mean",
    batch_size: int | None = 16,
    **arguments: Any,
) -> Labelled:
    """Runs labelled prompts once and records the sites.

    Args:
        reader: of a pipeline or language model.
        prompts, seeds: rows, as in `Reader.run`. labels: one for each row.
        sites: site strings; patterns stand for all that they match.
        branch: guidance branch; `cond` in a pipeline by default.
        steps, tokens: which are recorded, as in `Record`.
        pool: `mean` keeps one mean over tokens, None every token with its index in the row.
        batch_size: rows computed together; all if None.
        arguments: of the run, its `progress` too.

    Raises:
        InvalidInput: labels and rows are not as many, or there is no such pooling.
        UnknownName, NeverFired: as `Reader.run`.

    Example:
        >>> found = record_labelled(                    # doctest: +SKIP
        ...     reader, ["a red cat", "a blue cat"], ["red", "blue"], "unet.**.attn2"
        ... )
        >>> found.of("red")                             # doctest: +SKIP
    """
    if pool not in POOLS:
        raise InvalidInput(f"pool is 'mean' or None, got {pool!r}")
    listed = [sites] if isinstance(sites, str) else list(sites)
    if branch is None and reader.kind == "pipeline":
        branch = "cond"
    reduce = mean_over_tokens if pool == "mean" else None
    records = [
        Record(site, branch=branch, steps=steps, tokens=tokens, reduce=reduce) for site in listed
    ]
    found = reader.run(prompts, record=records, seeds=seeds, batch_size=batch_size, **arguments)
    if len(labels) != len(found.rows):
        raise InvalidInput(f"{len(labels)} labels for {len(found.rows)} rows")
    return Labelled(found.cache, tuple(labels))


def record_batches(
    draw: Draw, rows: Sequence[tuple[str, int]], records: Sequence[Any], batch: int
) -> Iterator[Cache]:
    """Recordings of prompts with their seeds, batch by batch, as evenly as it goes."""
    for start, stop in evenly(len(rows), batch):
        prompts, seeds = zip(*rows[start:stop], strict=True)
        yield draw(list(prompts), list(seeds), records)


def joined_rows(caches: Iterable[Cache]) -> Cache:
    """One cache of several batches, joined along the rows.

    Raises:
        InvalidInput: they have different shapes, grids, timesteps or noise levels.
    """
    return Cache(merged([list(each.values()) for each in caches]))


def evenly(count: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of the fewest pieces of at most `most`, as evenly as it goes.

    Example:
        >>> evenly(9, 4)
        [(0, 3), (3, 6), (6, 9)]
    """
    pieces = -(-count // most)
    edges = [round(n * count / pieces) for n in range(pieces + 1)]
    return list(zip(edges, edges[1:], strict=False))
