"""Which guidance branch each chunk of a batch is."""

import diffusers
import pytest
import torch

from dreamreader.engine._clock import Clock
from dreamreader.engine._clock_branch import Branches
from dreamreader.engine._families.guidance import chunks_of, layout_of
from dreamreader.errors import ClockUnknown

from .. import tiny
from .clock_log import Log, call, logged


def branches(said) -> list[tuple[str, ...]]:
    return [moment.branches for moment in said]


BOTH, COND, UNCOND = ("uncond", "cond"), ("cond",), ("uncond",)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart-sigma", "sana", "aura-flow"])
def test_one_call_with_uncond_first(name: str) -> None:
    assert branches(logged(name, tiny.pipeline(name), num_inference_steps=2)) == [BOTH] * 2


@pytest.mark.parametrize("name", ["cogview4", "qwen-image", "flux-true-cfg", "lumina2"])
def test_two_calls_with_cond_first(name: str) -> None:
    said = logged(name, tiny.pipeline(name), num_inference_steps=2)
    assert branches(said) == [COND, UNCOND] * 2
    assert [moment.step for moment in said] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "sd3", "pixart-sigma", "sana", "aura-flow", "lumina2"]
)
def test_a_batch_of_two_without_guidance_is_two_pictures(name: str) -> None:
    said = logged(name, tiny.pipeline(name), ["a cat", "a dog"], guidance_scale=1.0)
    assert branches(said) == [COND] * 4


def test_the_chunks_are_what_they_are_called() -> None:
    """The rows called cond are those with the prompt's embeddings, whatever the layout."""
    for name in ("sd", "sana", "flux-true-cfg", "lumina2"):
        pipe = tiny.pipeline(name)
        seen: dict[str, torch.Tensor] = {}

        def keep(module, args, kwargs, clock=None, seen=seen):
            text = kwargs["encoder_hidden_states"]
            names = clock.now().branches
            for branch, rows in zip(names, text.chunk(len(names)), strict=True):
                seen.setdefault(branch, rows.clone())

        runs = []
        for negative in ("a dog", "two small houses"):
            seen.clear()
            with Clock(pipe) as clock:
                handle = clock.denoisers[next(iter(clock.denoisers))].register_forward_pre_hook(
                    lambda m, a, k, clock=clock: keep(m, a, k, clock), with_kwargs=True
                )
                call(name, pipe, negative_prompt=negative)
                handle.remove()
            runs.append(dict(seen))
        assert torch.equal(runs[0]["cond"], runs[1]["cond"])
        assert runs[0]["uncond"].shape != runs[1]["uncond"].shape or not torch.equal(
            runs[0]["uncond"], runs[1]["uncond"]
        )


def test_several_images_per_prompt() -> None:
    for name, expected in (("sd", [BOTH] * 4), ("flux-true-cfg", [COND, UNCOND] * 4)):
        assert branches(logged(name, tiny.pipeline(name), num_images_per_prompt=2)) == expected


def test_guidance_rescale_adds_no_branch() -> None:
    assert branches(logged("sd", tiny.pipeline("sd"), guidance_rescale=0.7)) == [BOTH] * 4


def test_guidance_switched_off_midway() -> None:
    def switch(pipe, turn, time, tensors):
        if turn == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    said = logged(
        "sd",
        tiny.pipeline("sd"),
        callback_on_step_end=switch,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert branches(said) == [BOTH, BOTH, COND, COND]


def test_lumina_truncates_guidance() -> None:
    said = logged("lumina2", tiny.pipeline("lumina2"), cfg_trunc_ratio=0.5)
    assert branches(said) == [COND, UNCOND] * 2 + [COND] * 2
    assert [moment.step for moment in said] == [0, 0, 1, 1, 2, 3]


def test_skip_layer_guidance_is_a_branch_of_its_own() -> None:
    said = logged(
        "sd3",
        tiny.pipeline("sd3"),
        skip_guidance_layers=[0],
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=0.6,
        num_inference_steps=5,
    )
    skipping = [moment.step for moment in said if moment.branches == ("cond_skip",)]
    assert skipping == [2] and len(said) == 6
    assert branches(said[:3]) == [BOTH] * 3


def test_perturbed_attention_guidance() -> None:
    own = tiny.pipeline("sd").components
    pipe = diffusers.StableDiffusionPAGPipeline(
        **own, pag_applied_layers="mid", requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    assert branches(logged("sd", pipe, pag_scale=2.0)) == [("uncond", "cond", "perturbed")] * 4
    said = logged("sd", pipe, pag_scale=2.0, guidance_scale=1.0)
    assert branches(said) == [("cond", "perturbed")] * 4
    assert branches(logged("sd", pipe, pag_scale=0.0)) == [BOTH] * 4


def test_flux_img2img_calls_apart_without_a_context() -> None:
    pipe = tiny.pipeline("flux-img2img")
    said = logged("flux-img2img", pipe, true_cfg_scale=4.0, negative_prompt="a dog")
    assert branches(said) == [COND, UNCOND] * (len(said) // 2)
    assert [moment.step for moment in said] == [1, 1, 2, 2, 3, 3]
    said = logged("flux-img2img", pipe)
    assert branches(said) == [COND] * 3


def chroma():
    own = tiny.pipeline("flux").components
    config = own["transformer"].config
    heads = config.num_attention_heads * config.attention_head_dim
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=config.in_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=config.joint_attention_dim,
        axes_dims_rope=config.axes_dims_rope,
        approximator_num_channels=16,
        approximator_hidden_dim=heads,
        approximator_layers=1,
    )
    pipe = diffusers.ChromaPipeline(
        scheduler=own["scheduler"],
        vae=own["vae"],
        text_encoder=own["text_encoder_2"],
        tokenizer=own["tokenizer_2"],
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings(
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning"
)  # 2026-11: diffusers 0.42
def test_chroma_calls_apart_without_a_context() -> None:
    pipe = chroma()
    said = logged("flux", pipe, negative_prompt="a dog", guidance_scale=4.0)
    assert branches(said) == [COND, UNCOND] * 4
    assert [moment.step for moment in said] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert branches(logged("flux", pipe, guidance_scale=1.0)) == [COND] * 4


def test_an_exception_between_the_branches_leaves_nothing_behind() -> None:
    for name in ("lumina2", "flux-true-cfg"):
        pipe = tiny.pipeline(name)
        runs = 0

        def fail(module, args, kwargs):
            nonlocal runs
            runs += 1
            if runs == 1:
                raise RuntimeError("within the cond call")

        with Clock(pipe) as clock, Log(clock) as log:
            handle = pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
            with pytest.raises(RuntimeError, match="within the cond call"):
                call(name, pipe)
            with pytest.raises(ClockUnknown, match="no denoiser"):
                clock.branches()
            call(name, pipe, num_inference_steps=1)
            handle.remove()
        assert branches(log.moments) == [COND, UNCOND]


def test_a_context_that_was_never_left_is_forgotten() -> None:
    pipe = tiny.pipeline("flux-img2img")
    with Clock(pipe) as clock, Log(clock) as log:
        stuck = pipe.transformer.cache_context("uncond")
        stuck.__enter__()
        call("flux-img2img", pipe)
        stuck.__exit__(None, None, None)
    assert branches(log.moments) == [COND] * 3


class Own(diffusers.StableDiffusionPipeline):
    """A subclass with the loop it inherits."""


class Reversed(diffusers.StableDiffusionPipeline):
    """A subclass with a loop of its own."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_pipeline_class_that_is_not_known_gives_time_but_no_branch() -> None:
    parts = tiny.pipeline("sd").components
    inherits = Own(**parts, requires_safety_checker=False)
    inherits.set_progress_bar_config(disable=True)
    assert branches(logged("sd", inherits)) == [BOTH] * 4

    pipe = Reversed(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    steps = []
    with Clock(pipe) as clock, Log(clock) as log:
        pipe.unet.conv_in.register_forward_hook(lambda *_: steps.append(clock.time().step))
        call("sd", pipe)
    assert steps == [0, 1, 2, 3]
    assert all("how Reversed lays out its guidance" in str(error) for error in log.said)


class TestBranches:
    """Contradictions, which no pipeline of diffusers should produce."""

    def of(self, family: str, arguments: dict) -> Branches:
        own = getattr(diffusers, family)
        return Branches(None, own, layout_of(own), arguments)

    def test_batch_that_does_not_hold_the_branches(self) -> None:
        branches = self.of("PixArtSigmaPipeline", {"guidance_scale": 4.0})
        with pytest.raises(ClockUnknown, match="batch of 3 rows cannot hold the 2 equal branches"):
            branches.of(None, 0, 3, None, False)

    def test_batch_of_another_size_than_declared(self) -> None:
        arguments = {"guidance_scale": 1.0, "prompt": "a cat", "num_images_per_prompt": 1}
        with pytest.raises(ClockUnknown, match="batch has 2 rows, but 1 pictures"):
            self.of("PixArtSigmaPipeline", arguments).of(None, 0, 2, None, False)

    def test_third_call_in_one_step(self) -> None:
        branches = self.of("Lumina2Pipeline", {})
        texts = [torch.zeros(1), torch.ones(1), torch.ones(1)]
        assert branches.of(None, 0, 1, texts[0], False) == COND
        assert branches.of(None, 0, 1, texts[1], False) == UNCOND
        with pytest.raises(ClockUnknown, match="called its denoiser 3 times"):
            branches.of(None, 0, 1, texts[2], False)
        assert branches.of(None, 1, 1, texts[0], False) == COND

    def test_embeddings_contradict_the_order(self) -> None:
        branches = self.of("Lumina2Pipeline", {})
        cond, uncond = torch.zeros(1), torch.ones(1)
        branches.of(None, 0, 1, cond, False)
        branches.of(None, 0, 1, uncond, False)
        with pytest.raises(
            ClockUnknown,
            match="call 1 of the step.: what should be cond holds the prompt embeddings of uncond",
        ):
            branches.of(None, 1, 1, uncond, False)

    def test_embeddings_of_encode_prompt_contradict_the_order(self) -> None:
        branches = self.of("Lumina2Pipeline", {})
        cond, uncond = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
        branches.heard.keep(("cond", "uncond"), (cond, None, uncond, None))
        with pytest.raises(ClockUnknown, match="should be cond holds .* of uncond"):
            branches.of(None, 0, 1, uncond, False)

    def test_one_tensor_for_both_prompts_leaves_the_order(self) -> None:
        branches = self.of("Lumina2Pipeline", {})
        same = torch.zeros(1, 2, 3)
        branches.heard.keep(("cond", "uncond"), (same, None, same, None))
        said = [branches.of(None, step, 1, same, False) for step in (0, 0, 1, 1)]
        assert said == [COND, UNCOND] * 2

    def test_equal_values_of_both_prompts_leave_the_layout(self) -> None:
        branches = self.of("PixArtSigmaPipeline", {"guidance_scale": 4.0})
        branches.heard.keep(("cond", "uncond"), (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))
        assert branches.of(None, 0, 2, torch.zeros(2, 2, 3), False) == BOTH

    def test_other_values_than_those_of_encode_prompt_leave_the_layout(self) -> None:
        branches = self.of("PixArtSigmaPipeline", {"guidance_scale": 4.0})
        branches.heard.keep(("cond", "uncond"), (torch.zeros(1, 2, 3), torch.ones(1, 2, 3)))
        assert branches.of(None, 0, 2, torch.full((2, 2, 3), 0.5), False) == BOTH

    def test_context_name_of_a_guider(self) -> None:
        assert self.of("FluxPipeline", {}).of("pred_cond", 0, 1, None, False) == COND

    def test_lumina_puts_cond_first(self) -> None:
        own = diffusers.LuminaPipeline
        assert chunks_of(layout_of(own), None, {"guidance_scale": 4.0}) == ("cond", "uncond")

    def test_pix2pix_has_three(self) -> None:
        class Pipe:
            do_classifier_free_guidance = True

        layout = layout_of(diffusers.StableDiffusionInstructPix2PixPipeline)
        assert chunks_of(layout, Pipe(), {}) == ("cond", "image", "uncond")


class TestTextEncoders:
    """Whose prompt a text encoder reads."""

    def heard(self, name: str, **kwargs) -> dict[str, list]:
        pipe = tiny.pipeline(name)
        heard: dict[str, list] = {}
        with Clock(pipe) as clock:
            handles = []
            for encoder, module in clock.text_encoders.items():

                def ask(module, args, kwargs, encoder=encoder):
                    tokens = kwargs.get("input_ids", args[0] if args else None)
                    heard.setdefault(encoder, []).append((clock.branches(), tokens))

                handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            call(name, pipe, **kwargs)
            for handle in handles:
                handle.remove()
        return heard

    @pytest.mark.parametrize("name", [n for n in tiny.PIPELINES if n != "flux"])
    def test_cond_is_the_prompt(self, name: str) -> None:
        if name == "flux-img2img":
            extra = {"true_cfg_scale": 4.0}
        else:
            extra = {}
        first = self.heard(name, negative_prompt="a dog", num_inference_steps=2, **extra)
        other = self.heard(name, negative_prompt="two houses", num_inference_steps=2, **extra)
        assert first
        for encoder, calls in first.items():
            assert [branch for branch, _ in calls] == [COND, UNCOND]
            (_, cond), (_, uncond) = calls
            assert torch.equal(cond, other[encoder][0][1])
            again = other[encoder][1][1]
            assert uncond.shape != again.shape or not torch.equal(uncond, again)

    def test_only_what_is_encoded(self) -> None:
        assert [b for b, _ in self.heard("sd", guidance_scale=1.0)["text_encoder"]] == [COND]
        text = torch.zeros(1, 77, tiny.pipeline("sd").unet.config.cross_attention_dim)
        pipe = tiny.pipeline("sd")
        said = []
        with Clock(pipe) as clock:
            pipe.text_encoder.register_forward_hook(lambda *_: said.append(clock.branches()))
            call("sd", pipe, prompt=None, prompt_embeds=text[:, :16])
        assert said == [UNCOND]

    def test_no_step_and_no_guess(self) -> None:
        pipe = tiny.pipeline("sd")
        errors = []

        def ask(*_):
            with pytest.raises(
                ClockUnknown, match="text_encoder runs before the first denoising"
            ) as info:
                clock.time()
            errors.append(info.value)

        with Clock(pipe) as clock:
            pipe.text_encoder.register_forward_hook(ask)
            call("sd", pipe)
            direct = []

            def outside(*_):
                try:
                    clock.branches()
                except ClockUnknown as error:
                    direct.append(str(error))

            pipe.text_encoder.register_forward_hook(outside)
            pipe.text_encoder(torch.zeros(1, 4, dtype=torch.long))
        assert len(errors) == 3
        assert "outside encode_prompt" in direct[0]

    def test_the_same_text_for_both_is_not_told_apart_by_guessing(self) -> None:
        pipe = tiny.pipeline("qwen-image")
        said = []

        def ask(*_):
            try:
                said.append(clock.branches())
            except ClockUnknown as error:
                said.append(str(error))

        with Clock(pipe) as clock:
            pipe.text_encoder.register_forward_hook(ask)
            call("qwen-image", pipe, "a dog", negative_prompt="a dog")
        assert ["does not say for which branch" in text for text in said] == [True, True]
