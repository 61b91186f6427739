"""Rollouts: completions that a student samples, and the engines that sample them."""

from opd.rollouts.alarm import GapAlarm, GapLimits
from opd.rollouts.continuous_batching import ContinuousBatching
from opd.rollouts.conversations import Conversations, Environment
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.micro_batches import align_micro_batches, cut_into_micro_batches
from opd.rollouts.records import rollout_records, token_texts, verify
from opd.rollouts.rollouts import SAMPLED, Rollouts, Sampler, Tokens
from opd.rollouts.server import VLLMServer
from opd.rollouts.transformers import TransformersEngine
from opd.rollouts.vllm import VLLM

__all__ = [
    "SAMPLED",
    "VLLM",
    "ContinuousBatching",
    "Conversations",
    "Environment",
    "GapAlarm",
    "GapLimits",
    "RolloutEngine",
    "Rollouts",
    "Sampler",
    "Tokens",
    "TransformersEngine",
    "VLLMServer",
    "align_micro_batches",
    "cut_into_micro_batches",
    "rollout_records",
    "token_texts",
    "verify",
]
