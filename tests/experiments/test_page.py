"""Reports of runs: whole, and safe to open."""

import re

from .conftest import MIDDLE, PAIRS

NASTY = 'a red circle <script>alert("x")</script> & <img src=x onerror=alert(1)>'


def test_prompts_with_html_are_text_in_the_report(experiment, tmp_path) -> None:
    experiment(
        name="<b>bold</b>",
        data={"prompts": [{"prompt": NASTY, "id": "<i>", "tag": "</table><script>"}]},
        method={
            "kind": "edit",
            "edits": [{"kind": "scale", "site": "unet.mid_block", "factor": 0.5}],
        },
    ).run(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "<b>bold" not in page
    assert "&lt;script&gt;alert" in page and "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "</table><script>" not in page


def test_a_report_says_conditions_numbers_firing_and_fingerprint(experiment, tmp_path) -> None:
    made = experiment(
        data={"pairs": PAIRS},
        seeds={"count": 2},
        method={"kind": "patch", "sites": MIDDLE, "windows": 2},
        metrics=["pixel_distance"],
    )
    results = made.run(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    digest = results.folder.run
    assert digest in page and results.spec.name in page
    for text in ("corrupted", "clean", "patched", "resampled", "pixel distance", "What fired"):
        assert text in page, text
    assert "mid_block" in page and "num_inference_steps: 2" in page
    # nothing is loaded from elsewhere
    assert not re.search(r'(src|href)="https?:', page) and page.count("data:image/png") >= 8
    assert not re.search(r"<script[^>]*src=", page)


def test_a_report_without_pictures_or_metrics(experiment, tmp_path) -> None:
    experiment(metrics=[], save={"images": False}).run(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "unedited" in page and "data:image/png" not in page
    assert not (tmp_path / "run" / "artifacts" / "images").exists()
