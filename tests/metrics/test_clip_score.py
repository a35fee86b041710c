"""CLIP score with a tiny CLIPModel in a folder, against the model called by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import text

from dreamreader.errors import InvalidInput
from dreamreader.metrics import Outputs, build

TEXTS = ["a red cat", "two small houses by the tree", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    where = tmp_path_factory.mktemp("clip")
    tokenizer = text.clip_tokenizer()
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2}  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**common, "vocab_size": len(tokenizer), **ids},
        vision_config={**common, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for each in model.parameters():  # the usual small start makes every picture alike
        torch.nn.init.normal_(each, std=0.3)
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**size).save_pretrained(where)
    return where


def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def outputs(texts: Any = TEXTS, column: str = "prompt") -> Outputs:
    return Outputs([{column: each} for each in texts], images=images())


def test_the_score_is_a_hundred_cosines(folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    found = build({"clip_score": {"path": str(folder)}}).measure(outputs(), None)["clip_score"]
    model, tokenizer = (each.from_pretrained(folder) for each in (CLIPModel, CLIPTokenizer))
    mean, std = (torch.tensor(each)[:, None, None] for each in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ))  # fmt: skip
    pixels = ((images() * 255).round() / 255 - mean) / std
    truth = []
    with torch.no_grad():
        for row, each in enumerate(TEXTS):  # one by one: the score does not depend on the batch
            words = tokenizer(each, return_tensors="pt")
            a = model.visual_projection(model.vision_model(pixels[row : row + 1]).pooler_output)
            b = model.text_projection(model.text_model(**words).pooler_output)
            truth.append(100 * float(torch.cosine_similarity(a, b)))
    assert found == pytest.approx([max(0.0, each) for each in truth], abs=1e-3)
    assert len({round(each) for each in truth}) == 3 and any(each > 1 for each in found)


def test_other_columns_and_sizes(folder: Path) -> None:
    metric = build({"clip_score": {"path": str(folder), "text": "target"}})
    same = build({"clip_score": {"path": str(folder)}}).measure(outputs(), None)
    assert metric.measure(outputs(column="target"), None) == same
    large = images().repeat_interleave(2, 2).repeat_interleave(2, 3)
    scores = metric.measure(Outputs([{"target": each} for each in TEXTS], images=large), None)
    assert len(scores["clip_score"]) == 3


def test_wrong_inputs_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no CLIP model .*nothing is downloaded"):
        build({"clip_score": {"path": "openai/clip-vit-base-patch16"}})
    metric = build({"clip_score": {"path": str(folder)}})
    with pytest.raises(InvalidInput, match="row 1 has no text in the column 'prompt'"):
        metric.measure(outputs(["a", None, "b"]), None)
    long = "a " * 90
    with pytest.raises(InvalidInput, match="text of row 2 has 92 tokens, the model reads 77"):
        metric.measure(outputs(["a", "b", long]), None)
    cut = build({"clip_score": {"path": str(folder), "truncate": True}})
    assert len(cut.measure(outputs(["a", "b", long]), None)["clip_score"]) == 3
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=f"clip_score: {tmp_path}: "):
        build({"clip_score": {"path": str(tmp_path)}}).measure(outputs(), None)
