"""Stores put together into one: units under new numbers, their files linked or copied."""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dreamreader._files import explain_disk_errors, lock_for_reading, new_folder
from dreamreader._progress import Progress, ProgressCallback, ProgressEvent, show_progress
from dreamreader.errors import InvalidInput
from dreamreader.store.index import add_site, sealed_units, write_index
from dreamreader.store.layout import SiteLayout, unit_folder
from dreamreader.store.manifest import Job, Manifest
from dreamreader.store.store import Store
from dreamreader.store.verify import damages


def merge(
    stores: Sequence[str | Path], out: str | Path, link: bool = True, progress: Progress = True
) -> Store:
    """Makes one store of the sealed units of several, which stay as they are.

    Args:
        stores: their folders; the units of each follow those of the one before.
        out: a new folder; it appears when all is there.
        link: give the files a second name where the file system can, instead of copying them.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Returns:
        The new store. It is complete where all of them were.

    Raises:
        InvalidInput: a store is given twice, is being written, has no units or is damaged in any
            byte that is taken over; `out` is there; or rows under one site's name are of different
            kinds.

    Example:
        >>> merged = merge(["colours", "shapes"], "both")
    """
    folders, target = [Path(store) for store in stores], Path(out)
    if len({folder.resolve() for folder in folders}) < len(folders) or not folders:
        raise InvalidInput(f"merge: needs different stores, got {', '.join(map(str, folders))}")
    with new_folder(target) as part, ExitStack() as locks:
        _check(folders)
        for folder in folders:
            locks.enter_context(lock_for_reading(folder))
        with show_progress(progress) as report:
            _fill(folders, part, link, report)
    return Store(target)


def _check(folders: Sequence[Path]) -> None:
    """Opens each, and refuses sites that do not go together."""
    sites: dict[str, SiteLayout] = {}
    for folder in folders:
        store = Store(folder)
        if not store.units:
            raise InvalidInput(f"{folder} has no sealed units")
        for site in store.sites.values():
            add_site(sites, site, folder)


def _fill(folders: Sequence[Path], part: Path, link: bool, report: ProgressCallback) -> None:
    jobs, complete, done = [], True, 0
    total = sum(len(sealed_units(folder)) for folder in folders)
    (part / "shards").mkdir()
    for folder in folders:
        manifest = Manifest.read(folder) if Manifest.there(folder) else Manifest()
        units = sealed_units(folder)
        for number, unit in enumerate(units, done):
            source = folder / "shards" / unit_folder(unit)
            for each in damages(source):
                raise InvalidInput(f"merge: {folder}: {each}; nothing was merged")
            with explain_disk_errors(part):
                _copy(source, part / "shards" / unit_folder(number), link)
            report(ProgressEvent("units", number + 1, total))
        jobs += [_renumber(job, units, done) for job in manifest.jobs]
        complete = complete and manifest.complete
        done += len(units)
    Manifest(tuple(jobs), complete).write(part)
    write_index(part)


def _renumber(job: Job, units: Sequence[int], start: int) -> Job:
    """The job with the numbers that its sealed units have now."""
    before = sum(unit < job.units[0] for unit in units)
    own = sum(job.units[0] <= unit < job.units[1] for unit in units)
    return replace(job, units=(start + before, start + before + own))


def _copy(source: Path, target: Path, link: bool) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        if link:
            try:
                os.link(file, target / file.name)
                continue
            except OSError:  # another file system, or one that has no links
                pass
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb") as copied:
            os.fsync(copied.fileno())
