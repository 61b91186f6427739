"""What student and teacher say on held-out prompts is written with each validation, at no price.

Sixteen prompts are validated on, and all of them are written: means over the records are the
metrics.
"""

import json
import statistics

import pytest
import torch
from conftest import (
    STRATEGIES,
    TEXTS,
    assert_same,
    byte_level_tokenizer,
    launch,
    load,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from callbacks import samples
from opd.metrics_rows import read_metrics
from opd.rollouts import TransformersEngine, token_texts

PER_TOKEN = ("engine_logprob", "student_logprob", "teacher_logprob", "reverse_kl", "tokens")
NONE = ["--samples.held_out", "0"]


def read(folder, name):
    lines = (folder / "validation" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def names(folder):
    return sorted(path.name for path in (folder / "validation").iterdir())


def test_each_validation_writes_what_its_metrics_are_of(vanilla):
    assert names(vanilla) == ["step_000000.jsonl", "step_000003.jsonl", "teacher.jsonl"]
    validations = [r for r in read_metrics(vanilla / "metrics.csv") if "val/reverse_kl" in r]
    for row, name in zip(validations, ("step_000000", "step_000003"), strict=True):
        records = read(vanilla, name)
        assert [record["row"] for record in records] == list(range(16))
        tokens = [kl for record in records for kl in record["reverse_kl"]]
        assert statistics.mean(tokens) == pytest.approx(float(row["val/reverse_kl"]), abs=1e-5)
        log_q = [value for record in records for value in record["teacher_logprob"]]
        assert statistics.mean(log_q) == pytest.approx(float(row["val/teacher_logprob"]), abs=1e-4)
        right = [record["correct"] for record in records]
        assert statistics.mean(right) == pytest.approx(float(row["val/accuracy"]))
        assert 0 < sum(right) < 16
        for record in records:
            said = record["completion"].removesuffix("<eos>").rpartition("=")[2]
            assert record["correct"] == (said == record["answer"])
            assert "".join(record["tokens"]) == record["completion"]
            lengths = {len(record[key]) for key in PER_TOKEN}
            assert lengths == {len(record["completion_ids"])}
            # Nothing is cut off by the sampler: the engine draws from the student's distribution
            assert record["student_logprob"] == pytest.approx(record["engine_logprob"], abs=1e-3)


def test_the_teacher_draws_as_the_student_does_and_the_student_reads_it(fit, vanilla):
    """The student's own twin as teacher says what the student says, word for word, when hot too."""
    hot = ["--model.temperature", "5"]
    hot += ["--model.objective", "opd.objectives.FixedNegativeAdvantage"]  # asks no twin
    folder = fit("run", "--model.student", "embedded:teacher", *hot, steps=1)
    teacher, student = read(folder, "teacher"), read(folder, "step_000000")
    assert any(one["finish_reason"] == "stop" and not one["correct"] for one in teacher)
    assert [one["completion"] for one in teacher] == [one["completion"] for one in student]
    for one, other in zip(teacher, student, strict=True):
        assert one["correct"] == (None if one["finish_reason"] == "length" else other["correct"])
    assert max(kl for one in teacher for kl in one["reverse_kl"]) < 1e-4
    for one in read(vanilla, "teacher"):  # and where the student is another
        assert one["teacher_logprob"] == pytest.approx(one["engine_logprob"], abs=1e-3)
        assert max(one["reverse_kl"]) > 0.1


def test_a_teacher_that_is_cut_short_is_not_judged(fit, monkeypatch, vanilla):
    monkeypatch.setattr(samples, "TEACHER_TOKENS", 5)
    for short, whole in zip(
        read(fit("run", steps=1), "teacher"), read(vanilla, "teacher"), strict=True
    ):
        assert short["completion_ids"] == whole["completion_ids"][:5]
        assert short["finish_reason"] == "length"
        untrained = whole["student_logprob"][:5]  # although the other run has gone on to step 3
        assert short["student_logprob"] == pytest.approx(untrained, abs=1e-5)
        assert short["correct"] is None
        assert whole["correct"] is not None


def test_prompts_without_answers_are_not_judged(fit, tmp_path):
    rows = [{"prompt": "1+2="}, {"prompt": "123+456=", "answer": "579"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = fit("run", "--data.validation", str(prompts), steps=1)
    for name in ("step_000000", "teacher"):
        without, answered = read(folder, name)
        assert without["correct"] is None
        assert answered["correct"] in (True, False)


def test_several_data_sets_have_equally_many(fit, tmp_path):
    """Six prompts of one, two of another, and five to write; numbered together."""
    for name, count in [("many", 6), ("few", 2)]:
        lines = (json.dumps({"prompt": f"{i}+{count}="}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sources = f"{{many: {tmp_path}/many.jsonl, few: {tmp_path}/few.jsonl}}"
    options = ["--data.validation", sources, "--data.validation_batch_size", "3"]
    folder = fit("run", *options, "--samples.held_out", "5", steps=1)
    for name in ("step_000000", "step_000001", "teacher"):
        found = [(record["data_set"], record["row"]) for record in read(folder, name)]
        assert found == [("many", 0), ("many", 1), ("many", 2), ("few", 6), ("few", 7)]


def test_training_is_bit_for_bit_the_same_with_and_without(fit):
    """Weights, optimizer, random state and metrics; every validation writes, or none does."""
    often = ["--trainer.val_check_interval", "1"]
    runs = [fit("with", *often, steps=3), fit("without", *often, *NONE, steps=3)]
    assert len(names(runs[0])) == 5
    assert not (runs[1] / "validation").exists()
    checkpoints = [load(folder) for folder in runs]
    for part in ("state_dict", "optimizer_states", "random_state"):
        assert_same(*(checkpoint[part] for checkpoint in checkpoints))
    kept = ("opd/", "rollout/", "optim/", "val/", "step")
    metrics = [
        [{n: v for n, v in row.items() if n.startswith(kept)} for row in read_metrics(path)]
        for path in (folder / "metrics.csv" for folder in runs)
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_two_processes_write_the_prompts_that_one_writes(fit, tmp_path, name):
    """Batches of 4 and 5 prompts wanted; a teacher that is sharded does not speak."""
    options = ["--samples.held_out", "5", "--data.validation_batch_size", "4"]
    one, two = (
        fit("one", *options, steps=1),
        launch(2, tmp_path / "two", *options, *STRATEGIES[name], steps=1),
    )
    files = ["step_000000", "step_000001"] + ["teacher"] * (name == "ddp")
    assert names(two) == [f"{file}.jsonl" for file in files]
    for file in files:
        ours, expected = read(two, file), read(one, file)
        assert [record["row"] for record in ours] == list(range(5))
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine["completion"] == theirs["completion"]
            assert mine["correct"] == theirs["correct"]
            assert mine["reverse_kl"] == pytest.approx(theirs["reverse_kl"], abs=1e-3)


def test_a_teacher_that_finds_no_memory_is_left_out(fit, monkeypatch, caplog):
    sample = TransformersEngine.__call__

    def fails_for_teachers(engine, prompts, sampler, seeds):
        if sampler.max_new_tokens == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(engine, prompts, sampler, seeds)

    monkeypatch.setattr(samples, "TEACHER_TOKENS", 5)
    monkeypatch.setattr(TransformersEngine, "__call__", fails_for_teachers)
    folder = fit("run", steps=1)
    assert names(folder) == ["step_000000.jsonl", "step_000001.jsonl"]
    assert "no memory to sample completions of teacher default" in caplog.text


# --- texts of tokens ---


def spaced_tokenizer():
    """Words that begin with a space, which decoding a word by itself drops; and bytes."""
    words = ["<unk>", "▁add", "▁7", "8", *(f"<0x{byte:02X}>" for byte in "é".encode())]
    model = tokenizer_models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_texts_of_tokens_are_together_the_completion():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(["<s>"]))
    for text in [TEXTS[0], "naïve 😀 12", "😀😀", " a\n\n\tb "]:
        ids = tokenizer(text)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == text
    smile = tokenizer("1😀2")["input_ids"]
    assert token_texts(tokenizer, smile) == ["1", "", "", "", "😀", "2"]
    assert token_texts(tokenizer, smile[:3]) == ["1", "", "�"]
    lone = [smile[1]] * 9 + smile[-1:]  # bytes that begin a character again and again
    texts = token_texts(tokenizer, lone)
    assert len(texts) == 10
    assert "".join(texts) == tokenizer.decode(lone)
    assert texts[3]
    assert token_texts(tokenizer, []) == []


def test_texts_of_tokens_keep_the_spaces_between_words():
    assert token_texts(spaced_tokenizer(), [1, 2, 3, 1]) == ["add", " 7", "8", " add"]
    assert token_texts(spaced_tokenizer(), [4, 5, 2]) == ["", "é", " 7"]
