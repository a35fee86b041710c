"""What a session works out once and uses again: plans of sites, memory of recordings."""

from dataclasses import replace

import tiny
import torch
from torch import nn

from dreamreader.edits import Edit, Steer
from dreamreader.engine import Reader, Record

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
TEXT = "text_encoder.**.layers.0"


def call(pipe, prompt: str, steps: int = 3):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent").images


def test_the_place_of_a_word_follows_the_prompt_of_each_run() -> None:
    pipe = tiny.pipeline("sd")
    reader = Reader(pipe)
    found = []
    with reader.editing(Edit(TEXT, lambda x, place: found.append(place.selected), tokens="cat")):
        call(pipe, "a cat")
        call(pipe, "two small houses by the cat")
    hits = [each.nonzero()[:, -1].tolist() for each in found if each.any()]
    assert hits[0] != hits[-1]


def test_a_step_window_is_planned_step_by_step() -> None:
    pipe = tiny.pipeline("sd")
    reader = Reader(pipe)
    width = reader.sites(SITE)[0].tap.module.to_out[0].out_features
    steer = Steer(SITE, torch.ones(width), alpha=1.0, steps=[1])
    with reader.editing(steer) as firing:
        call(pipe, "a cat")
    assert dict(firing[0].steps) == {1: 1}
    result = reader.run("a cat", record=Record(SITE, steps=[0, 2]), seeds=0, num_inference_steps=3)
    assert [each.step for each in result.cache[SITE].steps] == [0, 2]


def test_a_recording_holds_its_values_once() -> None:
    reader = Reader(tiny.pipeline("sd"))
    result = reader.run("a cat", record=SITE, seeds=range(3), num_inference_steps=4)
    tensor = result.cache[SITE].tensor
    assert tensor.shape[:3] == (3, 2, 4) and tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes


class _BySite(Steer):
    """Another direction at each site, which the class it is made of does not know of."""

    def instructions(self, place):
        number = float(place.site)
        return [
            replace(each, vectors=number * each.vectors) for each in super().instructions(place)
        ]


def test_only_edits_that_are_the_same_at_all_sites_share_their_programs() -> None:
    net = nn.Sequential(*(nn.Identity() for _ in range(3)))
    x, push = torch.zeros(1, 2, 4), torch.arange(1.0, 5.0)
    steers = {
        "one": Steer("*", push),
        "mapped": Steer("*", {str(n): n * push for n in range(3)}),
        "own": _BySite("*", push),
        "wider": Steer("*", push, channels=[1]),
    }
    found = {}
    for name, steer in steers.items():
        with Reader(net).editing(steer) as firing, Reader(net).recording("*") as cache:
            found[name] = net(x)
        assert [each.calls for each in firing] == [1, 1, 1]
        assert [len(cache[str(n)].rows) for n in range(3)] == [1, 1, 1]
    whole = push.expand(1, 2, 4)
    assert torch.equal(found["one"], 3 * whole)
    assert torch.equal(found["mapped"], 3 * whole) and torch.equal(found["own"], 3 * whole)
    assert torch.equal(found["wider"], 3 * whole * torch.tensor([0.0, 1.0, 0.0, 0.0]))
