import pytest

from opd.answers import AnswerVerifier, extract_boxed, extract_last_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{7} and an open \boxed{8", "7"),
        ("nothing", None),
        (r"\boxed{ 5 }", "5"),
    ],
)
def test_boxed(text, answer):
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("a 3 b 1,024.", "1,024"), ("it is -0.5", "-0.5"), ("3/4 of it", "3/4"), ("none", None)],
)
def test_last_number(text, answer):
    assert extract_last_number(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("0.50", "1/2", True),
        ("1,024", "1024", True),
        ("0579", "579", True),
        ("x + 1", "x+1", True),
        ("$7$", "7", True),
        ("7.", "7", True),
        ("8", "7", False),
        ("", "7", False),
        ("1/0", "7", False),
    ],
)
def test_number_equivalence(answer, reference, right):
    assert AnswerVerifier()(rf"\boxed{{{answer}}}", reference) is right


def test_pattern_takes_the_last_match():
    assert AnswerVerifier(r"=(\d+)")("1=2;3=4", "4")
    assert not AnswerVerifier(r"=(\d+)$")("1=2;", "2")


def test_latex_equivalence_needs_math():
    assert not AnswerVerifier()(r"\boxed{\frac{1}{2}}", "0.5")
    assert AnswerVerifier(equivalence="math")(r"\boxed{\frac{1}{2}}", "0.5")


@pytest.mark.parametrize("pattern", ["=(", r"\d+", r"(\d)(\d)"])
def test_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="answer format"):
        AnswerVerifier(pattern)
