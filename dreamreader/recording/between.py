"""Activations of the same prompts in two models: unequal widths, tokens and noise schedules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine import Reader, Record, tokenize
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.recording.alignment import (
    ALIGNMENTS,
    SPANS,
    Pieces,
    align_index,
    align_spans,
    check_same_tokenizers,
    token_spans,
)
from dreamreader.recording.buffer import MEMORY, ActivationBuffer
from dreamreader.recording.calls import row_seeds
from dreamreader.recording.labelled import mean_over_tokens
from dreamreader.recording.pairs import (
    Pairs,
    both_in_denoiser,
    check_pairs,
    check_prompts,
    number_prompts,
    outside,
    replay_calls,
)
from dreamreader.recording.schedules import LEADS, SCHEDULES
from dreamreader.recording.trajectories import TRAJECTORIES, DenoiserRuns, pair_calls


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two models: what is run, and where it is read."""

    reader: Reader
    prompts: list[str]
    sites: list[str]
    arguments: dict[str, Any]

    @property
    def is_language(self) -> bool:
        return self.reader.kind == "language"

    def records(self, align: str, branch: str | None = None) -> list[Record]:
        reduce = mean_over_tokens if align == "mean" else None
        return [Record(site, branch=branch, reduce=reduce) for site in self.sites]


def record_between(
    source: Reader,
    target: Reader,
    prompts: Sequence[str],
    sites: str | Sequence[str],
    target_sites: str | Sequence[str],
    *,
    target_prompts: Sequence[str] | None = None,
    align: str = "index",
    span: str = "last",
    skip: int = 0,
    schedule: str = "equal",
    trajectory: str = "own",
    seeds: int | Sequence[int] = 0,
    branch: str = "cond",
    batch_size: int = 16,
    memory: int = MEMORY,
    source_arguments: Mapping[str, Any] | None = None,
    target_arguments: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Pairs:
    """Runs prompts through two models and records what belongs together.

    Args:
        source, target: readers of two language models or two pipelines; their widths may differ.
        prompts: of both. target_prompts: of the target instead, row by row.
        sites, target_sites: site strings of each model, all in its denoiser or all outside of it;
            patterns stand for all that they match.
        align: which tokens belong together. `index`: those of one number among the row's own, where
            both models cut the text alike; places of the picture and text tokens where there are as
            many. `place`: those of one place of the picture, on grids of any size, which
            `Pairs.values_at` brings together. `spans`: the shortest pieces of the text that both
            tokenizers cut at their ends. `mean`: the means over each row's own tokens.
        span: what stands for a piece of several tokens: the `last`, which has read the others, or
            their `mean`.
        skip: by `index` and `spans` of two language models, the first so many pairs of tokens of
            each text that are left out. The first token of a model that has none for the beginning
            has norms far above all others, which a map would be fitted to.
        schedule: which calls of two denoisers belong together: `equal`, `noise` or `fraction` of
            two runs; see `match_calls`. `source` or `target`: those of one of them, at whose noise
            levels the other is called as well, between its timesteps where need be; calls at
            levels that the other's schedule does not have are left out. `Pairs.times` says which
            they were, `Pairs.unpaired` how many have no partner.
        trajectory: of the latents that the denoisers see: `own`, each its own from the same seeds;
            `source` or `target`: those of one of them for both, converted where they are mixed of
            signal and noise in another way (`convert_latents`); of one shape and autoencoder.
        seeds: of the rows. branch: guidance branch. batch_size: rows computed together.
        memory: bytes of activations of a side above which they go to a file, in bfloat16.
        arguments: of both runs, their `progress` too. source_arguments, target_arguments: of one.

    Returns:
        Pairs with the source as the base and the target as the teacher.

    Raises:
        InvalidInput: rows, tokens or calls have no partner, or it is not known which they have.
        UnknownName: there is no such site, branch, alignment, schedule or trajectory.

    Example:
        >>> pairs = record_between(                                     # doctest: +SKIP
        ...     small, large, texts, "model.layers.3", "model.layers.*", align="spans"
        ... )
        >>> x, y = pairs.source["model.layers.3"], pairs.target["model.layers.7"]  # doctest: +SKIP
    """
    for name, value, known in (
        ("alignment of tokens", align, ALIGNMENTS),
        ("span", span, SPANS),
        ("schedule of pairs", schedule, (*SCHEDULES, *LEADS)),
        ("trajectory", trajectory, TRAJECTORIES),
    ):
        if value not in known:
            raise UnknownName(name, value, known)
    if not isinstance(skip, int) or skip < 0:
        raise InvalidInput(f"skip is a number of tokens from 0, got {skip!r}")
    other = prompts if target_prompts is None else target_prompts
    check_prompts(prompts, other, batch_size=batch_size)
    check_pairs(prompts, other)
    one = _side(source, prompts, sites, {**arguments, **(source_arguments or {})})
    two = _side(target, other, target_sites, {**arguments, **(target_arguments or {})})
    if skip and (align == "mean" or not (one.is_language and two.is_language)):
        raise InvalidInput(
            f"skip={skip} leaves out pairs of tokens of two language models, and there are none"
        )
    numbers = row_seeds(seeds, len(one.prompts))
    inside = both_in_denoiser((one.reader, one.sites), (two.reader, two.sites))
    groups = number_prompts(prompts, other)
    if inside:
        _check_places(align, one, two)
        runs = DenoiserRuns(
            (source, target), (one.prompts, two.prompts), (one.arguments, two.arguments), numbers,
            branch, batch_size,
        )  # fmt: skip
        found = _of_calls(one, two, runs, align, schedule, trajectory, memory)
        return replace(found, groups=groups)
    if (schedule, trajectory) != ("equal", "own"):
        raise InvalidInput(
            f"schedule={schedule!r} and trajectory={trajectory!r} are for sites in denoisers; "
            f"{one.sites[0]} and {two.sites[0]} have no steps"
        )
    if not (one.is_language and two.is_language) or align == "place":
        _check_places(align, one, two)
    pieces = _pieces(one, two, align, skip)
    found = [_outside(each, align, numbers, batch_size, memory) for each in (one, two)]
    if pieces is None:
        _check_tokens((one, two), found, align)
        grids = None if align == "mean" else (found[0].grids, found[1].grids)
        return Pairs(found[0].values, found[1].values, None, groups=groups, grids=grids)
    counts = torch.tensor([len(each) for each in pieces])
    values = [
        _gather(side, buffer, [[each[number] for each in row] for row in pieces], span, memory)
        for number, (side, buffer) in enumerate(zip((one, two), found, strict=True))
    ]
    named = {site: counts for each in values for site in each}
    positions = _positions(pieces)
    left = _count_unpaired(one, two, pieces)
    return Pairs(values[0], values[1], None, named, positions, groups=groups, unpaired=left)


def _side(
    reader: Reader, prompts: Sequence[str], sites: str | Sequence[str], arguments: dict[str, Any]
) -> _Side:
    listed = [sites] if isinstance(sites, str) else list(sites)
    names = dict.fromkeys(name for each in listed for name in reader.sites(each).names)
    return _Side(reader, list(prompts), list(names), arguments)


def _of_calls(
    one: _Side,
    two: _Side,
    runs: DenoiserRuns,
    align: str,
    schedule: str,
    trajectory: str,
    memory: int,
) -> Pairs:
    """Both denoisers' activations at the calls that belong together."""
    paired = pair_calls(runs, schedule, trajectory)
    found = [
        replay_calls(
            side.reader, calls, calls.latents, side.records(align), runs.batch_size, memory
        )
        for side, calls in zip((one, two), paired.calls, strict=True)
    ]
    _check_tokens((one, two), found, align)
    times = paired.calls[0].moments, paired.calls[1].moments
    return Pairs(
        found[0].values,
        found[1].values,
        tuple(each.step for each in times[0]),
        times=times,
        levels=paired.levels,
        grids=None if align == "mean" else (found[0].grids, found[1].grids),
        unpaired=dict(zip(("source calls", "target calls"), paired.unpaired, strict=True)),
    )


def _outside(
    side: _Side, align: str, seeds: Sequence[int], batch_size: int, memory: int
) -> ActivationBuffer:
    width = None
    if side.is_language and align != "mean":
        width = max(map(len, tokenize(side.reader, side.prompts)[0]))
    branch = None if side.is_language else "cond"
    records = side.records(align, branch)
    return outside(
        side.reader, side.prompts, records, seeds, batch_size, memory, width, side.arguments
    )


def _pieces(one: _Side, two: _Side, align: str, skip: int) -> list[Pieces] | None:
    """Of each row the tokens that belong together; None where they are not told by the texts."""
    if align == "mean" or not (one.is_language and two.is_language):
        return None
    found = []
    for row, (text, other) in enumerate(zip(one.prompts, two.prompts, strict=True)):
        if not (isinstance(text, str) and isinstance(other, str)):
            raise InvalidInput(
                f"row {row}: tokens of two models are aligned in texts, got {type(text).__name__}; "
                "give the text of the chat, or choose align='mean'"
            )
        try:
            found.append(_pieces_of(one, two, text, other, align))
        except InvalidInput as error:
            raise InvalidInput(f"row {row}: {error}") from None
        if len(found[-1]) <= skip:
            raise InvalidInput(
                f"row {row}: {text!r} has {len(found[-1])} pairs of tokens, of which skip={skip} "
                "leaves none"
            )
    return [each[skip:] for each in found]


def _pieces_of(one: _Side, two: _Side, text: str, other: str, align: str) -> Pieces:
    """The tokens of one row that belong together."""
    if align == "index":
        return align_index(one.reader, two.reader, text, other)
    if text != other:
        raise InvalidInput(
            f"{text!r} and {other!r} are different texts, whose characters do not belong "
            "together; choose align='index' or 'mean'"
        )
    spans = [token_spans(each.reader, text) for each in (one, two)]
    return align_spans(text, spans[0], spans[1])


def _gather(
    side: _Side,
    buffer: ActivationBuffer,
    rows: Sequence[Sequence[list[int]]],
    span: str,
    memory: int,
) -> dict[str, Tensor]:
    """Values of pieces of each row, [rows, 1, pieces, features], zero behind a row's last."""
    wanted = [len(each) for each in tokenize(side.reader, side.prompts)[0]]
    for site, counts in buffer.counts.items():
        if counts.tolist() != wanted:
            raise InvalidInput(
                f"{site}: its tokens are not those of the prompts; choose align='mean'"
            )
    width = max(map(len, rows))
    made = ActivationBuffer(len(rows), memory)
    for number, pieces in enumerate(rows):
        found = {}
        for site, values in buffer.values.items():
            own = values[number, 0]  # [tokens, features]
            out = own.new_zeros(1, width, own.shape[1])
            if span == "last":
                out[0, : len(pieces)] = own[[piece[-1] for piece in pieces]]
            else:
                means = [own[piece].float().mean(0) for piece in pieces]
                out[0, : len(pieces)] = torch.stack(means).to(out.dtype)
            found[site] = out
        made.store(torch.tensor([number]), found)
    return {site: value.unsqueeze(1) for site, value in made.values.items()}


def _count_unpaired(one: _Side, two: _Side, pieces: Sequence[Pieces]) -> dict[str, int]:
    """How many tokens of each side are in no piece."""
    found = {}
    for number, (name, side) in enumerate((("source tokens", one), ("target tokens", two))):
        own = sum(map(len, tokenize(side.reader, side.prompts)[0]))
        found[name] = own - sum(len(piece[number]) for row in pieces for piece in row)
    return found


def _positions(pieces: Sequence[Pieces]) -> tuple[Tensor, Tensor]:
    """Of both sides, [rows, pieces]: the last token of each piece, -1 behind them."""
    width = max(map(len, pieces))
    sides = torch.full((2, len(pieces), width), -1)
    for row, each in enumerate(pieces):
        for place, piece in enumerate(each):
            for side in (0, 1):
                sides[side, row, place] = piece[side][-1]
    return sides[0], sides[1]


def _check_places(align: str, one: _Side, two: _Side) -> None:
    """Refuse alignments that pipelines do not have."""
    if align == "spans":
        raise InvalidInput(
            "align='spans' is for two language models: what a pipeline's tokens say is not all "
            "text; choose 'index' or 'mean'"
        )
    if align == "place" and (one.is_language or two.is_language):
        raise InvalidInput(
            "align='place' is for places of a picture, which a language model's tokens are not; "
            "choose 'spans', 'index' or 'mean'"
        )
    if align == "index" and one.is_language != two.is_language:
        raise InvalidInput(
            "tokens of a language model and of a pipeline's text encoder have no common number; "
            "choose align='mean'"
        )


def _check_tokens(
    sides: tuple[_Side, _Side], found: Sequence[ActivationBuffer], align: str
) -> None:
    """Refuse sites of pipelines whose tokens of one number are not at one place."""
    if align == "mean":
        return
    if align == "place":
        for each in found:
            for site, grid in each.grids.items():
                if grid is None:
                    raise InvalidInput(
                        f"{site}: the places of its {each.values[site].shape[2]} tokens in the "
                        "picture are not known; choose align='index' or 'mean'"
                    )
        return
    (first, grid, count), *others = [
        (site, each.grids[site], value.shape[2])
        for each in found
        for site, value in each.values.items()
    ]
    for site, hw, tokens in others:
        if (hw, tokens) != (grid, count):
            raise InvalidInput(
                f"{first} has {_size(grid, count)} and {site} {_size(hw, tokens)}, so tokens of "
                "one number do not belong together; choose sites of one size, align='place' for "
                "places of the picture, or 'mean'"
            )
    if grid is None:
        one, two = sides
        check_same_tokenizers(one.reader.subject, two.reader.subject, one.prompts + two.prompts)


def _size(grid: tuple[int, int] | None, tokens: int) -> str:
    return f"{tokens} tokens" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
