"""Layers while a batch is decoded: the numbers of transformers' own, and nothing left behind."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd.rollouts import layers
from opd.rollouts.layers import GrowingLayer


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_grouped_queries_is_that_of_repeated_keys(random, groups, length, masked):
    batch, heads, before, size = 2, 2, 7, 8
    query = random(batch, heads * groups, length, size)
    key, value = random(batch, heads, before, size), random(batch, heads, before, size)
    mask = torch.ones(batch, 1, length, before, dtype=torch.bool)
    mask[0, :, :, :3] = False
    mask = mask if masked else None
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    if not masked and length > 1:  # a prompt: as many queries as keys
        query = random(batch, heads * groups, before, size)
    found, _ = layers._attend(module, query, key, value, mask, scaling=0.3)
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = 0.3 * query @ keys.transpose(2, 3)
    if masked:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif length > 1:
        scores = scores.masked_fill(torch.ones(before, before).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_cache_that_grows_holds_what_was_put_in(random):
    ours, plain = GrowingLayer(), DynamicLayer()
    rooms = set()
    for step, new in enumerate([5, *[1] * 60]):
        keys, values = random(6, 2, new, 4), random(6, 2, new, 3)
        if step >= 20:
            keys, values = keys[:3], values[:3]
        for found, expected in zip(
            ours.update(keys, values), plain.update(keys, values), strict=True
        ):
            assert torch.equal(found, expected)
        rooms.add(ours.keys.data_ptr())
        if step == 19:
            for layer in (ours, plain):
                layer.batch_select_indices(torch.tensor([4, 0, 4]))
        assert ours.get_seq_length() == plain.get_seq_length() == 5 + step
    assert len(rooms) < 6  # not one per token


def test_only_plain_and_empty_layers_are_replaced(tiny):
    from opd.models import load_model

    cache = DynamicCache(config=load_model(str(tiny / "llama-student")).config)
    cache.layers[0].update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    layers.with_room(cache)
    assert [type(layer) for layer in cache.layers[:2]] == [DynamicLayer, GrowingLayer]
    bare = DynamicCache()
    layers.with_room(bare)
    bare.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
    assert type(bare.layers[0]) is GrowingLayer


def test_packed_layers_multiply_alike_and_are_left_as_they_were(random):
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256, bias=False), nn.Linear(256, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(random(*parameter.shape) / 16)
    inputs = random(3, 1, 256)
    expected = model(inputs)
    with suppress(KeyboardInterrupt), layers.decoding(model, rows=3, tokens=99):
        assert ["forward" in vars(layer) for layer in model] == [True, True, False]
        with torch.no_grad():
            assert torch.allclose(model(inputs), expected, atol=1e-5)
        raise KeyboardInterrupt
    assert not any("forward" in vars(layer) for layer in model)
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    with layers.decoding(model, rows=3, tokens=2):
        assert not any("forward" in vars(layer) for layer in model)
