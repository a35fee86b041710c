"""Functions of tensors, each with a reference, a schema, a gradient and, where built, kernels."""

from dreamreader.ops.attention_words import attention_words_, attention_words_reference_
from dreamreader.ops.intervention import intervene, intervene_, intervene_reference
from dreamreader.ops.moments import Sums, moments, moments_reference
from dreamreader.ops.program import Instruction, Program

__all__ = [
    "Instruction",
    "Program",
    "Sums",
    "attention_words_",
    "attention_words_reference_",
    "intervene",
    "intervene_",
    "intervene_reference",
    "moments",
    "moments_reference",
]
