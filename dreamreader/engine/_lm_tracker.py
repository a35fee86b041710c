"""Time and tokens in a language model: what its calls are given, never what is counted."""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

from torch import Tensor, nn

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._call_tokens import (
    OF_ENCODER,
    beside,
    layout_after,
    layout_behind,
    makes_decoder_inputs,
    real_of,
    resolve_kept,
    sequence_of,
    source_of,
    states_of,
    tokens_of,
    whole_layout,
)
from dreamreader.engine._clock_schedule import StepInfo
from dreamreader.engine._generation import Generation, listen_to_generate
from dreamreader.engine._sequences import (
    Sequence,
    Sequences,
    cache_of,
    caches_in,
    count_held,
    keeps_state,
)
from dreamreader.engine._subject import (
    Subject,
    forward_names,
    innermost,
    is_encoder_decoder,
)
from dreamreader.engine._token_layout import RowsUnknown, TokenLayout, real_tokens
from dreamreader.engine._tracker import WithoutSchedule, _watch
from dreamreader.errors import ClockUnknown

_FILLED = "the cache was filled before: where the prompt ends is unknown"
_SEVERAL = (
    "several tokens came in behind those in the cache: whether they are more of the prompt, a "
    "further turn or a draft is unknown, and so is where the prompt ends; let generate take the "
    "prompt (prefill_chunk_size=), give it in one call, or count tokens from 0"
)
_GROWN = (
    "the call repeats an earlier one with one more token and no cache: whether it decodes this "
    "token or is a prompt of its own is unknown; use generate or a cache for the one, a block or "
    "run of its own for the other"
)
_STATE = (
    "the model keeps its state in its modules: whether a call of one token goes on from it is "
    "unknown; use generate, or hand the cache over"
)
_COND = ("cond",)
_ENCODER = "encoder"


class LanguageTracker(WithoutSchedule):
    """Follows a transformers model through forward and generate.

    Step 0 is the prompt. A later call is at step `past + length - prompt`, from the tokens that the
    cache holds and those that come in; the prompt's length is read from `generate`. Outside it, a
    call without a cache, or with an empty one, is a prompt of its own, and one of a single token
    with the cache of an earlier call decodes it; what may be either has no step and no prompt.
    Every model inside the subject (base model, encoder, decoder, vision tower) that is called has
    tokens of its own, or shares those of the call around it.

    Args:
        subject: the model.
        prompt: tokens of the padded prompt, where the caller knows them: its one call, which may
            have those of a completion behind them.
    """

    def __init__(self, subject: Subject, prompt: int | None = None):
        self.model = innermost(subject.model)
        self.runs = 0
        self.rows: int | None = None
        self.prompts: list[str] | None = None
        self._given = prompt
        self._sequences = Sequences()
        self._generations: list[Generation] = []
        self._frames: list[_ModuleFrame] = []
        self._run = 0
        self._ids: Tensor | ClockUnknown | None = None
        self._ids_layout: TokenLayout | ClockUnknown | None = None
        self._encoders = _encoders(self.model)
        self._outermost = subject.model
        models = {*_models(self.model), *self._encoders}
        self._names = {each: forward_names(type(each)) for each in models}
        self._encoded: tuple[tuple[Any, Any], Any] = ((None, None), None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(listen_to_generate(self.model, self))
            for module in self._names:
                _watch(stack, module, self._beginner(module), self._end_call)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._frames.clear()
        self._sequences.clear()
        self._encoded = ((None, None), None)

    @property
    def now(self) -> CallContext | None:
        return self._frames[-1].now if self._frames else None

    def outside(self, component: str) -> CallContext:
        why = ClockUnknown(f"{component} was called outside a forward of the whole model")
        return CallContext(component, "outside", self.runs, why, _COND, None, tokens=why)

    def text_ids(self, component: str, branch: str) -> tuple[Tensor, Tensor | None] | None:
        if self._encoders and (self.now is None or self.now.component != _ENCODER):
            return None
        if isinstance(self._ids, ClockUnknown):
            raise ClockUnknown(*self._ids.args)
        return None if self._ids is None else (self._ids, None)

    def own_of_prompt(self) -> Tensor | None:
        """[rows, width] index of each token of `text_ids` among the row's own; None: as it stands.

        Raises:
            ClockUnknown: which of them are padding is unknown.
        """
        if self._generations and not self._encoders:
            real = self._generations[-1].real
            own = real.cumsum(1) - 1 if isinstance(real, Tensor) else real
        else:
            layout = self._ids_layout
            own = layout.own if isinstance(layout, TokenLayout) else layout
        if isinstance(own, ClockUnknown):
            raise ClockUnknown(*own.args)
        if own is None or not isinstance(self._ids, Tensor):
            return own
        return own[:, -self._ids.shape[1] :]

    # what the listener of `generate` tells

    def generation_began(self, arguments: Mapping[str, Any]) -> None:
        self._new_run()
        for each in caches_in(arguments):
            self._sequences.forget(each)
        generation = Generation.of(arguments, is_encoder_decoder(self.model))
        self._generations.append(generation)
        self._ids = generation.ids

    def generation_ended(self) -> None:
        if self._generations:
            self._generations.pop()

    def inputs_prepared(self, arguments: Mapping[str, Any], inputs: Any) -> None:
        if self._generations:
            self._generations[-1].prepare(arguments)
            self._generations[-1].note_inputs(inputs)

    # what the hooks tell

    def _beginner(self, module: nn.Module):
        def began(args: tuple, kwargs: dict[str, Any]) -> None:
            names = self._names[module]
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            self._frames.append(self._frame(module, arguments))

        return began

    def _end_call(self, output: Any) -> None:
        if self._frames:
            sequence = self._frames.pop().sequence
            if sequence is not None and (cache := cache_of(output)) is not None:
                sequence.keep(cache)

    def _new_run(self) -> int:
        self.runs += 1
        self._run = self.runs
        return self._run

    def _frame(self, module: nn.Module, arguments: Mapping[str, Any]) -> "_ModuleFrame":
        """What is known of a call of a model: its tokens and its decoding step."""
        around = self._frames[-1] if self._frames else None
        if module in self._encoders:
            return _ModuleFrame(self._of_encoder(module, arguments, around is not None))
        given = sequence_of(module, arguments)
        inside = around is not None and not around.is_strange
        if given is None:
            which = "decoder_input_ids" if is_encoder_decoder(module) else "input_ids"
            why = (
                f"{type(module).__name__} was called without {which} or embeddings: its tokens "
                "are none of the prompt's"
            )
            strange = not inside and not makes_decoder_inputs(module, arguments)
            return _ModuleFrame(self._apart(why), is_strange=strange)
        if around is not None and inside:
            return _ModuleFrame(self._within(module, arguments, around.now, *given.shape[:2]))
        if self._generations or _adds_tokens(self._outermost):
            return _ModuleFrame(self._of_generation(arguments, given))
        return _ModuleFrame(*self._plain(module, arguments, given))

    def _within(
        self,
        module: nn.Module,
        arguments: Mapping[str, Any],
        around: CallContext,
        rows: int,
        length: int,
    ) -> CallContext:
        """A model inside the call of another."""
        tokens = around.tokens
        if isinstance(tokens, ClockUnknown):  # and so are those of its parts
            return self._now(around.instant, tokens, around.batch)
        if isinstance(tokens, TokenLayout) and (tokens.rows, tokens.length) == (rows, length):
            return self._inside(around, arguments)
        return self._apart(
            f"{type(module).__name__} works on {rows} rows of {length} tokens inside a call "
            "with others: which token each is is unknown"
        )

    def _of_generation(self, arguments: Mapping[str, Any], given: Tensor) -> CallContext:
        """A call that `generate` makes."""
        rows, length = given.shape[:2]
        if len(self._generations) > 1:
            return self._unknown("a generate runs inside another one", rows)
        if _adds_tokens(self._outermost):
            return self._unknown("PEFT puts virtual tokens before those of the prompt", rows)
        if not self._generations[0].is_own(given):
            return self._unknown(
                "the model was called inside generate, but not for one of its steps (as guidance "
                "or a processor of logits does)",
                rows,
            )
        generation = self._generations[0]
        past = self._count_held(arguments, length, generation.is_encoder_decoder)
        if isinstance(past, ClockUnknown):
            return self._now(past, past, rows)
        return self._place(arguments, *generation.call(rows, past, length), rows, length)

    def _place(
        self,
        arguments: Mapping[str, Any],
        tokens: TokenLayout | ClockUnknown,
        step: int | ClockUnknown,
        rows: int,
        length: int,
    ) -> CallContext:
        if isinstance(tokens, TokenLayout):
            kept = resolve_kept(arguments.get("logits_to_keep"), length)
            tokens = beside(replace(tokens, kept=kept), self._encoder(arguments))
        return self._now(step if isinstance(step, ClockUnknown) else _instant(step), tokens, rows)

    def _plain(
        self, module: nn.Module, arguments: Mapping[str, Any], given: Tensor
    ) -> tuple[CallContext, Sequence | None]:
        """A call outside `generate`: a prompt of its own, or one that goes on with a cache."""
        rows, length = given.shape[:2]
        of_decoder = is_encoder_decoder(module)
        caches = caches_in(arguments)
        past = self._count_held(arguments, length, of_decoder)
        if past == 0 and not caches and length == 1 and self._given is None:
            past = ClockUnknown(_STATE) if keeps_state(module, rows) else 0
        if isinstance(past, ClockUnknown):
            for each in caches:
                self._sequences.forget(each)
            return self._now(past, past, rows), None
        real = real_of(module, arguments, given, past)
        if past:
            sequence, before = self._continue_sequence(caches, given, real, past)
        else:
            source = source_of(arguments) if of_decoder else None
            ids = arguments.get("decoder_input_ids" if of_decoder else "input_ids")
            whole = None if caches else given.detach()
            sequence, before = self._begin_sequence(real, rows, length, ids, whole, source)
        if caches:
            sequence.keep(caches[0])
        self._sequences.add(sequence, instead_of=before)
        self._run = sequence.run
        if not of_decoder:
            self._ids, self._ids_layout = sequence.ids, sequence.first
        step = prompt = sequence.prompt
        if isinstance(prompt, int):
            step = sequence.total - prompt if past else 0
        elif not of_decoder:
            self._ids = prompt
        return self._place(arguments, sequence.layout, step, rows, length), sequence

    def _begin_sequence(
        self,
        real: Tensor | ClockUnknown | None,
        rows: int,
        length: int,
        ids: Any,
        whole: Tensor | None,
        source: Tensor | None,
    ) -> tuple[Sequence, Sequence | None]:
        """A call with nothing before it; with the earlier one that it may go on with, if any."""
        given = length if self._given is None else min(self._given, length)
        layout: Any = real
        if not isinstance(real, ClockUnknown):
            layout = whole_layout(real, rows, length, given)
        grown = None
        if whole is not None and self._given is None:
            grown = self._sequences.find_grown(whole, layout, source)
        prompt: int | ClockUnknown = given
        if grown is not None:
            prompt = ClockUnknown(_GROWN)
            if isinstance(layout, TokenLayout):
                layout = replace(layout, prompts=prompt)
        run = self._new_run() if grown is None else grown.run
        ids = ids if isinstance(ids, Tensor) else None
        return Sequence(run, rows, length, prompt, layout, ids, layout, whole, source), grown

    def _continue_sequence(
        self, caches: list[Any], given: Tensor, real: Tensor | ClockUnknown | None, past: int
    ) -> tuple[Sequence, Sequence | None]:
        """A call behind cached tokens; with the sequence of this cache, where it is known."""
        rows, length = given.shape[:2]
        before = next((each for each in map(self._sequences.of_cache, caches) if each), None)
        follows = before is not None and (before.total, before.rows) == (past, rows)
        if before is None or not follows:
            why = ClockUnknown(_FILLED)
            layout = layout_behind(real, rows, past, length, before, why)
            return Sequence(self._new_run(), rows, past + length, why, layout, None, why), before
        prompt = before.prompt
        if length > 1 and isinstance(prompt, int):
            prompt = ClockUnknown(_SEVERAL)
        earlier = before.layout
        prompts: Any = prompt
        if isinstance(prompt, int) and isinstance(earlier, TokenLayout):
            prompts = earlier.prompts
        layout = layout_after(real, rows, past, length, earlier, prompts)
        ids, first = before.ids, before.first
        return Sequence(before.run, rows, past + length, prompt, layout, ids, first), before

    def _count_held(
        self, arguments: Mapping[str, Any], length: int, of_decoder: bool
    ) -> int | ClockUnknown:
        """Tokens that the caches of a call hold, or why that is unknown."""
        caches = caches_in(arguments)
        if not caches:
            return 0
        held = count_held(caches, of_decoder)
        if held is not None:
            return held
        generation = self._generations[-1] if self._generations else None
        whole = None if generation is None or generation.goes_on else generation.whole
        if whole is not None and whole >= length:
            return whole - length  # a recurrent state does not say how much it has read
        return ClockUnknown("its cache or state does not say how many tokens it has read")

    def _of_encoder(
        self, module: nn.Module, arguments: Mapping[str, Any], inside: bool
    ) -> CallContext:
        given = tokens_of(arguments, OF_ENCODER)
        if not inside and not self._generations:
            self._new_run()
        if given is None:
            return self._unknown(f"{type(module).__name__} reads no tokens: it has no positions")
        rows, length = given.shape[:2]
        ids = arguments.get("input_ids")
        if isinstance(ids, Tensor):
            self._ids = ids
        real = real_tokens(arguments.get("attention_mask"), rows, 0, length)
        why = ClockUnknown(f"{type(module).__name__} runs before decoding: it has no step")
        tokens = real if isinstance(real, ClockUnknown) else whole_layout(real, rows, length)
        self._ids_layout = tokens
        return self._now(why, tokens, rows, _ENCODER)

    def _inside(self, around: CallContext, arguments: Mapping[str, Any]) -> CallContext:
        """A model inside a call that works on the same tokens, all of them."""
        tokens = around.tokens
        assert isinstance(tokens, TokenLayout)
        encoder = tokens.encoder or self._encoder(arguments)
        inside: TokenLayout | ClockUnknown = tokens
        if tokens.kept is not None or encoder is not tokens.encoder:
            inside = beside(replace(tokens, kept=None), encoder)
        return self._now(around.instant, inside, tokens.rows, around.component)

    def _encoder(self, arguments: Mapping[str, Any]) -> TokenLayout | ClockUnknown | None:
        """Tokens of the encoder's states that a decoder is given; None where it attends to none."""
        states, mask = arguments.get("encoder_hidden_states"), "encoder_attention_mask"
        if states is None:  # of a whole encoder-decoder, whose mask is the encoder's
            states, mask = states_of(arguments), "attention_mask"
        if not isinstance(states, Tensor) or states.dim() != 3:
            return None
        mask = arguments.get(mask)
        given, found = self._encoded
        if given[0] is not states or given[1] is not mask:  # the same at every decoding step
            rows, length = states.shape[:2]
            real = real_tokens(mask, rows, 0, length)
            found = real if isinstance(real, ClockUnknown) else whole_layout(real, rows, length)
            self._encoded = ((states, mask), found)
        return found

    def _unknown(self, why: str, rows: int | None = None) -> CallContext:
        error = ClockUnknown(why)
        return self._now(error, error, rows)

    def _apart(self, why: str) -> CallContext:
        """A model within a call, or within generate, that does not work on its rows."""
        around = self.now
        if around is None and not self._generations:
            return self._unknown(why)  # the caller's own batch
        rows = around.batch if around is not None else self._generations[0].rows
        return self._now(ClockUnknown(why), RowsUnknown(why, rows), None)

    def _now(self, instant: Any, tokens: Any, rows: int | None, component: str = "") -> CallContext:
        states = self._encoded[0][0] if getattr(tokens, "encoder", None) is not None else None
        return CallContext(
            component,
            "text" if component == _ENCODER else "language",
            self._run,
            instant,
            _COND,
            rows,
            tokens=tokens,
            encoder_states=states,
        )


@dataclass(slots=True)
class _ModuleFrame:
    """A running call of a model.

    Attributes:
        sequence: what it begins or goes on with, outside `generate`.
        is_strange: nothing in its arguments is known, and so in those of the calls around it: the
            models in it are looked at as if they were called alone.
    """

    now: CallContext
    sequence: Sequence | None = None
    is_strange: bool = False


def _models(model: nn.Module) -> list[nn.Module]:
    """The model and every transformers model inside it."""
    found = [each for each in model.modules() if _is_pretrained(type(each))]
    return found if model in found else [model, *found]


def _adds_tokens(model: Any) -> bool:
    """Whether PEFT's prompt or prefix tuning puts tokens of its own before the prompt."""
    try:
        config = getattr(model, "active_peft_config", None)
    except (AttributeError, KeyError):
        return False
    return bool(getattr(config, "is_prompt_learning", False))


def read_text(kinds: Iterable[type[nn.Module]]) -> bool:
    """Whether a model of transformers that takes tokens is of one of these classes."""
    return any(_is_pretrained(each) and "input_ids" in forward_names(each) for each in kinds)


@cache
def _is_pretrained(kind: type) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in kind.__mro__)


def _encoders(model: nn.Module) -> set[nn.Module]:
    if not is_encoder_decoder(model):
        return set()
    try:
        return {model.get_encoder()}  # pyright: ignore[reportCallIssue]
    except (AttributeError, TypeError, NotImplementedError):
        return set()


def _instant(step: int) -> StepInfo:
    return StepInfo(step, math.nan, None, math.nan, 0)
