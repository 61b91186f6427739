"""vLLM as an engine, for real: ``make test-vllm`` makes an environment for it and runs these."""

import re
from collections import Counter
from dataclasses import replace

import kill
import pytest
import torch
from conftest import (
    AUTO,
    FSDP2,
    assert_same_rollouts,
    launch,
    load,
    load_any,
    save_gpt2,
    save_llama,
    student_of,
)
from scipy.stats import chisquare

from opd.errors import UserError
from opd.models import LoRA, completion_logits, eos_token_ids, load_model, load_tokenizer
from opd.prompts import PromptBatch, PromptFormat, tokenize_rows
from opd.randomness import derive_seed, random_state
from opd.rollouts import VLLM, Sampler, TransformersEngine
from opd.weights import Weights

pytestmark = pytest.mark.vllm
ENGINE = ["--model.engine", "opd.rollouts.VLLM"]
TEXTS = ["9", "what is 12 plus 30? the answer is 42", "add 7"]
GAP = 1e-3  # nats


class Setting:
    """A model, an engine that has it, 18 prompts, and a sampler under which some end early."""

    def __init__(self, source, engine, adapter=None):
        self.model = load_model(str(source), adapter=adapter).eval()
        self.tokenizer = load_tokenizer(str(source))
        self.weights, self.engine = Weights(self.model), engine
        own = eos_token_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.sampler = Sampler(20, 1.5, eos_token_ids=(*own, *range(40, 52)), pad_token_id=pad)
        self.batch = self.prompts(TEXTS * 6)
        engine.start(self.model, self.weights, self.tokenizer)

    def prompts(self, texts):
        rows = [{"prompt": text} for text in texts]
        found = tokenize_rows(rows, self.tokenizer, PromptFormat(chat_template=False))
        return PromptBatch.collate(found, self.tokenizer.pad_token_id)

    def sample(self, batch=None, engine=None, seeds=None, **options):
        batch = self.batch if batch is None else batch
        seeds = seeds or [derive_seed("completion", i) for i in range(len(batch))]
        if engine is not None:
            engine.start(self.model, self.weights, self.tokenizer)
        return (engine or self.engine)(batch, replace(self.sampler, **options), seeds)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Models as of the same name elsewhere, of heads that are large enough for vLLM."""
    folder = tmp_path_factory.mktemp("tiny")
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_llama(folder / "llama-student", 0, **heads)
    save_gpt2(folder / "gpt2-student", 0, n_embd=64, n_head=2)
    save_llama(folder / "small-heads", 0)
    return folder


@pytest.fixture(scope="module")
def setting(tiny):
    engine = VLLM(max_tokens=128)
    yield Setting(tiny / "llama-student", engine)
    engine.stop()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 5},
        {"top_p": 0.7},
        {"vocabulary": 60},
        {"eos_token_ids": ()},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_completions_and_logprobs_are_those_of_the_other_engine(setting, options):
    expected = setting.sample(engine=TransformersEngine(), **options)
    ours = setting.sample(**options)
    assert_same_rollouts(ours, expected)
    if not options:
        assert len(set(ours.lengths.tolist())) > 4
        assert 0 < ours.finished.sum() < len(ours)


def test_tokens_are_drawn_from_the_student_s_distribution(setting):
    """2,000 first tokens against the probabilities that the model itself gives them."""
    batch = setting.prompts(["9"] * 2000)
    options = {"temperature": 0.7, "eos_token_ids": (), "max_new_tokens": 1}
    found = Counter(setting.sample(batch, **options).completion_ids[:, 0].tolist())
    ids = batch.ids[:1]
    logits = completion_logits(setting.model, ids, ids >= 0, ids >= 0)[-1]
    p = (logits / 0.7).softmax(-1).double()
    likely = [token for token in range(len(p)) if 2000 * p[token] >= 5]
    observed = [found[token] for token in likely]
    expected = [float(2000 * p[token]) for token in likely]
    rest = (2000 - sum(observed), 2000 - sum(expected))
    test = chisquare([*observed, rest[0]], [*expected, rest[1]])
    assert len(likely) > 20
    assert test.pvalue > 1e-3


def test_a_completion_does_not_depend_on_its_batch(setting):
    whole = setting.sample()
    alone = setting.sample(setting.batch.select([4]), seeds=[derive_seed("completion", 4)])
    assert_same_rollouts(alone, whole.select([4]))


def test_no_prompts_no_completions_and_the_random_state_is_as_it_was(setting):
    before = random_state()
    assert len(setting.sample(setting.batch.select([]), seeds=[1][:0])) == 0
    setting.sample()
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])


def test_long_prompts_fit_or_are_refused_in_a_line(setting):
    text = "what is 12 plus 30? the answer is 42" * 3
    batch = setting.prompts([text] * 2)
    size = len(batch.prompts[0].token_ids)
    fitting = {"max_new_tokens": 128 - size}
    assert_same_rollouts(
        setting.sample(batch, **fitting),
        setting.sample(batch, engine=TransformersEngine(), **fitting),
    )
    with pytest.raises(UserError, match=r"VLLM.max_tokens=128 is less than a prompt"):
        setting.sample(batch, max_new_tokens=129 - size)


def test_weights_are_pushed_when_they_have_changed_and_only_then(setting):
    setting.sample()
    pushes = setting.engine.pushes
    before = setting.sample()
    assert setting.engine.pushes == pushes
    with setting.weights.edit() as weights:
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight.mul_(1.5)
    changed = setting.sample()
    assert setting.engine.pushes == pushes + 1
    assert changed.completion_ids.tolist() != before.completion_ids.tolist()
    assert_same_rollouts(changed, setting.sample(engine=TransformersEngine()))
    with setting.weights.edit() as weights:
        for weight, old in zip(weights, kept, strict=True):
            weight.copy_(old)
    assert_same_rollouts(setting.sample(), before)


def test_an_engine_that_was_stopped_begins_anew_with_another_model(tiny, setting):
    setting.engine.stop()
    engine = VLLM(max_tokens=64)
    other = Setting(tiny / "gpt2-student", engine)
    assert_same_rollouts(other.sample(), other.sample(engine=TransformersEngine()))
    engine.stop()
    setting.engine.start(setting.model, setting.weights, setting.tokenizer)
    assert_same_rollouts(setting.sample(), setting.sample(engine=TransformersEngine()))


@pytest.mark.parametrize(
    ("source", "options"),
    [("llama-student", {}), ("gpt2-student", {}), ("llama-student", {"quantize": "nf4"})],
)
def test_an_adapter_is_pushed_merged(tiny, setting, source, options):
    setting.engine.stop()
    engine = VLLM(max_tokens=64)
    adapted = Setting(tiny / source, engine, adapter=LoRA(rank=2, **options))
    with adapted.weights.edit() as weights:
        for weight in weights:
            torch.nn.init.normal_(weight, std=0.3)
    expected = adapted.sample(engine=TransformersEngine())
    assert_same_rollouts(adapted.sample(), expected)
    plain = Setting(tiny / source, TransformersEngine())
    assert plain.sample().completion_ids.tolist() != expected.completion_ids.tolist()
    engine.stop()


# --- training -------------------------------------------------------------------------------------


def losses(run):
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    return [float(row[header.index("opd/loss")]) for row in rows if row[header.index("opd/loss")]]


@pytest.mark.parametrize("options", [AUTO, [*AUTO, "--model.adapter.rank", "4"]], ids=len)
def test_a_run_is_that_of_the_other_engine(fit, options):
    ours, theirs = fit("vllm", *options, *ENGINE, steps=3), fit("plain", *options, steps=3)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    for name, weight in student_of(load(theirs)).items():
        torch.testing.assert_close(student_of(load(ours))[name], weight, atol=1e-4, rtol=1e-3)


def test_after_a_step_with_a_huge_rate_the_samples_change(fit):
    """Weights that never reach the engine: other projects did not notice for months."""
    run = fit("huge", *ENGINE, "--model.optimizer.lr", "0.05", steps=2)
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    columns = [header.index(f"rollout/{name}") for name in ("engine_logprob_gap", "length_mean")]
    steps = [[float(row[i]) for i in columns] for row in rows if row[header.index("opd/loss")]]
    assert steps[1][0] < GAP
    validations = [row for row in rows if row[header.index("val/reverse_kl")]]
    values = [float(row[header.index("val/reverse_kl")]) for row in validations]
    assert abs(values[-1] - values[0]) > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sleeps on a GPU only")
def test_after_it_has_slept_the_gap_is_what_it_was(fit):
    """Weights that were thrown away must be pushed again, changed or not."""
    gpu = ["--trainer.accelerator", "gpu", "--model.engine.compiled", "false"]
    run = fit("gpu", *AUTO, *ENGINE, *gpu, "--model.engine.dtype", "float32", steps=4)
    header, *rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    gap, loss = (header.index(name) for name in ("rollout/engine_logprob_gap", "opd/loss"))
    gaps = [float(row[gap]) for row in rows if row[loss]]
    assert len(gaps) == 4
    assert max(gaps) < GAP


def test_two_processes_with_shards_are_one(tmp_path, fit):
    alone = fit("alone", *AUTO, steps=2)
    together = launch(2, tmp_path / "two", *FSDP2, *AUTO, *ENGINE, steps=2)
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    resumed = launch(2, tmp_path / "half", *FSDP2, *AUTO, *ENGINE, steps=1)
    launch(2, resumed, *FSDP2, *AUTO, *ENGINE, "--ckpt_path", "last", steps=2)
    ours, theirs = (student_of(load_any(run)) for run in (resumed, together))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_shards_and_searches_go_on_after_sigkill_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "OPTIONS", [*kill.OPTIONS, *ENGINE])
    undisturbed = launch(2, tmp_path / "undisturbed", *kill.OPTIONS, steps=kill.STEPS)
    kill.check(1, 0, tmp_path, undisturbed)


# --- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"memory": 0.0}, {"cpu_cache": 0.0}, {"max_completions": 0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UserError, match=re.escape(next(iter(options)))):
        VLLM(**options)


def test_a_context_beyond_the_model_s_is_refused_in_a_line(tiny, setting):
    setting.engine.stop()
    engine = VLLM(max_tokens=4096)
    with pytest.raises(UserError, match=r"VLLM cannot run LlamaForCausalLM here .*max_model_len"):
        Setting(tiny / "llama-student", engine).sample()


def test_a_model_that_vllm_cannot_run_is_a_line(tiny, setting):
    setting.engine.stop()
    with pytest.raises(UserError, match=r"VLLM cannot run LlamaForCausalLM here .*head_dim=8"):
        Setting(tiny / "small-heads", VLLM(max_tokens=64)).sample()
