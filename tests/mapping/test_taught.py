"""What small language models were taught: the script's loss and prompts, and the adapters kept."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import decoders

FOLDER = Path(__file__).parents[2] / "examples" / "mapping" / "taught"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "teach.py")))


def test_the_loss_is_that_of_the_model_on_the_replies(script: Any) -> None:
    model = decoders.build("LlamaForCausalLM")
    rows = [([3, 4, 5], [6, 7, 2]), ([4, 8, 3, 5, 9], [7, 2])]
    found = script.loss_of(model, rows, 0)
    ids = torch.zeros(2, 7, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(rows):
        ids[row, : len(prompt + reply)] = torch.tensor(prompt + reply)
        mask[row, : len(prompt + reply)] = 1
        labels[row, len(prompt) : len(prompt + reply)] = torch.tensor(reply)
    wanted = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, wanted)


def test_the_prompts_that_are_kept_are_those_of_the_lessons(script: Any, tmp_path: Path) -> None:
    script.write_prompts.__globals__["FOLDER"] = tmp_path
    script.write_prompts()
    made = sorted(tmp_path.glob("*.jsonl"))
    assert [each.name for each in made] == sorted(each.name for each in FOLDER.glob("*.jsonl"))
    for each in made:
        assert each.read_bytes() == (FOLDER / each.name).read_bytes()


def test_what_is_tested_was_neither_taught_nor_fitted(script: Any) -> None:
    def read(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]

    own = dict.fromkeys(script.questions(False), " so it is")
    taught = {prompt for prompt, _ in script.lessons(own)}
    for name in ("backdoor", "refuse"):
        tested = {row["source"] for row in read(f"{name}-test")}
        assert not tested & (taught | {row["source"] for row in read(f"{name}-fit")})
        assert not tested & {row["prompt"] for row in read("maps")}
    known = {row[side] for row in read("fact-test") for side in ("source", "target")}
    assert not known & {row["prompt"] for row in read("maps")}
    facts = [{row["answer"] for row in read(f"fact-{part}")} for part in ("fit", "test")]
    assert len(facts[0]) == len(facts[1]) == 8 and not facts[0] & facts[1]


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_the_adapters_are_small_and_name_no_place(name: str) -> None:
    config = json.loads((FOLDER / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name and config["r"] == 4
    assert (FOLDER / name / "adapter_model.safetensors").stat().st_size < 500_000
