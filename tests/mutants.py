"""Changes of meaning that tests must notice.

    python tests/mutants.py [--only TEXT] [--jobs N]

Each mutant is made to a copy of the checkout, one at a time, and the tests named beside it are run:
they must fail. A mutant that survives is a promise that nothing checks; its name is printed, and
the exit code is 1. So it is where a text does not occur exactly once any more: adapt the mutant.

To add one, append a line to MUTANTS: file, exact text, replacement, tests. ``why`` excuses one that
no test can notice.
"""

import argparse
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WARM = ["lightning.pytorch.cli", "lm_eval.evaluator", "lm_eval.models.huggingface", "datasets"]
WARM += ["matplotlib.pyplot", "transformers", "tensorboard", "math_verify"]
TIMEOUT = 300  # seconds after which tests count as failed: a change may make a loop endless


@dataclass(frozen=True)
class Mutant:
    """A change to one file, and the tests that should notice."""

    file: str
    text: str
    replacement: str
    tests: str  # as pytest takes them
    why: str = ""  # no test can notice it

    @property
    def name(self) -> str:
        return f"{self.file}: {self.text!r} -> {self.replacement!r}"


def of(file: str, tests: str) -> Callable[..., Mutant]:
    """Mutants of one file with the tests that most of them need."""

    def mutant(text: str, replacement: str, tests: str = tests, why: str = "") -> Mutant:
        return Mutant(file, text, replacement, tests, why)

    return mutant


HAND_MADE = "tests/eval/test_hand_made_runs.py"
HARNESS = "tests/eval/test_harness.py"
ANSWERS = "tests/test_answer_table.py"
EXTRAPOLATION = "tests/test_extrapolation.py"
FILES = "tests/callbacks/test_files_of_a_run.py"
NUMBERS = "tests/test_numbers.py"
TOKENS = f"{NUMBERS}::test_metrics_of_tokens_and_rollouts"
WEIGHTS = f"{NUMBERS}::test_weights_move_by_the_rate_times_the_clipped_gradient"
SEARCHES = f"{NUMBERS}::test_searches_by_hand"
ACCURACY = f"{NUMBERS}::test_accuracy_is_the_share_of_right_answers_among_those_asked_for"
COMPLETIONS = f"{NUMBERS}::test_each_prompt_has_its_completions_and_they_differ"
COUNTS = f"{NUMBERS}::test_tokens_are_counted"
SUMMARY = f"{NUMBERS}::test_summary_says_what_metrics_csv_says"
VALIDATION = f"{NUMBERS}::test_validation_is_a_mean_over_all_tokens_and_answers"
PREDICTIONS = f"{NUMBERS}::test_predictions_hold_the_logprobs_of_student_and_teacher"
PART = f"{NUMBERS}::test_part_judges_on_that_share_of_the_completions"
HELD_OUT = f"{NUMBERS}::test_held_out_completions_are_scored_but_not_trained_on"
FRESH = f"{NUMBERS}::test_fresh_completions_are_generated_and_scored"
DROPOUT = f"{NUMBERS}::test_dropout_depends_on_the_seed_and_on_nothing_else"
SAMPLES = f"{NUMBERS}::test_samples_are_what_the_student_was_asked_and_said"
ENGINE = f"{NUMBERS}::test_engine_logprob_is_that_of_the_truncated_distribution"
BENCHMARKS = f"{HARNESS}::test_benchmarks_of_a_run_are_those_of_its_checkpoints"

answers = of("opd/answers.py", ANSWERS)
runs = of("eval/runs.py", HAND_MADE)
report = of("eval/report.py", f"{HAND_MADE}::test_report_says_what_the_runs_cost_and_reached")
figures = of("eval/figures.py", HAND_MADE)
study = of("eval/study.py", f"{HAND_MADE}::test_study_compares_finished_trials")
harness = of("eval/harness.py", HARNESS)
memory = of("eval/memory.py", "tests/eval/test_memory.py")
ledger = of("opd/ledger.py", "tests/test_ledger.py")
metrics = of("opd/metrics.py", TOKENS)
extrapolation = of("opd/extrapolation.py", EXTRAPOLATION)
arithmetic = of("opd/embedded/arithmetic.py", "tests/test_embedded_arithmetic.py")
task = of("tasks/arithmetic/arithmetic.py", HARNESS)
samples = of("callbacks/samples.py", FILES)
summary = of("callbacks/summary.py", FILES)
benchmarks = of("callbacks/benchmarks.py", BENCHMARKS)
effopd = of("callbacks/effopd.py", SEARCHES)
module = of("opd/module.py", TOKENS)
scores = of("opd/scores.py", SEARCHES)
records = of("opd/rollouts/records.py", SAMPLES)
engine = of("opd/rollouts/transformers.py", ENGINE)
rollouts = of("opd/rollouts/rollouts.py", TOKENS)
teacher = of("opd/teachers/local.py", TOKENS)
step_rollouts = of("opd/step_rollouts.py", PART)
divergences = of("opd/objectives/divergences.py", TOKENS)
loggers = of("opd/metrics_csv.py", FILES)

MUTANTS = [
    # answers
    answers("return bool(verify(", "return not bool(verify("),
    answers("    if left == right:\n        return True\n", ""),
    answers("return a is not None and a == b", "return a is not None and a != b"),
    answers("return a is not None and a == b", "return a == b"),
    answers("if depth == 0:", "if depth <= 1:"),
    answers("for start in reversed([", "for start in list(["),
    answers("return found[-1] if found", "return found[0] if found"),
    answers("found[-1].group(1)", "found[0].group(1)"),
    answers('text.replace(",", "")', 'text.replace(",", ".")'),
    answers('.lstrip("$").rstrip("$.")', '.lstrip("$").rstrip("$")'),
    answers('.lstrip("$").rstrip("$.")', '.strip("$.")', why="no number starts with a full stop"),
    answers('re.sub(r"\\s+", "", text)', "text"),
    answers(
        "        if answer is None:\n            return False", "        answer = answer or ''"
    ),
    answers("        if same_number_or_text(answer, reference):\n            return True\n", ""),
    answers('return self.equivalence == "math" and same', "return same", "tests/test_answers.py"),
    answers(r"[-+]?\d[\d,]*", r"\d[\d,]*"),
    answers(r"(?:/\d+)?", ""),
    # the ledger
    ledger("self._new[name] += tokens", "self._new[name] = tokens"),
    ledger("+= _now() - start", "= _now() - start"),
    ledger("+= _now() - start", "+= start"),
    ledger("self.totals[name] += value", "self.totals[name] = value"),
    ledger("        self._new.clear()\n", ""),
    ledger('if name.endswith("seconds")', 'if name.endswith("tokens")'),
    ledger("(world_size if", "(1 if"),
    ledger("reduce_sum(new).tolist()", "new.tolist()"),
    ledger("ru_maxrss * 1024", "ru_maxrss"),
    ledger(
        "        try:\n            yield\n        finally:\n", "        yield\n        if True:\n"
    ),
    # metrics of tokens
    metrics(
        "kl(log_p, log_q),\n        kl(log_q, log_p)", "kl(log_q, log_p),\n        kl(log_p, log_q)"
    ),
    metrics("entropy(log_p), entropy(log_q)", "entropy(log_q), entropy(log_p)"),
    metrics("(teacher_entropy - student_entropy).abs()", "teacher_entropy - student_entropy"),
    metrics("log_q.gather(1, tokens[:, None])", "log_p.gather(1, tokens[:, None])"),
    metrics("(logp_y - logmu_y).abs()", "(logp_y.exp() - logmu_y.exp()).abs()"),
    metrics("OVERLAP_K = 16", "OVERLAP_K = 15"),
    metrics("        overlap,\n        advantage,", "        advantage,\n        overlap,"),
    metrics("(teacher - student)", "(student - teacher)"),
    metrics("(student.exp() * (", "(teacher.exp() * ("),
    metrics("log_q.gather(1, ids_p).masked_fill(~shared, lowest)", "log_q.gather(1, ids_p)"),
    metrics("ids_q = log_q.topk", "ids_q = log_p.topk"),
    metrics("self.counts[i] += value.numel()", "self.counts[i] += 1"),
    metrics("self.totals[i] += value.sum(", "self.totals[i] += value.mean("),
    metrics("total / count if name in self.means else total", "total / count"),
    metrics("torch.maximum(self.highest[i], value.max())", "value.max()", "tests/test_metrics.py"),
    metrics("torch.maximum(self.highest[i]", "torch.minimum(self.highest[i]"),
    divergences("(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_p - log_q))"),
    divergences("return kl(log_p, log_q)", "return kl(log_q, log_p)"),
    divergences("return -(log_p.exp()", "return (log_p.exp()"),
    divergences("log_q + math.log(beta)", "log_p + math.log(beta)"),
    divergences(
        "return beta * kl(log_q, log_m) + (1 - beta)", "return (1 - beta) * kl(log_q, log_m) + beta"
    ),
    # extrapolation
    extrapolation("step > 0 and step & (step - 1) == 0", "step > 0 and step % 2 == 0"),
    extrapolation("step > 0 and step % every == 0", "step > 0 and step % every == 1"),
    extrapolation("any(due(step) for", "all(due(step) for"),
    extrapolation("coefficient <= limit and (yield", "coefficient < limit and (yield"),
    extrapolation("coefficient *= 2\n\n\ndef two_sided", "coefficient += 2\n\n\ndef two_sided"),
    extrapolation("if coefficient == 1.0:", "if coefficient <= 2.0:"),
    extrapolation("comparison.difference >= 0", "comparison.difference > 0"),
    extrapolation("difference > margin *", "difference >= margin *"),
    extrapolation("margin = number or 0.0", "margin = 0.0"),
    extrapolation("return total / weight if", "return total / self.values.numel() if"),
    extrapolation("self.values.double() - best.values", "best.values.double() - self.values"),
    extrapolation("/ max(n - 1, 1)", "/ n"),
    extrapolation("(n * variance) ** 0.5 / units", "variance ** 0.5 / units"),
    extrapolation("total / units, (n", "total / n, (n"),
    extrapolation(
        "best, result.score_after, result.coefficient = score, value,",
        "result.score_after, result.coefficient = value,",
    ),
    extrapolation(
        "    if coefficient == 0.0:\n        return\n", "", why="W + 0 D is W but for -0"
    ),
    extrapolation(
        "torch._foreach_sub_(targets, _beside(targets, anchor))",
        "torch._foreach_add_(targets, _beside(targets, anchor))",
    ),
    extrapolation("_foreach_mul_(targets, coefficient)", "_foreach_mul_(targets, 2 * coefficient)"),
    extrapolation("    copy_weights(weights, base)\n", ""),
    extrapolation(".double()).square().sum()", ".double()).abs().sum()"),
    extrapolation("torch.stack(squares).sum()", "torch.stack(squares).max()"),
    extrapolation("if any(word in name for word", "if all(word in name for word"),
    # the built-in task
    arithmetic("int(a) + int(b) + carry", "int(a) + int(b)"),
    arithmetic('f"{a}{b}{digit}c{carry}"', 'f"{b}{a}{digit}c{carry}"'),
    arithmetic('digits = f"{digit}{digits}"', 'digits = f"{digits}{digit}"'),
    arithmetic("if generator.random() < slip", "if generator.random() > slip"),
    arithmetic("randint(1, 9)", "randint(0, 9)"),
    arithmetic('return "test" if key', 'return "train" if key'),
    arithmetic("< _TEST_RESIDUES", "<= _TEST_RESIDUES"),
    arithmetic("sum(self.numbers)", "sum(self.numbers[:2])"),
    arithmetic("{DIGITS + 1}d", "{DIGITS}d"),
    arithmetic(
        "        if problem.split == split:\n            yield",
        "        if problem:\n            yield",
    ),
    arithmetic('f"{split}:{seed}:{DIGITS}"', 'f"{split}:{DIGITS}"'),
    task("sum(right) / len(right)", "float(right[0])"),
    task("sum(right) / len(right)", "float(any(right))"),
    task("for completion in completions]", "for completion in completions[:1]]"),
    task("VERIFIER(completion, doc", "not VERIFIER(completion, doc"),
    task('rows("test")', 'rows("train")'),
    # eval: runs
    runs(
        "return next((p for p in self.points if (p.accuracy or 0.0) >= accuracy), None)",
        "return self.points[-1]",
    ),
    runs("for p in self.points if", "for p in reversed(self.points) if"),
    runs("(p.accuracy or 0.0) >= accuracy", "(p.accuracy or 0.0) > accuracy"),
    runs(
        'PHASES = ("rollout", "teacher", "train", "search")',
        'PHASES = ("rollout", "teacher", "train")',
    ),
    runs('"search")', '"search", "validation")'),
    runs(' + float(row["cost/search_generated_tokens"])', ""),
    runs("cost/search_generated_tokens", "cost/search_tokens"),
    runs('accuracy=float(row["val/accuracy"])', 'accuracy=1 - float(row["val/accuracy"])'),
    runs("(0.0, 0.0))[1]", "(0.0, 0.0))[0]"),
    runs('folder / "evaluation" / "results.json"', 'folder / "results.json"'),
    # eval: report
    report("cost['rollout_tokens'] + cost['search_generated_tokens']", "cost['rollout_tokens']"),
    report("cost['search_generated_tokens']", "cost['search_tokens']"),
    report("cost['search_seconds'] / seconds", "cost['train_seconds'] / seconds"),
    report("for phase in PHASES)", "for phase in PHASES[:3])"),
    report('(pair["initial"], pair["final"])', '(pair["final"], pair["initial"])'),
    report('run.summary["accuracy"]', 'run.summary["reverse_kl"]'),
    report("str(reached.step) if", "str(run.points[-1].step) if"),
    report("reached.seconds:.1f", "seconds:.1f"),
    report("run.benchmarks[n]:.3f", "run.benchmarks[n]:.1f"),
    report("c['score']:.3f", "c['coefficient']:.3f"),
    report("{search['coefficient']:g}", "{search['seconds']:g}"),
    report('accepted = sum(bool(search["coefficient"])', 'accepted = sum(bool(search["step"])'),
    # eval: figures
    figures('(axes[1, 0], "seconds"', '(axes[1, 0], "tokens"'),
    figures('(axes[0, 1], "step", "reverse_kl"', '(axes[0, 1], "step", "accuracy"'),
    figures('marker="^" if accepted', 'marker="^" if not accepted'),
    figures("share * (getattr(right, y)", "(1 - share) * (getattr(right, y)"),
    figures("(step - left.step) / (right.step", "(right.step - step) / (right.step"),
    figures("sorted(s)[len(s) // 2]", "max(s)"),
    figures("sorted(s)[len(s) // 2]", "s[len(s) // 2]"),
    figures("above if s is None else s", "0 if s is None else s"),
    figures("[min(s) for s in steps]", "[max(s) for s in steps]"),
    # eval: study
    study("steps=reached.step if", "steps=last.step if"),
    study("tokens=reached.tokens if", "tokens=last.tokens if"),
    study("seconds=reached.seconds if", "seconds=reached.tokens if"),
    study('["search_seconds"] / last', '["train_seconds"] / last'),
    study("final_accuracy=last.accuracy", "final_accuracy=run.points[0].accuracy"),
    study("if len(known) == len(values)", "if known"),
    study("statistics.median(known)", "statistics.mean(known)"),
    study("statistics.median(o.search_share", "max(o.search_share"),
    study("if o.steps is not None]", "if o.final_accuracy]"),
    study('f">{max_steps}" if', 'f"{max_steps}" if'),
    study("key=lambda item: item[0][1]", "key=lambda item: -item[0][1]"),
    study("[o.tokens for o in group]", "[o.seconds for o in group]"),
    # eval: harness and memory
    harness('if is_score and not metric.endswith("_stderr")', "if is_score"),
    harness('and metric != "sample_len"', ""),
    harness('"take_first_k", "k": samples', '"take_first_k", "k": 1'),
    harness('"repeats": samples', '"repeats": 1'),
    harness(
        "limit=limit,\n                task_manager", "limit=None,\n                task_manager"
    ),
    harness(
        "torch.manual_seed(seed)",
        "torch.manual_seed(seed + len(loaded))",
        why="another seed, as good",
    ),
    harness("torch.manual_seed(seed)", "torch.seed()", BENCHMARKS),
    harness('counts["effective"]', 'counts["original"]'),
    harness("value:.4f", "value:.1f"),
    memory(
        "MASTER, GRADIENT, ADAM, COPY = 4, 4, 8, 4", "MASTER, GRADIENT, ADAM, COPY = 4, 4, 4, 4"
    ),
    memory("(COPY if effopd else 0))\n", "COPY)\n"),
    memory("(student if whole_gradients else share)", "share"),
    memory('strategy == "ddp" or gradient_sync', "gradient_sync", why="DDP's share is the whole"),
    memory("0 if teacher_offload else", "0 if not teacher_offload else"),
    memory("share * (GRADIENT + COPY)", "share * GRADIENT"),
    memory("(share * COPY if effopd else 0) + gathered", "gathered"),
    memory("return max(self.rollout", "return min(self.rollout"),
    # files of a run
    samples("step % self.every_n_steps:", "step % self.every_n_steps == 0:"),
    samples("write_jsonl(path, records[: self.rollouts])", "write_jsonl(path, records)"),
    samples(
        "reverse_kl=token_kl",
        "reverse_kl=-token_kl",
        f"{NUMBERS}::test_samples_hold_the_kl_of_every_token",
    ),
    samples(
        "                break\n", "                continue\n", why="the rest is cut off anyway"
    ),
    samples(
        'file.writelines(json.dumps(record) + "\\n" for record in outputs)',
        "file.write(json.dumps(outputs[0]))",
        PREDICTIONS,
    ),
    summary("self.final = results", "self.final = self.final or results"),
    summary("self.initial = results", "self.final = results"),
    summary(
        '{"initial": self.initial.get(name), "final": self.final.get(name)}',
        '{"initial": self.final.get(name), "final": self.initial.get(name)}',
    ),
    summary(
        "self.validated_step != trainer.global_step", "self.validated_step == trainer.global_step"
    ),
    summary('self._change("accuracy")', 'self._change("reverse_kl")'),
    summary('"steps": trainer.global_step', '"steps": self.validated_step', SUMMARY),
    summary('"seed": getattr(pl_module, "seed", None)', '"seed": 0', SUMMARY),
    summary("for search in history]", "for search in history[:1]]", SEARCHES),
    summary("trainer.fit_loop.epoch_loop.val_loop.run()", "pass"),
    summary(
        'state_dict["initial"], state_dict["final"]', 'state_dict["final"], state_dict["final"]'
    ),
    benchmarks("% self.every_n_steps and", "% self.every_n_steps or"),
    benchmarks("trainer.global_step != trainer.max_steps", "True"),
    benchmarks("step=trainer.global_step", "step=trainer.global_step - 1"),
    benchmarks("limit=self.limit", "limit=1"),
    loggers("< int(row", "<= int(row"),
    loggers("if first:", "if not first:"),
    loggers(":.8g", ":.2g"),
    records('"stop" if finished[i]', '"length" if finished[i]'),
    records(
        "value_rows[i][: lengths[i]]",
        "value_rows[0][: lengths[i]]",
        f"{NUMBERS}::test_samples_hold_the_kl_of_every_token",
    ),
    # EffOPD
    effopd('base if self.anchor_kind == "raw"', 'base if self.anchor_kind != "raw"'),
    effopd("            place(result.coefficient)\n", ""),
    effopd('ledger.totals["search_tokens"] - tokens_before', 'ledger.totals["search_tokens"]'),
    effopd("if self.due(trainer.global_step):", "if self.due(trainer.global_step + 1):"),
    effopd("if self.due(trainer.global_step + 1):", "if self.due(trainer.global_step):"),
    effopd(
        '"effopd/score_before": result.score_before', '"effopd/score_before": result.score_after'
    ),
    effopd("float(len(result.tried))", "float(len(result.tried)) + 1"),
    effopd(
        'with ledger.phase("search"):',
        'with ledger.phase("train"):',
        f"{NUMBERS}::test_seconds_add_up",
    ),
    effopd("step=step)", "step=step + 1)", f"{NUMBERS}::test_effopd_logs_only_when_it_searches"),
    effopd('if self.anchor_device == "parameters":', "if True:", why="seen on a GPU only"),
    scores("return Score(right.mean(dim=1)", "return Score(1 - right.mean(dim=1)"),
    scores("-scored.rollouts.spread", "scored.rollouts.spread"),
    scores(
        "kl(log_p, module.teacher_logprobs(scored))", "kl(module.teacher_logprobs(scored), log_p)"
    ),
    scores(
        "weights.append(scored.rollouts.lengths[filled].float().cpu())",
        "weights.append(torch.ones(int(filled.sum())))",
    ),
    scores('module.ledger.count("search_tokens", scored.rollouts.num_tokens)', "pass"),
    scores(
        'module.ledger.count("search_generated_tokens", rollouts.num_tokens)\n        return',
        "return",
        FRESH,
    ),
    scores(
        "temperature=self.temperature,\n        )\n        module",
        "temperature=1.0,\n        )\n        module",
    ),
    scores(
        "thin_out(module.step_rollouts.scored, self.fraction)", "module.step_rollouts.scored", PART
    ),
    scores(
        'held_out = self.fraction if self.rollouts == "held_out" else 0.0',
        "held_out = 0.0",
        HELD_OUT,
    ),
    step_rollouts("if position in keep", "if True"),
    step_rollouts("order[:count]", "order[: count + 1]", HELD_OUT),
    # rollouts
    engine("scores / self.sampler.temperature", "scores / 1.0"),
    engine("if sampler.top_k > 0:", "if sampler.top_k > 99:"),
    engine("self.logprobs.append(logprobs.", "self.logprobs.append(race."),
    engine("        model.eval()\n", "", DROPOUT),
    rollouts(
        "self.prompts.ids.shape[1] - 1 : -1] = self.mask",
        "self.prompts.ids.shape[1] :] = self.mask",
    ),
    # a step
    teacher("/ temperature", "/ 1.0"),
    module("logits / self.sampler.temperature", "logits"),
    module("logits / self.sampler.temperature", "logits", PREDICTIONS),
    module("                scheduler.step()\n", "                pass\n", WEIGHTS),
    module(
        "sharding.clip_gradients(self.student, self.max_grad_norm)",
        "sharding.clip_gradients(self.student, 1e9)",
        WEIGHTS,
    ),
    module("batch.repeat(self.rollouts_per_prompt)", "batch.repeat(1)", COMPLETIONS),
    module(
        'own_randomness(self.device, self.seed, step, self.global_rank, "dropout")',
        "torch.enable_grad()",
        DROPOUT,
    ),
    module(
        "own_randomness(self.device, self.seed, step",
        "own_randomness(self.device, 0, step",
        DROPOUT,
    ),
    module("        self.student.train()\n", "", DROPOUT),
    module(
        "float(self.verifier(text, prompt.answer))",
        "float(not self.verifier(text, prompt.answer))",
        ACCURACY,
    ),
    module("if prompt.answer is not None:", "if True:", ACCURACY),
    module("(self.trainer.world_size / total)", "(1 / len(micro_batches))"),
    module('"opd/loss": loss.detach()', '"opd/loss": diagnosis["opd/reverse_kl"]'),
    module("(~rollouts.finished)", "rollouts.finished"),
    module('"rollout/tokens": lengths', '"rollout/tokens": torch.ones_like(lengths)'),
    module('self.ledger.count("train_tokens", micro.num_tokens)', "pass", COUNTS),
    module(
        'self.ledger.count("rollout_tokens", rollouts.num_tokens)',
        'self.ledger.count("rollout_tokens", len(rollouts))',
        COUNTS,
    ),
    module('self.ledger.count("teacher_tokens", rollouts.num_tokens)', "pass", COUNTS),
    module('"optim/lr": float(learning_rate)', '"optim/lr": optimizer.param_groups[0]["lr"]'),
    module('"optim/grad_norm": grad_norm', '"optim/grad_norm": min(grad_norm, self.max_grad_norm)'),
    module("self.evaluation_metrics.reset()", "pass", VALIDATION),
    module('"student_logprob": log_p.gather', '"student_logprob": log_q.gather', PREDICTIONS),
    module('"reverse_kl": kl(log_p, log_q)', '"reverse_kl": kl(log_q, log_p)', PREDICTIONS),
    module(
        "self.teacher_of(rollouts).score(rollouts)",
        "next(iter(self.teachers.values())).score(rollouts)",
    ),
]


def copy_checkout(folder: Path) -> None:
    """Copy what git knows or would know."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: str) -> tuple[int, str]:
    """Run tests in a copy; returns pytest's exit code and output."""
    log = folder / "pytest.log"
    child = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests, log))
    child.start()
    child.join(TIMEOUT)
    if child.exitcode is None:
        child.kill()
        return 1, "timeout"
    return child.exitcode, log.read_text(encoding="utf-8")


def _pytest(folder: Path, tests: str, log: Path) -> None:
    """What the child does; all that it imports of ours comes from the copy."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    ours = (ROOT, ROOT / "tests")
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() not in ours)]
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests.split()]))


def warm_up() -> None:
    """Import what takes long and is not ours, once: each child is a fork of this process."""
    for name in WARM:
        importlib.import_module(name)
    ours = {"opd", "callbacks", "eval", "tasks", "conftest"} & sys.modules.keys()
    assert not ours, ours


def problem_of(mutant: Mutant) -> str | None:
    """What is wrong with a mutant itself."""
    path = ROOT / mutant.file
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if (count := source.count(mutant.text)) != 1:
        return f"its text occurs {count} times"
    try:
        compile(source.replace(mutant.text, mutant.replacement), mutant.file, "exec")
    except SyntaxError as error:
        return f"is no Python ({error})"
    return None


def survives(mutant: Mutant, scratch: Path) -> bool:
    """Make the change in this process's copy, run its tests, and take the change back."""
    folder = scratch / str(os.getpid())
    if not folder.is_dir():
        copy_checkout(folder)
    path = folder / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutant.text, mutant.replacement), encoding="utf-8")
    try:
        code, output = run_tests(folder, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    if code not in (0, 1, 2):
        raise RuntimeError(f"{mutant.name}: pytest {mutant.tests} ended with {code}\n{output}")
    print(f"{'noticed ' if code else 'SURVIVES'} {mutant.name}", flush=True)
    return code == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants with this text in their name or tests")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if options.only in m.name or options.only in m.tests]
    broken = [f"{m.name}: {problem}" for m in chosen if (problem := problem_of(m))]
    if broken or not chosen:
        print("\n".join(broken) or "no such mutant")
        return 1
    tried, excused = [m for m in chosen if not m.why], [m for m in chosen if m.why]
    start = time.perf_counter()
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True  # a changed file may have the size and second of another
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        copy_checkout(scratch / "unchanged")
        code, output = run_tests(scratch / "unchanged", " ".join(sorted({m.tests for m in tried})))
        if code:
            print(f"the tests fail without any change:\n{output}")
            return 1
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, fork) as pool:
            judged = list(pool.map(survives, tried, [scratch] * len(tried)))
    alive = [m for m, survived in zip(tried, judged, strict=True) if survived]
    for mutant in excused:
        print(f"excused  {mutant.name}: {mutant.why}")
    for mutant in alive:
        print(f"SURVIVES {mutant.name} [{mutant.tests}]")
    seconds = time.perf_counter() - start
    noticed = f"{len(tried) - len(alive)} of {len(tried)} noticed, {len(excused)} excused"
    print(f"{noticed}, {seconds:.0f} s")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
