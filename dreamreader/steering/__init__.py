"""Steering vectors: directions in a site's feature space, fitted from recorded activations."""

from dreamreader.steering.directions import LabelMeans, random_like

__all__ = ["LabelMeans", "random_like"]
