"""How many rows a run has and of which prompts, from the arguments of the pipeline's call."""

import inspect

import diffusers
import pytest
import torch

from dreamreader.engine._clock_rows import prompts_of, rows_of
from dreamreader.engine._families.guidance import _ONE_VIDEO
from dreamreader.engine._subject import Subject
from dreamreader.engine._tracker import PipelineTracker

from .. import tiny
from .clock_log import call

SD = diffusers.StableDiffusionPipeline
TWO = ["a red cat", "a large blue circle"]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"prompt": "a cat"}, 1),
        ({"prompt": TWO}, 2),
        ({"prompt": tuple(TWO), "num_images_per_prompt": 3}, 6),
        ({"prompt": TWO, "num_images_per_prompt": None}, 2),
        ({"prompt": TWO, "num_videos_per_prompt": 2}, 4),
        ({"prompt": "a cat", "num_waveforms_per_prompt": 2}, 2),
        ({"prompt": None, "prompt_embeds": torch.zeros(3, 4, 5), "num_images_per_prompt": 2}, 6),
        ({"prompt_embeds": [torch.zeros(4, 5), torch.zeros(3, 5)]}, 2),
        ({"prompt_embeds": [torch.zeros(2, 4, 5)]}, None),
        ({"image_embeds": torch.zeros(2, 4), "num_images_per_prompt": 2}, 4),
        ({"prompt": "a cat", "image_embeddings": torch.zeros(4, 8, 2, 2)}, 4),
        ({"class_labels": [1, 2, 3]}, 3),
        ({"image": torch.zeros(2, 3, 8, 8)}, None),
        ({}, None),
    ],
)
def test_rows_of_the_arguments(arguments: dict, rows: int | None) -> None:
    assert rows_of(SD, arguments) == rows


def test_rows_of_a_prompt_follow_each_other() -> None:
    arguments = {"prompt": TWO, "num_videos_per_prompt": 2}
    assert prompts_of(SD, arguments) == [TWO[0], TWO[0], TWO[1], TWO[1]]
    assert prompts_of(SD, {"prompt": "a cat"}) == ["a cat"]
    assert prompts_of(SD, {"prompt_embeds": torch.zeros(2, 3, 4)}) is None
    assert prompts_of(SD, {"prompt": [{"a": 1}]}) is None


def test_pipelines_that_make_one_video_whatever_is_asked() -> None:
    """Their `__call__` sets the number itself."""
    own = diffusers.CogVideoXPipeline
    assert rows_of(own, {"prompt": TWO, "num_videos_per_prompt": 3}) == 2
    for name in ("CogVideoXPipeline", "WanVideoToVideoPipeline", "AnimateDiffPipeline"):
        assert name in _ONE_VIDEO
        assert "num_videos_per_prompt = 1" in inspect.getsource(getattr(diffusers, name).__call__)
    for name in ("WanPipeline", "LTXPipeline", "MochiPipeline"):
        assert name not in _ONE_VIDEO
        source = inspect.getsource(getattr(diffusers, name).__call__)
        assert "num_videos_per_prompt = 1" not in source


def test_the_tracker_says_the_rows_of_the_running_call() -> None:
    pipe = tiny.pipeline("sd")
    said = []
    with PipelineTracker(Subject(pipe)) as tracker:
        assert tracker.rows is None and tracker.prompts is None
        hook = pipe.unet.register_forward_hook(lambda *_: said.append(tracker.rows))
        call("sd", pipe, TWO, num_images_per_prompt=2, num_inference_steps=1)
        hook.remove()
        assert tracker.prompts == [TWO[0], TWO[0], TWO[1], TWO[1]]
    assert said == [4]


def test_rows_of_a_video_pipeline_are_those_of_their_latents() -> None:
    """Two videos of each prompt: by hand, what changes with one prompt."""
    from ..tiny.parts import assemble

    pipe = assemble("LTXPipeline", "ltx")
    size = {"height": 32, "width": 64, "num_frames": 9, "max_sequence_length": 16}
    texts: list[torch.Tensor] = []

    def run(prompts: list[str]) -> PipelineTracker:
        with PipelineTracker(Subject(pipe)) as tracker:
            hook = pipe.transformer.register_forward_pre_hook(
                lambda m, a, k: texts.append(k["encoder_hidden_states"].clone()), with_kwargs=True
            )
            pipe(
                prompts,
                guidance_scale=1.0,
                num_videos_per_prompt=2,
                num_inference_steps=1,
                output_type="latent",
                **size,
            )
            hook.remove()
        return tracker

    tracker = run(TWO)
    run([TWO[0], "a large blue square"])
    changed = [n for n in range(4) if not torch.equal(texts[0][n], texts[1][n])]
    assert changed == [2, 3]
    assert tracker.rows == 4 and tracker.prompts == [TWO[0], TWO[0], TWO[1], TWO[1]]
