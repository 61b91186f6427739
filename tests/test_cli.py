"""The front door: bad input ends with exit code 2 and one line; good input with files."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from conftest import QUICKSTART, SHRUNK, assert_same, copy_of, load, slow_but
from safetensors import SafetensorError

from opd.cli import COMMANDS, main, recipes, run_folder
from opd.embedded.build import build_model, build_tokenizer


def error_of(capsys, *arguments):
    """Run a command that must fail; returns its line on stderr."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    return lines[0]


def fit_error(capsys, tmp_path, *arguments):
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "run")]
    return error_of(capsys, "fit", "--config", QUICKSTART, *SHRUNK, *output, *arguments)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_unknown_key(capsys, tmp_path):
    assert "--model.studnt" in fit_error(capsys, tmp_path, "--model.studnt", "x")
    extra = write(tmp_path / "extra.yaml", "model: {temprature: 2}\n")
    assert "model.temprature" in fit_error(capsys, tmp_path, "--config", extra)


def test_wrong_type(capsys, tmp_path):
    line = fit_error(capsys, tmp_path, "--data.batch_size", "many")
    assert "data.batch_size" in line
    assert "many" in line


def test_missing_files(capsys, tmp_path):
    nope = str(tmp_path / "nope")
    assert f"{nope}: there is no such model" in fit_error(capsys, tmp_path, "--model.student", nope)
    assert nope in fit_error(capsys, tmp_path, "--model.teacher", nope)
    assert f"{nope}.jsonl" in fit_error(capsys, tmp_path, "--data.train", f"{nope}.jsonl")
    assert f"{nope}.yaml" in error_of(capsys, "fit", "--config", f"{nope}.yaml")
    assert "no such checkpoint" in fit_error(capsys, tmp_path, "--ckpt_path", f"{nope}.ckpt")


def test_broken_line(capsys, tmp_path):
    text = '{"prompt": "1+1="}\n{"prompt": "1+2="}\n{"prompt": oops}\n'
    prompts = write(tmp_path / "p.jsonl", text)
    assert f"{prompts} line 3: not valid JSON" in fit_error(
        capsys, tmp_path, "--data.train", prompts
    )


def test_empty_prompts(capsys, tmp_path):
    empty = write(tmp_path / "empty.jsonl", "")
    assert "holds no prompts" in fit_error(capsys, tmp_path, "--data.train", empty)
    blank = write(tmp_path / "blank.jsonl", '{"prompt": "1"}\n{"prompt": ""}\n')
    assert "line 2: needs a non-empty" in fit_error(capsys, tmp_path, "--data.train", blank)


def test_models_that_do_not_fit(capsys, tmp_path):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.resize_token_embeddings(16)
    model.save_pretrained(tmp_path / "vocabulary")
    tokenizer.save_pretrained(tmp_path / "vocabulary")
    tokenizer.add_tokens(["x"])
    model.save_pretrained(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, message in [("vocabulary", "vocabulary has 16"), ("tokenizer", "tokenizer differs")]:
        teacher = str(tmp_path / name)
        assert message in fit_error(capsys, tmp_path, "--model.teacher", teacher)


def test_completions_beyond_the_context(capsys, tmp_path):
    line = fit_error(capsys, tmp_path, "--model.max_new_tokens", "500")
    assert "context of 128 tokens" in line


def test_output_that_cannot_be_written(capsys, tmp_path):
    blocked = write(tmp_path / "file", "") + "/run"
    assert "cannot be written" in fit_error(capsys, tmp_path, "--output", blocked)
    assert "cannot be written" in fit_error(capsys, tmp_path, "--output", "/proc/run")
    assert "cannot be written" in error_of(
        capsys, "evaluate", "--model", "embedded:base", "--tasks", "arithmetic", "--output", blocked
    )


def test_bfloat16_master_weights(capsys, tmp_path):
    line = fit_error(capsys, tmp_path, "--trainer.precision", "bf16-true")
    assert "bf16-mixed" in line


def test_effopd_without_answers_names_the_label_free_preset(capsys, tmp_path):
    prompts = write(tmp_path / "p.jsonl", '{"prompt": "123+456="}\n' * 4)
    search = "--trainer.callbacks+=callbacks.EffOPD"
    line = fit_error(capsys, tmp_path, "--data.train", prompts, search)
    assert "--config effopd/label_free" in line


def test_wrong_effopd_option(capsys, tmp_path):
    search = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "sometimes"]
    assert "EffOPD.schedule 'sometimes' must be" in fit_error(capsys, tmp_path, *search)


def test_two_searches_in_one_run(capsys, tmp_path):
    search = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks+=callbacks.EffOPD"]
    assert "EffOPD is there twice; keep one" in fit_error(capsys, tmp_path, *search)


@pytest.mark.slow
def test_other_commands(capsys, tmp_path):
    nope = str(tmp_path / "nope")
    evaluate = ["evaluate", "--model", "embedded:base", "--tasks"]
    assert "no such task" in error_of(capsys, *evaluate, "nope")
    assert "--sampels" in error_of(capsys, *evaluate, "arithmetic", "--sampels", "3")
    assert "must be at least 1" in error_of(capsys, *evaluate, "arithmetic", "--samples", "0")
    assert "no such model" in error_of(capsys, "export", "--checkpoint", nope, "--output", nope)
    assert "does not exist" in error_of(capsys, "report", nope, "--output", f"{nope}.html")
    full = write(tmp_path / "file", "")
    base = ["export", "--checkpoint", "embedded:base", "--output"]
    assert "is not empty" in error_of(capsys, *base, str(tmp_path))
    assert "cannot be written" in error_of(capsys, *base, full)
    assert main(["fitt"]) == 2
    assert main([]) == 2


FULL_DISK = {
    "transformers.PreTrainedModel.save_pretrained": SafetensorError("I/O error: No space left"),
    "pathlib.Path.write_text": OSError(28, "No space left on device"),  # of the card, the last file
}


@pytest.mark.parametrize("what", FULL_DISK)
@pytest.mark.parametrize("exists", [True, False])
def test_export_is_all_or_nothing(capsys, tmp_path, monkeypatch, what, exists):
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()
    arguments = ["export", "--checkpoint", "embedded:base", "--output", str(folder)]
    with monkeypatch.context() as patches:
        patches.setattr(what, Mock(side_effect=FULL_DISK[what]))
        line = error_of(capsys, *arguments)
    assert "cannot be written" in line
    assert "No space left" in line
    assert folder.is_dir() == exists
    assert [*tmp_path.rglob("*")] == ([folder] if exists else [])
    assert main(arguments) == 0
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in folder.iterdir()}
    assert "http" not in (folder / "README.md").read_text()  # there is no page to link to


def test_a_folder_with_a_run_is_not_overwritten_by_accident(capsys, vanilla, fit, tmp_path):
    folder = copy_of(vanilla, tmp_path)
    line = error_of(capsys, "fit", "--config", QUICKSTART, "--output", str(folder))
    assert "--ckpt_path last" in line
    assert "--overwrite true" in line
    before = (folder / "summary.json").read_text()
    fit("run", "--overwrite", "true", "--seed_everything", "1", steps=1)
    assert (
        json.loads((folder / "summary.json").read_text())["seed"] == 1 != json.loads(before)["seed"]
    )


def test_help_names_every_command_and_explains_the_keys(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    for key in ("--output", "--model.student", "--model.max_new_tokens", "--data.batch_size"):
        assert key in text
    assert "Longest completion in tokens" in text


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["fitt"], "did you mean fit?"),
        (["evalaute"], "did you mean evaluate?"),
        (["xyz"], "see opd --help"),
    ],
)
def test_a_misspelt_command_is_told_the_near_one(capsys, typed, said):
    assert main(typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(typed[0]) in line
    assert said in line


def test_help_and_version(capsys):
    assert main(["--help"]) == main(["help"]) == 0
    one, other = capsys.readouterr().out.split("On-policy")[1:]
    assert one.strip() == other.strip()
    with pytest.raises(SystemExit) as ended:
        main(["help", "report"])
    assert ended.value.code == 0
    assert "usage: opd report" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"opd {importlib.metadata.version('opd')}\n"


@pytest.mark.parametrize("arguments", slow_but(["--help"], ["report", "--help"]))
def test_nobody_reads_what_is_printed(arguments):
    """As in `opd --help | head -1`, where head ends before all is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "opd.cli", *arguments]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ran.stderr == ""
    assert ran.returncode in (0, 128 + signal.SIGPIPE)  # argparse does not mind


def test_help_of_what_needs_no_training_does_not_load_lightning():
    script = "import sys; from opd.cli import main; main(['--help']); main(['fitt'])\n"
    script += "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


NAMES = "controls/alphaopd, controls/average, controls/exopd, controls/fixed_negative, "
NAMES += "controls/lookahead, controls/oracle, controls/prodigy, controls/random_direction, "
NAMES += "controls/relex, controls/schedule_free, controls/snoo, controls/two_point, "
NAMES += "conversations, effopd/auto, effopd/label_free, effopd/line_search, effopd/paper, "
NAMES += "effopd/published_code, long, "
NAMES += "paper/code_1.7b, paper/code_4b, paper/math_1.7b, paper/math_4b, quickstart, reuse, "
NAMES += "rl/dapo, rl/grpo, rl/ppo, "
NAMES += "smollm2, "
NAMES += "strategy/ddp, strategy/fsdp1, strategy/fsdp2"


def lr_of(capsys, *configs: str) -> float:
    """The learning rate that a configuration comes to."""
    capsys.readouterr()
    options = [word for config in configs for word in ("--config", config)]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    return config["model"]["optimizer"]["init_args"]["lr"]


def test_recipes_have_names_and_a_path_is_a_path(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lr_of(capsys, "quickstart", "effopd/paper") == 1e-4
    other = "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.25}}}\n"
    assert lr_of(capsys, "quickstart", other) == 0.25
    (tmp_path / "quickstart").mkdir()  # a folder is no configuration
    assert lr_of(capsys, "quickstart") == 1e-4
    write(tmp_path / "quickstart.yaml", Path(QUICKSTART).read_text().replace("1.0e-4", "0.5"))
    assert lr_of(capsys, "quickstart") == 1e-4
    assert lr_of(capsys, "quickstart.yaml") == lr_of(capsys, "./quickstart.yaml") == 0.5
    (tmp_path / "effopd").mkdir()
    (tmp_path / "quickstart.yaml").rename(tmp_path / "effopd" / "paper")
    assert lr_of(capsys, "effopd/paper") == 0.5


@pytest.mark.parametrize("name", ["quickstrat", "./quickstart", "quick", "study/quickstart", ""])
def test_an_unknown_recipe_is_told_the_names_there_are(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, "fit", "--config", name)
    assert f"--config {name}: there is no such file" in line
    assert line.endswith(f"there are {NAMES}")


def test_a_path_of_a_checkout_elsewhere_is_told_the_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_of(capsys, "fit", "--config", "configs/effopd/paper.yaml")
    assert line.endswith("there is no such file here; by name it is effopd/paper")
    line = error_of(capsys, "study", "--config", "quickstart")
    assert line.endswith("study/controls, study/long, study/quickstart, study/results")


@pytest.mark.parametrize(
    ("config", "recipe"),
    [("quickstart", "quickstart"), ("effopd/paper", "paper"), (QUICKSTART, "quickstart")],
)
def test_a_run_folder_is_named_after_the_first_recipe(tmp_path, monkeypatch, config, recipe):
    """A name has the folder that its path has."""
    monkeypatch.chdir(tmp_path)
    configs = [recipes.find(config), recipes.find("strategy/ddp")]
    folder, made = run_folder.choose(None, configs)
    assert folder.parent == Path("runs") / recipe
    assert made == [folder, Path("runs") / recipe, Path("runs")]


def test_a_refused_run_leaves_no_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    refused = ["fit", "--config", "quickstart", "--model.student", "nothing/here/at/all"]
    assert main([*refused, "--output", "runs/some/where"]) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


@pytest.mark.slow
def test_commands_work_from_any_directory(tmp_path):
    command = [sys.executable, "-m", "opd.cli", "evaluate", "--model", "embedded:base"]
    options = ["--tasks", "arithmetic", "--limit", "8", "--output", "out"]
    subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n-samples"]["arithmetic"]["effective"] == 8


def test_predict_writes_completions_with_teacher_scores(tmp_path):
    output = tmp_path / "predictions"
    options = ["--output", str(output), "--data.validation_limit", "5"]
    assert main(["predict", "--config", QUICKSTART, *options]) == 0
    records = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(5))
    for record in records:
        length = len(record["completion_ids"])
        for name in ("engine_logprob", "student_logprob", "teacher_logprob", "reverse_kl"):
            assert len(record[name]) == length
        assert record["student_logprob"] == pytest.approx(record["engine_logprob"], abs=1e-4)
        assert min(record["reverse_kl"]) > -1e-6


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_score_a_student(command, capsys):
    options = ["--data.validation_limit", "8"]
    assert main([command, "--config", QUICKSTART, *options]) == 0
    prefix = "val" if command == "validate" else "test"
    assert f"{prefix}/accuracy" in capsys.readouterr().out


def test_a_run_folder_is_complete(vanilla):
    assert {"config.yaml", "metrics.csv", "summary.json", "samples", "checkpoints"} <= {
        path.name for path in vanilla.iterdir()
    }
    assert list(vanilla.glob("events.out.tfevents.*"))
    summary = json.loads((vanilla / "summary.json").read_text())
    assert set(summary) == {
        *("steps", "seed", "accuracy", "reverse_kl", "cost", "extrapolation", "versions")
    }
    assert summary["steps"] == 3
    assert set(summary["accuracy"]) == {"initial", "final"}
    sample = json.loads((vanilla / "samples" / "step_000002.jsonl").read_text().splitlines()[0])
    assert len(sample["reverse_kl"]) == len(sample["completion_ids"])


def test_the_saved_configuration_repeats_the_run(fit, tmp_path):
    first = fit("first", "--model.optimizer.lr", "3e-4", steps=1)
    output = ["--output", str(tmp_path / "again")]
    assert main(["fit", "--config", str(first / "config.yaml"), *output]) == 0
    assert_same(load(tmp_path / "again")["state_dict"], load(first)["state_dict"])
