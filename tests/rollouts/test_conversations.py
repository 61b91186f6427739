"""Conversations: what is inserted is read, and no loss, metric or count is made of it."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import AUTO, FSDP2, ROOT, assert_same_rollouts, launch, load, student_of
from test_reuse import column
from test_step import batch_of

from opd import stages
from opd.errors import UserError
from opd.metrics import rollout_metrics, token_metrics
from opd.module import OPDModule
from opd.objectives import ReverseKL, reverse_kl
from opd.prompts import PromptBatch, PromptFormat, tokenize_rows
from opd.randomness import derive_seed
from opd.rollouts import (
    Conversations,
    Environment,
    Rollouts,
    TransformersEngine,
    VLLMServer,
    rollout_records,
    verify,
)
from opd.rollouts.environments import AskAgain
from opd.rollouts.rollouts import INSERTED
from opd.step import StepRequest, accumulate_gradients, take_step

CONVERSATIONS = ["--config", str(ROOT / "configs" / "conversations.yaml")]
ENDS = [1, *range(40, 60)]  # of a turn, so that some come early


class Objecting(Environment):
    """Objects to long turns, and asks for more where there was little."""

    def __call__(self, prompt, messages):
        said = messages[-1]
        assert said["role"] == "assistant"
        if len(said["content"]) % 3 == 0:
            return []
        if len(said["content"]) > 12:
            return [{"role": "user", "content": "no"}]
        return [{"role": "tool", "content": "42"}, {"role": "user", "content": "and 9?"}]


def module_with(tiny, environment=None, **options):
    engine = Conversations(environment or Objecting(), turn_tokens=12, turns=4)
    options = {"max_new_tokens": 60, "engine": engine, **options}
    module = OPDModule(
        str(tiny / "llama-student"),
        str(tiny / "llama-teacher"),
        temperature=1.3,
        eos_token_ids=ENDS,
        rollouts_per_prompt=3,
        **options,
    )
    module.configure_model()
    return module


def conversations_of(module, seed=0) -> Rollouts:
    return stages.generate(module, batch_of(module), seed, copies=3)


def rows(rollouts):
    """Prompt, completion, and whether each of its tokens was sampled; unpadded."""
    for i, prompt in enumerate(rollouts.prompts.prompts):
        length = rollouts.lengths[i]
        sampled = rollouts.columns[INSERTED][i, :length] == 0
        yield torch.tensor(prompt.token_ids), rollouts.completion_ids[i, :length], sampled


def log_probs(model, prompt, ids):
    logits = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / 1.3).log_softmax(-1)


def test_they_are_what_the_template_makes_of_them_and_log_probs_are_of_one_pass(tiny):
    module = module_with(tiny)
    rollouts = conversations_of(module)
    module.student.eval()
    inserted = rollouts.columns[INSERTED].sum(dim=1)
    assert (inserted > 0).sum() > 3
    assert (inserted == 0).sum() > 1
    assert len(set(rollouts.counts.tolist())) > 4
    for i, (prompt, ids, sampled) in enumerate(rows(rollouts)):
        text = module.tokenizer.decode(ids)
        assert ("[tool]42[user]and 9?[assistant]" in text or "[user]no[assistant]" in text) == bool(
            inserted[i]
        )
        found = log_probs(module.student, prompt, ids).gather(1, ids[:, None]).squeeze(1)
        engine = rollouts.engine_logprobs[i, : len(ids)]
        torch.testing.assert_close(engine[sampled], found[sampled], atol=1e-4, rtol=0)
        assert not engine[~sampled].any()
        assert sampled[0]
        assert sampled[-1]


def test_loss_gradient_and_counts_are_of_sampled_tokens_only(tiny):
    """The definition in float64, each conversation by itself."""
    module = module_with(tiny, micro_batch_tokens=200)
    rollouts = conversations_of(module)
    micro_batches = stages.micro_batches(module, rollouts)
    assert len(micro_batches) > 2
    student, teacher = (
        model.double().eval()
        for model in (_copy(module.student), _copy(module.teachers["default"].model))
    )
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, ids, sampled in rows(rollouts):
        kl = reverse_kl(log_probs(student, prompt, ids), log_probs(teacher, prompt, ids).detach())
        total, count = total + kl[sampled].sum(), count + int(sampled.sum())
    loss = total / count
    loss.backward()

    module.student.eval()
    values, _ = accumulate_gradients(module, micro_batches)
    ours = torch.cat([value["opd/loss"] for value in values])
    assert len(ours) == count == int(rollouts.counts.sum()) < int(rollouts.lengths.sum())
    assert float(ours.double().mean()) == pytest.approx(float(loss), rel=1e-5)
    for found, expected in zip(module.student.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-7)
    module.ledger.synchronize(lambda value: value, 1)
    assert module.ledger.totals["teacher_tokens"] == module.ledger.totals["train_tokens"] == count


def _copy(model):
    import copy

    return copy.deepcopy(model)


def test_what_happens_at_inserted_tokens_changes_no_metric(tiny):
    """Another environment's words would; other log-probabilities at them do not."""
    module = module_with(tiny)
    rollouts = conversations_of(module)
    reading = stages.read(module, rollouts)
    before = stages.compare(module, reading, ReverseKL(), token_metrics).values
    noise = torch.where(rollouts.mask, 0.0, -7.0)
    changed = replace(rollouts, engine_logprobs=rollouts.engine_logprobs + noise)
    after = stages.compare(
        module, replace(reading, micro=changed), ReverseKL(), token_metrics
    ).values
    for name, value in before.items():
        assert len(value) == int(rollouts.counts.sum())
        assert torch.equal(after[name], value), name


def test_counts_and_weights_of_scores_are_of_sampled_tokens(tiny):
    module = module_with(tiny)
    rollouts = conversations_of(module)
    counts = rollouts.counts.tolist()
    assert counts != rollouts.lengths.tolist()
    found = rollout_metrics(rollouts)
    for name in ("rollout/tokens", "rollout/length_mean", "rollout/length_max"):
        assert found[name].tolist() == counts
    score = stages.judge(module, [stages.read(module, rollouts)], "reverse_kl")
    assert score.weights.tolist() == counts


def test_parts_and_joints_keep_what_was_inserted(tiny):
    module = module_with(tiny)
    rollouts = conversations_of(module)
    parts = Rollouts.concatenate([rollouts.select([7]), rollouts.select([2, 5])], pad_id=2)
    picked = rollouts.select([7, 2, 5])
    assert_same_rollouts(parts, picked)
    assert torch.equal(parts.mask, picked.mask)
    assert parts.tokens.tolist() == picked.tokens.tolist()
    reading = stages.read(module, rollouts)
    some = stages.compare(module, reading.select([7, 2, 5]), ReverseKL(), token_metrics)
    alone = stages.compare(module, stages.read(module, picked), ReverseKL(), token_metrics)
    torch.testing.assert_close(some.values, alone.values, atol=1e-5, rtol=1e-4)


def test_a_conversation_does_not_depend_on_its_batch_and_begins_as_a_completion(tiny):
    module = module_with(tiny)
    batch, sampler = batch_of(module), replace(module.sampler, pad_token_id=2)
    seeds = [derive_seed("seed", i) for i in range(len(batch))]
    together = module.engine(batch, sampler, seeds)
    for i in range(len(batch)):
        assert_same_rollouts(
            module.engine(batch.select([i]), sampler, [seeds[i]]), together.select([i])
        )
    plain = TransformersEngine()
    plain.start(module.student, module.weights, module.tokenizer)
    first = plain(batch, replace(sampler, max_new_tokens=12), seeds)
    for i, (_, ids, _) in enumerate(rows(together)):
        length = int(first.lengths[i])
        assert ids[:length].tolist() == first.completion_ids[i, :length].tolist()
    assert len(module.engine(batch.select([]), sampler, [])) == 0


class Endless(Environment):
    """Never has enough."""

    def __call__(self, prompt, messages):
        return [{"role": "user", "content": "go on"}]


class Noting(TransformersEngine):
    """Keeps the seeds that it is given."""

    def __call__(self, prompts, sampler, seeds):
        self.seeds = [*getattr(self, "seeds", []), *seeds]
        return super().__call__(prompts, sampler, seeds)


def test_every_turn_has_a_seed_of_its_own(tiny):
    noting = Noting()
    engine = Conversations(Endless(), turn_tokens=12, turns=3, engine=noting)
    module = module_with(tiny, engine=engine, max_new_tokens=200)
    module.engine(batch_of(module), module.sampler, [7, 8, 9, 10])
    assert noting.seeds[:4] == [7, 8, 9, 10]
    assert len(set(noting.seeds)) == len(noting.seeds) > 4


def test_what_a_template_ends_a_turn_with_stands_there_once():
    """The built-in pair: its template ends turns with the token that the student ends them with."""
    engine = Conversations(AskAgain(), turn_tokens=32, turns=2)
    module = OPDModule("embedded:base", "embedded:teacher", max_new_tokens=88, engine=engine)
    module.configure_model()
    sums = [(a, b) for a in (188, 487, 659) for b in (777, 948)]
    texts = [{"prompt": f"{a}+{b}=", "answer": f"{a + b:04d}"} for a, b in sums]
    prompts = tokenize_rows(texts, module.tokenizer, PromptFormat())
    rollouts = module.engine(PromptBatch.collate(prompts, 0), module.sampler, list(range(6)))
    again = 0
    for (a, b), (_, ids, sampled) in zip(sums, rows(rollouts), strict=True):
        text = module.tokenizer.decode(
            ids[: sampled.tolist().index(False)] if not sampled.all() else ids
        )
        assert text.removesuffix("<eos>").endswith(f"={a + b:04d}") == bool(sampled.all())
        if not sampled.all():
            again += 1
            assert module.tokenizer.decode(ids[~sampled]) == f"{b}+{a}="
    assert 0 < again < 6


@pytest.mark.parametrize(("turns", "room"), [(2, 200), (9, 60)])
def test_turns_and_room_end_a_conversation(tiny, turns, room):
    engine = Conversations(Endless(), turn_tokens=12, turns=turns)
    module = module_with(tiny, engine=engine, max_new_tokens=room)
    rollouts = conversations_of(module)
    assert rollouts.lengths.max() <= room
    said = module.tokenizer("</s>[user]go on[assistant]", add_special_tokens=False)
    next_turn = len(said["input_ids"]) + 12
    for i, (_, ids, sampled) in enumerate(rows(rollouts)):
        ends = ids[:-1][sampled[:-1] & ~sampled[1:]]
        assert set(ends.tolist()) <= set(ENDS)  # what is cut off does not go on
        changes = int((sampled[1:] != sampled[:-1]).sum())
        assert changes % 2 == 0  # ends with a turn of the student's
        said = changes // 2 + 1
        ended = int(ids[-1]) in ENDS
        if room == 200:
            assert said == turns or not ended
            assert bool(rollouts.finished[i]) == ended
        else:
            assert not rollouts.finished[i]
            assert not ended or len(ids) + next_turn > room
    assert rollouts.counts.max() > 12


def test_the_answer_is_looked_for_in_the_last_turn(tiny):
    module = module_with(tiny)
    rollouts = conversations_of(module)
    texts = [
        module.tokenizer.decode(ids[sampled.tolist().index(True) :], skip_special_tokens=True)
        for _, ids, sampled in rows(rollouts)
    ]
    last = []

    class Looking:
        def verify(self, completions, answers):
            last.extend(completions)
            return [1.0] * len(completions)

    for i, prompt in enumerate(rollouts.prompts.prompts):
        rollouts.prompts.prompts[i] = replace(prompt, answer="9")
    verify(rollouts, module.tokenizer, Looking())
    assert all(text.endswith(one) for text, one in zip(texts, last, strict=True))
    several = [i for i in range(len(last)) if rollouts.columns[INSERTED][i].any()]
    assert all(len(last[i]) < len(texts[i]) and "[user]" not in last[i] for i in several)
    records = list(rollout_records(rollouts, module.tokenizer))
    assert (
        records[several[0]]["inserted"]
        == rollouts.columns[INSERTED][several[0]][: rollouts.lengths[several[0]]].tolist()
    )


def test_a_step_and_its_weights_of_tokens_are_of_sampled_ones(tiny):
    """With a reuse of rollouts: what follows an inserted token weighs 1."""
    from opd.reuse import importance_weights

    module = module_with(tiny)
    optimizer = torch.optim.SGD(module.student.parameters(), lr=0.1)
    output = take_step(module, batch_of(module), StepRequest(), optimizer, None)
    micro = next(m for m in output.micro_batches if m.columns[INSERTED].any())
    ratios = importance_weights(torch.zeros(micro.num_tokens), micro, "previous")
    after = (micro.columns[INSERTED][:, :-1] != 0) & micro.mask[:, 1:]
    assert after.any()
    assert (ratios[:, 1:][after] == 1).all()
    assert not ratios[~micro.mask].any()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_with_searches_resume_and_ranks(tmp_path, fit):
    """A wrong sum is asked again; a resumed run, and two processes, end alike."""
    whole = fit("whole", *CONVERSATIONS, *AUTO, steps=3)
    fit("part", *CONVERSATIONS, *AUTO, steps=2)
    part = fit("part", *CONVERSATIONS, *AUTO, "--ckpt_path", "last", steps=3)
    for name, weight in student_of(load(whole)).items():
        assert torch.equal(student_of(load(part))[name], weight)
    assert max(column(whole, "rollout/length_max")) > 32
    two = launch(2, tmp_path / "two", *FSDP2, *CONVERSATIONS, steps=2)
    one = fit("one", *CONVERSATIONS, steps=2)
    assert column(two, "opd/loss") == pytest.approx(column(one, "opd/loss"), rel=1e-4)
    assert column(two, "rollout/tokens") == column(one, "rollout/tokens")


# --- what cannot work -----------------------------------------------------------------------------


class Broken(Environment):
    """Fails, or talks nonsense."""

    def __init__(self, says):
        self.says = says

    def __call__(self, prompt, messages):
        if self.says is None:
            raise KeyError("tool")
        return self.says


@pytest.mark.parametrize(
    ("says", "said"),
    [
        (None, r"environment Broken fails on a conversation of rows row \d \(KeyError: 'tool'\)"),
        (["hello"], r"environment Broken fails on a conversation of rows row \d \(ValueError"),
        ([{"content": "x"}], r"need a role and a content, texts both; it answers .* \{'content'"),
    ],
)
def test_an_environment_that_fails_is_a_line(tiny, says, said):
    module = module_with(tiny, Broken(says))
    with pytest.raises(UserError, match=said):
        conversations_of(module)


def test_a_template_that_writes_turns_anew_is_refused(tiny):
    module = module_with(tiny)
    known = module.tokenizer.chat_template
    without_tools = known.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'tool' }}")
    module.tokenizer.chat_template = without_tools
    with pytest.raises(UserError, match="leaves out what a tool says"):
        conversations_of(module)
    template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    module.tokenizer.chat_template = template
    with pytest.raises(UserError, match="writes a turn of the assistant otherwise"):
        conversations_of(module)


def test_options_that_make_no_sense(tiny):
    with pytest.raises(UserError, match="turn_tokens=0"):
        Conversations(Objecting(), turn_tokens=0)
    with pytest.raises(UserError, match="cannot sample ahead"):
        Conversations(Objecting(), 8, engine=VLLMServer("http://localhost:1", staleness=1))
    module = module_with(tiny, max_new_tokens=10)
    with pytest.raises(UserError, match=re.escape("turn_tokens=12 is more than a whole")):
        conversations_of(module)
    module.tokenizer.chat_template = None
    with pytest.raises(UserError, match="needs a chat template"):
        module.engine.start(module.student, module.weights, module.tokenizer)
