"""Calls of a denoiser kept from a run, to be made again for any rows and steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader._progress import Progress, part_of, show_progress
from dreamreader.engine import DenoiserCall, Evaluation, Reader, pick
from dreamreader.errors import InvalidInput, UnknownName

Path = tuple[str, ...]

_SAMPLE = ("sample", "hidden_states", "x")
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb")  # positions: no axis of rows


@dataclass(eq=False)
class Calls:
    """What a denoiser was called with, for the rows of one branch of a run.

    Attributes:
        denoiser: the module. sample: name of its latents. order: of its arguments.
        moments: time of each call, in order.
        moving: arguments that change from call to call, [rows, calls, ...]; the latents among them.
        still: arguments of each row that do not, [rows, ...]: the prompt's embeddings.
        listed: arguments with a list entry for each row. constant: all else.
    """

    denoiser: nn.Module
    sample: str
    order: tuple[Path, ...]
    moments: tuple[DenoiserCall, ...]
    moving: dict[Path, Tensor]
    still: dict[Path, Tensor]
    listed: dict[Path, list[Any]]
    constant: dict[Path, Any]

    @property
    def rows(self) -> int:
        return len(self.latents)

    @property
    def latents(self) -> Tensor:
        """[rows, calls, ...] of the denoiser's input."""
        return self.moving[(self.sample,)]

    def select(self, numbers: Sequence[int]) -> "Calls":
        """Some of the calls, by number, in that order."""
        moving = {path: value[:, list(numbers)] for path, value in self.moving.items()}
        return replace(self, moments=tuple(self.moments[n] for n in numbers), moving=moving)

    def with_latents(self, latents: Tensor) -> "Calls":
        """The calls with other latents, [rows, calls, ...]."""
        return replace(self, moving=self.moving | {(self.sample,): latents})

    def steps(self, moments: Tensor) -> list[int]:
        """The scheduler's step of calls given by their numbers."""
        return [self.moments[number].step for number in moments.tolist()]

    def __call__(self, rows: Tensor, moments: Tensor, latents: Tensor | None = None) -> Tensor:
        """The denoiser's prediction for rows, each at its own call; gradients flow where wanted.

        Args:
            rows, moments: int64 [n]. latents: [n, ...] in place of those of the run.
        """
        device = self.latents.device
        rows, moments = rows.to(device), moments.to(device)
        found: dict[Path, Any] = dict(self.constant)
        found |= {path: value[rows, moments] for path, value in self.moving.items()}
        found |= {path: value[rows] for path, value in self.still.items()}
        found |= {path: [value[n] for n in rows.tolist()] for path, value in self.listed.items()}
        if latents is not None:
            found[(self.sample,)] = latents
        arguments = _nest({path: found[path] for path in self.order})
        return pick(self.denoiser(**arguments), None, type(self.denoiser).__name__)


def record_calls(
    reader: Reader,
    prompts: Sequence[str],
    *,
    seeds: int | Sequence[int] = 0,
    branch: str | None = "cond",
    batch_size: int = 16,
    progress: Progress = True,
    **arguments: Any,
) -> Calls:
    """Runs prompts and keeps what the denoiser is called with in one branch.

    Args:
        reader: of a pipeline with one denoiser.
        prompts, seeds: rows, as in `Reader.run`.
        branch: guidance branch; None for all, the rows of one branch after those of another, as
            `branches` of the calls' moments name them.
        batch_size: rows computed together.
        progress: as in `Reader.run`.
        arguments: of the pipeline, such as `num_inference_steps`.

    Raises:
        InvalidInput: the reader has no pipeline, it has several denoisers, prompts have
            embeddings of different lengths, or branches are called at different steps.
        UnknownName: the run has no such branch.
    """
    listed = list(prompts)
    numbers = row_seeds(seeds, len(listed))
    asked: dict[str, Any] = {"output_type": "latent"} | arguments
    parts: dict[str, list[_CallBatch]] = {}
    with show_progress(progress) as report:
        for start in range(0, len(listed), batch_size):
            chosen = slice(start, start + batch_size)
            recorder = _BranchRecorders(branch)
            own = {"seeds": numbers[chosen], "progress": part_of(report, start, len(listed))}
            with reader.replay(before=recorder.keep):
                reader.run(listed[chosen], **own, **asked)
            for name, each in recorder.recorders.items():
                parts.setdefault(name, []).append(each.batch(len(listed[chosen])))
    if branch is not None:
        return _join(parts[branch])
    counts = {name: len(of_branch[0].moments) for name, of_branch in parts.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count} times" for name, count in counts.items())
        raise InvalidInput(f"the denoiser's branches are called at different steps: {said}")
    found = _join([batch for of_branch in parts.values() for batch in of_branch])
    return replace(found, moments=tuple(replace(m, branches=tuple(parts)) for m in found.moments))


@dataclass(eq=False)
class _CallBatch:
    denoiser: nn.Module
    moments: list[DenoiserCall]
    arguments: list[dict[Path, Any]]


class CallRecorder:
    """Keeps the calls of a pipeline's denoisers in one branch."""

    def __init__(self, branch: str):
        self.branch = branch
        self.kept: list[tuple[nn.Module, DenoiserCall, dict[Path, Any]]] = []
        self.branches: dict[str, None] = {}

    def keep(self, call: Evaluation) -> None:
        moment = call.moment
        self.branches.update(dict.fromkeys(moment.branches))
        if self.branch in moment.branches:
            flat = _flat(call.arguments)
            self.kept.append((call.module, moment, _of_branch(flat, moment, self.branch)))

    def batch(self, rows: int) -> _CallBatch:
        if not self.kept:
            raise UnknownName("branch", self.branch, self.branches, "The run had no call of it")
        modules = {id(module) for module, _, _ in self.kept}
        if len(modules) > 1:
            raise InvalidInput(
                f"{len(modules)} denoisers ran; calls of one alone can be made again"
            )
        return _CallBatch(
            self.kept[0][0], [each for _, each, _ in self.kept], [each for *_, each in self.kept]
        )


class _BranchRecorders:
    """Keeps the calls in one branch, or in every branch that there is."""

    def __init__(self, branch: str | None):
        self.all = branch is None
        self.recorders = {} if branch is None else {branch: CallRecorder(branch)}

    def keep(self, call: Evaluation) -> None:
        for name in call.moment.branches if self.all else ():
            self.recorders.setdefault(name, CallRecorder(name))
        for each in self.recorders.values():
            each.keep(call)


def _flat(arguments: Mapping[str, Any], above: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for name, value in arguments.items():
        path = (*above, name)
        found |= _flat(value, path) if isinstance(value, dict) and value else {path: value}
    return found


def _nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in flat.items():
        at = found
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = value
    return found


def _of_branch(flat: dict[Path, Any], moment: DenoiserCall, branch: str) -> dict[Path, Any]:
    """The rows of one branch in every argument, tensors as copies."""
    sample = flat[(_sample_name(flat),)]
    batch = len(sample)
    rows = batch // len(moment.branches)
    start = moment.branches.index(branch) * rows

    def part(path: Path, value: Any) -> Any:
        if isinstance(value, Tensor) and path[-1] in ("timestep", "timesteps", "t"):
            value = value.expand(batch) if value.numel() == 1 else value
        per_row = isinstance(value, Tensor) and value.dim() and len(value) == batch
        if per_row and path[-1] not in _SHARED:
            return _PerRow(value[start : start + rows].clone())
        if isinstance(value, list) and len(value) == batch and path[-1] not in _SHARED:
            if any(isinstance(each, Tensor) for each in value):
                raise InvalidInput(
                    f"the denoiser's {'.'.join(path)} is a list of {len(value)} tensors, which "
                    "cannot be told apart by rows"
                )
            return _PerRow(value[start : start + rows])
        return value

    return {path: part(path, value) for path, value in flat.items()}


@dataclass(eq=False)
class _PerRow:
    """A value with an entry for each row."""

    value: Any


def _join(parts: list[_CallBatch]) -> Calls:
    first = parts[0]
    moving: dict[Path, Tensor] = {}
    still: dict[Path, Tensor] = {}
    listed: dict[Path, list[Any]] = {}
    constant: dict[Path, Any] = {}
    for path, value in first.arguments[0].items():
        if not isinstance(value, _PerRow):
            constant[path] = value
        elif isinstance(value.value, list):
            listed[path] = [each for part in parts for each in part.arguments[0][path].value]
        else:
            series = [[call[path].value for call in part.arguments] for part in parts]
            same = path[-1] not in _SAMPLE and all(
                torch.equal(each[0], later) for each in series for later in each[1:]
            )
            into = still if same else moving
            into[path] = _rows(path, [each[0] if same else torch.stack(each, 1) for each in series])
    name = _sample_name(first.arguments[0])
    order, moments = tuple(first.arguments[0]), tuple(first.moments)
    return Calls(first.denoiser, name, order, moments, moving, still, listed, constant)


def _rows(path: Path, parts: list[Tensor]) -> Tensor:
    shapes = {tuple(each.shape[1:]) for each in parts}
    if len(shapes) > 1:
        raise InvalidInput(
            f"the denoiser's {'.'.join(path)} has another shape in each batch ({shapes}): the "
            "prompts have different lengths; raise batch_size to the number of prompts"
        )
    return torch.cat(parts)


def _sample_name(flat: Mapping[Path, Any]) -> str:
    found = next((name for name in _SAMPLE if (name,) in flat), None)
    if found is None:
        names = ", ".join(path[0] for path in flat)
        raise InvalidInput(f"the denoiser has no latents among its arguments: {names}")
    return found


def row_seeds(seeds: int | Sequence[int], rows: int) -> list[int]:
    """One seed for each row; an int s gives row i the seed s + i."""
    numbers = [seeds + row for row in range(rows)] if isinstance(seeds, int) else list(seeds)
    if len(numbers) != rows:
        raise InvalidInput(f"{len(numbers)} seeds for {rows} prompts")
    return numbers
