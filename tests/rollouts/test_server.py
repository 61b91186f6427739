"""Rollouts by a server: what goes there, what comes back, and what becomes of a run if it fails.

The servers here are threads that answer as ``opd serve`` does; test_served.py has real ones.
"""

import re
import threading
import time

import pytest
import torch
from conftest import (
    AUTO,
    FSDP2,
    QUIET,
    ROOT,
    assert_same_rollouts,
    fail,
    launch,
    load,
    opd_arguments,
    student_of,
)
from fake_server import FakeServer

from opd.cli.main import main
from opd.errors import LostServer, UserError
from opd.metrics_rows import read_metrics
from opd.models import load_model, load_tokenizer
from opd.prompts import PromptBatch, PromptFormat, tokenize_rows
from opd.rollouts import Sampler, TransformersEngine, VLLMServer, weight_stream
from opd.rollouts.engine import RolloutEngine
from opd.weights import Weights

SERVER = ["--model.engine", "opd.rollouts.VLLMServer"]
TEXTS = ["9", "what is 12 plus 30?", "add 7"]
SEEDS = [11, 12, 2**62]


@pytest.fixture
def served(tiny):
    server = FakeServer(tiny / "llama-student")
    yield server
    server.close()


@pytest.fixture
def embedded():
    server = FakeServer("embedded:base")
    yield server
    server.close()


class Setting:
    """A student, an engine that has it, and prompts."""

    def __init__(self, source, engine: RolloutEngine):
        self.model, self.tokenizer = load_model(str(source)).eval(), load_tokenizer(str(source))
        self.weights, self.engine = Weights(self.model), engine
        self.sampler = Sampler(12, 1.5, eos_token_ids=(1, *range(40, 46)), pad_token_id=2)
        self.batch = self.prompts(TEXTS)
        engine.start(self.model, self.weights, self.tokenizer)

    def prompts(self, texts):
        rows = [{"prompt": text} for text in texts]
        found = tokenize_rows(rows, self.tokenizer, PromptFormat(chat_template=False))
        return PromptBatch.collate(found, 2)

    def sample(self, engine=None, seeds=SEEDS):
        if engine is not None:
            engine.start(self.model, self.weights, self.tokenizer)
        return (engine or self.engine)(self.batch, self.sampler, seeds)

    def move(self):
        with self.weights.edit() as weights:
            for weight in weights:
                weight.mul_(1.5)


def engine_of(*servers, **options):
    return VLLMServer([server.url for server in servers], **{"start_timeout": 1.0, **options})


def test_completions_are_those_of_the_other_engine_before_and_after_a_change(tiny, served):
    setting = Setting(tiny / "llama-student", engine_of(served))
    first = setting.sample()
    assert_same_rollouts(first, setting.sample(TransformersEngine()))
    assert len(set(first.lengths.tolist())) > 1
    assert 0 < first.finished.sum() < 3
    setting.sample(seeds=[1, 2, 3])
    assert served.received == setting.engine.pushes == 1
    setting.move()
    changed = setting.sample()
    assert_same_rollouts(changed, setting.sample(TransformersEngine()))
    assert changed.completion_ids.tolist() != first.completion_ids.tolist()
    assert served.received == setting.engine.pushes == 2


def test_no_prompts_no_completions(tiny, served):
    setting = Setting(tiny / "llama-student", engine_of(served))
    assert len(setting.engine(setting.batch.select([]), setting.sampler, [])) == 0


def test_all_servers_get_the_weights(tiny, served):
    second = FakeServer(tiny / "llama-student")
    setting = Setting(tiny / "llama-student", engine_of(served, second))
    setting.sample()
    assert (served.received, second.received) == (1, 1)
    assert (served.asked, second.asked) == (3, 0)  # this is rank 0
    for name, weight in second.model.named_parameters():
        assert torch.equal(weight, setting.model.state_dict()[name])
    second.close()


# --- ahead ----------------------------------------------------------------------------------------


def test_what_is_sampled_ahead_is_of_the_weights_that_there_were(tiny, served):
    setting = Setting(tiny / "llama-student", engine_of(served, staleness=1))
    setting.engine.ahead(setting.batch, setting.sampler, SEEDS)
    before = setting.sample(TransformersEngine())
    setting.move()
    assert_same_rollouts(setting.sample(), before)
    assert served.received == 1
    assert_same_rollouts(setting.sample(), setting.sample(TransformersEngine()))  # once only
    assert served.received == 2


def test_what_is_judged_in_between_has_the_new_weights_and_takes_nothing_away(tiny, served):
    setting = Setting(tiny / "llama-student", engine_of(served, staleness=1))
    served.delay = 0.2
    setting.engine.ahead(setting.batch, setting.sampler, SEEDS)
    before = setting.sample(TransformersEngine())
    setting.move()
    others = [5, 6, 7]
    expected = setting.sample(TransformersEngine(), seeds=others)
    assert_same_rollouts(setting.sample(seeds=others), expected)
    assert_same_rollouts(setting.sample(), before)


def test_nothing_is_sampled_ahead_unless_it_may_be(tiny, served):
    setting = Setting(tiny / "llama-student", engine_of(served))
    setting.engine.ahead(setting.batch, setting.sampler, SEEDS)
    assert served.received == served.asked == 0


def completions(run, step):
    path = sorted((run / "samples").glob("*.jsonl"))[step]
    return re.findall(r'"completion": "[^"]*"', path.read_text())


def column(run, name):
    return [float(row[name]) for row in read_metrics(run / "metrics.csv") if name in row]


def test_a_run_samples_each_step_with_the_weights_before_the_last_one(fit, embedded):
    """Steps 2 and 3 see what the student was one step before; the others' losses are as without."""
    every = ["--samples.every_n_steps", "1", "--model.optimizer.lr", "0.01"]
    ahead = [*SERVER, "--model.engine.url", embedded.url, "--model.engine.staleness", "1"]
    run, plain = fit("ahead", *every, *ahead, steps=3), fit("plain", *every, steps=3)
    assert completions(run, 0) == completions(plain, 0)
    gaps = column(run, "rollout/engine_logprob_gap")
    assert gaps[0] < 1e-4
    assert min(gaps[1:]) > 0.01
    frozen = fit("frozen", *every, "--model.optimizer.lr", "0", steps=2)

    assert len(completions(run, 1)) == len(completions(frozen, 1)) > 0
    assert completions(run, 1) == completions(frozen, 1)
    assert completions(run, 1) != completions(plain, 1)
    assert embedded.received == 1 + 2  # after step 1; after step 2, for what validates


@pytest.mark.slow
def test_a_run_is_that_of_the_other_engine_with_searches_and_after_a_resume(fit, embedded):
    server = [*AUTO, *SERVER, "--model.engine.url", embedded.url]
    plain = fit("plain", *AUTO, steps=3)
    fit("served", *server, steps=2)
    run = fit("served", *server, "--ckpt_path", "last", steps=3)
    assert column(run, "opd/loss") == pytest.approx(column(plain, "opd/loss"), rel=1e-5)
    for name, weight in student_of(load(plain)).items():
        torch.testing.assert_close(student_of(load(run))[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_ranks_with_shards_are_one(tmp_path, fit, embedded):
    second = FakeServer("embedded:base")
    urls = ["--model.engine.url", f"[{embedded.url}, {second.url}]"]
    alone = fit("alone", steps=2)
    run = launch(2, tmp_path / "two", *FSDP2, *SERVER, *urls, steps=2)
    assert column(run, "opd/loss") == pytest.approx(column(alone, "opd/loss"), rel=1e-4)
    assert embedded.asked == second.asked > 0
    second.close()


@pytest.mark.slow
def test_two_ranks_sample_ahead_alike_where_one_has_no_prompts(tmp_path, fit, embedded):
    """Batches of 8 and 1 in turn: of the second, the other rank has none."""
    nine = tmp_path / "nine.jsonl"
    nine.write_text("".join((ROOT / "tests/additions.jsonl").open().readlines()[:9]))
    ahead = ["--data.train", str(nine), *SERVER, "--model.engine.url", embedded.url]
    ahead += ["--model.engine.staleness", "1"]
    one = fit("one", *ahead, "--data.validation_limit", "8", steps=4)
    two = launch(2, tmp_path / "two", *FSDP2, *ahead, steps=4)
    assert column(two, "rollout/length_mean") == column(one, "rollout/length_mean")
    assert column(two, "opd/loss") == pytest.approx(column(one, "opd/loss"), rel=1e-4)


# --- servers that fail ----------------------------------------------------------------------------


def run_with(server, capsys, tmp_path, *arguments, steps=2):
    """Run, and return the exit code and what stands on the last line."""
    url = server if isinstance(server, str) else server.url
    options = [*SERVER, "--model.engine.url", url, "--model.engine.start_timeout", "1"]
    code = main(opd_arguments(tmp_path / "run", *options, *arguments, steps=steps))
    return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]


def test_a_server_that_is_not_there(capsys, tmp_path):
    code, line = run_with("http://127.0.0.1:9", capsys, tmp_path)
    assert code == 2
    assert "VLLMServer: no server at http://127.0.0.1:9 within 1 s (Connection refused)" in line


def test_a_server_that_is_still_starting_is_waited_for(tiny):
    server = FakeServer(tiny / "llama-student", ready=False)
    threading.Timer(0.5, lambda: setattr(server, "ready", True)).start()
    assert len(Setting(tiny / "llama-student", engine_of(server, start_timeout=20)).sample()) == 3
    server.ready = False
    with pytest.raises(UserError, match=r"no server at .* within 0.3 s \(HTTP 503\)"):
        Setting(tiny / "llama-student", engine_of(server, start_timeout=0.3))
    server.close()


def test_a_server_of_another_model(capsys, tmp_path, served):
    code, line = run_with(served, capsys, tmp_path)
    assert code == 2
    assert "llama-student, which is no model like the student: vocab_size 299" in line
    assert "hidden_size 32, the student's is" in line


def test_an_address_that_is_none(capsys, tmp_path):
    code, line = run_with("localhost:8000", capsys, tmp_path)
    assert code == 2
    assert "'localhost:8000' is no address of a server, as http://HOST:PORT" in line


def test_a_server_that_dies_stops_the_run_which_goes_on_with_another(capsys, tmp_path, fit):
    """The step that it died in is taken again, and the run ends as one without troubles."""
    server = FakeServer("embedded:base")
    generate = server.generate

    def die_in_the_second_step(body):
        if server.received == 2:
            server.close()
            raise ConnectionError
        return generate(body)

    server.generate = die_in_the_second_step
    code, line = run_with(server, capsys, tmp_path, "--trainer.limit_val_batches", "0", steps=3)
    assert code == 2
    assert re.search(r"VLLMServer: the server at http://\S+ is gone or cannot be reached", line)
    assert load(tmp_path / "run")["global_step"] == 1
    another = FakeServer("embedded:base")
    rest = ["--ckpt_path", "last", "--trainer.limit_val_batches", "0"]
    code, _ = run_with(another, capsys, tmp_path, *rest, steps=3)
    assert code == 0
    another.close()
    short = ["--data.validation_limit", "8", "--trainer.limit_val_batches", "0"]
    whole = fit("whole", *short, steps=3)
    ours = column(tmp_path / "run", "opd/loss")
    assert ours == pytest.approx(column(whole, "opd/loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("ill", "said"),
    [
        ("hang", "no answer from {url}/inference/v1/generate within 1 s: it hangs"),
        ("abort", "{url}: ended a completion because of 'abort'"),
        ("refuse", "{url}/collective_rpc answers with HTTP 500: no room for these weights"),
    ],
)
def test_a_server_that_misbehaves_is_a_line(tiny, served, ill, said):
    setting = Setting(
        tiny / "llama-student", engine_of(served, timeout=1.0 if ill == "hang" else 30.0)
    )
    served.ill = ill
    start = time.monotonic()
    with pytest.raises(LostServer, match=re.escape(said.format(url=served.url))):
        setting.sample()
    assert time.monotonic() - start < 10


def test_a_server_that_cannot_reach_the_training_is_a_line(tiny, served, monkeypatch):
    monkeypatch.setattr(served, "take_over", lambda *_: time.sleep(3))
    setting = Setting(tiny / "llama-student", engine_of(served, timeout=1.0))
    with pytest.raises(LostServer, match=r"has not come for the student's weights to 127\.0\.0\.1"):
        setting.sample()


def test_completions_that_do_not_fit_are_refused(tiny):
    server = FakeServer(tiny / "llama-student", max_tokens=14)
    setting = Setting(tiny / "llama-student", engine_of(server))
    with pytest.raises(
        UserError, match=r"take 14 tokens .* a prompt of \d+ and a completion of 12"
    ):
        setting.sample()
    server.close()


def test_a_rank_whose_server_fails_ends_all(tmp_path):
    first, second = FakeServer("embedded:base"), FakeServer("embedded:base")
    second.ill = "abort"
    urls = ["--model.engine.url", f"[{first.url}, {second.url}]", *QUIET]
    codes, printed = fail(2, tmp_path / "two", *FSDP2, *SERVER, *urls, steps=2)
    assert codes == [2, 2]
    assert "because of 'abort'" in printed
    for server in (first, second):
        server.close()


@pytest.mark.parametrize("options", [{"url": []}, {"at_once": 0}, {"timeout": 0.0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UserError, match=re.escape(next(iter(options)))):
        VLLMServer(**{"url": "http://localhost:8000", **options})


def test_weights_are_for_those_who_know_the_key():
    with weight_stream.listening("127.0.0.1") as listener:
        host, port = listener.getsockname()[:2]
        stranger = threading.Thread(
            target=lambda: list(weight_stream.receive(host, port, "x" * 32, 1.0)), daemon=True
        )
        stranger.start()
        with pytest.raises(OSError, match="timed out"):
            weight_stream.accept(listener, 1, "k" * 32, 1.0, [])
