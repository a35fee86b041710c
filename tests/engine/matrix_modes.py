"""Ways to run a language model, each with the calls that the model gets, written down by hand."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from oracle.positions import Call, Layout
from torch import Tensor, nn

LENGTHS, WIDTH = (3, 6), 6
WRITTEN = 3  # tokens that generate writes: the prompt's call and two more
ROWS = tuple(tuple(range(5 + 7 * row, 5 + 7 * row + n)) for row, n in enumerate(LENGTHS))
PROMPTS = [" ".join(f"w{token}" for token in row) for row in ROWS]


# modes that every class is checked in; the others are ways to say the same to the same model
CORE = (
    "plain",
    "left-padded",
    "right-padded",
    "generate",
    "static cache",
    "beams",
    "run",
    "run, written",
)


@dataclass(frozen=True)
class Mode:
    """How a model is run.

    Args:
        layouts: of the whole model, or of its `encoder` and `decoder`.
        inputs: what the model is called with; None lets `Reader.run` make it of `PROMPTS`.
        settings: of generate; None is the plain forward.
        wrap: what the user has around the model.
        prefix: of module paths, from the wrapper.
        inner: the base model is called, not the one with a head.
    """

    name: str
    layouts: Mapping[str, Layout]
    inputs: dict[str, Any] | None
    settings: dict[str, Any] | None = None
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda model: model)
    prefix: str = ""
    inner: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Of generate, or none for a plain forward."""
        if self.settings is None:
            return {}
        logits = {"output_logits": True, "return_dict_in_generate": True}
        return {"max_new_tokens": WRITTEN, "do_sample": False, **logits, **self.settings}

    def call(self, model: Any) -> Any:
        """Run the model on `inputs`."""
        assert self.inputs is not None
        if self.settings is not None:
            return model.generate(**self.inputs, **self.arguments)
        return (model.base_model if self.inner else model)(**self.inputs)


def batch(side: str, lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH) -> dict[str, Tensor]:
    """Token ids and mask, [rows, width]."""
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(lengths):
        own = slice(width - count, width) if side == "left" else slice(0, count)
        ids[row, own] = torch.arange(count) + 5 + 7 * row
        mask[row, own] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _whole(lengths: tuple[int, ...], side: str = "left", width: int = WIDTH) -> Layout:
    return Layout(lengths, width, side, (Call(0, range(width)),))


def _written(lengths: tuple[int, ...], width: int, beams: int = 1, cached: bool = True) -> Layout:
    """Of generate: the prompt, then a column at a time, or all of them without a cache."""
    calls = [Call(0, range(width))]
    for step in range(1, WRITTEN):
        end = width + step
        calls.append(Call(step, range(end - 1 if cached else 0, end)))
    return Layout(lengths, width, "left", tuple(calls), beams)


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _adapted(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear")
    return get_peft_model(copy.deepcopy(model), config).eval()  # type: ignore[arg-type]


STATIC = {"cache_implementation": "static", "disable_compile": True}
BEAMS = {"num_beams": 2}
PEFT = "base_model.model."


def causal_modes(embed: Callable[[Tensor], Tensor], cached: bool = True) -> list[Mode]:
    """Modes of a decoder.

    Args:
        embed: gives the embeddings of token ids.
        cached: whether the model itself keeps what it has read.
    """
    left, right, even = batch("left"), batch("right"), batch("left", (WIDTH, WIDTH))
    padded, written = {"": _whole(LENGTHS)}, {"": _written(LENGTHS, WIDTH, cached=cached)}
    beams = {"": _written(LENGTHS, WIDTH, 2, cached)}
    mask = left["attention_mask"]
    embedded = {"inputs_embeds": embed(left["input_ids"]), "attention_mask": mask}
    seen = mask[:, None, None, :].bool() & torch.ones(WIDTH, WIDTH).tril().bool()
    square = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    lonely = square.masked_fill(torch.eye(WIDTH).bool(), 0)  # where padding sees itself
    uncached = {"": _written(LENGTHS, WIDTH, cached=False)}
    calls = (Call(0, range(5)), Call(0, range(5, WIDTH)), *written[""].calls[1:])
    return [
        Mode("plain", {"": _whole((WIDTH, WIDTH))}, {"input_ids": even["input_ids"]}),
        Mode("left-padded", padded, left),
        Mode("right-padded", {"": _whole(LENGTHS, "right")}, right),
        Mode("generate", written, left, {}),
        Mode("static cache", written, left, STATIC),
        Mode("beams", beams, left, BEAMS),
        Mode("run", padded, None),
        Mode("run, written", written, None, {}),
        Mode("run, static cache", written, None, STATIC),
        Mode("run, beams", beams, None, BEAMS),
        Mode("no cache", uncached, left, {"use_cache": False}),
        Mode("bool mask", padded, {**left, "attention_mask": mask.bool()}),
        Mode("float mask", padded, {**left, "attention_mask": mask.float()}),
        Mode("4-D mask", padded, {**left, "attention_mask": square}),
        Mode("4-D mask, diagonal", padded, {**left, "attention_mask": lonely}),
        Mode("embeddings", padded, embedded),
        Mode("inner model", padded, left, inner=True),
        Mode("chunks", {"": replace(written[""], calls=calls)}, left, {"prefill_chunk_size": 5}),
        Mode("compiled", padded, left, None, _compiled),
        Mode("compiled, written", written, left, {}, _compiled),
        Mode("adapters", padded, left, None, _adapted, PEFT),
        Mode("adapters, written", written, left, {}, _adapted, PEFT),
    ]


def seq2seq_modes(embed: Callable[[Tensor], Tensor]) -> list[Mode]:
    """Modes of an encoder with a decoder; the decoder's batch is padded on the same side."""

    def both(side: str) -> dict[str, Any]:
        target = batch(side, (3, 5), 5)
        names = {"decoder_" + name: value for name, value in target.items()}
        return {**batch(side), **names}

    def padded(side: str) -> dict[str, Layout]:
        return {"encoder": _whole(LENGTHS, side), "decoder": _whole((3, 5), side, 5)}

    def written(beams: int = 1, cached: bool = True) -> dict[str, Layout]:
        decoder = _written((1,) * len(LENGTHS), 1, beams, cached)
        return {"encoder": _whole(LENGTHS, "right"), "decoder": decoder}

    even, right = batch("left", (WIDTH, WIDTH))["input_ids"], batch("right")
    same = {"encoder": _whole((WIDTH, WIDTH)), "decoder": _whole((5, 5), "left", 5)}
    embedded = both("right")
    embedded["inputs_embeds"] = embed(embedded.pop("input_ids"))
    return [
        Mode("plain", same, {"input_ids": even, "decoder_input_ids": even[:, :5]}),
        Mode("left-padded", padded("left"), both("left")),
        Mode("right-padded", padded("right"), both("right")),
        Mode("generate", written(), right, {}),
        Mode("static cache", written(), right, STATIC),
        Mode("beams", written(beams=2), right, BEAMS),
        Mode("run", {**written(), "decoder": _whole((1, 1), width=1)}, None),
        Mode("run, written", written(), None, {}),
        Mode("run, static cache", written(), None, STATIC),
        Mode("run, beams", written(beams=2), None, BEAMS),
        Mode("no cache", written(cached=False), right, {"use_cache": False}),
        Mode("embeddings", padded("right"), embedded),
        Mode("compiled", padded("right"), both("right"), None, _compiled),
        Mode("compiled, written", written(), right, {}, _compiled),
        Mode("adapters", padded("right"), both("right"), None, _adapted, PEFT),
        Mode("adapters, written", written(), right, {}, _adapted, PEFT),
    ]
