"""Time and tokens in a language model: what its calls are given, never what is counted."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from dreamreader.engine.clock_schedule import Instant
from dreamreader.engine.generation import Generation, listen_to_generate, names_of
from dreamreader.engine.now import Now
from dreamreader.engine.subject import Subject, innermost
from dreamreader.engine.token_layout import RowsUnknown, TokenLayout, real_tokens
from dreamreader.engine.tracker import WithoutSchedule, _watched
from dreamreader.errors import ClockUnknown

_CACHES = ("past_key_values", "cache_params", "past_buckets_states", "state", "mems", "cache")
_COND = ("cond",)
_ENCODER = "encoder"


class LanguageTracker(WithoutSchedule):
    """Follows a transformers model through forward and generate.

    Step 0 is the prompt. A later call is at step `past + length - prompt`, from the tokens that the
    cache holds and those that come in; the prompt's length is read from `generate`, or is that of
    the call that began without a cache. Every model inside the subject (base model, encoder,
    decoder, vision tower) that is called has tokens of its own, or shares those of the call around
    it.

    Args:
        subject: the model.
        prompt: tokens of the padded prompt where the caller knows it.
    """

    def __init__(self, subject: Subject, prompt: int | None = None):
        self.model = innermost(subject.model)
        self.runs = 0
        self.rows: int | None = None
        self.prompts: list[str] | None = None
        self._given = prompt
        self._prompt: int | None = prompt
        self._past = _Past()
        self._pasts: list[_Past] = []
        self._generations: list[Generation] = []
        self._frames: list[Now] = []
        self._ids: Tensor | None = None
        self._ids_layout: TokenLayout | ClockUnknown | None = None
        self._encoders = _encoders(self.model)
        self._adds_tokens = _adds_tokens(subject.model)
        models = {*_models(self.model), *self._encoders}
        self._names = {each: names_of(type(each).forward)[1:] for each in models}
        self._encoded: tuple[tuple[Any, Any], Any] = ((None, None), None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(listen_to_generate(self.model, self))
            for module in self._names:
                stack.enter_context(_watched(module, self._beginner(module), self._ended))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._frames.clear()
        self._pasts.clear()
        self._encoded = ((None, None), None)

    @property
    def now(self) -> Now | None:
        return self._frames[-1] if self._frames else None

    def outside(self, component: str) -> Now:
        why = ClockUnknown(f"{component} was called outside a forward of the whole model")
        return Now(component, "outside", self.runs, why, _COND, None, tokens=why)

    def text_ids(self, component: str, branch: str) -> tuple[Tensor, Tensor | None] | None:
        decoding = self._encoders and (self.now is None or self.now.component != _ENCODER)
        return None if self._ids is None or decoding else (self._ids, None)

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
        return own if own is None or self._ids is None else own[:, -self._ids.shape[1] :]

    # what the listener of `generate` tells

    def generation_began(self, arguments: Mapping[str, Any]) -> None:
        self.runs += 1
        self._past = _Past()
        generation = Generation.of(arguments, _is_encoder_decoder(self.model))
        self._generations.append(generation)
        self._ids = generation.ids

    def generation_ended(self) -> None:
        if self._generations:
            self._generations.pop()
        self._past = _Past()

    def inputs_prepared(self, arguments: Mapping[str, Any], inputs: Any) -> None:
        if self._generations:
            self._generations[-1].prepare(arguments)
            self._generations[-1].prepared(inputs)

    # what the hooks tell

    def _beginner(self, module: nn.Module):
        def began(args: tuple, kwargs: dict[str, Any]) -> None:
            names = self._names[module]
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            self._frames.append(self._frame(module, arguments))

        return began

    def _ended(self) -> None:
        if self._frames:
            self._frames.pop()

    def _frame(self, module: nn.Module, arguments: Mapping[str, Any]) -> Now:
        """What is known of a call of a model: its tokens and its decoding step."""
        around = self.now
        if module in self._encoders:
            return self._of_encoder(module, arguments, around)
        given = _sequence(arguments, _is_encoder_decoder(module))
        if given is None:
            return self._apart(
                f"{type(module).__name__} was called without input_ids or inputs_embeds: its "
                "tokens are none of the prompt's"
            )
        rows, length = given.shape[:2]
        if around is not None and isinstance(tokens := around.tokens, TokenLayout):
            if (tokens.rows, tokens.length) == (rows, length):
                return self._inside(around, arguments)
            return self._apart(
                f"{type(module).__name__} works on {rows} rows of {length} tokens inside a call "
                "with others: which token each is is unknown"
            )
        return self._of_call(module, arguments, given)

    def _of_call(self, module: nn.Module, arguments: Mapping[str, Any], given: Tensor) -> Now:
        rows, length = given.shape[:2]
        if len(self._generations) > 1:
            return self._unknown("a generate runs inside another one", rows)
        if self._adds_tokens:
            return self._unknown("PEFT puts virtual tokens before those of the prompt", rows)
        if self._generations and not self._generations[0].is_own(given):
            return self._unknown(
                "the model was called inside generate, but not for one of its steps (as guidance "
                "or a processor of logits does)",
                rows,
            )
        past = self._held(arguments, length)
        if isinstance(past, ClockUnknown):
            self._past = _Past()
            return self._now(past, past, rows)
        tokens: TokenLayout | ClockUnknown
        if self._generations:
            generation = self._generations[0]
            tokens = generation.layout(rows, past, length)
            step = self._step(past, length, generation.width, bool(_caches(arguments)))
        else:
            tokens, step = self._plain(module, arguments, given, past)
        if isinstance(tokens, TokenLayout):
            kept = _kept(arguments.get("logits_to_keep"), length)
            tokens = _beside(replace(tokens, kept=kept), self._encoder(arguments))
        return self._now(step if isinstance(step, ClockUnknown) else _instant(step), tokens, rows)

    def _plain(
        self, module: nn.Module, arguments: Mapping[str, Any], given: Tensor, past: int
    ) -> tuple[TokenLayout | ClockUnknown, int | ClockUnknown]:
        """Tokens and step of a call outside `generate`."""
        rows, length = given.shape[:2]
        of_decoder = _is_encoder_decoder(module)
        ids = arguments.get("decoder_input_ids" if of_decoder else "input_ids")
        ids = ids if isinstance(ids, Tensor) else None
        cache = next(iter(_caches(arguments)), None)
        before = self._before(cache, past, rows)
        continued = past > 0 and before.total == past and before.rows == rows
        grown = past == 0 and before.grows(ids)
        if not (continued or grown):
            self.runs += 1
            self._prompt = self._given if past or self._given is not None else length
            if not of_decoder:
                self._ids = ids
        step = 0 if past == 0 and not grown else self._step(past, length, self._prompt, past > 0)
        mask = arguments.get("decoder_attention_mask" if of_decoder else "attention_mask")
        real = real_tokens(mask, rows, past, length)
        if isinstance(real, ClockUnknown):
            self._past = _Past()
            self._ids_layout = real
            return real, step
        tokens = self._laid_out(real, rows, past, length, before if continued else None)
        if not (continued or grown) and not of_decoder:
            self._ids_layout = tokens
        after = _Past(past + length, rows, ids if past == 0 else None, tokens)
        after.cache, after.prompt = cache, self._prompt
        gone = before if continued or grown else None
        self._pasts = [each for each in self._pasts if each is not gone][-7:] + [after]
        self._past = after
        return tokens, step

    def _before(self, cache: Any, past: int, rows: int) -> "_Past":
        """The call that filled this cache; one whose cache was not seen counts where it fits alone.

        A model that makes its own cache hands it out behind the call, where nothing listens.
        """
        if past == 0:
            return self._past
        known = [each for each in self._pasts if each.cache is cache]
        if not known:
            fits = [each for each in self._pasts if each.cache is None]
            known = [each for each in fits if (each.total, each.rows) == (past, rows)]
        if len(known) != 1:
            return _Past()
        self._prompt = known[0].prompt if known[0].prompt is not None else self._prompt
        return known[0]

    def _laid_out(
        self, real: Tensor | None, rows: int, past: int, length: int, before: "_Past | None"
    ) -> TokenLayout | ClockUnknown:
        """The layout of a call whose padding is known: over all its tokens, or over new ones.

        `before` is the call that this one goes on with.
        """
        earlier = None if before is None else before.tokens
        if real is not None and real.shape[1] == past + length:
            starts, part = tuple(real[:, :past].sum(1).tolist()), real[:, past:].contiguous()
            part = None if bool(part.all()) else part
        elif isinstance(earlier, TokenLayout):
            starts, part = tuple((earlier.own.amax(1) + 1).tolist()), real
            if earlier.real is not None:  # a row may have had nothing but padding
                came = earlier.real.sum(1).tolist()
                starts = tuple(a + b for a, b in zip(earlier.starts, came, strict=True))
        elif real is None or past == 0:
            starts, part = (past,) * rows, real
        else:
            return ClockUnknown(
                "the cache was filled before: which of its tokens are padding is unknown"
            )
        prompts: Any = ClockUnknown("the cache was filled before: where the prompt ends is unknown")
        if isinstance(earlier, TokenLayout):
            prompts = earlier.prompts
        elif past == 0 and self._prompt is not None:
            own = part if part is not None else torch.ones(rows, length, dtype=torch.bool)
            prompts = tuple(own[:, : self._prompt].sum(1).tolist())
        return TokenLayout(rows, length, starts, part, prompts)

    def _step(self, past: int, length: int, prompt: int | None, keeps: bool) -> int | ClockUnknown:
        """The decoding step of a call; `keeps`: earlier tokens do not come again."""
        if prompt is None:
            return ClockUnknown("the cache was filled before: where the prompt ends is unknown")
        total = past + length
        if keeps and length > 1 and total > prompt:
            return ClockUnknown(
                f"{length} tokens came in at once behind {past} cached ones: no single decoding "
                "position"
            )
        return max(0, total - prompt)

    def _held(self, arguments: Mapping[str, Any], length: int) -> int | ClockUnknown:
        """Tokens that the caches of a call hold, or why that is unknown."""
        caches = _caches(arguments)
        whole = self._generations[-1].whole if self._generations else None
        if not caches:
            return 0
        for each in caches:
            held = _held(each)
            if held is not None:
                return held
        if whole is not None and whole >= length:
            return whole - length  # a recurrent state does not say how much it has read
        return ClockUnknown("its recurrent state does not say how many tokens it has read")

    def _of_encoder(
        self, module: nn.Module, arguments: Mapping[str, Any], around: Now | None
    ) -> Now:
        given = _sequence(arguments, False)
        if around is None and not self._generations:
            self.runs += 1
        if given is None:
            return self._unknown(f"{type(module).__name__} reads no tokens: it has no positions")
        rows, length = given.shape[:2]
        ids = arguments.get("input_ids")
        if isinstance(ids, Tensor):
            self._ids = ids
        real = real_tokens(arguments.get("attention_mask"), rows, 0, length)
        why = ClockUnknown(f"{type(module).__name__} runs before decoding: it has no step")
        tokens = real if isinstance(real, ClockUnknown) else _whole(real, rows, length)
        self._ids_layout = tokens
        return self._now(why, tokens, rows, _ENCODER)

    def _inside(self, around: Now, arguments: Mapping[str, Any]) -> Now:
        """A model inside a call that works on the same tokens, all of them."""
        tokens = around.tokens
        assert isinstance(tokens, TokenLayout)
        encoder = tokens.encoder or self._encoder(arguments)
        inside: TokenLayout | ClockUnknown = tokens
        if tokens.kept is not None or encoder is not tokens.encoder:
            inside = _beside(replace(tokens, kept=None), encoder)
        return self._now(around.instant, inside, tokens.rows, around.component)

    def _encoder(self, arguments: Mapping[str, Any]) -> TokenLayout | ClockUnknown | None:
        """Tokens of the encoder's states that a decoder is given; None where it attends to none."""
        states = arguments.get("encoder_hidden_states")
        if states is None:
            outputs = arguments.get("encoder_outputs")
            states = outputs[0] if isinstance(outputs, tuple | list | Mapping) and outputs else None
        if not isinstance(states, Tensor) or states.dim() != 3:
            return None
        mask = arguments.get("encoder_attention_mask")
        if mask is None and "decoder_input_ids" in arguments:
            mask = arguments.get("attention_mask")
        given, found = self._encoded
        if given[0] is not states or given[1] is not mask:  # the same at every decoding step
            rows, length = states.shape[:2]
            real = real_tokens(mask, rows, 0, length)
            found = real if isinstance(real, ClockUnknown) else _whole(real, rows, length)
            self._encoded = ((states, mask), found)
        return found

    def _unknown(self, why: str, rows: int | None = None) -> Now:
        error = ClockUnknown(why)
        return self._now(error, error, rows)

    def _apart(self, why: str) -> Now:
        """A model within a call, or within generate, that does not work on its rows."""
        around = self.now
        if around is None and not self._generations:
            return self._unknown(why)  # the caller's own batch
        rows = around.batch if around is not None else self._generations[0].rows
        return self._now(ClockUnknown(why), RowsUnknown(why, rows), None)

    def _now(self, instant: Any, tokens: Any, rows: int | None, component: str = "") -> Now:
        states = self._encoded[0][0] if getattr(tokens, "encoder", None) is not None else None
        return Now(
            component,
            "language",
            self.runs,
            instant,
            _COND,
            rows,
            tokens=tokens,
            encoder_states=states,
        )


class _Past:
    """What the latest call outside `generate` left behind."""

    def __init__(
        self,
        total: int | None = None,
        rows: int = 0,
        ids: Tensor | None = None,
        tokens: TokenLayout | ClockUnknown | None = None,
    ):
        self.total = total
        self.rows = rows
        self.ids = ids
        self.tokens = tokens
        self.cache: Any = None
        self.prompt: int | None = None

    def grows(self, ids: Tensor | None) -> bool:
        """Whether these tokens are the earlier ones with one more, as decoding without a cache."""
        earlier = self.ids
        return (
            ids is not None
            and earlier is not None
            and ids.shape[0] == earlier.shape[0]
            and ids.shape[1] == earlier.shape[1] + 1
            and torch.equal(ids[:, :-1], earlier)
        )


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


def reads_text(model: nn.Module) -> bool:
    """Whether a model of transformers that takes tokens is in a module."""
    return any(
        _is_pretrained(type(each)) and "input_ids" in names_of(type(each).forward)
        for each in model.modules()
    )


def _is_pretrained(kind: type) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in kind.__mro__)


def _is_encoder_decoder(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and any(
        name.startswith("decoder_") for name in names_of(type(module).forward)
    )


def _encoders(model: nn.Module) -> set[nn.Module]:
    if not _is_encoder_decoder(model):
        return set()
    try:
        return {model.get_encoder()}  # pyright: ignore[reportCallIssue]
    except (AttributeError, TypeError, NotImplementedError):
        return set()


def _sequence(arguments: Mapping[str, Any], of_decoder: bool) -> Tensor | None:
    """The tokens [rows, tokens] or embeddings [rows, tokens, features] of a call."""
    names = (
        ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        if of_decoder
        else (
            "input_ids",
            "inputs_embeds",
        )
    )
    for name in names:
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value
    return None


def _caches(arguments: Mapping[str, Any]) -> list[Any]:
    """What a call is given of earlier ones, so that their tokens do not come again."""
    return [each for name in _CACHES if (each := arguments.get(name)) is not None]


def _beside(
    tokens: TokenLayout, encoder: TokenLayout | ClockUnknown | None
) -> TokenLayout | ClockUnknown:
    """With the encoder's tokens; where these are unknown, nothing tells the two apart."""
    if isinstance(encoder, ClockUnknown):
        return encoder
    return tokens if encoder is None else replace(tokens, encoder=encoder)


def _kept(chosen: Any, length: int) -> tuple[int, ...] | None:
    """Numbers of the tokens that `logits_to_keep` leaves, indexed as models do; None for all."""
    chosen = slice(-chosen, None) if isinstance(chosen, int) else chosen
    if chosen is None:
        return None
    try:
        found = torch.arange(length)[chosen.cpu() if isinstance(chosen, Tensor) else chosen]
    except (IndexError, TypeError, ValueError):
        return None  # the model says what is wrong with it
    kept = tuple(found.tolist()) if found.dim() == 1 else None
    return None if kept == tuple(range(length)) else kept


def _whole(real: Tensor | None, rows: int, length: int) -> TokenLayout:
    """A layout of one call that has all the tokens there are."""
    prompts = (length,) * rows if real is None else tuple(real.sum(1).tolist())
    return TokenLayout(rows, length, (0,) * rows, real, prompts)


def _instant(step: int) -> Instant:
    return Instant(step, math.nan, None, math.nan, 0)


def _held(cache: Any) -> int | None:
    """Tokens that a cache of keys and values holds; None where it does not say."""
    length = getattr(cache, "get_seq_length", None)
    if length is not None:
        try:
            return int(length())
        except (ValueError, TypeError, NotImplementedError):
            return None
    if isinstance(cache, tuple) and cache and isinstance(cache[0], tuple):
        return int(cache[0][0].shape[-2])
    return None
