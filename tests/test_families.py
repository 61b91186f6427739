"""Llama and GPT-2 go through fit, evaluate and export; all commands see the same token ids."""

import json

import pytest
import torch
import yaml
from conftest import QUICKSTART, load
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import harness
from opd.cli import main
from opd.models import load_model, load_tokenizer
from opd.prompts import PromptFormat, tokenize_rows

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
    monkeypatch.setattr(harness, "TASKS", folder)
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
    harness.evaluate_model(model, tokenizer, ["sums"])
    assert sorted(seen) == sorted(training)
