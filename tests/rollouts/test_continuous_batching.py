"""Continuous batching: the same completions as by TransformersEngine, from a batch that is full."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import CPU, DDP, FSDP1, FSDP2, assert_same_rollouts, launch
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, MistralConfig

from opd.cli import main
from opd.errors import UserError
from opd.models import eos_token_ids, load_model, load_tokenizer
from opd.prompts import PromptBatch, PromptFormat, tokenize_rows
from opd.randomness import derive_seed, random_state
from opd.rollouts import ContinuousBatching, Sampler, TransformersEngine, continuous_batching
from opd.weights import Weights

ENGINE = ["--model.engine", "opd.rollouts.ContinuousBatching"]
TEXTS = ["9", "what is 12 plus 30? the answer is 42", "add 7"]
SUMS = ["123+456=", "7+8="]


def setting(source, texts, **options):
    """A model, eighteen prompts of unequal length, and a sampler under which some end early."""
    model, tokenizer = load_model(str(source)), load_tokenizer(str(source))
    rows = [{"prompt": text} for text in texts]
    prompts = tokenize_rows(rows, tokenizer, PromptFormat(chat_template=False))
    batch = PromptBatch.collate(prompts * (18 // len(prompts)), tokenizer.pad_token_id)
    own = eos_token_ids(model, tokenizer)
    more = (
        [tokenizer.convert_tokens_to_ids("9")] if str(source) == "embedded:base" else range(40, 52)
    )
    sampler = Sampler(
        20,
        temperature=1.5,
        eos_token_ids=tuple({*own, *more}),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, batch, replace(sampler, **options)


def sample(engine, model, batch, sampler):
    engine.start(model, Weights(model), tokenizer=None)
    return engine(batch, sampler, [derive_seed("completion", i) for i in range(len(batch))])


@pytest.fixture
def llama(tiny):
    return setting(tiny / "llama-student", TEXTS)


SAMPLERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 5},
    {"top_p": 0.7},
    {"vocabulary": 60},
    {"eos_token_ids": ()},
    {"max_new_tokens": 1},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=str)
@pytest.mark.parametrize("source", ["llama-student", "gpt2-student", "embedded:base"])
def test_completions_and_logprobs_are_those_of_the_other_engine(tiny, source, options):
    texts = SUMS if source == "embedded:base" else TEXTS
    source = source if source == "embedded:base" else tiny / source
    model, batch, sampler = setting(source, texts, **options)
    if "vocabulary" in options and source == "embedded:base":
        sampler = replace(sampler, vocabulary=10)
    expected = sample(TransformersEngine(), model, batch, sampler)
    ours = sample(ContinuousBatching(batch_size=4), model, batch, sampler)
    assert_same_rollouts(ours, expected)
    if not options:
        assert len(set(ours.lengths.tolist())) > 4
        assert 0 < ours.finished.sum() < len(batch)


def test_layers_with_a_sliding_window_see_as_far_as_with_the_other_engine(tiny, tmp_path):
    AutoTokenizer.from_pretrained(tiny / "llama-student").save_pretrained(tmp_path)
    llama = load_model(str(tiny / "llama-student")).config.to_dict()
    config = MistralConfig(**{**llama, "model_type": "mistral", "sliding_window": 6})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    model.save_pretrained(tmp_path)
    model, batch, sampler = setting(tmp_path, TEXTS)
    expected = sample(TransformersEngine(), model, batch, sampler)
    assert_same_rollouts(sample(ContinuousBatching(4), model, batch, sampler), expected)
    model.config.sliding_window = 100
    far = sample(TransformersEngine(), model, batch, sampler)
    assert far.completion_ids.tolist() != expected.completion_ids.tolist()


def test_the_next_completion_begins_as_soon_as_one_ends(llama):
    model, batch, sampler = llama
    sampler = replace(sampler, max_new_tokens=40)  # for which the cache has room for more than 4
    passes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs), with_kwargs=True
    )
    expected = sample(TransformersEngine(batch_size=4), model, batch, sampler)
    theirs = len(passes)
    passes.clear()
    ours = sample(ContinuousBatching(batch_size=4), model, batch, sampler)
    hook.remove()
    assert_same_rollouts(ours, expected)
    read = sum(len(prompt.token_ids) for prompt in batch.prompts) + int((ours.lengths - 1).sum())
    assert sum(one["input_ids"].numel() for one in passes) == read  # nothing twice, and no padding
    assert len(passes) < 0.8 * theirs
    assert max(len(one["logits_indices"]) for one in passes) == 4


@pytest.mark.parametrize("room", [64, 96])
def test_completions_that_find_no_room_in_the_cache_are_read_again(llama, room):
    model, batch, sampler = llama
    sampler = replace(sampler, max_new_tokens=40, eos_token_ids=(1,))
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ours = sample(ContinuousBatching(8, cache_tokens=room), model, batch, sampler)
    hook.remove()
    once = sum(len(prompt.token_ids) for prompt in batch.prompts) + int((ours.lengths - 1).sum())
    assert sum(read) > once
    assert_same_rollouts(ours, sample(TransformersEngine(), model, batch, sampler))


def test_a_prompt_may_be_longer_than_what_a_pass_reads(llama, monkeypatch):
    model, batch, sampler = llama
    monkeypatch.setattr(continuous_batching, "PASS", 7)
    assert max(len(prompt.token_ids) for prompt in batch.prompts) > 7
    ours = sample(ContinuousBatching(batch_size=4), model, batch, sampler)
    assert_same_rollouts(ours, sample(TransformersEngine(), model, batch, sampler))


def test_new_weights_say_what_they_say_with_the_other_engine(llama):
    """The prompts are the same, and long enough for whole pages of them to be found again."""
    model, batch, sampler = llama
    prompts = [replace(p, token_ids=p.token_ids * 40) for p in batch.prompts[:3]]
    batch = PromptBatch.collate([p for p in prompts if len(p.token_ids) < 100] * 3, 2)
    assert max(len(p.token_ids) for p in batch.prompts) > continuous_batching.PAGE
    ours = ContinuousBatching(batch_size=4)
    before = sample(ours, model, batch, sampler)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    seeds = [derive_seed("completion", i) for i in range(len(batch))]
    after = ours(batch, sampler, seeds)  # of the engine that was started before
    assert after.completion_ids.tolist() != before.completion_ids.tolist()
    assert_same_rollouts(after, sample(TransformersEngine(), model, batch, sampler))


def test_under_autocast_too(llama):
    model, batch, sampler = llama
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(TransformersEngine(), model, batch, sampler)
        ours = sample(ContinuousBatching(batch_size=4), model, batch, sampler)
    same = [
        row
        for row in range(len(batch))
        if ours.completion_ids[row].tolist() == expected.completion_ids[row].tolist()
    ]
    assert len(same) > len(batch) / 2  # bfloat16 rounds some draws to the next token
    assert_same_rollouts(ours.select(same), expected.select(same), gap=0.05)


def test_model_and_random_state_are_left_as_they_were(llama):
    model, batch, sampler = llama
    model.train()
    torch.manual_seed(17)
    config = model.generation_config
    before, state = copy.deepcopy(config.to_dict()), random_state()
    engine = ContinuousBatching(batch_size=4)
    sample(engine, model, batch, sampler)
    nothing = sample(engine, model, batch.select([]), sampler)
    assert len(nothing) == 0
    assert nothing.completion_ids.shape == (0, 0)
    assert random_state()["python"] == state["python"]
    assert torch.equal(random_state()["torch"], state["torch"])
    assert model.training
    assert model.generation_config is config
    assert config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())


def test_long_rollouts_report_their_progress(llama, caplog):
    model, batch, sampler = llama
    with caplog.at_level("INFO"):
        sample(ContinuousBatching(4, progress_seconds=0), model, batch, sampler)
    assert "rollout: 0 of 18 completions have ended" in caplog.text


@pytest.mark.parametrize("option", ["batch_size", "cache_tokens"])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(UserError, match=f"ContinuousBatching.{option}=0 must be at least 1"):
        ContinuousBatching(**{option: 0})


def test_a_cache_too_small_for_a_completion_is_refused(llama):
    with pytest.raises(UserError, match="cache_tokens=31 must be at least 32: a prompt and its"):
        sample(ContinuousBatching(cache_tokens=31), *llama)


def test_a_cache_too_large_for_the_memory_is_refused(llama):
    model, batch, sampler = llama
    sampler = replace(sampler, max_new_tokens=10**9)
    with pytest.raises(UserError, match="does not fit: set the engine's cache_tokens or batch"):
        sample(ContinuousBatching(), model, batch, sampler)


def test_a_model_without_pages_is_refused_and_the_other_engine_named(tiny):
    model = load_model(str(tiny / "llama-student"))
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"eager attention .* Use opd.rollouts.TransformersEngine"):
        ContinuousBatching().start(model, Weights(model), None)
    config = Lfm2Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"layers with conv, .* Use opd.rollouts.Transformers"):
        ContinuousBatching().start(model, Weights(model), None)


def said(run):
    """What the first process has sampled: step, prompt and completion."""
    lines = [
        (path.name, json.loads(line))
        for path in sorted((run / "samples").glob("step_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [(step, line["prompt"], line["completion"]) for step, line in lines]


def test_a_run_samples_what_it_samples_with_the_other_engine(fit):
    options = ["--samples.every_n_steps", "1", "--model.optimizer.lr", "0.01"]
    expected = said(fit("expected", *options))
    assert len(expected) == 16
    ours = fit("ours", *options, *ENGINE, "--model.engine.batch_size", "3")
    assert said(ours) == expected


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2, FSDP1], ids=["ddp", "fsdp2", "fsdp1"])
def test_two_processes_sample_what_one_does(fit, tmp_path, strategy):
    options = ["--samples.every_n_steps", "1", "--data.validation_limit", "8", *ENGINE]
    expected = said(fit("expected", *options, *CPU))
    ours = said(launch(2, tmp_path / "ours", *options, *strategy))
    assert len(ours) == len(expected) / 2
    assert set(ours) < set(expected)


def test_benchmarks_hear_the_same_completions(tmp_path):
    command = ["evaluate", "--model", "embedded:base", "--tasks", "arithmetic", "--limit", "20"]
    heard = []
    for engine in ("TransformersEngine", "ContinuousBatching"):
        output = tmp_path / engine
        named = ["--engine", f"opd.rollouts.{engine}", "--output", str(output)]
        assert main([*command, *named]) == 0
        lines = (output / "samples_arithmetic.jsonl").read_text().splitlines()
        heard.append([json.loads(line)["resps"] for line in lines])
    assert heard[0] == heard[1]
