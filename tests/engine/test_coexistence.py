"""Together with other people's hooks, adapters, tiling, slicing, offload, step caches and
torch.compile.

Each gives the same result, or an error or report line that says so.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from dreamreader.edits import Scale, Steer
from dreamreader.engine import Reader, Record
from dreamreader.errors import InvalidInput, NeverFired

SITE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
V = torch.ones(32)
EDIT = Steer(SITE, V, 2.0, branch="cond", steps=slice(0, 2))


def run(reader: Reader, edits: Any = (), record: Any = (), name: str = "sd", **kw: Any) -> Any:
    arguments = {"seeds": 3, "output_type": "latent", **tiny.arguments(name, 3), **kw}
    return reader.run(["a red cat", "a dog"], edits=edits, record=record, **arguments)


@pytest.fixture(scope="module")
def truth() -> tuple[Tensor, Tensor]:
    """Plain and edited latents."""
    reader = Reader(tiny.pipeline("sd"))
    return run(reader).images, run(reader, EDIT).images


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_foreign_hooks_stay_and_see_what_they_should(truth: tuple[Tensor, Tensor]) -> None:
    pipe = tiny.pipeline("sd")
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    before: list[Tensor] = []
    module.register_forward_hook(lambda _, __, out: before.append(out.clone()))
    module.register_forward_hook(lambda _, __, out: out * 1.0)
    module.to_q.register_forward_pre_hook(lambda _, args: None)
    hooks = dict(module._forward_hooks), dict(module.to_q._forward_pre_hooks)
    reader = Reader(pipe)
    result = run(reader, EDIT, record=SITE)
    close(result.images, truth[1])
    assert len(before) == 3
    # theirs came first, so they see the value before the edit, and the recording the one after
    change = result.cache[SITE].tensor[:, 1, 0] - before[0][2:]
    torch.testing.assert_close(change, torch.full_like(change, 2.0), rtol=0, atol=1e-5)
    assert (dict(module._forward_hooks), dict(module.to_q._forward_pre_hooks)) == hooks


def test_a_hook_added_inside_the_block_survives_it() -> None:
    pipe = tiny.pipeline("sd")
    reader = Reader(pipe)
    with pytest.raises(ZeroDivisionError), reader.editing(EDIT):
        pipe.unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
        pipe("a cat", **tiny.arguments("sd", 1))
    assert len(pipe.unet.mid_block._forward_hooks) == 1
    assert not pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2._forward_hooks
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def _lora(pipe: Any) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(1)
    pipe.unet.add_adapter(config, adapter_name="style")


def test_lora_loaded_and_fused(truth: tuple[Tensor, Tensor]) -> None:
    pipe = tiny.pipeline("sd")
    _lora(pipe)
    reader = Reader(pipe)
    sites = [f"{SITE}:q", f"{SITE}:heads", SITE]
    loaded = run(reader, EDIT, record=sites)
    assert not torch.allclose(loaded.images, truth[1], atol=1e-3), "the adapter does nothing"
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert hasattr(module.to_q, "lora_A")
    # by hand
    handle = module.register_forward_hook(_by_hand())
    arguments = tiny.arguments("sd", 3)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    expected = pipe(["a red cat", "a dog"], generator=generators, output_type="latent", **arguments)
    handle.remove()
    close(loaded.images, expected.images)
    pipe.fuse_lora(components=["unet"])
    fused = run(reader, EDIT, record=sites)
    close(fused.images, loaded.images)
    for site in sites:
        close(fused.cache[site].tensor, loaded.cache[site].tensor)


def _by_hand() -> Any:
    calls: list[int] = []

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        push = torch.zeros_like(out)
        push[len(out) // 2 :] = 2.0
        return out + push if len(calls) <= 2 else out

    return hook


def test_attention_slicing_gives_the_same_result_and_the_same_probabilities(
    truth: tuple[Tensor, Tensor],
) -> None:
    pipe = tiny.pipeline("sd")
    reader = Reader(pipe)
    sites = [f"{SITE}:probs", f"{SITE}:heads"]
    whole = run(reader, EDIT, record=sites)
    pipe.enable_attention_slicing("max")
    processor = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    sliced = run(reader, EDIT, record=sites)
    close(sliced.images, truth[1])
    for site in sites:
        close(sliced.cache[site].tensor, whole.cache[site].tensor)
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor is processor


def test_vae_tiling_leaves_the_denoiser_alone_and_says_what_it_cannot() -> None:
    pipe = tiny.pipeline("sd")
    reader = Reader(pipe)
    big = {"height": 64, "width": 64, "output_type": "np"}
    site = "vae.decoder.mid_block"
    assert run(reader, record=site, **big).cache[site].shape[0] == 2
    whole = run(reader, EDIT, **big).images
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 16
    tiled = run(reader, EDIT, **big).images
    assert tiled.shape == whole.shape
    with pytest.raises(InvalidInput, match="vae.decoder.mid_block ran more than once.*VAE tiling"):
        run(reader, record=site, **big)
    scaled = run(reader, Scale("vae.decoder.conv_out", 0.5), **big)
    assert scaled.firing[0].calls > 1


def test_vae_slicing_is_refused_where_rows_matter() -> None:
    pipe = tiny.pipeline("sd")
    pipe.vae.enable_slicing()
    reader = Reader(pipe)
    with pytest.raises(InvalidInput, match="Slicing .* splits the batch|ran more than once"):
        run(reader, record="vae.decoder.mid_block", output_type="np")
    with pytest.raises(InvalidInput, match="Slicing .* splits the batch"):
        run(reader, Scale("vae.decoder.mid_block", [0.0, 1.0]), output_type="np")


def test_group_offload_gives_the_same_result(truth: tuple[Tensor, Tensor]) -> None:
    from diffusers.hooks import apply_group_offloading

    pipe = tiny.pipeline("sd")
    try:
        apply_group_offloading(
            pipe.unet,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )
    except ValueError as error:  # no accelerator: the library itself may decline
        pytest.skip(f"group offload is not available here: {error}")
    reader = Reader(pipe)
    result = run(reader, EDIT, record=[f"{SITE}:q", SITE])
    close(result.images, truth[1])
    close(run(reader).images, truth[0])


def _first_block_cache(pipe: Any) -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))


FLUX = "transformer.transformer_blocks.1"


def test_first_block_cache_is_reported_and_never_recorded() -> None:
    pipe = tiny.pipeline("flux")
    reader = Reader(pipe)
    plain = run(reader, record=FLUX, name="flux").cache[FLUX]
    _first_block_cache(pipe)
    head = "transformer.transformer_blocks.0"
    result = run(reader, record=[FLUX, head, f"{head}.attn"], name="flux")
    # the threshold is never reached: only the first step computes the other blocks
    assert [each.step for each in result.cache[FLUX].steps] == [0]
    assert torch.equal(result.cache[FLUX].tensor, plain.select(step=0).tensor)
    assert [each.step for each in result.cache[head].steps] == [0], "with an old residual in it"
    assert [each.step for each in result.cache[f"{head}.attn"].steps] == [0, 1, 2]
    assert dict(result.firing.of(FLUX)[0].not_computed) == {1: 1, 2: 1}
    assert "step caches are on" in result.firing.notes[0]
    assert "not computed at steps 1-2 (step cache)" in repr(result.firing)


def test_edits_in_skipped_steps_are_errors_and_passed_steps_are_reported() -> None:
    pipe = tiny.pipeline("flux")
    _first_block_cache(pipe)
    reader = Reader(pipe)
    with pytest.raises(NeverFired, match="a step cache skipped the module at every step"):
        run(reader, Steer(FLUX, torch.ones(32), steps=[1, 2]), name="flux")
    report = run(reader, Steer(FLUX, torch.ones(32)), name="flux").firing
    assert dict(report[0].steps) == {0: 1} and dict(report[0].not_computed) == {1: 1, 2: 1}
    with pytest.raises(InvalidInput, match="under a step cache .*fbc_block_hook.*take its out"):
        run(reader, Scale(f"{FLUX}:in", 2.0), name="flux")


def test_pyramid_attention_broadcast_is_reported_and_never_recorded() -> None:
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    pipe = tiny.pipeline("flux")
    reader = Reader(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: float(pipe.scheduler.timesteps[0]),
    )
    pipe.transformer.enable_cache(config)
    site = f"{FLUX}.attn"
    kw = {"name": "flux", "num_inference_steps": 4}
    result = run(reader, record=[site, f"{site}:q", f"{site}:probs"], **kw)
    computed = [each.step for each in result.cache[site].steps]
    skipped = sorted(result.firing.of(site)[0].not_computed)
    assert computed and skipped and sorted(computed + skipped) == [0, 1, 2, 3]
    for port in ("q", "probs"):
        assert [each.step for each in result.cache[f"{site}:{port}"].steps] == computed
    edited = run(reader, Steer(site, torch.ones(32)), **kw)
    assert sorted(edited.firing[0].steps) == computed


def test_other_step_caches_are_reported_and_never_recorded() -> None:
    from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig

    steps = 6
    magnitude = MagCacheConfig(
        threshold=5.0,
        max_skip_steps=2,
        retention_ratio=0.1,
        num_inference_steps=steps,
        mag_ratios=torch.ones(steps),
    )
    taylor = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)
    for config, site, name in (
        (magnitude, FLUX, "mag_cache"),
        (taylor, f"{FLUX}.attn", "taylorseer_cache"),
    ):
        pipe = tiny.pipeline("flux")
        pipe.transformer.enable_cache(config)
        inside = f"{FLUX}.attn:q"  # runs exactly where the module is computed
        result = run(Reader(pipe), record=[site, inside], name="flux", num_inference_steps=steps)
        computed = [each.step for each in result.cache[inside].steps]
        assert 0 < len(computed) < steps
        assert [each.step for each in result.cache[site].steps] == computed
        assert set(result.firing.of(site)[0].not_computed) == set(range(steps)) - set(computed)
        assert name in result.firing.notes[0]
        outside = run(Reader(pipe), record="transformer", name="flux", num_inference_steps=steps)
        assert name in outside.firing.notes[0], "the note is about the run, not the site"


@pytest.mark.parametrize(
    ("way", "when"), [("wrapped", "before"), ("in place", "after"), ("blocks", "before")]
)
def test_compiled_denoisers_give_the_same_result(
    way: str, when: str, truth: tuple[Tensor, Tensor]
) -> None:
    pipe = tiny.pipeline("sd")
    reader = Reader(pipe) if when == "after" else None
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    if way == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    elif way == "in place":
        pipe.unet.compile(backend=backend)
    else:
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(backend=backend)
    reader = reader or Reader(pipe)
    kw = tiny.arguments("sd", 3)

    def bare() -> Tensor:
        generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
        return pipe(["a red cat", "a dog"], generator=generators, output_type="latent", **kw).images

    if when == "before":
        close(bare(), truth[0])
        assert calls, "nothing was compiled"
    result = run(reader, EDIT, record=SITE)
    close(result.images, truth[1])
    assert "ran uncompiled" in result.firing.notes[0]
    assert result.firing[0].rows == {0, 1}
    close(bare(), truth[0])
    assert calls, "compiled code is not used any more"


def test_a_compiled_plain_module_is_edited_too() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    expected = torch.relu(net[0](x) + 1)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    reader = Reader(compiled)
    with reader.editing(Steer("0", torch.ones(4))):
        close(compiled(x), expected)
    close(compiled(x), net(x))


def test_two_readers_of_one_pipeline(truth: tuple[Tensor, Tensor]) -> None:
    pipe = tiny.pipeline("sd")
    one, other = Reader(pipe), Reader(pipe)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    with one.editing(EDIT), other.recording(Record(SITE)) as cache:
        images = pipe(
            ["a red cat", "a dog"],
            generator=generators,
            output_type="latent",
            **tiny.arguments("sd", 3),
        ).images
    close(images, truth[1])
    assert cache[SITE].shape == (2, 2, 3, 24, 32)


def test_a_hook_of_diffusers_that_is_not_known_may_skip_a_module() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Old(ModelHook):
        """Hands out an old value at every second call."""

        old = None

        def new_forward(self, module, *args, **kwargs):
            if self.old is None:
                self.old = self.fn_ref.original_forward(*args, **kwargs)
                return self.old
            old, self.old = self.old, None
            return old

    pipe = tiny.pipeline("flux")
    site = "transformer.transformer_blocks.0.attn"
    block = pipe.transformer.transformer_blocks[0].attn
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Old(), "a_cache_of_mine")
    found = run(Reader(pipe), record=site, name="flux")
    assert "step caches are on: a_cache_of_mine" in found.firing.notes
    assert [each.step for each in found.cache[site].steps] == [0, 2]
