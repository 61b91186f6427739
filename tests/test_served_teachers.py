"""Teachers behind a server against the same teachers in this process; and servers that fail.

The servers here are threads that answer as ``opd serve --role teacher`` does; real ones:
tests/rollouts/test_vllm_server.py.
"""

import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from conftest import fail, load, opd_arguments, slow_but, student_of
from test_reuse import column
from test_step import module_of, rollouts_of

from opd import stages
from opd.cli.main import main
from opd.errors import LostServer, UserError
from opd.metrics import token_metrics
from opd.models import load_head, load_model, load_tokenizer
from opd.module import OPDModule
from opd.objectives import GeneralizedJSD, PolicyGradient
from opd.teachers import served


class TeacherThread(ThreadingHTTPServer):
    """A server of hidden states.

    Attributes:
        ill: What it does instead of answering as it should: None, "hang", "short" or "scores".
        answers: How many there were.
        least: How long each takes, in seconds.
    """

    daemon_threads = True

    def __init__(self, source, port=0):
        self.source, self.model = str(source), load_model(str(source)).eval()
        self.ill, self.answers, self.least = None, 0, 0.0
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def states(self, token_ids):
        (body,) = [part for name, part in self.model.named_children() if name != "lm_head"]
        return [body(torch.tensor([ids])).last_hidden_state[0] for ids in token_ids]


class Handler(BaseHTTPRequestHandler):
    """Its routes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        model = {"id": self.server.source, "max_model_len": 512}
        self.answer(json.dumps({"data": [model]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["encoding_format"] == "bytes"
        assert asked["model"] == self.server.source
        self.server.answers += 1
        time.sleep(60 if self.server.ill == "hang" else self.server.least)
        states = self.server.states(asked["input"])
        if self.server.ill == "short":
            states = [state[1:] for state in states]
        shapes = [{"shape": list(state.shape)} for state in states]
        if self.server.ill == "scores":
            shapes = [{"shape": [1]} for _ in states]
        content = b"".join(
            state.to(getattr(torch, asked["embed_dtype"])).view(torch.uint8).numpy().tobytes()
            for state in states
        )
        self.answer(content, metadata=json.dumps({"data": shapes}))

    def answer(self, content, **headers):
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tiny):
    found = TeacherThread(tiny / "llama-teacher")
    yield found
    found.close()


@pytest.fixture
def embedded():
    found = TeacherThread("embedded:teacher")
    yield found
    found.close()


def module_with(tiny, teacher, **options):
    module = OPDModule(
        str(tiny / "llama-student"), teacher, max_new_tokens=16, temperature=1.3, **options
    )
    module.configure_model()
    for reader in module.teachers.readers.values():
        reader.to(torch.device("cpu"))
    return module


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_is_that_of_the_whole_model(tiny, family, dtype):
    source = str(tiny / f"{family}-teacher")
    head, whole = load_head(source, dtype=dtype), load_model(source, dtype=dtype)
    ours, theirs = head.get_output_embeddings(), whole.get_output_embeddings()
    assert torch.equal(ours.weight, theirs.weight)
    held = [name for name, p in head.named_parameters() if not p.is_meta]
    assert held == ["lm_head.weight"]


def test_a_served_teacher_thinks_what_it_thinks_here(tiny, server):
    """Every metric of every token, unequal lengths, one without tokens; and parts of it."""
    there, here = (module_with(tiny, at) for at in (server.url, str(tiny / "llama-teacher")))
    rollouts = rollouts_of(there)
    rollouts.lengths[:4] = torch.tensor([16, 0, 3, 7])
    readings = [stages.read(module, rollouts) for module in (there, here)]
    assert len(set(rollouts.lengths.tolist())) > 3
    for rows in [None, [5, 0, 1], []]:
        found, expected = (
            stages.compare(
                module,
                reading if rows is None else reading.select(rows),
                GeneralizedJSD(0.3),
                token_metrics,
            )
            for module, reading in zip((there, here), readings, strict=True)
        )
        for name, values in expected.values.items():
            torch.testing.assert_close(found.values[name], values, atol=1e-5, rtol=1e-4)
        assert len(expected.values["opd/loss"]) > 0 or rows == []


def test_a_part_of_a_part(tiny, server):
    module = module_with(tiny, server.url)
    opinion = stages.read(module, rollouts_of(module)).opinions["teacher"]
    assert opinion.select([4, 2, 0]).select([1, 2]).rows == (2, 0)


@pytest.mark.parametrize("objective", slow_but("GeneralizedJSD", "PolicyGradient", "ForwardKL"))
def test_a_run_is_that_with_the_local_teacher(fit, embedded, objective):
    options = ["--model.objective", f"opd.objectives.{objective}", "--model.temperature", "0.9"]
    options += ["--model.micro_batch_tokens", "100", "--data.format.teacher_rendering", "own"]
    run = fit("served", *options, "--model.teacher", embedded.url)
    plain = fit("plain", *options)
    assert column(run, "opd/loss") == pytest.approx(column(plain, "opd/loss"), rel=1e-4, abs=1e-6)
    for name, weight in student_of(load(plain)).items():
        torch.testing.assert_close(student_of(load(run))[name], weight, atol=1e-5, rtol=1e-3)


def test_one_teacher_here_and_one_there(tiny, server):
    local = str(tiny / "llama-student")
    module = module_with(tiny, {"here": local, "there": server.url})
    assert [type(teacher).__name__ for teacher in module.teachers.values()] == [
        "LocalTeacher",
        "ServedTeacher",
    ]
    assert module.teachers.ahead == 1
    assert module_with(tiny, local).teachers.ahead == 0


def test_the_server_works_while_the_student_does(tiny, server):
    """A micro-batch is asked for before the one before it is waited for."""
    module = module_with(tiny, server.url, objective=PolicyGradient(), micro_batch_tokens=40)
    server.answers, server.least = 0, 0.3
    reading = stages.read(module, rollouts_of(module))
    time.sleep(0.1)
    assert server.answers == 1
    with reading.opinions["teacher"].opened() as logits:
        assert logits(slice(0, 2)).shape == (2, module.teachers.vocabulary)


# --- servers that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ill", "said"),
    [
        ("hang", "no answer from {url}/pooling within 1 s: it hangs"),
        ("short", "was asked about ["),
        ("scores", "answers with something else than the hidden states of all tokens"),
    ],
)
def test_a_server_that_misbehaves_is_a_line(tiny, server, monkeypatch, ill, said):
    monkeypatch.setattr(served, "TIMEOUT", 1.0)
    module = module_with(tiny, server.url)
    server.ill = ill
    reading = stages.read(module, rollouts_of(module))
    with pytest.raises(LostServer, match=re.escape(said.format(url=server.url))):
        stages.compare(module, reading, PolicyGradient(), token_metrics)
    with pytest.raises(UserError, match=r"Was it started by `opd serve --role teacher --model "):
        module_with(tiny, server.url)


def test_a_server_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "START_TIMEOUT", 0.5)
    code = main(opd_arguments(tmp_path / "run", "--model.teacher", "http://127.0.0.1:9", steps=1))
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.teacher http://127.0.0.1:9: no server at http://127.0.0.1:9 within 0.5 s" in line


def test_a_teacher_of_another_family(capsys, tmp_path, server):
    code = main(opd_arguments(tmp_path / "run", "--model.teacher", server.url, steps=1))
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"llama-teacher: its tokenizer differs from the student's", line)


def test_a_server_that_dies_stops_the_run_before_the_step(capsys, caplog, tmp_path, embedded):
    states = embedded.states

    def die(token_ids):
        if embedded.answers > 4:
            embedded.close()
            raise ConnectionError
        return states(token_ids)

    embedded.states = die
    options = ["--model.teacher", embedded.url, "--trainer.limit_val_batches", "0"]
    code = main(opd_arguments(tmp_path / "run", *options, steps=50))
    assert code == 2
    assert "is gone or cannot be reached" in capsys.readouterr().err.strip().splitlines()[-1]
    step = load(tmp_path / "run")["global_step"]
    assert 1 <= step < 5
    assert f"step {step} is saved; go on with --ckpt_path last" in caplog.text
    again = TeacherThread("embedded:teacher", embedded.server_port)
    command = opd_arguments(tmp_path / "run", *options, "--ckpt_path", "last", steps=step + 1)
    assert main(command) == 0
    again.close()


def test_a_rank_whose_teacher_fails_ends_all(tmp_path, embedded):
    embedded.ill = None
    states, calls = embedded.states, []

    def once_too_often(token_ids):
        calls.append(1)
        return [state[1:] for state in states(token_ids)] if len(calls) == 5 else states(token_ids)

    embedded.states = once_too_often
    options = ["--model.teacher", embedded.url, "--trainer.strategy", "ddp"]
    options += ["--trainer.limit_val_batches", "0"]
    codes, printed = fail(2, tmp_path / "two", *options, steps=6)
    assert codes == [2, 2]
    assert "was asked about" in printed


def test_what_it_knows_of_its_model(tiny, server):
    teacher = module_with(tiny, server.url).teachers["default"]
    assert teacher.context == 512
    assert teacher.whole is None
    assert load_tokenizer(teacher.server.model).get_vocab()
    assert module_of(tiny).teachers["default"].context == 128
