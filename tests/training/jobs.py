"""What the small trainings are."""

from typing import Any

MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
DOWN = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"
UP = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"

REFT: dict[str, Any] = {
    "name": "a frame",
    "subject": "shapes-unet",
    "data": {"scenes": {"count": 4, "source": {"frame": "no"}, "target": {"frame": "yes"}}},
    "pipeline": {"num_inference_steps": 2},
    "sites": [MIDDLE, UP],
    "training": {"rank": 2, "steps": 12, "batch_size": 6, "validation": 0.25, "validate_every": 4},
    "batch": {"rows": 4},
}

PROBES: dict[str, Any] = {
    "name": "colours",
    "subject": "shapes-unet",
    "data": {
        "prompts": [
            {"prompt": f"a {size} {color} {shape}", "color": color, "size": size}
            for size in ("small", "large")
            for color in ("red", "blue", "green")
            for shape in ("circle", "square", "star")
        ]
    },
    "labels": "color",
    "sites": DOWN,
    "pipeline": {"num_inference_steps": 2},
    "probe": {"hidden": [], "epochs": 30, "lr": 0.05, "holdout": 3, "controls": False},
    "batch": {"rows": 9},
}

SAE: dict[str, Any] = {
    "name": "latents",
    "subject": "shapes-unet",
    "data": {"prompts": ["a red circle", "a blue square", "a green star"]},
    "sites": [DOWN, MIDDLE],
    "branch": "cond",
    "pipeline": {"num_inference_steps": 2},
    "autoencoders": [{"d_sae": 24, "k": 2}, {"selection": "SampledTopK", "d_sae": 24, "k": 2}],
    "training": {"tokens": 192, "batch_size": 16, "lr": 0.01, "save_every": 1},
    "controls": ["shuffled"],
    "evaluation": {"rows": 128},
    "batch": {"rows": 3},
}

MATRIX: dict[str, Any] = {
    "name": "maps",
    "kind": "map-matrix",
    "subject": "shapes-unet",
    "target": "shapes-unet-b",
    "data": {"prompts": ["a red circle", "a blue square", "a green star", "a red star"]},
    "pipeline": {"num_inference_steps": 2},
    "sites": ["unet.mid_block", "unet.up_blocks.1"],
    "draws": 20,
    "sample": 64,
    "unit": 1,
}
