"""``opd serve`` for real, and runs that it samples for: ``make test-vllm``."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import kill
import pytest
from conftest import ROOT, assert_same_rollouts, launch, opd_arguments, save_llama
from test_server import FSDP2, SERVER, Setting, column

from opd.cli.main import main
from opd.errors import UserError
from opd.metrics_rows import read_metrics
from opd.rollouts import TransformersEngine, VLLMServer

pytestmark = pytest.mark.vllm


class Served:
    """A server in a process group of its own."""

    def __init__(self, folder, source, *options, port=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"serve-{self.port}.log"
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = ["serve", "--model", str(source), "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd.cli", *command],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def kill(self, by=signal.SIGKILL):
        os.killpg(self.process.pid, by)
        if by == signal.SIGKILL:
            self.process.wait()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "llama"
    save_llama(folder, 0, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    return folder


@pytest.fixture(scope="module")
def tiny_server(llama):
    server = Served(llama.parent, llama, "--dtype", "float32")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    server = Served(folder, "embedded:base", "--dtype", "float32", "--", "--seed", "3")
    yield server
    server.kill()


def test_completions_are_those_of_the_other_engine_before_and_after_a_change(llama, tiny_server):
    setting = Setting(llama, VLLMServer(tiny_server.url))
    first = setting.sample()
    assert_same_rollouts(first, setting.sample(TransformersEngine()))
    setting.move()
    changed = setting.sample()
    assert_same_rollouts(changed, setting.sample(TransformersEngine()))
    assert changed.completion_ids.tolist() != first.completion_ids.tolist()


def test_another_model_is_refused(tiny_server):
    with pytest.raises(UserError, match=r"no model like the student: vocab_size 299"):
        Setting("embedded:base", VLLMServer(tiny_server.url))


@pytest.mark.parametrize("staleness", ["0", "1"])
def test_a_run_learns_as_with_the_other_engine(tmp_path, fit, embedded, staleness):
    options = ["--model.optimizer.lr", "3e-4"]
    server = [*SERVER, "--model.engine.url", embedded.url, "--model.engine.staleness", staleness]
    run, plain = fit("served", *options, *server, steps=8), fit("plain", *options, steps=8)
    if staleness == "0":
        assert column(run, "opd/loss") == pytest.approx(column(plain, "opd/loss"), rel=1e-4)
    kls = [float(row["val/reverse_kl"]) for row in rows_of(run) if "val/reverse_kl" in row]
    theirs = [float(row["val/reverse_kl"]) for row in rows_of(plain) if "val/reverse_kl" in row]
    assert kls[0] == pytest.approx(theirs[0], rel=1e-4)
    assert kls[-1] < 0.9 * kls[0]
    assert theirs[-1] < 0.9 * theirs[0]


def rows_of(run):
    return read_metrics(run / "metrics.csv")


def test_two_ranks_with_shards_are_one(tmp_path, fit, embedded):
    run = launch(2, tmp_path / "two", *FSDP2, *SERVER, "--model.engine.url", embedded.url, steps=2)
    alone = fit("alone", steps=2)
    assert column(run, "opd/loss") == pytest.approx(column(alone, "opd/loss"), rel=1e-4)


def test_shards_and_searches_go_on_after_sigkill_bit_for_bit(tmp_path, monkeypatch, embedded):
    """Killed whenever, perhaps while it sends weights: the server is there for the next."""
    monkeypatch.setattr(
        kill, "OPTIONS", [*kill.OPTIONS, *SERVER, "--model.engine.url", embedded.url]
    )
    undisturbed = launch(2, tmp_path / "undisturbed", *kill.OPTIONS, steps=kill.STEPS)
    kill.check(2, 0, tmp_path, undisturbed)


def test_all_workers_of_a_server_get_the_weights(llama):
    server = Served(llama.parent, llama, "--dtype", "float32", "--tensor_parallel", "2")
    setting = Setting(llama, VLLMServer(server.url))
    assert_same_rollouts(setting.sample(), setting.sample(TransformersEngine()))
    setting.move()
    assert_same_rollouts(setting.sample(), setting.sample(TransformersEngine()))
    server.kill()


def test_a_server_that_is_killed_or_hangs_stops_the_run_which_goes_on(tmp_path, capsys, embedded):
    """Killed in mid-run; stopped, so that it hangs; and started again at the same address."""
    server = Served(tmp_path, "embedded:base", "--dtype", "float32")
    options = [*SERVER, "--model.engine.url", server.url, "--trainer.limit_val_batches", "0"]
    command = opd_arguments(tmp_path / "run", *options, steps=400)
    command += ["--model.engine.timeout", "20"]
    run = subprocess.Popen(
        [sys.executable, "-m", "opd.cli", *command], stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(tmp_path / "run", 3)
    server.kill()
    _, printed = run.communicate(timeout=120)
    assert run.returncode == 2
    assert re.search(rf"VLLMServer: the server at {server.url} is gone", printed), printed
    assert "go on with --ckpt_path last" in printed

    again = Served(tmp_path, "embedded:base", "--dtype", "float32", port=server.port)
    run = subprocess.Popen(
        [sys.executable, "-m", "opd.cli", *command, "--ckpt_path", "last"],
        stderr=subprocess.PIPE,
        text=True,
    )
    reached = len(rows_of(tmp_path / "run"))
    wait_for_steps(tmp_path / "run", reached + 2)
    again.kill(signal.SIGSTOP)
    _, printed = run.communicate(timeout=180)
    again.kill()
    assert run.returncode == 2
    assert "within 20 s: it hangs, or needs a longer timeout" in printed, printed

    rest = [*SERVER, "--model.engine.url", embedded.url, "--trainer.limit_val_batches", "0"]
    reached = len(rows_of(tmp_path / "run"))
    command = opd_arguments(tmp_path / "run", *rest, "--ckpt_path", "last", steps=reached + 1)
    assert main(command) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")][-1] == str(reached + 1)


def wait_for_steps(run, count, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.csv").exists() and len(rows_of(run)) >= count:
            return
        time.sleep(0.2)
    raise AssertionError(f"{run} has not taken {count} steps in time")


def test_a_teacher_that_is_served_is_the_teacher(tmp_path, fit):
    """Twice the same prompts: a cache of prefixes would leave out hidden states."""
    server = Served(tmp_path, "embedded:teacher", "--role", "teacher", "--dtype", "float32")
    options = ["--model.micro_batch_tokens", "200", "--model.rollouts_per_prompt", "2"]
    run = fit("served", *options, "--model.teacher", server.url, steps=3)
    server.kill()
    plain = fit("plain", *options, steps=3)
    assert column(run, "opd/loss") == pytest.approx(column(plain, "opd/loss"), rel=1e-4)
    for name in ("opd/teacher_entropy", "opd/forward_kl", "val/reverse_kl"):
        assert column(run, name) == pytest.approx(column(plain, name), rel=1e-3)


def test_a_server_for_rollouts_is_no_teacher(capsys, tmp_path, embedded):
    command = opd_arguments(tmp_path / "run", "--model.teacher", embedded.url, steps=1)
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "Was it started by `opd serve --role teacher --model embedded:base`?" in printed


def test_a_model_that_is_none_is_a_line(capsys):
    assert main(["serve", "--model", "./nothing"]) == 2
    assert "./nothing: there is no such model folder" in capsys.readouterr().err
