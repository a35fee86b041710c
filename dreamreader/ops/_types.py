"""The types of activations."""

import torch

# float8 has no arithmetic in torch, and no kernel here: values in it are stored with a scale.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEEDED = "float32, bfloat16, float16 or float64"
