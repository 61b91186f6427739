"""What a step leaves behind for the search after it: its rollouts with the teacher's scores."""

from __future__ import annotations

import math

import torch

from opd.rollouts import Rollouts
from opd.teachers import TeacherScored


class StepRollouts:
    """What a step leaves behind for a score that judges candidates on the step's own rollouts.

    Empty unless a score asks for it before the step.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.held_out_fraction = 0.0
        self.scored: list[TeacherScored] = []
        self.unscored: list[Rollouts] = []  # held out of the gradient

    def request(self, held_out_fraction: float = 0.0) -> None:
        """Ask the coming step to keep its rollouts, or hold a part out of the gradient."""
        self.wanted = held_out_fraction == 0.0
        self.held_out_fraction = held_out_fraction

    def keep(self, scored: TeacherScored) -> None:
        """Keep a micro-batch with its teacher's hidden states, if asked to."""
        if self.wanted:
            self.scored.append(scored)

    def split(self, rollouts: Rollouts, rng: torch.Generator) -> tuple[Rollouts, Rollouts]:
        """Split rollouts into (held out, trained on), at random."""
        count = math.floor(self.held_out_fraction * len(rollouts))
        if count == 0:
            return rollouts.select([]), rollouts
        order = torch.randperm(len(rollouts), generator=rng, device=rng.device).tolist()
        return rollouts.select(sorted(order[:count])), rollouts.select(sorted(order[count:]))


def thin_out(scored: list[TeacherScored], fraction: float) -> list[TeacherScored]:
    """Keep every so many-th completion of scored micro-batches, so that all lengths are there.

    A micro-batch that loses all its completions becomes a placeholder: ranks stay in step.
    """
    lengths = [s.rollouts.lengths.tolist() for s in scored]
    total = sum(length > 0 for rows in lengths for length in rows)
    keep = set(torch.linspace(0, total - 1, max(round(fraction * total), 1)).round().int().tolist())
    chosen, position = [], 0
    for s, rows_lengths in zip(scored, lengths, strict=True):
        rows = []
        for row, length in enumerate(rows_lengths):
            if length > 0:
                rows += [row] if position in keep else []
                position += 1
        chosen.append(s.select(rows) if rows else s.placeholder())
    return chosen
