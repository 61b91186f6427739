"""The built-in task, with chains worked out by hand."""

import itertools
import random

import pytest
import torch

from opd.embedded.arithmetic import PROMPTS, Problem, problems, rows
from opd.models import load_model, load_tokenizer


@pytest.mark.parametrize(
    ("numbers", "chain", "answer"),
    [
        ((123, 456), "369c0;257c0;145c0=0579", "0579"),
        ((999, 999), "998c1;999c1;999c1=1998", "1998"),
        ((105, 917), "572c1;012c0;190c1=1022", "1022"),
        # 999 + 100 = 1099, + 202: 9+2 = 11, 9+0+1 = 10, 0+2+1 = 3, 1+0 = 1
        ((999, 100, 202), "909c0;909c0;910c1=1099+202;921c1;900c1;023c0;101c0=1301", "1301"),
    ],
)
def test_chain_by_hand(numbers, chain, answer):
    problem = Problem(numbers)
    assert problem.prompt == "+".join(str(number) for number in numbers) + "="
    assert problem.chain() == chain
    assert problem.answer == answer


def test_a_slip_is_a_wrong_digit_that_the_adder_goes_on_with():
    right = Problem((123, 456)).chain()
    for seed in range(30):
        always = Problem((123, 456)).chain(1.0, random.Random(seed))
        assert len(always) == len(right)
        assert all(always[i] != right[i] for i in (2, 8, 14))  # the digits of the sum
        assert always.endswith("=0" + always[14] + always[8] + always[2])
    generator = random.Random(0)
    wrong = sum(Problem((123, 456)).chain(0.2, generator) != right for _ in range(500))
    assert wrong / 500 == pytest.approx(1 - 0.8**3, abs=0.07)


@pytest.mark.parametrize(("name", "count", "numbers"), [("train", 16384, 2), ("test-long", 512, 8)])
def test_rows_hold_prompts_and_sums(name, count, numbers):
    found = rows(name)
    assert len(found) == count
    for row in found[:200]:
        parts = [int(part) for part in row["prompt"].removesuffix("=").split("+")]
        assert len(parts) == numbers
        assert all(100 <= part <= 999 for part in parts)
        assert row["answer"] == str(sum(parts)).zfill(4)
    assert PROMPTS[name][2] == count


def test_train_and_test_never_overlap_and_a_tenth_is_for_testing():
    train, test = ({row["prompt"] for row in rows(name)} for name in ("train", "test"))
    assert not train & test
    pairs = itertools.product(range(100, 1000, 7), repeat=2)
    splits = [Problem(pair).split for pair in pairs]
    assert splits.count("test") / len(splits) == pytest.approx(10 / 97, abs=0.01)


@pytest.mark.parametrize("name", ["base-long", "teacher-long"])
def test_the_long_pair_adds_eight_numbers(name):
    """Greedy, as the base does too: it slips only when it is sampled."""
    model, tokenizer = load_model(f"embedded:{name}"), load_tokenizer(f"embedded:{name}")
    asked = rows("test-long")[:4]
    ids = torch.tensor(tokenizer([row["prompt"] for row in asked])["input_ids"])
    said = model.generate(ids, max_new_tokens=240, do_sample=False)[:, ids.shape[1] :]
    for row, text in zip(asked, tokenizer.batch_decode(said), strict=True):
        numbers = tuple(int(number) for number in row["prompt"].removesuffix("=").split("+"))
        assert text.removesuffix("<pad>") == Problem(numbers).chain() + "<eos>"


def test_the_teacher_made_by_rewards_is_another_and_as_good():
    """RL has sharpened the same base, and moved it less than supervised training."""
    base, taught, rewarded = (
        load_model(f"embedded:{n}") for n in ("base", "teacher", "teacher-rl")
    )
    tokenizer = load_tokenizer("embedded:teacher-rl")
    asked = rows("test")[:64]
    ids = torch.tensor(tokenizer([row["prompt"] for row in asked])["input_ids"])
    torch.manual_seed(0)
    said = rewarded.generate(ids, max_new_tokens=24, do_sample=True, top_k=0)[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    pairs = list(zip(texts, asked, strict=True))
    assert sum(text.endswith("=" + row["answer"]) for text, row in pairs) >= 60  # the base: 26
    moved = {
        name: [
            float((p - q).norm()) for p, q in zip(m.parameters(), base.parameters(), strict=True)
        ]
        for name, m in [("taught", taught), ("rewarded", rewarded)]
    }
    assert 0 < sum(moved["rewarded"]) < sum(moved["taught"])


def test_a_seed_fixes_the_order():
    def first(seed: int) -> list[Problem]:
        return list(itertools.islice(problems("train", seed=seed), 5))

    assert first(1) == first(1) != first(2)
    assert all(problem.split == "train" for problem in first(3))
