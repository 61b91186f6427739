"""The transformers engine: what it samples, what it says of it, and what it leaves alone."""

import dataclasses
import math
import sys

import pytest
import torch
from transformers import GenerationConfig

from opd.errors import UserError
from opd.models import completion_logits, eos_token_ids, load_model, load_tokenizer
from opd.prompts import PromptBatch, PromptFormat, tokenize_rows
from opd.randomness import derive_seed
from opd.rollouts import VLLM, Sampler, TransformersEngine, decoding
from opd.rollouts.decoding import SHARE
from opd.rollouts.sampling import draw
from opd.rollouts.transformers import completion_lengths
from opd.weights import Weights


def sample(engine, model, batch, sampler, seed=0):
    """One completion per prompt, with seeds of its own."""
    engine.start(model, Weights(model), tokenizer=None)
    return engine(batch, sampler, [derive_seed(seed, i) for i in range(len(batch))])


FAMILIES = ["llama", "gpt2"]
TEXTS = ["add 7", "what is 12 plus 30?", "9"]


def pair(source):
    model, tokenizer = load_model(source), load_tokenizer(source)
    rows = [{"prompt": text} for text in TEXTS]
    prompts = tokenize_rows(rows, tokenizer, PromptFormat(chat_template=False))
    batch = PromptBatch.collate(prompts, tokenizer.pad_token_id)
    sampler = Sampler(
        12, eos_token_ids=eos_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    return model, batch, sampler


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_logprobs_are_those_of_one_unpadded_forward(tiny, family):
    model, batch, sampler = pair(str(tiny / f"{family}-student"))
    rollouts = sample(TransformersEngine(), model.train(), batch, sampler, 0)
    assert model.training
    model.eval()
    for i, prompt in enumerate(batch.prompts):
        tokens = rollouts.completion_ids[i, : rollouts.lengths[i]].tolist()
        ids = torch.tensor([[*prompt.token_ids, *tokens]])
        logprobs = model(ids).logits[0].log_softmax(-1)
        expected = [logprobs[len(prompt.token_ids) - 1 + t, y].item() for t, y in enumerate(tokens)]
        ours = rollouts.engine_logprobs[i, : len(tokens)].tolist()
        assert ours == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_same_seeds_same_completions_and_global_state_untouched(tiny, batch_size):
    model, batch, sampler = pair(str(tiny / "llama-student"))
    state = torch.get_rng_state()
    engine = TransformersEngine(batch_size=batch_size)
    first, again = (sample(engine, model, batch, sampler, 7) for _ in range(2))
    other = sample(engine, model, batch, sampler, 8)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert not torch.equal(first.completion_ids[:, :5], other.completion_ids[:, :5])
    assert torch.equal(torch.get_rng_state(), state)
    assert first.prompts.ids.tolist() == batch.ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_depends_on_its_seed_alone(tiny, family):
    """Not on the rest of the batch, its padding, its order, nor on how the engine cuts it."""
    model, batch, sampler = pair(str(tiny / f"{family}-student"))
    batch = batch.repeat(3)
    seeds = [derive_seed("own", i) for i in range(len(batch))]
    engine = TransformersEngine(batch_size=4)
    engine.start(model, Weights(model), tokenizer=None)
    whole = engine(batch, sampler, seeds)
    texts = [whole.completion_ids[i, : whole.lengths[i]].tolist() for i in range(len(batch))]
    assert len({tuple(text) for text in texts}) > 3  # copies of a prompt differ
    for order in ([4], [8, 0, 3]):
        part = engine(batch.select(order), sampler, [seeds[i] for i in order])
        for row, i in enumerate(order):
            assert part.completion_ids[row, : part.lengths[row]].tolist() == texts[i]


def test_equal_prompts_are_read_once_and_rows_that_end_leave():
    """Twelve completions of two prompts; those of the pair are of unequal length."""
    model, tokenizer = load_model("embedded:base"), load_tokenizer("embedded:base")
    rows = [{"prompt": "123+456="}, {"prompt": "7+8="}]
    batch = PromptBatch.collate(tokenize_rows(rows, tokenizer, PromptFormat()), 0).repeat(6)
    end, nine = (tokenizer.convert_tokens_to_ids(c) for c in ("<eos>", "9"))
    sampler = Sampler(24, temperature=1.5, eos_token_ids=(end, nine))
    read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rollouts = sample(TransformersEngine(), model, batch, sampler, 3)
    hook.remove()
    assert read[0] == (2, batch.ids.shape[1])
    sizes = [size for size, _ in read[1:]]
    assert sizes == sorted(sizes, reverse=True)
    lengths = rollouts.lengths.tolist()
    assert len(set(lengths)) > 4
    for position, size in enumerate(sizes, start=1):
        left = sum(length > position for length in lengths)
        assert left <= size <= max(left / SHARE + 1, left)
    assert len(sizes) == max(lengths) - 1
    engine = TransformersEngine()
    engine.start(model, Weights(model), tokenizer=None)
    for i in range(12):
        one = engine(batch.select([i]), sampler, [derive_seed(3, i)])
        assert one.completion_ids[0].tolist() == rollouts.completion_ids[i, : lengths[i]].tolist()
        gap = one.engine_logprobs[0] - rollouts.engine_logprobs[i, : lengths[i]]
        assert gap.abs().max() < 1e-5


def test_random_numbers_are_made_in_parts_that_change_nothing(tiny, monkeypatch):
    model, batch, sampler = pair(str(tiny / "llama-student"))
    whole = sample(TransformersEngine(), model, batch, sampler, 1)
    monkeypatch.setattr(decoding, "NUMBERS", 5)
    parts = sample(TransformersEngine(), model, batch, sampler, 1)
    assert parts.lengths.max() > 10
    assert torch.equal(parts.completion_ids, whole.completion_ids)


def test_draw_is_the_inverse_of_the_cumulated_distribution():
    """Probabilities 0, 1/4, 0, 3/4: numbers below 1/4 give token 1, others token 3."""
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0]).expand(5, 4)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.6, 1 - 2.0**-53], dtype=torch.float64)
    tokens, total = draw(weights, numbers)
    assert tokens.tolist() == [1, 1, 3, 3, 3]
    assert total.tolist() == [4.0] * 5


@pytest.mark.parametrize("vocabulary", [7, 512, 3072, 3100])
def test_draws_among_many_tokens_are_those_of_the_definition(vocabulary):
    """Sums are taken in blocks: so the first token whose cumulated weight passes the number's."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, vocabulary, generator=generator).square()
    weights[torch.rand(200, vocabulary, generator=generator) < 0.5] = 0.0
    weights[:, 0] = 0.0  # a first and a last token that may not be drawn
    weights[:, -1] = 0.0
    weights[:20, :-3] = 0.0  # and a block of them
    weights[:20, -2] = 1.0
    weights[20:60, -1] = weights.sum(dim=1)[20:60]  # or one that is drawn half of the time
    numbers = torch.rand(200, generator=generator, dtype=torch.float64)
    numbers[::3], numbers[1::3] = 0.0, 1 - 2.0**-53
    tokens, total = draw(weights, numbers)
    assert (weights.gather(1, tokens[:, None]) > 0).all()
    for row, token in enumerate(tokens.tolist()):
        exact = [float(w) for w in weights[row]]
        wanted = float(numbers[row]) * math.fsum(exact)
        slack = 1e-6 * math.fsum(exact)  # blocks are summed in float32
        assert math.fsum(exact[:token]) <= wanted + slack
        assert wanted < math.fsum(exact[: token + 1]) + slack
    assert torch.allclose(total, weights.double().sum(dim=1), rtol=1e-6)


def test_a_draw_from_no_distribution_is_a_token_and_its_logprob_no_number(tiny):
    """A student that has diverged is found out by its loss, not by an index out of bounds."""
    model, batch, sampler = pair(str(tiny / "llama-student"))
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    rollouts = sample(TransformersEngine(), model, batch, sampler)
    assert rollouts.completion_ids.max() < model.config.vocab_size
    assert rollouts.engine_logprobs[rollouts.mask].isnan().all()


def test_draws_follow_the_models_distribution():
    """One token, 3,000 draws: each frequency within 5 standard errors."""
    model, tokenizer = load_model("embedded:base"), load_tokenizer("embedded:base")
    (prompt,) = tokenize_rows([{"prompt": "123+456=36"}], tokenizer, PromptFormat())
    draws = 3_000
    batch = PromptBatch.collate([prompt] * draws, 0)
    rollouts = sample(TransformersEngine(), model, batch, Sampler(1), 0)
    with torch.no_grad():
        p = model(batch.ids[:1]).logits[0, -1].softmax(-1)
    counts = torch.bincount(rollouts.completion_ids[:, 0], minlength=len(p))
    error = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() <= 5 * error + 1e-4).all()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"temperature": 0.0}, 1), ({"top_k": 3}, 3), ({"top_p": 1e-6}, 1)],
)
def test_sampler_fields_restrict_the_choice(options, allowed):
    model, tokenizer = load_model("embedded:base"), load_tokenizer("embedded:base")
    (prompt,) = tokenize_rows([{"prompt": "123+456=36"}], tokenizer, PromptFormat())
    batch = PromptBatch.collate([prompt] * 500, 0)
    rollouts = sample(TransformersEngine(), model, batch, Sampler(1, **options), 0)
    assert len(rollouts.completion_ids.unique()) == allowed
    with torch.no_grad():
        best = model(batch.ids[:1]).logits[0, -1].topk(allowed).indices
    assert set(rollouts.completion_ids.unique().tolist()) == set(best.tolist())


def test_the_models_own_generation_config_does_not_leak_in(tiny):
    model, batch, sampler = pair(str(tiny / "llama-student"))
    expected = sample(TransformersEngine(), model, batch, sampler, 1)
    own = GenerationConfig(
        do_sample=True,
        top_k=1,
        temperature=0.01,
        repetition_penalty=3.0,
        max_new_tokens=2,
        min_new_tokens=2,
    )
    model.generation_config = own
    ours = sample(TransformersEngine(), model, batch, sampler, 1)
    assert torch.equal(ours.completion_ids, expected.completion_ids)
    assert model.generation_config is own


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 5}])
def test_tokens_beyond_the_vocabulary_have_no_probability(tiny, options):
    """Log-probabilities are those of a softmax over the others alone."""
    model, batch, sampler = pair(str(tiny / "llama-student"))
    vocabulary = 60
    sampler = dataclasses.replace(sampler, vocabulary=vocabulary, **options)
    rollouts = sample(TransformersEngine(), model, batch.repeat(8), sampler, 0)
    assert rollouts.completion_ids.max() < vocabulary
    ids, mask, predicts = rollouts.inputs()
    model.eval()
    logits = completion_logits(model, ids, mask, predicts)[:, :vocabulary]
    logits = logits / (sampler.temperature or 1.0)
    if sampler.top_k:
        logits[logits < logits.topk(sampler.top_k).values[:, -1:]] = -torch.inf
    expected = logits.log_softmax(-1).gather(1, rollouts.tokens[:, None]).squeeze(1)
    ours = rollouts.engine_logprobs[rollouts.mask]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_completions_end_at_the_first_eos_even_where_it_is_the_padding():
    ids = torch.tensor([[4, 0, 0, 0], [0, 0, 0, 0], [4, 5, 6, 7], [4, 9, 5, 0]])
    lengths, finished = completion_lengths(ids, (0, 9))
    assert lengths.tolist() == [2, 1, 4, 2]
    assert finished.tolist() == [True, True, False, True]


def test_padding_token_equal_to_eos_keeps_the_real_eos(tiny):
    model, batch, sampler = pair(str(tiny / "gpt2-student"))
    assert sampler.pad_token_id in sampler.eos_token_ids
    batch = batch.repeat(60)
    rollouts = sample(TransformersEngine(), model, batch, Sampler(40, eos_token_ids=(0,)), 2)
    ended = rollouts.finished.nonzero().flatten().tolist()
    assert 0 < len(ended) < len(batch)
    for i in ended:
        tokens = rollouts.completion_ids[i, : rollouts.lengths[i]].tolist()
        assert tokens[-1] == 0
        assert 0 not in tokens[:-1]


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}]
)
def test_sampler_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        Sampler(**{"max_new_tokens": 4, **options})


def test_long_rollouts_report_their_progress(tiny, caplog):
    model, batch, sampler = pair(str(tiny / "llama-student"))
    with caplog.at_level("INFO"):
        sample(TransformersEngine(progress_seconds=0), model, batch, sampler)
    assert "rollout: token 1 of at most 12, 3 completions" in caplog.text


def test_vllm_that_is_not_there_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"needs vLLM: pip install 'opd\[vllm\]'"):
        VLLM().start(None, None, None)
