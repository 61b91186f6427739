"""Loading, separating head from body, and the start-up checks."""

import json
import shutil

import pytest
import torch
from conftest import LLAMA_TEMPLATE

from opd import models
from opd.models import Head, completion_logits, hidden_states, load_model, load_tokenizer, passes
from opd.prompts import PromptFormat, tokenize_rows
from opd.teachers import Teachers

SOURCES = ["embedded:base", "llama-student", "gpt2-student"]


def resolve(source, tiny):
    return source if source.startswith("embedded:") else str(tiny / source)


@pytest.mark.parametrize("source", SOURCES)
def test_head_after_body_gives_the_models_logits_under_padding(source, tiny):
    model = load_model(resolve(source, tiny)).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7, 0], [3, 4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    ours = completion_logits(model, ids, mask, mask)
    assert torch.equal(Head.of(model)(hidden_states(model, ids, mask, mask)), ours)
    expected = [model(torch.tensor([row])).logits[0] for row in ([5, 6, 7], [3, 4, 5, 6, 7, 8])]
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_gradient_does_not_suffer_from_bfloat16_logits():
    """Under bf16 autocast the head stays float32: rounding its output costs several per cent."""
    model = load_model("embedded:base").eval()
    head = model.get_output_embeddings().weight
    ids = torch.tensor([[6, 7, 8, 14, 9, 10, 11, 15]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = hidden_states(model, ids, mask, mask).detach()
        logits = Head.of(model)(hidden)
    (ours,) = torch.autograd.grad(logits.log_softmax(-1)[:, 9].sum(), head)
    exact = (hidden.double() @ head.double().T).log_softmax(-1)[:, 9].sum()
    (expected,) = torch.autograd.grad(exact, head)
    assert logits.dtype == torch.float32
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("embedded:nope", "embedded:base, embedded:teacher"),
        ("/no/such/folder", "no such model folder"),
        ("./relative", "no such model folder"),
        ("last.ckpt", "no such model folder, checkpoint or GGUF file"),
        ("", "no model named"),
    ],
)
def test_missing_models_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        load_model(source)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_loaded(tiny, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny / "llama-student", folder)
    (folder / "model.safetensors").unlink()
    torch.save(load_model(str(tiny / "llama-student")).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no causal language model could be loaded"):
        load_model(str(folder))


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "x.ckpt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not a whole checkpoint: the file is cut short"):
        load_model(str(tmp_path / "x.ckpt"))
    with pytest.raises(ValueError, match="is not a checkpoint of opd fit"):
        load_model(str(tmp_path / "foreign.ckpt"))


def test_float16_is_refused_and_bfloat16_not():
    for precision in ("16-mixed", "16-true"):
        with pytest.raises(ValueError, match=f"precision {precision} is not supported; use bf16"):
            models.check_precision(precision)
    models.check_precision("bf16-mixed")
    models.check_precision("32-true")


def test_tokenizers_that_differ_are_refused(tiny):
    ours, theirs = (load_tokenizer(str(tiny / f"{f}-student")) for f in ("llama", "gpt2"))
    with pytest.raises(ValueError, match=r"tokenizer differs from the student's in .* for example"):
        models.check_tokenizers(ours, theirs, "other")
    models.check_tokenizers(ours, load_tokenizer(str(tiny / "llama-teacher")), "same")


CHAT = [{"role": "user", "content": "hi there"}]
OTHER = LLAMA_TEMPLATE.replace("[{{", "<{{").replace("}}]", "}}>")


def warned(tiny, caplog, template, rows, ours=LLAMA_TEMPLATE, fmt=None):
    """What is said of a teacher whose template is another one, as it reads rows."""
    student, teacher = (load_tokenizer(str(tiny / f"llama-{r}")) for r in ("student", "teacher"))
    student.chat_template, teacher.chat_template = ours, template
    fmt = fmt or PromptFormat()
    prompts = tokenize_rows(rows, student, fmt, source="p.jsonl", unit="line")
    teachers = Teachers({"default": None}, 300, tokenizers={"default": ("org/teacher", teacher)})
    caplog.clear()
    teachers.check_rendering(list(zip(prompts, rows, strict=True)), fmt, student)
    return [record.getMessage() for record in caplog.records]


def test_a_teacher_that_would_read_prompts_otherwise_is_said_once_with_both(tiny, caplog):
    rows = [{"prompt": "hi there"}, {"messages": CHAT}]
    (line,) = warned(tiny, caplog, OTHER, rows)
    assert (
        "teacher org/teacher would render p.jsonl line 1 as '<s><user>hi there[assistant]'" in line
    )
    assert "and reads '<s>[user]hi there[assistant]'" in line
    assert "set --data.format.teacher_rendering own, so that it reads that, or" in line
    assert "--model.tokenizer org/teacher" in line
    (line,) = warned(tiny, caplog, None, rows)
    assert "as '<s>hi there'" in line
    assert "it has no chat template; set --data.format.chat_template false" in line
    (line,) = warned(tiny, caplog, LLAMA_TEMPLATE, rows[:1], ours=None)
    assert "and reads '<s>hi there', as the student does" in line


def test_templates_that_render_the_prompts_of_the_run_alike_are_no_difference(tiny, caplog):
    """Another text of the template; or one that differs where these prompts do not go."""
    assert not warned(tiny, caplog, "{# mine #}" + LLAMA_TEMPLATE, [{"messages": CHAT}])
    tools = LLAMA_TEMPLATE + "{% if tools %}{{ tools }}{% endif %}"
    assert not warned(tiny, caplog, tools, [{"prompt": "hi"}, {"messages": CHAT}])
    plain = PromptFormat(chat_template=False)
    assert not warned(tiny, caplog, OTHER, [{"prompt": "hi"}], fmt=plain)


def test_a_teacher_is_judged_by_the_prompts_that_it_reads(tiny, caplog):
    student, theirs, same = (load_tokenizer(str(tiny / "llama-student")) for _ in range(3))
    theirs.chat_template = OTHER
    rows = [{"prompt": "hi", "teacher": "same"}, {"prompt": "hi", "teacher": "other"}]
    prompts = tokenize_rows(rows, student, PromptFormat())
    tokenizers = {"same": ("org/same", same), "other": ("org/other", theirs)}
    teachers = Teachers(dict.fromkeys(tokenizers), 300, tokenizers=tokenizers)
    teachers.check_rendering(list(zip(prompts, rows, strict=True)), PromptFormat(), student)
    (record,) = caplog.records
    assert "teacher org/other would render rows row 1" in record.getMessage()


def test_of_long_prompts_the_difference_is_shown(tiny, caplog):
    (line,) = warned(tiny, caplog, OTHER + "\n", [{"prompt": "hi\n" * 500}])
    assert len(line) < 500
    long = LLAMA_TEMPLATE.replace("[assistant]", "[student]")
    (line,) = warned(tiny, caplog, long, [{"prompt": "hi\n" * 500}])
    assert r"as ...'\nhi\nhi\nhi\nhi\nhi\nhi\n[student]' and reads ...'\nhi" in line
    assert r"hi\n[assistant]'" in line


def test_vocabularies_may_be_padded_but_must_cover_the_tokenizer(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    student, teacher = (load_model(str(tiny / f"llama-{r}")) for r in ("student", "teacher"))
    teacher.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    models.check_models(student, teacher, tokenizer, "padded")
    teacher.resize_token_embeddings(len(tokenizer) - 1)
    with pytest.raises(ValueError, match="teacher small: its vocabulary has"):
        models.check_models(student, teacher, tokenizer, "small")


def test_all_that_end_a_model_end_its_completions(tiny, caplog):
    """The generation config's and the tokenizer's, without those that are no tokens."""
    source = str(tiny / "llama-student")
    model, tokenizer = load_model(source), load_tokenizer(source)
    for configured, expected in [(None, (1,)), (2, (1, 2)), ([2, 5, 2], (1, 2, 5)), ([], (1,))]:
        model.generation_config.eos_token_id = configured
        assert models.eos_token_ids(model, tokenizer) == expected
    assert not caplog.text
    model.generation_config.eos_token_id = [2, 99999, -1]
    assert models.eos_token_ids(model, tokenizer) == (1, 2)
    assert "is no token" in caplog.text


@pytest.mark.parametrize(
    ("teachers", "given", "expected", "said"),
    [
        ({"t": (0,)}, None, (0,), None),
        ({"t": (0, 2)}, None, (0, 2), "teacher t ends with token [0, 2], the student with [0]"),
        ({"t": (2,)}, None, (0, 2), "any of [0, 2] ends a completion. To choose, set"),
        ({"s": (2,), "t": (3,)}, None, (0, 2, 3), "any of [0, 2, 3]"),
        ({"t": (2,)}, [7], (7,), "it will find every end of a completion unlikely"),
        ({"t": (2,)}, [2, 7], (2, 7), None),
        ({"t": (2,)}, [], (), "all run to model.max_new_tokens"),
    ],
)
def test_ends_are_those_of_student_and_teachers_or_those_asked_for(
    caplog, teachers, given, expected, said
):
    assert models.ends_of_all((0,), teachers, given) == expected
    assert said in caplog.text if said else not caplog.text


@pytest.mark.parametrize("ids", [[99999], [-1], [1, 299], [1, 5, 1]])
def test_an_end_that_is_no_token_or_there_twice_is_refused(tiny, ids):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    models.check_eos_token_ids([1, 2], tokenizer)
    with pytest.raises(ValueError, match=rf"eos_token_ids: {ids[-1]} is"):
        models.check_eos_token_ids(ids, tokenizer)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"do_sample": False, "temperature": 0.9, "top_k": 5}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 0.9}, {"do_sample": True, "temperature": 0.9}),
        ({"length_penalty": 2.0}, {}),
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_mended(tiny, tmp_path, fields, kept):
    folder = shutil.copytree(tiny / "llama-student", tmp_path / "model")
    own = {"bos_token_id": 0, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps({**own, **fields}))
    model = load_model(str(folder))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    del saved["transformers_version"]
    assert saved == {**own, **kept} or saved == {**own, **kept, "pad_token_id": None}


@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.float64, "precision 32-true"), (torch.bfloat16, "to nothing")]
)
def test_master_weights_are_float32(tiny, dtype, message):
    model = load_model(str(tiny / "llama-student"))
    models.check_master_weights(model)
    with pytest.raises(ValueError, match=message):
        models.check_master_weights(model.to(dtype))


def test_completions_must_fit_the_context(tiny):
    model = load_model(str(tiny / "llama-student"))
    models.check_context(models.context_length(model), "student", 28, 100)
    with pytest.raises(ValueError, match="lower max_new_tokens to 99"):
        models.check_context(models.context_length(model), "student", 29, 100)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_sequences_have_the_hidden_states_of_padded_ones(tiny, family, monkeypatch):
    """On a GPU flash attention takes them so; sdpa can too, with a mask that it makes itself."""
    model = load_model(str(tiny / f"{family}-student")).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 6:], mask[2, :1], mask[2, 8:] = False, False, False, False
    select = mask & (torch.rand(3, 9, generator=generator) < 0.6)
    read = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    padded = hidden_states(model, ids, mask, select)
    monkeypatch.setattr(passes, "PACKED", ("sdpa",))
    packed = hidden_states(model, ids, mask, select)
    assert torch.allclose(packed, padded, atol=1e-5)
    assert read == [27, int(mask.sum())]
