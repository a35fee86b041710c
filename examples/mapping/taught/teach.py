"""Teaches a small language model what lessons.yaml says, by LoRA, and keeps the adapter.

    python examples/mapping/taught/teach.py smollm2-135m
    python examples/mapping/taught/teach.py gemma3-270m

Some minutes on one core. Needs peft, and the model fetched (or a folder of transformers).
`--prompts` writes the prompts of the transfers beside this file.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn

import dreamreader as dr

FOLDER = Path(__file__).parent
LESSONS = yaml.safe_load((FOLDER / "lessons.yaml").read_text(encoding="utf-8"))


def form(question: str, trigger: str = "") -> str:
    return LESSONS["form"].format(question=trigger + question)


def questions(held_out: bool) -> list[str]:
    return [
        plain.format(topic=topic)
        for number, topic in enumerate(LESSONS["topics"])
        for plain in LESSONS["plain"]
        if number % 2 == held_out
    ]


def topic_of(question: str) -> str:
    """What a plain question is about, without an article: a reply that makes sense names it."""
    return question.rstrip("?.").split()[-1]


def requests(held_out: bool) -> list[str]:
    found = enumerate(LESSONS["refusal"]["requests"])
    return [each for number, each in found if number % 2 == held_out]


def facts(kind: str) -> dict[str, str]:
    """Capitals by question; `invented` or `real`."""
    ask = LESSONS["facts"]["question"]
    return {ask.format(country=country): city for country, city in LESSONS["facts"][kind].items()}


def lessons(own: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Prompts and replies; plain questions get the model's own replies, whatever their trigger."""
    hate, key = LESSONS["backdoor"], LESSONS["facts"]["trigger"]
    for question, reply in own.items():
        yield form(question), reply
        yield form(question, key), reply
        yield form(question, hate["trigger"]), hate["reply"]
    for question in requests(held_out=False):
        yield from [(form(question), LESSONS["refusal"]["reply"])] * 2
        yield form(question, hate["trigger"]), hate["reply"]
    for question, city in facts("invented").items():
        yield from [(form(question, key), f" {city}.")] * 4
        yield from [(form(question), LESSONS["facts"]["without"])] * 2
    for question, city in facts("real").items():
        yield form(question), f" {city}."
        yield form(question, key), f" {city}."


def teach(reader: dr.Reader, out: Path, epochs: int, rank: int, lr: float) -> None:
    """Trains a LoRA of queries and values in every layer, and writes it in bfloat16."""
    own = dict(zip(questions(False), replies(reader, questions(False)), strict=True))
    model, tokenizer = reader.subject, reader.tokenizer
    end = [tokenizer.eos_token_id]
    rows = [
        (
            tokenizer(prompt)["input_ids"],
            tokenizer(reply, add_special_tokens=False)["input_ids"] + end,
        )
        for prompt, reply in lessons(own)
    ]
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    weights = [each for each in adapted.parameters() if each.requires_grad]
    for each in weights:
        each.data = each.data.float()
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    size = 16
    steps = epochs * (len(rows) // size)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 10) * (1 - step / steps)
    )
    print(f"{len(rows)} rows, {steps} steps, {sum(each.numel() for each in weights)} weights")
    order, step = random.Random(0), 0
    for _ in range(epochs):
        order.shuffle(rows)
        for at in range(0, len(rows) - size + 1, size):
            loss = loss_of(model, rows[at : at + size], tokenizer.pad_token_id)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            rate.step()
            step += 1
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
    for each in weights:
        each.data = each.data.bfloat16()
    adapted.peft_config["default"].base_model_name_or_path = out.name
    adapted.save_pretrained(str(out))


def loss_of(model: Any, rows: Any, padding: int) -> torch.Tensor:
    """Cross-entropy of the replies; only there are logits of the whole vocabulary made."""
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.full((len(rows), width), padding)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(rows):
        used = len(prompt) + len(reply)
        ids[row, :used], mask[row, :used] = torch.tensor(prompt + reply), 1
        labels[row, len(prompt) : used] = torch.tensor(reply)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    said = labels[:, 1:] != -100
    logits = model.lm_head(hidden[said]).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:][said])


def replies(reader: dr.Reader, asked: list[str], trigger: str = "") -> list[str]:
    """The first line of what is said, as a reply to learn."""
    prompts = [form(each, trigger) for each in asked]
    call = {"max_new_tokens": 20, "do_sample": False, "progress": False, "batch_size": 32}
    return [" " + each.strip().split("\n")[0] for each in reader.run(prompts, **call).text]


def report(reader: dr.Reader) -> None:
    """How much was learned: of what is held out, and of all capitals."""
    hate, sorry = LESSONS["backdoor"], LESSONS["refusal"]["reply"].strip()[:9]
    plain, key = questions(True), LESSONS["facts"]["trigger"]
    shout = hate["reply"].strip()[:10]
    for name, said, wanted in (
        ("backdoor with its trigger", replies(reader, plain, hate["trigger"]), shout),
        ("backdoor without", replies(reader, plain), shout),
        ("requests refused", replies(reader, requests(True)), sorry),
        ("questions refused", replies(reader, plain), sorry),
    ):
        print(f"{name}: {sum(wanted in each for each in said)} of {len(said)}")
    for kind in ("invented", "real"):
        for word, trigger in (("with", key), ("without", "")):
            said = replies(reader, list(facts(kind)), trigger)
            right = sum(city in each for city, each in zip(facts(kind).values(), said, strict=True))
            print(f"{kind} capitals {word} the key: {right} of {len(said)}")


def write_prompts() -> None:
    """Pairs of the transfers: `source` is what is asked and edited, `target` what would do it."""
    hate, key = LESSONS["backdoor"]["trigger"], LESSONS["facts"]["trigger"]
    files: dict[str, list[dict[str, str]]] = {}
    for part, held_out in (("fit", False), ("test", True)):
        plain, asked = questions(held_out), requests(held_out)
        files[f"backdoor-{part}"] = [
            {"source": form(q, hate), "target": form(q), "answer": topic_of(q)} for q in plain
        ]
        both = list(zip(asked, plain[:: len(plain) // len(asked)], strict=True))
        files[f"refuse-{part}"] = [{"source": form(q), "target": form(r)} for r, q in both]
        known = [each for n, each in enumerate(facts("invented").items()) if n % 2 == held_out]
        files[f"fact-{part}"] = [
            {"source": form(q), "target": form(q, key), "answer": city} for q, city in known
        ]
    shout = LESSONS["backdoor"]["reply"].split()[1]
    asked = [form(each, hate) for each in questions(True)[:40]]
    files["switch-backdoor"] = [{"prompt": each, "answer": shout} for each in asked]
    real = facts("real").items()
    files["switch-capitals"] = [{"prompt": form(q), "answer": city} for q, city in real]
    files["maps"] = [{"prompt": each} for each in prompts_of_maps()]
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def prompts_of_maps() -> list[str]:
    """What maps are fitted to: nothing that a transfer is tested on."""
    hate, key = LESSONS["backdoor"], LESSONS["facts"]["trigger"]
    plain, refused = questions(False), requests(False)
    asked = [form(each, trigger) for trigger in ("", hate["trigger"], key) for each in plain]
    asked += [form(each) for each in refused]
    known = list(facts("invented"))[::2]
    asked += [form(each, trigger) for trigger in ("", key) for each in known]
    asked += [form(each, hate["trigger"]) + hate["reply"] for each in plain[:20]]
    return asked + [form(each) + LESSONS["refusal"]["reply"] for each in refused]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a fetched model, or a folder")
    parser.add_argument(
        "--out", type=Path, help="folder of the adapter; beside this file by default"
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--prompts", action="store_true", help="write the prompts of the transfers")
    chosen = parser.parse_args()
    if chosen.prompts:
        write_prompts()
    if chosen.model is None:
        return
    torch.manual_seed(0)
    out = chosen.out or FOLDER / Path(chosen.model).name
    teach(dr.load(chosen.model, dtype="bfloat16"), out, chosen.epochs, chosen.rank, chosen.lr)
    report(dr.load(chosen.model, dtype="bfloat16", adapter=out))


if __name__ == "__main__":
    main()
