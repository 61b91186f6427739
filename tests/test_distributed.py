"""Real process groups (torchrun, gloo): what holds for one process holds for two."""

import json

import pytest
from conftest import DDP, FSDP2, LINE_SEARCH, QUICKSTART, launch, load_any, student_of

from opd.cli import main
from opd.loggers import read_metrics


def losses(folder):
    return [float(r["opd/loss"]) for r in read_metrics(folder / "metrics.csv") if "opd/loss" in r]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """Recorded completions of unequal lengths for 40 prompts, and options that replay them."""
    folder = tmp_path_factory.mktemp("replay")
    rows = [
        {"prompt": f"{100 + i}+{250 + 3 * i}=", "answer": f"{350 + 4 * i:04d}"} for i in range(40)
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--data.validation",
        str(prompts),
        "--output",
        str(folder),
        "--trainer.logger",
        "false",
    ]
    assert main(["predict", "--config", QUICKSTART, *arguments]) == 0
    engine = ["--model.engine", "replay.Replay"]
    engine += ["--model.engine.predictions", str(folder / "predictions.jsonl")]
    data = ["--data.train", str(prompts), "--data.validation", str(prompts)]
    return [*data, *engine, "--model.micro_batch_tokens", "64"]


def test_one_process_ddp_and_fsdp2_take_the_same_steps(fit, tmp_path, replay):
    """1 x 8 = 2 x 4 under DDP and under FSDP2, with searches that accept, to float32 rounding."""
    options = [*replay, *LINE_SEARCH]
    one = fit("one", *options, steps=5)
    ddp = launch(2, tmp_path / "ddp", *options, *DDP, steps=5)
    fsdp2 = launch(2, tmp_path / "fsdp2", *options, *FSDP2, steps=5)
    expected = student_of(load_any(one))
    for folder in (ddp, fsdp2):
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
        assert largest_difference(student_of(load_any(folder)), expected) < 1e-5
        searches = summary(folder)["extrapolation"]
        assert [s["coefficient"] for s in searches] == [
            s["coefficient"] for s in summary(one)["extrapolation"]
        ]
        assert any(s["coefficient"] for s in searches)
