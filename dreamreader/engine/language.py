"""Running a language model on rows of prompts."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreamreader.engine.cache import Cache
from dreamreader.engine.firing import FiringReport
from dreamreader.engine.request import EditRequest, Record, Stream, Watch
from dreamreader.engine.rows import Plan
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from dreamreader.engine.reader import Reader, RunResult


def run_language(
    reader: "Reader",
    plan: Plan,
    edits: Sequence[EditRequest],
    records: Sequence[Record | Watch | Stream],
    batch_size: int | None,
    memory_limit: int | None,
    arguments: dict[str, Any],
) -> "RunResult":
    """Forward (no arguments, or logits_to_keep) or generate (with others) over rows.

    All batches are padded on the left to the longest prompt of the run, so that a row's positions
    do not depend on its batch. Sampling runs row by row, each from its own seed.
    """
    from dreamreader.engine.reader import RunResult, merged

    model = reader.subject
    inputs = encoded(reader, list(plan.prompts))
    sampling = bool(arguments.get("do_sample"))
    size = 1 if sampling else batch_size or len(plan)
    outputs: list[Any] = []
    found, report = [], FiringReport()
    length = inputs["input_ids"].shape[1]
    for start in range(0, len(plan), size):
        stop = min(start + size, len(plan))
        part = {name: value[start:stop] for name, value in inputs.items()}
        session = reader._session(edits, records, plan, start, stop, memory_limit, length)
        with session, torch.no_grad(), torch.random.fork_rng(enabled=sampling):
            if sampling:
                torch.manual_seed(plan.seeds[start])
            if arguments.keys() - {"logits_to_keep"}:
                outputs.append(model.generate(**part, **arguments))
            else:
                outputs.append(model(**part, **_positions(model, part), **arguments))
        found.append(session.activations(plan.rows))
        report.merge(session.report)
    output, text = _together(outputs, reader.tokenizer, length)
    return RunResult(output, Cache(merged(found)), report, tuple(plan.rows), text)


def _positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions that do not count padding; a plain forward of GPT-2 would count it."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def encoded(reader: "Reader", prompts: list[str]) -> dict[str, Tensor]:
    """Tokens of prompts and their mask, both [rows, tokens], padded on the left."""
    tokenizer = reader.tokenizer
    if tokenizer is None:
        raise InvalidInput("prompts as strings need a tokenizer: Reader(model, tokenizer)")
    several = len(prompts) > 1
    side = tokenizer.padding_side
    if several and tokenizer.pad_token_id is None:
        raise InvalidInput("several prompts need padding: set tokenizer.pad_token")
    try:
        tokenizer.padding_side = "left"
        cut = {"truncation": True, "max_length": most} if (most := reader.max_tokens) else {}
        found = tokenizer(prompts, return_tensors="pt", padding=several, **cut)
    finally:
        tokenizer.padding_side = side
    if found["input_ids"].shape[1] == 0:
        raise InvalidInput("the prompts have no tokens")
    device = reader.subject.device
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


def check_lengths(reader: "Reader", prompts: list[str]) -> None:
    """Refuse prompts of different lengths, where all of their tokens are recorded.

    Raises:
        InvalidInput: padding would count among the tokens of the shorter ones.
    """
    counts = encoded(reader, prompts)["attention_mask"].sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least < most:
        raise InvalidInput(
            f"tokens: the prompts have {least} to {most} tokens, and padding would count among "
            "those of the shorter ones; choose tokens that all have, such as -1, the last"
        )


def _together(outputs: list[Any], tokenizer: Any, prompt: int) -> tuple[Any, list[str] | None]:
    """Results of all batches as one; generated tokens also as text."""
    first = outputs[0]
    generated = [getattr(each, "sequences", each) for each in outputs]
    if all(isinstance(each, Tensor) for each in generated):
        longest = max(each.shape[1] for each in generated)
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        padded = [
            torch.nn.functional.pad(each, (0, longest - each.shape[1]), value=fill)
            for each in generated
        ]
        tokens = torch.cat(padded)
        text = tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)
        return (first if len(outputs) == 1 else tokens), text
    if len(outputs) == 1:
        return first, None
    return type(first)(logits=torch.cat([each.logits for each in outputs])), None
