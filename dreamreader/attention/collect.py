"""Collecting word heat maps while a pipeline runs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dreamreader._progress import Progress
from dreamreader.attention.asked import (
    Asked,
    factor,
    list_asked,
    missing,
    positions,
    text_sites,
    words_of,
)
from dreamreader.attention.batch import AttentionBatch, WordTokens
from dreamreader.attention.maps import WordMaps
from dreamreader.engine import Attention, Call, EditRequest, Row, Watch
from dreamreader.errors import InvalidInput, NeverFired

if TYPE_CHECKING:
    from dreamreader.engine import Reader


class WordMap:
    """Collects word heat maps from a run: give it `requests()`, then ask for `result()`.

    For every attention, head and token t of the prompt, with p its probabilities,

        sum_t = sum over steps of p[query, t];  map = mean over heads of max(0, bicubic(sum_t))

    at the size of the latents, and the map of a word is the mean over its tokens. The sums are
    formed from queries and keys while the attention runs; memory does not grow with the steps.

    Args:
        reader: of a text-to-image pipeline.
        words: a word, several for every row, or a list of them for each row; None: every word.
            A word that comes several times is the mean over all its tokens.
        sites: with the port `probs`; by default every attention from picture to text: the
            cross-attentions of a UNet, the joint attentions of a transformer.
        steps, timesteps, sigmas, fraction: when to look, as in every request.
        branch: of the guidance.
        per_step, per_layer, per_head: keep these apart, as axes of the maps.
        size: (height, width) of the maps; the latents' by default (a transformer: its tokens').
        normalise: divide by the sum over the prompt's tokens in each pixel, + 1e-6.
        skip_factor: leaves out attentions whose grid is this many times coarser than the latents;
            None takes all.

    Raises:
        InvalidInput, UnknownName: arguments that cannot be right.

    Example:
        >>> maps = WordMap(reader, "circle")
        >>> result = reader.run("a red circle", record=maps.requests(), seeds=0)
        >>> circle = maps.result().of("circle")

    Reference:
        What the DAAM: Interpreting Stable Diffusion Using Cross Attention, arXiv 2210.04885.
    """

    def __init__(
        self,
        reader: "Reader",
        words: Asked = None,
        *,
        sites: str | Sequence[str] | None = None,
        steps: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        fraction: Any = None,
        branch: str = "cond",
        per_step: bool = False,
        per_layer: bool = False,
        per_head: bool = False,
        size: tuple[int, int] | int | None = None,
        normalise: bool = False,
        skip_factor: int | None = 8,
    ):
        if not isinstance(branch, str):
            raise InvalidInput(f"word maps are of one branch, got {branch!r}")
        if per_layer and per_head:
            raise InvalidInput("per_layer and per_head: give one, heads name their layer too")
        self._asked = list_asked(words)
        self._chosen = sites is not None
        self._sites = text_sites(reader) if sites is None else sites
        self._when = {
            "steps": steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "fraction": fraction,
            "branch": branch,
        }
        self._apart = "heads" if per_head else "layers" if per_layer else None
        self._per_step = per_step
        self._size = (size, size) if isinstance(size, int) else size
        if self._size is not None and (len(self._size) != 2 or min(self._size) < 1):
            raise InvalidInput(f"size is (height, width) in pixels, got {size!r}")
        self._normalise = normalise
        self._skip = skip_factor
        self._run: object = None
        self._open: AttentionBatch | None = None
        self._tokens: dict[tuple, WordTokens] = {}
        self._done: list[WordMaps] = []
        self._skipped: dict[str, None] = {}

    def requests(self) -> list[Watch]:
        """What to hand to `reader.run(record=...)` or `reader.recording(...)`."""
        return [Watch(self._sites, self._collect, **self._when)]

    def result(self) -> WordMaps:
        """The maps of all rows that ran since this object was made.

        Raises:
            NeverFired: nothing ran, or every site was left out by `skip_factor`.
        """
        self._close()
        if not self._done:
            left = ", ".join(self._skipped)
            why = f"skip_factor={self._skip} leaves out {left}" if left else "nothing ran"
            raise NeverFired(f"word maps: {why}")
        return _join_rows(self._done)

    def _collect(self, attention: Attention, call: Call) -> None:
        if not call.has_words and not self._chosen:
            return  # such as the refiners of Lumina2, which see one stream
        if factor(call) == self._skip:
            self._skipped[call.site] = None
            return
        if call.run != self._run or self._open is None:
            self._close()
            self._run = call.run
            words = self._words(call)
            tokens = self._locate_words(call, words)
            self._open = AttentionBatch(call, words, tokens, self._per_step)
        key = (call.text, attention.shape[3])
        if key not in self._tokens:
            self._tokens[key] = self._locate_words(call, self._open.words)
        self._open.add(attention, call, self._tokens[key])

    def _close(self) -> None:
        """Turn the sums of the latest run into maps."""
        batch, self._open, self._run = self._open, None, None
        self._tokens = {}
        if batch is None:
            return
        maps = batch.maps(self._apart, self._size, self._normalise)
        axes = ["rows", "words", "steps", self._apart or "layers", "height", "width"]
        for axis, wanted in ((3, self._apart is not None), (2, self._per_step)):
            if not wanted:
                maps = maps.squeeze(axis)
                del axes[axis]
        heads = batch.heads() if self._apart == "heads" else ()
        self._done.append(
            WordMaps(
                maps,
                tuple(axes),
                batch.rows,
                tuple(batch.words),
                tuple(batch.layers),
                tuple(heads),
                tuple(batch.steps),
            )
        )

    def _words(self, call: Call) -> list[tuple[str, ...]]:
        """The words of each row of the call."""
        found: list[tuple[str, ...]] = []
        for row in call.rows:
            if self._asked is None:
                found.append(words_of(row))
            elif len(self._asked) == 1:
                found.append(self._asked[0])
            elif row.index < len(self._asked):
                found.append(self._asked[row.index])
            else:
                raise InvalidInput(
                    f"words has lists for {len(self._asked)} rows, there is a row {row.index}"
                )
        if self._asked is None:  # what the text encoder cut off has no map
            found = [
                tuple(word for word, keys in zip(own, places, strict=True) if keys)
                for own, places in zip(found, positions(call, found), strict=True)
            ]
        return found

    def _locate_words(self, call: Call, words: list[tuple[str, ...]]) -> WordTokens:
        places = positions(call, words)
        for row, own, keys in zip(call.rows, words, places, strict=True):
            for word, each in zip(own, keys, strict=True):
                if not each:
                    raise missing(word, row)
        prompts = call.prompt() if self._normalise else [[] for _ in words]
        tokens = WordTokens([], [], [])
        for own, prompt in zip(places, prompts, strict=True):
            keys = list(dict.fromkeys([*(key for each in own for key in each), *prompt]))
            at = {key: number for number, key in enumerate(keys)}
            tokens.keys.append(keys)
            tokens.words.append([[at[key] for key in each] for each in own])
            tokens.prompt.append([at[key] for key in prompt])
        return tokens


def word_maps(
    reader: "Reader",
    prompts: str | Sequence[str],
    words: Asked = None,
    *,
    edits: EditRequest | Sequence[EditRequest] = (),
    seeds: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    sites: str | Sequence[str] | None = None,
    steps: Any = None,
    timesteps: Any = None,
    sigmas: Any = None,
    fraction: Any = None,
    branch: str = "cond",
    per_step: bool = False,
    per_layer: bool = False,
    per_head: bool = False,
    size: tuple[int, int] | int | None = None,
    normalise: bool = False,
    skip_factor: int | None = 8,
    progress: Progress = True,
    **arguments: Any,
) -> WordMaps:
    """Run a pipeline and give the heat maps of words, with its pictures.

    Args:
        prompts, edits, seeds, batch_size, progress: as in `Reader.run`.
        words and what follows: see `WordMap`; lists of words for each prompt.
        arguments: of the pipeline.

    Raises:
        InvalidInput: a word is not in a prompt; names word, row and prompt.

    Example:
        >>> maps = word_maps(reader, "a red circle", ["red", "circle"], seeds=[0, 1])
        >>> maps.maps.shape
        torch.Size([2, 2, 16, 16])
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = list_asked(words)
    if asked is not None and len(asked) not in (1, len(listed)):
        raise InvalidInput(f"words has {len(asked)} lists, there are {len(listed)} prompts")
    for number, prompt in enumerate(listed if asked and branch == "cond" else ()):
        for word in asked[number if len(asked) > 1 else 0]:  # pyright: ignore
            if isinstance(prompt, str) and word.lower() not in prompt.lower():
                raise missing(word, Row(number, prompt))
    found = WordMap(
        reader,
        words,
        sites=sites,
        steps=steps,
        timesteps=timesteps,
        sigmas=sigmas,
        fraction=fraction,
        branch=branch,
        per_step=per_step,
        per_layer=per_layer,
        per_head=per_head,
        size=size,
        normalise=normalise,
        skip_factor=skip_factor,
    )
    result = reader.run(
        prompts,
        edits=edits,
        record=found.requests(),
        seeds=seeds,
        batch_size=batch_size,
        progress=progress,
        **arguments,
    )
    return replace(found.result(), images=result.images, firing=result.firing)


def _join_rows(parts: list[WordMaps]) -> WordMaps:
    """The rows of all runs."""
    first = parts[0]
    for each in parts:
        same = (each.sites, each.steps, each.maps.shape[2:])
        if same != (first.sites, first.steps, first.maps.shape[2:]):
            raise InvalidInput(
                f"word maps: the runs differ in sites, steps or size ({list(first.maps.shape[2:])} "
                f"and {list(each.maps.shape[2:])}); collect them apart"
            )
    most = max(each.maps.shape[1] for each in parts)
    maps = []
    for each in parts:
        lacking = (each.maps.shape[0], most - each.maps.shape[1], *each.maps.shape[2:])
        maps.append(torch.cat([each.maps, torch.full(lacking, torch.nan)], 1))
    return replace(
        first,
        maps=torch.cat(maps),
        rows=tuple(row for each in parts for row in each.rows),
        words=tuple(own for each in parts for own in each.words),
    )
