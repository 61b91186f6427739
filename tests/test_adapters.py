"""Low-rank adapters: what they compute, what is trained and kept, and how they come back."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import (
    AUTO,
    FSDP2,
    STRATEGIES,
    assert_same,
    fail,
    launch,
    load,
    load_any,
    run_fit,
    slow_but,
    student_of,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from opd import OPDModule
from opd.cli import main
from opd.errors import UserError
from opd.models import LoRA, completion_logits, load_model, load_tokenizer, whole_weights
from opd.models.adapters import REPACKS, base_of, config_of
from opd.models.load import EMBEDDED
from opd.models.passes import Head

RANK = ["--model.adapter.rank", "4", "--model.optimizer.lr", "3e-3"]
EVERY = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]


def adapted(source: str, seed: int = 1, **options: object):
    """A model with an adapter that does something: its B is not 0."""
    model = load_model(source, adapter=LoRA(rank=4, **options)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def logits(model) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) + 4
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return completion_logits(model, ids, mask, mask)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three steps of an adapter with the searches of effopd/auto, a checkpoint of each."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    return run_fit(folder, *AUTO, *RANK, *EVERY, steps=3)


# --- what it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-student", "gpt2-student"])
def test_a_layer_multiplies_with_its_weight_and_the_low_rank_change(tiny, name):
    """Against the definition: W + alpha / rank * B A in a plain model, W transposed in GPT-2."""
    model = adapted(str(tiny / name), alpha=6.0)
    plain = load_model(str(tiny / name)).eval()
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    changed = 0
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight = plain.get_submodule(path).weight
            change = 6.0 / 4 * b @ a
            with torch.no_grad():
                weight += change.T if name == "gpt2-student" else change
            changed += 1
    assert changed == (14 if name == "llama-student" else 8)  # every linear layer but the head
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)


def test_it_begins_as_the_base_alike_everywhere_and_only_it_is_trained(tiny):
    source = str(tiny / "llama-student")
    first, second = (load_model(source, adapter=LoRA(rank=4, seed=3)) for _ in range(2))
    other = load_model(source, adapter=LoRA(rank=4, seed=4))
    assert torch.equal(logits(first), logits(load_model(source)))
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert_same(first.state_dict(), second.state_dict())
    drawn = [name for name in trained if "lora_A" in name]
    assert not any(torch.equal(other.state_dict()[n], first.state_dict()[n]) for n in drawn)


def test_to_load_one_draws_no_random_numbers(tiny):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(str(tiny / "llama-student"), adapter=LoRA())
    assert torch.equal(torch.rand(3), expected)


def test_targets_are_ends_of_names(tiny):
    model = load_model(str(tiny / "llama-student"), adapter=LoRA(targets=["q_proj", "down_proj"]))
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == {"q_proj", "down_proj"}
    one = load_model(str(tiny / "llama-student"), adapter=LoRA(targets="q_proj"))
    assert sum(hasattr(m, "lora_A") for m in one.modules()) == 2


def test_frozen_weights_may_be_of_less_precision(tiny):
    model = load_model(str(tiny / "llama-student"), dtype="bfloat16", adapter=LoRA())
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("name", ["llama-student", "gpt2-student"])
def test_whole_weights_are_those_of_a_plain_model_with_the_adapter_in_them(tiny, name):
    model, plain = adapted(str(tiny / name)), load_model(str(tiny / name)).eval()
    whole = dict(whole_weights(model))
    assert set(whole) == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(whole, strict=False)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)


def test_the_base_s_revision_is_told_as_peft_tells_it(tiny, tmp_path):
    model = load_model(str(tiny / "llama-student"))
    LoRA().attach(model, "some/model@v2")
    (tmp_path / "adapter_config.json").write_bytes(config_of(model))
    told = peft.PeftConfig.from_pretrained(tmp_path)
    assert (told.base_model_name_or_path, told.revision) == ("some/model", "v2")
    assert base_of("it", tmp_path) == "some/model@v2"


# --- four bits ------------------------------------------------------------------------------------


def test_a_base_in_four_bits_is_that_of_its_dequantized_weights():
    """Against the definition in a plain model: each weight to 4 bits and back, B A beside it.

    (Its layers are wide: with AVX-512, bitsandbytes misreads those whose width is no multiple of
    64.)
    """
    source = "embedded:base"
    model, plain = adapted(source, quantize="nf4"), load_model(source).eval()
    linear = [name for name, m in plain.named_modules() if type(m) is torch.nn.Linear]
    linear.remove("lm_head")
    with torch.no_grad():
        for name in linear:
            weight = plain.get_submodule(name).weight
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            back = dequantize_4bit(packed, state)
            assert 1e-3 < (back - weight).abs().max() / weight.abs().max() < 0.2
            a, b = _factors(model.get_submodule(name))
            weight.copy_(back + 32.0 / 4 * b @ a)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-3)
    whole = dict(whole_weights(model))
    assert set(whole) == {name for name, _ in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(whole[name], parameter.data, atol=1e-5, rtol=1e-5)


def test_four_bits_stay_where_they_are_whatever_the_processor_can(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = adapted("embedded:base", quantize="nf4")
    found = [vars(m)[REPACKS] for m in model.modules() if REPACKS in vars(m)]
    assert found == [False] * 28


def test_a_run_in_four_bits_keeps_the_adapter_alone_and_resumes(fit):
    options = [*AUTO, *RANK, "--model.adapter.quantize", "nf4"]
    straight = fit("straight", *options, steps=3)
    fit("halves", *options, steps=2)
    halves = fit("halves", *options, "--ckpt_path", "last", steps=3)
    assert_same(student_of(load(halves)), student_of(load(straight)))
    assert all("lora_" in name for name in student_of(load(straight)))
    load_model(str(straight / "checkpoints" / "last.ckpt"))  # merged into the base as it comes


def test_four_bits_are_refused_where_there_are_none(tiny, run, monkeypatch, tmp_path, capsys):
    nf4 = LoRA(quantize="nf4")
    with pytest.raises(UserError, match="an adapter's base is merged with it"):
        load_model(str(run / "checkpoints" / "last.ckpt"), adapter=nf4)
    with pytest.raises(UserError, match="needs a hub id or a folder"):
        load_model(whole_checkpoint(tmp_path), adapter=nf4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'opd\[qlora\]'"):
        load_model(str(tiny / "llama-student"), adapter=nf4)


def whole_checkpoint(tmp_path):
    return str(run_fit(tmp_path / "whole", steps=1) / "checkpoints" / "last.ckpt")


def test_four_bits_cannot_be_sharded(tmp_path):
    options = [*FSDP2, *RANK, "--model.adapter.quantize", "nf4"]
    _, printed = fail(2, tmp_path / "run", *options, steps=1)
    assert "model.adapter.quantize cannot be sharded" in printed


# --- the head -------------------------------------------------------------------------------------


def test_the_head_s_adapter_counts_and_has_its_gradient(tiny):
    """Of gpt2, whose head has a copy of the embedding: against autograd through plain logits."""
    model = adapted(str(tiny / "gpt2-student"), targets=["lm_head"])
    hidden = torch.randn(5, 32)
    (a, b), scale = _factors(model.lm_head), 32.0 / 4
    plain = hidden @ (model.lm_head.weight.detach() + scale * b @ a).T
    torch.testing.assert_close(Head.of(model)(hidden), plain)
    target = torch.tensor([3, 1, 4, 1, 5])
    for loss in (F.cross_entropy(Head.of(model)(hidden), target), F.cross_entropy(plain, target)):
        gradients = torch.autograd.grad(loss, [a, b])
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(F.cross_entropy(plain_of(model, hidden), target), [a, b])
        )


def plain_of(model, hidden):
    a, b = _factors(model.lm_head)
    return hidden @ model.lm_head.base_layer.weight.detach().T + 8.0 * (hidden @ a.T) @ b.T


def _factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def test_a_step_trains_the_head_s_adapter_and_nothing_of_a_frozen_head(fit):
    """The gradient is taken tile by tile; B of the head moves with the first step."""
    folder = fit("head", *RANK, "--model.adapter.targets", "[lm_head]", steps=1)
    state = student_of(load(folder))
    assert set(state) == {f"student.lm_head.lora_{x}.default.weight" for x in "AB"}
    assert state["student.lm_head.lora_B.default.weight"].abs().max() > 0


# --- what is kept ---------------------------------------------------------------------------------


def test_checkpoints_hold_adapters_alone_and_searches_move_nothing_else(run):
    checkpoint = load(run)
    names = set(student_of(checkpoint))
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    anchors = [key for key in checkpoint["state_dict"] if key.startswith("effopd_anchor")]
    assert len(anchors) == len(names)
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("effopd/coefficient")
    assert any(float(row.split(",")[column] or 0) != 0 for row in rows[1:])  # one was accepted
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 1_500_000  # all of it: 10 MB


def test_a_resumed_run_is_bit_for_bit_the_same(run, fit):
    for n in (1, 2):
        going_on = ["--ckpt_path", str(run / "checkpoints" / f"step=00000{n}.ckpt")]
        folder = fit(f"resumed{n}", *AUTO, *RANK, *EVERY, *going_on, steps=3)
        ours, theirs = load(folder), load(run)
        for part in ("state_dict", "optimizer_states"):
            assert_same(ours[part], theirs[part])


def test_another_base_is_noticed_by_its_name(run, fit, tmp_path, caplog):
    moved = tmp_path / "elsewhere"
    shutil.copytree(EMBEDDED / "base", moved)
    going_on = ["--ckpt_path", str(run / "checkpoints" / "step=000001.ckpt")]
    fit("same", *AUTO, *RANK, *going_on, steps=2)
    assert "was trained beside" not in caplog.text
    fit("moved", *AUTO, *RANK, *going_on, "--model.student", str(moved), steps=2)
    assert re.search(
        rf"was trained beside embedded:base, and goes on beside {moved}; are", caplog.text
    )


def test_a_checkpoint_is_its_base_with_the_adapter_merged(run, tmp_path):
    source = str(run / "checkpoints" / "last.ckpt")
    model = load_model("embedded:base", adapter=LoRA(rank=4)).eval()
    state = {name.removeprefix("student."): t for name, t in student_of(load(run)).items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    merged = load_model(source).eval()
    assert not any("lora" in name for name in merged.state_dict())
    assert (logits(merged) - logits(load_model("embedded:base"))).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    assert load_tokenizer(source).get_vocab() == load_tokenizer("embedded:base").get_vocab()


def test_exports_as_model_and_as_adapter_are_the_same_model(run, tmp_path, capsys):
    """peft itself reads the adapter; transformers the model."""
    source, whole, apart = str(run / "checkpoints" / "last.ckpt"), tmp_path / "w", tmp_path / "a"
    assert main(["export", "--checkpoint", source, "--output", str(whole)]) == 0
    arguments = ["--checkpoint", source, "--output", str(apart), "--adapter", "true"]
    assert main(["export", *arguments]) == 0
    names = {path.name for path in apart.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert "config.json" not in names
    by_peft = peft.PeftModel.from_pretrained(load_model("embedded:base"), apart).eval()
    expected = logits(AutoModelForCausalLM.from_pretrained(whole))
    torch.testing.assert_close(logits(by_peft.base_model.model), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_model(str(apart))), expected)
    assert load_tokenizer(str(apart)).eos_token == load_tokenizer(str(whole)).eos_token


def test_one_that_peft_has_made_is_a_student_and_a_teacher(tiny, tmp_path, fit):
    """Without tokenizer, as peft saves it, with a rank of its own for some layers."""
    base = AutoModelForCausalLM.from_pretrained(tiny / "llama-student")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 5}, use_rslora=True
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = logits(model.base_model.model)
    model.save_pretrained(tmp_path / "theirs")
    source = str(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_model(source)), expected, atol=1e-4, rtol=1e-4)
    assert len(load_tokenizer(source)) == len(load_tokenizer(str(tiny / "llama-student")))
    options = ["--model.student", source, "--model.teacher", source, "--data.format.chat_template"]
    options = ["--model.objective", "opd.objectives.FixedNegativeAdvantage", *options]
    folder = fit("on_top", *options, "false", *RANK, "--model.max_new_tokens", "8", steps=1)
    again = load_model(str(folder / "checkpoints" / "last.ckpt"))  # an adapter of an adapter
    assert (logits(again) - expected).abs().max() < 1  # one step from there


# --- the base as teacher --------------------------------------------------------------------------


def test_the_base_as_teacher_is_loaded_once_and_is_the_base(tmp_path):
    module = OPDModule(student="embedded:base", teacher="embedded:base", adapter=LoRA(rank=4))
    module.configure_model()
    (teacher,) = module.teachers.values()
    assert teacher.model is module.student
    with torch.no_grad():
        for parameter in module.weights.parameters().values():
            parameter.normal_(std=0.1)
    with teacher.speaking():
        assert torch.equal(logits(module.student), logits(load_model("embedded:base")))
        assert not module.student.training
    assert module.student.training
    assert (logits(module.student) - logits(load_model("embedded:base"))).abs().max() > 0.1
    apart = OPDModule(student="embedded:base", teacher="embedded:base")
    apart.configure_model()
    assert apart.teachers["default"].model is not apart.student


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but("fsdp2", *STRATEGIES))
def test_two_processes_train_the_adapter_of_one(name, tmp_path, fit):
    whole = student_of(load(fit("one", *AUTO, *RANK, steps=2)))
    run = launch(2, tmp_path / "two", *STRATEGIES[name], *AUTO, *RANK, steps=2)
    saved = load_any(run)
    names = {key for key in saved["state_dict"] if key.startswith("student.")}
    assert names == set(whole)
    merged = load_model(str(run / "checkpoints" / "last.ckpt"))
    alone = load_model(str(tmp_path / "one" / "checkpoints" / "last.ckpt"))
    torch.testing.assert_close(logits(merged), logits(alone), atol=1e-3, rtol=1e-3)
    assert (logits(alone) - logits(load_model("embedded:base"))).abs().max() > 1e-2


@pytest.mark.slow
def test_shards_go_on_bit_for_bit_with_frozen_weights_in_bfloat16(tmp_path):
    options = [*FSDP2, *AUTO, *RANK, "--model.adapter.base_dtype", "bfloat16"]
    straight = launch(2, tmp_path / "straight", *options, steps=3)
    launch(2, tmp_path / "halves", *options, steps=2)
    halves = launch(2, tmp_path / "halves", *options, "--ckpt_path", "last", steps=3)
    ours, theirs = (load_any(run)["state_dict"] for run in (halves, straight))
    assert_same(ours, theirs)


# --- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.adapter.rank", "0"], "rank=0 must be at least 1"),
        (["--model.adapter.targets", "[nothing]"], "cannot be adapted so"),
        (["--model.adapter.dropout", "1"], "dropout=1.0 at least 0 and below 1"),
    ],
)
def test_options_that_make_no_sense(options, message, capsys, tmp_path):
    arguments = ["fit", "--config", "quickstart", *options, "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.adapter.rank", "4", "--model.adapter.alpha", "8"], "its adapter has alpha 32.0"),
        (["--model.adapter.rank", "8"], "is of another student .*lora_A"),
        ([], "is of another student"),
    ],
)
def test_another_adapter_s_checkpoint_is_refused(options, message, run, tmp_path, capsys):
    checkpoint = ["--ckpt_path", str(run / "checkpoints" / "step=000001.ckpt")]
    arguments = ["fit", "--config", "quickstart", *AUTO, *options, *checkpoint]
    assert main([*arguments, "--output", str(tmp_path / "other")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line


def test_a_whole_student_s_checkpoint_is_refused_where_there_is_an_adapter(
    vanilla, tmp_path, capsys
):
    checkpoint = ["--ckpt_path", str(vanilla / "checkpoints" / "last.ckpt")]
    arguments = ["fit", "--config", "quickstart", *RANK, *checkpoint]
    assert main([*arguments, "--output", str(tmp_path / "other")]) == 2
    assert "holds a whole student, and this run has an adapter" in capsys.readouterr().err


def test_broken_adapters_are_named(run, tmp_path, tiny):
    source = tmp_path / "good"
    arguments = ["export", "--checkpoint", str(run / "checkpoints" / "last.ckpt")]
    assert main([*arguments, "--output", str(source), "--adapter", "true"]) == 0
    config = json.loads((source / "adapter_config.json").read_text())
    weights = load_file(source / "adapter_model.safetensors")
    first = next(iter(weights))

    def broken(name: str, config: object = config, weights: dict | None = weights) -> str:
        folder = tmp_path / name
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "adapter_config.json").write_text(text)
        if weights is not None:
            save_file(weights, folder / "adapter_model.safetensors")
        return str(folder)

    fewer = {name: t for name, t in weights.items() if name != first}
    more = {**weights, first.replace("layers.0", "layers.9"): torch.ones(2)}
    nan = {**weights, first: torch.full_like(weights[first], torch.nan)}
    for folder, message in [
        (broken("json", "{"), "adapter_config.json is no valid JSON"),
        (broken("list", "[]"), "names no base_model_name_or_path"),
        (broken("nameless", {**config, "base_model_name_or_path": None}), "names no base_model"),
        (broken("weightless", weights=None), "but no adapter_model.safetensors"),
        (broken("fewer", weights=fewer), f"the adapter lacks 1, as {first}"),
        (broken("more", weights=more), "holds beyond those of its base 1, as .*layers.9"),
        (broken("nan", weights=nan), "gives logits that are NaN or infinite"),
        (
            broken("other", {**config, "base_model_name_or_path": str(tiny / "llama-student")}),
            "cannot be merged into",
        ),
        (broken("gone", {**config, "base_model_name_or_path": "/no/where"}), "/no/where"),
    ]:
        with pytest.raises(UserError, match=message):
            load_model(folder)


def test_export_of_an_adapter_needs_one(tmp_path, capsys):
    arguments = ["--checkpoint", "embedded:base", "--adapter", "true"]
    assert main(["export", *arguments, "--output", str(tmp_path / "none")]) == 2
    assert "embedded:base holds a whole model, no adapter" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_peft_a_line_says_what_to_install(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'opd\[lora\]'"):
        load_model(str(tiny / "llama-student"), adapter=LoRA())
