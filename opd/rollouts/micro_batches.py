"""Micro-batches: completions sorted by length and cut by a budget of positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from opd.prompts import Prompt
from opd.rollouts.rollouts import Rollouts
from opd.world import World


def cut_into_micro_batches(
    rollouts: Rollouts,
    max_tokens: int,
    teacher_of: Callable[[Prompt], str] = lambda prompt: prompt.teacher or "",
) -> list[Rollouts]:
    """Sort completions by length and cut them into micro-batches, one teacher each.

    A micro-batch holds at most ``max_tokens`` positions, padding and prompts included, but at least
    one completion. The loss is a sum over tokens divided by the global count, so it does not depend
    on the cut.
    """
    prompts, lengths = rollouts.prompts.prompts, rollouts.lengths.tolist()
    sizes = [len(prompt.token_ids) for prompt in prompts]
    teachers = [teacher_of(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (teachers[i], lengths[i], sizes[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and teachers[groups[-1][0]] == teachers[i]:
            group = [*groups[-1], i]
            width = max(sizes[j] for j in group) + max(lengths[j] for j in group)
            if width * len(group) <= max_tokens:
                groups[-1] = group
                continue
        groups.append([i])
    return [rollouts.select(group) for group in groups]


def align_micro_batches(
    by_teacher: Mapping[str, Sequence[Rollouts]], rollouts: Rollouts, world: World
) -> list[Rollouts]:
    """Give all ranks equally many micro-batches of each teacher, in the same order; a collective.

    A pass of a sharded model is a collective, and gradients are summed with the last one, so a rank
    with fewer micro-batches gets placeholders without tokens.

    Args:
        by_teacher: This rank's micro-batches, by the names of all teachers.
        rollouts: What they were cut from.
        world: The ranks.
    """
    mine = torch.tensor([len(micro_batches) for micro_batches in by_teacher.values()])
    most = world.max(mine).tolist()
    aligned = []
    for (name, micro_batches), count in zip(by_teacher.items(), most, strict=True):
        missing = count - len(micro_batches)
        aligned += [*micro_batches, *[rollouts.placeholder(name)] * missing]
    return aligned
