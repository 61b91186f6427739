"""Rollouts: completions that a student samples, and the engines that sample them."""

from opd.rollouts.data import Rollouts, Sampler, cut_into_micro_batches, rollout_records
from opd.rollouts.engine import RolloutEngine, TransformersEngine

__all__ = [
    "RolloutEngine",
    "Rollouts",
    "Sampler",
    "TransformersEngine",
    "cut_into_micro_batches",
    "rollout_records",
]
