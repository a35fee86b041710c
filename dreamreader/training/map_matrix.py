"""Maps between all sites of two models, from a spec file."""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dreamreader._progress import ProgressEvent
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput
from dreamreader.jobs import fingerprint, hash_weights
from dreamreader.jobs.fingerprint import portable
from dreamreader.jobs.job import REPORT, RunUnit, SpecJob, Work
from dreamreader.jobs.subject import describe_subject
from dreamreader.mapping import MomentMatrix, correlate_success, fit_map, score_map
from dreamreader.recording import Pairs, record_between
from dreamreader.recording.pairs import in_denoiser
from dreamreader.specs.data import read_items
from dreamreader.specs.parts import Subject
from dreamreader.specs.subject import (
    call_settings,
    forward_settings,
    is_language,
    open_subject,
    with_padding,
)
from dreamreader.training.folder import RESULT, TrainingFolder
from dreamreader.training.map_matrix_page import best_pairs, write_report
from dreamreader.training.map_matrix_spec import MapMatrixSpec
from dreamreader.training.map_matrix_state import FOLDS, STATES, read_state, write_state
from dreamreader.training.map_matrix_success import Success, read_success

SCORES = ("fvu", "fvu_scalar", "r2", "cosine", "cka_source", "cka", "retrieval")


@dataclass(frozen=True)
class MatrixPlan:
    """What a matrix of maps will take.

    Attributes:
        source, target: sites of each model.
        units: of each, what its prompts are for and their numbers.
        prompts: how many fit, choose and score. seeds: each is run with so many.
    """

    source: Sequence[str]
    target: Sequence[str]
    units: Sequence[tuple[str, Sequence[int]]]
    prompts: Mapping[str, int]
    seeds: int

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} to {name}" for name, count in self.prompts.items())
        return "\n".join(
            [
                f"sites    {len(self.source)} of the source, {len(self.target)} of the target",
                f"maps     {len(self.source) * len(self.target):,} from one recording of both",
                f"prompts  {counts}; {self.seeds:,} seeds each",
                f"units    {len(self.units):,} recordings",
            ]
        )


class MapMatrixJob(SpecJob[MapMatrixSpec]):
    """Fits and scores maps from all sites of one model to all sites of another.

    Both models are recorded once, a few prompts at a time; moments of all pairs of sites are summed
    meanwhile, and maps are fitted to them in closed form.

    Args:
        spec: a `MapMatrixSpec`, or its content as a mapping; or give the fields by name.
        reader, target: subjects of your own; the spec then only names them.
        home: what a relative file is meant from.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> job = MapMatrixJob.from_file("examples/mapping/matrix.yaml")
        >>> found = job.run("matrix")  # doctest: +SKIP
        >>> found["pairs"][0]["fvu"]  # doctest: +SKIP
    """

    kind, model, folder_type = "map-matrix", MapMatrixSpec, TrainingFolder
    counts = "recordings"

    def __init__(self, *args: Any, target_reader: Reader | None = None, **more: Any):
        super().__init__(*args, **more)
        self._target = target_reader

    @cached_property
    def readers(self) -> tuple[Reader, Reader]:
        """Source and target, opened at first use."""
        spec = self.spec
        both = ((self._reader, spec.subject), (self._target, spec.target))
        one, other = (with_padding(given or open_subject(named)) for given, named in both)
        if is_language(one) != is_language(other):
            raise InvalidInput(
                f"{spec.subject.model} and {spec.target.model}: a language model and a pipeline "
                "have no calls in common; give two of one kind"
            )
        return one, other

    @cached_property
    def sites(self) -> tuple[list[str], list[str]]:
        """Names of the sites of both models."""
        own = self.spec.sites
        patterns = own, own if self.spec.target_sites is None else self.spec.target_sites
        one, other = (
            list(
                dict.fromkeys(name for each in _listed(given) for name in reader.sites(each).names)
            )
            for reader, given in zip(self.readers, patterns, strict=True)
        )
        return one, other

    @cached_property
    def prompts(self) -> list[str]:
        """The different prompts."""
        return list(dict.fromkeys(item.prompt for item in read_items(self.spec.data)))

    @cached_property
    def success(self) -> Success:
        """Of stitching, by (source, target)."""
        if self.spec.stitching is None:
            return {}
        own = self.spec.stitching
        path = (self._home or Path()) / own.file
        return read_success(path, self.sites, own.effect, self.spec.map, own.harmed)

    def plan(self) -> MatrixPlan:
        """Sites, maps and prompts; nothing is run."""
        self.success  # noqa: B018  a wrong file is told before anything is run
        folds = split_prompts(self.prompts, self.spec)
        units = [
            (name, numbers[start : start + self.spec.unit])
            for name, numbers in folds.items()
            for start in range(0, len(numbers), self.spec.unit)
        ]
        counts = {name: len(numbers) for name, numbers in folds.items()}
        return MatrixPlan(*self.sites, units, counts, len(self.spec.seed_list))

    def open(self) -> None:
        self.success  # noqa: B018  a wrong file is told before anything is run

    def begin(self, folder: TrainingFolder) -> MatrixPlan:
        plan, (source, target) = self.plan(), self.readers
        shown = self.spec.model_dump(mode="json", exclude={"name", "data", "seeds", "batch"})
        settings = {
            "spec": portable(shown),
            "prompts": hashlib.sha256(repr(self.prompts).encode()).hexdigest(),
            "target": {
                "weights": hash_weights(target.subject),
                "subject": describe_subject(target.subject, target.tokenizer),
            },
            "stitching": [[*pair, value] for pair, value in self.success.items()],
        }
        taken = fingerprint(source.subject, settings, self.spec.seed_list, source.tokenizer)
        folder.begin(self.spec, taken, {"units": len(plan.units)})
        return plan

    def units(self, plan: MatrixPlan) -> int:
        return len(plan.units)

    def units_there(self, folder: TrainingFolder, plan: MatrixPlan) -> set[int]:
        if folder.is_complete:
            return set(range(len(plan.units)))
        done = set()
        for fold in FOLDS:
            own = [n for n, (name, _) in enumerate(plan.units) if name == fold]
            state = read_state(folder, fold)
            done |= set(own[: 0 if state is None else state.batches])
        return done

    @contextmanager
    def open_runner(self, work: Work) -> Iterator[RunUnit]:
        folder: TrainingFolder = work.folder
        plan: MatrixPlan = work.plan
        per_unit = self._samples(plan)

        def record_unit(unit: int, room: int | None) -> int:
            fold, numbers = plan.units[unit]
            state = read_state(folder, fold)
            if state is None:
                kept = per_unit if fold == "score" else 0
                state = MomentMatrix(kept, self.spec.split_seed, self.spec.resample)
            state.add(self._record([self.prompts[n] for n in numbers]))
            write_state(folder, fold, state)
            work.advance(1)
            return 0

        yield record_unit

    def finish(self, work: Work) -> None:
        """Fits and scores the map of every pair of sites."""
        folder: TrainingFolder = work.folder
        if folder.is_complete:
            return
        states = [read_state(folder, fold) for fold in FOLDS]
        fit, choose, score = (each for each in states if each is not None)
        pairs = list(score)
        lines = []
        for done, pair in enumerate(pairs):
            lines.append(self._score(fit, choose, score, *pair))
            work.report(ProgressEvent("maps", done + 1, len(pairs)))
        result = {
            "sites": [list(each) for each in self.sites],
            "prompts": dict(work.plan.prompts),
            "pairs": lines,
            "refused": [[*pair, why] for pair, why in score.refused.items()],
            "predicts": self._predicts(lines),
        }
        folder.complete(result, [])

    def clear(self, work: Work) -> None:
        work.folder.clear(STATES)

    def result(self, folder: TrainingFolder) -> dict[str, Any]:
        """Sites, prompts, and the scores of each pair of sites."""
        return dict(self.results(folder))

    @classmethod
    def write_report(cls, folder: TrainingFolder) -> Path:
        return write_report(cls.of_folder(folder.path).spec, folder)

    @classmethod
    def results(cls, folder: TrainingFolder) -> Mapping[str, Any]:
        return folder.numbers()

    @classmethod
    def summary(cls, folder: TrainingFolder) -> list[str]:
        folder.need_complete()
        result, name = folder.need(RESULT), cls.of_folder(folder.path).spec.name
        best = best_pairs(result)
        return [
            f"{name}: {len(result['pairs'])} maps; the best of each target site:",
            *(f"  {p['target']}: from {p['source']}, FVU {p['fvu']:.3f}" for p in best[:20]),
            f"report: {(folder.path / REPORT).resolve()}",
        ]

    def _settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of both calls."""
        spec = self.spec
        if is_language(self.readers[0]):
            return forward_settings(self.readers[0]), forward_settings(self.readers[1])
        own: tuple[tuple[Subject, Mapping[str, Any]], ...] = (
            (spec.subject, spec.pipeline),
            (spec.target, {**spec.pipeline, **spec.target_pipeline}),
        )
        one, other = (
            call_settings(reader, *each) for reader, each in zip(self.readers, own, strict=True)
        )
        return one, other

    def _record(self, prompts: Sequence[str]) -> Pairs:
        spec, settings = self.spec, self._settings()
        language = is_language(self.readers[0])
        timed: dict[str, Any] = {}
        if not language and in_denoiser(self.readers[0], self.sites[0]):
            timed = {"schedule": spec.schedule, "trajectory": spec.trajectory}
        return record_between(
            *self.readers,
            [each for each in prompts for _ in spec.seed_list],
            *self.sites,
            align=spec.align or ("spans" if language else "place"),
            span=spec.span,
            skip=spec.skip,
            seeds=[*spec.seed_list] * len(prompts),
            branch=spec.branch,
            batch_size=spec.batch.rows if isinstance(spec.batch.rows, int) else 16,
            source_arguments=settings[0],
            target_arguments=settings[1],
            progress=False,
            **timed,
        )

    def _samples(self, plan: MatrixPlan) -> int:
        """Rows that each unit of held-out prompts keeps."""
        return math.ceil(self.spec.sample / sum(name == "score" for name, _ in plan.units))

    def _score(
        self, fit: MomentMatrix, choose: MomentMatrix, score: MomentMatrix, source: str, target: str
    ) -> dict[str, Any]:
        """Numbers of one pair of sites."""
        spec, pair = self.spec, (source, target)
        own = fit_map(
            fit.moments(*pair), spec.map, validation=choose.moments(*pair), **spec.options
        )
        report = score_map(own, score.moments(*pair), draws=spec.draws)
        rows = score_map(own, score.rows(*pair), draws=1, sample=spec.sample)
        found = {name: getattr(report, name) for name in SCORES}
        found |= {"cosine": rows.cosine, "retrieval": rows.retrieval}
        low, middle, high = report.controls["random"].quantiles()
        return {
            "source": source,
            "target": target,
            "d_source": own.d_source,
            "d_target": own.d_target,
            "rows": [fit.moments(*pair).rows, report.rows],
            **found,
            "random": {"low": low, "median": middle, "high": high},
            "p": report.controls["random"].p,
            "settings": {
                k: v for k, v in own.card.settings.items() if not isinstance(v, list | tuple)
            },
            "success": self.success.get(pair),
        }

    def _predicts(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rank correlation of each score with the success of stitching."""
        known = [each for each in lines if each["success"] is not None]
        if not known:
            return {}
        success = np.array([each["success"] for each in known])
        scores = {
            name: np.array([each[name] for each in known]) * (-1 if "fvu" in name else 1)
            for name in ("fvu", "cosine", "cka_source", "retrieval")
        }
        return {
            {"fvu": "explained"}.get(name, name): [each.value, each.low, each.high, each.n]
            for name, each in correlate_success(scores, success).items()
        }

    def __repr__(self) -> str:
        spec = self.spec
        return f"MapMatrixJob({spec.name!r}: {spec.subject.model} to {spec.target.model})"


def split_prompts(prompts: Sequence[str], spec: MapMatrixSpec) -> dict[str, list[int]]:
    """Numbers of the prompts that maps are fitted to, chosen by and scored on.

    Raises:
        InvalidInput: there is none for one of these.
    """
    order = list(range(len(prompts)))
    random.Random(spec.split_seed).shuffle(order)
    held, chosen = (max(1, round(share * len(order))) for share in (spec.held_out, spec.chosen))
    if held + chosen >= len(order):
        raise InvalidInput(
            f"data: {len(order)} different prompts cannot be split into some to fit to, to choose "
            "by and to score on; give 3 at least"
        )
    parts = order[held + chosen :], order[held : held + chosen], order[:held]
    return dict(zip(FOLDS, parts, strict=True))


def _listed(sites: str | list[str]) -> list[str]:
    return [sites] if isinstance(sites, str) else sites
