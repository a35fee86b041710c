"""The Reader: wraps a subject; everything starts from it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreamreader._devices import device_of, dtype_of, move
from dreamreader._progress import Progress, show_progress
from dreamreader.engine import _html as html
from dreamreader.engine._cache import Cache
from dreamreader.engine._clock import Clock
from dreamreader.engine._clock_told import ToldClock
from dreamreader.engine._edit_context import RowSet
from dreamreader.engine._edit_request import EditRequest
from dreamreader.engine._firing import FiringReport
from dreamreader.engine._function import apply_function
from dreamreader.engine._gradients import Leaf, SiteGradient
from dreamreader.engine._language import run_language
from dreamreader.engine._padding import position_arguments
from dreamreader.engine._pipeline import run_pipeline
from dreamreader.engine._prompts import render_chats
from dreamreader.engine._recorder import Memory
from dreamreader.engine._replay import Evaluation, replay_calls
from dreamreader.engine._request import Record
from dreamreader.engine._result import RunResult
from dreamreader.engine._rows import RowPlan, plan_rows, seeds_of
from dreamreader.engine._session import Session
from dreamreader.engine._single_use import single_use
from dreamreader.engine._sites import SiteList, find
from dreamreader.engine._stream import Stream
from dreamreader.engine._subject import Subject
from dreamreader.engine._watch import Watch
from dreamreader.errors import InvalidInput

Recordable = str | Record | Watch | Stream


class Reader:
    """Reads and changes what happens inside a diffusers pipeline, a transformers model or a module.

    The subject is never changed beyond a run: hooks exist only while one runs, and only those of
    the reader are removed.

    Args:
        subject: a diffusers pipeline, a transformers language model, or any `nn.Module`.
        tokenizer: of a language model, for prompts as strings.
        max_tokens: longer prompts of a language model are cut, where its tokenizer cuts them.
        add_special_tokens: whether the tokenizer's start and end tokens are added to prompts. One
            that a prompt has already is not added again, and a chat has those of its template.

    Example:
        >>> reader = Reader(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
        >>> reader.sites("*").names
        ['0', '1']
    """

    def __init__(
        self,
        subject: Any,
        tokenizer: Any = None,
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
    ):
        self._subject = Subject(subject)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.add_special_tokens = add_special_tokens
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def subject(self) -> Any:
        """The wrapped pipeline or model itself."""
        return self._subject.model

    @property
    def kind(self) -> str:
        """What the subject is: `pipeline`, `language` (a language model) or `module`."""
        return self._subject.kind

    @property
    def name(self) -> str:
        """The class of the subject, as its author calls it."""
        return self._subject.name

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The modules at the top: those of a pipeline by name, else the model under an empty one.

        Wrappers of `torch.compile` are looked through.
        """
        return self._subject.components()

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """The denoisers of a diffusers pipeline by component name; empty for other subjects."""
        return Clock(self.subject).denoisers if self.kind == "pipeline" else {}

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Every module by its path, as sites call them."""
        return dict(self._subject.modules())

    def shape_of(self, site: str) -> tuple[int, ...] | None:
        """[rows, tokens, features] that a site had in the latest run; None where it had none."""
        return self._shapes.get(site)

    def to(
        self,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "Reader":
        """Moves the subject in place, as its own `to` does; gives this reader.

        Args:
            device: `cpu`, `cuda`, `cuda:1` and so on; where it is by default.
            dtype: `float32`, `bfloat16`, `float16`, `float64` or one of torch; as it is by default.

        Raises:
            InvalidInput: this torch has no such device, or the subject cannot be moved.
            UnknownName: models do not compute in such a dtype.
        """
        target = None if device is None else device_of(device)
        move(self.subject, target, None if dtype is None else dtype_of(dtype))
        return self

    def sites(self, pattern: str = "**") -> SiteList:
        """Sites that match a pattern, with the shapes seen in the latest run of this reader.

        Raises:
            UnknownName: nothing matches; the message names the nearest sites, or the ports there
                are.
        """
        return find(self._subject.modules(), pattern, self._shapes)

    def run(
        self,
        prompts: str | Sequence[Any],
        edits: EditRequest | Sequence[EditRequest] = (),
        record: Recordable | Sequence[Recordable] = (),
        seeds: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        memory_limit: int | None = None,
        progress: Progress = True,
        **arguments: Any,
    ) -> RunResult:
        """Run the subject on rows of prompts, with edits and recordings.

        Args:
            prompts, seeds: one or one for each row; see `plan_rows`. Every row draws from its own
                generator, so its result does not depend on the batch around it. Where a scheduler
                or module draws from the global generators instead, or from one that it keeps, rows
                run one by one, and a note says so; these generators are left as they were. What
                cannot be seen, and so does not follow the seed, is a generator that a function
                makes for itself at every call, and `numpy.random.seed()` within a run. A list of
                chat messages, `{"role": ..., "content": ...}`, is one prompt of a language model.
            edits: applied in this order.
            record: site strings, `Record`s, `Watch`es or `Stream`s. A recording sees the values
                after the edits.
            batch_size: rows computed together; all by default. An argument of which it is not
                known whether it has one entry for each row is refused where it would be split.
            memory_limit: bytes that the recordings of all batches may hold together.
            progress: shown by default, or a function of a `ProgressEvent` (`rows`, in parts where a
                pipeline counts its steps), or False. A pipeline's own bars are not shown.
            arguments: passed on to the pipeline, or to the model's `generate` where it is a
                language model (its plain forward where none but `logits_to_keep` are given; an
                encoder-decoder then gets its start token, or `decoder_input_ids`). For a language
                model `add_special_tokens` overrides the reader's.

        Raises:
            InvalidInput, UnknownName: an argument cannot be right; nothing is computed then.
            NeverFired: an edit or recording matched nothing.
        """
        edits = _list(edits, EditRequest, "edits")
        records = [
            Record(each) if isinstance(each, str) else each
            for each in _list(record, (str, Record, Watch, Stream), "record")
        ]
        if self._subject.kind == "module":
            raise InvalidInput(
                "run needs a pipeline or language model; use recording() and editing()"
            )
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise InvalidInput(f"batch_size is a whole number of at least 1, got {batch_size!r}")
        if self._subject.kind == "language":
            prompts = render_chats(self.tokenizer, prompts)
        plan = plan_rows(prompts, seeds, edits)
        opened = partial(self._session, edits, records, plan)
        limits = (batch_size, memory_limit)
        with show_progress(progress) as report:
            if self._subject.kind == "language":
                return run_language(self, self._subject, plan, opened, *limits, arguments, report)
            own = (self.subject, plan, edits, records)
            return run_pipeline(*own, opened, *limits, arguments, report)

    def run_with_cache(
        self,
        prompts: str | Sequence[str],
        sites: Recordable | Sequence[Recordable],
        **arguments: Any,
    ) -> tuple[Any, Cache]:
        """Like `run`, recording `sites`; gives (pictures or output, cache)."""
        result = self.run(prompts, record=sites, **arguments)
        return result.output, result.cache

    def run_with_hooks(
        self,
        prompts: str | Sequence[str],
        hooks: Sequence[tuple[str, Callable[..., Any]]],
        **arguments: Any,
    ) -> Any:
        """Run with functions at sites: each gets the values there and gives new ones, or None.

        Args:
            hooks: pairs (site, fn); see `Edit`.
        """
        listed = list(hooks) if isinstance(hooks, Iterable) else [hooks]
        for each in listed:
            if not (isinstance(each, tuple | list) and len(each) == 2 and callable(each[1])):
                raise InvalidInput(f"hooks: pairs (site, function) are needed, got {each!r}")
        own = [_Hook(site, fn) for site, fn in listed]
        edits = [*own, *_list(arguments.pop("edits", ()), EditRequest, "edits")]
        return self.run(prompts, edits=edits, **arguments).output

    @single_use
    def recording(
        self,
        sites: Recordable | Sequence[Recordable],
        steps: Any = None,
        branch: str | Sequence[str] | None = None,
        tokens: Any = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = "cpu",
        memory_limit: int | None = None,
        clock: ToldClock | None = None,
    ) -> Iterator[Cache]:
        """Record while you run the subject yourself; the cache is filled when the block ends.

        Hooks run in the order in which blocks are entered: a recording inside an `editing` block
        sees edited values. Several runs in one block add up as rows. Where a pipeline's denoiser is
        called without a run of the pipeline, `clock` says the time of each call.

        Raises:
            NeverFired: a site was not called in the block.
        """
        common = {
            "steps": steps,
            "branch": branch,
            "tokens": tokens,
            "dtype": dtype,
            "device": device,
        }
        listed = _list(sites, (str, Record, Watch, Stream), "sites")
        records = [Record(each, **common) if isinstance(each, str) else each for each in listed]
        session = Session(
            self._subject,
            records=records,
            memory_limit=memory_limit,
            shapes=self._shapes,
            tokenizer=self.tokenizer,
            clock=clock,
        )
        cache = Cache()
        with session:
            yield cache
        cache._fill(session.activations())

    @single_use
    def editing(
        self,
        edits: EditRequest | Sequence[EditRequest],
        seeds: Sequence[int] | None = None,
        prompt_length: int | None = None,
    ) -> Iterator[FiringReport]:
        """Edit while you run the subject yourself; the report is filled when the block ends.

        Gradients flow through the edits where the caller records them.

        Args:
            edits: applied in this order.
            seeds: of the rows, for edits that draw.
            prompt_length: tokens of a language model's padded prompts, where its calls hold more
                than these: negative token indices count from their end.

        Raises:
            NeverFired: an edit matched nothing in the block.
        """
        listed = _list(edits, EditRequest, "edits")
        own = None if seeds is None else seeds_of(seeds)
        session = Session(
            self._subject,
            listed,
            seeds=own,
            prompt_length=prompt_length,
            shapes=self._shapes,
            tokenizer=self.tokenizer,
        )
        with session:
            yield session.report

    @single_use
    def gradients(
        self,
        sites: str | Sequence[str],
        edits: EditRequest | Sequence[EditRequest] = (),
        *,
        steps: Any = None,
        branch: str | Sequence[str] | None = None,
    ) -> Iterator[dict[str, list[SiteGradient]]]:
        """Keep the gradients at sites of whatever is differentiated in the block.

        Values stay bit for bit. Where nothing before a site wants a gradient, the graph begins
        there, so that parameters need none.

        Args:
            sites: site strings or patterns.
            edits: applied before, so that the values at a site are the edited ones.
            steps, branch: which calls, as in `Record`; all by default.

        Yields:
            By site, the `SiteGradient` of each call in order: `value` and `gradient`, both [batch,
            tokens, features]. A gradient is None until a backward pass reaches it.

        Raises:
            InvalidInput: a site runs while gradients are off.
            NeverFired: a site was not called in the block.

        Example:
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
            >>> with Reader(model).gradients("0") as found:
            ...     model(torch.ones(1, 2)).sum().backward()
            >>> torch.equal(found["0"][0].gradient.flatten(), model[1].weight.flatten())
            True
        """
        leaf = Leaf(sites, steps=steps, branch=branch)
        with self.editing([*_list(edits, EditRequest, "edits"), leaf]):
            yield leaf.found

    @single_use
    def replay(
        self,
        after: Callable[[Evaluation, Any], Any] | None = None,
        *,
        before: Callable[[Evaluation], None] | None = None,
        denoiser: str | None = None,
    ) -> Iterator[Clock]:
        """Hand on every call of a pipeline's denoisers in the block, to be kept or made again.

        An `Evaluation` has the call's arguments, time and branches; `again()` evaluates the
        denoiser once more beside the run, with or without the edits of this reader, and
        `gradient()` as far as a site. No such evaluation is recorded, reported or counted.

        Args:
            after: called as `after(call, output)` when a call is over, behind all edits and
                recordings; gives another output, or None to leave it.
            before: called as `before(call)` when it begins.
            denoiser: of this component alone; of all by default.

        Yields:
            The clock of the pipeline, which knows its schedule.

        Raises:
            InvalidInput: the subject is no pipeline, or has no such denoiser; or a call was asked
                for something after it was over.

        Example:
            >>> times = []
            >>> with reader.replay(before=lambda call: times.append(call.moment.step)):
            ...     reader.run("a red circle")                          # doctest: +SKIP
        """
        with replay_calls(self._subject, before, after, denoiser) as clock:
            yield clock

    def position_arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Arguments with which the padding of a language model's inputs does not count.

        Args:
            inputs: `input_ids` and `attention_mask`, [rows, tokens].

        Returns:
            `position_ids` where the model needs them; empty where it does not.

        Raises:
            InvalidInput: the model counts padding, whatever the positions.
        """
        return position_arguments(self._subject, inputs)

    def __repr__(self) -> str:
        parts = [
            f"{name} ({type(each).__name__})"
            for name, each in self._subject.components().items()
            if name
        ]
        return f"Reader of {self._subject.name}" + (f": {', '.join(parts)}" if parts else "")

    def _repr_html_(self) -> str:
        rows = [
            (name or self._subject.name, type(each).__name__, f"{_size(each):,}")
            for name, each in self._subject.components().items()
        ]
        return html.table(
            ("component", "class", "parameters"), rows, f"Reader of {self._subject.name}"
        )

    def _session(
        self,
        edits: Sequence[EditRequest],
        records: Sequence[Record | Watch | Stream],
        plan: RowPlan,
        start: int,
        stop: int,
        memory_limit: int | Memory | None,
        prompt_length: int | None = None,
    ) -> Session:
        return Session(
            self._subject,
            edits,
            records,
            rowset=RowSet(len(plan), start, stop - start),
            prompts=plan.prompts,
            seeds=plan.seeds,
            prompt_length=prompt_length,
            memory_limit=memory_limit,
            shapes=self._shapes,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True, eq=False)
class _Hook(EditRequest):
    """A function at a site, from `run_with_hooks`."""

    fn: Callable[..., Any]
    is_function = True

    @property
    def changes_with_step(self) -> bool:
        return True

    def apply(self, x: Tensor, place: Any) -> Tensor:
        return apply_function(self.fn, x, place, "hook")


def _list(value: Any, kinds: Any, name: str) -> list[Any]:
    if not isinstance(value, kinds) and not hasattr(value, "__iter__"):
        raise InvalidInput(f"{name}: got {type(value).__name__} {value!r}")
    listed = [value] if isinstance(value, kinds) else list(value)
    for each in listed:
        if not isinstance(each, kinds):
            raise InvalidInput(f"{name}: got {type(each).__name__} {each!r}")
    return listed


def _size(module: torch.nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
