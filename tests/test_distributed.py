"""Real process groups (torchrun, gloo): what holds for one process holds for two."""

import functools
import json
import os
import shutil
import signal
import subprocess

import kill
import pytest
import torch
from conftest import (
    AUTO,
    CPU,
    DDP,
    FSDP1,
    FSDP2,
    LINE_SEARCH,
    QUICKSTART,
    STRATEGIES,
    assert_same,
    copy_of,
    fail,
    launch,
    launch_environment,
    load_any,
    slow_but,
    student_of,
    torchrun,
    torchrun_command,
)
from torch._dynamo.utils import counters

from eval.memory import GATHERED, memory
from opd.checkpoints import newest_checkpoint
from opd.cli import main
from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.models import load_model, load_tokenizer


def losses(folder):
    return [float(r["opd/loss"]) for r in read_metrics(folder / "metrics.csv") if "opd/loss" in r]


def metrics(folder, of="opd/loss"):
    """All metrics of rollouts, tokens and gradients, by step; or of validations."""
    kinds = ("opd/", "rollout/", "optim/") if of == "opd/loss" else ("val/",)
    steps = {}
    for row in read_metrics(folder / "metrics.csv"):  # data sets have a row of their own
        values = {name: float(value) for name, value in row.items() if name.startswith(kinds)}
        steps.setdefault(row["step"], {}).update(values)
    return [values for values in steps.values() if of in values]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.fixture(scope="module")
def dealt(tmp_path_factory):
    """Options of a run that every number of processes must take alike; micro-batches are small.

    Two data sets, of which one has two prompts: a step has none of it on one rank, or on any.
    """
    folder = tmp_path_factory.mktemp("dealt")
    rows = [
        {"prompt": f"{100 + i}+{250 + 3 * i}=", "answer": f"{350 + 4 * i:04d}"} for i in range(40)
    ]
    for name, part in [("many", rows[:38]), ("few", rows[38:])]:
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    sources = f"{{many: {folder}/many.jsonl, few: {folder}/few.jsonl}}"
    data = ["--data.train", sources, "--data.validation", sources]
    return [*data, "--data.validation_limit", "7", "--model.micro_batch_tokens", "64"]


# Of eight completions a step, four say nothing by a standard error: what is better is accepted
LENIENT = ["--trainer.callbacks.accept", "better", "--model.optimizer.lr", "1e-5"]
PRESETS = {"line_search": LINE_SEARCH, "auto": [*AUTO, *LENIENT]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, dealt):
    """The run of one process that torchrun starts, by the preset of its searches."""
    return functools.cache(
        lambda preset: torchrun(
            *(1, tmp_path_factory.mktemp("one") / "run", *dealt, *PRESETS[preset], *CPU), steps=5
        )
    )


@pytest.mark.parametrize(
    ("strategy", "preset"),
    [
        pytest.param(DDP, "line_search", marks=pytest.mark.slow, id="ddp"),
        pytest.param(FSDP2, "line_search", marks=pytest.mark.slow, id="fsdp2"),
        pytest.param(FSDP1, "line_search", marks=pytest.mark.slow, id="fsdp1"),
        pytest.param(FSDP2, "auto", id="fsdp2-auto"),
    ],
)
def test_two_processes_draw_the_same_rollouts_and_end_at_the_same_weights(
    tmp_path, dealt, alone, strategy, preset
):
    """1 x 8 = 2 x 4, with searches that accept, to float32 rounding; tiles of 7 tokens or all."""
    one_process = alone(preset)
    options = [*dealt, *PRESETS[preset], *strategy, "--model.tile_tokens", "7"]
    two = launch(2, tmp_path / "two", *options, steps=5)
    assert len(metrics(two)) == 5
    for ours, expected in zip(metrics(two), metrics(one_process), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)
        counts = [ours.get(f"rollout/tokens/data/{name}", 0) for name in ("many", "few")]
        assert sum(counts) == ours["rollout/tokens"]
    assert 0 < sum("opd/loss/data/few" in step for step in metrics(two)) < 5
    validations = [metrics(folder, of="val/reverse_kl") for folder in (two, one_process)]
    for ours, expected in zip(*validations, strict=True):
        assert "val/accuracy/data/few" in ours
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for part in ("accuracy", "reverse_kl"):
        assert summary(two)[part] == pytest.approx(summary(one_process)[part], rel=1e-4)
    assert summary(two)["cost"]["train_tokens"] == summary(one_process)["cost"]["train_tokens"]
    assert losses(two) == pytest.approx(losses(one_process), rel=1e-5)
    expected = student_of(load_any(one_process))
    difference = largest_difference(student_of(load_any(two)), expected)
    print(f"weights differ by at most {difference:.1e}")
    assert difference < 1e-5
    searches = [s["coefficient"] for s in summary(one_process)["extrapolation"]]
    assert [s["coefficient"] for s in summary(two)["extrapolation"]] == searches
    assert any(searches)
    factors = [s["learning_rate_factor"] for s in summary(two)["extrapolation"]]
    assert (factors[-1] != 1) is (preset == "auto")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP2, FSDP1], ids=["fsdp2", "fsdp1"])
@pytest.mark.parametrize(
    "objective",
    [
        ["opd.objectives.ReverseKL"],
        ["opd.objectives.ForwardKL"],
        ["opd.objectives.GeneralizedJSD", "--model.objective.beta", "0.25"],
        ["opd.objectives.PolicyGradient"],
        ["opd.objectives.ExOPD"],
        ["opd.objectives.TopKKL", "--model.objective.k", "3"],
    ],
    ids=lambda options: options[0].rpartition(".")[2],
)
def test_ranks_with_unequally_many_tiles_take_the_step_of_one_at_full_width(
    fit, tmp_path, dealt, objective, strategy
):
    """Five prompts, of which rank 0 has three; tiles of 5 tokens against all at once."""
    options = [*dealt, "--model.objective", *objective, "--data.batch_size", "5"]
    options += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"]
    whole = fit("whole", *options, "--model.tile_tokens", "100000", steps=2)
    tiled = launch(2, tmp_path / "tiled", *options, *strategy, "--model.tile_tokens", "5", steps=2)
    difference = largest_difference(student_of(load_any(tiled)), student_of(load_any(whole)))
    norms = [[m["optim/grad_norm"] for m in metrics(folder)] for folder in (tiled, whole)]
    print(f"weights differ by at most {difference:.1e}, gradient norms {norms}")
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert difference < 1e-6


@pytest.mark.parametrize("rollouts", slow_but("held_out", "part", "fresh"))
def test_two_processes_judge_candidates_on_the_same_completions(tmp_path, dealt, rollouts):
    score = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "every 1"]
    score += ["--trainer.callbacks.score", "opd.scores.TeacherKL"]
    score += ["--trainer.callbacks.score.rollouts", rollouts, "--model.rollouts_per_prompt", "2"]
    score += ["--trainer.callbacks.score.num_examples", "7"]
    one = launch(1, tmp_path / "one", *dealt, *score, *CPU, steps=2)
    two = launch(2, tmp_path / "two", *dealt, *score, *DDP, steps=2)
    for ours, theirs in zip(
        summary(two)["extrapolation"], summary(one)["extrapolation"], strict=True
    ):
        assert ours["tokens"] == theirs["tokens"]
        scores = [[c["score"] for c in s["candidates"]] for s in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


ACCURACY = ["opd.scores.AnswerAccuracy", "--trainer.callbacks.score.num_examples", "1"]
PART = ["opd.scores.TeacherKL", "--trainer.callbacks.score.rollouts", "part"]
HELD_OUT = ["opd.scores.TeacherKL", "--trainer.callbacks.score.rollouts", "held_out"]


@pytest.mark.parametrize(
    ("strategy", "score"),
    [
        pytest.param(FSDP2, ACCURACY, marks=pytest.mark.slow, id="fsdp2-accuracy"),
        pytest.param(FSDP2, PART, marks=pytest.mark.slow, id="fsdp2-part"),
        pytest.param(FSDP2, HELD_OUT, id="fsdp2-held_out"),
        pytest.param(FSDP1, ACCURACY, marks=pytest.mark.slow, id="fsdp1-accuracy"),
    ],
)
def test_unequal_completions_and_a_rank_without_prompts_do_not_deadlock(tmp_path, strategy, score):
    """Five prompts in batches of two: rank 1 has none in the last; nor has it a question of one.

    A rollout gathers each of four layers and the rest once, however many tokens it has.
    """
    rows = [{"prompt": f"{100 + i}+{200 + i}=", "answer": f"{300 + 2 * i}"} for i in range(5)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data.train", str(prompts), "--data.validation", str(prompts)]
    sizes = ["--data.batch_size", "2", "--data.validation_batch_size", "2"]
    search = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "every 1"]
    search += ["--trainer.callbacks.score", *score]
    small = ["--model.micro_batch_tokens", "1"]  # as many micro-batches as completions
    small += ["--model.max_new_tokens", "12"]
    engine = ["--model.engine", "probes.CountingEngine"]
    engine += ["--model.engine.path", str(tmp_path / "rank")]
    options = [*strategy, *data, *sizes, *search, *small, *engine]
    run = launch(2, tmp_path / "run", *options, steps=4)
    assert [s["step"] for s in summary(run)["extrapolation"]] == [1, 2, 3, 4]
    rows = [r for r in read_metrics(run / "metrics.csv") if "rollout/tokens" in r]
    lengths = [float(r["rollout/tokens"]) / float(r["rollout/length_mean"]) for r in rows]
    assert lengths == pytest.approx([2, 2, 1, 2])
    for rank in (0, 1):
        rollouts = [
            line.split() for line in (tmp_path / f"rank_{rank}.txt").read_text().split("\n")
        ]
        prompts, collectives = zip(*(r for r in rollouts if r), strict=True)
        assert max(map(int, collectives)) == 5
        assert ("0" in prompts) == (rank == 1)


def test_a_tied_model_with_activation_checkpointing_trains_alike_when_sharded(fit, tiny, tmp_path):
    """Llama with tied embeddings; one rank draws the same rollouts as an ordinary process."""
    rows = [{"prompt": f"add {i} and {3 * i}"} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.student", str(tiny / "llama-student")]
    options += ["--model.teacher", str(tiny / "llama-teacher")]
    options += ["--data.train", str(tmp_path / "prompts.jsonl"), "--data.validation", "null"]
    plain = fit("plain", *options, steps=3)
    saving = ["--model.gradient_checkpointing", "true"]
    sharded = launch(1, tmp_path / "sharded", *options, *FSDP2, *saving, steps=3)
    left, right = student_of(load_any(sharded)), student_of(load_any(plain))
    assert largest_difference(left, right) < 1e-6
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.slow
def test_compiled_layers_train_alike(fit, tmp_path):
    compiled = ["--model.compile", "true"]
    plain = fit("plain", steps=3)
    counters.clear()
    fast = fit("compiled", *compiled, steps=3)
    assert counters["stats"]["unique_graphs"] > 0  # they were
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-5)
    sharded = launch(2, tmp_path / "sharded", *FSDP2, steps=3)
    # not forked: the compiler has threads and processes of its own
    fast = torchrun(2, tmp_path / "compiled_sharded", *FSDP2, *compiled, steps=3)
    assert losses(fast) == pytest.approx(losses(sharded), rel=1e-5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each rank of a bf16-mixed run has measured in its first search."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    probe = ["--trainer.callbacks+=probes.MeasuredEffOPD", "--trainer.precision", "bf16-mixed"]
    run = launch(2, folder, *FSDP2, *probe, "--model.teacher_dtype", "bfloat16", steps=1)
    return [json.loads((run / f"search_{rank}.json").read_text()) for rank in (0, 1)]


def test_a_search_needs_two_sharded_copies_and_no_communication(measured):
    for spent in measured:
        assert spent["candidates"] == 5
        assert spent["collectives"] == 0 < spent["collectives_of_one_reduce"]
        assert spent["anchor_bytes"] == spent["weights_bytes"]  # one copy, held all the time
        largest_tensor = 2 * 512 * 128 * 8  # the norm's double precision, one tensor at a time
        assert spent["peak_bytes"] < spent["weights_bytes"] + largest_tensor  # the other copy


def test_the_memory_table_is_right_about_a_run(measured):
    parameters = measured[0]["parameters"]
    expected = memory(parameters, parameters, devices=2, strategy="fsdp2")
    kinds = ("weights", "anchor", "optimizer", "teacher")
    resting = sum(spent[f"{kind}_bytes"] for kind in kinds for spent in measured) / 2
    assert expected.rollout - GATHERED * parameters == pytest.approx(resting, rel=0.01)
    for spent in measured:  # communication buffers of a layer, here a quarter, come on top
        assert 1 <= spent["gathered_bytes"] / (GATHERED * parameters) < 2


COUNTED = [*FSDP2, *LINE_SEARCH, "--trainer.callbacks+=probes.GradientSyncs"]
COUNTED += ["--model.micro_batch_tokens", "64"]


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory):
    """Two steps of two processes, with a search after each. Copy it before you change it."""
    return launch(2, tmp_path_factory.mktemp("sharded") / "run", *COUNTED, steps=2)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_processes(fit):
    """One file, two shards, one shard, two shards; FSDP1 and FSDP2 read each other's."""
    run = fit("run", *LINE_SEARCH, steps=1)
    options = [*LINE_SEARCH, "--trainer.callbacks+=probes.WeightsAtStart"]
    for processes, strategy, steps in [(2, FSDP2, 2), (1, FSDP1, 3), (2, FSDP2, 4)]:
        saved = load_any(run)
        launch(processes, run, *strategy, *options, "--ckpt_path", "last", steps=steps)
        assert_same(dict(torch.load(run / "start.pt")), dict(saved["state_dict"]))
    assert [s["step"] for s in summary(run)["extrapolation"]] == [1, 2, 3, 4]
    assert len(losses(run)) == 4


@pytest.mark.slow
def test_gradients_are_summed_once_a_step_or_once_a_micro_batch(tmp_path, sharded_run):
    """By a reduce-scatter for each of four layers and the rest; the sum is the same."""
    every = launch(2, tmp_path / "every", *COUNTED, "--model.gradient_sync", "every", steps=2)
    micro_batches, syncs = map(int, (sharded_run / "syncs.txt").read_text().split())
    assert (micro_batches > 1, syncs) == (True, 5)
    assert (every / "syncs.txt").read_text() == f"{micro_batches} {5 * micro_batches}"
    last = student_of(load_any(sharded_run))
    assert largest_difference(student_of(load_any(every)), last) < 1e-6


def test_a_sharded_checkpoint_is_a_model_like_its_export(tmp_path, sharded_run):
    """Exported and evaluated without a process group, by the path of its folder."""
    checkpoint, exported = sharded_run / "checkpoints" / "last.ckpt", tmp_path / "exported"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(exported)]) == 0
    weights = load_model(str(exported)).state_dict()
    assert_same(dict(load_model(str(checkpoint)).state_dict()), dict(weights))
    prefixed = {f"student.{name}": tensor for name, tensor in weights.items()}
    assert_same(prefixed, student_of(load_any(sharded_run)))
    answers = []
    for model in (checkpoint, exported):
        scores = tmp_path / f"scores of {model.name}"
        out = ["--output", str(scores), "--limit", "32", "--seed", "1"]
        assert main(["evaluate", "--model", str(model), "--tasks", "arithmetic", *out]) == 0
        samples = (scores / "samples_arithmetic.jsonl").read_text()
        answers.append([json.loads(line)["resps"] for line in samples.splitlines()])
    assert answers[0] == answers[1]


def test_a_generation_config_does_not_leak_into_rollouts_under_a_wrapper(tmp_path):
    """FSDP1's stands for the student, and passes on what it is asked for, not what it is told."""
    student = tmp_path / "student"
    assert main(["export", "--checkpoint", "embedded:base", "--output", str(student)]) == 0
    config = json.loads((student / "generation_config.json").read_text())
    digits = load_tokenizer(str(student)).convert_tokens_to_ids(list("0123456789"))
    (student / "generation_config.json").write_text(
        json.dumps({**config, "suppress_tokens": digits})
    )
    options = ["--model.student", str(student), "--samples.every_n_steps", "1"]
    run = launch(2, tmp_path / "run", *FSDP1, *options, steps=1)
    samples = (run / "samples" / "step_000001.jsonl").read_text().splitlines()
    assert any({*json.loads(line)["completion_ids"]} & {*digits} for line in samples)


def test_shards_without_a_sharded_strategy_are_refused(tmp_path, sharded_run, capsys):
    folder = str(copy_of(sharded_run, tmp_path))
    options = ["--output", folder, "--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert main(["fit", "--config", QUICKSTART, *LINE_SEARCH, *options]) == 2
    error = capsys.readouterr().err
    assert "holds shards; go on with --config strategy/fsdp2" in error


def test_predictions_of_all_ranks_are_put_together(tmp_path):
    options = [*FSDP2, "--data.validation_limit", "5"]
    folder = launch(2, tmp_path / "out", *options, command="predict")
    records = map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())
    assert [record["row"] for record in records] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", slow_but("fsdp2", *STRATEGIES))
def test_benchmarks_score_the_student_of_any_strategy(tmp_path, name):
    """Ranks share the work: chunks of four, of which there is an odd number."""
    callback = ["--trainer.callbacks+=callbacks.Benchmarks", "--trainer.callbacks.limit", "10"]
    callback += ["--trainer.callbacks.tasks", "[arithmetic]", "--trainer.callbacks.batch_size", "4"]
    engine = ["--model.engine", "probes.CountingEngine", "--model.engine.path"]
    none = ["--trainer.limit_val_batches", "0"]
    options = [*STRATEGIES[name], *callback, *none, *engine, str(tmp_path / "rank")]
    run = launch(2, tmp_path / "run", *options, steps=1)
    said = [(tmp_path / f"rank_{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert [[int(line.split()[0]) for line in lines[1:]] for lines in said] == [[4, 2], [4]]
    (row,) = [r for r in read_metrics(run / "metrics.csv") if "bench/arithmetic/avg@1" in r]
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    out = ["--output", str(tmp_path / "scores"), "--limit", "10", "--batch_size", "4"]
    assert main(["evaluate", "--model", checkpoint, "--tasks", "arithmetic", *out]) == 0
    scores = json.loads((tmp_path / "scores" / "results.json").read_text())["results"]
    assert float(row["bench/arithmetic/avg@1"]) == scores["arithmetic"]["avg@1,none"]
    assert float(row["bench/arithmetic/length"]) == scores["arithmetic"]["length,none"]


def test_what_the_first_rank_cannot_judge_stops_all(tmp_path):
    callback = ["--trainer.callbacks+=probes.Unjudged", "--trainer.callbacks.limit", "4"]
    callback += ["--trainer.callbacks.tasks", "[arithmetic]"]
    _, printed = fail(2, tmp_path / "run", *DDP, *callback, steps=1)
    assert "opd fit: error: nobody can judge this" in printed
    assert "rank 1: error: rank 0 has failed: nobody can judge this" in printed


def test_a_loss_that_is_not_a_number_stops_all_ranks_and_keeps_the_weights(tmp_path):
    probe = ["--model.objective", "probes.NaNOnRank1"]
    _, printed = fail(2, tmp_path / "run", *FSDP2, *probe, steps=4)
    assert "error: step 2, rank 1: the loss of prompt row" in printed
    assert "is not finite; the weights are those of step 1" in printed
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step=000001.ckpt"


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, sharded_run):
    run = copy_of(sharded_run, tmp_path)
    _, printed = fail(2, run, *FSDP2, "--ckpt_path", "last", steps=3, largest_file=1_000_000)
    last = run / "checkpoints" / "step=000002.ckpt"
    assert "step=000003.ckpt: cannot be written (rank" in printed
    assert f"the last whole checkpoint is {last}" in printed
    assert newest_checkpoint(run / "checkpoints") == last
    assert not list(run.glob("checkpoints/*.partial"))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("missing shard", "shard __1_0.distcp is missing"),
        ("short shard", "shard __1_0.distcp is cut short"),
        ("no metadata", ".metadata is missing"),
        ("partial", "it was still being written"),
    ],
)
def test_a_folder_that_is_not_whole_is_named_and_passed_over(
    tmp_path, sharded_run, broken, reason, caplog
):
    folder = copy_of(sharded_run, tmp_path) / "checkpoints"
    whole, other = folder / "step=000002.ckpt", folder / "step=000003.ckpt"
    shutil.copytree(whole, other)
    shard = other / "__1_0.distcp"
    if broken == "missing shard":
        shard.unlink()
    elif broken == "short shard":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif broken == "no metadata":
        (other / ".metadata").unlink()
    else:
        other = other.rename(folder / "step=000003.ckpt.partial")
    os.utime(other)
    assert newest_checkpoint(folder) == whole
    assert f"{other} is passed over: {reason}" in caplog.text
    with pytest.raises(UserError, match=f"{other.name}: is not a whole checkpoint: {reason}"):
        load_model(str(other))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What tests/kill.py compares with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return launch(2, folder, *kill.OPTIONS, steps=kill.STEPS)


def test_sigterm_in_the_first_validation_stops_all_ranks(tmp_path):
    """There is nothing to save yet, and nobody waits for anybody."""
    probe = "--trainer.callbacks+=probes.SigtermInFirstValidation"
    codes, printed = fail(2, tmp_path / "run", *FSDP2, probe, steps=100_000)
    assert printed.count("stopped by SIGTERM") == 2
    assert codes == [143, 143]


def test_a_checkpoint_of_another_optimizer_is_refused_in_one_line(tmp_path, sharded_run):
    sgd = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.001"]
    options = [*FSDP2, *sgd, "--model.optimizer.momentum", "0.9", "--ckpt_path", "last"]
    _, printed = fail(2, copy_of(sharded_run, tmp_path), *options, steps=3)
    assert "step=000002.ckpt: does not fit this run (rank" in printed
    assert "momentum_buffer" in printed


@pytest.mark.slow
def test_sigterm_on_one_rank_saves_the_step_and_the_resumed_run_ends_alike(tmp_path, undisturbed):
    run = tmp_path / "run"
    process = kill.start(run)
    kill.wait_for(lambda: len(list(run.glob("checkpoints/step*.ckpt"))) > 0, process)
    os.kill(kill.workers(process.pid)[1], signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 0
    saved = newest_checkpoint(run / "checkpoints")
    assert losses(run) == losses(undisturbed)[: int(saved.stem[-6:])]
    launch(2, run, *kill.OPTIONS, "--ckpt_path", "last", steps=kill.STEPS)
    assert_same(kill.final_state(run), kill.final_state(undisturbed))


@pytest.mark.slow
def test_three_random_kills_and_resumes_are_bit_identical(tmp_path, undisturbed):
    """Of one run; tests/kill.py does as many as you like."""
    kill.check(1, first_seed=0, folder=tmp_path, undisturbed=undisturbed, deaths=3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP2, DDP], ids=["fsdp2", "ddp"])
def test_a_rank_that_hangs_is_given_up(tmp_path, strategy):
    """After the strategy's timeout, here ten seconds; torchrun waits half a minute more."""
    run = tmp_path / "run"
    options = [*strategy, "--trainer.strategy.timeout", "0:00:10"]
    log = (tmp_path / "log").open("w+")
    command = torchrun_command(2, run, *options, steps=100_000)
    process = subprocess.Popen(command, stderr=log, stdout=log, env=launch_environment())
    kill.wait_for(lambda: (run / "metrics.csv").exists(), process)
    os.kill(kill.workers(process.pid)[1], signal.SIGSTOP)
    assert process.wait(timeout=100) != 0
    log.seek(0)
    assert "error: no contact with another rank, which has died, hangs" in log.read()


@pytest.mark.slow
def test_twenty_random_kills_and_resumes_are_bit_identical(tmp_path, undisturbed):
    kill.check(rounds=20, first_seed=3, folder=tmp_path, undisturbed=undisturbed)
