"""What EffOPD is to be compared with: each control against what its paper writes."""

import functools
import itertools
import json
import math

import pytest
import torch
from conftest import (
    DDP,
    FSDP1,
    FSDP2,
    ROOT,
    assert_same,
    launch,
    load,
    load_any,
    slow_but,
    student_of,
)

from opd import optimization, stages
from opd.directions import random_anchor
from opd.metrics_rows import read_metrics
from opd.randomness import normal
from opd.rollouts import TransformersEngine
from opd.weights import Weights

PRESETS = sorted((ROOT / "configs" / "controls").glob("*.yaml"))
SCHEDULE_FREE = ["--model.optimizer", "schedulefree.AdamWScheduleFree"]
PRODIGY = ["--model.optimizer", "prodigyopt.Prodigy", "--model.optimizer.lr"]
AVERAGE = ["--trainer.callbacks+=callbacks.AveragedWeights", "--trainer.callbacks.decay"]
LOOKAHEAD = ["--trainer.callbacks+=callbacks.Lookahead", "--trainer.callbacks.k", "2"]


def accelerator(name: str, **options: object) -> list[str]:
    words = [(f"--trainer.callbacks.{key}", str(value)) for key, value in options.items()]
    return [f"--trainer.callbacks+=callbacks.{name}", *itertools.chain(*words)]


LABEL_FREE = {"score": "opd.scores.TeacherKL", "target": -0.1}


@pytest.mark.parametrize("path", PRESETS, ids=[path.stem for path in PRESETS])
def test_every_control_runs_on_the_quickstart_and_is_in_the_readme(fit, path):
    fit("run", "--config", str(path), steps=1)
    assert f"| `{path.name}` |" in (ROOT / "README.md").read_text()


RESUMED = {
    "schedule_free": [*SCHEDULE_FREE, "--model.optimizer.lr", "1e-3"],
    "prodigy": [*PRODIGY, "1.0", "--model.optimizer.d0", "1e-5"],
    "average": [*AVERAGE, "0.5"],
    "mean": [*AVERAGE, "null"],
    "lookahead": LOOKAHEAD,
    "snoo": accelerator("SNOO", k=1),
    "two_point": accelerator("TwoPoint", first=1, second=4, target=6),
    "relex": accelerator("RELEX", every=2, at=4, target=6),
    "alphaopd": accelerator("AlphaOPD", every=1, at=4, **LABEL_FREE),
}


@pytest.mark.parametrize("name", slow_but("average", *RESUMED))
def test_a_run_goes_on_bit_for_bit_whether_it_validates_or_not(fit, name):
    """The same weights, state and random numbers: validated each step, or never and resumed."""
    options = RESUMED[name]
    straight = load(fit("straight", *options, "--trainer.val_check_interval", "1", steps=4))
    never = [*options, "--data.validation", "null"]
    fit("resumed", *never, steps=3)
    resumed = load(fit("resumed", *never, "--ckpt_path", "last", steps=4))
    for part in ("state_dict", "optimizer_states", "random_state"):
        assert_same(resumed[part], straight[part], part)


# --- optimizers with state of their own -----------------------------------------------------------


def test_schedule_free_steps_at_y_and_shows_x():
    """2405.15682, equations 3 to 5 with AdamW's scaling and c = 1 / (t + 1), in float64.

    y = (1 - beta) z + beta x; z -= lr g(y) / (sqrt(v / (1 - beta2 ** t)) + eps); x += c (z - x).
    """
    schedulefree = pytest.importorskip("schedulefree")
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    weights = Weights(torch.nn.ParameterList([weight]))
    optimizer = schedulefree.AdamWScheduleFree([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    x = z = 2.0
    v = 0.0
    for t in range(1, 6):
        y = 0.1 * z + 0.9 * x
        gradient = 2 * y - 1
        with optimization.where_it_trains(optimizer, weights):
            assert weight.item() == pytest.approx(y, rel=1e-12)
            weight.grad = 2 * weight.detach() - 1
            optimizer.step()
        v = 0.99 * v + 0.01 * gradient**2
        z -= 0.1 * gradient / (math.sqrt(v / (1 - 0.99**t)) + 1e-8)
        x += (z - x) / t
        assert weight.item() == pytest.approx(x, rel=1e-12)
    assert weights.version == 10


def test_schedule_free_samples_at_y_is_judged_at_x_and_saves_x(fit, monkeypatch):
    pytest.importorskip("schedulefree")
    seen, generate = [], stages.generate

    @functools.wraps(generate)
    def watched(module, *arguments, **options):
        (optimizer,) = module.trainer.optimizers or [None]
        if optimizer is not None and module.global_step:
            seen.append((module.trainer.validating, optimizer.param_groups[0]["train_mode"]))
        return generate(module, *arguments, **options)

    monkeypatch.setattr(stages, "generate", watched)
    folder = fit("run", *SCHEDULE_FREE, "--trainer.val_check_interval", "1", steps=3)
    assert set(seen) == {(True, False), (False, True)}
    saved = load(folder)
    assert not saved["optimizer_states"][0]["param_groups"][0]["train_mode"]


def test_a_resumed_prodigy_takes_another_factor_and_keeps_the_rate_that_it_has_found(fit):
    pytest.importorskip("prodigyopt")
    before = load(fit("run", *PRODIGY, "1.0", "--model.optimizer.d0", "1e-5", steps=4))
    options = [*PRODIGY, "0.5", "--model.optimizer.d0", "1e-5", "--ckpt_path", "last"]
    after = load(fit("run", *options, steps=5))
    old, new = (c["optimizer_states"][0]["param_groups"][0] for c in (before, after))
    assert (old["lr"], new["lr"]) == (1.0, 0.5)
    assert new["k"] == 5
    assert new["d"] >= old["d"] > 1e-5


# --- averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "shares"), [("0.75", (9, 3, 4)), ("null", (1, 1, 1))])
def test_an_average_of_the_weights_is_saved_and_training_goes_on_without_it(
    fit, vanilla, decay, shares
):
    """W_1, W_2, W_3 are those of vanilla OPD; 3/4 (3/4 W_1 + 1/4 W_2) + 1/4 W_3, or their mean."""
    averaged = load(fit("average", *AVERAGE, decay, steps=3))
    steps = [student_of(load(vanilla, f"step={t:06d}.ckpt")) for t in (1, 2, 3)]
    for name, average in student_of(averaged).items():
        trained = averaged["state_dict"]["average_anchor." + name.replace(".", "/")]
        assert torch.equal(trained, steps[-1][name])
        parts = zip(shares, steps, strict=True)
        mean = sum(share * step[name].double() for share, step in parts) / sum(shares)
        torch.testing.assert_close(average.double(), mean, rtol=1e-6, atol=1e-8)


def test_a_step_that_fails_leaves_the_average_in_its_place(fit, tmp_path, monkeypatch):
    """The third one finds no memory for its rollouts, and what the second has left is saved."""
    options = [*AVERAGE, "0.5", "--data.validation", "null"]
    two = load(fit("two", *options, steps=2))
    sample, calls = TransformersEngine.__call__, iter(range(100))

    def run_out(engine, prompts, sampler, seeds):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(engine, prompts, sampler, seeds)

    monkeypatch.setattr(TransformersEngine, "__call__", run_out)
    with pytest.raises(AssertionError):
        fit("three", *options, steps=3)
    assert_same(load(tmp_path / "three")["state_dict"], two["state_dict"])


# --- a random direction ---------------------------------------------------------------------------


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in [(40, 30), (17,), (8, 5)]]


def moved(weights: list[torch.Tensor], anchor: list[torch.Tensor]) -> list[torch.Tensor]:
    return [w.double() - a.double() for w, a in zip(weights, anchor, strict=True)]


def test_a_random_direction_is_as_long_in_each_tensor_and_points_elsewhere():
    w, anchor = tensors(0), tensors(1)
    anchor[2] = w[2].clone()  # has not moved
    found = random_anchor(w, anchor, seeds=[1, 2, 3], starts=[0, 0, 0])
    for random, real in zip(moved(w, found), moved(w, anchor), strict=True):
        torch.testing.assert_close(random.norm(), real.norm(), rtol=1e-6, atol=0)
    one, other = (moved(w, a)[0].flatten() for a in (found, anchor))
    assert abs(torch.cosine_similarity(one, other, dim=0)) < 5 / math.sqrt(one.numel())
    again = random_anchor(w, anchor, seeds=[1, 2, 3], starts=[0, 0, 0])
    assert_same(again, found)
    others = random_anchor(w, anchor, seeds=[4, 5, 6], starts=[0, 0, 0])
    assert not torch.equal(others[0], found[0])


def test_a_random_direction_does_not_depend_on_how_weights_are_sharded():
    """Two ranks, the second with rows 25 to 39, numbers 5 to 16 and nothing."""
    w, anchor, sums = tensors(0), tensors(1), []
    whole = random_anchor(w, anchor, [1, 2, 3], [0, 0, 0], lambda own: sums.append(own) or own)
    found = []
    for part, starts in [([25, 5, 8], [0, 0, 0]), ([-15, -12, 0], [25 * 30, 5, 40])]:
        mine = [
            [t[:n] if n > 0 else t[len(t) + n :] for t, n in zip(ts, part, strict=True)]
            for ts in (w, anchor)
        ]
        found.append(
            random_anchor(*mine, [1, 2, 3], starts, lambda own: sums.append(own) or sums[0])
        )
    torch.testing.assert_close(sums[1] + sums[2], sums[0])
    for tensor, first, second in zip(whole, *found, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), tensor, rtol=1e-6, atol=1e-7)


def test_numbers_are_normal():
    """The first four moments of 200,000, within six standard errors; neighbours independent."""
    n = 200_000
    numbers = normal(7, torch.arange(n))
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(numbers.pow(power).mean() - moment) < 6 * math.sqrt(variance / n)
    assert abs((numbers[:-1] * numbers[1:]).mean()) < 6 / math.sqrt(n)


RANDOM = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.schedule", "every 1"]
RANDOM += ["--trainer.callbacks.direction", "random", "--trainer.callbacks.coefficients", "[100]"]
RANDOM += ["--trainer.callbacks.score", "opd.scores.TeacherKL"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP2, FSDP1], ids=["fsdp2", "fsdp1"])
def test_two_ranks_search_along_the_random_direction_of_one(fit, tmp_path, strategy):
    """A hundred times as far, so that another direction would be seen in the score."""
    runs = [fit("one", *RANDOM, steps=2), launch(2, tmp_path / "two", *RANDOM, *strategy, steps=2)]
    found = [json.loads((run / "summary.json").read_text())["extrapolation"] for run in runs]
    scores = [[search["candidates"][0]["score"] for search in searches] for searches in found]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    assert scores[0][0] != pytest.approx(scores[0][1], rel=1e-2)


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (FSDP1, [*AVERAGE, "0.5"]),
        (FSDP2, [*AVERAGE, "0.5"]),
        (FSDP1, accelerator("SNOO", k=1)),
        (FSDP2, accelerator("SNOO", k=1)),
        (FSDP2, accelerator("TwoPoint", first=1, second=3, target=5)),
        (FSDP2, accelerator("RELEX", every=1, at=3, target=5)),
        (FSDP2, accelerator("AlphaOPD", every=1, at=3, **LABEL_FREE)),
        (FSDP1, accelerator("AlphaOPD", every=1, at=3, **LABEL_FREE)),
        (DDP, accelerator("SNOO", k=1)),
    ],
    ids=[
        *("fsdp1-average", "fsdp2-average", "fsdp1-snoo", "fsdp2-snoo", "fsdp2-two_point"),
        *("fsdp2-relex", "fsdp2-alphaopd", "fsdp1-alphaopd", "ddp-snoo"),
    ],
)
def test_controls_hold_on_two_ranks_and_go_on_bit_for_bit(fit, tmp_path, strategy, options):
    single = fit("one", *options, steps=3)
    straight = launch(2, tmp_path / "straight", *options, *strategy, steps=3)
    launch(2, tmp_path / "resumed", *options, *strategy, steps=2)
    resumed = launch(2, tmp_path / "resumed", *options, *strategy, "--ckpt_path", "last", steps=3)
    one = student_of(load(single))
    ours, theirs = (load_any(folder)["state_dict"] for folder in (resumed, straight))
    assert_same(ours, theirs)
    assert max((one[n] - ours[n]).abs().max().item() for n in one) < 1e-5
    moved, expected = (moves_of(folder) for folder in (straight, single))
    assert moved == pytest.approx(expected, rel=1e-3)
    assert 0 not in moved


def moves_of(folder) -> list[float]:
    """Coefficients, and how long W - anchor was, of what an accelerator has moved."""
    found = json.loads((folder / "summary.json").read_text())["extrapolation"]
    lengths = [
        float(value)
        for row in read_metrics(folder / "metrics.csv")
        for name, value in row.items()
        if name.endswith("/direction_norm")
    ]
    return [*(entry["coefficient"] for entry in found if "coefficient" in entry), *lengths]


# --- an oracle ------------------------------------------------------------------------------------

ORACLE = ["--trainer.callbacks+=callbacks.EffOPD", "--trainer.callbacks.score=AnswerAccuracy"]


def test_an_oracle_judges_by_the_validation_prompts_and_pays_for_it(fit, tmp_path):
    """Training prompts have no answers here; only the validation prompts can be judged by."""
    rows = [{"prompt": f"{100 + i}+{200 + i}="} for i in range(8)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data.train", str(prompts), *ORACLE]
    options += ["--trainer.callbacks.score.prompts", "validation"]
    folder = fit("run", *options, steps=1)
    (search,) = json.loads((folder / "summary.json").read_text())["extrapolation"]
    cost = load(folder)["cost"]
    assert search["tokens"] == cost["search_tokens"] == cost["search_generated_tokens"]
    judged = 1 + len(search["candidates"])
    assert 10 * 16 * judged < search["tokens"] <= 24 * 16 * judged
    shares = {round(16 * candidate["score"], 6) % 1 for candidate in search["candidates"]}
    assert shares == {0}  # of the 16 validation prompts
