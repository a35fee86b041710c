import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from dreamreader.errors import InvalidInput
from dreamreader.report import (
    Charts,
    Code,
    Curves,
    Facts,
    Folded,
    Gallery,
    HeatMap,
    Number,
    Numbers,
    Picture,
    Report,
    Section,
    Series,
    Table,
    Text,
)
from dreamreader.report.svg import draw_curves

EVIL = "<script>alert('x')</script>\"><img src=x onerror=y>&"


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and whether every tag was closed."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def full_report(text: str = "plain") -> Report:
    picture = Picture(torch.rand(3, 8, 8), alt=text, mark=text)
    line = Series(text, [0, 1, 2], [0.1, 0.5, 0.9], [0, 0.4, 0.8], [0.2, 0.6, 1], tone=2)
    curves = Curves(text, [line, Series("other", [1], [0.3])], x_label=text)
    blocks = [
        Text(text),
        Code(text),
        Numbers([Number(text, text, text, "good")]),
        Gallery([(text, [picture, picture]), ("b", [picture, picture])], [text, "two"], text),
        curves,
        Charts([curves]),
        HeatMap(
            text,
            [[0.2, -1.5], [float("nan"), 1.0]],
            [text, "b"],
            ["c", text],
            text,
            notes=[[text] * 2] * 2,
        ),
        Table([text, "n"], [[text, 3], ["b", 12]], text),
        Facts([(text, text)]),
        Folded(text, [Facts([(text, text)])]),
    ]
    return Report(text, text, blocks[:2], [Section(text, blocks, text)] * 3, [(text, text)])


def test_every_text_is_escaped_everywhere():
    plain, evil = full_report().html(), full_report(EVIL).html()
    page = Page(evil)
    assert page.all("script") == [] and "onerror" not in "".join(
        str(a) for a in page.all("img") if "alt" not in a
    )
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(plain).tags]
    assert page.open == [] and evil.count("&lt;script&gt;") > 40
    assert EVIL in "".join(page.texts) and all(img["alt"] == EVIL for img in page.all("img"))


def test_the_page_needs_nothing_beside_itself():
    text = full_report().html()
    page = Page(text)
    assert (
        page.all("link") == []
        and page.all("script") == []
        and "@import" not in text
        and "url(" not in text
    )
    assert re.findall(r"https?://", text) == []
    assert all(img["src"].startswith("data:image/png;base64,") for img in page.all("img"))
    policy = [
        meta["content"]
        for meta in page.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_page_can_be_read_without_eyes_or_colours():
    page = Page(full_report().html())
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == 3
    assert page.all("html")[0]["lang"] == "en"
    assert all(img["alt"] and img["width"] and img["height"] for img in page.all("img"))
    plots = [svg for svg in page.all("svg") if svg.get("class") == "plot"]
    assert plots and all("10 % at 0, 50 % at 1, 90 % at 2" in svg["aria-label"] for svg in plots)
    assert all(th.get("scope") in {"col", "row"} for th in page.all("th"))
    assert any("viewport" == meta.get("name") for meta in page.all("meta"))


def test_pictures_come_back_bit_equal_from_the_page():
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    block = Gallery([("", [Picture(Image.fromarray(pixels.numpy()), "a square")])])
    html = Report("t", opening=[block]).html()
    source = Page(html).all("img")[0]["src"].removeprefix("data:image/png;base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(source)))
    assert np.array_equal(np.asarray(decoded), pixels.numpy())


def test_heat_map_shades_by_size_and_sign():
    block = HeatMap("h", [[0.5, -2.0, float("nan")]], ["r"], ["a", "b", "c"])
    half, cold, missing = block.lines[0][1]
    assert (half["text"], half["shade"], half["side"]) == ("50", 50, "warm")
    assert (cold["text"], cold["shade"], cold["side"], cold["strong"]) == (
        "-200",
        100,
        "cold",
        True,
    )
    assert missing["text"] == "–"


def test_heat_map_has_no_negative_zero_and_sets_brackets():
    block = HeatMap("h", [[-0.001, 0.3]], ["r"], ["a", "b"], bracketed=[[False, True]])
    assert [cell["text"] for cell in block.lines[0][1]] == ["0", "(30)"]


def test_curves_keep_values_within_the_frame_and_list_their_numbers():
    chart = Curves("c", [Series("s", [0, 4], [-3.0, 7.0])], "x", percent=False)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', draw_curves(chart))]
    assert heights == [180.0, 10.0]
    assert chart.cell(chart.series[0], 4) == "7" and chart.cell(chart.series[0], 2) == ""
    assert "<polygon" not in draw_curves(chart)


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: Series("s", [0, 1], [0.5]), "2 x and 1 y"),
        (
            lambda: HeatMap("h", [[1.0]], ["a", "b"], ["c"]),
            r"values \[1, 1\] for 2 rows and 1 columns",
        ),
        (lambda: Table(["a"], [[1, 2]]), "2 cells for 1 columns"),
        (
            lambda: Gallery([("a", []), ("b", [Picture(torch.zeros(3, 2, 2), "x")])]),
            "different lengths",
        ),
        (lambda: Picture(torch.zeros(4, 2, 2), "x").source, r"got \[4, 2, 2\]"),
    ],
)
def test_blocks_that_do_not_fit_say_what_came(build, text):
    with pytest.raises(InvalidInput, match=text):
        build()


def test_write_replaces_the_file_at_once(tmp_path):
    path = full_report("one").write(tmp_path / "report.html")
    full_report("two").write(path)
    assert "two" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("top", "percent"), [(0.0123, False), (123456.0, False), (1.0, True)])
def test_labels_of_a_chart_begin_within_it(top: float, percent: bool) -> None:
    line = Series("a", [0.0, 1.0], [0.0, top])
    chart = Curves("small", [line], "step", y_range=(0.0, top), percent=percent)
    svg = str(draw_curves(chart))
    labels = re.findall(r'<text x="(\d+)" y="[\d.]+" text-anchor="end">([^<]*)<', svg)
    assert len(labels) == 5
    for x, text in labels:
        assert float(x) >= 6.4 * len(text)  # a letter of 11 pixels is that wide
    left = {float(each) for each in re.findall(r'class="grid" x1="([\d.]+)"', svg)}
    first = float(re.findall(r'<polyline class="line" points="([\d.]+),', svg)[0])
    assert left == {first}  # lines begin where the grid does
