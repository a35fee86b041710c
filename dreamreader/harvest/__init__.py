"""Harvests: activations of many prompts, to a store on disk and from there to training."""
