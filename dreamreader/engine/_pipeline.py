"""Running a diffusers pipeline on rows of prompts, in batches."""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import is_dataclass
from typing import Any

import torch

from dreamreader._progress import ProgressCallback, ProgressEvent, pipeline_steps
from dreamreader.engine._cache import Cache
from dreamreader.engine._clock_run import own_class
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._families.per_row import TEXTS, needs_one_row
from dreamreader.engine._firing import FiringReport
from dreamreader.engine._recorder import Memory
from dreamreader.engine._refusal import refusals
from dreamreader.engine._request import Record
from dreamreader.engine._result import RunResult, merged
from dreamreader.engine._rows import RowPlan, repeat_rows, split
from dreamreader.engine._seeds import GlobalDraw, seed_generators, watch_generators
from dreamreader.engine._session import Session
from dreamreader.engine._stream import Stream
from dreamreader.engine._threads import GENERATORS
from dreamreader.engine._watch import Watch
from dreamreader.errors import InvalidInput, UnknownName

Records = Sequence[Record | Watch | Stream]

# fields of the output of a pipeline that hold what it made of each row, the first there is
_MADE = ("images", "frames", "videos", "audios", "image_embeddings", "image_embeds")
_COUNTS = ("num_inference_steps", "height", "width", "num_frames")
# the code of diffusers that checks arguments, not that of models
_CHECKS = ("diffusers/pipelines/", "diffusers/schedulers/", "diffusers/image_processor.py")
_CHECKS += ("diffusers/video_processor.py", "diffusers/guiders/")


def run_pipeline(
    pipe: Any,
    plan: RowPlan,
    edits: Sequence[EditRequest],
    records: Records,
    opened: Callable[..., Session],
    batch_size: int | None,
    memory_limit: int | None,
    arguments: dict[str, Any],
    report_progress: ProgressCallback,
) -> RunResult:
    """Run the pipeline on every row, `batch_size` rows together.

    A batch of several rows ends at the first draw from a generator that they share, and its rows
    run one by one from there on. Runs in several threads wait for each other.

    Args:
        opened: makes the session of rows `start` to `stop`.

    Raises:
        InvalidInput: an argument that cannot be split, or rows that cannot be run again.
    """
    rows = len(plan)
    arguments = _arguments(pipe, arguments, rows)
    size = batch_size or rows
    made, found, report = [], [], FiringReport()
    memory = Memory(memory_limit)  # of all batches together
    if size > 1 and rows > 1 and needs_one_row(own_class(pipe)):
        report.notes.append(
            f"{own_class(pipe).__name__} cuts its texts to the longest of a batch, which changes "
            "the pictures of the others: rows ran one by one"
        )
        size = 1
    _check_batches(pipe, arguments, size, rows)
    start, reached = 0, 0.0

    def follow(step: int, steps: int | None) -> None:
        """Rows run together are done in part; several bars in one call do not count back."""
        nonlocal reached
        reached = max(reached, start + (stop - start) * min(step / steps, 1) if steps else 0)
        note = f"step {step} of {steps}" if steps else f"step {step}"
        report_progress(ProgressEvent("rows", round(reached, 2), rows, note=note))

    report_progress(ProgressEvent("rows", 0, rows))
    while start < rows:
        stop = min(start + size, rows)
        held = memory.held
        session = opened(start, stop, memory)
        own = split(pipe, arguments, start, stop, rows)
        try:
            drawing = _randomness(pipe, plan.seeds[start:stop])
            with GENERATORS, pipeline_steps(pipe, follow), drawing as notes, session:
                output = _call(pipe, plan, start, stop, own)
        except GlobalDraw as draw:
            _check_again(draw, pipe, edits, records, arguments, rows)
            report.notes.append(
                f"{draw.who} draws from {draw.what}, which a batch would share: rows ran one by "
                "one, each seeded by itself"
            )
            size, memory.held = 1, held
            continue
        report.notes += [each for each in notes if each not in report.notes]
        made.append(_split_output(output, stop - start, whole=stop - start == rows))
        found.append(session.activations(plan.rows))
        report.merge(session.report)
        start = stop
        report_progress(ProgressEvent("rows", start, rows))
    report.require_hits()
    return RunResult(_join_outputs(made), Cache(merged(found)), report, tuple(plan.rows))


def _randomness(pipe: Any, seeds: Sequence[int]) -> AbstractContextManager[list[str]]:
    return seed_generators(pipe, seeds[0]) if len(seeds) == 1 else watch_generators(pipe, seeds)


def _call(pipe: Any, plan: RowPlan, start: int, stop: int, arguments: dict[str, Any]) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in plan.seeds[start:stop]]
    with refusals(own_class(pipe).__name__, *_CHECKS):
        return pipe(prompt=list(plan.prompts[start:stop]), generator=generators, **arguments)


def _arguments(pipe: Any, arguments: dict[str, Any], rows: int) -> dict[str, Any]:
    """Arguments of the pipeline's call: known names, other prompts as lists.

    Raises:
        UnknownName: the pipeline takes no such argument.
        InvalidInput: an argument that the reader itself sets.
    """
    own = own_class(pipe)
    known = list(inspect.signature(own.__call__).parameters)[1:]
    if "prompt" not in known or "generator" not in known:
        raise InvalidInput(
            f"{own.__name__} takes no prompt with a generator; use recording() and editing()"
        )
    ready = dict(arguments)
    for name, value in arguments.items():
        if name not in known:
            raise UnknownName(f"argument of {own.__name__}", name, known)
        if name in ("prompt", "generator"):
            raise InvalidInput(f"{name} is set by the reader: use prompts and seeds")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(f"{name}={value}: a finite number is needed")
        if name == "latents" and isinstance(value, torch.Tensor) and value.dim() < 3:
            raise InvalidInput(f"latents: values of each row are needed, got {list(value.shape)}")
        if name in _COUNTS and isinstance(value, int | float) and (value < 1 or value % 1):
            raise InvalidInput(f"{name}={value}: a whole number of at least 1 is needed")
        if name.startswith("num_") and name.endswith("_per_prompt") and value not in (None, 1):
            raise InvalidInput(
                f"{name}={value}: every {name.split('_')[1].removesuffix('s')} is a row; give "
                f"seeds=range({value}) or repeat the prompt"
            )
        if name in TEXTS and isinstance(value, str):
            ready[name] = [value] * rows
        elif name in TEXTS and isinstance(value, list | tuple) and value:
            if len(value) not in (1, rows):
                raise InvalidInput(f"{name} has {len(value)} entries, the run has {rows} rows")
            ready[name] = list(value) * (rows // len(value))
    return repeat_rows(pipe, ready, rows)


def _check_batches(pipe: Any, arguments: dict[str, Any], size: int, rows: int) -> None:
    """Refuse before anything is computed what cannot be split or joined again."""
    if size >= rows:
        return
    split(pipe, arguments, 0, size, rows)
    own = own_class(pipe)
    classes = _output_classes(own)
    if classes and not any(set(each.__dataclass_fields__) & set(_MADE) for each in classes):
        raise InvalidInput(
            f"{own.__name__} gives {classes[0].__name__}, whose rows cannot be joined over "
            "batches; leave batch_size out"
        )


def _output_classes(own: type) -> list[Any]:
    """Classes of results that the code of a pipeline's call names."""
    from diffusers.utils import BaseOutput

    call = inspect.unwrap(own.__call__)
    code, names = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    found = [names.get(each) for each in getattr(code, "co_names", ())]
    return [
        each
        for each in found
        if isinstance(each, type) and issubclass(each, BaseOutput) and is_dataclass(each)
    ]


def _check_again(
    draw: GlobalDraw,
    pipe: Any,
    edits: Sequence[EditRequest],
    records: Records,
    arguments: dict[str, Any],
    rows: int,
) -> None:
    """Refuse to run rows again where a function of the caller would be called twice.

    Raises:
        InvalidInput: there is such a function, or an argument cannot be split.
    """
    told = [each.describe() for each in records if isinstance(each, Watch | Stream)]
    told += [each.describe() for each in edits if callable(getattr(each, "fn", None))]
    told += [name for name, value in arguments.items() if callable(value)]
    why = f"{draw.who} draws from {draw.what}, which the rows of a batch share"
    if told:
        raise InvalidInput(
            f"{why}; give batch_size=1, so that every row is seeded by itself (the rows are not "
            f"run again here, as {told[0]} would be called twice)"
        ) from None
    try:
        _check_batches(pipe, arguments, 1, rows)
    except InvalidInput as error:
        raise InvalidInput(f"{why}, so every row needs a run of its own. {error}") from None


def _split_output(output: Any, rows: int, whole: bool) -> Any:
    """What the pipeline made of each row: pictures, videos, sounds or embeddings.

    Raises:
        InvalidInput: it is one of several batches, and has not one entry for each of its rows.
    """
    made = next((got for name in _MADE if (got := getattr(output, name, None)) is not None), None)
    if made is None:
        made = output[0] if isinstance(output, tuple) and output else output
    try:
        entries = len(made)
    except TypeError:
        entries = None
    if not whole and entries != rows:
        raise InvalidInput(
            f"the pipeline gave {type(made).__name__} of {entries} entries for a batch of {rows} "
            "rows, so batches cannot be joined; leave batch_size out"
        )
    return made


def _join_outputs(made: list[Any]) -> Any:
    """What all batches made, in the order of the rows.

    Raises:
        InvalidInput: the batches gave values of different sizes or types.
    """
    first = made[0]
    if len(made) == 1:
        return first
    if isinstance(first, list):
        return [each for batch in made for each in batch]
    try:
        if isinstance(first, torch.Tensor):
            return torch.cat(made)
        import numpy

        return numpy.concatenate(made)
    except (RuntimeError, TypeError, ValueError) as error:
        sizes = ", ".join(str(list(getattr(each, "shape", ()))) for each in made)
        raise InvalidInput(
            f"the batches gave {type(first).__name__}s of sizes {sizes}, which cannot be joined; "
            "use one batch"
        ) from error
