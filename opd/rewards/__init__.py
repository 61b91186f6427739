"""Rewards of completions, and what judges programs: whether they pass their tests."""

from opd.rewards.advantages import Advantage, AsGiven, Centred, GroupNormalized
from opd.rewards.code import CodeTests, CodeVerifier, Verdict, extract_code
from opd.rewards.critic import GAE
from opd.rewards.reward import Correctness, FromFunction, Overlong, Reward, RewardTerm
from opd.rewards.sandbox import Limits, Outcome, Sandbox
from opd.rewards.verifier import ProgramVerifier

__all__ = [
    "GAE",
    "Advantage",
    "AsGiven",
    "Centred",
    "CodeTests",
    "CodeVerifier",
    "Correctness",
    "FromFunction",
    "GroupNormalized",
    "Limits",
    "Outcome",
    "Overlong",
    "ProgramVerifier",
    "Reward",
    "RewardTerm",
    "Sandbox",
    "Verdict",
    "extract_code",
]
