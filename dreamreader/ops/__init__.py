"""Functions of tensors, each with a reference, a schema, a gradient and, where built, kernels."""

from dreamreader.ops.intervention import intervene, intervene_, intervene_reference
from dreamreader.ops.program import Instruction, Program

__all__ = ["Instruction", "Program", "intervene", "intervene_", "intervene_reference"]
