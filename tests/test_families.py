"""Llama and GPT-2 go through fit, evaluate and export; all commands see the same token ids."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import QUICKSTART, load
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import harness
from eval.benchmarks import table
from opd.cli import main
from opd.models import eos_token_ids, load_model, load_tokenizer
from opd.prompts import PromptFormat, tokenize_rows
from opd.rollouts import TransformersEngine

SHARED = ["--data.batch_size", "6", "--samples.every_n_steps", "1"]
QUESTIONS = [{"prompt": f"add {i} and 8", "answer": str(i + 8)} for i in range(12)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def tasks(tmp_path, prompts, monkeypatch):
    """Make a folder with an lm-eval task on the same questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(prompts)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": [],
            "max_gen_toks": 8,
            "do_sample": True,
            "temperature": 1.0,
        },
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(table, "TASKS", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fit_export_evaluate(tiny, tmp_path, prompts, tasks, family):
    student, teacher = (str(tiny / f"{family}-{role}") for role in ("student", "teacher"))
    run, exported = tmp_path / "run", tmp_path / "exported"
    models = ["--model.student", student, "--model.teacher", teacher, "--model.max_new_tokens", "8"]
    data = [
        "--data.train",
        str(prompts),
        "--data.validation",
        str(prompts),
        "--data.batch_size",
        "6",
    ]
    search = [
        "--trainer.callbacks+=callbacks.EffOPD",
        "--trainer.callbacks.score",
        "opd.scores.TeacherKL",
    ]
    options = ["--output", str(run), "--trainer.max_steps", "3", *models, *data, *search]
    assert (
        main(["fit", "--config", QUICKSTART, "--model.verifier.format", "last_number", *options])
        == 0
    )

    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert main(["export", "--checkpoint", checkpoint, "--output", str(exported)]) == 0
    state = load(run)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(exported)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"student.{name}"])
    before = AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    text = "add 3 and 8"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (exported, student))
    assert ours(text) == theirs(text)
    assert ours.chat_template == theirs.chat_template
    assert "pipeline_tag: text-generation" in (exported / "README.md").read_text()

    results = []
    for source in (checkpoint, str(exported)):
        output = tmp_path / f"evaluated_{len(results)}"
        assert (
            main(["evaluate", "--model", source, "--tasks", "sums", "--output", str(output)]) == 0
        )
        record = json.loads((output / "results.json").read_text())
        results.append((record["results"], (output / "samples_sums.jsonl").read_text()))
    assert results[0] == results[1]


def test_a_generation_config_does_not_change_what_lm_evals_own_tasks_hear(tiny, tmp_path, tasks):
    own = tiny / "gpt2-student"
    trapped = shutil.copytree(own, tmp_path / "trapped")
    traps = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "temperature": 0.01}
    path = trapped / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **traps}))
    said = []
    for source in (own, trapped):
        output = tmp_path / f"out of {source.name}"
        command = ["evaluate", "--model", str(source), "--tasks", "sums", "--output", str(output)]
        assert main(command) == 0
        lines = (output / "samples_sums.jsonl").read_text().splitlines()
        said.append([json.loads(line)["resps"] for line in lines])
    assert said[0] == said[1]


def padded(tiny, folder, entries):
    """Save the student with padding in its vocabulary that it says more often than not."""
    model = load_model(str(tiny / "llama-student"))
    tokens = model.config.vocab_size
    model.resize_token_embeddings(tokens + entries, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokens:] *= 30
    model.save_pretrained(folder)
    load_tokenizer(str(tiny / "llama-student")).save_pretrained(folder)
    return str(folder)


def test_a_base_student_learns_its_instruct_teachers_end_and_keeps_it(tiny, tmp_path, prompts):
    """And never says what the teacher has no word for: its vocabulary is the smaller one."""
    student = padded(tiny, tmp_path / "student", 64)
    teacher = shutil.copytree(tiny / "llama-teacher", tmp_path / "teacher")
    config = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, 9]}))
    models = ["--model.student", student, "--model.teacher", str(teacher)]
    models += ["--model.max_new_tokens", "8"]
    data = ["--data.train", str(prompts), "--data.validation", str(prompts)]
    search = ["--trainer.callbacks+=callbacks.EffOPD"]
    search += ["--model.verifier.format", "last_number", *SHARED]
    options = ["--output", str(tmp_path / "run"), "--trainer.max_steps", "1", *models, *data]
    assert main(["fit", "--config", QUICKSTART, *options, *search]) == 0
    checkpoint, exported = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "exported"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(exported)]) == 0
    for source in (str(checkpoint), str(exported)):
        model, tokenizer = load_model(source), load_tokenizer(source)
        assert eos_token_ids(model, tokenizer) == (1, 9)
        assert model.config.vocab_size == len(tokenizer) + 64
    written = (tmp_path / "run" / "samples" / "step_000001.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in written]
    assert max(max(sample["completion_ids"]) for sample in said) < len(tokenizer)
    for sample in said:
        ended = sample["completion_ids"][-1] in (1, 9)
        assert sample["finish_reason"] == ("stop" if ended else "length")


@pytest.mark.parametrize("source", ["embedded:base", "llama-student", "gpt2-student"])
def test_training_predict_and_lm_eval_see_the_same_token_ids(
    tiny, tasks, tmp_path, prompts, monkeypatch, source
):
    folder = source if source.startswith("embedded:") else str(tiny / source)
    rows = (
        [dict(row, prompt="12+30=") for row in QUESTIONS]
        if source == "embedded:base"
        else QUESTIONS
    )
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    training = [list(p.token_ids) for p in tokenize_rows(rows, tokenizer, PromptFormat())]

    output = ["--output", str(tmp_path / "p"), "--data.validation", str(prompts)]
    models = ["--model.student", folder, "--model.teacher", folder, "--model.max_new_tokens", "2"]
    assert main(["predict", "--config", QUICKSTART, *output, *models]) == 0
    lines = (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt_ids"] for line in lines] == training

    seen = []
    generate = HFLM._model_generate

    def spy(self, context, max_length, stop, **kwargs):
        mask = kwargs["attention_mask"].bool()
        seen.extend(row[m].tolist() for row, m in zip(context, mask, strict=True))
        return generate(self, context, max_length, stop, **kwargs)

    monkeypatch.setattr(HFLM, "_model_generate", spy)
    settings = harness.Settings()
    loaded = harness.load_tasks(["sums"], settings)
    harness.evaluate_model(model, tokenizer, loaded, TransformersEngine(), settings)
    assert sorted(seen) == sorted(training)
