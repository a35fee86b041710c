"""Running a language model on rows of prompts."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dreamreader._progress import ProgressCallback, ProgressEvent
from dreamreader.engine._cache import Cache
from dreamreader.engine._decoding import (
    Decoding,
    check,
    check_length,
    explain_errors,
    plan_decoding,
)
from dreamreader.engine._firing import FiringReport
from dreamreader.engine._logits import contiguous_head
from dreamreader.engine._padding import decoder_start, position_arguments
from dreamreader.engine._prompts import TextReader, pad, tokenize
from dreamreader.engine._recorder import Memory
from dreamreader.engine._result import RunResult, merged
from dreamreader.engine._rows import RowPlan
from dreamreader.engine._session import Session
from dreamreader.engine._subject import Subject, is_encoder_decoder
from dreamreader.engine._threads import GENERATORS
from dreamreader.errors import InvalidInput

_DECODER = ("decoder_input_ids", "decoder_attention_mask")  # one entry for each row
FORWARD = frozenset({"logits_to_keep", "add_special_tokens", *_DECODER})  # all else is for generate


def run_language(
    reader: TextReader,
    subject: Subject,
    plan: RowPlan,
    opened: Callable[..., Session],
    batch_size: int | None,
    memory_limit: int | None,
    arguments: dict[str, Any],
    report_progress: ProgressCallback,
) -> RunResult:
    """Forward (no arguments, or those of a forward) or generate (with others) over rows.

    All batches are padded to the longest prompt of the run, so that a row's positions do not
    depend on its batch. Where tokens are drawn, rows run one by one, each from its own seed.

    Args:
        opened: makes the session of rows `start` to `stop`.
    """
    model = reader.subject
    ids, notes = tokenize(reader, plan.prompts, arguments.pop("add_special_tokens", None))
    inputs = pad(reader, ids)
    for name in _DECODER:
        inputs |= {name: arguments.pop(name)} if name in arguments else {}
    _check_rows(inputs, len(plan))
    check(arguments)
    check_length(model, inputs["input_ids"].shape[1], arguments)
    forward = not arguments.keys() - FORWARD
    decoding = None if forward else plan_decoding(model, arguments, len(plan))
    fixed = position_arguments(subject, inputs, generates=not forward)
    if forward and "decoder_input_ids" not in inputs:
        fixed |= decoder_start(model, len(plan))
    inputs |= fixed
    draws = decoding is not None and decoding.draws
    size = 1 if decoding is not None and decoding.alone else batch_size or len(plan)
    if len(plan) > 1 and decoding is not None and decoding.alone and not draws:
        notes.append(f"the rows ran one by one: {decoding.alone}")
    if len(plan) > size and arguments.get("past_key_values") is not None:
        raise InvalidInput("past_key_values is one cache and serves one batch: leave it out")
    length = None if is_encoder_decoder(model) else inputs["input_ids"].shape[1]
    outputs: list[Any] = []
    found, report = [], FiringReport(notes=notes)
    memory = Memory(memory_limit)  # of all batches together
    report_progress(ProgressEvent("rows", 0, len(plan)))
    for start in range(0, len(plan), size):
        stop = min(start + size, len(plan))
        part = {name: value[start:stop] for name, value in inputs.items()}
        session = opened(start, stop, memory, length)
        own = GENERATORS if draws else nullcontext()  # the global one serves one run at a time
        quick = contiguous_head(model)
        with own, session, quick, torch.no_grad(), torch.random.fork_rng(enabled=draws):
            if draws:
                torch.manual_seed(plan.seeds[start])
            if forward:
                outputs.append(model(**part, **arguments))
            else:
                with explain_errors():
                    outputs.append(model.generate(**part, **arguments))
        found.append(session.activations(plan.rows))
        report.merge(session.report)
        report_progress(ProgressEvent("rows", stop, len(plan)))
    report.require_hits()
    output, text = _together(outputs, reader.tokenizer, length or 0, decoding)
    return RunResult(output, Cache(merged(found)), report, tuple(plan.rows), text)


def _check_rows(inputs: dict[str, Any], rows: int) -> None:
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != rows:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(f"{name}: a tensor [{rows} rows, tokens] is needed, got {shape}")


def _together(
    outputs: list[Any], tokenizer: Any, prompt: int, decoding: Decoding | None
) -> tuple[Any, list[str] | None]:
    """Results of all batches as one; generated tokens also as text, the prompt left out."""
    first = outputs[0]
    if decoding is None:
        if len(outputs) == 1:
            return first, None
        return type(first)(logits=torch.cat([each.logits for each in outputs])), None
    tokens = [getattr(each, "sequences", each) for each in outputs]
    text = [
        each
        for part in tokens
        for each in tokenizer.batch_decode(part[:, prompt:], skip_special_tokens=True)
    ]
    if len(outputs) == 1:
        return first, text
    longest = max(each.shape[1] for each in tokens)
    if any(each.shape[1] < longest for each in tokens):
        pad = tokenizer.pad_token_id if decoding.pad is None else decoding.pad
        if pad is None:
            raise InvalidInput(
                "the rows wrote texts of different length, and nothing says which token fills the "
                "shorter ones: set tokenizer.pad_token, or run them apart"
            )
        tokens = [
            torch.nn.functional.pad(each, (0, longest - each.shape[1]), value=pad)
            for each in tokens
        ]
    return torch.cat(tokens), text
