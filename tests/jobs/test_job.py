"""What a job counts while it runs."""

from pathlib import Path

from harvest.jobs import pictures

from dreamreader._progress import ProgressEvent
from dreamreader.harvest.folder import HarvestFolder
from dreamreader.harvest.plan import HarvestPlan
from dreamreader.jobs.job import Work


def test_progress_is_the_sum_of_what_was_computed(tmp_path: Path) -> None:
    seen: list[ProgressEvent] = []
    plan = HarvestPlan(9, 1, 1)
    work = Work(pictures(), HarvestFolder(tmp_path), plan, [], seen.append, done=1, total=9)
    work.advance(2, rows=3)
    work.stored = 70
    work.advance(1, rows=4, lines=5)
    assert [each.done for each in seen] == [3, 4] and seen[0].total == 9
    assert seen[0].numbers == {"rows": 3, "stored": 0, "lost": 0}
    assert seen[1].numbers == {"rows": 7, "lines": 5, "stored": 70, "lost": 0}
