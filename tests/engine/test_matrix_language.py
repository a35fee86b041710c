"""The engine against hooks made by hand, on every language model class that builds small.

The classes that most people use and a part of the others by default, another part each day; all of
them, the first in more modes, with `pytest -m matrix`.
"""

import datetime
import re
from collections import Counter

import pytest
from tiny import decoders

from .matrix_language import check, modes
from .matrix_modes import CORE

PARTS = 40
# what most people run; never left out
USED = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "MistralForCausalLM",
    "GPTNeoXForCausalLM",
    "OPTForCausalLM",
    "PhiForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Qwen3NextForCausalLM",
    "MambaForCausalLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
)
# checked in every mode there is
THOROUGH = ("LlamaForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration")

# What may be refused, by a pattern of the reason: of every class and mode, of a mode, of a class.
# Whatever else is refused is a failure, so refusals cannot grow unseen.
REFUSED: dict[tuple[str, str], str] = {
    ("*", "chunks"): r"a prompt in chunks|keep different numbers of tokens",
    ("*", "4-D mask, diagonal"): r"whether they are padding|without positions|12 entries where 2",
    ("*", "run"): r"counts padding, so that",
    ("*", "run, written"): r"counts padding, so that",
    # an encoder that is no model of transformers, with tokens before rows
    ("FSMTForConditionalGeneration", "*"): r"embed_tokens: which tokens|without positions",
    ("InklingForCausalLM", "*"): r"rel_logits_proj: .* name the dimensions",
    ("Inkling2ForCausalLM", "*"): r"(rel_logits_proj|_clip): .* name the dimensions",
    ("DeepseekV4ForCausalLM", "*"): r"o_a_proj: .* name the dimensions",  # groups, not heads
    # four copies of four sequences: which of the two dimensions are rows is not told
    ("Gemma3nForCausalLM", "beams"): r"gives \[4, 4, .* name the dimensions",
    # [rows, streams, tokens, features]: which of the first two are rows is not told
    ("ProphetNetForCausalLM", "*"): r"gives .* name the dimensions",
}

_counts: Counter[str] = Counter()
_families: set[str] = set()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" not in metafunc.fixturenames:
        return
    others = [each for each in decoders.names() if each not in USED]
    if "matrix" not in (metafunc.config.getoption("-m") or ""):
        part = datetime.date.today().toordinal() % PARTS
        others = others[part::PARTS]
    metafunc.parametrize("name", [*USED, *others])


def _is_known(name: str, mode: str, why: str) -> bool:
    keys = (("*", "*"), ("*", mode), (name, "*"), (name, mode))
    return any(key in REFUSED and re.search(REFUSED[key], why) for key in keys)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")  # those of many classes of transformers, at their own calls
def test_engine_agrees_with_hooks(name: str) -> None:
    found: list[str] = []
    for mode in modes(name):
        if mode.name not in CORE and name not in THOROUGH:
            continue
        outcomes = check(name, mode)
        kinds = {each.what for each in outcomes}
        cell = next(kind for kind in ("wrong", "refused", "absent", "equal") if kind in kinds)
        _counts[cell] += 1
        _counts["comparisons"] += sum(each.what == "equal" for each in outcomes)
        found += [
            f"{mode.name}: {each.request} at {each.site}: {each.what}. {each.why}"
            for each in outcomes
            if each.what == "wrong"
            or (each.what == "refused" and not _is_known(name, mode.name, each.why))
        ]
        if mode.name == "plain":
            assert cell != "absent", outcomes[0].why
    _families.add(name)
    assert not found, f"{len(found)} of them:\n" + "\n".join(found[:40])


@pytest.mark.matrix
def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        cells = ", ".join(f"{_counts[each]} {each}" for each in ("equal", "refused", "wrong"))
        print(
            f"\n{len(_families)} language models x modes: {cells}; {_counts['absent']} are not "
            f"offered by the model; {_counts['comparisons']} comparisons are equal"
        )
    assert not _counts["wrong"]
    assert _counts["equal"] > 5 * _counts["refused"]


def test_a_class_is_built_or_left_out_for_a_reason() -> None:
    lines = decoders.FIELDS.keys() | decoders.LEFT_OUT.keys()
    lines |= {stem for stem, _ in decoders.VARIANTS.values()}
    assert all(name[0].isupper() or name.startswith("x") for name in lines)
    assert not decoders.FIELDS.keys() & decoders.LEFT_OUT.keys()
    assert set(USED) <= set(decoders.names())
    assert len(decoders.names()) >= 150
