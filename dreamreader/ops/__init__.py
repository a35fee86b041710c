"""Functions of tensors, each with a reference, a schema, a gradient and, where built, kernels."""

from dreamreader.ops.attention_words import attention_words_, attention_words_reference_
from dreamreader.ops.batch_topk import batch_topk, batch_topk_reference
from dreamreader.ops.choose import (
    Chosen,
    choose,
    choose_reference,
    counts_of_budget,
    stream_of,
    streams_of,
)
from dreamreader.ops.column_scores import column_scores, column_scores_reference
from dreamreader.ops.encode_select import encode_select, encode_select_reference
from dreamreader.ops.guide import guide, guide_reference, probe_gradient
from dreamreader.ops.intervention import intervene, intervene_, intervene_reference
from dreamreader.ops.intervention_program import Instruction, Program
from dreamreader.ops.low_rank import low_rank, low_rank_, low_rank_reference
from dreamreader.ops.moments import Sums, moments, moments_reference
from dreamreader.ops.orthonormal import orthonormal
from dreamreader.ops.pack import pack, pack_reference
from dreamreader.ops.permutation import permuted, permuted_reference
from dreamreader.ops.sampled_topk import choose_pool, sampled_topk
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
from dreamreader.ops.threshold_select import threshold_select, threshold_select_reference
from dreamreader.ops.topk import topk, topk_reference

__all__ = [
    "Chosen",
    "Instruction",
    "Program",
    "SparseRows",
    "Sums",
    "attention_words_",
    "attention_words_reference_",
    "batch_topk",
    "batch_topk_reference",
    "choose",
    "choose_pool",
    "choose_reference",
    "column_scores",
    "column_scores_reference",
    "counts_of_budget",
    "encode_select",
    "encode_select_reference",
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
    "sampled_topk",
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
    "threshold_select",
    "threshold_select_reference",
    "topk",
    "topk_reference",
]
