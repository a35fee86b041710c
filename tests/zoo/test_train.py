"""Training: the pieces on a few real steps, and stopping without consequence."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from dreamreader import zoo
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.zoo import data, models, objectives, train

SHORT = train.recipe(steps=6, batch_size=4, lr=1e-3, warmup=2)


def captions_stage():
    torch.manual_seed(0)
    tokenizer = models.build_tokenizer()
    encoders = nn.ModuleDict({"text_encoder": models.build_text_encoder(32, tokenizer)})
    stage = nn.ModuleDict({"encoders": encoders, "heads": objectives.heads(encoders)})
    return stage, objectives.caption_loss(stage, tokenizer, 8, 0)


class Killed(Exception):
    pass


def test_a_stopped_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    quiet = lambda *_: None  # noqa: E731
    whole, loss = captions_stage()
    train.run_stage("captions", SHORT, whole, loss, tmp_path / "a", quiet)

    stage, loss = captions_stage()

    def killed_at_5(step):
        if step == 5:
            raise Killed
        return loss(step)

    with pytest.raises(Killed):
        train.run_stage("captions", SHORT, stage, killed_at_5, tmp_path / "b", quiet)
    again, loss = captions_stage()
    train.run_stage("captions", SHORT, again, loss, tmp_path / "b", quiet)
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_captions_become_readable(tmp_path):
    stage, loss = captions_stage()
    before = float(loss(10_000).detach())
    recipe = train.recipe(steps=150, batch_size=8, lr=3e-3, warmup=10)
    train.run_stage("captions", recipe, stage, loss, tmp_path / "c", lambda *_: None, ema=0.9)
    assert float(loss(10_000).detach()) < 0.8 * before


@pytest.mark.parametrize("name", models.NAMES)
def test_every_model_learns_from_latents(name):
    parts = models.build_parts(name)
    net = nn.ModuleDict({k: v for k, v in parts.items() if isinstance(v, nn.Module)})
    objective = objectives.flow_loss if name == "shapes-dit" else objectives.velocity_loss
    latents = data.encode_set(models.build_vae().eval(), parts["tokenizer"], 8, 0)
    scheduler = models.build_scheduler(name)

    def loss() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return objective(net, scheduler, *latents.batch(4, generator), generator)

    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-4)
    before = float(loss().detach())
    for _ in range(6):
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(loss().detach()) < before


def test_the_objective_reads_text_as_the_pipeline_does():
    """What the transformer is trained on is what StableDiffusion3Pipeline gives it."""
    parts = models.build_parts("shapes-dit")
    pipe = models.assemble("shapes-dit", parts, models.build_vae())
    pipe.set_progress_bar_config(disable=True)
    net = nn.ModuleDict({k: v for k, v in parts.items() if isinstance(v, nn.Module)}).eval()
    caption = "a small red circle at the top left"
    with torch.no_grad():
        text, pooled = objectives.sd3_text(
            net, data.tokenize(parts["tokenizer"], [caption]), objectives.T5_TOKENS
        )
        theirs = pipe.encode_prompt(caption, caption, caption, do_classifier_free_guidance=False)
    torch.testing.assert_close(text, theirs[0])
    torch.testing.assert_close(pooled, theirs[2])


def test_one_row_of_weight_stands_for_all_zero_rows_of_text():
    parts = models.build_parts("shapes-dit")
    net = nn.ModuleDict({k: v for k, v in parts.items() if isinstance(v, nn.Module)}).eval()
    for p in net["transformer"].parameters():  # zero gates would hide the attention
        nn.init.normal_(p, std=0.05)
    tokens = data.tokenize(parts["tokenizer"], ["a red circle", "a star on a black background"])
    noisy = torch.randn(2, 4, 16, 16)

    def predict(absent: int, weight: int) -> torch.Tensor:
        text, pooled = objectives.sd3_text(net, tokens, absent)
        with objectives.RepeatedLastKey(weight):
            return net["transformer"](
                hidden_states=noisy,
                timestep=torch.tensor([500.0, 800.0]),
                encoder_hidden_states=text,
                pooled_projections=pooled,
            ).sample

    with torch.no_grad():
        every = predict(objectives.T5_TOKENS, weight=1)
        torch.testing.assert_close(predict(1, weight=objectives.T5_TOKENS), every)
        assert not torch.allclose(predict(1, weight=1), every, atol=1e-2)


def test_saving_a_pipeline_does_not_touch_the_training_weights(tmp_path):
    parts = models.build_parts("shapes-unet")
    before = copy.deepcopy(parts["unet"].state_dict())
    train.save_pipeline("shapes-unet", parts, models.build_vae(), tmp_path / "pipeline")
    assert all(torch.equal(before[k], v) for k, v in parts["unet"].state_dict().items())
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UnknownName, match="'shapes-unett'; nearest: shapes-unet"):
        train.train("shapes-unett", tmp_path)
    with pytest.raises(InvalidInput, match="steps: expected at least 1, got 0"):
        train.train("shapes-unet", tmp_path, steps=0)


def test_saved_models_name_no_folder_of_the_machine(tmp_path):
    models.build_vae().save_pretrained(tmp_path / "vae")
    vae = train.load_autoencoder(tmp_path / "vae")
    train.save_pipeline(
        "shapes-unet", models.build_parts("shapes-unet"), vae, tmp_path / "pipeline"
    )
    for folder in (tmp_path / "pipeline", *filter(Path.is_dir, zoo.WEIGHTS.glob("*"))):
        configs = list(folder.rglob("*config.json"))
        assert configs and not [each for each in configs if '"/' in each.read_text()]
