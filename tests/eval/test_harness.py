"""lm-eval scores: recounted from the completions that were judged."""

import json

import pytest
import torch
from transformers import GenerationConfig

from eval.benchmarks.tasks import process_results
from eval.harness import Settings, evaluate_model, load_tasks, own_tasks
from eval.runs import metrics_of
from eval.tables import results_table
from opd.cli import main
from opd.embedded.arithmetic import rows
from opd.metrics_rows import read_metrics
from opd.models import generating_with, load_model, load_tokenizer, plain_sampling
from opd.rollouts import TransformersEngine
from opd.weights import Weights

ASKED = rows("test")[0]["prompt"]


def asked() -> list:
    return list(own_tasks().load(["arithmetic"])["tasks"]["arithmetic"].eval_docs)


@pytest.mark.parametrize(
    ("completions", "share"),
    [
        (["1c0=0578", "=0579", "2=579", "=0579c"], 2 / 4),  # the first is wrong
        (["=0579", "=0578", "0579"], 1 / 3),  # only the first is right
        (["=57", "=5790", ""], 0.0),
        (["=0579"], 1.0),
    ],
)
def test_avg_at_k_is_the_share_of_right_completions(completions, share):
    (doc,) = [doc for doc in asked() if doc["prompt"] == ASKED]
    metrics = process_results(doc | {"reference": "0579"}, [completions])
    assert metrics[f"avg@{len(completions)}"] == pytest.approx(share)


def test_the_task_asks_the_test_problems():
    docs = asked()
    assert [doc["prompt"] for doc in docs] == [row["prompt"] for row in rows("test")]
    assert len(docs) == 512
    for doc in docs:
        left, right = map(int, doc["prompt"].removesuffix("=").split("+"))
        assert doc["reference"] == f"{left + right:04d}"


def test_one_sample_is_one_sample_whatever_the_task_says():
    for samples in (1, 3):
        (task,) = load_tasks(["arithmetic"], Settings(samples=samples)).values()
        assert task.config.repeats == samples


def test_metrics_of_keeps_scores_and_drops_the_rest():
    results = {
        "one": {"alias": "one", "accuracy,samples": 0.25, "accuracy_stderr,samples": 0.1},
        "two": {"exact,none": 1, "f1,none": 0.5, "f1_stderr,none": "N/A", "sample_len": 7},
    }
    expected = {"one/accuracy": 0.25, "two/exact": 1.0, "two/f1": 0.5}
    assert metrics_of(results) == expected


def test_the_table_has_a_row_per_task_with_its_error_and_interval():
    """By hand: 0, 1/2, 1/2, 1 have the mean 1/2 and the standard error 0.2041."""
    shares = {
        **{"avg@2": [0.0, 0.5, 0.5, 1.0], "length": [5, 6, 7, 8]},
        **{"pass@2": [0.0, 0.0, 0.0, 1.0], "pass@16": [0.0, 1.0, 1.0, 1.0], "pass@4": [0.0] * 4},
        **{"truncated": [0.0, 0.0, 0.5, 0.5], "no_answer": [0.5, 0.0, 0.0, 0.0]},
    }
    samples = [
        {"metrics": list(shares), **{name: values[i] for name, values in shares.items()}}
        for i in range(4)
    ]
    results = {
        "results": {"arithmetic": {}, "other": {"acc,none": 0.25, "acc_stderr,none": 0.1}},
        "samples": {"arithmetic": samples},
    }
    lines = results_table(results, {"model": "m", "seed": 3, "limit": 4}).splitlines()
    assert lines[0] == "# m"
    cells = [cell.strip() for cell in lines[4].split("|")]
    assert cells[2:5] == ["4", "2", "0.5000 ± 0.2041"]
    assert cells[6:9] == ["0.7500 ± 0.2500", "", "6"]  # no answers were compared: no maj
    assert cells[9:11] == ["25.0%", "12.5%"]
    assert "| other | acc (none) | 0.2500 | 0.1000 |" in lines
    assert "seed 3" in lines[-1]
    assert "limit 4" in lines[-1]


def right(completion: str, answer: str) -> bool:
    said = completion.rpartition("=")[2]
    return "=" in completion and said.isdigit() and int(said) == int(answer)


def evaluate(folder, model: str, *options: str) -> dict:
    tasks = ["--tasks", "arithmetic", "--output", str(folder)]
    assert main(["evaluate", "--model", model, *tasks, *options]) == 0
    return json.loads((folder / "results.json").read_text())


def test_evaluate_is_a_mean_over_problems_and_completions(tmp_path):
    options = ["--samples", "3", "--limit", "12", "--batch_size", "7", "--seed", "5"]
    results = evaluate(tmp_path / "scores", "embedded:base", *options)
    text = (tmp_path / "scores" / "samples_arithmetic.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    shares, firsts = [], []
    for record, doc in zip(records, asked(), strict=False):
        assert record["doc"] == doc
        (completions,) = record["resps"]
        verdicts = [right(completion, doc["reference"]) for completion in completions]
        assert len(verdicts) == 3
        shares.append(sum(verdicts) / 3)
        firsts.append(verdicts[0])
    assert len(shares) == 12
    accuracy = sum(shares) / 12
    assert 0 < accuracy != pytest.approx(sum(firsts) / 12)
    assert results["results"]["arithmetic"]["avg@3,none"] == pytest.approx(accuracy)
    assert results["n-samples"]["arithmetic"]["effective"] == 12
    config = results["config"]
    assert (config["samples"], config["limit"], config["seed"]) == (3, 12, 5)
    assert config["seconds"] > 0


GREEDY_TRAPS = {
    "suppress_tokens": [6, 7, 8, 9, 10, 11],
    "repetition_penalty": 5.0,
    "temperature": 0.01,
    "top_k": 1,
    "num_beams": 3,
    "max_new_tokens": 2,
    "min_new_tokens": 20,
    "do_sample": True,
    "forced_eos_token_id": 3,
    "no_repeat_ngram_size": 1,
}


def answers_of(model, tokenizer) -> list:
    engine = TransformersEngine()
    engine.start(model, Weights(model), tokenizer)
    settings = Settings(limit=16)
    tasks = load_tasks(["arithmetic"], settings)
    results = evaluate_model(model, tokenizer, tasks, engine, settings)
    return [record["resps"] for record in results["samples"]["arithmetic"]]


def test_a_generation_config_changes_no_answer():
    """How to sample, the task says: from the whole distribution, at its own temperature."""
    model, tokenizer = load_model("embedded:base"), load_tokenizer("embedded:base")
    expected = answers_of(model, tokenizer)
    own = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **GREEDY_TRAPS)
    model.generation_config = own
    assert answers_of(model, tokenizer) == expected
    assert model.generation_config is own


def test_a_task_samples_from_all_tokens_unless_it_says_otherwise(tiny):
    """As rollouts do; of itself, transformers would keep the 50 likeliest."""
    model = load_model(str(tiny / "llama-student"))  # of 299 tokens, all about equally likely
    with generating_with(model, plain_sampling([])), torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0}
        said = model.generate(torch.ones(3000, 1, dtype=torch.long), **options)[:, 1]
    assert len(said.unique()) > 250


def test_every_end_of_the_model_ends_an_answer():
    """Those of its generation config, which a student's checkpoint has, besides the tokenizer's."""
    model, tokenizer = load_model("embedded:base"), load_tokenizer("embedded:base")
    equals = tokenizer.convert_tokens_to_ids("=")
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, equals]
    for ((answer,),) in [tuple(map(tuple, answer)) for answer in answers_of(model, tokenizer)]:
        assert "=" not in answer[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:7"], "--device cuda:7: cannot be used on this machine"),
        (["--device", "toaster"], "--device toaster: cannot be used on this machine"),
        (["--device", "meta"], "--device meta: cannot be used on this machine"),
        (["--seed", "99999999999999999999999"], "must be between 0 and 2**63 - 1"),
        (["--seed", "-1"], "--seed -1 must be between 0 and"),
        (["--tasks", " , "], "--tasks names no task"),
    ],
)
def test_what_cannot_be_used_is_named_before_a_model_is_loaded(capsys, options, message):
    arguments = ["--model", "no/such", "--tasks", "arithmetic", *options]
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tasks_may_have_spaces_between_them(tmp_path):
    results = evaluate(
        tmp_path, "embedded:base", "--tasks", "arithmetic, arithmetic ,", "--limit=4"
    )
    assert results["n-samples"]["arithmetic"]["effective"] == 4


def test_benchmarks_of_a_run_are_those_of_its_checkpoints(fit, tmp_path):
    """At steps 2 and 3, the last one, and at no other."""
    callback = ["--trainer.callbacks+=callbacks.Benchmarks", "--trainer.callbacks.every_n_steps=2"]
    callback += ["--trainer.callbacks.tasks=[arithmetic]", "--trainer.callbacks.limit=24"]
    save = ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1"]
    save += ["--trainer.limit_val_batches=0", "--model.optimizer.lr=0.001"]
    run = fit("run", *callback, *save, steps=3)
    name = "bench/arithmetic/avg@1"
    logged = [(r["step"], float(r[name])) for r in read_metrics(run / "metrics.csv") if name in r]
    assert [step for step, _ in logged] == ["2", "3"]
    for step, value in logged:
        checkpoint = str(run / "checkpoints" / f"step={int(step):06d}.ckpt")
        scores = evaluate(tmp_path / step, checkpoint, "--limit", "24")
        assert scores["results"]["arithmetic"]["avg@1,none"] == pytest.approx(value)
    assert logged[0][1] != logged[1][1]
