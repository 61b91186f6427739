"""What is a model and what is not: its weights, its files, its kind, and how it wants to be run."""

import json
import shutil

import pytest
import torch
from conftest import run_fit
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from opd import checkpoints
from opd.cli import main
from opd.errors import UserError
from opd.models import load_model, load_tokenizer, student_files
from opd.models.load import TRUST
from opd.strategies import _check_names

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A small Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


def with_weights(folder, change, tmp_path):
    """Copy a model with other weights, ``change(name, tensor)`` at a time: pairs to keep."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    weights = load_file(copy / "model.safetensors")
    pairs = [pair for name, tensor in weights.items() for pair in change(name, tensor)]
    save_file(dict(pairs), copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def without(part):
    return lambda name, tensor: [] if part in name else [(name, tensor)]


def renamed(rename):
    return lambda name, tensor: [(rename(name), tensor)]


def also(name, tensor):
    return lambda key, value: [(key, value), (name, tensor)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("_orig_mod.{}".format), r"'_orig_mod\.' out of their names"),
        (renamed("module.{}".format), r"'module\.' out of their names"),
        (
            renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod.")),
            r"lack 9, as model\.layers\.1\.input_layernorm\.weight.*'_orig_mod\.'",
        ),
        (without("lm_head"), r"lack 1, as lm_head\.weight"),
        (without("layers.1.mlp.up_proj"), r"lack 1, as model\.layers\.1\.mlp\.up_proj\.weight"),
        (without("layers.1."), r"lack 9, as model\.layers\.1\."),
        (
            also("model.layers.2.mlp.up_proj.weight", torch.zeros(64, 32)),
            r"hold beyond those of the model 1, as model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (also("score.weight", torch.zeros(2, 32)), r"1, as score\.weight"),
        (
            lambda name, tensor: [(name, tensor[:-1] if "lm_head" in name else tensor)],
            r"lm_head\.weight has shape \[39, 32\], LlamaForCausalLM needs \[40, 32\]",
        ),
    ],
)
def test_weights_are_exactly_those_of_the_model(untied, tmp_path, caplog, change, message):
    with pytest.raises(UserError, match=message):
        load_model(with_weights(untied, change, tmp_path))
    assert "MISSING" not in caplog.text  # no table of transformers' beside the line


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("llama-student", also("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4))),
        ("gpt2-student", also("transformer.h.0.attn.bias", torch.zeros(1, 1, 4, 4))),
        ("gpt2-student", also("transformer.h.0.attn.masked_bias", torch.zeros(1))),
        ("gpt2-student", renamed(lambda name: name.removeprefix("transformer."))),
        ("llama-student", renamed(lambda name: name.removeprefix("model."))),
    ],
)
def test_what_older_versions_saved_besides_or_under_other_names_is_no_fault(
    tiny, tmp_path, source, change
):
    old = load_model(with_weights(tiny / source, change, tmp_path)).state_dict()
    expected = load_model(str(tiny / source)).state_dict()
    assert all(torch.equal(old[name], tensor) for name, tensor in expected.items())


def test_a_head_beside_a_tied_one_is_refused_if_it_differs(tiny, untied, tmp_path):
    folder = shutil.copytree(untied, tmp_path / "two")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="hold two that differ; set tie_word_embeddings to false"):
        load_model(str(folder))
    embedding = load_file(tiny / "llama-student" / "model.safetensors")["model.embed_tokens.weight"]
    copy = also("lm_head.weight", embedding.clone())
    load_model(with_weights(tiny / "llama-student", copy, tmp_path))


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_a_tied_model_stays_one_matrix_through_checkpoint_and_export(
    tiny, tmp_path, from_checkpoint
):
    student, teacher = str(tiny / "llama-student"), str(tiny / "llama-teacher")
    own = load_model(student)

    def fit(name, source):
        models = ["--model.student", source, "--model.teacher", teacher]
        run_fit(tmp_path / name, *models, "--model.max_new_tokens", "4", steps=1)
        return str(tmp_path / name / "checkpoints" / "last.ckpt")

    checkpoint = fit("first", student)
    if from_checkpoint:
        checkpoint = fit("second", checkpoint)
    loaded = load_model(checkpoint)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.num_parameters() == own.num_parameters()
    assert main(["export", "--checkpoint", checkpoint, "--output", str(tmp_path / "hf")]) == 0
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == own_names(student)


def own_names(folder):
    return load_file(f"{folder}/model.safetensors").keys()


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertLMHeadModel(BertConfig(vocab_size=40, intermediate_size=32, **sizes))


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feed = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(vocab_size=40, **sizes, **heads, **feed))


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes))


def rwkv():
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    return RwkvForCausalLM(RwkvConfig(vocab_size=40, **sizes))


def classifier():
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bert, "BertLMHeadModel looks at tokens that follow: it is an encoder"),
        (bart, r"bart \(BartForConditionalGeneration\) is no causal language model of text"),
        (t5, r"t5 \(T5ForConditionalGeneration\) is no causal language model of text"),
        (rwkv, "RwkvForCausalLM does not leave out padding on the left of a prompt"),
        (classifier, r"score\.weight \(saved as LlamaForSequenceClassification\)"),
    ],
)
def test_other_kinds_of_models_are_refused_in_a_line(tmp_path, make, message):
    make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def llama4():
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **experts))


def qwen3_moe():
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    switches = {"output_router_logits": True, "output_hidden_states": True, "use_cache": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, **switches, head_dim=8))


@pytest.mark.parametrize("make", [llama4, qwen3_moe])
def test_unusual_models_run_like_any_other(tmp_path, make):
    """Llama 4's class does not say where its body is; routers' logits are not asked for."""
    make().save_pretrained(tmp_path)
    model = load_model(str(tmp_path)).eval()
    output = model(torch.tensor([[1, 2, 3]]))
    assert output.get("router_logits") is None
    assert output.hidden_states is None


CONFIG = {"model_type": "llama", "vocab_size": 8}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("model.safetensors", b"", "model.safetensors is cut short or damaged"),
        ("model.safetensors", None, "model.safetensors is cut short or damaged"),
        ("config.json", b"", "config.json is no valid JSON"),
        ("config.json", b'{"model_type": "llama", ', "config.json is no valid JSON"),
        ("config.json", b"\xff\xfe\x00", "config.json is no valid JSON"),
        ("config.json", b"{}", "config.json names no model_type"),
        ("config.json", b"[1]", "config.json names no model_type"),
        ("config.json", json.dumps({"model_type": "no_such"}).encode(), "no_such"),
        ("config.json", json.dumps({**CONFIG, "num_hidden_layers": "x"}).encode(), "x"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("generation_config.json", b"{", "generation_config.json is no valid JSON"),
    ],
)
def test_broken_files_are_named_in_a_line(untied, tmp_path, name, content, message):
    folder = shutil.copytree(untied, tmp_path / "broken")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=message) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_broken_tokenizers_are_named_in_a_line(tiny, tmp_path):
    folder = shutil.copytree(tiny / "llama-student", tmp_path / "broken")
    for content, message in [(b"{", "no valid JSON"), (b"version https://git-lfs", "git lfs pull")]:
        (folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(folder))


def save_checkpoint(path, checkpoint, *, sharded):
    """Write a file, or a folder with one shard."""
    if not sharded:
        torch.save(checkpoint, path)
        return
    rest = {key: value for key, value in checkpoint.items() if key != checkpoints.STATE_DICT}
    save_shards({checkpoints.STATE_DICT: checkpoint[checkpoints.STATE_DICT]}, checkpoint_id=path)
    torch.save(rest, path / checkpoints.META_FILE)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_holds_exactly_the_students_weights(vanilla, tmp_path, sharded):
    whole = torch.load(vanilla / "checkpoints" / "last.ckpt", weights_only=True)
    name, state = "student.model.norm.weight", whole["state_dict"]
    for i, (changed, message) in enumerate(
        [
            ({key: t for key, t in state.items() if key != name}, f"lacks 1 .* as {name}"),
            (state | {"student.extra": torch.ones(1)}, "beyond .*, as student.extra"),
            (state | {name: torch.ones(1)}, rf"{name} has shape \[1\], its config says"),
            (state | {"anchor.x": torch.ones(1)}, None),  # a callback's
        ]
    ):
        path = tmp_path / f"{i}.ckpt"
        save_checkpoint(path, {**whole, checkpoints.STATE_DICT: changed}, sharded=sharded)
        if message is None:
            loaded = load_model(str(path)).state_dict()
            assert all(torch.equal(state[f"student.{key}"], t) for key, t in loaded.items())
        else:
            with pytest.raises(UserError, match=message):
                load_model(str(path))


def test_a_run_goes_on_from_exactly_the_weights_that_it_has():
    """Under FSDP too, where a callback's tensors may be new, or those of one that is gone."""
    ours = {"student.a": 0, "student.b": 0, "anchor.a": 0}
    for names, message in [
        ({"student.a"}, "lacks 1 tensors of this run, as student.b"),
        ({"student.a", "student.b", "student.c"}, "1 weights that this run has not, as student.c"),
        ({"student.a", "student.b", "gone.a"}, None),
    ]:
        found = {name: 0 for name in ours if name in names}
        available = [f"state_dict.{name}" for name in names]
        if message is None:
            _check_names("x.ckpt", ours, found, available)
        else:
            with pytest.raises(UserError, match=message):
                _check_names("x.ckpt", ours, found, available)


# --- how it wants to be run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A small model that has no sdpa attention."""
    folder = tmp_path_factory.mktemp("models") / "gpt-oss"
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    GptOssForCausalLM(config).save_pretrained(folder)
    return folder


def saved(model, tokenizer, folder):
    """Save a model the way that checkpoints and exports do."""
    model.save_pretrained(folder)
    for name, content in student_files(model, tokenizer).items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("wanted", [None, "sdpa"])
def test_a_model_without_sdpa_gets_eager_with_a_warning(gpt_oss, caplog, wanted):
    model = load_model(str(gpt_oss), attn_implementation=wanted)
    assert model.config._attn_implementation == "eager"
    assert "GptOssForCausalLM has no sdpa attention: it gets eager" in caplog.text


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_the_attention_of_training_travels_with_the_model(tiny, tmp_path, caplog, chosen):
    source = str(tiny / "llama-student")
    tokenizer, model = load_tokenizer(source), load_model(source, attn_implementation=chosen)
    again = saved(model, tokenizer, tmp_path)
    assert load_model(again).config._attn_implementation == chosen
    assert load_model(again, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert AutoModelForCausalLM.from_pretrained(again).config._attn_implementation == chosen
    assert not caplog.text


def test_an_attention_that_is_not_there_is_named(tiny, tmp_path, caplog):
    source, wanted = tiny / "llama-student", "flash_attention_2"
    with pytest.raises(UserError, match=r"flash_attention_2 cannot be used here \(.*installed"):
        load_model(str(source), attn_implementation=wanted)
    with pytest.raises(UserError, match="attn_implementation nonsense cannot be used here"):
        load_model(str(source), attn_implementation="nonsense")
    folder = shutil.copytree(source, tmp_path / "trained elsewhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": wanted}))
    assert load_model(str(folder)).config._attn_implementation == "sdpa"
    assert "was trained with flash_attention_2" in caplog.text


def test_an_attention_for_gpus_is_not_tried_on_the_cpu(tiny, monkeypatch):
    def attention(*arguments, **options):
        raise RuntimeError("needs a GPU")

    monkeypatch.setitem(AttentionInterface._global_mapping, "of_gpus", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "of_gpus", lambda *a, **o: None)
    model = load_model(str(tiny / "llama-student"), attn_implementation="of_gpus")
    assert model.config._attn_implementation == "of_gpus"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        model(torch.ones(1, 1, dtype=torch.long))


@pytest.fixture
def own_code(tiny, tmp_path, monkeypatch):
    """A Llama under a name that only its own three files of code know."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    monkeypatch.syspath_prepend(tmp_path / "m")
    folder = shutil.copytree(tiny / "llama-student", tmp_path / "own")
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (folder / "layers_own.py").write_text("from transformers import LlamaForCausalLM as Base\n")
    (folder / "modeling_own.py").write_text(
        "from .configuration_own import OwnConfig\nfrom .layers_own import Base\n\n\n"
        "class OwnForCausalLM(Base):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig"}
    classes["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    own = {"auto_map": classes, "model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    return folder


def test_a_models_own_code_travels_with_it_and_runs_only_if_allowed(own_code, tmp_path):
    with pytest.raises(UserError) as refused:
        load_model(str(own_code))
    assert TRUST in str(refused.value)
    model = load_model(str(own_code), trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    tokenizer = load_tokenizer(str(own_code), trust_remote_code=True)
    assert {"configuration_own.py", "layers_own.py", "modeling_own.py"} <= {
        *student_files(model, tokenizer)
    }
    first, again = tmp_path / "first", tmp_path / "again"
    load_model(saved(model, tokenizer, first), trust_remote_code=True)
    shutil.rmtree(own_code)
    loaded = load_model(str(first), trust_remote_code=True)
    saved(loaded, tokenizer, again)
    for folder in (first, again):
        with pytest.raises(UserError, match="needs code of its own"):
            load_model(str(folder))
        assert {path.name for path in folder.glob("*.py")} == {
            *("configuration_own.py", "layers_own.py", "modeling_own.py")
        }
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(theirs).__name__ == "OwnForCausalLM"


def test_a_model_whose_weights_are_no_numbers_is_refused(untied, tmp_path):
    def spoil(name, tensor):
        if name == "lm_head.weight":
            tensor[3, 3] = torch.nan
        return [(name, tensor)]

    with pytest.raises(UserError, match="logits that are NaN or infinite: its weights are damaged"):
        load_model(with_weights(untied, spoil, tmp_path))
