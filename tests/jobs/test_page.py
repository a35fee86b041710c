"""What the reports of all jobs share."""

from pathlib import Path

from dreamreader.jobs.page import job_report
from dreamreader.report import Number, Numbers, Section, Text


def test_a_report_says_its_numbers_first_and_what_they_depend_on_last(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("name: a job\n")
    taken = {"digest": "0123456789abcdef" * 4, "packages": {"torch": "2"}, "weights": "ff"}
    own = Section("Found", [Text("much")])
    page = job_report(tmp_path, taken, "a job", "of rows", [Number("3", "rows")], [own])
    assert page.opening == [Numbers([Number("3", "rows")])]
    assert [each.title for each in page.sections] == ["Found", "Fingerprint"]
    assert page.footer == [("fingerprint", "0123456789abcdef")]
    text = page.html()
    for said in ("name: a job", "torch 2", "of rows", "0123456789abcdef" * 4):
        assert said in text
    assert job_report(tmp_path, taken, "a job", "", [], []).opening == []
