"""The recipes of the paper: parsed whole, and run shrunk on tiny models and made-up rows."""

import json
from collections.abc import Iterator

import datasets
import pytest
import torch
import yaml
from conftest import CPU, QUIET, ROOT, byte_level_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from eval.benchmarks.table import benchmarks
from eval.evaluate import read_suite
from opd.cli import main

FOLDER = ROOT / "configs" / "paper"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SENTENCES = {
    "math": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "code": "\nYou need to think first then write the Python code.",
}
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# What Qwen3's does with these turns: without thinking, the answer begins after an empty thought.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
SUM = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
SHRUNK = {
    "model.max_new_tokens": 6,
    "data.batch_size": 4,
    "data.validation_limit": 2,
    "trainer.max_steps": 1,
}


def save_qwen(folder, seed):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(MARKS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def deepmath(i):
    """Every third row is hard enough."""
    facts = {"topic": "Sums", **{f"r1_solution_{k}": "long" for k in (1, 2, 3)}}
    difficulty = [5.0, 6.0, 4.5][i % 3]
    return {"question": f"Add {i}.", "final_answer": str(i), "difficulty": difficulty, **facts}


def eurus(i):
    """Every second row is of code; each has a system turn."""
    ability = "code" if i % 2 else "math"
    return {
        **{"data_source": "taco", "ability": ability, "extra_info": {"split": "x", "index": i}},
        "prompt": [
            {"content": "[ASSESS]", "role": "system"},
            {"content": f"{ability}: add {i}.", "role": "user"},
        ],
        "reward_model": {"ground_truth": SUM if i % 2 else str(i), "style": "rule"},
    }


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """Options for each kind of recipe: models, and folders as the hub has its data sets."""
    folder = tmp_path_factory.mktemp("paper")
    for seed, role in enumerate(["student", "teacher"]):
        save_qwen(folder / role, seed)
    files = {"math": ("train",), "code": ("train", "validation")}
    for (kind, splits), row, count in zip(
        files.items(), (deepmath, eurus), (1040, 12), strict=True
    ):
        (folder / kind).mkdir()
        for split in splits:
            lines = [json.dumps(row(i)) + "\n" for i in range(count)]
            (folder / kind / f"{split}.jsonl").write_text("".join(lines))
    models = {f"model.{role}": str(folder / role) for role in ("student", "teacher")}
    options = {
        kind: {**models, **SHRUNK, "data.train": str(folder / kind)}
        | {"data.validation": str(folder / kind)}
        for kind in files
    }
    options["code"]["model.verifier.init_args.allow_code_execution"] = True
    return options


def leaves(options, path=()) -> Iterator[tuple[str, object]]:
    """Keys and values of a recipe; objects without options are named by their class alone."""
    if isinstance(options, dict) and options and path[-1:] != ("where",):
        for key, value in options.items():
            yield from leaves(value, (*path, key))
    else:
        yield ".".join(path), options


def at(options, path):
    value = options
    for part in path.split("."):
        if "init_args" in value and part not in value:
            value = value["init_args"]
        value = value[part]
    return value["class_path"] if isinstance(value, dict) and "class_path" in value else value


def assert_holds(config, name, *, but=()):
    recipe = dict(leaves(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())))
    assert len(recipe) > 30
    kept = {path: value for path, value in recipe.items() if path not in but}
    assert {path: at(config, path) for path in kept} == kept


def test_there_is_one_for_each_kind_and_size():
    assert NAMES == ["code_1.7b", "code_4b", "math_1.7b", "math_4b"]
    readme = (ROOT / "README.md").read_text()
    for name in NAMES:
        config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert config["model"]["student"] == f"Qwen/Qwen3-{name.split('_')[1].upper()}"
        assert f"`paper/{name}`" in readme


@pytest.mark.parametrize("name", NAMES)
def test_it_is_parsed_whole(name, capsys):
    preset = ["--config", "effopd/paper", "--config", "strategy/fsdp2"]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", f"paper/{name}", *preset, "--print_config"])
    assert stopped.value.code in (0, None)
    assert_holds(yaml.safe_load(capsys.readouterr().out), name)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_shrunk(name, shrunk, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kind = name.partition("_")[0]
    options = [f"--{key}={value}" for key, value in shrunk[kind].items()]
    if kind == "code":
        options[-1] = "--model.verifier.allow_code_execution=true"
    every = ["--samples.every_n_steps=1", "--output", str(tmp_path / "run")]
    preset = ["--config", "effopd/paper"]
    command = ["fit", "--config", f"paper/{name}", *preset, *QUIET, *CPU, *options, *every]
    assert main(command) == 0
    run = tmp_path / "run"
    changed = {*shrunk[kind], "trainer.precision", "samples.every_n_steps"}
    assert_holds(yaml.safe_load((run / "config.yaml").read_text()), name, but=changed)
    summary = json.loads((run / "summary.json").read_text())
    assert [search["step"] for search in summary["extrapolation"]] == [1]
    assert summary["accuracy"]["final"] == 0.0  # there are answers, and noise does not find them
    (samples,) = (run / "samples").glob("*.jsonl")
    for record in map(json.loads, samples.read_text().splitlines()):
        assert_asked(kind, record)


def assert_asked(kind, record):
    """What the student was asked, from which rows."""
    row = record["row"] + (1024 if kind == "math" else 0)
    question = f"Add {row}." if kind == "math" else f"code: add {row}."
    asked = f"<|im_start|>user\n{question}{SENTENCES[kind]}<|im_end|>\n"
    assert record["prompt"] == f"{asked}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert record["answer"] == (str(row) if kind == "math" else SUM)
    assert row % 3 == 1 if kind == "math" else row % 2 == 1


def test_programs_of_the_student_run_only_where_that_is_allowed(shrunk, tmp_path, capsys):
    options = [f"--{key}={value}" for key, value in shrunk["code"].items() if "verifier" not in key]
    command = ["fit", "--config", "paper/code_4b", *QUIET, *CPU, *options]
    assert main([*command, "--output", str(tmp_path / "run")]) == 2
    assert "allow it with --model.verifier.allow_code_execution true" in capsys.readouterr().err


def test_the_suites_are_those_of_the_paper():
    suites = [read_suite("paper_math"), read_suite("paper_code")]
    asked = [task for suite in suites for task in suite["tasks"]]
    named = "aime24 aime25 aime26 math500 minerva taco codeforces gpqa_diamond"
    assert asked == named.split()
    assert set(asked) <= set(benchmarks())
    for suite in suites:
        assert (suite["samples"], suite["max_new_tokens"]) == (32, 16384)
        assert suite["chat_template_kwargs"] == {"enable_thinking": False}
