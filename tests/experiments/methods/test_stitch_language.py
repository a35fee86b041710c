"""Stitches of language models in experiments: divergences of the next token, by hooks by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.experiments import Experiment
from dreamreader.experiments.methods.stitch_maps import MapKey, SitePair
from dreamreader.experiments.pages import page_of
from dreamreader.experiments.results import Results
from dreamreader.mapping import ActivationMap
from dreamreader.recording import record_between

SITE, OTHER = "model.layers.1", "transformer.h.1"
PAIR = {"source": OTHER, "target": SITE}
FITTED = [
    f"a {colour} {thing} sat on the {place}"
    for colour in ("red", "blue")
    for thing in ("cat", "dog", "tree")
    for place in ("mat", "green house")
]
PROMPTS = ["the blue cat is well-known", "dogs, on a red tree"]


@pytest.fixture(scope="module")
def target() -> Reader:
    return Reader(*tiny.language_model("gemma2"))


@pytest.fixture
def stitched(saved, tmp_path) -> Callable[..., Results]:
    """Runs stitches of another language model into the tiny Gemma."""

    def run(source: str = "gpt2", metrics: Any = ("next_token_kl",), pipeline: Any = None, **own):
        method = {
            "kind": "stitch",
            "source": source if source.startswith("shapes") else saved(source),
            "sites": [PAIR],
            "fit": {"prompts": FITTED},
            "maps": [{"method": "ridge", "options": {"lambdas": 0.01}}],
        }
        return Experiment(
            name="stitched",
            subject=saved("gemma2"),
            data={"prompts": PROMPTS},
            method=method | own,
            metrics=list(metrics),
            pipeline=pipeline or {},
            batch={"rows": 2},
        ).run(tmp_path / "run")

    return run


def states(reader: Reader, site: str, prompt: str) -> Tensor:
    kept: list[Tensor] = []
    module = reader.subject.get_submodule(site)
    handle = module.register_forward_hook(
        lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        reader.subject(torch.tensor([reader.tokenizer(prompt).input_ids]))
    handle.remove()
    return kept[0][0]


def logits(reader: Reader, prompt: str, values: Tensor | None = None, at: Any = ()) -> Tensor:
    """[tokens, vocabulary] with the values of a site replaced at some tokens."""

    def put(module: Any, args: Any, out: Any) -> Any:
        new = (out[0] if isinstance(out, tuple) else out).clone()
        new[0, at] = values
        return (new, *out[1:]) if isinstance(out, tuple) else new

    module = reader.subject.get_submodule(SITE)
    handle = None if values is None else module.register_forward_hook(put)
    with torch.no_grad():
        found = reader.subject(torch.tensor([reader.tokenizer(prompt).input_ids])).logits[0]
    if handle is not None:
        handle.remove()
    return found.double().log_softmax(-1)


@pytest.mark.parametrize(("pipeline", "skip"), [({}, 0), ({"logits_to_keep": 1}, 2)])
def test_divergences_are_those_of_hooks_by_hand(stitched, target, pipeline, skip) -> None:
    results = stitched(strengths=[1.0], pipeline=pipeline, skip=skip)
    assert results.conditions == ["unedited", "mean_ablated", "random_map", "stitched"]
    assert [row["next_token_kl"] for row in results.of("unedited")] == [0, 0]
    source = Reader(*tiny.language_model("gpt2"))
    pairs = record_between(source, target, PROMPTS, OTHER, SITE, align="spans", skip=skip)
    assert pairs.positions is not None
    for condition in results.conditions[1:]:
        for number, row in enumerate(results.of(condition)):
            key = MapKey(SitePair(**PAIR), row["map"], row["fit_prompts"])
            own = ActivationMap.load(results.folder.path / "artifacts" / f"{key.file}.safetensors")
            one, other = (each[number][each[number] >= 0] for each in pairs.positions)
            ids = target.tokenizer(row["prompt"]).input_ids
            assert 2 < len(other) < len(ids)  # the beginning has no partner
            mapped = own.apply(states(source, OTHER, row["prompt"])[one])
            before = logits(target, row["prompt"])[other]
            after = logits(target, row["prompt"], mapped, other)[other]
            wanted = kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
            assert row["next_token_kl"] == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
            assert row["next_token_kl"] > 1e-4


def test_shares_are_of_what_the_mean_destroys(stitched) -> None:
    results = stitched(strengths=[1.0, 0.5])
    page: Any = page_of(results)
    assert page.is_distance
    sums = {
        name: sum(row["next_token_kl"] for row in results.of(name, strength=1.0))
        for name in results.conditions
        if name != "unedited"
    }
    share = page.share("stitched", strength=1.0)
    assert share.value == pytest.approx(1 - sums["stitched"] / sums["mean_ablated"])
    assert share.low <= share.value <= share.high and share.n == len(PROMPTS)
    mean = page.share("mean_ablated", cell=f"{OTHER} > {SITE}")
    assert (mean.value, mean.low, mean.high) == (0, 0, 0)
    (line,) = page.summary()
    assert line.startswith(f"  {OTHER} > {SITE}: recovered of the mean's next_token_kl: ridge")
    html = (results.folder.path / "report.html").read_text()
    assert "0 is no better than the mean" in html and "FVU" in html


@pytest.mark.parametrize("align", ["index", "spans"])
def test_a_model_in_its_double_is_itself(stitched, align) -> None:
    results = stitched("gemma2", sites=[SITE], maps=["identity"], align=align)
    assert all(row["next_token_kl"] < 1e-6 for row in results.of("stitched"))
    assert page_of(results).share("stitched").value == pytest.approx(1, abs=1e-5)  # pyright: ignore


def test_what_is_generated_behind_a_stitched_prompt(stitched, target) -> None:
    """The prompt alone is stitched: a mean at its tokens, and what follows from it."""
    call = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    results = stitched(metrics=[{"matches": {"pattern": "a"}}], pipeline=call)
    own = {name: [row["text"] for row in results.of(name)] for name in results.conditions}
    assert own["mean_ablated"] != own["unedited"]
    for row in results.of("unedited"):
        ids = torch.tensor([target.tokenizer(row["prompt"]).input_ids])
        out = target.subject.generate(ids, **call, pad_token_id=0)
        text = target.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["text"] == text


def test_other_methods_compare_all_tokens_of_the_prompt(saved, target, tmp_path) -> None:
    zero = {"kind": "ablate", "sites": SITE, "ablation": "zero", "random_sets": 0}
    results = Experiment(
        name="zero", subject=saved("gemma2"), data={"prompts": PROMPTS}, method=zero,
        metrics=["next_token_kl"],
    ).run(tmp_path / "run")  # fmt: skip
    for row in results.of("ablated"):
        before = logits(target, row["prompt"])
        after = logits(target, row["prompt"], torch.zeros(32), slice(None))
        wanted = kl_div(after, before, reduction="none", log_target=True).sum(-1).mean()
        assert row["next_token_kl"] == pytest.approx(float(wanted), rel=1e-3)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"source": "shapes-unet"}, "shapes-unet is a pipeline and the subject .*gemma2 a language m"),
    ({"align": "place"}, "method.align: places are of pictures; choose spans or index"),
    ({"align": "index"}, "choose align='spans'"),
    ({"schedule": "target"}, "method.schedule: is of denoisers, which a language model has not"),
    ({"branch": "cond"}, "method.branch: is of denoisers"),
    ({"source_pipeline": {"eta": 1}}, "method.source_pipeline: is of denoisers"),
    ({"controls": []}, "next_token_kl is 0 without a stitch, so shares are of that of the mean"),
    ({"metrics": ["pixel_distance"]}, "pixel_distance needs images; the outputs have logits"),
    ({"sites": [SITE]}, "unknown site .model.layers.1"),
    ({"maps": [{"method": "local", "options": {"k": 3}}]}, r"method.maps \(.*, local k=3"),
]


@pytest.mark.parametrize(("changes", "text"), CASES, ids=[text[:30] for _, text in CASES])
def test_what_cannot_be_stitched(stitched, changes, text) -> None:
    with pytest.raises((InvalidInput, UnknownName), match=text):
        stitched(**changes)


def test_pictures_have_no_next_token(experiment, tmp_path) -> None:
    with pytest.raises(InvalidInput, match="next_token_kl needs a language model that has a deco"):
        experiment(metrics=["next_token_kl"]).run(tmp_path / "run")
