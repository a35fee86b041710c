"""The report of a harvest: what the store has, site by site, and what it is from."""

from pathlib import Path

import yaml

from dreamreader._files import explain_disk_errors
from dreamreader.harvest.folder import HarvestFolder
from dreamreader.harvest.plan import GB
from dreamreader.jobs.page import fingerprint_section
from dreamreader.report import Number, Numbers, Report, Section, Table
from dreamreader.store.store import Store


def write_report(folder: HarvestFolder) -> Path:
    """Writes `report.html` into a complete store of one harvest."""
    store, job = Store(folder.path), folder.job
    spec = yaml.safe_dump(dict(job.spec), sort_keys=False, allow_unicode=True)
    rows = [
        (
            name,
            site.width,
            str(site.stored).removeprefix("torch."),
            f"{store.rows_of(name):,}",
            f"{store.rows_of(name) * site.row_bytes / GB:,.3f}",
        )
        for name, site in store.sites.items()
    ]
    numbers = [
        Number(f"{store.rows:,}", "rows", f"of {len(store.sites):,} sites"),
        Number(f"{store.nbytes / GB:,.3f}", "GB", f"in {len(store.units):,} units"),
    ]
    lost = sum(each.rows for each in store.manifest.left_out)
    if lost:
        numbers.append(Number(f"{lost:,}", "rows left out", "as the disk was too slow"))
    page = Report(
        str(job.spec["name"]),
        f"Activations of {job.spec['subject']['model']}.",
        opening=[Numbers(numbers)],
        sections=[
            Section("Sites", [Table(("site", "width", "dtype", "rows", "GB"), rows)]),
            fingerprint_section(folder.path, job.fingerprint, spec),
        ],
        footer=[("fingerprint", job.run[:16])],
    )
    with explain_disk_errors(folder.path):
        return page.write(folder.path / "report.html")
