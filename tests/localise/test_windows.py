"""Windows of layers that read another prompt, against hooks that swap the text by hand."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.engine import Cache, Reader, RunResult
from dreamreader.errors import InvalidInput
from dreamreader.localise import patch_edits, text_layers, window_cells, window_grid, window_source

PROMPTS, TARGETS = ["a red cat", "a dog on a tree"], ["a blue dog", "a fish in a tree"]
SEEDS = [5, 6]


def settings(name: str) -> dict[str, Any]:
    return {**tiny.arguments(name), "output_type": "pt"}


def metric(result: RunResult) -> Tensor:
    return result.images[:, 0].flatten(1)[:, ::7].mean(1)


def text_of(reader: Reader, prompts: list[str]) -> Tensor:
    """What the layers of a UNet are given as text of the prompts."""
    pipe = reader.subject
    embeds, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    return embeds


def swapped(reader: Reader, layers: list[str], **kw: Any) -> Tensor:
    """Pictures of the prompts with the targets' text given to the conditional half of layers."""
    other = text_of(reader, TARGETS)

    def give(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        states = kwargs["encoder_hidden_states"]
        uncond, cond = states.chunk(2)
        return args, {**kwargs, "encoder_hidden_states": torch.cat([uncond, other.to(cond)])}

    handles = []
    for path in layers:
        module = reader.subject.unet.get_submodule(path.removeprefix("unet."))
        handles.append(module.register_forward_pre_hook(give, with_kwargs=True))
    try:
        return reader.run(PROMPTS, seeds=SEEDS, **kw).images
    finally:
        for handle in handles:
            handle.remove()


def test_windows_are_what_swapping_the_text_by_hand_gives() -> None:
    reader, kw = Reader(tiny.pipeline("sd")), settings("sd")
    cells = window_cells(reader, 3)
    assert len(cells) == len(text_layers(reader)) == 7
    result, source = window_source(reader, TARGETS, cells, seeds=SEEDS, **kw)
    assert not isinstance(source, Cache)  # one step is all that is kept
    plain = reader.run(PROMPTS, seeds=SEEDS, **kw).images
    for cell in cells:
        edits = patch_edits([cell, cell], source, [0, 1])
        ours = reader.run(PROMPTS, edits=edits, seeds=SEEDS, **kw).images
        layers = list(dict.fromkeys(site.partition(":")[0] for site in cell.sites))
        truth = swapped(reader, layers, **kw)
        effect = float((truth - plain).abs().max())
        assert effect > 1e-3
        assert float((ours - truth).abs().max()) < 1e-3 * effect
    everywhere = swapped(
        reader, [layer[0].partition(":")[0] for layer in text_layers(reader)], **kw
    )
    torch.testing.assert_close(everywhere, result.images, rtol=0, atol=1e-4)


def test_a_window_over_all_layers_is_the_target_itself() -> None:
    reader, kw = Reader(tiny.pipeline("sd")), settings("sd")
    whole = window_cells(reader, 7)[:1]
    found = window_grid(reader, PROMPTS, TARGETS, metric=metric, cells=whole, seeds=SEEDS, **kw)
    assert found.effects[0].value == pytest.approx(1, abs=1e-3)
    one = window_grid(reader, PROMPTS, TARGETS, metric=metric, span=1, seeds=SEEDS, **kw)
    assert len(one.cells) == 7 and np.abs(one.values - one.base).max() > 1e-4


@pytest.mark.parametrize("name", ["sdxl", "sd-img2img", "pixart-sigma", "sd3", "flux", "aura-flow"])
def test_every_family_with_text_of_its_own_has_windows(name: str) -> None:
    reader, kw = Reader(tiny.pipeline(name)), settings(name)
    if "img2img" in name:
        kw["image"] = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = window_grid(
        reader, PROMPTS, TARGETS, metric=metric, span=1, seeds=SEEDS, batch_size=4, **kw
    )
    assert (np.abs(found.values - found.base).max(1) > 1e-6).all()
    assert np.abs(found.values - found.goal).max() > 1e-6


def test_the_text_of_an_mmdit_is_kept_at_every_step() -> None:
    """Its keys and values change with the step: the window gives those of the running step."""
    reader, kw = Reader(tiny.pipeline("sd3")), settings("sd3")
    cells = window_cells(reader, 1)
    _, source = window_source(reader, TARGETS, cells, seeds=SEEDS, **kw)
    assert isinstance(source, Cache)
    site = cells[1].sites[0]
    assert len(source[site].steps) == 4
    kept = source[site].tensor
    assert float((kept[:, 0] - kept[:, 1]).abs().max()) > 1e-3
    edits = patch_edits([cells[1]] * 2, source, [0, 1])
    after = reader.run(PROMPTS, edits=edits, record=site, seeds=SEEDS, **kw).cache[site]
    assert torch.equal(after.select(branch="cond").tensor, kept)


def test_partial_windows_are_marked() -> None:
    reader = Reader(tiny.pipeline("sd"))
    notes = [cell.note for cell in window_cells(reader, 3)]
    assert notes == [""] * 5 + ["partial: 2 of 3 layers", "partial: 1 of 3 layers"]
    assert window_cells(reader, 3)[-1].label == "layer 6 · cond · partial: 1 of 3 layers"


def test_bad_input() -> None:
    reader = Reader(tiny.pipeline("sd"))
    for span in (0, 8):
        with pytest.raises(InvalidInput, match=f"span={span} must be between 1 and the 7 layers"):
            window_cells(reader, span)
    with pytest.raises(InvalidInput, match="CogView4Pipeline has no attention layer with keys"):
        window_cells(Reader(tiny.pipeline("cogview4")))
    with pytest.raises(InvalidInput, match="2 clean prompts and 1 corrupted ones"):
        window_grid(reader, ["a"], TARGETS, metric=metric, **settings("sd"))
