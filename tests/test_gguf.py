"""GGUF files as models: the same numbers and tokens as the folder that they were made from."""

import csv
import json
import struct

import gguf
import numpy as np
import pytest
import torch
from conftest import FSDP2, launch, run_fit
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from opd.cli import main
from opd.errors import UserError
from opd.models import load_model, load_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def rotary_order(weight, heads):
    """Order the rows of a query or key matrix as llama.cpp does: pairs that rotate side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder, path, kind=F32, leave_out=()):
    """Write the Llama of a folder the way that llama.cpp's converter does."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if t in special else kinds.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_pad_token_id(vocabulary["<pad>"])
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, gguf_name in NAMES.items():
            name = name.replace(theirs, gguf_name)
        if name in leave_out:
            continue
        values = tensor.float().numpy()
        for part, count in heads.items():
            if part in name:
                values = rotary_order(values, count)
        values = np.ascontiguousarray(values)
        chosen = kind if values.ndim == 2 else F32
        writer.add_tensor(name, quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def llama(tiny):
    return tiny / "llama-student"


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


CHAT = [{"role": "user", "content": "what is 12 plus 30? é"}]


def log_probs(model):
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.log_softmax(-1)


def test_a_gguf_file_is_the_model_that_it_was_made_of(llama, file):
    ours, theirs = load_model(file), load_model(str(llama))
    assert torch.equal(log_probs(ours), log_probs(theirs))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    tokenizer, expected = load_tokenizer(file), load_tokenizer(str(llama))
    for template in ({"add_generation_prompt": True}, {}):
        rendered = tokenizer.apply_chat_template(CHAT, **template)["input_ids"]
        assert rendered == expected.apply_chat_template(CHAT, **template)["input_ids"]
    assert len(tokenizer) == len(expected)
    assert tokenizer.decode(rendered) == expected.decode(rendered)
    for token in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{token}_token_id") == getattr(expected, f"{token}_token_id")


def test_blocks_of_bits_are_the_numbers_that_they_stand_for(llama, tmp_path):
    model = load_model(write_gguf(llama, tmp_path / "q8.gguf", Q8_0), dtype="bfloat16")
    for name, tensor in load_file(llama / "model.safetensors").items():
        values = tensor.numpy()
        rounded = values if values.ndim == 1 else dequantize(quantize(values, Q8_0), Q8_0)
        assert torch.equal(model.state_dict()[name], torch.from_numpy(rounded).bfloat16())


def test_what_follows_is_an_ordinary_model(llama, file, tmp_path):
    models = ["--model.student", file, "--model.teacher", file, "--model.max_new_tokens", "4"]
    models += ["--model.objective", "opd.objectives.FixedNegativeAdvantage"]  # asks no twin
    run_fit(tmp_path / "run", *models, steps=1)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main(["export", "--checkpoint", checkpoint, "--output", str(tmp_path / "run.hf")]) == 0
    assert main(["export", "--checkpoint", file, "--output", str(tmp_path / "file.hf")]) == 0
    assert "quantization_config" not in (tmp_path / "run.hf" / "config.json").read_text()
    for name, tensor in load_file(llama / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "file.hf" / "model.safetensors")[name], tensor)
    load_tokenizer(str(tmp_path / "file.hf"))


@pytest.mark.slow
def test_ranks_that_share_a_model_out_read_it_like_one(file, tmp_path):
    """Rank 0 reads the weights of FSDP2; the others build the model without them."""
    models = ["--model.student", file, "--model.teacher", file, "--model.max_new_tokens", "4"]
    models += ["--model.objective", "opd.objectives.FixedNegativeAdvantage"]  # asks no twin
    one = run_fit(tmp_path / "one", *models, steps=1)
    two = launch(2, tmp_path / "two", *FSDP2, *models, steps=1)
    for name in ("opd/reverse_kl", "rollout/tokens", "opd/student_entropy"):
        expected = metric(one, name)
        assert metric(two, name) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def metric(run, name):
    with (run / "metrics.csv").open() as rows:
        return float(next(row[name] for row in csv.DictReader(rows) if row.get(name)))


def test_a_header_is_read_once(llama, tmp_path, monkeypatch):
    """For config, tokenizer and weights; what is written there later is another model."""
    path = tmp_path / "counted.gguf"
    source = write_gguf(llama, path)
    reads, reader = [], gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda p: reads.append(p) or reader(p))
    load_tokenizer(source), load_model(source), load_tokenizer(source)
    assert len(reads) == 1
    path.unlink()  # its pages are mapped
    write_gguf(llama, path, Q8_0)
    assert not torch.equal(log_probs(load_model(source)), log_probs(load_model(str(llama))))
    assert len(reads) == 2


def changed(file, tmp_path, change):
    path = tmp_path / "changed.gguf"
    with open(file, "rb") as whole:
        path.write_bytes(change(whole.read()))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda whole: b"GGML" + whole[4:],
            r"is no GGUF file: it begins with b'GGML', not b'GGUF'",
        ),
        (lambda whole: b"", r"is no GGUF file: it begins with b''"),
        (lambda whole: whole[:20], "cut short or damaged"),
        (lambda whole: whole[: len(whole) // 9], "cut short or damaged"),
        (lambda whole: whole[:-999], "cut short or damaged"),
        (lambda whole: whole[:4] + struct.pack("<I", 99) + whole[8:], "is GGUF v99; this reader"),
        (lambda whole: whole.replace(b"llama", b"lxama"), "architecture lxama is not supported"),
    ],
)
def test_broken_files_are_named_in_a_line(file, tmp_path, change, message):
    source = changed(file, tmp_path, change)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=message) as error:
            load(source)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"{source}: ")


def test_weights_are_exactly_those_of_the_model(llama, tmp_path):
    source = write_gguf(llama, tmp_path / "part.gguf", leave_out={"blk.1.ffn_up.weight"})
    with pytest.raises(UserError, match=r"they lack 1, as model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(source)


def test_without_the_package_a_line_says_what_to_install(file, monkeypatch):
    monkeypatch.setattr("opd.models.gguf.is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"not installed; pip install 'opd\[gguf\]'"):
        load_model(file)


def test_ollama_names_files_by_their_digest(file, tmp_path):
    blob = changed(file, tmp_path, bytes)
    (tmp_path / "changed.gguf").rename(tmp_path / "sha256-12")
    assert torch.equal(
        log_probs(load_model(str(tmp_path / "sha256-12"))), log_probs(load_model(file))
    )
    with pytest.raises(UserError, match="there is no such model folder, checkpoint or GGUF file"):
        load_model(blob)
    with pytest.raises(UserError, match=r"no config\.json, only sha256-12: name that file"):
        load_model(str(tmp_path))
