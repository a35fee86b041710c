"""What `generate` is called with: the one place that knows prompts, their padding and the beams."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dreamreader.engine._sequences import caches_in
from dreamreader.engine._subject import names_of
from dreamreader.engine._threads import Owner
from dreamreader.engine._token_layout import TokenLayout, real_tokens
from dreamreader.errors import ClockUnknown

_IDS = ("input_ids", "inputs")
_STATES = ("encoder_outputs", "input_features")
_GIVEN = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds")


class GenerationListener(Protocol):
    """What wants to know about a model's `generate`."""

    def generation_began(self, arguments: Mapping[str, Any]) -> None: ...
    def generation_ended(self) -> None: ...
    def inputs_prepared(self, arguments: Mapping[str, Any], inputs: Any) -> None: ...


@dataclass(eq=False)
class Generation:
    """One running `generate`.

    Attributes:
        rows: prompts that it was given. ids: their tokens [rows, width], None where only embeddings
            were given.
        width: tokens of the padded prompts; of an encoder-decoder, of the decoder's. None until
            they are prepared.
        real: [rows, width] bool, False at padding; None where there is none; or why it is unknown.
        whole: tokens of the whole sequence at the call that is prepared.
        expected: what that call is going to be given; any other call is none of its steps.
        reached: tokens of the whole sequence behind the latest call, None before the first.
        goes_on: whether the caller gave it a cache.
    """

    rows: int | None
    ids: Tensor | None
    width: int | None
    real: Tensor | None | ClockUnknown
    is_encoder_decoder: bool
    whole: int | None = None
    expected: Tensor | None = None
    offset: int = 0
    has_mask: bool = False
    reached: int | None = None
    goes_on: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any], is_encoder_decoder: bool) -> "Generation":
        found = cls._of(arguments, is_encoder_decoder)
        found.goes_on = bool(caches_in(arguments))
        return found

    @classmethod
    def _of(cls, arguments: Mapping[str, Any], is_encoder_decoder: bool) -> "Generation":
        ids = next((v for k in _IDS if isinstance(v := arguments.get(k), Tensor)), None)
        embeds = arguments.get("inputs_embeds")
        given = ids if ids is not None and ids.shape[-1] else embeds
        rows = given.shape[0] if isinstance(given, Tensor) else None
        kept = ids if ids is not None and ids.dim() == 2 and ids.shape[1] else None
        if is_encoder_decoder:
            if rows is None:
                states = next((arguments.get(n) for n in _STATES if n in arguments), None)
                states = states[0] if isinstance(states, tuple | list | Mapping) else states
                rows = states.shape[0] if isinstance(states, Tensor) else None
            return cls(rows, kept, None, None, True)  # the decoder's prompt is told at its call
        width = given.shape[1] if isinstance(given, Tensor) and given.dim() > 1 else None
        found = cls(rows, kept, width, None, False)
        if kept is None and isinstance(embeds, Tensor):
            found.offset = embeds.shape[1]  # its ids begin behind the embeddings
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and rows is not None:
            found.has_mask = True
            found._apply_mask(mask, rows)
        return found

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """The inputs of a call are prepared: the whole sequence, and at first its mask."""
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if isinstance(ids, Tensor):
            self.whole = ids.shape[1] + self.offset
            if self.is_encoder_decoder and self.width is None:
                self.width = ids.shape[1]
        if self.is_encoder_decoder:
            mask = arguments.get("decoder_attention_mask")
        if self.has_mask or not isinstance(mask, Tensor):
            return
        # `generate` itself tells padding by the pad token where it was given no mask.
        self.has_mask = True
        if mask.shape[1] < (self.width or 0):
            self.real = ClockUnknown(
                "generate takes its prompt in chunks and guesses its padding: give attention_mask"
            )
        else:
            self._apply_mask(mask, mask.shape[0])

    def note_inputs(self, inputs: Any) -> None:
        """What the prepared call will be given."""
        if isinstance(inputs, Mapping):
            given = (inputs.get(name) for name in _GIVEN)
            self.expected = next((each for each in given if isinstance(each, Tensor)), None)

    def is_own(self, given: Tensor) -> bool:
        """Whether a call with these tokens or embeddings is the one that was prepared."""
        expected, self.expected = self.expected, None
        return expected is not None and (
            given is expected  # offload and wrappers may have moved it
            or (given.shape == expected.shape and given.dtype == expected.dtype)
            and (given.device != expected.device or given.data_ptr() == expected.data_ptr())
        )

    def call(
        self, rows: int, past: int, length: int
    ) -> tuple[TokenLayout | ClockUnknown, int | ClockUnknown]:
        """Layout and decoding step of the next call, of `length` tokens behind `past` cached ones.

        Where the call does not begin where the one before it ended, both are unknown.
        """
        why = self._gap(past, length)
        if why is not None:
            return why, why
        step = self._step(past, length)
        self.reached = past + length
        return self._layout(rows, past, length), step

    def _gap(self, past: int, length: int) -> ClockUnknown | None:
        if self.whole is not None and past + length < self.whole:
            return ClockUnknown(
                f"generate is at {self.whole} tokens, and the call has {length} of them behind "
                f"{past} cached ones: which they are is unknown"
            )
        if self.reached is not None:
            if past <= self.reached:
                return None
            return ClockUnknown(
                f"generate was at {self.reached} tokens, and the cache holds {past}: what came "
                "between is unknown"
            )
        if past and self.width is not None and (past >= self.width or past + length < self.width):
            return ClockUnknown(
                f"generate was given {self.width} tokens and a cache that holds {past} already: "
                "which of them are new is unknown; give it the whole text, or an attention_mask of "
                "all its tokens"
            )
        return None

    def _step(self, past: int, length: int) -> int | ClockUnknown:
        if self.width is None:
            return ClockUnknown("where the prompt ends is unknown")
        total = past + length
        if total <= self.width:
            return 0
        again = past == 0 and self.reached is not None and total == self.reached + 1
        if again or (past and length == 1):
            return total - self.width
        return ClockUnknown(
            f"{length} tokens came in at once behind {past} cached ones: no single decoding "
            "position"
        )

    def _layout(self, rows: int, past: int, length: int) -> TokenLayout | ClockUnknown:
        if isinstance(self.real, ClockUnknown):
            return self.real
        if self.rows is None or rows % self.rows or self.width is None:
            return ClockUnknown(
                f"generate was given {self.rows or 'an unknown number of'} prompts, this call has "
                f"{rows} sequences: which are of which prompt is unknown"
            )
        beams, real, width = rows // self.rows, self.real, self.width
        behind = max(0, past - width)
        if real is None:
            starts, prompts, part = (past,) * self.rows, (width,) * self.rows, None
        else:
            starts = tuple((real[:, :past].sum(1) + behind).tolist())
            prompts = tuple(real.sum(1).tolist())
            part = torch.ones(self.rows, length, dtype=torch.bool)
            inside = real[:, past : past + length]
            part[:, : inside.shape[1]] = inside
            part = None if bool(part.all()) else part
        layout = TokenLayout(self.rows, length, starts, part, prompts)
        return layout.of_beams(beams)

    def _apply_mask(self, mask: Tensor, rows: int) -> None:
        if mask.dim() == 2:
            self.width = mask.shape[1]
        real = real_tokens(mask, rows, 0, self.width or 0)
        if isinstance(real, Tensor) and self.rows and real.shape[0] % self.rows == 0:
            real = real[:: real.shape[0] // self.rows]
        self.real = real


class _ForwardTap:
    """Stands for a model's `generate` and `prepare_inputs_for_generation` while sessions listen."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.listening: list[tuple[GenerationListener, Owner]] = []
        self.earlier = {name: vars(model).get(name) for name in _METHODS}
        for name, stand_in in zip(_METHODS, (self._generate, self._prepare), strict=True):
            original = getattr(model, name, None)
            if original is not None:
                vars(model)[name] = stand_in(original)

    def close(self) -> None:
        for name, earlier in self.earlier.items():
            vars(self.model).pop(name, None)
            if earlier is not None:
                vars(self.model)[name] = earlier

    def _find_listeners(self) -> list[GenerationListener]:
        return [listener for listener, owner in self.listening if owner.here()]

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = names_of(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            heard = self._find_listeners()
            for listener in heard:
                listener.generation_began(arguments)
            try:
                return original(*args, **kwargs)
            finally:
                for listener in reversed(heard):
                    listener.generation_ended()

        return generate

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = names_of(original)

        @functools.wraps(original)
        def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            inputs = original(*args, **kwargs)
            for listener in self._find_listeners():
                listener.inputs_prepared(arguments, inputs)
            return inputs

        return prepare_inputs_for_generation


_METHODS = ("generate", "prepare_inputs_for_generation")
_TAPS: dict[int, _ForwardTap] = {}


@contextmanager
def listen_to_generate(model: nn.Module, listener: GenerationListener) -> Iterator[None]:
    """Tell `listener` about every `generate` of this one model by this thread."""
    tap = _TAPS.get(id(model))
    if tap is None:
        tap = _TAPS[id(model)] = _ForwardTap(model)
    tap.listening.append((listener, Owner()))
    try:
        yield
    finally:
        tap.listening[:] = [each for each in tap.listening if each[0] is not listener]
        if not tap.listening:
            del _TAPS[id(model)]
            tap.close()
