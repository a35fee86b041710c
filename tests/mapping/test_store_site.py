"""Stitches that read a store: those of a recording to the bit, and in files."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from dreamreader import edits, load
from dreamreader.edits import Stitch
from dreamreader.engine import Reader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.harvest import Harvest
from dreamreader.mapping import AffineMap, NoiseConditionedMap, StoreSite, lock_step
from dreamreader.store import Store
from dreamreader.zoo import settings

PROMPTS = ["a small red star on a white background", "a large blue circle", "a green square"]
BLOCK = "unet.up_blocks.1"
RUN = {**settings(num_inference_steps=2), "output_type": "latent", "progress": False}
SAMPLES = [(PROMPTS[1], 4), (PROMPTS[0], 3), (PROMPTS[1], 3)]


@cache
def a() -> Reader:
    return load("shapes-unet")


@cache
def b() -> Reader:
    return load("shapes-unet-b")


def harvest(**changes: Any) -> Harvest:
    fields: dict[str, Any] = {
        "name": "source",
        "subject": "shapes-unet",
        "reader": a(),
        "data": {"prompts": PROMPTS},
        "seeds": [3, 4],
        "pipeline": {"num_inference_steps": 2},
        "capture": [{"sites": BLOCK, "dtype": "float32"}],
        "batch": {"rows": 2},
        "store": {"unit": 4},
    }
    return Harvest(**(fields | changes))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return harvest().run(tmp_path_factory.mktemp("stores") / "source", progress=False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


@cache
def affine() -> AffineMap:
    x, y = (
        reader.run(PROMPTS[:1], record=BLOCK, **RUN).cache[BLOCK].shape[-1] for reader in (a(), b())
    )
    return AffineMap(torch.zeros(x), draw(y, x), draw(1, y)[0])


def run(edit: Any, **more: Any) -> torch.Tensor:
    prompts, seeds = map(list, zip(*SAMPLES, strict=True))
    return b().run(prompts, edits=edit, seeds=seeds, **RUN, **more).output


def test_a_store_is_stitched_as_a_recording_of_its_rows_is(store: Store) -> None:
    prompts, seeds = map(list, zip(*SAMPLES, strict=True))
    cache_ = a().run(prompts, record=BLOCK, seeds=seeds, **RUN).cache
    own = affine()
    wanted = run(Stitch(BLOCK, cache_[BLOCK], own, strength=0.5))
    for batch in (None, 2):
        got = run(Stitch(BLOCK, StoreSite(store, BLOCK, SAMPLES), own, strength=0.5),
                  batch_size=batch)  # fmt: skip
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    numbers = [3, 0, 2]  # of the same samples: prompt by prompt, seed by seed
    one, other = (
        run(Stitch(BLOCK, StoreSite(store, BLOCK, each), own)) for each in (numbers, SAMPLES)
    )
    assert torch.equal(one, other)
    turned = run(Stitch(BLOCK, StoreSite(store, BLOCK, [0, 1, 2]), own, strength=0.5))
    assert not torch.allclose(turned, wanted, atol=1e-2)


def test_maps_that_depend_on_the_noise_get_it_from_the_store(store: Store) -> None:
    own = affine()
    both = torch.stack([own.weight, 0.1 * own.weight]), torch.stack([own.bias, own.bias])
    noisy = NoiseConditionedMap(own.source_mean, *both, centre=0.5, scale=4.0)
    prompts, seeds = map(list, zip(*SAMPLES, strict=True))
    record = a().run(prompts, record=BLOCK, seeds=seeds, **RUN).cache[BLOCK]
    levels = [each.sigma for each in record.steps]
    got = run(Stitch(BLOCK, StoreSite(store, BLOCK, SAMPLES), noisy))
    wanted = run(Stitch(BLOCK, record, noisy, levels=levels))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_texts_are_stitched_token_by_token(tmp_path: Path) -> None:
    reader, site = Reader(*tiny.language_model("gpt2")), "transformer.h.1"
    texts = ["a cat", "a red dog on a tree"]
    made = Harvest(
        name="texts", subject="gpt2", reader=reader, data={"prompts": texts},
        capture=[{"sites": site, "dtype": "float32"}], batch={"rows": 2},
    ).run(tmp_path / "texts", progress=False)  # fmt: skip
    plain = reader.run(texts, progress=False).output.logits
    same = reader.run(texts, edits=Stitch(site, StoreSite(made, site)), progress=False)
    torch.testing.assert_close(same.output.logits, plain, atol=1e-4, rtol=1e-4)


def test_a_file_has_the_map_and_the_way_to_the_store(store: Store, tmp_path: Path) -> None:
    edit = Stitch(BLOCK, StoreSite(store, BLOCK, SAMPLES), affine(), strength=[0.5, 1.0, 0.0])
    edits.save(tmp_path / "edit.safetensors", edit)
    (loaded,) = edits.load(tmp_path / "edit.safetensors")
    assert loaded == edit and torch.equal(run(loaded), run(edit))
    prompts, seeds = map(list, zip(*SAMPLES, strict=True))
    record = a().run(prompts, record=BLOCK, seeds=seeds, **RUN).cache[BLOCK]
    whole = Stitch(BLOCK, record, affine())
    edits.save(tmp_path / "whole.safetensors", whole)
    assert edits.load(tmp_path / "whole.safetensors") == [whole]


def test_files_of_stores_that_are_gone_or_others_are_refused(tmp_path: Path) -> None:
    made = harvest(capture=[{"sites": BLOCK, "steps": 0}]).run(tmp_path / "made", progress=False)
    file = tmp_path / "edit.safetensors"
    edits.save(file, Stitch(BLOCK, StoreSite(made, BLOCK)))
    made.path.rename(tmp_path / "away")
    with pytest.raises(InvalidInput, match="made: no such file"):
        edits.load(file)
    harvest(capture=[{"sites": BLOCK, "steps": 1}]).run(made.path, progress=False)
    with pytest.raises(InvalidInput, match="holds another harvest than the one that is meant"):
        edits.load(file)
    follower = lock_step(a(), b(), PROMPTS[:1], BLOCK, **RUN)
    with pytest.raises(InvalidInput, match="source cannot be saved: LockStepSite"):
        edits.save(file, Stitch(BLOCK, follower.at(BLOCK), affine()))


def test_what_a_store_has_not_is_refused(store: Store, tmp_path: Path) -> None:
    any_store: Any = store.path
    with pytest.raises(InvalidInput, match="an open store is needed, got PosixPath"):
        StoreSite(any_store, BLOCK)
    with pytest.raises(UnknownName, match="site of the store 'unet.up_block'; nearest: unet.up_b"):
        StoreSite(store, "unet.up_block")
    for sample, text in (
        (("a cat", 3), r"no sample \('a cat', 3\); it has 6, the first is \('a small red"),
        (6, "no sample 6; it has 6"),
        (("a cat",), r"a sample is \(prompt, seed\) or a number, got \('a cat',\)"),
        ((PROMPTS[0], "3"), "a seed is a whole number, got '3'"),
        ("a cat", "is a whole number, got 'a cat'"),
    ):
        with pytest.raises(InvalidInput, match=text):
            StoreSite(store, BLOCK, [sample])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="it has 2 rows, the run 3; choose samples="):
        run(Stitch(BLOCK, StoreSite(store, BLOCK, [0, 1]), affine()))
    some = harvest(
        capture=[{"sites": BLOCK, "steps": 0, "branch": "cond", "tokens": {"every": 2}}],
    ).run(tmp_path / "some", progress=False)
    source = StoreSite(some, BLOCK, SAMPLES)
    with pytest.raises(InvalidInput, match="no rows at step 0 in the branch 'uncond'; its steps"):
        run(Stitch(BLOCK, source, affine()))
    with pytest.raises(InvalidInput, match="no rows at step 1 in the branch 'cond'; its"):
        run(Stitch(BLOCK, source, affine(), branch="cond", steps=1))
    whole = harvest(
        capture=[{"sites": BLOCK, "branch": "cond", "dtype": "float32"}],
    ).run(tmp_path / "whole", progress=False)
    one, other = (
        run(Stitch(BLOCK, StoreSite(each, BLOCK, SAMPLES), affine(), branch="cond"))
        for each in (whole, store)
    )
    assert torch.equal(one, other)
    with pytest.raises(InvalidInput, match="it holds only some tokens of unet.up_blocks.1"):
        run(Stitch(BLOCK, source, affine(), branch="cond", steps=0))
