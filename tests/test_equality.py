"""Which answers are the same mathematics: a table of pairs, and what holds for all of them.

A pair stands here for its kind. "Unequal" is also what is decided to be: a pair that one may call
equal, but which is not accepted because the reading that makes it equal is in doubt.
"""

import itertools
import random
import threading
import time
from fractions import Fraction

import pytest

from opd import equality
from opd.answers import AnswerVerifier, group_answers
from opd.equality import same_mathematics
from opd.errors import UserError
from opd.golds import LONGEST, clean_reference
from opd.mathematics import equivalent

EQUAL = {
    "what encloses an answer": [
        (r"\boxed{42}", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"x = \boxed{42}", "42"),
        ("$42$.", "42"),
        (r"\(42\)", r"\[ 42 \]"),
        ("221,$8$", "8, 221"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        (r"\displaystyle\frac{2}{3}", r"\frac 23"),
        (r"12\!\,x", "12 x"),
        ("((7))", "7"),
    ],
    "decimals and fractions": [
        ("27.0", "27"),
        ("0579", "579"),
        ("+6", "6"),
        ("\N{MINUS SIGN}6", "-6"),
        (".25", "0.250"),
        (r"\dfrac12", "0.5"),
        (r"\tfrac{1}{2}", "1/2"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}"),
        ("2/4", "1/2"),
        ("18/5", "3.6"),
        (r"2\frac{1}{3}", r"\frac{7}{3}"),
        ("2 1/3", "7/3"),
        ("\N{VULGAR FRACTION ONE HALF}", "0.5"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"\frac{0.3}{0.1}", "3"),
        (r"2^{0.5}", r"\sqrt{2}"),
    ],
    "thousands": [
        ("1,024", "1024"),
        (r"12{,}345{,}678", "12345678"),
        (r"10\,000", "10,000"),
        (r"25\ 000", "25000"),
        ("1,234.50", "1234.5"),
        ("123,456, 789", "789, 123456"),
    ],
    "powers of ten": [
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("4.5e33", "4500000000000000000000000000000000"),
        ("1.5E-3", "0.0015"),
        (r"3\cdot10^8", "3e+8"),
        ("2 \N{MULTIPLICATION SIGN} 10\N{SUPERSCRIPT FIVE}", "200000"),
        ("10^{-2}", "0.01"),
        (r"4.5\times10^{3000}", r"45\times10^{2999}"),
    ],
    "forgotten backslashes and braces": [
        (r"\frac{sqrt{7} + 1}{2}", r"\frac{1+\sqrt{7}}{2}"),
        ("sqrt(7)", r"\sqrt7"),
        ("2\N{SQUARE ROOT}3", r"\sqrt{12}"),
        ("2pi", r"2\pi"),
        ("\N{GREEK SMALL LETTER PI}/2", r"\frac{\pi}{2}"),
        ("x^10", "x^{10}"),
        (r"\frac{1}2", "0.5"),
    ],
    "per cent, degrees and units": [
        (r"50\%", "0.5"),
        (r"50\%", r"\frac{1}{2}"),
        (r"50\%", "50"),  # the sign is a unit, and may be left out
        ("50 percent", "50%"),
        (r"12.5\%", r"\frac{1}{8}"),
        (r"90^\circ", "90"),
        (r"90^\circ", r"\frac{\pi}{2}"),
        ("90\N{DEGREE SIGN}", r"90^{\circ}"),
        ("90 degrees", r"90^\circ"),
        ("5 cm", "5"),
        (r"5\,\mathrm{cm}", r"5 \text{ cm}"),
        (r"12\text{ cm}^2", "12"),
        ("7 square units", "7"),
        (r"\$18.50", "18.5"),
        (r"10 \text{ hours}", "10 hour"),
        (r"\frac{3}{2} \text{ inches}", "1.5"),
    ],
    "names of values": [
        ("x=3", "3"),
        (r"x \in \{3\}", "3"),
        ("f(x)=x+1", "1+x"),
        (r"\angle ABC = 30^\circ", "30"),
        (r"\text{Area} = 6", "6"),
        ("x = 6/4 = 3/2", "1.5"),
        (r"\pi \approx 3.14", r"\pi"),
        ("x=2, x=3", "3, 2"),
        ("x = 2 or x = 3", "2,3"),
        ("x=1, y=2", "y=2, x=1"),
        ("(x,y)=(1,2)", "(1,2)"),
        ("(x,y)=(1,2)", "x=1, y=2"),
    ],
    "several answers": [
        ("2, 3", "3,2"),
        (r"2 \text{ and } 3", "3; 2"),
        ("2, 3, and 5", "5, 3, 2"),
        (r"\{1, 2\}", "2, 1"),
        (r"\{1, 2, 2\}", r"\{2, 1\}"),
        (r"\{3\}", "3"),
        (r"\pm 2", "-2, 2"),
        (r"x = 1 \pm \sqrt{3}", r"1-\sqrt3, 1+\sqrt3"),
        (r"\{\pm 1, \pm 2\}", "-2,-1,1,2"),
        (r"(\pm 3, \mp 4)", "(3,-4), (-3,4)"),
        ("(1,2), (3,4)", "(3,4), (1,2)"),
        ("1/2, 1/3", "0.5, 2/6"),
        (r"\{\}", r"\emptyset"),
    ],
    "tuples, intervals and sets": [
        ("(1, 4.5)", r"\left(1,\frac{9}{2}\right)"),
        (r"x > 3", r"(3, \infty)"),
        (r"3 < x", "x>3"),
        (r"0 < x \le 1", "(0, 1]"),
        (r"x\in[0,1)", r"0\leq x<1"),
        (r"1 \geq x > 0", "(0,1]"),
        (r"(-\infty,0)\cup(1,+\infty)", r"(1,\infty)\cup(-\infty,0)"),
        (r"(-\infty, 0) \cup\{1\}$.", r"\{1\} \cup (-\infty,0)"),
        (r"(0,2)\cup(1,3)", "(0,3)"),
        (r"\mathbb{R}\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
    ],
    "matrices": [
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        (r"\begin{pmatrix}0.5\\x+1\end{pmatrix}", r"\begin{pmatrix}\frac12\\1+x\end{pmatrix}"),
        (
            r"\begin{pmatrix} 1/5 \\ -8/5 \end{pmatrix}",
            r"\begin{pmatrix}\frac15\\[4pt]-\frac85\end{pmatrix}",
        ),
        (r"\left(\begin{array}{c}1\\2\end{array}\right)", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "words": [
        (r"\text{Evelyn}", "Evelyn"),
        ("Yes", r"\text{yes}"),
        (r"\text{(C)}", "C"),
        (r"\mathrm{A}", "A"),
        ("blue and red", "red, blue"),
    ],
    "expressions": [
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
        ("(x+1)(x-1)", "x^2-1"),
        ("n(n+1)/2", r"\frac{n^2+n}{2}"),
        (r"\sin^2\theta", r"1-\cos^2 \theta"),
        (r"\binom{5}{2}", "10"),
        ("5!", "120"),
        (r"\log_2 8", "3"),
        (r"\ln 4", r"2\ln 2"),
        ("2(3)", "6"),
        ("(2)(3)", "6"),
        (r"e^{i\pi}", "-1"),
        ("1+2i", "2i+1"),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
        ("10^{400}+1", "1+10^{400}"),
        (r"\operatorname{arctan}(1)", r"\frac{\pi}{4}"),
        ("a_1+b", "b+a_{1}"),
        ("x+y-y", "x"),
        (r"x+2\frac{1}{3}", r"\frac{7}{3}+x"),
        (r"x+2\frac{3}{2}", "x+3"),  # improper: a product
        (
            r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta",
            r"m_p c^2 (\gamma^2-1)\sin^2\theta",
        ),
    ],
    "equations": [
        ("y=2x+1", "2x-y+1=0"),
        ("y=2x+1", "2x+1"),
        ("x^2+y^2=1", "2x^2+2y^2=2"),
        ("a=b+1", "b=a-1"),
        ("2x+y<3", "3>y+2x"),
        ("-2x-2y<2", "x+y>-1"),
    ],
}
UNEQUAL = {
    "nearly": [
        ("42", "43"),
        ("42", "-42"),
        ("0.333", r"\frac{1}{3}"),
        ("0.333333333", r"\frac{1}{3}"),
        ("1.41421356", r"\sqrt{2}"),
        ("3.14", r"\pi"),
        ("3e-9", "5e-9"),
        ("0.0000003", "0.0000004"),
        ("4.5e33", r"4.5\times10^{32}"),
        ("10^{100}+1", "10^{100}"),
        ("7.0001", "7"),
        (r"0.\overline{3}", "0.3"),
        (r"4.5\times10^{3000}", r"4.5\times10^{2999}"),
    ],
    "commas, spaces and full stops": [
        ("1,024", "1, 024"),
        ("100,200", "100, 200"),
        ("(1,024)", "1024"),
        ("3,14", "3.14"),
        ("1.024", "1024"),
        ("1,2", "12"),
        ("1 2", "12"),
        ("3 4", "7"),
        ("2 1/3", "7"),
        ("23/4", "2 3/4"),
        ("1.2.3", "0.36"),
        ("", ""),
        ("", "0"),
        (r"\boxed{}", r"\boxed{}"),
    ],
    "per cent, degrees and units": [
        ("50", "0.5"),
        (r"50\%", "5"),
        (r"50\%", r"5\%"),
        (r"50\%", r"50^\circ"),
        (r"90^\circ", r"\pi"),
        ("5 cm", "5 m"),
        (r"5\text{ cm}", r"5\text{ cm}^2"),
        ("5m", "5"),  # m may be a variable
        ("5 m", "5"),
        (r"5\text{ million}", "5"),
        ("1011_2", "1011"),
        ("1011_2", "1011_3"),
        ("4:30", "2:15"),
    ],
    "names of values": [
        ("x=3", "y=3"),
        ("x=3", "x=4"),
        ("x=1, y=2", "x=2, y=1"),
        ("x=1, y=2", "2, 1"),
        ("x = 3 = 4", "3"),
        ("f(x)=x", "g(x)=x"),
        (r"x\neq 3", "3"),
    ],
    "several answers": [
        ("2, 3", "2"),
        ("2, 3", "2, 3, 4"),
        ("2, 2", "2"),
        ("1, 1, 2", "1, 2, 2"),
        (r"\pm 2", "2"),
        (r"1\pm\sqrt{3}", r"1+\sqrt{3}"),
        ("(1,2), (3,4)", "(1,3), (2,4)"),
        (r"\{1,2\}", r"\{1,3\}"),
    ],
    "tuples, intervals and sets": [
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", r"\{1,2\}"),
        ("[1,2]", r"\{1,2\}"),
        ("(1,2)", "1, 2"),
        ("[0,1)", "(0,1)"),
        ("[0,1)", "(0,1]"),
        ("(1,2,3)", "(1,2)"),
        ("x<3", "x>3"),
        ("x<3", r"x\leq 3"),
        (r"\infty", r"-\infty"),
        (r"(-\infty,0)\cup(1,2)", r"(-\infty,0)\cup(1,2]"),
        (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}"),
        (r"(0,1)\cup(2,3)", "(0,1), (2,3)"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{vmatrix}1&2\\3&4\end{vmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    ],
    "words": [
        ("yes", "no"),
        ("A", "B"),
        ("BAC", "ABC"),  # an order of runners, not a product
        (r"\text{Ann}", r"\text{Anna}"),
        (r"\text{even}", "0"),
        ("Monday 5", "5"),
    ],
    "expressions": [
        ("x+1", "x-1"),
        ("x", "y"),
        ("A", "a"),
        ("A-b", "a-b"),
        ("A-a", "a-A"),
        ("x'", "x"),
        ("x_1", "x_2"),
        ("a^b", "b^a"),
        (r"\sqrt{x^2}", "x"),
        (r"\frac{x}{2}", r"\frac{2}{x}"),
        (r"(x+1)^2", "x^2+1"),
        ("1+i", "1-i"),
        ("(2)(3)", "5"),
        (r"2\frac{1}{2}", "1"),
        (r"\sin^2 x", r"\sin x^2"),
        ("f(2)", "2f"),
        (r"\log 2", r"\ln 2"),
        (r"\sqrt[3]{2}", r"3\sqrt{2}"),
        (r"\frac{1}{0}", r"\frac{2}{0}"),
        (r"x \equiv 1 \pmod{5}", r"x \equiv 1 \pmod{7}"),
        ("5!", "5"),
        ("x+2y", "2x+y"),
    ],
    "equations": [
        ("y=2x+1", "y=2x-1"),
        ("y=2x+1", "2x"),
        ("x^2=1", "x=1"),
        ("x^2+y^2=1", "x^2+y^2=2"),
        ("2x+y<3", "2x+y>3"),
        ("2x+y<3", r"2x+y\leq3"),
        ("-x-y<1", "x+y<1"),
        ("x+y=1", "x-y=1"),
    ],
}
GOLDS = [  # of the forms that benchmarks have
    "204", "27.0", "4.5e33", "1,024", r"\frac{1}{91}", "8.5", r"\frac{sqrt{7} + 1}{2}",
    r"3\sqrt{13}", r"\text{Evelyn}", r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"50\%",
    r"1\pm\sqrt{19}", r"(-\infty, 0) \cup\{1\}$.", "$221,$8$", r"[-2,7]", r"x \in [-2,7]", "1,-2",
    r"11\sqrt2", r"90^\circ", r"\text{(C)}", r"2516_8", r"6 - 5i", r"y = 2x + 3", r"\$32,\!348",
    r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"x^3+3x-6", "5.4 cents", r"10,\!080", "6+9i",
    r"\frac{\sqrt{2}}{2}", r"2^{99}-1", r"\frac{-1+\sqrt{5}}{2},\frac{-1-\sqrt{5}}{2}",
    r"I_0 e^{-t/\tau}", r"x(t)=e^{-2t}\cos 3t", r"2n-1", r"\{(1,2),(2,1)\}", "1 +$ $ 2", "-3,3",
    "0", r"\frac{n!}{2}", r"e^{\pi}", r"7 \text{ m}^2", r"\log_2 3", r"f(x)=c x", "9.6e-19",
    "m=7, n=2",
]  # fmt: skip


def pairs(table):
    return [pytest.param(*pair, id=f"{kind}: {pair}") for kind in table for pair in table[kind]]


@pytest.mark.parametrize(("answer", "reference"), pairs(EQUAL))
def test_equal(answer, reference):
    assert same_mathematics(answer, reference)
    assert same_mathematics(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), pairs(UNEQUAL))
def test_unequal(answer, reference):
    assert same_mathematics(answer, reference) is False
    assert same_mathematics(reference, answer) is False


def ways_to_write(value, draw):
    """Write a positive fraction in several ways."""
    n, d = value.numerator, value.denominator
    k = draw.randrange(2, 13)
    ways = [
        f"{n}/{d}",
        rf"\frac{{{n * k}}}{{{d * k}}}",
        f"{k * n}/{k * d}",
        rf"\dfrac{{{n}}}{{{d}}}",
    ]
    ways += [
        rf"\frac{{{n * k}}}{{{d}}} \cdot \frac{{1}}{{{k}}}",
        rf"\sqrt{{\frac{{{n * n}}}{{{d * d}}}}}",
    ]
    if 10**6 % d == 0:
        decimal = f"{float(value):.6f}"
        ways += [
            decimal,
            f"{float(value) * 1000:.3f}e-3",
            rf"{float(value) / 10:.7f} \times 10^{{1}}",
        ]
        ways += [rf"{float(value) * 100:.4f}\%"]
    if n > d > 1:
        ways += [f"{n // d} {n % d}/{d}", rf"{n // d}\frac{{{n % d}}}{{{d}}}"]
    if d == 1:
        ways += [f"{n:,}", f"{n}.0", f"0{n}", f"x = {n}", rf"\boxed{{{n}}}"]
    return ways


def test_numbers_are_equal_however_they_are_written_and_only_then():
    draw = random.Random(0)
    for _ in range(60):
        value = Fraction(draw.randrange(1, 2000), draw.choice([1, 2, 3, 5, 7, 8, 25, 37, 100]))
        near = draw.choice([value + Fraction(1, 1000), value * 10, value / 3, value + 1])
        ways = ways_to_write(value, draw)
        for left, right in itertools.combinations(ways, 2):
            assert same_mathematics(left, right), (left, right)
        for left, right in itertools.product(ways, ways_to_write(near, draw)):
            if (left + right).count("%") != 1:
                assert not same_mathematics(left, right), (left, right)


def test_a_gold_equals_itself_in_a_box_and_no_other():
    verifier = AnswerVerifier(equivalence="math")
    for gold in GOLDS:
        assert verifier(rf"So it is \boxed{{{gold}}}.", gold), gold
    same = {frozenset({"[-2,7]", r"x \in [-2,7]"})}
    for left, right in itertools.combinations(GOLDS, 2):
        assert verifier.same(left, right) is (frozenset({left, right}) in same), (left, right)


def test_cleaning_what_is_clean_changes_nothing():
    table = [pair for kinds in (EQUAL, UNEQUAL) for pairs in kinds.values() for pair in pairs]
    for text in (*GOLDS, *itertools.chain(*table)):
        clean = clean_reference(text)
        assert clean_reference(clean) == clean
        if clean:
            assert same_mathematics(text, clean), text


def test_cleaning_any_text_twice_is_cleaning_it_once():
    pieces = ["1", "24", "000", "3.0", ",", ".", "$", "{", "}", r"\boxed{", r"\frac", r"\sqrt", "x"]
    pieces += [
        "^",
        "_",
        "5e",
        r"\text{",
        "or",
        r"\%",
        r"\left(",
        ")",
        "[",
        r"\{",
        r"\}",
        r"\,",
        "~",
    ]
    pieces += [
        r"\!",
        "pi",
        "inf",
        "<=",
        r"\circ",
        "percent",
        r"\mathrm{",
        "cm",
        "-",
        "/",
        r"\\",
        "&",
    ]
    pieces += [" ", " or ", ", ", "\N{SQUARE ROOT}", "\N{SUPERSCRIPT TWO}", "\N{MINUS SIGN}"]
    draw = random.Random(0)
    for _ in range(3000):
        clean = clean_reference("".join(draw.choices(pieces, k=draw.randrange(1, 10))))
        assert clean_reference(clean) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (r"\boxed{204}", "204"),
        ("27.0.", "27"),
        (r"\frac{\sqrt2}3", r"\frac{\sqrt{2}}{3}"),
        ("1,024", "1024"),
        ("1, 024", "1, 024"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        (r"\frac{sqrt{7} + 1}{2}", r"\frac{\sqrt{7} + 1}{2}"),
        (r"$(-\infty, 0) \cup\{1\}$.", r"(-\infty, 0) \cup\{1\}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}"),
    ],
)
def test_clean(text, clean):
    assert clean_reference(text) == clean


@pytest.mark.parametrize(
    ("answer", "reference", "tolerance", "right"),
    [
        ("1.05", "1", "0.1", True),
        ("1.1", "1", 0.1, True),  # the edge belongs to it
        ("1.1001", "1", "1e-1", False),
        (r"\sqrt{2}", "1.41", "0.01", True),
        (r"\sqrt{2}", "1.41", "0.001", False),
        ("x+1.05", "x+1", "0.1", False),
        ("2.0, 1.05", "1, 2", "0.1,0.001", True),  # in any order, each with its own
        ("2.05, 1.0", "1, 2", "0.1,0.001", False),
        ("1.05, 1.95", "1, 2", "0.1", True),
        ("(1.05, 2)", "(1, 2)", "0.1,0.001", True),
        ("(1, 2.05)", "(1, 2)", "0.1,0.001", False),
        ("(1, 2, 3)", "(1, 2)", "0.1,0.1", False),
        ("1.1, 1.0", "1.05, 1.15", "0.06", True),  # 1.1 would do for both
        ("1.05", "1", "", False),
    ],
)
def test_tolerance(answer, reference, tolerance, right):
    assert AnswerVerifier(equivalence="math").same(answer, reference, tolerance=tolerance) is right


@pytest.mark.parametrize(
    ("answer", "unit", "right"),
    [
        ("12", r"\mathrm{~m}", True),
        ("12 m", r"\mathrm{~m}", True),
        ("12m", "m", True),
        ("12m", None, False),
        ("12 km", "m", False),
        (r"12\%", r"\%", True),
        ("0.12", r"\%", True),
        ("0.12", None, False),
        (r"12^\circ", r"{ }^{\circ}", True),
        (r"12 \text{ m/s}", r"$\mathrm{m} / \mathrm{s}$", True),
    ],
)
def test_unit(answer, unit, right):
    assert AnswerVerifier(equivalence="math")(rf"\boxed{{{answer}}}", "12", unit=unit) is right


@pytest.mark.parametrize("tolerance", ["0.1,0.2", "about 1", "-1", "1,"])
def test_a_tolerance_that_does_not_fit_is_an_error(tolerance):
    with pytest.raises(UserError, match="tolerance"):
        same_mathematics("2", "1", tolerance)


def test_number_equivalence_knows_no_tolerance():
    with pytest.raises(UserError, match="equivalence: math"):
        AnswerVerifier().same("2", "1", tolerance="1")


def test_answers_are_grouped_by_equality():
    answers = ["1/2", None, "0.5", "2", r"\frac{1}{2}", "", None, " 2.0 ", "x=2", "3"]
    groups = [0, None, 0, 1, 0, 2, None, 1, 1, 3]
    assert group_answers(answers, AnswerVerifier(equivalence="math")) == groups
    assert group_answers(["1/2", None, "0.5", "b"], AnswerVerifier()) == [0, None, 0, 1]
    assert group_answers([], AnswerVerifier()) == []


def test_equal_texts_are_not_compared_again(monkeypatch):
    asked = []
    monkeypatch.setattr(AnswerVerifier, "same", lambda *pair: asked.append(pair))
    group_answers(["1", "$1$", "2", " 2", "1.0", "3"] * 10, AnswerVerifier(equivalence="math"))
    assert len(asked) == 3  # 2 with 1, 3 with 1 and 2


def test_verdicts_are_remembered(monkeypatch):
    assert same_mathematics(r"\sqrt{50}", r"5\sqrt{2}")
    monkeypatch.setattr(equality, "equivalent", None)
    assert same_mathematics(r"\sqrt{50}", r"5\sqrt{2}")


HARD = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    r"(10^{10})!",
    r"\sum_{k=1}^{10^{9}} \frac{1}{k^{k}}",
    "x" * LONGEST,
    "(" * 400 + "1" + ")" * 400,
    "{" * LONGEST,
    r"\boxed{" * 100,
    r"\sqrt{" * 150 + "2" + "}" * 150,
    ",".join(["1+x"] * 200),
    ",".join([r"9^{9^{9}}"] * 100),
    "1e" + "9" * 500,
    "7" * 9_000,
    r"\pm" * 300,
    "=" * 900,
]


@pytest.mark.parametrize("answer", HARD, ids=lambda answer: answer[:20])
def test_whatever_a_model_writes_is_judged_in_time(answer):
    start = time.perf_counter()
    reference = ",".join(f"{k}+x" for k in range(200)) if answer.count(",") > 100 else r"\sqrt{3}"
    assert not AnswerVerifier(equivalence="math")(rf"\boxed{{{answer}}}", reference)
    assert time.perf_counter() - start < 30  # on a busy machine, too


def test_threads_are_answered_while_another_asks_what_hangs():
    verdicts = {}

    def ask(k):
        hard = (rf"\boxed{{9^{{9^{{9^{{{k}}}}}}}}}", "1")
        easy = (rf"\boxed{{\sqrt{{{k * k * 3}}}}}", rf"{k}\sqrt{{3}}")
        verifier = AnswerVerifier(equivalence="math")
        verdicts[k] = [verifier(*easy), verifier(*hard), verifier(*easy), verifier(*easy[::-1])]

    threads = [threading.Thread(target=ask, args=(k,)) for k in (11, 12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {k: [True, False, True, False] for k in (11, 12, 13)}


def test_calculation_says_what_it_took_and_ends_on_time():
    verdict, spent = equivalent(r"\sqrt{12}", r"2\sqrt{3}", 5.0)
    assert verdict
    assert 0 < spent < 5
    start = time.perf_counter()
    assert equivalent("9^{9^{9^{9}}}", "1", 1.0) is None
    assert time.perf_counter() - start < 15  # the clock alone would let it go on for 20
    assert equivalent(r"\sqrt{12}", r"2\sqrt{3}", 5.0)[0]
