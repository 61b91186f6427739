"""Prompts: parsing, tokens, order and resuming."""

import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from opd.models import load_tokenizer
from opd.prompts import (
    Prompt,
    PromptBatch,
    PromptDataModule,
    PromptFormat,
    PromptLoader,
    read_rows,
    tokenize_rows,
)

CHAT = [{"role": "user", "content": "add 7 and 8"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
    jsonl = write(tmp_path / "a.jsonl", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(jsonl, "train") == (rows, "line")
    assert read_rows(str(tmp_path / "a.parquet"), "train") == (rows, "row")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt":"a"}\n{"prompt":"b"}\n{"prompt": oops}\n', "line 3: not valid JSON"),
        ('{"prompt":"a"}\n\n{"prompt":"b"}\n', "line 2: is empty"),
        ("", "holds no prompts"),
        ("\n", "holds no prompts"),
        ("[1]\n", "line 1: expected a JSON object"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(path), "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "line 2: needs a non-empty text 'prompt'"),
        ({"question": "1+1="}, r"line 2: needs .* it has \['question'\]"),
        ({"prompt": "1", "answer": ["2"]}, "line 2: 'answer' must be text or a number"),
        ({"prompt": "1", "teacher": 3}, "line 2: 'teacher' must be text"),
        ({"messages": "hello"}, "line 2: 'messages' must be a non-empty list"),
        ({"messages": []}, "line 2: 'messages' must be a non-empty list"),
        ({"messages": [{"text": "hi"}]}, "line 2: 'messages' must be a non-empty list"),
    ],
)
def test_bad_rows_are_named(row, message):
    tokenizer = load_tokenizer("embedded:base")
    rows = [{"prompt": "1+1="}, row]
    with pytest.raises(ValueError, match=message):
        tokenize_rows(rows, tokenizer, PromptFormat(), source="p.jsonl", unit="line")


def test_embedded_train_and_test_never_overlap():
    train, test = (read_rows(f"embedded:{name}", "")[0] for name in ("train", "test"))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in test[:50]:
        left, right = row["prompt"].rstrip("=").split("+")
        assert int(left) + int(right) == int(row["answer"])


def test_template_writes_its_own_bos_and_plain_text_gets_the_tokenizers(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    rows = [{"prompt": "add 7 and 8"}, {"messages": CHAT}]
    templated, chat = tokenize_rows(rows, tokenizer, PromptFormat())
    (plain,) = tokenize_rows(rows[:1], tokenizer, PromptFormat(chat_template=False))
    assert templated.token_ids == chat.token_ids
    for prompt in (templated, plain):
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(chat.token_ids) == "<s>[user]add 7 and 8[assistant]"
    assert tokenizer.decode(plain.token_ids) == "<s>add 7 and 8"


def test_system_prompt_and_template_arguments(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    tokenizer.chat_template = (
        "{{ mood }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    fmt = PromptFormat(system_prompt="be brief", chat_template_kwargs={"mood": "calm"})
    (prompt,) = tokenize_rows([{"prompt": "hi"}], tokenizer, fmt)
    assert tokenizer.decode(prompt.token_ids) == "calm[system]be brief[user]hi"


def test_messages_need_a_chat_template(tiny):
    tokenizer = load_tokenizer(str(tiny / "gpt2-student"))
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        tokenize_rows([{"messages": CHAT}], tokenizer, PromptFormat())


def test_batches_are_padded_left_and_trimmed():
    prompts = [Prompt(0, (5, 6, 7)), Prompt(1, (8,)), Prompt(2, (9, 9))]
    batch = PromptBatch.collate(prompts, pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 9]]
    assert batch.mask.sum(1).tolist() == [3, 1, 2]
    part = batch.select([2, 1])
    assert part.ids.tolist() == [[9, 9], [0, 8]]
    assert part.repeat(2).ids.tolist() == [[9, 9], [9, 9], [0, 8], [0, 8]]


PROMPTS = [Prompt(i, (i + 1,)) for i in range(10)]


def rows_of(batches):
    return [[p.row for p in batch.prompts] for batch in batches]


def test_an_epoch_holds_every_prompt_once_and_epochs_differ():
    loader = PromptLoader(PROMPTS, 4, 0, seed=0)
    first, second = rows_of(loader), rows_of(loader)
    assert [len(batch) for batch in first] == [4, 4, 2] == [len(batch) for batch in second]
    assert sorted(itertools.chain(*first)) == list(range(10)) == sorted(itertools.chain(*second))
    assert first != second


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5])
def test_resume_repeats_nothing_and_skips_nothing(stop):
    def batches(loader):
        while True:
            yield from loader

    straight = batches(PromptLoader(PROMPTS, 4, 0, seed=3))
    expected = rows_of(next(straight) for _ in range(8))
    loader = PromptLoader(PROMPTS, 4, 0, seed=3)
    stream = batches(loader)
    before = rows_of(next(stream) for _ in range(stop))
    resumed = PromptLoader(PROMPTS, 4, 0, seed=3)
    resumed.load_state_dict(loader.state_dict())
    again = batches(resumed)
    assert before + rows_of(next(again) for _ in range(8 - stop)) == expected


def test_ranks_share_the_global_batch():
    whole = rows_of(PromptLoader(PROMPTS, 4, 0, seed=1))
    ranks = [rows_of(PromptLoader(PROMPTS, 4, 0, seed=1, rank=r, world_size=2)) for r in (0, 1)]
    for batch, left, right in zip(whole, *ranks, strict=True):
        assert sorted(left + right) == sorted(batch)


def data(tmp_path, **options):
    rows = [{"prompt": "1" * n} for n in (2, 5, 9)]
    source = write(tmp_path / "p.jsonl", *rows)
    return PromptDataModule(source, tokenizer="embedded:base", **options)


def test_overlong_prompts_are_dropped_and_counted(tmp_path, caplog):
    module = data(tmp_path, max_prompt_tokens=5)
    module.setup("fit")
    assert [len(p.token_ids) for p in module.train_prompts] == [2, 5]
    assert "1 of 3 prompts are longer than data.max_prompt_tokens=5" in caplog.text


def test_overlong_prompts_can_be_an_error(tmp_path):
    with pytest.raises(ValueError, match="1 of 3 prompts are longer"):
        data(tmp_path, max_prompt_tokens=5, overlong="error").setup("fit")
    with pytest.raises(ValueError, match="3 of 3 prompts are longer"):
        data(tmp_path, max_prompt_tokens=1).setup("fit")
