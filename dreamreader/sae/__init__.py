"""Sparse autoencoders: known answers and measures."""
