"""Rewards that are computed, not modelled: whether a program passes its tests."""

from opd.rewards.code import CodeTests, CodeVerifier, Verdict, extract_code
from opd.rewards.sandbox import Limits, Outcome, Sandbox
from opd.rewards.verifier import ProgramVerifier

__all__ = [
    "CodeTests",
    "CodeVerifier",
    "Limits",
    "Outcome",
    "ProgramVerifier",
    "Sandbox",
    "Verdict",
    "extract_code",
]
