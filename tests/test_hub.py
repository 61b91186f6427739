"""Models of the hub: from its cache without a network, and each of its failures in one line."""

import http.server
import os
import shutil
import threading
import time

import huggingface_hub.constants
import pytest
from conftest import QUICKSTART
from test_cli import error_of, fit_error
from test_families import prompts, tasks  # noqa: F401 - fixtures

from opd.cli import main
from opd.models import hub, load_model, load_tokenizer

COMMITS = {"main": "a" * 40, "tuned": "b" * 40}


@pytest.fixture(autouse=True)
def _ask_again():
    hub.unreachable.cache_clear()


@pytest.fixture
def cache(tiny, tmp_path, monkeypatch):
    """A hub's cache with two revisions of org/llama: blobs, and snapshots that link to them."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = root / "models--org--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for (revision, commit), source in zip(COMMITS.items(), ["student", "teacher"], strict=True):
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in (tiny / f"llama-{source}").iterdir():
            blob = repository / "blobs" / f"{commit[0]}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return repository


@pytest.fixture
def online(cache, monkeypatch):
    """Let the hub's client look for the hub at an address of ours."""

    def at(address):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    return at


@pytest.fixture
def answering(online):
    """A hub that answers all questions with a status and an error code, or not at all."""
    servers = []

    def start(status, code=""):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if not status:
                    time.sleep(5)
                self.send_response(status or 500)
                self.send_header("X-Error-Code", code)
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815 - http.server's name

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def norms(source):
    return [float(tensor.norm()) for tensor in load_model(source).state_dict().values()]


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache, tiny):
    student, teacher = (norms(str(tiny / f"llama-{role}")) for role in ("student", "teacher"))
    assert norms("org/llama") == norms("org/llama@main") == student != teacher
    assert norms("org/llama@tuned") == norms(f"org/llama@{COMMITS['tuned']}") == teacher
    assert load_tokenizer("org/llama@tuned").eos_token == "</s>"


def test_all_commands_take_models_of_the_cache(cache, prompts, tasks, tmp_path, capsys):  # noqa: F811
    models = ["--model.student", "org/llama", "--model.teacher", "org/llama@tuned"]
    models += ["--model.tokenizer", "org/llama@main", "--model.max_new_tokens", "4"]
    data = ["--data.train", str(prompts), "--data.validation", str(prompts)]
    options = ["--output", str(tmp_path / "run"), "--trainer.max_steps", "1"]
    assert main(["fit", "--config", QUICKSTART, *models, *data, *options]) == 0
    assert main(["evaluate", "--model", "org/llama@tuned", "--tasks", "sums"]) == 0
    out = str(tmp_path / "exported")
    assert main(["export", "--checkpoint", "org/llama@tuned", "--output", out]) == 0
    assert norms(out) == norms("org/llama@tuned")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/nope", "HF_HUB_OFFLINE is set, and there is no whole copy of it in the hub's cache"),
        ("nope", "HF_HUB_OFFLINE is set, and there is no whole copy of it in the hub's cache"),
        ("org/llama@nope", "HF_HUB_OFFLINE is set"),
        ("org/llama@", "names no revision after the @"),
        ("a b", "no hub id"),
        ("a/b/c", "no such model folder"),
    ],
)
def test_what_is_not_in_the_cache_is_named(cache, capsys, tmp_path, name, message):
    for line in (
        fit_error(capsys, tmp_path, "--model.student", name),
        fit_error(capsys, tmp_path, "--model.teacher", name),
        fit_error(capsys, tmp_path, "--model.tokenizer", name),
        error_of(capsys, "evaluate", "--model", name, "--tasks", "arithmetic"),
        error_of(capsys, "export", "--checkpoint", name, "--output", str(tmp_path / "x")),
    ):
        assert name in line
        assert message in line


def test_folders_have_no_revisions(capsys, tiny, tmp_path):
    source = f"{tiny / 'llama-student'}@main"
    assert "has no revisions" in fit_error(capsys, tmp_path, "--model.student", source)


def test_a_copy_without_weights_is_named(cache, capsys, tmp_path):
    (cache / "snapshots" / COMMITS["tuned"] / "model.safetensors").unlink()
    line = fit_error(capsys, tmp_path, "--model.student", "org/llama@tuned")
    assert "no weights in safetensors" in line


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated; ask for access on its page of the hub, and log in"),
        (404, "RepoNotFound", "no model of the hub that you can read; check the name"),
        (404, "RevisionNotFound", "org/new has no revision 'v2' on the hub"),
        (401, "", "log in with `hf auth login`"),
        (503, "", "the hub failed (Got: HfHubHTTPError: Server error '503"),
    ],
)
def test_what_the_hub_says_is_one_line(answering, capsys, tmp_path, status, code, message):
    answering(status, code)
    assert message in fit_error(capsys, tmp_path, "--model.student", "org/new@v2")


def test_without_a_network_the_cache_is_used_with_a_warning(online, caplog, capsys, tmp_path):
    online("http://127.0.0.1:9")  # nobody listens there
    assert norms("org/llama@tuned")
    assert "the hub cannot be reached for org/llama: trying its cache" in caplog.text
    line = fit_error(capsys, tmp_path, "--model.student", "org/new")
    assert "the hub cannot be reached (" in line
    assert "no whole copy of it in the hub's cache" in line


def test_a_hub_that_does_not_answer_is_not_waited_for(answering, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    answering(0)
    start = time.perf_counter()
    assert norms("org/llama")
    assert time.perf_counter() - start < 4
