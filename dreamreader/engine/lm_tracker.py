"""Time in a language model: the step is the decoding position, read from lengths."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreamreader.engine.clock_schedule import Instant
from dreamreader.engine.now import Now, Positions
from dreamreader.engine.subject import Subject
from dreamreader.engine.tracker import ModuleTracker, Parameters
from dreamreader.errors import ClockUnknown


class LanguageTracker(ModuleTracker):
    """Follows a transformers decoder through forward and generate.

    Step 0 is the prompt. A later call is at step `past + length - prompt`, from the tokens that the
    cache holds and those that come in, so nothing is counted; without a cache the input has to be
    the one before with one token more.

    Args:
        subject: the model.
        prompt: tokens of the padded prompt where the caller knows it.
    """

    def __init__(self, subject: Subject, prompt: int | None = None):
        super().__init__(subject)
        self.prompt = prompt
        self._given = prompt is not None
        self._ids: Tensor | None = None
        self._prompt_ids: Tensor | None = None
        self._pads: tuple[int, ...] = ()
        self._padded_inside = False
        self._parameters = Parameters(self.module)

    def outside(self, component: str) -> Now:
        why = ClockUnknown(f"{component} was called outside a forward of the whole model")
        return Now(component, "outside", self.runs, why, ("cond",), None)

    def text_ids(self, component: str, branch: str) -> tuple[Tensor, Tensor | None] | None:
        return None if self._prompt_ids is None else (self._prompt_ids, None)

    def _began(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        arguments = self._parameters.bind(args, kwargs)
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given = ids if isinstance(ids, Tensor) else embeds
        if not isinstance(given, Tensor):
            why = ClockUnknown("the model was called without input_ids or inputs_embeds")
            self.now = Now("", "language", self.runs, why, ("cond",), None)
            return
        past = _held(arguments.get("past_key_values"))
        step = self._step(ids if isinstance(ids, Tensor) else None, past, given.shape[1])
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point():
            masked = torch.stack([(mask.cumsum(1) == 0).sum(1), (mask == 0).sum(1)]).tolist()
            self._pads, self._padded_inside = tuple(masked[0]), masked[0] != masked[1]
        elif past == 0:
            self._pads, self._padded_inside = (0,) * given.shape[0], False
        instant = (
            step if isinstance(step, ClockUnknown) else Instant(step, math.nan, None, math.nan, 0)
        )
        positions = Positions(
            past, given.shape[1], self.prompt or 0, self._pads, self._padded_inside
        )
        self.now = Now(
            "",
            "language",
            self.runs,
            instant,
            ("cond",),
            given.shape[0],
            positions=positions,
            ids=self._prompt_ids,
        )

    def _step(self, ids: Tensor | None, past: int, length: int) -> int | ClockUnknown:
        earlier, self._ids = self._ids, ids
        if past == 0:
            grown = (
                ids is not None
                and earlier is not None
                and ids.shape[0] == earlier.shape[0]
                and ids.shape[1] == earlier.shape[1] + 1
                and torch.equal(ids[:, :-1], earlier)
            )
            if not grown:
                self.runs += 1
                self._prompt_ids = ids
                if not self._given:
                    self.prompt = length
                return 0
        if self.prompt is None:
            return ClockUnknown("the cache was filled before: where the prompt ends is unknown")
        if past and length > 1 and past + length > self.prompt:
            return ClockUnknown(
                f"{length} tokens came in at once behind {past} cached ones: no single decoding "
                "position"
            )
        return max(0, past + length - self.prompt)


def _held(cache: Any) -> int:
    """Tokens that a cache of keys and values holds."""
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        return int(length())
    if isinstance(cache, tuple) and cache and isinstance(cache[0], tuple):
        return int(cache[0][0].shape[-2])
    return 0
