"""Objectives: the loss per token, from what student and teacher think of it."""

from opd.objectives.clipped import ClippedPolicyGradient
from opd.objectives.distributions import Distributions, largest
from opd.objectives.divergences import forward_kl, generalized_jsd, kl, reverse_kl, skew_kl
from opd.objectives.exopd import ExOPD, SampledExOPD
from opd.objectives.objective import (
    FixedNegativeAdvantage,
    ForwardKL,
    GeneralizedJSD,
    Objective,
    PolicyGradient,
    ReverseKL,
    SkewKL,
    as_needed,
    of_sampled,
)
from opd.objectives.top_k import TopKKL
from opd.objectives.weighted import ByDrift, ByEntropy, ByPosition, TokenWeight, Weighted

__all__ = [
    "ByDrift",
    "ByEntropy",
    "ByPosition",
    "ClippedPolicyGradient",
    "Distributions",
    "ExOPD",
    "FixedNegativeAdvantage",
    "ForwardKL",
    "GeneralizedJSD",
    "Objective",
    "PolicyGradient",
    "ReverseKL",
    "SampledExOPD",
    "SkewKL",
    "TokenWeight",
    "TopKKL",
    "Weighted",
    "as_needed",
    "forward_kl",
    "generalized_jsd",
    "kl",
    "largest",
    "of_sampled",
    "reverse_kl",
    "skew_kl",
]
