"""Harvests in Python: the same specs as objects."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamreader.errors import InvalidInput
from dreamreader.harvest.job import HarvestJob, open_job
from dreamreader.harvest.plan import GB, Plan, make_plan
from dreamreader.harvest.run import Engine, Progress, run_job
from dreamreader.harvest.spec import Spec
from dreamreader.specs.load import load_spec, spec_of
from dreamreader.store.store import Store

if TYPE_CHECKING:
    from dreamreader.engine import Reader


class Harvest:
    """Records chosen sites of a subject over many prompts to a store on disk.

    Args:
        spec: a `Spec`, or its content as a mapping; or give the fields by name.
        reader: a subject of your own; `subject` then only names it.

    Raises:
        InvalidInput: a field cannot be right.

    Example:
        >>> harvest = Harvest(
        ...     name="attention", subject="shapes-unet", data={"scenes": {"count": 8}},
        ...     capture=[{"sites": "unet.mid_block", "tokens": {"random": 0.25}}],
        ... )
        >>> store = harvest.run("activations")
        >>> rows = store.read("unet.mid_block", steps=0)
    """

    def __init__(
        self,
        spec: Spec | Mapping[str, Any] | None = None,
        *,
        reader: "Reader | None" = None,
        **fields: Any,
    ):
        self._reader = reader
        self.spec = spec_of(Spec, spec, fields, reader, "Harvest")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "Harvest":
        """Reads a spec file; see `specs.load.load_spec`."""
        return cls(load_spec(Spec, path, overrides))

    @cached_property
    def job(self) -> HarvestJob:
        """The opened subject and the prompts."""
        return open_job(self.spec, self._reader)

    def plan(self) -> Plan:
        """Sites, rows, bytes, units and time; a few samples are run."""
        return make_plan(self.job)

    def run(
        self,
        out: str | os.PathLike[str],
        *,
        limit_gb: float | None = None,
        started: Callable[[Plan, Progress], Any] | None = None,
        advance: Callable[[Progress], Any] | None = None,
        engine: Engine | None = None,
    ) -> Store:
        """Harvests what the store lacks.

        Args:
            out: the store. A stopped harvest goes on there; a complete one is left as it is.
            limit_gb: most GB (10^9 bytes) of all shards. The job stops before the unit that would
                go beyond, and goes on there with a larger limit.
            started: called with the plan, and what is there already.
            advance: called after every batch, or unit of an engine.
            engine: what harvests, such as a `RayEngine`; this process by default.

        Raises:
            InvalidInput: the store holds another harvest, is in use or cannot be written; or a row
                is not finite and `store.not_finite` is `refuse`.
        """
        if engine is not None and self._reader is not None:
            raise InvalidInput(
                "Harvest: an engine opens the subject in other processes, by its name; a reader of "
                "your own cannot go there"
            )
        limit = None if limit_gb is None else int(limit_gb * GB)
        run_job(self.job, Path(out), limit, started, advance, engine)
        return Store(Path(out))

    def __repr__(self) -> str:
        spec = self.spec
        return f"Harvest({spec.name!r}: {len(spec.capture)} captures of {spec.subject.model})"
