"""Micro-batches: completions sorted by length and cut by a budget of positions."""

from __future__ import annotations

from opd.rollouts.rollouts import Rollouts


def cut_into_micro_batches(rollouts: Rollouts, max_tokens: int) -> list[Rollouts]:
    """Sort completions by length and cut them into micro-batches, one teacher each.

    A micro-batch holds at most ``max_tokens`` positions, padding and prompts included, but at least
    one completion. The loss is a sum over tokens divided by the global count, so it does not depend
    on the cut.
    """
    prompts, lengths = rollouts.prompts.prompts, rollouts.lengths.tolist()
    sizes = [len(prompt.token_ids) for prompt in prompts]
    order = sorted(
        range(len(prompts)), key=lambda i: (prompts[i].teacher or "", lengths[i], sizes[i], i)
    )
    groups: list[list[int]] = []
    for i in order:
        if groups and prompts[groups[-1][0]].teacher == prompts[i].teacher:
            group = [*groups[-1], i]
            width = max(sizes[j] for j in group) + max(lengths[j] for j in group)
            if width * len(group) <= max_tokens:
                groups[-1] = group
                continue
        groups.append([i])
    return [rollouts.select(group) for group in groups]
