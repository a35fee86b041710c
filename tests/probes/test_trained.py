"""A probe of the colour on the activations of a trained model, and guidance of its latents."""

import dreamreader as dr
from dreamreader.probes import fit, latent_guidance

SITE = "unet.up_blocks.2"
COLORS = ("red", "green", "blue")


def test_a_probe_reads_the_colour_of_captions_that_were_held_out():
    reader = dr.load("shapes-unet")
    settings = dr.zoo.settings(num_inference_steps=4)
    shapes = ("circle", "square", "triangle", "star", "cross")
    prompts = [f"a {size}{c} {s}" for c in COLORS for s in shapes for size in ("", "large ")]
    record = dr.Record(SITE, branch="cond", reduce=lambda x: x.mean(1, keepdim=True))
    cache = reader.run(prompts, record=record, seeds=range(30), **settings).cache
    labels = [prompt.split()[-2] for prompt in prompts]
    probe = fit(cache, labels, hidden=(32,), batch_size=16, lr=3e-3, subject="shapes-unet")
    found, controls = probe.card.held_out[""], probe.card.controls
    assert probe.card.groups["held_out"] == 6 and found["accuracy"]["value"] > 0.75
    for control in ("shuffled_labels", "random_feature"):
        assert controls[control][""]["accuracy"]["value"] < found["accuracy"]["value"] - 0.15

    with latent_guidance(reader, probe, "blue", scale=[0.0, 8.0], objective="logits") as guided:
        reader.run(["a large star"] * 2, seeds=[5, 5], **settings)
    left, moved = guided.value[3].tolist()
    assert guided.value[0][0] == guided.value[0][1] and moved > left + 2
