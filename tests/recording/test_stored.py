"""Rows of two stores are paired by prompt, seed, step and token, whatever their units."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harvest.jobs import LAYER, MIDDLE, PROMPTS, gpt2, pictures, texts

import dreamreader
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.mapping import PairedRows
from dreamreader.recording import StorePairs
from dreamreader.store import Store


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Store, Store, Store]:
    """Of two UNets with random tokens; and of the second with other units and prompts."""
    folder = tmp_path_factory.mktemp("stores")
    kept: dict[str, Any] = {
        "capture": [{"sites": MIDDLE, "tokens": {"random": 0.5}, "dtype": "float32"}]
    }
    other = dreamreader.load("shapes-unet-b")
    return (
        pictures(**kept).run(folder / "a", progress=False),
        pictures(reader=other, subject="shapes-unet-b", **kept).run(folder / "b", progress=False),
        pictures(
            reader=other, subject="shapes-unet-b", data={"prompts": ["a red star", *PROMPTS[1:]]},
            seeds=[1], store={"unit": 1}, capture=[{"sites": MIDDLE, "dtype": "float32"}],
        ).run(folder / "c", progress=False),
    )  # fmt: skip


def by_key(store: Store) -> dict[Any, torch.Tensor]:
    rows = store.read(MIDDLE, branch="cond")
    keys = zip(
        *(rows.keys[name].to_pylist() for name in ("prompt", "seed", "step", "token")), strict=True
    )
    return dict(zip(keys, rows.values, strict=True))


def test_harvests_of_the_same_rows_pair_one_by_one(stores: Any) -> None:
    one, other, _ = stores
    pairs = StorePairs(one, other, MIDDLE, MIDDLE)
    found = pairs.read()
    a, b = by_key(one), by_key(other)
    assert a.keys() == b.keys() and len(found) == len(a) and pairs.unpaired == (0, 0)
    wanted = torch.stack([torch.cat([a[key], b[key]]) for key in b])
    torch.testing.assert_close(torch.cat([found.source, found.target], 1), wanted)
    assert found.steps.tolist() == [key[2] for key in b]
    assert [PROMPTS[n] for n in found.groups] == [key[0] for key in b]
    rows = PairedRows(found.source, found.target, groups=found.groups, steps=found.steps)
    train, held = rows.split(0.3)
    assert not set(train.groups.tolist()) & set(held.groups.tolist())  # pyright: ignore


def test_what_only_one_store_has_is_counted_and_left_out(stores: Any) -> None:
    one, _, other = stores
    pairs = StorePairs(one, other, MIDDLE, MIDDLE, by="sigma")
    found = pairs.read()
    a, b = by_key(one), by_key(other)
    common = [key for key in b if key in a]
    assert 0 < len(common) < len(b) and len(found) == len(common)
    assert pairs.unpaired == (len(a) - len(common), len(b) - len(common))
    wanted = torch.stack([torch.cat([a[key], b[key]]) for key in common])
    torch.testing.assert_close(torch.cat([found.source, found.target], 1), wanted)


def test_seeds_in_another_order_leave_the_tokens_that_both_have_drawn(
    stores: Any, tmp_path: Path
) -> None:
    chosen = {"sites": MIDDLE, "tokens": {"random": 0.5}, "dtype": "float32"}
    turned = pictures(seeds=[1, 0], capture=[chosen]).run(tmp_path / "turned", progress=False)
    pairs = StorePairs(stores[0], turned, MIDDLE, MIDDLE)
    share = len(pairs.read()) / len(by_key(turned))
    assert 0.35 < share < 0.65  # half of the tokens in each, so a quarter of all in both
    pooled = [
        pictures(seeds=seeds, capture=[chosen | {"pool": "mean"}]).run(
            tmp_path / f"pooled-{seeds[0]}", progress=False
        )
        for seeds in ([0, 1], [1, 0])
    ]
    means = StorePairs(*pooled, MIDDLE, MIDDLE)
    found = means.read()
    assert means.unpaired == (0, 0) and not torch.allclose(found.source, found.target, atol=1e-3)


def test_stores_that_do_not_belong_together_are_refused(stores: Any, tmp_path: Path) -> None:
    one, other, _ = stores
    with pytest.raises(InvalidInput, match=r"open stores are needed, got str; Store\(path\) opens"):
        StorePairs(one, "other", MIDDLE, MIDDLE)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownName, match="unknown key of stored pairs 'time'"):
        StorePairs(one, other, MIDDLE, MIDDLE, by="time")
    strange = pictures(data={"prompts": ["a green circle"]}).run(tmp_path / "s", progress=False)
    with pytest.raises(InvalidInput, match="no prompts in common: the first has 'a red circle'"):
        StorePairs(one, strange, MIDDLE, MIDDLE)
    seeds = pictures(seeds=[7]).run(tmp_path / "seeds", progress=False)
    with pytest.raises(InvalidInput, match="no seed of a prompt in common.* with seed 7"):
        StorePairs(one, seeds, MIDDLE, MIDDLE)
    steps = pictures(pipeline={"num_inference_steps": 3}).run(tmp_path / "n", progress=False)
    with pytest.raises(InvalidInput, match="step 1 has sigma .* pair by='sigma', or harvest both"):
        StorePairs(one, steps, MIDDLE, MIDDLE).read()
    fine = pictures(capture=[{"sites": "unet.up_blocks.2"}]).run(tmp_path / "f", progress=False)
    with pytest.raises(InvalidInput, match=r"grid of \(2, 2\) and unet.up_blocks.2 of \(16, 16\)"):
        StorePairs(one, fine, MIDDLE, "unet.up_blocks.2")
    mean = pictures(capture=[{"sites": MIDDLE, "pool": "mean"}]).run(tmp_path / "m", progress=False)
    with pytest.raises(InvalidInput, match="stored with pool=none and .* with pool=mean"):
        StorePairs(one, mean, MIDDLE, MIDDLE)


def test_texts_pair_by_token_where_the_tokenizer_is_one(tmp_path: Path) -> None:
    one, other = (texts(store={"unit": n}).run(tmp_path / str(n), progress=False) for n in (1, 3))
    found = StorePairs(one, other, LAYER, LAYER, branch=None).read()
    assert len(found) == one.rows  # texts of other batches are equal but for rounding
    torch.testing.assert_close(found.source, found.target, rtol=1e-4, atol=1e-5)
    reader = dreamreader.Reader(gpt2().subject, _Other(gpt2().tokenizer))
    cut = texts(reader=reader).run(tmp_path / "cut", progress=False)
    with pytest.raises(InvalidInput, match="models with other tokenizers, so tokens of one number"):
        StorePairs(one, cut, LAYER, LAYER, branch=None)


class _Other:
    """The same tokenizer under another name."""

    def __init__(self, own: Any):
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __len__(self) -> int:
        return len(self._own)

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self._own(*args, **more)
