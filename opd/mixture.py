"""GKD's mixture: some completions are the data's own, the others the student's (2306.13649).

In a configuration, or ``--model.mixture.fixed 0.5`` on the command line, for rows that hold a
completion in the field that ``data.format.completion_field`` names::

    model:
      mixture: {fixed: 0.5}

``fixed`` is 1 - lambda of the paper's algorithm 1, which draws once for a batch; here each prompt
of a step is drawn by itself, from (seed, step, row) alone, so that neither the batch nor the number
of ranks matters. Rows without a completion are always sampled. Losses of both kinds are of the same
objective, and are averaged over all tokens together; it must be one of whole distributions, which
are exact after any prefix. Whoever looks at the token itself takes it for the student's.

Nobody has sampled fixed completions: they have no log-probabilities of an engine. So they count for
``opd/*``, but neither for ``rollout/*`` and ``cost/rollout_tokens`` nor for the alarm of engines.
Where rollouts are reused their weight stays 1; and scores of EffOPD that judge by the step's
completions know of no move away from what has sampled them. ``opd/fixed_fraction`` is their share
of the tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opd.errors import UserError
from opd.prompts import Prompt, PromptBatch
from opd.randomness import derive_seed, uniform
from opd.rollouts import SAMPLED, Rollouts, Sampler


@dataclass(frozen=True)
class Mixture:
    """How many completions are the data's own; see :mod:`opd.mixture`.

    Args:
        fixed: Share of the step's prompts, of those that have a completion; above 0, and at most 1,
            which samples nothing of them.
    """

    fixed: float

    def __post_init__(self) -> None:
        if not 0 < self.fixed <= 1:
            raise UserError(
                f"model.mixture.fixed={self.fixed} must be above 0 and at most 1; without "
                "model.mixture all completions are the student's"
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Make sure, before a run, that there are completions.

        Raises:
            UserError: No prompt has one.
        """
        if prompts and all(prompt.completion_ids is None for prompt in prompts):
            raise UserError(
                "model.mixture: no prompt of data.train has a completion; name their field with "
                "data.format.completion_field"
            )

    def choose(self, prompts: Sequence[Prompt], seed: int) -> list[bool]:
        """Say which prompts keep their own completion in a step.

        Args:
            prompts: B prompts.
            seed: The step's; what is drawn depends on it and the prompt's row alone.

        Returns:
            [B].
        """
        seeds = torch.tensor([derive_seed(seed, p.row, "fixed") for p in prompts]).long()
        drawn = (uniform(seeds, torch.zeros_like(seeds)) < self.fixed).tolist()
        pairs = zip(drawn, prompts, strict=True)
        return [chosen and prompt.completion_ids is not None for chosen, prompt in pairs]


def given(prompts: PromptBatch, sampler: Sampler) -> Rollouts:
    """Return the completions that B prompts hold, cut off where a sampler would stop.

    Args:
        prompts: B prompts, which have completions.
        sampler: How long they may be, and which tokens end them.
    """
    device, limit = prompts.ids.device, sampler.max_new_tokens
    completions = [list(prompt.completion_ids or ())[:limit] for prompt in prompts.prompts]
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.long)
    ids = torch.full((len(prompts), max(map(len, completions), default=0)), sampler.pad_token_id)
    for i, completion in enumerate(completions):
        ids[i, : len(completion)] = torch.tensor(completion)
    finished = torch.tensor([own[-1] in sampler.eos_token_ids for own in completions]).bool()
    sampled = torch.zeros(len(prompts), dtype=torch.bool)
    return Rollouts(
        prompts,
        ids.to(device),
        lengths.to(device),
        finished.to(device),
        torch.zeros(ids.shape, device=device),
        {SAMPLED: sampled.to(device)},
    )


def merged(sampled: Rollouts, fixed: Rollouts, is_fixed: Sequence[bool], pad_id: int) -> Rollouts:
    """Put completions of both kinds in the order of their prompts.

    Args:
        sampled: What the student has sampled, in order.
        fixed: What the data has given, in order.
        is_fixed: Which completion is of which, [B].
        pad_id: Pads.
    """
    ones = torch.ones(len(sampled), dtype=torch.bool, device=sampled.lengths.device)
    sampled.columns[SAMPLED] = ones
    for part, other in ((sampled, fixed), (fixed, sampled)):  # as what of a conversation inserted
        for name, column in other.columns.items():
            width = part.completion_ids.shape[1:] if column.ndim == 2 else ()
            part.columns.setdefault(name, column.new_zeros((len(part), *width)))
    joined = Rollouts.concatenate([sampled, fixed], pad_id)
    of_sampled, of_fixed = iter(range(len(sampled))), iter(range(len(sampled), len(joined)))
    return joined.select([next(of_fixed if own else of_sampled) for own in is_fixed])
