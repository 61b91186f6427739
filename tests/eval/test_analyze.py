"""opd analyze: updates that are known, in every format, and what is done to them."""

import csv
import functools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from eval.analyze import scored, spectra
from eval.analyze.judge import Judge, PromptScore
from eval.analyze.tensors import find_misfit, opened, weight_files
from eval.analyze.updates import Place, open_updates
from opd import checkpoints
from opd.cli import main
from opd.errors import UserError
from opd.models import load_model, load_tokenizer

BASE = "embedded:base"
CPU = torch.device("cpu")


def unit(size, seed):
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def is_matrix(name):
    return ".layers." in name and "proj" in name


def write(folder, change, dtype=torch.float32):
    """Save the embedded base with each tensor changed: change(name, tensor) is added."""
    model = load_model(BASE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += change(name, parameter)
    model.to(dtype).save_pretrained(folder)
    load_tokenizer(BASE).save_pretrained(folder)
    return str(folder)


def rank_one(scale, seed, angle=0.0):
    """To every matrix scale u v^T, where u turns by the angle from u_0."""

    def change(name, tensor):
        if not is_matrix(name):
            return torch.zeros_like(tensor)
        u, v = unit(tensor.shape[0], seed), unit(tensor.shape[1], seed + 1)
        across = unit(tensor.shape[0], seed + 2)
        across -= (across @ u) * u
        turned = math.cos(angle) * u + math.sin(angle) * across / across.norm()
        return (scale * turned[:, None] * v).float()

    return change


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Two checkpoints of rank one, at an angle of 60 degrees, of norms 2 and 8 a matrix."""
    folder = tmp_path_factory.mktemp("known")
    early = write(folder / "early", rank_one(2.0, 0, math.pi / 3))
    return early, write(folder / "late", rank_one(8.0, 0))


# --- where weights come from ----------------------------------------------------------------------


def assert_holds(source, wanted):
    with opened(str(source)) as tensors:
        assert tensors.shapes.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert tensors.shapes[name] == tuple(tensor.shape)
            assert torch.equal(tensors.read(name), tensor), name


def test_a_model_is_read_from_one_file_and_from_several(tmp_path):
    model = load_model(BASE)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="1MB")
    (tmp_path / "several" / "adapter.safetensors").write_bytes(b"")  # not in the index
    assert len(list((tmp_path / "several").glob("model-*"))) > 1
    for folder in (BASE, tmp_path / "one", tmp_path / "several"):
        assert_holds(folder, model.state_dict())
    next(iter((tmp_path / "several").glob("model-*"))).unlink()
    with pytest.raises(UserError, match=r"model-.* which model.safetensors.index.json names"):
        weight_files("there", tmp_path / "several")


def test_a_checkpoint_is_the_student_in_it_whole_or_in_shards(vanilla, tmp_path):
    path = vanilla / "checkpoints" / "step=000002.ckpt"
    student = load_model(str(path)).state_dict()
    assert_holds(path, student)
    saved = torch.load(path, weights_only=True)
    state = {"state_dict": saved.pop("state_dict")}
    dcp.save(state, checkpoint_id=tmp_path / "shards", no_dist=True)
    torch.save(saved, tmp_path / "shards" / checkpoints.META_FILE)
    assert_holds(tmp_path / "shards", student)


def test_an_adapter_is_merged_into_its_base(fit):
    folder = fit("run", "--model.adapter.rank", "2", "--model.optimizer.lr", "1e-2", steps=1)
    path = folder / "checkpoints" / "last.ckpt"
    assert_holds(path, load_model(str(path)).state_dict())


def test_a_head_that_is_the_embedding_may_be_there_or_not(tmp_path):
    shape = (4, 2)
    for name, head in [("left_out", None), ("there", torch.ones), ("other", torch.zeros)]:
        tensors = {"model.embed_tokens.weight": torch.ones(shape)}
        if head is not None:
            tensors["lm_head.weight"] = head(shape)
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")

    def misfit(one, other):
        with opened(str(tmp_path / one)) as left, opened(str(tmp_path / other)) as right:
            return find_misfit(left, right)

    assert misfit("left_out", "there") is None
    assert misfit("there", "left_out") is None
    assert "left_out lacks lm_head.weight" in misfit("left_out", "other")
    assert "left_out lacks lm_head.weight" in misfit("other", "left_out")


def tensors_of(folder, **changes):
    """A layer of two experts with a head that is the embedding; what is named is added."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(6, 3, generator=generator)
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, 4, 3, generator=generator),
        "model.layers.0.mlp.gate.weight": torch.randn(2, 3, generator=generator),
        "lm_head.weight": embedding.clone(),
    }
    for part, change in changes.items():
        (name,) = [name for name in tensors if part in name]
        tensors[name] = tensors[name] + change
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return str(folder)


def test_a_head_that_is_the_embedding_counts_once(tmp_path):
    base, tied = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "a", embed=2, lm_head=2)
    with open_updates(base, [tied]) as updates:
        (norms,) = spectra.tensor_norms(updates).values()
        assert math.hypot(*norms.values()) == pytest.approx(2 * math.sqrt(6 * 3))
    with open_updates(base, [tied, tensors_of(tmp_path / "b", lm_head=1)]) as updates:
        assert updates.places["lm_head.weight"].group == "head"


def test_matrices_of_experts_are_each_one_and_what_chooses_them_is_none(tmp_path):
    """Of the experts the first turns its direction, and the second keeps it."""
    e = torch.eye(4)[:, :3]
    turned = torch.stack([torch.outer(e[:, 1], e[0]), torch.outer(e[:, 2], e[0])])
    final = torch.stack([torch.outer(e[:, 0], e[0]), 3 * torch.outer(e[:, 2], e[0])])
    early = tensors_of(tmp_path / "early", experts=turned[:, :, :3], gate=1)
    late = tensors_of(tmp_path / "late", experts=final[:, :, :3], gate=1)
    with open_updates(tensors_of(tmp_path / "base"), [early, late]) as updates:
        assert (updates.matrices, updates.count) == (["model.layers.0.mlp.experts.down_proj"], 2)
        (found,) = spectra.matrix_rows(updates, 20)
        name = "model.layers.0.mlp.experts.down_proj"
        norms = {(row["matrix"], row["step"]): row["norm"] for row in found.matrices}
        expected = {(f"{name}[0]", 1): 1, (f"{name}[1]", 1): 1, (f"{name}[0]", 2): 1}
        assert norms == pytest.approx(expected | {(f"{name}[1]", 2): 3}, rel=1e-5)
        cosines = {row["matrix"]: row["cosine_1"] for row in found.directions if row["step"] == 1}
        assert cosines == pytest.approx({f"{name}[0]": 0, f"{name}[1]": 1}, abs=1e-5)
        change = scored._Subspace(updates, updates.checkpoints[1], "top", 50, {name: 2.0})
        torch.testing.assert_close(change(name), (2 / 10**0.5 * final[:, :, :3]).double())
        assert change("model.layers.0.mlp.gate.weight") is None
        assert scored._Subspace(updates, updates.checkpoints[1], "top", 50, {name: 0.0})(
            name
        ).norm() == pytest.approx(10**0.5)


@pytest.mark.parametrize(
    ("name", "shape", "place"),
    [
        ("model.layers.2.mlp.experts.down_proj", (8, 4, 4), (2, "down_proj", "mlp")),
        ("model.layers.2.mlp.experts.down_proj_bias", (8, 4), (2, "down_proj_bias", "other")),
        ("model.layers.2.mlp.gate.weight", (8, 4), (2, "gate", "other")),
        ("model.layers.11.self_attn.q_proj.weight", (4, 4), (11, "q_proj", "attention")),
        ("model.layers.0.mlp.down_proj.weight", (4, 8), (0, "down_proj", "mlp")),
        ("model.layers.0.self_attn.q_proj.bias", (4,), (0, "q_proj", "other")),
        ("model.layers.0.self_attn.q_norm.weight", (4,), (0, "q_norm", "other")),
        ("model.layers.0.input_layernorm.weight", (4,), (0, "input_layernorm", "other")),
        ("transformer.h.3.attn.c_attn.weight", (4, 12), (3, "c_attn", "attention")),
        ("transformer.h.3.mlp.c_fc.weight", (4, 16), (3, "c_fc", "mlp")),
        ("model.embed_tokens.weight", (9, 4), (None, "embed_tokens", "embedding")),
        ("transformer.wte.weight", (9, 4), (None, "wte", "embedding")),
        ("lm_head.weight", (9, 4), (None, "lm_head", "head")),
        ("model.norm.weight", (4,), (None, "norm", "other")),
    ],
)
def test_where_a_tensor_is(name, shape, place):
    assert Place.of(name, shape) == Place(*place)


def test_a_run_is_all_of_its_checkpoints_each_once(vanilla, tmp_path):
    with open_updates(BASE, [str(vanilla), f"mine={vanilla}/checkpoints/last.ckpt"]) as updates:
        assert {label: [c.step for c in run] for label, run in updates.runs.items()} == {
            "run": [1, 2, 3],
            "mine": [3],
        }
        assert len(updates.matrices) == 4 * 7
    copied = shutil.copytree(vanilla, tmp_path / "copied")  # last.ckpt is no link there
    with open_updates(BASE, [str(copied)]) as updates:
        assert [c.step for c in updates.checkpoints] == [1, 2, 3]
        assert updates.places.keys() == updates.base.shapes.keys()


# --- spectra --------------------------------------------------------------------------------------


def test_updates_of_rank_one_are_seen_as_such(known):
    with open_updates(BASE, list(known)) as updates:
        assert [c.step for c in updates.checkpoints] == [1, 2]
        norms = spectra.tensor_norms(updates)
        parts = list(spectra.matrix_rows(updates, 3))
        rows = spectra.norm_rows(updates, norms)
    assert [row["norm"] for row in rows] == pytest.approx([2 * 28**0.5, 8 * 28**0.5], rel=1e-4)
    assert [row["attention"] for row in rows] == pytest.approx([2 * 16**0.5, 8 * 16**0.5], rel=1e-4)
    assert [row["mlp"] for row in rows] == pytest.approx([2 * 12**0.5, 8 * 12**0.5], rel=1e-4)
    assert [row["embedding"] + row["head"] + row["other"] for row in rows] == [0.0, 0.0]
    matrices = [row for part in parts for row in part.matrices]
    assert len(matrices) == 2 * 28
    for row in matrices:
        assert row["spectral_norm"] == pytest.approx(2 if row["step"] == 1 else 8, rel=1e-4)
        assert row["spectral_ratio"] == pytest.approx(1, rel=1e-4)
        assert row["effective_rank"] == pytest.approx(1, abs=0.01)
    directions = [row for part in parts for row in part.directions]
    assert len(directions) == 2 * 28
    for row in directions:  # cos 60 degrees; what comes after the first is rounding
        assert row["cosine_1"] == pytest.approx(0.5 if row["step"] == 1 else 1.0, rel=1e-3)
        assert (row["directions"], row["cosine_mean"]) == (1, row["cosine_1"])
        assert "cosine_2" not in row
    planes = [
        row for part in parts for row in part.planes if row["matrix"].endswith("q_proj.weight")
    ]
    for first, second in zip(planes[::2], planes[1::2], strict=True):
        apart = math.hypot(first["x"] - second["x"], first["y"] - second["y"])
        assert apart == pytest.approx(1.0, rel=1e-3)  # of unit vectors at 60 degrees
        assert first["explained"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_are_as_many_as_the_update_has(tmp_path, dtype):
    """One, and then two, of which the second turns by 60 degrees, and a third below rounding."""

    def change(angle, name, tensor):
        parts = [rank_one(2.0, 0), rank_one(0.2, 10, angle), rank_one(1e-7, 20)]
        return sum(part(name, tensor) for part in parts)

    first = write(tmp_path / "first", rank_one(2.0, 0))
    early = write(tmp_path / "early", functools.partial(change, math.pi / 3), dtype)
    late = write(tmp_path / "late", functools.partial(change, 0.0))
    with open_updates(BASE, [first, early, late]) as updates:
        found = [row for part in spectra.matrix_rows(updates, 20) for row in part.directions]
    assert [row["directions"] for row in found] == 28 * [1, 2, 2]
    for row in found:
        turned = 0.5 if row["step"] == 2 else 1.0
        assert row["cosine_1"] == pytest.approx(1.0, abs=0.01)
        if row["step"] == 1:
            continue
        assert row["cosine_2"] == pytest.approx(turned, abs=0.2)
        mean = (row["cosine_1"] + row["cosine_2"]) / 2
        assert row["cosine_mean"] == pytest.approx(mean)


def test_means_leave_out_what_has_not_moved():
    def row(step, norm, value):
        return {"run": "a", "step": step, "checkpoint": "c", "norm": norm, "top_ratio": value}

    rows = [row(1, 2.0, 0.5), row(1, 4.0, 0.7), row(1, 0.0, math.nan), row(2, 0.0, math.nan)]
    first, second = spectra.mean_rows(rows, ["norm", "top_ratio"])
    assert (first["matrices"], first["norm"]) == (2, 3.0)
    assert first["top_ratio"] == pytest.approx(0.6)
    assert second == {"run": "a", "step": 2, "checkpoint": "c", "matrices": 0}


# --- parts of updates -----------------------------------------------------------------------------


class Recorder(Judge):
    """Scores nothing, and remembers the updates that were put in place."""

    def __init__(self, updates):
        super().__init__(updates.base, load_model(BASE), load_tokenizer(BASE), CPU)
        self.before = {n: p.clone() for n, p in self.model.named_parameters()}
        self.seen = []

    def __call__(self, change):
        self.put(change)
        found = {n: p.detach() - self.before[n] for n, p in self.model.named_parameters()}
        self.seen.append(found)
        return {"accuracy": 0.0}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Two checkpoints in which every tensor has moved, at random."""

    def change(scale, name, tensor):
        generator = torch.Generator().manual_seed(len(name))
        return scale * torch.randn(tensor.shape, generator=generator)

    folder = tmp_path_factory.mktemp("moved")
    sources = [write(folder / str(s), functools.partial(change, s)) for s in (0.01, 0.03)]
    with open_updates(BASE, sources) as updates:
        norms = spectra.tensor_norms(updates)
        last = {n: updates.delta(updates.checkpoints[-1], n) for n in updates.places}
        yield updates, norms, last


def assert_near(found, wanted):
    assert torch.allclose(found, wanted, atol=1e-6)


def test_scaling_goes_from_the_base_to_the_checkpoint(moved):
    updates, norms, last = moved
    judge = Recorder(updates)
    rows = list(scored.scaling(updates, judge, norms))
    total = math.sqrt(sum(float(delta.square().sum()) for delta in last.values()))
    for row, seen in zip(rows, judge.seen, strict=True):
        assert row["norm"] == pytest.approx(row["a"] * total, rel=1e-5)
        for name, delta in last.items():
            assert_near(seen[name], row["a"] * delta)
    assert (rows[0]["a"], rows[-1]["a"]) == (0.0, 1.0)
    assert not any(delta.any() for delta in judge.seen[0].values())


def test_dynamics_has_the_base_and_every_checkpoint(moved):
    updates, norms, last = moved
    judge = Recorder(updates)
    rows = list(scored.dynamics(updates, judge, norms))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["norm"] == pytest.approx(rows[2]["norm"] / 3, rel=1e-3)
    for name, delta in last.items():
        assert not judge.seen[0][name].any()
        assert_near(judge.seen[2][name], delta)
        assert_near(judge.seen[1][name], delta / 3)


def test_the_embedding_and_the_head_of_the_base_are_put_back(moved):
    updates, _, last = moved
    judge = Recorder(updates)
    rows = list(scored.embeddings(updates, judge))
    back = [(), ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")]
    assert len(rows) == 4
    for seen, words in zip(judge.seen, back, strict=True):
        for name, delta in last.items():
            gone = any(word in name for word in words)
            assert_near(seen[name], torch.zeros_like(delta) if gone else delta)


def test_a_window_has_its_layers_of_one_group_alone(moved):
    updates, _, last = moved
    judge = Recorder(updates)
    rows = list(scored.windows(updates, judge, 1))
    assert [(row["group"], row["centre"]) for row in rows] == [
        (group, centre) for group in ("attention", "mlp") for centre in range(4)
    ]
    for row, seen in zip(rows, judge.seen, strict=True):
        word = "self_attn" if row["group"] == "attention" else "mlp"
        inside = [n for n in last if is_matrix(n) and word in n]
        near = [n for n in inside if abs(int(n.split(".")[2]) - row["centre"]) <= 1]
        assert row["matrices"] == len(near)
        for name, delta in last.items():
            assert_near(seen[name], delta if name in near else torch.zeros_like(delta))


def test_the_top_has_the_norm_of_the_whole_and_the_bottom_its_own(moved):
    updates, norms, last = moved
    judge = Recorder(updates)
    rows = list(scored.subspaces(updates, judge, norms))
    found = {
        (row["part"], row["percent"]): seen for row, seen in zip(rows, judge.seen, strict=True)
    }
    matrices = [name for name in last if is_matrix(name)]
    for name, delta in last.items():
        assert_near(found["all", 100][name], delta if name in matrices else 0 * delta)
    for percent in scored.KEPT:
        top, bottom = found["top", percent], found["bottom", percent]
        for name in matrices:
            r = min(last[name].shape)
            kept = max(1, round(r * percent / 100))
            s = torch.linalg.svdvals(last[name])
            wanted = torch.cat([s[:kept] * s.norm() / s[:kept].norm(), torch.zeros(r - kept)])
            assert torch.allclose(torch.linalg.svdvals(top[name]), wanted, atol=1e-4)
            least = torch.cat([s[r - kept :], torch.zeros(r - kept)])
            assert torch.allclose(torch.linalg.svdvals(bottom[name]), least, atol=1e-4)
        assert not any(top[name].any() for name in last if name not in matrices)
    for row, seen in zip(rows, judge.seen, strict=True):
        total = math.sqrt(sum(float(seen[name].detach().square().sum()) for name in matrices))
        assert row["norm"] == pytest.approx(total, rel=1e-4)


def test_early_updates_get_the_norm_of_the_end(moved):
    """Here the early update is a third of the last one: with the whole way, it is that."""
    updates, norms, last = moved
    judge = Recorder(updates)
    rows = list(scored.norm_matching(updates, judge, norms))
    assert {row["step"] for row in rows} == {1}
    for row, seen in zip(rows, judge.seen, strict=True):
        for name, delta in last.items():
            assert_near(seen[name], delta / 3 * (1 + 2 * row["b"]))


def prompt_score(base, teacher):
    return PromptScore(
        *(base, teacher, "embedded:test"),
        limit=4,
        max_new_tokens=8,
        seed=0,
        device=CPU,
        trust_remote_code=False,
    )


def test_hidden_states_are_those_without_dropout(tiny):
    score = prompt_score(str(tiny / "gpt2-student"), str(tiny / "gpt2-teacher"))
    score()  # leaves the student as validation does
    read = score.hidden()
    for one, other in zip(read(), read(), strict=True):
        assert torch.equal(one, other)


def test_hidden_states_are_compared_with_the_bases_own(tmp_path):
    """An update of the embedding alone moves them, and putting the base's back moves them back.

    One of the head alone moves none.
    """

    def only(word):
        return lambda name, tensor: 0.5 * tensor.std() * (word in name) * torch.ones_like(tensor)

    changed = {word: write(tmp_path / word, only(word)) for word in ("embed_tokens", "lm_head")}
    score = prompt_score(BASE, "embedded:teacher")
    cosines = {}
    for word, source in changed.items():
        with open_updates(BASE, [source]) as updates:
            judge = Judge(updates.base, score.module.student, score.module.tokenizer, CPU)
            judge.by_prompts(score)
            rows = list(scored.embeddings(updates, judge))
        cosines[word] = {row["weights"]: row["cosine"] for row in rows}
    assert cosines["embed_tokens"]["as trained"] < 0.999
    assert cosines["embed_tokens"]["with the base's embedding"] == pytest.approx(1, abs=1e-5)
    assert cosines["embed_tokens"]["with the base's head"] < 0.999
    assert list(cosines["lm_head"].values()) == pytest.approx([1] * 4, abs=1e-5)


# --- the command ----------------------------------------------------------------------------------


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_scores_as_evaluate_and_validate_do(vanilla, tmp_path, capsys):
    """Of its nine analyses every one is a table, a figure and a section of the page."""
    score = ["--tasks", "arithmetic", "--limit", "6", "--max_new_tokens", "24"]
    teacher = ["--teacher", "embedded:teacher", "--prompts", "embedded:test"]
    out = tmp_path / "out"
    last = f"{vanilla}/checkpoints/last.ckpt"
    sources = [f"{vanilla}/checkpoints/step=000002.ckpt", last]
    command = ["analyze", "--base", BASE, "--checkpoints", *sources, "--output", f"{out}"]
    assert main([*command, *score, *teacher]) == 0
    printed = capsys.readouterr().out
    names = ["spectra", "lock_in", "scaling", "dynamics", "embeddings", "windows", "subspaces"]
    names += ["norm_matching", "layers"]
    page = (out / "analysis.html").read_text()
    assert page.count("<img") == len(names)
    assert "http" not in page.replace("http-equiv", "")
    for name in names:
        assert (out / f"{name}.png").stat().st_size > 5000
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
        assert name == "layers" or read_csv(out / f"{name}.csv")
    assert "norm |" in printed
    dynamics = read_csv(out / "dynamics.csv")
    assert main(["evaluate", "--model", last, *score, "--output", str(tmp_path / "e")]) == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())["results"]["arithmetic"]
    assert float(dynamics[-1]["accuracy"]) == pytest.approx(results["avg@1,none"])
    limits = ["--data.validation_limit", "6", "--model.max_new_tokens", "24"]
    told = ["--data.validation", "embedded:test", "--model.teacher", "embedded:teacher"]
    command = ["validate", "--config", "quickstart", "--model.student", last, *told, *limits]
    assert main([*command, "--trainer.enable_progress_bar", "false"]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "val/reverse_kl" in line]
    value = float(line.strip(" │").split()[-1])
    assert float(dynamics[-1]["reverse_kl"]) == pytest.approx(value, rel=1e-4)


@pytest.mark.gpu
def test_models_are_run_on_the_device_that_is_named(tmp_path):
    """Scores by tasks leave the student there, and those by prompts take it away again."""
    score = ["--tasks", "arithmetic", "--limit", "4", "--max_new_tokens", "24"]
    score += ["--teacher", "embedded:teacher", "--prompts", "embedded:test"]
    for device in ("cuda", "cpu"):
        out = ["--output", str(tmp_path / device), "--device", device]
        command = ["analyze", "--base", BASE, "--checkpoints", "embedded:teacher", *score, *out]
        assert main([*command, "--analyses", "embeddings"]) == 0
    one, other = (read_csv(tmp_path / name / "embeddings.csv") for name in ("cuda", "cpu"))
    for row, wanted in zip(one, other, strict=True):
        assert float(row["cosine"]) == pytest.approx(float(wanted["cosine"]), abs=1e-2)


def test_weights_alone_need_nothing_else_and_an_analysis_is_not_replaced(known, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["analyze", "--base", BASE, "--checkpoints", *known, "--output", str(out)]
    assert main(command) == 0
    assert sorted(path.stem for path in out.glob("*.png")) == ["layers", "lock_in", "spectra"]
    assert main(command) == 2
    assert "holds an analysis already" in capsys.readouterr().err
    chosen = [*command, "--overwrite", "true", "--analyses", "spectra", "--directions", "2"]
    assert main(chosen) == 0
    assert "left out" not in capsys.readouterr().out
    single = ["analyze", "--base", BASE, "--checkpoints", known[0], "--output", str(out)]
    assert main([*single, "--overwrite", "true"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "left out, for want of several checkpoints of a run: lock_in"


def test_what_cannot_be_analysed_is_said_in_a_line(known, tmp_path, capsys):
    nan = write(tmp_path / "nan", lambda name, tensor: torch.full_like(tensor, math.nan))
    where = "embed_tokens"  # of which no matrix is analysed
    embedding = write(tmp_path / "e", lambda n, t: t * (math.nan if where in n else 1.0))
    with torch.no_grad():
        other = load_model(BASE)
        other.resize_token_embeddings(32)
        other.save_pretrained(tmp_path / "other")
    cases = [
        ([BASE], "its weights are those of embedded:base; there is no update"),
        ([nan], "holds numbers that are NaN or infinite"),
        ([embedding], "embed_tokens.weight holds numbers that are NaN or infinite"),
        ([str(tmp_path / "other")], "is [32, 128] in"),
        ([known[0], known[0]], "is named twice"),
        (["embedded:nothing"], "the embedded models are"),
    ]
    for sources, wanted in cases:
        command = ["analyze", "--base", BASE, "--checkpoints", *sources]
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert wanted in lines[-1], lines
        assert not (tmp_path / "out").exists()
