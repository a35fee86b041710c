"""Spec files: the parts that all have in common, their prompts, and how they are read."""
