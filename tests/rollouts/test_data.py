"""Micro-batches: every token once, within the budget, and nothing but padding removed."""

import pytest
import torch

from opd.prompts import Prompt, PromptBatch
from opd.rollouts import Rollouts, Tokens, cut_into_micro_batches

PROMPT_LENGTHS = [3, 1, 7, 2, 5, 1]
LENGTHS = [4, 9, 1, 0, 6, 2]
TEACHERS = ["a", "b", "a", "b", "a", "a"]


def rollouts(teachers=None) -> Rollouts:
    teachers = teachers or [None] * 6
    prompts = [
        Prompt(i, tuple(range(10 * i, 10 * i + n)), teacher=teacher)
        for i, (n, teacher) in enumerate(zip(PROMPT_LENGTHS, teachers, strict=True))
    ]
    width = max(LENGTHS)
    ids = 1000 + torch.arange(6 * width).view(6, width)
    lengths = torch.tensor(LENGTHS)
    logprobs = -ids.float()
    batch = PromptBatch.collate(prompts, pad_id=0)
    return Rollouts(batch, ids, lengths, torch.ones(6, dtype=torch.bool), logprobs)


def test_inputs_select_the_positions_that_predict():
    """Position P - 1 + t predicts completion token t; nothing of the prompt is selected."""
    whole = rollouts()
    ids, mask, predicts = whole.inputs()
    assert mask.sum().item() == sum(PROMPT_LENGTHS) + sum(LENGTHS)
    assert predicts.sum(1).tolist() == LENGTHS
    following = ids[:, 1:][predicts[:, :-1]]
    assert following.tolist() == whole.tokens.tolist()


@pytest.mark.parametrize("budget", [1, 12, 30, 10_000])
def test_micro_batches_hold_every_token_once(budget):
    whole = rollouts()
    parts = cut_into_micro_batches(whole, budget)
    assert sorted(t for part in parts for t in part.tokens.tolist()) == sorted(
        whole.tokens.tolist()
    )
    assert sorted(p.row for part in parts for p in part.prompts.prompts) == list(range(6))
    for part in parts:
        positions = part.prompts.ids.numel() + part.completion_ids.numel()
        assert positions <= budget or len(part) == 1
        for i, prompt in enumerate(part.prompts.prompts):
            assert part.prompts.ids[i][part.prompts.mask[i]].tolist() == list(prompt.token_ids)


def test_micro_batches_do_not_mix_teachers():
    parts = cut_into_micro_batches(rollouts(TEACHERS), 10_000)
    assert [{p.teacher for p in part.prompts.prompts} for part in parts] == [{"a"}, {"b"}]


def test_spread_puts_values_back_at_their_tokens():
    whole = rollouts()
    spread = whole.spread(whole.tokens.float())
    assert torch.equal(spread, whole.completion_ids.float() * whole.mask)


def test_columns_go_wherever_their_completions_go():
    whole = rollouts()
    whole.columns = {"advantage": torch.arange(6.0), "weight": 10.0 * whole.completion_ids}
    part = whole.select([4, 0])
    assert part.columns["advantage"].tolist() == [4, 0]
    assert torch.equal(part.columns["weight"], 10.0 * part.completion_ids)
    joined = Rollouts.concatenate([part, whole.select([1])], pad_id=0)
    assert joined.columns["advantage"].tolist() == [4, 0, 1]
    assert torch.equal(
        joined.columns["weight"] * joined.mask, 10.0 * joined.completion_ids * joined.mask
    )
    assert {n: c.shape for n, c in whole.placeholder("a").columns.items()} == {
        "advantage": (1,),
        "weight": (1, 1),
    }


def test_tokens_know_the_columns_of_their_completions():
    whole = rollouts()
    whole.columns = {"advantage": torch.arange(6.0), "weight": 10.0 * whole.completion_ids}
    tokens = Tokens.of(whole)
    assert tokens.advantage.tolist() == [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert tokens.weight.tolist() == [10.0 * y for y in tokens.y.tolist()]
    assert tokens.logmu_y.tolist() == [-float(y) for y in tokens.y.tolist()]
    tile = tokens[slice(3, 6)]
    assert tile.y.tolist() == tokens.y.tolist()[3:6]
    assert tile.advantage.tolist() == [0, 1, 1]
    assert Tokens.of(rollouts()).advantage is None


def test_concatenate_undoes_select():
    whole = rollouts()
    parts = [whole.select([0, 1, 2]), whole.select([3, 4, 5])]
    joined = Rollouts.concatenate(parts, pad_id=0)
    assert torch.equal(joined.tokens, whole.tokens)
    assert torch.equal(joined.prompts.ids, whole.prompts.ids)
