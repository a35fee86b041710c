"""Stores in the formats of other tools."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dreamreader._files import explain_disk_errors, new_folder
from dreamreader._progress import Progress, show_progress
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.store.export import huggingface, npy, webdataset
from dreamreader.store.export.base import ChosenRows
from dreamreader.store.store import Store

FORMATS: dict[str, Callable[[ChosenRows, Path], None]] = {
    "npy": npy.write,
    "huggingface": huggingface.write,
    "webdataset": webdataset.write,
}


def export(
    store: str | Path,
    out: str | Path,
    format: str,
    site: str | Sequence[str] | None = None,
    steps: Any = None,
    branch: str | Sequence[str] | None = None,
    progress: Progress = True,
) -> Path:
    """Writes rows of a store in a format that other tools read, a block at a time.

    Values that were stored with scales, and bfloat16 (which numpy, Arrow and most readers of these
    formats lack), become float32; float16 and float32 stay what they are.

    Args:
        store: its folder. out: a new folder; it appears when all is there.
        format: `npy`: one array for each site, and Parquet with what is known of each row;
            `huggingface`: for each site a folder that `datasets.load_from_disk` reads;
            `webdataset`: tar files with one group for each sample.
        site: one or several; all by default. steps, branch: see `Store.segments`.
        progress: shown by default, or a function of a `ProgressEvent`, or False.

    Returns:
        `out`.

    Raises:
        UnknownName: there is no such format, site or branch.
        InvalidInput: `out` is there already, nothing is chosen, or a shard is damaged.

    Example:
        >>> files = export("activations", "rows", "npy", site="unet.mid_block", branch="cond")
    """
    if format not in FORMATS:
        raise UnknownName("format", format, FORMATS)
    opened = Store(store)
    wanted = [site] if isinstance(site, str) else list(opened.sites if site is None else site)
    sites = [each for each in wanted if opened.segments(each, steps, branch).total]
    if not sites or (site is not None and len(sites) < len(wanted)):
        empty = [each for each in wanted if each not in sites]
        raise InvalidInput(f"{store}: no rows of {', '.join(empty) or 'any site'} are chosen")
    with show_progress(progress) as report, new_folder(out) as part, explain_disk_errors(Path(out)):
        FORMATS[format](ChosenRows(opened, sites, steps, branch, report), part)
    return Path(out)
