"""Weights: looked at, edited, versioned, copied."""

import torch
from torch import nn

from opd.weights import Weights


def module():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    part[0].bias.requires_grad_(False)
    return part


def test_only_what_is_trained_is_there_and_shares_its_memory():
    owner = module()
    weights = Weights(owner)
    assert list(weights.parameters()) == ["0.weight", "1.weight", "1.bias"]
    with weights.edit(["1.bias", "0.weight"]) as (bias, weight):
        bias.fill_(7.0)
        weight.zero_()
    assert owner[1].bias.item() == 7.0
    assert not owner[0].weight.any()
    assert owner[1].weight.any()
    assert weights.version == 1


def test_a_copy_does_not_follow():
    owner = module()
    weights = Weights(owner)
    (kept,) = weights.copy(["1.bias"])
    with weights.edit(["1.bias"]) as (bias,):
        bias += 1.0
    assert (owner[1].bias.detach() - kept).item() == 1.0


def test_companions_have_names_of_their_own_and_are_saved_with_the_module():
    owner = module()
    weights = Weights(owner)
    one, other = weights.companion("one"), weights.companion("other")
    one.replace({"1.bias": torch.ones(1)})
    other.replace({"1.bias": torch.zeros(1)})
    assert weights.companion("one") is one
    assert {k: v.item() for k, v in owner.state_dict().items() if "/" in k} == {
        "one.1/bias": 1.0,
        "other.1/bias": 0.0,
    }
    assert one.shards(["1.bias"])[0].item() == 1.0
