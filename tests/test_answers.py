import threading
import time

import pytest

from opd import answers
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


@pytest.mark.parametrize(
    "answer",
    [
        "1e999999999",
        "1e-999999999",
        "1e" + "9" * 5000,
        "1" * 10_000,
        "9" * 5_000 + "/3",
        "1" * 10_000 + "/" + "1" * 9_999,
        "1/0",
        "1/" + "0" * 300,
        "{" * 100_000,
        r"\boxed{" * 50_000,
        "1," + "234," * 50_000 + "2345",
    ],
    ids=lambda answer: answer[:8],
)
@pytest.mark.parametrize("form", ["boxed", "last_number"])
def test_whatever_a_model_writes_is_judged_at_once(answer, form):
    start = time.process_time()
    assert not AnswerVerifier(form)(rf"\boxed{{{answer}}}", "9")
    assert time.process_time() - start < 0.5


def test_long_numbers_are_compared_digit_by_digit():
    long = "7" * 10_000
    assert AnswerVerifier()(rf"\boxed{{{long}.0}}", f"+0{long}")
    assert not AnswerVerifier()(rf"\boxed{{{long}}}", long[:-1] + "8")
    assert AnswerVerifier()(r"\boxed{1.50e999999999}", "15e999999998")
    assert AnswerVerifier()(r"\boxed{0.5}", "2/4")


def test_a_comma_separates_groups_of_three_or_numbers():
    assert AnswerVerifier()(r"\boxed{-12,345.5}", "-12345.5")
    assert not AnswerVerifier()(r"\boxed{1,2}", "12")
    assert not AnswerVerifier()(r"\boxed{3,14}", "314")
    assert extract_last_number("1,024 and 3,14") == "14"
    assert extract_last_number("17-5") == extract_last_number("f(17)-5") == "5"
    assert extract_last_number("it is -5") == "-5"


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize(
    ("verifier", "completion"),
    [
        (AnswerVerifier(r"(?:a|a)+b(x)"), "a" * 5_000),
        (AnswerVerifier(equivalence="math"), r"\boxed{9^{9^{9^{9}}}}"),
    ],
    ids=["pattern", "math"],
)
def test_a_check_that_takes_too_long_is_wrong_and_said_once(verifier, completion, where, caplog):
    verdicts = []

    def check():
        start = time.perf_counter()
        verdicts.extend([verifier(completion, "1"), verifier(completion, "1")])
        verdicts.append(time.perf_counter() - start > 60)  # on a busy machine, too

    answers._warn_once.cache_clear()
    if where == "main":
        check()
    else:
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
    assert verdicts == [False, False, False]
    assert caplog.text.count("such answers count as wrong") == 1


def test_mathematics_goes_on_after_an_answer_that_was_too_hard():
    verifier = AnswerVerifier(equivalence="math")
    assert not verifier(r"\boxed{10^{10^{10}}}", "1")
    assert verifier(r"\boxed{\frac{2}{4}}", "0.5")


def test_the_usual_check_is_fast():
    verifier = AnswerVerifier(r"=(\d+)$")
    start = time.process_time()
    assert all(verifier("123+456=0579", "579") for _ in range(10_000))
    assert time.process_time() - start < 1
