"""One test for each defect of other tools that concerns the engine (PEERS.md, sections 2 and 3).

Each would fail with the behaviour that it is named after.
"""

import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from dreamreader.edits import Ablate, Scale, Steer
from dreamreader.engine import Reader, Record
from dreamreader.errors import ClockUnknown, NeverFired, UnknownName

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
V = torch.ones(32)


def run(reader: Reader, prompts: Any = "a red cat", name: str = "sd", **kw: Any) -> Any:
    arguments = {"seeds": 0, "output_type": "latent", **tiny.arguments(name, 3), **kw}
    return reader.run(prompts, **arguments)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(tiny.pipeline("sd"))


# 2.1 silent no-op


def test_an_edit_that_matches_nothing_is_an_error(reader: Reader) -> None:
    with pytest.raises(UnknownName, match="nearest: unet.mid_block.attentions"):
        run(reader, edits=Steer("unet.mid_block.atentions", V))
    with pytest.raises(NeverFired, match="was not called in this run"):
        run(reader, edits=Scale("vae.encoder.conv_in", 2.0))


def test_a_strength_without_effect_is_told(reader: Reader) -> None:
    flat = run(reader, edits=Steer(SITE, 0 * V, 5.0)).firing
    assert flat.warnings == [f"{SITE}: strength above 0, but no value changed"]


# 2.2 guidance branch


@pytest.mark.parametrize(
    ("name", "site", "together"),
    [
        ("sd", SITE, True),  # uncond first in one batch
        ("pixart-sigma", "transformer.transformer_blocks.0.attn2", True),
        ("cogview4", "transformer.transformer_blocks.0", False),  # calls with a named context
        ("flux-true-cfg", "transformer.transformer_blocks.0", False),
    ],
)
def test_a_branch_is_the_prompt_it_belongs_to(name: str, site: str, together: bool) -> None:
    """With the prompts swapped, `cond` holds what `uncond` held before."""
    reader = Reader(tiny.pipeline(name))
    record = [Record(site, steps=0)]

    def both(prompt: str, negative: str) -> Any:
        return run(reader, prompt, name=name, record=record, negative_prompt=negative).cache[site]

    one, swapped = both("a red cat", "a blue dog"), both("a blue dog", "a red cat")
    for branch, other in (("cond", "uncond"), ("uncond", "cond")):
        a, b = one.select(branch=branch).tensor, swapped.select(branch=other).tensor
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one.select(branch="cond").tensor, one.select(branch="uncond").tensor)


def test_two_rows_without_guidance_are_not_two_branches(reader: Reader) -> None:
    found = run(reader, ["a cat", "a dog"], record=SITE, guidance_scale=1.0).cache[SITE]
    assert found.branches == ("cond",) and found.shape == (2, 3, 24, 32)
    with pytest.raises(UnknownName, match="unknown branch 'uncond'"):
        run(reader, ["a cat", "a dog"], edits=Steer(SITE, V, branch="uncond"), guidance_scale=1.0)


def test_a_pipeline_of_unknown_layout_is_asked_nothing_or_refuses() -> None:
    from diffusers import StableDiffusionPipeline

    class OwnLoop(StableDiffusionPipeline):
        def __call__(self, prompt: Any = None, generator: Any = None, **kw: Any) -> Any:
            return StableDiffusionPipeline.__call__(self, prompt, generator=generator, **kw)

    pipe = tiny.pipeline("sd")
    own = OwnLoop(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    kw = {"output_type": "latent", "num_inference_steps": 1, "height": 16, "width": 24}
    with (
        pytest.raises(ClockUnknown, match="branch='cond' was asked for.*OwnLoop"),
        Reader(own).editing(Steer(SITE, V, branch="cond")),
    ):
        own("a cat", **kw)
    with Reader(own).editing(Steer(SITE, V)) as report:
        own("a cat", **kw)
    assert report[0].calls == 1


# 2.3 and 3.1 the step is not the number of calls


@pytest.mark.parametrize("scheduler", ["Heun", "KDPM2", "PNDM"])
def test_steps_of_second_order_schedulers(scheduler: str) -> None:
    """Five to seven calls of the denoiser are four steps."""
    import diffusers

    pipe = tiny.pipeline("sd")
    kind = getattr(diffusers, f"{scheduler}{'' if scheduler == 'PNDM' else 'Discrete'}Scheduler")
    options = {"skip_prk_steps": True} if scheduler == "PNDM" else {}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    result = run(Reader(pipe), record=SITE, edits=Steer(SITE, V, steps=1), num_inference_steps=4)
    steps = [each.step for each in result.cache[SITE].steps]
    calls = result.firing[0].calls
    assert max(steps) == 3
    assert calls == steps.count(1) == (1 if scheduler == "PNDM" else 2)


def test_steps_of_img2img_start_where_its_strength_says() -> None:
    from PIL import Image

    image = Image.new("RGB", (24, 16), (200, 30, 30))
    result = run(
        Reader(tiny.pipeline("sd-img2img")),
        name="sd-img2img",
        record=SITE,
        image=image,
        strength=0.5,
        num_inference_steps=4,
    )
    assert [each.step for each in result.cache[SITE].steps] == [2, 3]
    assert [each.fraction for each in result.cache[SITE].steps] == [0.5, 0.75]


def test_an_edit_used_again_starts_at_the_first_step(reader: Reader) -> None:
    edit = Steer(SITE, V, steps=0)
    first = run(reader, edits=edit)
    assert torch.equal(run(reader, edits=edit).images, first.images)
    with reader.editing(edit) as report:
        for _ in range(2):
            reader.subject("a cat", output_type="latent", **tiny.arguments("sd", 3))
    assert dict(report[0].steps) == {0: 2}


# 2.4 memory


def test_memory_of_a_reduced_recording_does_not_grow_with_tokens_or_batch() -> None:
    reader = Reader(tiny.pipeline("sd"))
    site = "unet.up_blocks.1"
    small = Record(site, reduce=lambda x: x.mean(1, keepdim=True))
    found = run(reader, record=small, num_inference_steps=6).cache[site]
    assert found.tensor.nbytes == 2 * 6 * 16 * 4


# 2.6 and 3.8 hooks


def test_only_own_hooks_are_removed_also_after_an_exception(reader: Reader) -> None:
    unet = reader.subject.unet
    mine = unet.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="stop"), reader.editing(Steer(SITE, V)):
        raise RuntimeError("stop")
    assert list(unet.mid_block._forward_hooks) == [mine.id]
    mine.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


# 2.8 memory is given back without the garbage collector: tests/engine/test_reader.py
# 2.7 torch.compile: tests/engine/test_coexistence.py


# 2.9 dtype


def test_the_model_is_never_cast(reader: Reader) -> None:
    record = Record(SITE, dtype=torch.float16)
    run(reader, edits=Steer(SITE, V.double(), 1.0), record=record)
    assert {each.dtype for each in reader.subject.unet.parameters()} == {torch.float32}


# 2.11 one setting per run


def test_rows_of_a_sweep_equal_single_runs(reader: Reader) -> None:
    alphas = [0.0, 1.5, -2.0]
    sweep = run(reader, edits=Steer(SITE, V, alphas)).images
    for row, alpha in enumerate(alphas):
        single = run(reader, edits=Steer(SITE, V, alpha)).images[0]
        torch.testing.assert_close(sweep[row], single, rtol=1e-4, atol=1e-4)


# 2.14 attention maps without other processors


@pytest.mark.parametrize("name", ["sd", "flux", "lumina2"])
def test_processors_are_never_replaced(name: str) -> None:
    pipe = tiny.pipeline(name)
    root = "unet" if name == "sd" else "transformer"
    denoiser = getattr(pipe, root)
    before = denoiser.attn_processors if hasattr(denoiser, "attn_processors") else {}
    during: list[Any] = []
    handle = denoiser.register_forward_hook(
        lambda *_: during.append(dict(getattr(denoiser, "attn_processors", {})))
    )
    record = Record(f"{root}.**.attn*:probs", branch="cond")
    plain = run(Reader(pipe), name=name).images
    assert torch.equal(run(Reader(pipe), name=name, record=record).images, plain)
    handle.remove()
    assert all(each == before for each in during)


# 2.15 imports


def test_importing_the_package_imports_torch_only() -> None:
    code = (
        "import sys, dreamreader, dreamreader.engine, dreamreader.edits; print([m for m in "
        "('diffusers', 'transformers', 'numpy.f2py', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# 3.2 recording and editing have one default


def test_recording_and_editing_cover_the_same_branches(reader: Reader) -> None:
    result = run(reader, edits=Steer(SITE, V), record=SITE)
    edit, record = result.firing
    assert set(edit.branches) == set(record.branches) == {"uncond", "cond"}


# 3.3 operators on one module compose, input and output too


def test_input_and_output_of_one_module_are_edited_together(reader: Reader) -> None:
    edits = [Scale(f"{SITE}:in", 2.0), Steer(SITE, V, 1.0), Steer(SITE, V, 2.0)]
    result = run(reader, edits=edits, record=[f"{SITE}:in", SITE])
    module = reader.subject.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    plain = run(reader, record=f"{SITE}:in").cache[f"{SITE}:in"].tensor[:, :, 0]
    torch.testing.assert_close(result.cache[f"{SITE}:in"].tensor[:, :, 0], 2 * plain)
    assert all(each.calls == 3 for each in result.firing[:3])
    assert not module._forward_hooks


# 3.4 head and place selections apply


def test_one_head_in_one_corner(reader: Reader) -> None:
    from dreamreader.edits import Box

    site = f"{SITE}:heads"
    before = run(reader, record=Record(site, steps=0)).cache[site].tensor
    edit = Ablate(site, heads=[1], tokens=Box(0, 0, 0.5, 0.5), steps=0)
    after = run(reader, edits=edit, record=Record(site, steps=0)).cache[site].tensor
    changed = (before != after).any(-1)[0, 0, 0].reshape(4, 6, 2)  # [height, width, heads]
    expected = torch.zeros(4, 6, 2, dtype=torch.bool)
    expected[:2, :3, 1] = True
    assert torch.equal(changed, expected)


# 3.10 recorded values leave the device during the run


def test_recordings_are_stored_where_they_are_asked_to_be(reader: Reader) -> None:
    found = run(reader, record=Record(SITE, device="cpu")).cache[SITE].tensor
    assert found.device.type == "cpu" and found.is_contiguous() and not found.requires_grad


# 3.11 records carry their coordinates


def test_records_carry_sigma_timestep_and_seed(reader: Reader) -> None:
    found = run(reader, ["a cat", "a dog"], record=SITE, seeds=[5, 9]).cache[SITE]
    assert [row.seed for row in found.rows] == [5, 9]
    assert all(each.sigma and each.timestep for each in found.steps)


def test_a_skipped_layer_is_no_silent_loss() -> None:
    """Skip-layer guidance runs a third pass with layers left out."""
    pipe = tiny.pipeline("sd3")
    reader = Reader(pipe)
    site = "transformer.transformer_blocks.0"
    kw = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 0.7,
    }

    def branches(site: str) -> Tensor:
        return run(reader, name="sd3", edits=Scale(site, 1.1), **kw).firing[0].branches

    assert set(branches(site)) == {"uncond", "cond"}
    assert set(branches("transformer.transformer_blocks.1")) == {"uncond", "cond", "cond_skip"}
