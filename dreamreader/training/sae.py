"""Sparse autoencoders from a spec file: on a store, on a model that is run, or known answers."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors
from dreamreader._progress import Progress, ProgressEvent
from dreamreader.errors import InvalidInput
from dreamreader.fitting import History
from dreamreader.harvest import Harvest, HarvestPlan
from dreamreader.jobs import fingerprint
from dreamreader.jobs.fingerprint import fingerprint_of_rows, portable
from dreamreader.jobs.job import REPORT, Engine, RunUnit, SpecJob, Work
from dreamreader.sae import SparseAutoencoder, train_sae
from dreamreader.sae.evaluate import with_random_decoder, with_random_encoder
from dreamreader.sae.objective import ScoreCurve
from dreamreader.sae.ranks import Ranks
from dreamreader.store.layout import file_of
from dreamreader.training.folder import CHECKPOINTS, RESULT, TrainingFolder
from dreamreader.training.page import thin_curve
from dreamreader.training.sae_evaluation import SiteEvaluation
from dreamreader.training.sae_page import describe_scores, write_report
from dreamreader.training.sae_ranks import (
    announce_site,
    check_pools,
    check_shares,
    device_of_rank,
    follow_rank_0,
    join_ranks,
    led_by_rank_0,
)
from dreamreader.training.sae_rows import (
    KNOWN,
    KnownSource,
    RowSource,
    StoreSource,
    with_shuffled,
)
from dreamreader.training.sae_scores import calibrate, measure, seed_agreement
from dreamreader.training.sae_specs import AutoencoderSpec, SaeSpec
from dreamreader.training.sae_splice import harvest_of

ACTIVATIONS = "activations"  # folder of the rows of a model that is run first
_FOLDER = "autoencoders"


@dataclass(frozen=True)
class Planned:
    """One autoencoder of a site.

    Attributes:
        title: in tables. seed: of its first weights and of what it draws.
        control: what is taken from it, or "" for the autoencoder itself.
    """

    title: str
    spec: AutoencoderSpec
    seed: int
    control: str = ""

    @property
    def name(self) -> str:
        """Its name among those of its site, and of its file."""
        parts = [self.title, f"seed {self.seed}", self.control.replace("_", " ")]
        return ", ".join(each for each in parts if each)


class SaeJob(SpecJob[SaeSpec]):
    """Trains the autoencoders of a spec, those of a site in one pass over its rows.

    Args:
        spec: a `SaeSpec`, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.
        home: what a relative `store` is meant from.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> job = SaeJob(
        ...     name="known", known_answers={"features": 64, "d_in": 16, "roots": 4, "depth": 1},
        ...     autoencoders=[{"d_sae": 32, "k": 2}], training={"tokens": 100_000},
        ... )
        >>> autoencoders = job.run("known")  # doctest: +SKIP
        >>> sae = autoencoders["known answers"]["BatchTopK d=32 k=2, seed 0"]  # doctest: +SKIP
    """

    kind, model, folder_type = "sae", SaeSpec, TrainingFolder
    counts = "sites"
    _ranks: Ranks | None = None

    @property
    def autoencoders(self) -> list[Planned]:
        """Those of each site, controls behind them."""
        spec = self.spec
        found = [Planned(each.title, each, seed) for each in spec.listed() for seed in spec.seeds]
        first = [each for each in found if each.seed == spec.seeds[0]]
        return found + [
            Planned(each.title, each.spec, each.seed, control)
            for control in spec.controls
            for each in first
        ]

    @cached_property
    def harvest(self) -> Harvest:
        """What records the rows of a model that is run."""
        spec = self.spec
        assert spec.subject is not None
        capture = {"sites": spec.sites, "branch": spec.branch, "steps": spec.steps}
        if spec.tokens is not None:
            capture["tokens"] = spec.tokens
        return Harvest(
            reader=self._reader,
            name=spec.name,
            subject=spec.subject,
            data=spec.data,
            seeds=spec.prompt_seeds,
            pipeline=spec.pipeline,
            batch=spec.batch,
            capture=[capture],
        )

    def source(self, folder: Path | None = None) -> RowSource:
        """Where rows come from.

        Args:
            folder: of the result, where those of a model are.
        """
        spec, home = self.spec, self._home or Path()
        if spec.known_answers is not None:
            return KnownSource(spec)
        evaluated = None if spec.evaluation.store is None else home / spec.evaluation.store
        if spec.store is not None:
            return StoreSource(spec, home / spec.store, evaluated)
        assert folder is not None
        return StoreSource(spec, folder / ACTIVATIONS, evaluated)

    def plan(self) -> str:
        """Sites, autoencoders and steps, in lines."""
        spec, lines = self.spec, []
        if spec.subject is None:
            source = self.source()
            lines += [f"rows    {site}, width {source.width(site)}" for site in source.sites]
        else:
            lines.append(str(self._plan_harvest()))
        length = spec.training.tokens or f"{spec.training.epochs} epochs of rows"
        lines.append(f"train   {length:,} rows" if isinstance(length, int) else f"train   {length}")
        return "\n".join([*lines, *(f"        {each.name}" for each in self.autoencoders)])

    def begin(self, folder: TrainingFolder) -> list[str]:
        """Names of the sites."""
        unseen = {"name": True, "store": True, "evaluation": True, "training": {"device"}}
        shown = self.spec.model_dump(mode="json", exclude=unseen)
        evaluated = self.spec.evaluation.model_dump(mode="json", exclude={"store"})
        settings = {"spec": portable(shown), "evaluated": evaluated}
        if self._ranks is not None:  # selections and pools are of shares
            settings["processes"] = self._ranks.world
        if self.spec.subject is None:
            source = self.source()
            taken = fingerprint_of_rows(settings | source.identity(), self.spec.seeds)
            folder.begin(self.spec, taken, {"sites": list(source.sites)})
            return list(source.sites)
        job = self.harvest.job
        reader = job.reader
        taken = fingerprint(reader.subject, settings, self.spec.seeds, reader.tokenizer)
        folder.begin(self.spec, taken, {"sites": None})
        patterns = self.harvest.spec.capture[0].patterns
        return list(dict.fromkeys(site.name for each in patterns for site in reader.sites(each)))

    def units(self, plan: list[str]) -> int:
        return len(plan)

    def units_there(self, folder: TrainingFolder, plan: list[str]) -> set[int]:
        return {
            n
            for n, site in enumerate(plan)
            if (notes := folder.read(_notes(site))) is not None and notes["run"] == folder.run
        }

    def prepare(self, work: Work) -> None:
        """Records the rows of a model that is run."""
        if self.spec.subject is None:
            return
        rows = work.folder.path / ACTIVATIONS
        if not rows.exists():
            self._plan_harvest()
        self.harvest.run(rows, progress=work.report)

    @contextmanager
    def open_runner(self, work: Work) -> Iterator[RunUnit]:
        source = self.source(work.folder.path)

        def train_site(unit: int, room: int | None) -> int:
            self._train(work, source, work.plan[unit])
            return 0

        yield train_site

    def finish(self, work: Work) -> None:
        if work.folder.is_complete:
            return
        names = []
        for site in work.plan:
            notes = work.folder.need(_notes(site))
            names += [_notes(site), *(each["file"] for each in notes["autoencoders"].values())]
        work.folder.complete({"sites": work.plan}, names)

    def clear(self, work: Work) -> None:
        work.folder.clear(CHECKPOINTS)
        if not self.spec.keep_activations:
            work.folder.clear(ACTIVATIONS)

    def result(self, folder: TrainingFolder) -> dict[str, dict[str, SparseAutoencoder]]:
        """The autoencoders by site and name, controls among them."""
        return {
            site: {
                name: SparseAutoencoder.load(folder.path / each["file"])
                for name, each in folder.need(_notes(site))["autoencoders"].items()
            }
            for site in _done(folder)
        }

    @classmethod
    def write_report(cls, folder: TrainingFolder) -> Path:
        return write_report(cls.of_folder(folder.path).spec, folder, cls.notes(folder))

    @classmethod
    def notes(cls, folder: TrainingFolder) -> dict[str, Any]:
        """What a training wrote of each site: scores, losses, curves."""
        return {site: folder.need(_notes(site)) for site in _done(folder)}

    @classmethod
    def results(cls, folder: TrainingFolder) -> Mapping[str, Any]:
        return {
            site: {name: each["scores"] for name, each in notes["autoencoders"].items()}
            for site, notes in cls.notes(folder).items()
        }

    @classmethod
    def summary(cls, folder: TrainingFolder) -> list[str]:
        folder.need_complete()
        name, lines = cls.of_folder(folder.path).spec.name, []
        for site, notes in cls.notes(folder).items():
            for title, each in notes["autoencoders"].items():
                lines.append(
                    f"  {site}: {title}: {describe_scores(each['scores'])}; {each['file']}"
                )
        return [f"{name}: {len(lines)} autoencoders", *lines, f"report: {folder.path / REPORT}"]

    def run(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        progress: Progress = True,
        engine: Engine | None = None,
    ) -> Any:
        """Computes what the folder lacks, and writes the report; see `SpecJob.run`.

        Started by torchrun, every process takes an equal share of each batch, and gradients are
        averaged; rank 0 alone runs the model, writes and measures, and the others give the result
        that it wrote. `Ranks` says what is the same as in one process.

        Raises:
            InvalidInput: as in `SpecJob.run`, or a batch cannot be shared evenly.
        """
        with join_ranks(self.spec.training.device) as self._ranks:
            if self._ranks is None:
                return self._run(out, progress, engine)
            check_shares(self.spec.training.batch_size, self._ranks.world)
            check_pools(each.update_every for each in self.spec.listed())
            if self._ranks.rank:
                return self.result(TrainingFolder(follow_rank_0(self._train_share)))
            with led_by_rank_0(Path(out) if out is not None else self.folder):
                return self._run(out, progress, engine)

    @property
    def follows(self) -> bool:
        return self._ranks is not None and self._ranks.rank > 0

    def _plan_harvest(self) -> HarvestPlan:
        """What is recorded first, from a few samples.

        Raises:
            InvalidInput: a site has fewer rows than a batch.
        """
        plan, size = self.harvest.plan(), self.spec.training.batch_size
        assert plan.estimate is not None
        for each in plan.estimate.taken:
            rows = each.rows * plan.samples // plan.estimate.samples
            # rows of texts depend on their lengths
            if rows < size and not self.harvest.job.is_language:
                raise InvalidInput(
                    f"training.batch_size: {each.layout.name} gives {rows:,} rows, fewer than "
                    f"{size:,}; take more prompts or seeds, or smaller batches"
                )
        return plan

    def _train_share(self, folder: Path, site: str, run: str, had: Path | None) -> None:
        """Trains with rank 0 on a share of its batches; writes nothing that stays."""
        source = self.source(folder)
        self._train_site(source, site, run, had, False, self._curve(source, site, None))

    def _train_site(
        self,
        source: RowSource,
        site: str,
        run: str,
        checkpoint: Path | None,
        progress: Progress,
        curve: ScoreCurve | None,
    ) -> tuple[dict[str, SparseAutoencoder], dict[str, History]]:
        """The autoencoders of a site, trained."""
        training, ranks = self.spec.training, self._ranks
        device = device_of_rank(training.device)
        made = {
            each.name: _build(each, source.width(site), site).to(device)
            for each in self.autoencoders
        }
        shuffled = [each.name for each in self.autoencoders if each.control == "shuffled"]
        share = (0, 1) if ranks is None else (ranks.rank, ranks.world)
        batches = with_shuffled(source.batches(site, *share), site, shuffled)
        steps = None if training.tokens is None else training.tokens // training.batch_size
        options = training.model_dump(exclude={"tokens", "epochs", "batch_size", "device"})
        histories = train_sae(
            made,
            batches,
            steps=steps,
            epochs=training.epochs,
            folder=checkpoint,
            progress=progress,
            of={"run": run, "site": site},
            seed=self.spec.seeds[0],
            curve=curve,
            ranks=ranks,
            **options,
        )
        return {name: each.cpu() for name, each in made.items()}, histories

    def _train(self, work: Work, source: RowSource, site: str) -> None:
        """The autoencoders of a site, and what they are worth."""
        folder = work.folder
        planned = {each.name: each for each in self.autoencoders}
        shuffled = [name for name, each in planned.items() if each.control == "shuffled"]
        checkpoint = folder.path / CHECKPOINTS / file_of(site)
        if self._ranks is not None:
            announce_site(folder.path, site, folder.run, checkpoint)
        curve = self._curve(source, site, shuffled)
        made, histories = self._train_site(
            source, site, folder.run, checkpoint, _of_site(work, site), curve
        )
        notes: dict[str, Any] = {}
        evaluation = self._evaluation(source, site)
        with explain_disk_errors(folder.path):
            for number, (name, sae) in enumerate(made.items()):
                if self.spec.evaluation.inference == "calibrated":
                    calibrate(sae, source, site, name in shuffled)
                scores = measure(sae, source, site, name in shuffled)
                scores |= {} if evaluation is None else evaluation.scores(sae)
                work.report(
                    ProgressEvent("measuring", number + 1, len(made), {}, f"{site}: {name}")
                )
                file = f"{_FOLDER}/{file_of(site).removesuffix('.safetensors')}-{number}"
                (folder.path / file).parent.mkdir(parents=True, exist_ok=True)
                sae.save(folder.path / f"{file}.safetensors")
                each = planned[name]
                notes[name] = {
                    "file": f"{file}.safetensors",
                    "title": each.title,
                    "seed": each.seed,
                    "control": each.control,
                    "losses": list(zip(*thin_curve(histories[name].losses), strict=True)),
                    "scores": scores,
                    "curve": [
                        {"trained": done * self.spec.training.batch_size, **found}
                        for done, found in (curve.points[name] if curve else [])
                    ],
                }
            agreement = seed_agreement(made, planned)
            own = {"run": folder.run, "autoencoders": notes, "seed_mcc": agreement}
            own |= {} if evaluation is None else {"activations": evaluation.baseline}
            folder.write(_notes(site), own)

    def _curve(self, source: RowSource, site: str, shuffled: list[str] | None) -> ScoreCurve | None:
        """What takes scores while a site is trained, after as many rows as the spec says.

        Args:
            shuffled: names of those that learn from shuffled rows; None where rank 0 measures.
        """
        size = self.spec.training.batch_size
        at = [max(1, rows // size) for rows in self.spec.evaluation.curve]

        def score(name: str, sae: SparseAutoencoder) -> dict[str, Any]:
            if shuffled is None:
                return {}
            own = sae if sae.W_dec.is_cpu else copy.deepcopy(sae).cpu()
            found = measure(own, source, site, name in shuffled)
            return {key: value for key, value in found.items() if key != "histogram"}

        return ScoreCurve(at, score) if at else None

    def _evaluation(self, source: RowSource, site: str) -> SiteEvaluation | None:
        """What autoencoders of a site are measured on beside its rows."""
        if not isinstance(source, StoreSource):
            return None
        spec, harvest = self.spec, None
        if spec.spliced:
            of_model = spec.subject is not None and spec.evaluation.store is None
            harvest = self.harvest if of_model else harvest_of(source.evaluated, self._reader)
        own = spec.evaluation
        return SiteEvaluation(
            source.evaluated,
            site,
            source.selection,
            columns=own.attributes,
            samples=own.samples,
            harvest=harvest,
            prompts=spec.spliced,
            rows=source.held_out(site),
        )

    def __repr__(self) -> str:
        spec = self.spec
        of = spec.store or (KNOWN if spec.subject is None else spec.subject.model)
        return f"SaeJob({spec.name!r}: {len(spec.listed())} autoencoders on {of})"


def _build(planned: Planned, width: int, site: str) -> SparseAutoencoder:
    spec = planned.spec
    assert isinstance(spec.d_sae, int)
    made = SparseAutoencoder(
        width,
        spec.d_sae,
        spec.selection_for(planned.seed),
        seed=planned.seed,
        metadata={"site": site, "control": planned.control},
        **spec.options(),
    )
    if planned.control == "random_decoder":
        return with_random_decoder(made, planned.seed + 1)
    return with_random_encoder(made, planned.seed + 1) if "encoder" in planned.control else made


def _of_site(work: Work, site: str) -> Any:
    """Reports a training's progress with the name of its site."""

    def report(event: ProgressEvent) -> None:
        note = f"{site}: {event.note}"
        work.report(ProgressEvent(event.stage, event.done, event.total, event.numbers, note))

    return report


def _notes(site: str) -> str:
    """The file of a site's results, within the folder."""
    return str(Path(_FOLDER, file_of(site)).with_suffix(".json"))


def _done(folder: TrainingFolder) -> list[str]:
    return folder.need(RESULT)["sites"]
