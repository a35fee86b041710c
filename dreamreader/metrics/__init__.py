"""Metrics: numbers for each row of a batch, from its pictures, latents, noise, logits or text."""

from dreamreader.metrics.base import Column, Metric, Outputs
from dreamreader.metrics.registry import build, names, register

__all__ = ["Column", "Metric", "Outputs", "build", "names", "register"]
