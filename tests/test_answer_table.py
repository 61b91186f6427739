"""Which completion is right for which reference; most lines have a near miss beside them."""

import pytest

from opd.answers import AnswerVerifier, extract_pattern
from opd.equality import same_number_or_text

BOXED = [
    (r"\boxed{42}", "42", True),
    (r"\boxed{42}", "43", False),
    (r"\boxed{43}", "42", False),
    ("42", "42", False),  # no box
    (r"\boxed{42", "42", False),  # not closed
    (r"42 \boxed{}", "42", False),
    (r"\boxed{1} \boxed{2}", "2", True),  # the last counts
    (r"\boxed{1} \boxed{2}", "1", False),
    (r"\boxed{2} \boxed{1", "2", True),  # the last that is complete
    (r"\boxed {7}", "7", True),
    (r"\boxed{}", "", False),  # no answer equals nothing
    (r"\fbox{7}", "7", False),
    (r"\boxed{{a}}", "{a}", True),
    (r"\boxed{{a}}", "a", False),
    (r"\boxed{x + 1}", "x+1", True),
    (r"\boxed{x + 1}", "1+x", False),
    (r"\boxed{$7$}", "7", True),
    (r"\boxed{7.}", "7", True),
    (r"\boxed{7}", "$7$.", True),
    (r"\boxed{7.0}", "7", True),
    (r"\boxed{7.01}", "7", False),
    (r"\boxed{-7}", "7", False),
    (r"\boxed{7}", "-7", False),
    (r"\boxed{+7}", "7", True),
    (r"\boxed{0.5}", "1/2", True),
    (r"\boxed{1/2}", "0.5", True),
    (r"\boxed{2/1}", "1/2", False),
    (r"\boxed{1,024}", "1024", True),
    (r"\boxed{1024}", "1,024", True),
    (r"\boxed{1.024}", "1024", False),
    (r"\boxed{1,2}", "12", False),  # two numbers
    (r"\boxed{3,14}", "314", False),
    (r"\boxed{1e3}", "1000", True),
    (r"\boxed{1e3}", "10000", False),
    (r"\boxed{2.5E-2}", "0.025", True),
    (r"\boxed{1/0}", "1/0", True),  # the same text
    (r"\boxed{1/0}", "2/0", False),
    (r"\boxed{2 1/3}", "7", False),  # nor is it 21/3
    (r"\boxed{A}", "A", True),
    (r"\boxed{A}", "a", False),
    ("", "", False),
    ("7", r"\boxed{7}", False),  # completion and reference exchanged
]
LAST_NUMBER = [
    ("3 and 4", "4", True),
    ("3 and 4", "3", False),
    ("it is -0.5.", "-1/2", True),
    ("it is 0.5.", "-1/2", False),
    ("1,024 apples", "1024", True),
    ("3/4 of it", "0.75", True),
    ("none", "0", False),
    ("007", "7", True),
    ("x2", "2", True),
    ("2x3", "2", False),
]
AFTER_EQUALS = [
    ("369c0;257c0;145c0=0579", "0579", True),
    ("369c0;257c0;145c0=0579", "579", True),
    ("369c0;257c0;145c0=0578", "0579", False),
    ("0579", "0579", False),
    ("=0579;", "0579", False),
    ("=0579 ", "0579", False),
    ("=1=0579", "0579", True),
    ("=0579=1", "0579", False),
    ("=05790", "0579", False),
]


@pytest.mark.parametrize(
    ("form", "completion", "reference", "right"),
    [
        *(("boxed", *case) for case in BOXED),
        *(("last_number", *case) for case in LAST_NUMBER),
        *((r"=(\d+)$", *case) for case in AFTER_EQUALS),
    ],
)
def test_verdict(form, completion, reference, right):
    assert AnswerVerifier(form)(completion, reference) is right


def test_equal_answers_are_equal_both_ways():
    answers = ["1/2", "0.50", "2", " 2. ", "$2$", "1,000", "1000", "x", "1/0", "-2", "+2"]
    classes = [{"1/2", "0.50"}, {"2", " 2. ", "$2$", "+2"}, {"1,000", "1000"}]
    for left in answers:
        for right in answers:
            expected = left == right or any({left, right} <= same for same in classes)
            assert same_number_or_text(left, right) is expected, (left, right)


def test_a_pattern_gives_its_group_without_white_space():
    assert extract_pattern("a: 1 ; a: 2 ;", r"a:([^;]*);") == "2"
    assert extract_pattern("b: 1", r"a:(.*)") is None


@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{1}{2}}", "0.25", False),
        (r"\boxed{2x + 1}", "1 + 2x", True),
        (r"\boxed{2x - 1}", "1 - 2x", False),
        ("x", "x", False),
    ],
)
def test_verdict_by_mathematics(completion, reference, right):
    assert AnswerVerifier(equivalence="math")(completion, reference) is right
