"""Transfer between language models: what is fitted, mapped and added, by hooks made by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.results import Results
from dreamreader.mapping import ActivationMap, AffineMap
from dreamreader.recording import record_between
from dreamreader.steering import Directions

SITE, OTHER = "transformer.h.1", "model.layers.2"
LAST = slice(-1, None)
FIT = {
    "pairs": [
        {"source": f"{name} is a red cat", "target": f"the blue dog, {name}, sat"}
        for name in ("Ann", "Ben")
    ]
}
MAPPED = [
    f"a {colour} {thing} on the {place}"
    for colour in ("red", "blue")
    for thing in ("cat", "dog", "tree")
    for place in ("mat", "house")
]
ROWS = [
    {"prompt": f"the {thing} is", "answer": 40, "wrong_answer": 41, "id": thing}
    for thing in ("star", "green square")
]


@pytest.fixture
def carried(saved, tmp_path) -> Callable[..., Results]:
    """Runs a transfer into the tiny GPT-2, of itself or another model."""

    def run(
        source: str = "gpt2",
        pipeline: Any = None,
        metrics: Any = None,
        prompts: Any = ROWS,
        batch: int = 3,
        folder: str = "run",
        **changes: Any,
    ):
        method = {
            "kind": "transfer",
            "source": saved(source),
            "sites": SITE,
            "map_data": {"prompts": MAPPED},
            "maps": [{"method": "ridge", "options": {"lambdas": 0.001}, "name": "ridge"}],
            "fit": FIT,
            "fit_tokens": -1,
            "strengths": [2.0],
        }
        return Experiment(
            name="carried",
            subject=saved("gpt2"),
            data={"prompts": prompts},
            pipeline=pipeline or {},
            method=method | changes,
            metrics=metrics or ["logit_difference"],
            batch={"rows": batch},
        ).run(tmp_path / folder)

    return run


@contextmanager
def hooked(reader: Reader, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def after(module: Any, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = reader.subject.get_submodule(site).register_forward_hook(after)
    with torch.no_grad():
        yield
    handle.remove()


def state(reader: Reader, site: str, prompt: str, tokens: slice) -> Tensor:
    kept: list[Tensor] = []
    with hooked(reader, site, lambda x: kept.append(x[0, tokens].mean(0)) or x):
        reader.subject(torch.tensor([reader.tokenizer(prompt).input_ids]))
    return kept[0]


def difference(reader: Reader, site: str, tokens: slice = LAST) -> Tensor:
    ends = [
        state(reader, site, each["target"], tokens) - state(reader, site, each["source"], tokens)
        for each in FIT["pairs"]
    ]
    return torch.stack(ends).mean(0)


def margin(reader: Reader, prompt: str, change: Callable[[Tensor], Tensor]) -> float:
    ids = torch.tensor([reader.tokenizer(prompt).input_ids])
    with hooked(reader, SITE, change):
        last = reader.subject(ids).logits[0, -1]
    return float(last[40] - last[41])


def test_a_direction_of_the_model_itself_has_the_whole_effect(carried, language) -> None:
    same = {"method": "identity", "name": "same"}
    results = carried(maps=[same])
    assert results.conditions == [
        "unedited", "native", "edited", "random_direction", "unmapped", "mean_ablated",
    ]  # fmt: skip
    native = Directions.load(results.spec.method.directions_file(results.folder.path, "native"))
    own = difference(language, SITE)
    torch.testing.assert_close(native[SITE], own, atol=1e-4, rtol=1e-4)
    for row in results.of("edited"):  # fitted at the last token, added at all
        wanted = margin(language, row["prompt"], lambda x: x + 2 * own)
        assert row["logit_difference"] == pytest.approx(wanted, abs=1e-3)
    assert [r["digest"] for r in results.of("edited")] == [
        r["digest"] for r in results.of("native")
    ]
    page: Any = page_of(results)
    shares = page.shares()
    assert shares["same"].value == 1 and shares["random direction"].value != pytest.approx(1)
    assert shares["same"].n == len(ROWS) and page.sections() and page.summary()


def test_a_direction_of_another_tokenizer_and_depth(carried, language, saved) -> None:
    results = carried("gemma2", source_sites={SITE: OTHER})
    source = Reader(*tiny.language_model("gemma2"))
    method, folder = results.spec.method, results.folder.path
    own = ActivationMap.load(method.map_file(folder, "ridge", SITE))
    assert isinstance(own, AffineMap)
    assert (own.card.source_site, own.d_source, own.d_target) == (OTHER, 32, 32)
    moved = own.weight @ difference(source, OTHER)
    ridge = Directions.load(method.directions_file(folder, "ridge"))[SITE]
    torch.testing.assert_close(ridge, moved, atol=1e-3, rtol=1e-3)
    for row in results.of("edited"):
        wanted = margin(language, row["prompt"], lambda x: x + 2 * moved)
        assert row["logit_difference"] == pytest.approx(wanted, abs=1e-3)
    pairs = record_between(source, language, MAPPED, OTHER, SITE, align="spans", progress=False)
    assert pairs.counts is not None and pairs.unpaired
    counts = pairs.counts[SITE]
    tokens = [pairs.target[SITE][n, 0, : counts[n]] for n in range(len(MAPPED))]
    mean = torch.cat(tokens).mean(0)
    for row in results.of("mean_ablated"):
        wanted = margin(language, row["prompt"], lambda x: mean.expand_as(x))
        assert row["logit_difference"] == pytest.approx(wanted, abs=1e-3)


def test_what_is_generated_is_steered_too(carried, language) -> None:
    """Directions are of the prompts alone, whatever the call writes behind them."""
    call = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    results = carried(
        "gemma2", call, [{"matches": {"pattern": "e"}}], source_sites={SITE: OTHER},
        strengths=[3.0], fit_tokens=None,
    )  # fmt: skip
    native = Directions.load(results.spec.method.directions_file(results.folder.path, "native"))
    own = difference(language, SITE, slice(None))
    torch.testing.assert_close(native[SITE], own, atol=1e-4, rtol=1e-4)
    written = set()
    for row in results.of("native"):
        ids = torch.tensor([language.tokenizer(row["prompt"]).input_ids])
        with hooked(language, SITE, lambda x: x + 3 * own):
            out = language.subject.generate(ids, **call, pad_token_id=0)
        text = language.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["text"] == text and row["matches"] == ("e" in text)
        written.add(text)
    assert written != {row["text"] for row in results.of("unedited")}


def test_shares_of_a_direction_that_does_harm_are_doubted(carried) -> None:
    doubted = {}
    for strength in (0.1, -0.1):
        results = carried(strengths=[strength], folder=f"at {strength}")
        rows = {name: results.of(name) for name in ("unedited", "native")}
        means = {name: sum(r["logit_difference"] for r in own) for name, own in rows.items()}
        page: Any = page_of(results)
        line = "  native does not raise logit_difference at any strength: shares of it say nothing"
        doubted[strength] = line in page.summary()
        assert doubted[strength] == (means["native"] <= means["unedited"])
        assert (line.strip() in (results.folder.path / "report.html").read_text()) == (
            line in page.summary()
        )
    assert sorted(doubted.values()) == [False, True]


def test_rows_without_a_text_have_no_value_and_no_say_in_the_best_strength(carried) -> None:
    rows = [{"prompt": "dog"}, {"prompt": "the star is", "answer": ">"}]
    call = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    results = carried(
        pipeline=call, metrics=[{"matches": {"column": "answer"}}], prompts=rows, batch=1,
        strengths=[0.01, 1.0, 2.0],
    )  # fmt: skip
    own = {
        row["strength"]: row["matches"] for row in results.of("native", prompt=rows[1]["prompt"])
    }
    assert all(row["matches"] is None for row in results.of("native", prompt="dog"))
    assert not own[0.01] and any(own.values())
    page: Any = page_of(results)
    assert page.best("native")["strength"] == min(at for at, found in own.items() if found)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"carry": "loreft"}, "method.carry: loreft is carried between pipelines"),
    ({"trajectory": "target"}, "method.trajectory: latents are of pipelines"),
    ({"maps": ["steps"]}, "method.maps.steps: steps is of pictures or denoising steps"),
    ({"maps": ["noise"]}, "method.maps.noise: noise is of pictures or denoising steps"),
    ({"source": "gemma2"}, "source_sites: .*belongs to transformer.h.1, in .*gemma2: unknown"),
    ({"source": "gemma2", "source_sites": {SITE: "model.layers.*"}}, "stands for 3 sites"),
    ({"source": "gemma2", "source_sites": {SITE: OTHER}, "align": "index"}, "choose align='spans'"),
    ({"metrics": ["detector"]}, "detector needs images; the outputs have logits"),
    ({"metrics": [{"matches": {"pattern": "a"}}]}, "matches needs text; the outputs have logits"),
    (
        {"metrics": [{"matches": {"column": "anser"}}], "pipeline": {"max_new_tokens": 2}},
        "matches: no row has a text in the column 'anser'",
    ),
    ({"fit": {"prompts": ["a cat"]}}, "method.fit: entry '0' has no target prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), CASES, ids=[text[:30] for _, text in CASES])
def test_what_cannot_be_carried(carried, changes, text) -> None:
    with pytest.raises((InvalidInput, UnknownName), match=text):
        carried(**changes)


def test_a_source_of_the_other_kind(saved, experiment) -> None:
    with pytest.raises(
        InvalidInput, match="shapes-unet is a pipeline and the subject .*gpt2 a lan"
    ):
        Experiment(
            name="x", subject=saved("gpt2"), data={"prompts": ROWS}, metrics=["logit_difference"],
            method={"kind": "transfer", "source": "shapes-unet", "sites": SITE, "fit": FIT,
                    "map_data": {"prompts": MAPPED}, "strengths": [1.0]},
        ).plan()  # fmt: skip
    unet = "unet.mid_block"
    method = {"kind": "transfer", "source": saved("gpt2"), "sites": unet, "fit": FIT,
              "map_data": {"prompts": MAPPED}, "strengths": [1.0]}  # fmt: skip
    with pytest.raises(InvalidInput, match="gpt2 is a language model and the subject shapes-unet"):
        experiment(method=method).plan()
    method |= {"source": "shapes-unet", "align": "spans"}
    with pytest.raises(InvalidInput, match="method.align: spans are of the texts of language mod"):
        experiment(method=method).plan()
