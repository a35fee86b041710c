"""Functions of tensors, each with a reference, a schema, a gradient and, where built, kernels."""

from dreamreader.ops.attention_words import attention_words_, attention_words_reference_
from dreamreader.ops.choose import (
    Chosen,
    choose,
    choose_reference,
    counts_of_budget,
    stream_of,
    streams_of,
)
from dreamreader.ops.guide import guide, guide_reference, probe_gradient
from dreamreader.ops.intervention import intervene, intervene_, intervene_reference
from dreamreader.ops.intervention_program import Instruction, Program
from dreamreader.ops.low_rank import low_rank, low_rank_, low_rank_reference
from dreamreader.ops.moments import Sums, moments, moments_reference
from dreamreader.ops.orthonormal import orthonormal
from dreamreader.ops.pack import pack, pack_reference
from dreamreader.ops.permutation import permuted, permuted_reference
from dreamreader.ops.sparse_product import (
    sparse_column_sums,
    sparse_column_sums_reference,
    sparse_decode,
    sparse_decode_reference,
    sparse_dots,
    sparse_dots_reference,
    sparse_outer,
    sparse_outer_reference,
)
from dreamreader.ops.sparse_rows import SparseRows

__all__ = [
    "Chosen",
    "Instruction",
    "Program",
    "SparseRows",
    "Sums",
    "attention_words_",
    "attention_words_reference_",
    "choose",
    "choose_reference",
    "counts_of_budget",
    "guide",
    "guide_reference",
    "intervene",
    "intervene_",
    "intervene_reference",
    "low_rank",
    "low_rank_",
    "low_rank_reference",
    "moments",
    "moments_reference",
    "orthonormal",
    "pack",
    "pack_reference",
    "permuted",
    "permuted_reference",
    "probe_gradient",
    "sparse_column_sums",
    "sparse_column_sums_reference",
    "sparse_decode",
    "sparse_decode_reference",
    "sparse_dots",
    "sparse_dots_reference",
    "sparse_outer",
    "sparse_outer_reference",
    "stream_of",
    "streams_of",
]
