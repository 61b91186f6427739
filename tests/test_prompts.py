"""Prompts: parsing, tokens, order and resuming."""

import datetime
import itertools
import json
from decimal import Decimal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import LLAMA_TEMPLATE
from lightning.pytorch.trainer.states import TrainerFn

from opd.errors import UserError
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
        ('[\n{"prompt":"a"}\n]\n', "line 1: not valid JSON .*; write one JSON object a line"),
        ('{"prompt":"a"}\n' + "[" * 10**5, "line 2: is nested too deeply"),
        ('{"prompt":"a"}\n{"m":' + '{"a":' * 10**5, "line 2: is nested too deeply"),
        ('{"prompt":"a","id":%s}' % ("9" * 5000), "line 1: has a number of 5000 digits"),
        ('{"prompt":"a"}\n{"prompt":"b","prompt":"c"}', "line 2: has 'prompt' twice"),
        ('{"prompt":[{"role":"user","role":"tool"}]}', "line 1: has 'role' twice"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(path), "train")


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b", "score": NaN}\r\n')
    rows, _ = read_rows(str(path), "train")
    assert [row["prompt"] for row in rows] == ["a", "b"]


ODD_ANSWERS = [
    ("NaN", "'answer' is nan; leave it out"),
    ("-Infinity", "'answer' is -inf"),
    ("1e400", "'answer' is inf"),
    ("true", "'answer' must be text or a number; it is true or false"),
    ("[[1]]", "'answer' must be text or a number; it is a list"),
    ('{"a": 1}', "'answer' must be text or a number; it is an object"),
    ('"\\ud83d"', r"holds '\\ud83d', half a character; remove it"),
]


@pytest.mark.parametrize(("answer", "message"), ODD_ANSWERS, ids=lambda text: text[:20])
def test_what_json_allows_and_no_answer_is_names_the_line(tmp_path, answer, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": "1", "answer": ' + answer + "}\n")
    with pytest.raises(UserError, match=f"p.jsonl line 2: {message}"):
        PromptDataModule(str(path), tokenizer="embedded:base").setup("fit")


@pytest.mark.parametrize(
    "row", [{"prompt": "1\ud83d"}, {"messages": [{"role": "user", "content": "\ud83d"}]}]
)
def test_half_a_character_in_a_prompt_names_the_row(row):
    with pytest.raises(UserError, match=r"rows row 0: holds '\\ud83d', half a character"):
        tokenize_rows([row], load_tokenizer("embedded:base"), PromptFormat())


PARQUET = {
    "decimal": (Decimal("12.50"), "12.50"),
    "integer": (7, "7"),
    "text": ("x", "x"),
    "null": (None, None),
    "time": (datetime.datetime(2020, 1, 1), "'answer' must be text or a number; it is a time"),
    "binary": (b"12", "'answer' must be text or a number; it is binary data"),
    "nested": ([[1.0]], "'answer' must be text or a number; it is a list"),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_columns_of_any_type_work_or_name_the_row(tmp_path, kind):
    value, expected = PARQUET[kind]
    path = str(tmp_path / "p.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1"], "answer": [value]}), path)
    module = PromptDataModule(path, tokenizer="embedded:base")
    if expected is None or "must" not in expected:
        module.setup("fit")
        assert [p.answer for p in module.train_prompts] == [expected]
    else:
        with pytest.raises(UserError, match=f"p.parquet row 0: {expected}"):
            module.setup("fit")


@pytest.mark.parametrize("content", [b"PAR1", b"", b'{"prompt": "1"}'])
def test_what_is_no_parquet_is_named(tmp_path, content):
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"p.parquet: cannot be read as parquet"):
        read_rows(str(tmp_path / "p.parquet"), "train")


def test_a_parquet_column_that_is_there_twice_is_named(tmp_path):
    columns = [pyarrow.array(["1"]), pyarrow.array(["2"])]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p.parquet: has column 'prompt' twice"):
        read_rows(str(tmp_path / "p.parquet"), "train")


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
        ({"messages": ["hi"]}, "line 2: 'messages' must be .*; turn 1 is text"),
        ({"messages": [*CHAT, None]}, "line 2: 'messages' must be .*; turn 2 is null"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "line 2: 'messages' must be .*; turn 1 has"),
        ({"messages": [{"role": "user"}]}, r"line 2: 'messages' must .*; turn 1 has \['role'\]"),
        ({"messages": json.dumps(CHAT)}, "line 2: 'messages' must .* write it as a JSON list"),
        ({"prompt": json.dumps(CHAT)}, "line 2: 'prompt' is a chat written as text; write it as"),
        ({"prompt": []}, "line 2: 'prompt' must be a non-empty list"),
        ({"prompt": ["hi"]}, "line 2: 'prompt' must be .*; turn 1 is text"),
        ({"prompt": 3}, "line 2: needs a non-empty text 'prompt' .*; its 'prompt' is a number"),
        ({"prompt": None}, "line 2: needs a non-empty text 'prompt' .*; its 'prompt' is null"),
        ({"prompt": b"hi"}, "line 2: needs .*; its 'prompt' is binary data"),
        ({"messages": [{"role": "assistant", "content": "hi"}, *CHAT]}, "begins with the assist"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "line 2: 'messages' begins with"),
        (
            {"messages": [{"role": "gpt", "content": "hi"}]},
            "line 2: .* knows no turn of role 'gpt'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]},
            "line 2: turn 1 of 'messages': its 'content' has a part of type 'image'",
        ),
        (
            {"prompt": [{"role": "user", "content": {"text": "hi"}}]},
            "line 2: turn 1 of 'prompt': its 'content' is an object; it must be text",
        ),
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


PARTS = [{"type": "text", "text": "add 7 "}, {"type": "text", "text": "and 8", "image": None}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "rain"}]}
FOUND = {"role": "tool", "content": "rain"}
SAID = {"role": "assistant", "content": "it is 8"}
SYSTEM = {"role": "system", "content": "hush"}


def text_of(tokenizer, row, fmt=None):
    (prompt,) = tokenize_rows([row], tokenizer, fmt or PromptFormat())
    return tokenizer.decode(prompt.token_ids)


@pytest.mark.parametrize("field", ["messages", "prompt"])
@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"role": "user", "content": PARTS}], "[user]add 7 and 8"),
        ([{"role": "user", "content": ["add 7", " and 8"]}], "[user]add 7 and 8"),
        ([*CHAT, CALL, FOUND], "[user]add 7 and 8[assistant]</s>[tool]rain"),
        ([*CHAT, SAID], "[user]add 7 and 8"),
        (
            [*CHAT, SAID, *CHAT, SAID, SAID],
            "[user]add 7 and 8[assistant]it is 8</s>[user]add 7 and 8",
        ),
        ([*CHAT, {"role": "assistant", "tool_calls": []}], "[user]add 7 and 8"),
        ([SYSTEM, *CHAT, SAID], "[system]hush[user]add 7 and 8"),
    ],
)
def test_a_chat_is_its_text_up_to_what_the_student_is_to_say(tiny, field, turns, expected):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    assert text_of(tokenizer, {field: turns}) == f"<s>{expected}[assistant]"


def test_the_call_of_a_tool_reaches_the_template(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<{{ c.name }}>"
        "{% endfor %}{% endfor %}"
    )
    assert text_of(tokenizer, {"messages": [*CHAT, CALL, FOUND]}) == "add 7 and 8<rain>rain"


def test_a_last_turn_of_the_assistant_is_gone_on_with_or_refused_on_demand(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    fmt = PromptFormat(last_assistant="continue")
    row = {"messages": [*CHAT, SAID]}
    assert text_of(tokenizer, row, fmt) == "<s>[user]add 7 and 8[assistant]it is 8"
    assert text_of(tokenizer, {"messages": CHAT}, fmt) == "<s>[user]add 7 and 8[assistant]"
    with pytest.raises(UserError, match="row 0: 'messages': its last turn has no text"):
        text_of(tokenizer, {"messages": [*CHAT, CALL]}, fmt)
    fmt = PromptFormat(last_assistant="refuse")
    assert text_of(tokenizer, {"messages": CHAT}, fmt) == "<s>[user]add 7 and 8[assistant]"
    with pytest.raises(UserError, match="row 0: 'messages' ends with the assistant's turn"):
        text_of(tokenizer, row, fmt)


def test_a_turn_that_the_template_passes_over_is_refused(tiny):
    """As Qwen's does with a developer's, and others with a system message."""
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or m.role == 'critic' %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    assert text_of(tokenizer, {"messages": [*CHAT, {"role": "critic", "content": "!"}]})[-1] == "!"
    with pytest.raises(UserError, match="row 0: the chat template knows no turn of role 'system'"):
        text_of(tokenizer, {"messages": [SYSTEM, *CHAT]})
    with pytest.raises(UserError, match="knows no turn of role 'system'"):
        text_of(tokenizer, {"prompt": "hi"}, PromptFormat(system_prompt="hush"))


def test_a_system_prompt_comes_before_whatever_has_none(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    fmt = PromptFormat(system_prompt="be brief")
    assert text_of(tokenizer, {"messages": CHAT}, fmt).startswith("<s>[system]be brief[user]add")
    own = text_of(tokenizer, {"messages": [SYSTEM, *CHAT]}, fmt)
    assert own == "<s>[system]hush[user]add 7 and 8[assistant]"


@pytest.mark.parametrize(
    "options", [{"system_prompt": "be brief"}, {"chat_template_kwargs": {"mood": "calm"}}]
)
def test_options_of_a_chat_template_need_one(tiny, options):
    (name,) = options
    gpt2 = load_tokenizer(str(tiny / "gpt2-student"))
    with pytest.raises(UserError, match=f"data.format.{name} needs .* and it has none"):
        text_of(gpt2, {"prompt": "hi"}, PromptFormat(**options))
    llama = load_tokenizer(str(tiny / "llama-student"))
    with pytest.raises(
        UserError, match=f"data.format.{name} .* data.format.chat_template is false"
    ):
        text_of(llama, {"prompt": "hi"}, PromptFormat(**options, chat_template=False))


def test_an_argument_that_the_chat_template_does_not_use_is_refused(tiny):
    fmt = PromptFormat(chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(UserError, match="the chat template does not use 'enable_thinkng'"):
        text_of(load_tokenizer(str(tiny / "llama-student")), {"prompt": "hi"}, fmt)


@pytest.mark.parametrize(
    "prompt", ["<s>[user]hi[assistant]", "[user]hi", "hi\n[assistant]\n", "hi</s>"]
)
def test_prompts_that_are_rendered_already_are_said_once(tiny, caplog, prompt):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    rows = [
        {"prompt": "hi"},
        {"prompt": prompt},
        {"messages": [{"role": "user", "content": prompt}]},
    ]
    tokenize_rows(rows, tokenizer, PromptFormat(), source="p.jsonl", unit="line")
    assert caplog.text.count("as if it were rendered already") == 1
    assert "p.jsonl line 2 (and 1 more) holds" in caplog.text
    assert "--data.format.chat_template false" in caplog.text


def test_prompts_that_are_not_rendered_are_not_said_to_be(tiny, caplog):
    rows = [{"prompt": "a < b, <b>, [x] and s>"}, {"messages": [SYSTEM, *CHAT, SAID]}]
    tokenize_rows(rows, load_tokenizer(str(tiny / "llama-student")), PromptFormat())
    tokenize_rows([{"prompt": "1+1="}], load_tokenizer("embedded:base"), PromptFormat())
    assert not caplog.text


def test_a_bos_of_the_text_is_the_only_one(tiny, caplog):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    rows = [{"prompt": "<s>[user]hi"}, {"prompt": "[user]hi"}, {"prompt": "<s>"}]
    prompts = tokenize_rows(rows, tokenizer, PromptFormat(chat_template=False))
    assert [p.token_ids.count(tokenizer.bos_token_id) for p in prompts] == [1, 1, 1]
    assert prompts[0].token_ids == prompts[1].token_ids
    assert "row 0 (and 1 more) begins with '<s>'" in caplog.text


def test_a_bos_that_the_tokenizer_would_not_add_stays_as_it_is(tiny, caplog):
    gpt2 = load_tokenizer(str(tiny / "gpt2-student"))
    (prompt,) = tokenize_rows([{"prompt": "<|endoftext|>hi"}], gpt2, PromptFormat())
    assert prompt.token_ids == tuple(gpt2("<|endoftext|>hi")["input_ids"])
    assert not caplog.text


NESTED = {
    "data": {"chat": CHAT, "question": "1+1="},
    "reward_model": {"ground_truth": 15, "style": "rule"},
    "extra": {"teacher": {"name": "math"}},
}


def test_fields_may_be_nested():
    tokenizer = load_tokenizer("embedded:base")
    fmt = PromptFormat(
        prompt_field="data.question",
        answer_field="reward_model.ground_truth",
        teacher_field="extra.teacher.name",
    )
    (prompt,) = tokenize_rows([NESTED], tokenizer, fmt)
    assert (prompt.answer, prompt.teacher) == ("15", "math")
    assert tokenizer.decode(prompt.token_ids) == "1+1="
    literal = {**NESTED, "reward_model.ground_truth": "16"}
    assert tokenize_rows([literal], tokenizer, fmt)[0].answer == "16"
    fmt = PromptFormat(prompt_field="data.chat")
    assert (
        text_of(tokenizer, {"data": {"chat": [{"role": "user", "content": "2+2="}]}}, fmt) == "2+2="
    )


@pytest.mark.parametrize("field", ["prompt", "messages", "answer", "teacher"])
def test_a_field_that_the_user_names_and_no_row_has_is_refused(tmp_path, field):
    rows = [{"prompt": "1+1=", "gold": {"value": None}}, {"prompt": "2", "level": 1}]
    fmt = PromptFormat(**{f"{field}_field": "gold.value"})
    module = PromptDataModule(
        write(tmp_path / "p.jsonl", *rows), tokenizer="embedded:base", format=fmt
    )
    with pytest.raises(UserError) as error:
        module.setup("fit")
    assert f"data.format.{field}_field: no row of {tmp_path / 'p.jsonl'} has 'gold.value'" in str(
        error.value
    )
    assert "rows have ['gold', 'level', 'prompt']" in str(error.value)


def test_a_field_of_some_rows_is_a_field(tmp_path):
    train = write(tmp_path / "train.jsonl", {"prompt": "1+1="})
    held_out = write(
        tmp_path / "held_out.jsonl", {"prompt": "1"}, {"prompt": "2", "gold": {"is": 3}}
    )
    fmt = PromptFormat(answer_field="gold.is")
    module = PromptDataModule(train, held_out, tokenizer="embedded:base", format=fmt)
    module.setup("fit")
    assert [p.answer for p in module.prompts] == [None, None, "3"]


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


def batches(loader):
    while True:
        yield from loader


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_a_batch_knows_the_one_that_follows_also_in_the_next_epoch(rank, ranks):
    """The last batch of an epoch has one prompt: none for the second rank, which knows that."""
    prompts = PROMPTS[:9]
    stream = batches(PromptLoader(prompts, 4, 0, seed=3, rank=rank, world_size=ranks))
    seven = [next(stream) for _ in range(7)]
    coming = [[prompt.row for prompt in batch.upcoming] for batch in seven[:-1]]
    assert coming == rows_of(seven[1:])
    assert seven[0].to("cpu").upcoming == seven[1].prompts


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5])
def test_resume_repeats_nothing_and_skips_nothing(stop):
    straight = batches(PromptLoader(PROMPTS, 4, 0, seed=3))
    expected = rows_of(next(straight) for _ in range(8))
    loader = PromptLoader(PROMPTS, 4, 0, seed=3)
    stream = batches(loader)
    before = rows_of(next(stream) for _ in range(stop))
    resumed = PromptLoader(PROMPTS, 4, 0, seed=3)
    resumed.load_state_dict(loader.state_dict())
    again = batches(resumed)
    assert before + rows_of(next(again) for _ in range(8 - stop)) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 10, 100])
@pytest.mark.parametrize("stop", range(6))
def test_resume_with_another_batch_size_goes_on_with_the_next_prompt(size, stop):
    """Ten prompts an epoch, three at a time, then so many."""

    def prompts(loader):
        return (row for batch in batches(loader) for row in rows_of([batch])[0])

    straight = prompts(PromptLoader(PROMPTS, 3, 0, seed=3))
    loader = PromptLoader(PROMPTS, 3, 0, seed=3)
    before = list(itertools.chain(*rows_of(itertools.islice(batches(loader), stop))))
    resumed = PromptLoader(PROMPTS, size, 0, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    after = list(itertools.islice(prompts(resumed), 30))
    assert before + after == list(itertools.islice(straight, len(before) + 30))


@pytest.mark.parametrize(
    ("prompts", "seed", "message"),
    [
        (PROMPTS, 4, r"\(seed_everything was 3 and is 4\)"),
        (PROMPTS[:9], 3, r"\(there were 10 and are 9\)"),
        ([*PROMPTS[:9], Prompt(9, (1,))], 3, r"\(there are as many, with other tokens\)"),
        ([*PROMPTS[:8], PROMPTS[9], PROMPTS[8]], 3, "with other tokens"),
        ([*PROMPTS[:7], Prompt(7, (8, 9)), Prompt(8, ()), PROMPTS[9]], 3, "with other tokens"),
        (PROMPTS[:9], 4, r"\(seed_everything was 3 and is 4; there were 10 and are 9\)"),
    ],
)
def test_a_place_in_other_prompts_is_refused(prompts, seed, message):
    state = PromptLoader(PROMPTS, 3, 0, seed=3).state_dict()
    with pytest.raises(UserError, match=f"{message}.*; go on with the same data"):
        PromptLoader(prompts, 3, 0, seed=seed).load_state_dict(state)


def test_a_place_counted_in_batches_is_read_with_a_warning(caplog):
    """Of checkpoints of earlier versions: {"epoch", "position"}."""
    resumed = PromptLoader(PROMPTS, 3, 0, seed=3)
    resumed.load_state_dict({"epoch": 0, "position": 2})
    straight = rows_of(PromptLoader(PROMPTS, 3, 0, seed=3))
    assert rows_of(resumed) == straight[2:]
    assert "if data.train, data.batch_size and seed_everything are what they were" in caplog.text


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
    with pytest.raises(ValueError, match=r"3 of 3 prompts are longer .*; raise it$"):
        data(tmp_path, max_prompt_tokens=1).setup("fit")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(tmp_path, limit):
    with pytest.raises(UserError, match=f"data.validation_limit must be at least 1, got {limit}"):
        data(tmp_path, validation_limit=limit)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_command_without_prompts_says_its_name(tmp_path, stage):
    with pytest.raises(UserError, match=f"^opd {stage} needs prompts: set --data.validation"):
        data(tmp_path).setup(TrainerFn(stage))


def several(tmp_path, **options):
    sources = {
        name: write(tmp_path / f"{name}.jsonl", *({"prompt": str(i), "answer": i} for i in rows))
        for name, rows in {"math": [10, 11, 123456], "code": [20, 21]}.items()
    }
    return PromptDataModule(
        sources, sources, tokenizer="embedded:base", max_prompt_tokens=5, **options
    )


def test_rows_of_several_data_sets_are_numbered_together_and_know_where_they_are(tmp_path):
    module = several(tmp_path, validation_limit=1)
    module.setup("fit")
    places = [(p.row, p.data_set, p.answer, p.where) for p in module.train_prompts]
    math, code = tmp_path / "math.jsonl", tmp_path / "code.jsonl"
    assert places == [
        (0, "math", "10", f"{math} line 1"),
        (1, "math", "11", f"{math} line 2"),
        (3, "code", "20", f"{code} line 1"),
        (4, "code", "21", f"{code} line 2"),
    ]
    assert [(p.row, p.data_set) for p in module.validation_prompts] == [(0, "math"), (3, "code")]
    assert module.train_sets == module.validation_sets == ["math", "code"]


def test_one_data_set_is_no_group(tmp_path):
    assert data(tmp_path).train_sets == []
    source = write(tmp_path / "p.jsonl", {"prompt": "1"})
    assert PromptDataModule({"math": source}).train_sets == []


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "data.train is an empty mapping"),
        ("[a.jsonl]", r"data.train=\[a.jsonl\]: name one source, or several as a mapping"),
        ("{a: 3}", r"data.train=\{a: 3\}: name one source, or several as a mapping"),
        ({"a/b": "x.jsonl"}, "data.train: 'a/b' names metr"),
    ],
)
def test_data_sets_need_names_that_metrics_can_have(sources, message):
    with pytest.raises(UserError, match=message):
        PromptDataModule(sources)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder as the hub has them: two configurations, of which one has two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    for name in ("main-train", "main-test", "hard-train"):
        write(folder / f"{name}.jsonl", {"prompt": name})
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n  - split: train\n    path: main-train.jsonl\n"
        "  - split: test\n    path: main-test.jsonl\n"
        "- config_name: hard\n  data_files: hard-train.jsonl\n---\n"
    )
    return str(folder)


def test_a_data_set_of_the_hub_has_configurations_and_splits(hub):
    assert list(read_rows(hub, "test", name="main")[0]) == [{"prompt": "main-test"}]
    assert list(read_rows(hub, "train", name="hard")[0]) == [{"prompt": "hard-train"}]


@pytest.mark.parametrize(
    ("split", "name", "message"),
    [
        ("train", None, r"choose with data.name one of its configurations \['main', 'hard'\]"),
        ("train", "easy", r"no 'easy' among its configurations \['main', 'hard'\]"),
        (
            "dev",
            "main",
            r"no 'dev' among its splits \['train', 'test'\]; choose with data.train_split",
        ),
    ],
)
def test_what_a_data_set_of_the_hub_has_not_is_named_with_what_it_has(hub, split, name, message):
    with pytest.raises(UserError, match=f"^{hub}: .*{message}"):
        read_rows(hub, split, name=name)


def test_the_hub_is_asked_for_the_configuration_and_revision(monkeypatch):
    """One for all, or by the data set's id."""
    asked = {}

    def load_dataset(source, name, *, split, revision):
        asked[source, split] = (name, revision)
        return [{"prompt": "1+1="}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"tokenizer": "embedded:base", "name": "main"}
    module = PromptDataModule("org/sums", "org/test", revision={"org/sums": "1e10"}, **options)
    module.setup("fit")
    assert asked == {
        ("org/sums", "train"): ("main", "1e10"),
        ("org/test", "test"): ("main", None),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "main"}, "data.name=main: no data set of this run is from the hub"),
        ({"revision": {"org/sums": "v1"}}, "data.revision: org/sums is no data set of the hub"),
    ],
)
def test_a_configuration_of_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        data(tmp_path, **options)


def test_a_folder_of_save_to_disk_is_refused_with_the_way_out(tmp_path):
    datasets.Dataset.from_list([{"prompt": "1"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"was written by save_to_disk; .* Dataset.to_parquet"):
        read_rows(str(tmp_path / "saved"), "train")


KINDS = [
    {"prompt": "1+1=", "answer": "2", "ability": "math", "level": 3, "facts": {"hard": False}},
    {"prompt": "2+2=", "answer": "4", "ability": "code", "level": 6.5, "facts": {"hard": True}},
    {"prompt": "3+3=", "answer": "6", "ability": "code", "level": 6, "facts": {"hard": False}},
    {"prompt": "4+4=", "answer": "8", "level": 1, "facts": None},
]


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({"ability": "code"}, [1, 2]),
        ({"ability": ["code", "math"]}, [0, 1, 2]),
        ({"ability": "code", "level": ">= 6.5"}, [1]),
        ({"level": "<3"}, [3]),
        ({"level": ["< 3", "> 6"]}, [1, 3]),
        ({"level": "<= 6"}, [0, 2, 3]),
        ({"level": 6.0}, [2]),
        ({"level": 1}, [3]),
        ({"facts.hard": True}, [1]),
        ({"facts.hard": False}, [0, 2]),
        (None, [0, 1, 2, 3]),
        ({}, [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "hub"])
def test_only_rows_whose_fields_have_these_values(tmp_path, monkeypatch, where, rows, kind):
    """They keep their numbers, for messages and for random numbers, whatever else is read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    path = tmp_path / "hub" / "train.jsonl"
    write(path, *KINDS)
    source = str(path if kind == "jsonl" else path.parent)
    both = {"a": source, "b": source}
    module = PromptDataModule(both, tokenizer="embedded:base", where=where)
    module.setup("fit")
    assert [p.row for p in module.train_prompts] == [*rows, *(row + len(KINDS) for row in rows)]
    assert [p.answer for p in module.train_prompts] == 2 * [KINDS[i]["answer"] for i in rows]
    line = f"line {rows[0] + 1}" if kind == "jsonl" else f"row {rows[0]}"
    assert module.train_prompts[0].where == f"{source} {line}"
    for prompt, row in module.examples:
        assert row["prompt"] == KINDS[prompt.row % len(KINDS)]["prompt"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"ability": "codes"}, r"has all of {'ability': 'codes'}; ability is 'math', 'code', ...$"),
        ({"ability": "math", "level": ">= 4"}, r"has all of .*; level is 3, 6.5, 6, 1, ...$"),
        (
            {"facts.easy": 1},
            r"has 'facts.easy'; rows have \['ability', 'answer', 'facts', 'level',",
        ),
        ({"ability": "math", "source": "x"}, r"has 'source'; rows have \['ability', 'answer',"),
        ({"facts.hard": 0}, r"has all of {'facts.hard': 0}; facts.hard is False, True, ...$"),
        ({"ability": ">= 1"}, r"has all of {'ability': '>= 1'}"),
    ],
)
def test_where_that_no_row_fulfils_is_refused(tmp_path, where, message):
    source = write(tmp_path / "p.jsonl", *KINDS)
    module = PromptDataModule(source, tokenizer="embedded:base", where=where)
    with pytest.raises(UserError, match=f"^data.where: no row of {source} {message}"):
        module.setup("fit")


def test_rows_of_the_hub_are_not_held_in_memory(hub):
    """A data set may have solutions of gigabytes beside its questions."""
    assert isinstance(read_rows(hub, "test", name="main")[0], datasets.Dataset)


ASKED = "{prompt} Answer in \\boxed{}."


@pytest.mark.parametrize(
    ("row", "fmt", "expected"),
    [
        ({"prompt": "1+1="}, {}, "[user]1+1= Answer in \\boxed{}."),
        ({"messages": [SYSTEM, *CHAT]}, {}, "[system]hush[user]add 7 and 8 Answer in \\boxed{}."),
        (
            {"messages": [*CHAT, SAID, *CHAT]},
            {},
            "[user]add 7 and 8[assistant]it is 8</s>[user]add 7 and 8 Answer in \\boxed{}.",
        ),
        (
            {"prompt": [SYSTEM, *CHAT]},
            {"system_turns": "drop", "prompt_template": "{prompt}"},
            "[user]add 7 and 8",
        ),
        (
            {"messages": [SYSTEM, *CHAT]},
            {"system_turns": "drop", "system_prompt": "be brief", "prompt_template": "{prompt}"},
            "[system]be brief[user]add 7 and 8",
        ),
        ({"prompt": "{prompt}"}, {}, "[user]{prompt} Answer in \\boxed{}."),
    ],
)
def test_what_is_asked_is_put_into_the_prompt_template(tiny, row, fmt, expected):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    text = text_of(tokenizer, row, PromptFormat(**{"prompt_template": ASKED, **fmt}))
    assert text == f"<s>{expected}[assistant]"


def test_plain_text_is_put_into_the_prompt_template_too():
    fmt = PromptFormat(prompt_template="0{prompt}", chat_template=False)
    assert text_of(load_tokenizer("embedded:base"), {"prompt": "1+1="}, fmt) == "01+1="


def test_a_chat_that_leaves_nothing_to_ask_is_refused(tiny):
    tokenizer = load_tokenizer(str(tiny / "llama-student"))
    with pytest.raises(UserError, match="'messages' has only system turns, which are dropped"):
        tokenize_rows([{"messages": [SYSTEM]}], tokenizer, PromptFormat(system_turns="drop"))
    with pytest.raises(UserError, match=r"no turn of the user for data.format.prompt_template"):
        tokenize_rows([{"messages": [SYSTEM]}], tokenizer, PromptFormat(prompt_template=ASKED))


# --- what the teacher alone reads -----------------------------------------------------------------


def informed(rows, source, **options):
    tokenizer = load_tokenizer(source)
    fmt = PromptFormat(context_field="hint", **options)
    prompts = tokenize_rows(rows, tokenizer, fmt)
    return [
        tuple(
            None if ids is None else tokenizer.decode(ids) for ids in (p.token_ids, p.teacher_ids)
        )
        for p in prompts
    ]


def test_a_context_is_put_into_the_teacher_s_prompt_alone(tiny):
    rows = [
        {"prompt": "add 7", "hint": "it is 9"},
        {"prompt": "add 8"},
        {"prompt": "9", "hint": ""},
    ]
    source = str(tiny / "llama-student")
    assert informed(rows, source) == [
        ("<s>[user]add 7[assistant]", "<s>[user]it is 9\n\nadd 7[assistant]"),
        ("<s>[user]add 8[assistant]", None),
        ("<s>[user]9[assistant]", None),
    ]
    after = {"teacher_template": "{prompt} ({context})", "prompt_template": "Q: {prompt}"}
    assert informed(rows[:1], source, **after) == [
        ("<s>[user]Q: add 7[assistant]", "<s>[user]Q: add 7 (it is 9)[assistant]")
    ]
    plain = informed(rows[:1], source, chat_template=False)
    assert plain == [("<s>add 7", "<s>it is 9\n\nadd 7")]


def test_a_context_goes_to_the_user_s_last_turn_and_may_hold_braces(tiny):
    chat = [*CHAT, {"role": "assistant", "content": "15"}, {"role": "user", "content": "and 9"}]
    rows = [{"messages": chat, "hint": "{prompt} {context}"}]
    ((ours, theirs),) = informed(rows, str(tiny / "llama-student"))
    assert ours == "<s>[user]add 7 and 8[assistant]15</s>[user]and 9[assistant]"
    assert theirs.endswith("[user]{prompt} {context}\n\nand 9[assistant]")
    assert theirs.startswith("<s>[user]add 7 and 8[assistant]15</s>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_template": "{prompt}"}, r"must hold \{prompt\} and \{context\}"),
        ({"teacher_template": "{context}"}, r"must hold \{prompt\} and \{context\}"),
    ],
)
def test_a_teacher_s_template_has_both(options, message):
    with pytest.raises(UserError, match=message):
        PromptFormat(context_field="hint", **options)


def test_a_context_must_be_text(tiny):
    with pytest.raises(UserError, match="rows row 0: 'hint' must be text"):
        informed([{"prompt": "1", "hint": 5}], str(tiny / "llama-student"))


OWN = PromptFormat(teacher_rendering="own", context_field="hint")
ROUND = LLAMA_TEMPLATE.replace("[{{", "({{").replace("}}]", "}})")


def readers_of(tiny, **templates):
    """A reader by name, each with a template of its own."""
    found = {}
    for name, template in templates.items():
        tokenizer = load_tokenizer(str(tiny / "llama-teacher"))
        tokenizer.chat_template = template
        found[name] = (f"org/{name}", tokenizer)
    return found


def read_by(prompts, tokenizer):
    return [p.teacher_ids and tokenizer.decode(p.teacher_ids) for p in prompts]


def test_each_prompt_is_rendered_by_its_own_teacher_for_it(tiny):
    student = load_tokenizer(str(tiny / "llama-student"))
    readers = readers_of(tiny, round=ROUND, same=LLAMA_TEMPLATE, base=None)
    rows = [{"prompt": "add 7", "teacher": name} for name in ("round", "same", "base", "nobody")]
    rows += [{"messages": CHAT, "teacher": "round"}, {**rows[0], "hint": "9"}]
    rows += [{**rows[1], "hint": "9"}]
    prompts = tokenize_rows(rows, student, OWN, teachers=readers)
    assert read_by(prompts, student) == [
        *("<s>(user)add 7[assistant]", None, "<s>add 7", None),
        *("<s>(user)add 7 and 8[assistant]", "<s>(user)9\n\nadd 7[assistant]"),
        "<s>[user]9\n\nadd 7[assistant]",
    ]
    assert {student.decode(p.token_ids) for p in prompts[:4]} == {"<s>[user]add 7[assistant]"}
    alone = tokenize_rows(rows[:1], student, OWN, teachers={None: readers["round"]})
    assert alone[0].teacher_ids is None  # of another name than the prompt's
    plain = tokenize_rows(rows, student, OWN)
    assert read_by(plain, student)[:5] == [None] * 5


def test_a_template_of_a_teacher_must_make_something_of_prompts(tiny):
    student = load_tokenizer(str(tiny / "llama-student"))
    silent = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    readers = readers_of(tiny, silent=silent, base=None, strict="{{ raise_exception('no!') }}")
    rows = [{"messages": [SYSTEM, *CHAT], "teacher": name} for name in readers]
    for i, (name, said) in enumerate(
        [
            ("silent", "the chat template knows no turn of role 'system'"),
            ("base", "the tokenizer has no chat template"),
            ("strict", "the chat template refuses it"),
        ]
    ):
        prefix = f"teacher_rendering own: teacher org/{name}: p line 1: .*{said}"
        with pytest.raises(UserError, match=prefix):
            tokenize_rows(rows[i : i + 1], student, OWN, source="p", unit="line", teachers=readers)


def test_arguments_that_a_teacher_s_template_does_not_know_are_not_missed(tiny):
    student = load_tokenizer(str(tiny / "llama-student"))
    student.chat_template = LLAMA_TEMPLATE + "{{ mood }}"
    fmt = PromptFormat(teacher_rendering="own", chat_template_kwargs={"mood": "!"})
    readers = readers_of(tiny, round=ROUND)
    rows = [{"prompt": "1", "teacher": "round"}]
    (prompt,) = tokenize_rows(rows, student, fmt, teachers=readers)
    assert student.decode(prompt.token_ids) == "<s>[user]1[assistant]!"
    assert student.decode(prompt.teacher_ids) == "<s>(user)1[assistant]"


def test_own_renderings_need_to_know_the_teachers(tiny):
    fmt = PromptFormat(teacher_rendering="own")
    data = PromptDataModule("embedded:test", tokenizer="embedded:base", format=fmt)
    with pytest.raises(UserError, match="teacher_rendering own needs the teachers"):
        data.setup("fit")
