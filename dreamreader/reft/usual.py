"""How adapters are trained where nothing else is said."""

from typing import Any

# What runs the model takes seconds a step; joint attention needs the smaller rate and the clipping.
USUAL: dict[str, dict[str, Any]] = {
    "activations": {"steps": 300, "batch_size": 64, "lr": 1e-2, "grad_clip": None},
    "noise": {"steps": 150, "batch_size": 16, "lr": 5e-3, "grad_clip": 1.0},
    "denoising": {"steps": 200, "batch_size": 16, "lr": 5e-3, "grad_clip": 1.0},
    "language": {"steps": 100, "batch_size": 8, "lr": 5e-3, "grad_clip": 1.0},
}
