"""Every number that a run writes, against plain loops over its own samples and checkpoints.

One row at a time, unpadded, in double precision, with the formulas written out: nothing of opd is
used for the maths. Two runs, neither of them symmetric in anything:

- adders: the embedded pair at temperature 0.7, ReverseKL; searches judged by greedy answers
- babblers: random Llamas with two teachers at temperature 1.7, top-k 12, a JSD; by the teachers' KL
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, load
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opd.cli import main
from opd.metrics_rows import read_metrics

EMBEDDED = ROOT / "opd" / "embedded"
SUMS = [
    *[("123+456=", "579"), ("800+350=", "1150"), ("12+34=", "46"), ("211+377=", "0588")],
    *[("645+187=", "832"), ("7+456=", None), ("305+420=", "725"), ("456+7=", None)],
]
TALK = ["add 7", "what is 12 plus 30?", "9", "question: 9+9", "the answer", "is 42 plus 3"]
COEFFICIENTS = [1, 4, 64]
PROXIMAL = 0.25  # times how far a candidate has moved
ENDS = list(range(1, 300, 7))  # tokens that end a completion of the babblers


@dataclasses.dataclass
class Run:
    """A run, what it wrote, and what it needs to be done over by hand."""

    folder: Path
    student: Path
    teachers: dict[str | None, PreTrainedModel] = dataclasses.field(default_factory=dict)
    temperature: float = 1.7
    beta: float | None = None  # of the JSD; None: reverse KL
    rate: float = 0.1
    max_norm: float = 1.0
    ends: Sequence[int] = (1,)
    coefficients: Sequence[float] = ()
    anchor: str = "raw"
    steps: int = 3
    answers: dict[int, str | None] = dataclasses.field(default_factory=dict)

    def metrics(self) -> dict[int, dict[str, float]]:
        """All values of metrics.csv, by step."""
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for row in read_metrics(self.folder / "metrics.csv"):
            rows[int(row["step"])] |= {name: float(v) for name, v in row.items() if name != "step"}
        return rows

    def samples(self, step: int) -> list[dict]:
        lines = (self.folder / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        """The student's weights at the end of a step."""
        if step == 0:
            return dict(load_model(self.student).state_dict())
        state = load(self.folder, f"step={step:06d}.ckpt")["state_dict"]
        prefix = "student."
        return {
            n.removeprefix(prefix): w.double() for n, w in state.items() if n.startswith(prefix)
        }

    def model(self, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
        model = load_model(self.student)
        model.load_state_dict(weights, strict=False)  # a head that is tied is not among them
        return model


def load_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def write_prompts(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opd(command: str, folder: Path, config: dict) -> Path:
    """Run a command with a configuration; returns the output folder."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main([command, "--config", str(path), "--output", str(folder)]) == 0
    return folder


def config_of(
    student: str, teacher: str | dict, prompts: str, batch_size: int, rate: float = 0.1, **model
) -> dict:
    """A run of three steps of SGD with halving rate, every step saved and sampled."""
    return {
        "seed_everything": 3,
        "model": {
            "student": student,
            "teacher": teacher,
            "verifier": {"format": r"=(\d+)$"},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": rate}},
            "scheduler": {
                "class_path": "torch.optim.lr_scheduler.StepLR",
                "init_args": {"step_size": 1, "gamma": 0.5},
            },
            **model,
        },
        "data": {"train": prompts, "batch_size": batch_size},
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "checkpoint": {"every_n_train_steps": 1, "save_top_k": -1},
        "samples": {"every_n_steps": 1, "rollouts": 1000},
    }


def effopd(score: str, score_options: dict, **options) -> dict:
    chosen = {"class_path": f"opd.scores.{score}", "init_args": score_options}
    return {"class_path": "callbacks.EffOPD", "init_args": {**options, "score": chosen}}


@pytest.fixture(scope="module")
def adders(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("adders")
    rows = [{"prompt": p} | ({"answer": a} if a else {}) for p, a in SUMS]
    config = config_of(
        "embedded:base",
        "embedded:teacher",
        write_prompts(folder / "sums.jsonl", rows),
        batch_size=8,
        max_new_tokens=24,
        temperature=0.7,
        rollouts_per_prompt=2,
        micro_batch_tokens=70,
        max_grad_norm=0.3,
        update_norm=True,
    )
    greedy = {"num_examples": 50, "samples": 2, "temperature": 0}
    search = effopd("AnswerAccuracy", greedy, schedule=[1, 3], coefficients=[2, 4, 6])
    config["trainer"]["callbacks+"] = [search]
    return Run(
        opd("fit", folder / "run", config),
        EMBEDDED / "base",
        {None: load_model(EMBEDDED / "teacher")},
        temperature=0.7,
        max_norm=0.3,
        coefficients=[2, 4, 6],
        answers=dict(enumerate(a for _, a in SUMS)),
    )


def louden(source: Path, target: Path, factor: float) -> Path:
    """Copy a random model with larger embeddings, so that its distributions are far from flat."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def loud(tiny, tmp_path_factory) -> dict[str, Path]:
    """Three random Llamas that disagree."""
    folder = tmp_path_factory.mktemp("loud")
    sources = {"student": ("student", 15.0), "one": ("teacher", 20.0), "two": ("teacher", 8.0)}
    return {
        name: louden(tiny / f"llama-{source}", folder / name, factor)
        for name, (source, factor) in sources.items()
    }


def babble(loud, folder: Path, search: dict | None = None, **changes) -> dict:
    """The configuration of the babblers; their prompts name two teachers."""
    rows = [{"prompt": text, "teacher": "two" if i % 3 else "one"} for i, text in enumerate(TALK)]
    config = config_of(
        str(loud["student"]),
        {"one": str(loud["one"]), "two": str(loud["two"])},
        write_prompts(folder / "talk.jsonl", rows),
        batch_size=4,
        max_new_tokens=9,
        temperature=1.7,
        top_k=12,
        rollouts_per_prompt=2,
        micro_batch_tokens=60,
        rate=20.0,
        max_grad_norm=0.02,
        update_norm=True,
        eos_token_ids=ENDS,
        objective={"class_path": "opd.objectives.GeneralizedJSD", "init_args": {"beta": 0.25}},
    )
    config["data"]["format"] = {"chat_template": False}
    config["model"] |= changes
    if search:
        config["trainer"]["callbacks+"] = [search]
    return config


def babblers_in(folder: Path, loud) -> Run:
    return Run(
        folder,
        loud["student"],
        {name: load_model(loud[name]) for name in ("one", "two")},
        beta=0.25,
        rate=20.0,
        max_norm=0.02,
        ends=ENDS,
        coefficients=COEFFICIENTS,
        anchor="accepted",
    )


@pytest.fixture(scope="module")
def babblers(loud, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("babblers")
    options = {"schedule": [1, 3], "coefficients": COEFFICIENTS, "accept": "better"}
    options |= {"anchor": "accepted", "proximal": PROXIMAL}
    search = effopd("TeacherKL", {"rollouts": "step"}, **options)
    return babblers_in(opd("fit", folder / "run", babble(loud, folder, search)), loud)


# --- the same by hand -----------------------------------------------------------------------------


def logprobs(model: PreTrainedModel, record: dict, temperature: float) -> torch.Tensor:
    """Log-probabilities at each completion token of one row, [n, V]."""
    start = len(record["prompt_ids"])
    ids = torch.tensor([record["prompt_ids"] + record["completion_ids"]])
    return (model(ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)


def kl_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum(a[:, v].exp() * (a[:, v] - b[:, v]) for v in range(a.shape[1]))


def loss_of(log_p: torch.Tensor, log_q: torch.Tensor, beta: float | None) -> torch.Tensor:
    """The reverse KL; or beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    if beta is None:
        return kl_of(log_p, log_q)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl_of(log_q, log_m) + (1 - beta) * kl_of(log_p, log_m)


def token_numbers(log_p: list[float], log_q: list[float], y: int, log_mu_y: float) -> dict:
    """What opd/* and the gap of the engine mean for one token."""
    vocabulary = range(len(log_p))
    top_p = sorted(vocabulary, key=lambda v: -log_p[v])[:16]
    shared = set(top_p) & set(sorted(vocabulary, key=lambda v: -log_q[v])[:16])
    mass_p = sum(math.exp(log_p[v]) for v in shared)
    mass_q = sum(math.exp(log_q[v]) for v in shared)
    entropy_p = -sum(math.exp(x) * x for x in log_p)
    entropy_q = -sum(math.exp(x) * x for x in log_q)
    return {
        "opd/reverse_kl": sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)),
        "opd/forward_kl": sum(math.exp(q) * (q - p) for p, q in zip(log_p, log_q, strict=True)),
        "opd/kl_above_5": float(
            sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)) > 5
        ),
        "opd/student_entropy": entropy_p,
        "opd/teacher_entropy": entropy_q,
        "opd/entropy_gap": abs(entropy_q - entropy_p),
        "opd/overlap_at_16": len(shared) / 16,
        "opd/overlap_advantage": sum(
            math.exp(log_p[v])
            / mass_p
            * (log_q[v] - math.log(mass_q) - log_p[v] + math.log(mass_p))
            for v in shared
        ),
        "opd/teacher_logprob": log_q[y],
        "rollout/engine_logprob_gap": abs(log_p[y] - log_mu_y),
    }


@dataclasses.dataclass
class Step:
    """One step done by hand."""

    metrics: dict[str, float]
    gradient: dict[str, torch.Tensor]
    token_kl: list[list[float]]  # of each sample


def step_by_hand(run: Run, step: int) -> Step:
    student, samples = run.model(run.weights(step - 1)), run.samples(step)
    total, count, rows, token_kl = torch.zeros(()), 0, [], []
    for record in samples:
        log_p = logprobs(student, record, run.temperature)
        with torch.no_grad():
            log_q = logprobs(run.teachers[record["teacher"]], record, run.temperature)
        total = total + loss_of(log_p, log_q, run.beta).sum()
        count += len(record["completion_ids"])
        tokens = zip(log_p.tolist(), log_q.tolist(), record["completion_ids"], strict=True)
        numbers = [
            token_numbers(*token, log_mu_y)
            for token, log_mu_y in zip(tokens, record["engine_logprob"], strict=True)
        ]
        rows += numbers
        token_kl.append([n["opd/reverse_kl"] for n in numbers])
    (total / count).backward()
    gradient = {n: p.grad for n, p in student.named_parameters()}
    lengths = [len(record["completion_ids"]) for record in samples]
    metrics = {name: sum(row[name] for row in rows) / count for name in rows[0]}
    metrics |= {
        "opd/loss": (total / count).item(),
        "rollout/tokens": sum(lengths),
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated_fraction": sum(
            record["completion_ids"][-1] not in run.ends for record in samples
        )
        / len(samples),
        "optim/grad_norm": norm_of(gradient),
        "optim/lr": run.rate * 0.5 ** (step - 1),
    }
    return Step(metrics, gradient, token_kl)


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors.values()))


def sgd_by_hand(run: Run, step: int, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W - rate x clipped gradient."""
    scale = run.rate * 0.5 ** (step - 1) * min(1.0, run.max_norm / norm_of(gradient))
    return {n: run.weights(step - 1)[n] - scale * g for n, g in gradient.items()}


def assert_weights(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=3e-6)


def close(value: float):
    return pytest.approx(value, rel=2e-4, abs=2e-6)


@pytest.fixture(scope="module", params=["adders", "babblers"])
def run(request) -> Run:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def by_hand(run) -> dict[int, Step]:
    return {step: step_by_hand(run, step) for step in range(1, run.steps + 1)}


# --- a step ---------------------------------------------------------------------------------------


def test_the_runs_are_uneven(run, by_hand):
    for step in by_hand:
        samples = run.samples(step)
        for part in ("prompt_ids", "completion_ids"):
            assert len({len(record[part]) for record in samples}) > 1
    assert by_hand[2].metrics["optim/grad_norm"] > 2 * run.max_norm  # it is clipped


def test_metrics_of_tokens_and_rollouts(run, by_hand):
    logged = run.metrics()
    for step, expected in by_hand.items():
        for name, value in expected.metrics.items():
            assert logged[step][name] == close(value), (step, name)


def test_samples_hold_the_kl_of_every_token(run, by_hand):
    for step, expected in by_hand.items():
        for record, token_kl in zip(run.samples(step), expected.token_kl, strict=True):
            assert record["reverse_kl"] == pytest.approx(token_kl, rel=2e-4, abs=2e-6)


def test_samples_are_what_the_student_was_asked_and_said(run):
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    for record in run.samples(2):
        assert record["prompt"] == tokenizer.decode(record["prompt_ids"])
        assert record["completion"] == tokenizer.decode(record["completion_ids"])
        ended = record["completion_ids"][-1] in run.ends
        assert record["finish_reason"] == ("stop" if ended else "length")
        assert not set(record["completion_ids"][:-1]) & set(run.ends)


def test_accuracy_is_the_share_of_right_answers_among_those_asked_for(adders):
    logged, found = adders.metrics(), []
    for step in (1, 2, 3):
        right = []
        for record in adders.samples(step):
            answer = adders.answers[record["row"]]
            assert record["answer"] == answer
            if answer is not None:
                said = record["completion"].removesuffix("<eos>").rpartition("=")[2]
                right.append(said.isdigit() and int(said) == int(answer))
        assert len(right) == 12
        assert logged[step]["rollout/accuracy"] == close(sum(right) / 12)
        found.append(sum(right) / 12)
    assert any(0 < share != 0.5 for share in found)


def test_engine_logprob_is_that_of_the_truncated_distribution(babblers):
    student = babblers.model(babblers.weights(0))
    for record in babblers.samples(1):
        log_p = logprobs(student, record, babblers.temperature).tolist()
        for row, y, ours in zip(
            log_p, record["completion_ids"], record["engine_logprob"], strict=True
        ):
            mass = sum(math.exp(x) for x in sorted(row)[-12:])
            assert ours == pytest.approx(row[y] - math.log(mass), abs=1e-4)


def test_each_prompt_has_its_completions_and_they_differ(run):
    for step in (1, 2, 3):
        by_row = defaultdict(list)
        for record in run.samples(step):
            by_row[record["row"]].append(tuple(record["completion_ids"]))
        assert all(len(completions) == 2 for completions in by_row.values())
        assert any(one != other for one, other in by_row.values())
    assert len(by_row) == (8 if len(run.teachers) == 1 else 4)


def test_weights_move_by_the_rate_times_the_clipped_gradient(run, by_hand):
    """After step 2 there is no search."""
    expected = sgd_by_hand(run, 2, by_hand[2].gradient)
    assert_weights(run.weights(2), expected)
    moved = norm_of({n: w - run.weights(1)[n] for n, w in expected.items()})
    assert moved == pytest.approx(run.rate / 2 * run.max_norm)
    logged = run.metrics()
    for step in (1, 2, 3):
        clipped = min(run.max_norm, by_hand[step].metrics["optim/grad_norm"])
        length = run.rate * 0.5 ** (step - 1) * clipped
        assert logged[step]["optim/update_norm"] == pytest.approx(length, rel=1e-3)


# --- a search -------------------------------------------------------------------------------------


# Score, how far the weights have moved from those that sampled, tokens read, tokens generated
Judged = tuple[float, float, int, int]


def greedy_score(run: Run, weights: dict[str, torch.Tensor], step: int) -> Judged:
    """Share of right greedy answers, and its tokens (two samples each)."""
    model, tokenizer = run.model(weights), AutoTokenizer.from_pretrained(run.student)
    right, tokens = [], 0
    for prompt, answer in SUMS:
        if answer is None:
            continue
        ids, text, cache = tokenizer(prompt)["input_ids"], [], None
        while len(text) < 24 and not set(text) & set(run.ends):
            with torch.no_grad():
                output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            ids, cache = [output.logits[0, -1].argmax().item()], output.past_key_values
            text += ids
        said = tokenizer.decode(text, skip_special_tokens=True).rpartition("=")[2]
        right.append(said.isdigit() and int(said) == int(answer))
        tokens += 2 * len(text)
    return sum(right) / len(right), 0.0, tokens, tokens


def kl_score(run: Run, weights: dict[str, torch.Tensor], step: int) -> Judged:
    """Minus the mean reverse KL on the step's own rollouts; none are generated."""
    model, total, far, tokens = run.model(weights), 0.0, 0.0, 0
    for record in run.samples(step):
        with torch.no_grad():
            log_p = logprobs(model, record, run.temperature)
            log_q = logprobs(run.teachers[record["teacher"]], record, run.temperature)
        total += kl_of(log_p, log_q).sum().item()
        drawn = zip(log_p, record["completion_ids"], record["engine_logprob"], strict=True)
        ratios = [math.exp(row[y].item() - log_mu_y) for row, y, log_mu_y in drawn]
        far += sum(r - 1 - math.log(r) for r in ratios)
        tokens += len(record["completion_ids"])
    return -total / tokens, far / tokens, tokens, 0


def test_searches_by_hand(run, by_hand):
    """Scores, candidates, decision, direction, tokens, and the weights that are kept."""
    score = greedy_score if None in run.teachers else kl_score
    logged, generated_in_all, tokens_in_all, refusals = run.metrics(), 0, 0, 0
    anchor = run.weights(0)
    for step, entry in zip((1, 3), run.summary()["extrapolation"], strict=True):
        w = sgd_by_hand(run, step, by_hand[step].gradient)
        best, best_far, tokens, generated = score(run, w, step)
        before, kept, tried = best, 0.0, []
        for c in run.coefficients:
            candidate = {n: w[n] + c * (w[n] - anchor[n]) for n in w}
            value, far, more_tokens, more_generated = score(run, candidate, step)
            tokens, generated = tokens + more_tokens, generated + more_generated
            gain = value - best - PROXIMAL * (far - best_far)
            accepted = gain >= 0 if run.anchor == "raw" else gain > 0
            tried.append((c, value, accepted))
            if not accepted:
                refusals += 1
                break
            best, best_far, kept = value, far, c
        row = logged[step]
        assert row["effopd/direction_norm"] == close(norm_of({n: w[n] - anchor[n] for n in w}))
        assert row["effopd/score_before"] == close(before)
        assert row["effopd/score_after"] == close(best)
        assert row["effopd/coefficient"] == entry["coefficient"] == kept
        assert row["effopd/candidates"] == len(tried)
        assert row["effopd/tokens"] == entry["tokens"] == tokens
        assert row["effopd/seconds"] == close(entry["seconds"])
        assert entry["step"] == step
        assert [c["coefficient"] for c in entry["candidates"]] == [c for c, _, _ in tried]
        assert [c["accepted"] for c in entry["candidates"]] == [a for _, _, a in tried]
        values = [value for _, value, _ in tried]
        assert [c["score"] for c in entry["candidates"]] == pytest.approx(values, rel=2e-4)
        kept_weights = {n: w[n] + kept * (w[n] - anchor[n]) for n in w}
        assert_weights(run.weights(step), kept_weights)
        anchor = w if run.anchor == "raw" else run.weights(step)
        generated_in_all, tokens_in_all = generated_in_all + generated, tokens_in_all + tokens
    assert refusals
    last = logged[run.steps]
    assert last["cost/search_tokens"] == tokens_in_all
    assert last["cost/search_generated_tokens"] == generated_in_all


def test_effopd_logs_only_when_it_searches(run):
    for step, row in run.metrics().items():
        assert ("effopd/coefficient" in row) == (step in (1, 3))


# --- cost, summary.json, TensorBoard --------------------------------------------------------------


def test_tokens_are_counted(run):
    logged, so_far = run.metrics(), 0
    for step in (1, 2, 3):
        so_far += sum(len(record["completion_ids"]) for record in run.samples(step))
        for kind in ("rollout", "teacher", "train"):
            assert logged[step][f"cost/{kind}_tokens"] == so_far


def test_seconds_add_up(run):
    logged, searches = run.metrics(), run.summary()["extrapolation"]
    for phase in ("rollout", "teacher", "train"):
        spent = [logged[step][f"cost/{phase}_seconds"] for step in (1, 2, 3)]
        assert 0 < spent[0] < spent[1] < spent[2] < 60
    searching = [logged[step]["cost/search_seconds"] for step in (1, 2, 3)]
    assert searching[0] == searching[1]
    assert 0 < searching[0] < searching[2] <= sum(search["seconds"] for search in searches)


def test_summary_says_what_metrics_csv_says(run):
    summary, last = run.summary(), run.metrics()[run.steps]
    assert summary["steps"] == 3
    assert summary["seed"] == 3
    costs = {name.removeprefix("cost/"): v for name, v in last.items() if name.startswith("cost/")}
    assert len(costs) == 11
    for name in costs.keys() - {"peak_memory_bytes"}:
        assert summary["cost"][name] == close(costs[name])
    assert 1e8 < costs["peak_memory_bytes"] < 1.01 * summary["cost"]["peak_memory_bytes"]


def test_tensorboard_holds_the_same_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder))
    events.Reload()
    logged, compared = run.metrics(), 0
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name) if "/" in name else []:
            assert event.value == close(logged[event.step][name]), (name, event.step)
            compared += 1
    assert compared == sum(len(row) for row in logged.values())


# --- validation and predict -----------------------------------------------------------------------


def test_validation_is_a_mean_over_all_tokens_and_answers(tmp_path):
    """Top-k 1 makes validation greedy: what the student says can be found by a plain loop."""
    rows = [{"prompt": p} | ({"answer": a} if a else {}) for p, a in SUMS]
    prompts = write_prompts(tmp_path / "sums.jsonl", rows)
    options = {"max_new_tokens": 24, "temperature": 1.7, "top_k": 1, "max_grad_norm": 0.3}
    config = config_of("embedded:base", "embedded:teacher", prompts, 8, **options)
    config["data"] |= {"validation": prompts, "validation_batch_size": 5}
    config["trainer"] |= {"max_steps": 1, "val_check_interval": 1}
    run = Run(
        opd("fit", tmp_path / "run", config),
        EMBEDDED / "base",
        {None: load_model(EMBEDDED / "teacher")},
    )
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    summary = run.summary()
    for step, moment in [(0, "initial"), (1, "final")]:
        model, total, lengths, right = run.model(run.weights(step)), 0.0, [], []
        for prompt, answer in SUMS:
            ids = tokenizer(prompt)["input_ids"]
            record = {"prompt_ids": ids, "completion_ids": []}
            with torch.no_grad():
                while len(record["completion_ids"]) < 24 and record["completion_ids"][-1:] != [1]:
                    everything = torch.tensor([ids + record["completion_ids"]])
                    record["completion_ids"].append(model(everything).logits[0, -1].argmax().item())
                log_p, log_q = (logprobs(m, record, 1.7) for m in (model, run.teachers[None]))
            total += kl_of(log_p, log_q).sum().item()
            lengths.append(len(record["completion_ids"]))
            said = tokenizer.decode(record["completion_ids"], skip_special_tokens=True)
            if answer is not None:
                right.append(said.rpartition("=")[2].zfill(4) == answer.zfill(4))
        row = run.metrics()[step]
        assert row["val/accuracy"] == close(sum(right) / 6)
        assert row["val/reverse_kl"] == close(total / sum(lengths))
        assert row["val/tokens"] == sum(lengths)
        assert row["val/length_mean"] == close(sum(lengths) / 8)
        assert summary["accuracy"][moment] == close(row["val/accuracy"])
        assert summary["reverse_kl"][moment] == close(row["val/reverse_kl"])
    assert summary["reverse_kl"]["initial"] != close(summary["reverse_kl"]["final"])
    costs = run.metrics()[1]
    for kind in ("rollout", "teacher", "train"):  # validation costs none of these
        assert costs[f"cost/{kind}_tokens"] == costs["rollout/tokens"]


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
def test_validate_and_test_print_what_a_fit_logs_of_the_same_student(
    command, prefix, tmp_path, capsys
):
    rows = [{"prompt": p} | ({"answer": a} if a else {}) for p, a in SUMS]
    prompts = write_prompts(tmp_path / "sums.jsonl", rows)
    config = config_of("embedded:base", "embedded:teacher", prompts, 8, max_new_tokens=24)
    config["data"]["validation"] = prompts
    config["trainer"]["max_steps"] = 1
    logged = Run(opd("fit", tmp_path / "run", config), EMBEDDED / "base").metrics()[0]
    capsys.readouterr()
    config = {key: config[key] for key in ("seed_everything", "model", "data", "trainer")}
    opd(command, tmp_path / command, config)
    printed = capsys.readouterr().out
    for name in ("accuracy", "reverse_kl", "length_mean"):
        value = re.search(rf"{prefix}/{name}\s+(\S+)", printed.replace("│", " "))[1]
        assert float(value) == close(logged[f"val/{name}"])


def test_predictions_hold_the_logprobs_of_student_and_teacher(babblers, loud, tmp_path):
    config = babble(loud, tmp_path)
    config["model"]["student"] = str(babblers.folder / "checkpoints" / "step=000002.ckpt")
    config["data"] |= {"validation": config["data"]["train"], "validation_batch_size": 4}
    config = {key: config[key] for key in ("seed_everything", "model", "data", "trainer")}
    folder = opd("predict", tmp_path / "predictions", config)
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["row"] for record in records] == list(range(len(TALK)))
    assert len({len(record["completion_ids"]) for record in records}) > 1
    student = babblers.model(babblers.weights(2))
    for record in records:
        with torch.no_grad():
            log_p = logprobs(student, record, 1.7)
            log_q = logprobs(babblers.teachers[record["teacher"]], record, 1.7)
        tokens = list(enumerate(record["completion_ids"]))
        for name, expected in [
            ("student_logprob", [log_p[i, y].item() for i, y in tokens]),
            ("teacher_logprob", [log_q[i, y].item() for i, y in tokens]),
            ("reverse_kl", kl_of(log_p, log_q).tolist()),
        ]:
            assert record[name] == pytest.approx(expected, rel=2e-4, abs=2e-5), name


# --- which rollouts a search looks at -------------------------------------------------------------


def one_step(loud, folder: Path, **score_options) -> tuple[Run, dict, dict]:
    """One step on twelve completions and a search; returns the run, its metrics and its search."""
    search = effopd("TeacherKL", score_options, schedule=1, coefficients=[1], accept="better")
    config = babble(loud, folder, search)
    config["trainer"]["max_steps"] = 1
    config["data"]["batch_size"] = 6
    run = babblers_in(opd("fit", folder / "run", config), loud)
    return run, run.metrics()[1], run.summary()["extrapolation"][0]


def test_part_judges_on_that_share_of_the_completions(loud, tmp_path):
    """3 of 12: one of all subsets of three has the tokens and the score of W."""
    run, metrics, search = one_step(loud, tmp_path, rollouts="part", fraction=0.25)
    w = run.model(sgd_by_hand(run, 1, step_by_hand(run, 1).gradient))
    totals, lengths = [], []
    for record in run.samples(1):
        with torch.no_grad():
            log_p = logprobs(w, record, run.temperature)
            log_q = logprobs(run.teachers[record["teacher"]], record, run.temperature)
        totals.append(kl_of(log_p, log_q).sum().item())
        lengths.append(len(record["completion_ids"]))
    assert len(lengths) == 12
    (chosen,) = [
        rows
        for rows in itertools.combinations(range(12), 3)
        if 2 * sum(lengths[i] for i in rows) == search["tokens"]  # W and one candidate
        and -sum(totals[i] for i in rows) / sum(lengths[i] for i in rows)
        == close(metrics["effopd/score_before"])
    ]
    assert len(chosen) == 3


def test_held_out_completions_are_scored_but_not_trained_on(loud, tmp_path):
    run, metrics, search = one_step(loud, tmp_path, rollouts="held_out", fraction=0.25)
    trained = sum(len(record["completion_ids"]) for record in run.samples(1))
    assert len(run.samples(1)) == 9  # of 12
    assert metrics["cost/train_tokens"] == trained
    assert metrics["cost/teacher_tokens"] == metrics["cost/rollout_tokens"]
    assert search["tokens"] == 2 * (metrics["cost/rollout_tokens"] - trained)
    assert metrics["cost/search_generated_tokens"] == 0


def test_fresh_completions_are_generated_and_scored(loud, tmp_path):
    run, metrics, search = one_step(loud, tmp_path, rollouts="fresh", num_examples=5)
    fresh = metrics["cost/search_generated_tokens"]
    trained = sum(len(record["completion_ids"]) for record in run.samples(1))
    assert 5 <= fresh <= 5 * 9
    assert metrics["cost/rollout_tokens"] == metrics["cost/train_tokens"] == trained
    assert metrics["cost/teacher_tokens"] == trained + fresh
    assert search["tokens"] == metrics["cost/search_tokens"] == 2 * fresh


# --- randomness -----------------------------------------------------------------------------------


class Disturbance(Callback):
    """Draws from the global random numbers, as any callback may."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.rand(3)


def test_dropout_depends_on_the_seed_and_on_nothing_else(tiny, tmp_path):
    """Top-k 1: the rollouts of the first step are the same whatever the seed."""

    def one_step_of_gpt2(name: str, seed: int, *callbacks: str) -> tuple[list, dict, float]:
        prompts = write_prompts(tmp_path / "talk.jsonl", [{"prompt": text} for text in TALK])
        student, teacher = (str(tiny / f"gpt2-{role}") for role in ("student", "teacher"))
        config = config_of(student, teacher, prompts, 6, max_new_tokens=6, top_k=1)
        config["seed_everything"] = seed
        config["trainer"] |= {"max_steps": 1, "callbacks+": [{"class_path": c} for c in callbacks]}
        run = Run(opd("fit", tmp_path / name, config), tiny / "gpt2-student")
        said = sorted(record["completion_ids"] for record in run.samples(1))
        return said, run.weights(1), run.metrics()[1]["opd/loss"]

    said, weights, loss = one_step_of_gpt2("first", 0)
    said_again, same, _ = one_step_of_gpt2("disturbed", 0, "test_numbers.Disturbance")
    said_otherwise, others, other_loss = one_step_of_gpt2("other", 1)
    assert said == said_again == said_otherwise
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert loss != other_loss
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
