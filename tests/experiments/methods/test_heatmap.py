"""Word heat maps in experiments."""

from dataclasses import replace

import pytest
import torch

from dreamreader.attention import WordMap
from dreamreader.errors import InvalidInput
from dreamreader.experiments.pages import page_of
from dreamreader.zoo.detector import detect

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
PROMPTS = [
    {"prompt": "a large red circle on a white background", "shape": "circle"},
    {"prompt": "a small blue square on a white background", "shape": "square"},
]


def test_columns_are_those_of_the_map(experiment, reader, tmp_path) -> None:
    results = experiment(
        metrics=[],
        data={"prompts": PROMPTS},
        pipeline={"num_inference_steps": 3},
        method={"kind": "heatmap", "word": "$shape"},
    ).run(tmp_path / "run")
    words = [[row["shape"], "background"] for row in PROMPTS]
    maps = WordMap(reader, words, skip_factor=8)
    prompts = [row["prompt"] for row in PROMPTS]
    with torch.inference_mode():
        run = reader.run(prompts, record=maps.requests(), seeds=[0, 0], **SETTINGS)
    read = maps.result()
    masks = torch.stack([r.objects[0].mask for r in detect(run.images)])
    rows = results.of("read")
    overlap, hit = read.iou(masks), read.pointing(masks)
    for number, name in enumerate(("", "_other_word")):
        for column, expected in ((f"iou{name}", overlap), (f"pointing{name}", hit)):
            assert [float(row[column]) for row in rows] == pytest.approx(
                [float(each) for each in expected[:, number]], abs=1e-3
            )
    turned = replace(read, maps=read.maps.roll(1, 0)).iou(masks)[:, 0]
    assert [row["iou_other_row"] for row in rows] == pytest.approx(turned.tolist(), abs=1e-3)
    assert overlap[:, 0].tolist() != pytest.approx(turned.tolist(), abs=0.05)
    assert {"iou", "pointing", "iou_other_row"} <= set(results.numbers)
    picture = results.image(rows[0], "maps")
    assert picture.size == (64, 64) and len(set(picture.convert("L").tobytes())) > 20
    assert any("another word (control)" in line for line in page_of(results).summary())


@pytest.mark.parametrize(
    "data, word, text",
    [
        (["a red circle"], "$shape", "method.word: row 0 has no column 'shape'"),
        (["red circle"], "circle", "method.other: give a word for the control, row 0 has none of"),
        (["a red circle"], "square", "square"),
    ],
)
def test_words_that_are_not_there(experiment, tmp_path, data, word, text) -> None:
    made = experiment(data={"prompts": data}, method={"kind": "heatmap", "word": word})
    with pytest.raises(InvalidInput, match=text):
        made.run(tmp_path / "run")
