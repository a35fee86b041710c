"""Measures of sparse autoencoders: reconstruction, known answers, probing, absorption, controls."""

from dreamreader.sae.evaluate.controls import (
    shuffle_features,
    with_random_decoder,
    with_random_encoder,
)
from dreamreader.sae.evaluate.known_answers import (
    DetectionScores,
    KnownAnswerScores,
    score_known_answers,
)
from dreamreader.sae.evaluate.probing import (
    AbsorptionScores,
    SparseProbes,
    probe_latents,
    score_absorption,
)
from dreamreader.sae.evaluate.reconstruction import (
    FrequencyHistogram,
    LotteryScores,
    ReconstructionScores,
    score_reconstruction,
)

__all__ = [
    "AbsorptionScores",
    "DetectionScores",
    "FrequencyHistogram",
    "KnownAnswerScores",
    "LotteryScores",
    "ReconstructionScores",
    "SparseProbes",
    "probe_latents",
    "score_absorption",
    "score_known_answers",
    "score_reconstruction",
    "shuffle_features",
    "with_random_decoder",
    "with_random_encoder",
]
