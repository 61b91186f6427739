"""Rewards that are computed, not modelled: whether a program passes its tests."""

from opd.rewards.code import CodeTests, CodeVerifier, Verdict, extract_code
from opd.rewards.sandbox import Limits, Outcome, Sandbox

__all__ = [
    "CodeTests",
    "CodeVerifier",
    "Limits",
    "Outcome",
    "Sandbox",
    "Verdict",
    "extract_code",
]
