r"""Decide whether two answers are the same mathematics.

Structure is compared here: lists in any order, tuples and intervals place by place, sets, unions,
matrices, names (`x = 3`), units. What is left at the leaves is a number, compared exactly, a word,
or an expression, which is asked of `opd/mathematics.py`. math_verify's own comparison is not used:
it rounds to six places (0.0000003 equals 0.0000004, and 1.41421356 the root of 2), takes a pair for
a list and a list for a set, and does not tell A from a, or 5 cm from 5 m. An unequal answer that is
accepted does more harm than an equal one that is missed, so whatever is in doubt is unequal; the
table in tests/test_equality.py says what is what.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from opd.errors import UserError
from opd.golds import clean_reference
from opd.mathematics import equivalent
from opd.structure import COMMAND, Structure, dense, read_structure

LONGEST_NUMBER = 200  # digits that are calculated with; longer numbers are compared as text

_DECIMAL = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:[eE]([-+]?\d{1,18}))?", re.ASCII)
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:/\d+)?", re.ASCII)
_DIGITS = r"\d+(?:\.\d*)?|\.\d+"
_RATIONAL = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<decimal>{_DIGITS})|(?P<whole>\d*)\.(?P<fixed>\d*)\\overline"
    r"\{(?P<repeated>\d+)\}|(?:(?P<mixed>\d+)(?: (?=\d)| ?(?=\\frac)))?"
    r"(?:\\frac\{(?P<n>-?\d+)\}\{(?P<d>-?\d+)\}|(?P<top>\d+)/(?P<bottom>\d+)))"
    r"(?P<times>\\(?:times|cdot)10\^\{(?P<power>-?\d{1,3})\})?"
    r"|(?P<minus>[-+]?)10\^\{(?P<exponent>-?\d{1,3})\}"
)
_UNIT_WORD = (
    r"(?:[cmk]m|kg|mg|m[lL]|ft|in|mi|mph|km/h|m/s|hrs?|min|sec|USD"
    r"|(?:cubic|square|sq) [a-z]+|[a-z]*meters?|[a-z]*metres?|[a-z]*grams?|[a-z]*lit(?:er|re)s?"
    r"|inch(?:es)?|feet|foot|miles?|yards?|cents?|dollars?|euros?|pounds?|ounces?|radians?"
    r"|seconds?|minutes?|hours?|days?|weeks?|months?|years?|units?|people|students|ways|times)"
)
_UNIT = re.compile(  # after a number: in \text, or a word with a space before it
    rf"(?P<value>.*[\d)}}|])(?: ?\\text\{{(?P<text>[^{{}}]+)\}}| (?P<word>{_UNIT_WORD})"
    r"|(?P<joined>[cmk]m|kg|mph|km/h))"
    r"(?P<power>\^\{\d\})?",
    re.DOTALL,
)
_MAGNITUDES = re.compile(r"hundred|thousand|[mbtr]+illion|dozen|pairs?|half|halves", re.IGNORECASE)
_WORDS = re.compile(
    r"[A-Z][a-z]+|[A-Z]{2,}|[A-Za-z]{4,}|yes|no|(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)+"
)
_NOT_CALCULATED = re.compile(  # that the parser misreads, or does not know
    r"\d \d|\d\.\d+\.|\d_\{|'|\\circ|\\%|\\text|\\p?mod|\\equiv|\\overline|\\l?dots|\.\.|:|[^ -~]"
)
_POWER_OF_TEN = re.compile(r"\\(?:times|cdot)10\^\{(-?\d+)\}$")
_SET = re.compile(r"\\(?:setminus|cap|mathbb|backslash)")
_PRODUCT = re.compile(r"(?<=[\d)!])(?<![_^]\d)(?=\()|(?<=\))(?=[\dA-Za-z])|(?<=\d)(?=\\binom)")
_PROPER = re.compile(r"(?<![\d.}])(\d+) ?(?=\\frac\{(\d+)\}\{(\d+)\})")


def _normalise(text: str) -> str:
    return re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text).lstrip("$").rstrip("$.")  # "2 1/3" is not 7


def _as_decimal(text: str) -> tuple[str, str, int] | None:
    """Bring a decimal into the one form (sign, digits, e) of sign 0.digits 10^e; no arithmetic."""
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole, fraction = match[2], match[3] or ""
    digits = (whole + fraction).lstrip("0")
    shift = len(digits) - len(fraction)
    if not digits:
        return "", "", 0
    return match[1].replace("+", ""), digits.rstrip("0"), shift + int(match[4] or 0)


def _as_ratio(text: str) -> Fraction | None:
    """Read a fraction or a decimal that is short enough to calculate with."""
    numerator, slash, denominator = text.partition("/")
    if len(text) > LONGEST_NUMBER or (slash and not denominator.isdigit()):
        return None
    decimal = _as_decimal(numerator)
    if decimal is None or abs(decimal[2]) > LONGEST_NUMBER:
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def same_number_or_text(answer: str, reference: str) -> bool:
    """Whether two answers are the same number, or the same text but for white space and ``$``."""
    left, right = _normalise(answer), _normalise(reference)
    if left == right:
        return True
    left, right = (t.replace(",", "") if _GROUPED.fullmatch(t) else t for t in (left, right))
    if "/" not in left + right:
        a = _as_decimal(left)
        return a is not None and a == _as_decimal(right)
    ratio = _as_ratio(left)
    return ratio is not None and ratio == _as_ratio(right)


def same_mathematics(
    answer: str,
    reference: str,
    tolerance: str | float | None = None,
    unit: str | None = None,
    seconds: float = 1.0,
) -> bool | None:
    r"""Whether two answers in LaTeX are equal; None if that cannot be said in time.

    Args:
        answer: An answer without the text round it, such as the content of the last box; of at
            most `opd.golds.LONGEST` characters.
        reference: The other; the relation is symmetric but for `tolerance` and `unit`.
        tolerance: Largest absolute difference of numbers, as OlympiadBench's `error`; several,
            separated by commas, belong to the reference's answers in their order.
        unit: The reference's unit, as OlympiadBench's `unit`. An answer may leave the unit out but
            not write another.
        seconds: That all the calculating for one pair may take.

    Raises:
        UserError: A tolerance that is no number, or another number of tolerances than of answers.
    """
    limits = None if tolerance is None else str(tolerance)
    if limits is not None and not limits.strip():
        limits = None
    return _same_cleaned(
        clean_reference(answer), clean_reference(reference), limits, unit or None, seconds
    )


@functools.lru_cache(maxsize=1 << 14)
def _same_cleaned(
    answer: str, reference: str, tolerance: str | None, unit: str | None, seconds: float
) -> bool | None:
    if not answer or not reference:
        return False
    limits, right = _tolerances(tolerance), read_structure(reference)
    if len(limits) > 1 and len(limits) != max(1, len(right.parts)):
        raise UserError(
            f"{len(limits)} tolerances ({tolerance}) for {max(1, len(right.parts))} answers"
            f" ({reference})"
        )
    if dense(answer) == dense(reference):
        return True
    left = read_structure(answer)
    compare = _Comparison(limits, _unit_name(unit) if unit else None, seconds)
    try:
        return compare.answers(left, right)
    except TimeoutError:
        return None


def _tolerances(text: str | None) -> tuple[Fraction, ...]:
    if text is None:
        return ()
    values = [_rational(dense(clean_reference(part))) for part in text.split(",")]
    if any(value is None or value < 0 for value in values):
        raise UserError(f"tolerance {text!r} must be a number >= 0, or several with commas between")
    return tuple(value for value in values if value is not None)


@dataclass
class _Comparison:
    """One comparison: what differences are allowed, and the processor time that is left."""

    tolerances: tuple[Fraction, ...]
    unit: str | None
    seconds: float  # of calculating elsewhere; as much again may be spent here

    def __post_init__(self) -> None:
        self.until = time.thread_time() + self.seconds

    def answers(self, left: Structure, right: Structure) -> bool:
        """Compare whole answers: the tolerances belong to the parts of the right one."""
        if len(self.tolerances) < 2:
            return self.same(left, right, self.tolerances[0] if self.tolerances else None)
        if right.kind in ("list", "set"):
            return self.unordered(_elements(left), right.parts, self.tolerances)
        return (left.kind, len(left.parts)) == (right.kind, len(right.parts)) and all(
            map(self.same, left.parts, right.parts, self.tolerances)
        )

    def same(self, left: Structure, right: Structure, tolerance: Fraction | None) -> bool:
        if self.seconds <= 0 or time.thread_time() > self.until:
            raise TimeoutError
        if left.name and right.name and left.name != right.name:
            if left.kind != "leaf" or right.kind != "leaf":
                return False
            whole = [dense(f"{one.name}={one.text}") for one in (left, right)]
            return self.calculated(whole[0], whole[1], None)  # y = x + 1, and x = y - 1
        for one, other, swapped in ((left, right, False), (right, left, True)):
            if one.kind == "chain":
                pairs = ((part, other) if not swapped else (other, part) for part in one.parts)
                return all(self.same(a, b, tolerance) for a, b in pairs)
        if left.kind == right.kind == "leaf":
            if bool(left.name) != bool(right.name):  # y = 2x + 1, and 2x - y + 1 = 0
                left, right = (_whole(a, b) for a, b in ((left, right), (right, left)))
            return self.leaves(left.text, right.text, tolerance)
        unordered = ("list", "set")
        if left.kind in unordered or right.kind in unordered:
            return self.collections(left, right, tolerance)
        if "union" in (left.kind, right.kind) or _SET.search(left.text + right.text):
            if left.kind == right.kind and self.unordered(left.parts, right.parts, (tolerance,)):
                return True
            return self.calculated(_as_set(left), _as_set(right), None)
        if left.kind != right.kind:
            return False
        return len(left.parts) == len(right.parts) and all(
            self.same(a, b, tolerance) for a, b in zip(left.parts, right.parts, strict=True)
        )

    def collections(self, left: Structure, right: Structure, tolerance: Fraction | None) -> bool:
        """Compare lists and sets; a set holds nothing twice, one thing may stand without braces."""
        a, b = _elements(_by_name(left)), _elements(_by_name(right))
        if left.kind == "set":
            a = self.distinct(a)
        if right.kind == "set":
            b = self.distinct(b)
        if not self.names_agree(a, b):
            return False
        return self.unordered(a, b, (tolerance,))

    def distinct(self, parts: Sequence[Structure]) -> tuple[Structure, ...]:
        kept: list[Structure] = []
        for part in parts:
            if not any(self.same(part, other, None) for other in kept):
                kept.append(part)
        return tuple(kept)

    @staticmethod
    def names_agree(a: Sequence[Structure], b: Sequence[Structure]) -> bool:
        """Values of several names can be told apart only where both sides name them."""
        names = {part.name for part in (*a, *b)} - {None}
        return len(names) < 2 or all(part.name for part in (*a, *b))

    def unordered(
        self,
        left: Sequence[Structure],
        right: Sequence[Structure],
        tolerances: Sequence[Fraction | None],
    ) -> bool:
        """Whether each part on the left has a partner of its own on the right."""
        if len(left) != len(right):
            return False
        limits = tolerances if len(tolerances) > 1 else [*tolerances] * len(right)
        partner: dict[int, int] = {}  # of a right part: its left one

        def place(i: int, tried: set[int]) -> bool:  # augmenting paths: tolerance is no equivalence
            for j, part in enumerate(right):
                if j not in tried and self.same(left[i], part, limits[j]):
                    tried.add(j)
                    if j not in partner or place(partner[j], tried):
                        partner[j] = i
                        return True
            return False

        return all(place(i, set()) for i in range(len(left)))

    def leaves(self, left: str, right: str, tolerance: Fraction | None) -> bool:
        """Compare two values that may have units; one that lacks a unit has the other's."""
        if dense(left) == dense(right):
            return True
        (a, left_unit), (b, right_unit) = (self.value_and_unit(text) for text in (left, right))
        right_unit = right_unit or self.unit
        if left_unit and right_unit and left_unit != right_unit:
            return False
        if left_unit == right_unit:
            return self.values(a, b, tolerance)
        if self.values(a, b, tolerance):
            return True
        factor = _FACTORS.get(left_unit or right_unit or "")
        if factor is None:
            return False
        if left_unit:
            return self.values(factor(a), b, tolerance)
        return self.values(a, factor(b), tolerance)

    def value_and_unit(self, text: str) -> tuple[str, str | None]:
        text = text.strip()
        for sign in (r"\%", r"^{\circ}"):
            if text.endswith(sign) and len(text) > len(sign):
                return text.removesuffix(sign).strip(), sign
        found = _UNIT.fullmatch(text)
        if found and not _MAGNITUDES.search(found["text"] or ""):
            return found["value"].strip(), _unit_name(
                (found["text"] or found["word"] or found["joined"]) + (found["power"] or "")
            )
        if (
            self.unit
            and (found := re.fullmatch(r"(.*?\d)\s*([A-Za-z\\][A-Za-z/^{}\d\\]*)", text))
            and (_unit_name(found[2]) == self.unit)
        ):
            return found[1], self.unit
        return text, None

    def values(self, left: str, right: str, tolerance: Fraction | None) -> bool:
        """Compare two values without units: numbers, words, expressions."""
        left, right = dense(left), dense(right)
        if left == right:
            return True
        a, b = _rational(left), _rational(right)
        if a is not None and b is not None:
            return abs(a - b) <= (tolerance or 0)
        digits = [_as_decimal(_POWER_OF_TEN.sub(r"e\1", text)) for text in (left, right)]
        if None not in digits:
            return digits[0] == digits[1]
        words = [_words(text) for text in (left, right)]
        if any(words):
            return (words[0] or left) == (words[1] or right)
        return self.calculated(left, right, tolerance)

    def calculated(self, left: str, right: str, tolerance: Fraction | None) -> bool:
        """Ask the process that calculates, if both are such as it reads rightly."""
        left, right = _as_fraction(left), _as_fraction(right)
        if any(_NOT_CALCULATED.search(text) for text in (left, right)):
            return False
        letters = [set("".join(re.findall("[A-Za-z]", COMMAND.sub("", t)))) for t in (left, right)]
        for letter in {each.lower() for each in letters[0] | letters[1]}:
            cases = [{letter, letter.upper()} & found for found in letters]
            if len(cases[0] | cases[1]) > 1:  # the parser takes A and a for one
                return False
        reply = equivalent(
            _readable(left),
            _readable(right),
            self.seconds,
            None if tolerance is None else float(tolerance),
        )
        if reply is None:
            raise TimeoutError
        verdict, spent = reply
        self.seconds -= spent
        return verdict


_FACTORS: dict[str, Callable[[str], str]] = {
    r"\%": lambda value: rf"\frac{{{value}}}{{100}}",
    r"^{\circ}": lambda value: rf"({value})\cdot\frac{{\pi}}{{180}}",
}


def _by_name(answer: Structure) -> Structure:
    """Read `(x,y) = (1,2)` as `x = 1, y = 2`."""
    names = (answer.name or "").strip("()").split(",")
    if len(names) < 2 or answer.kind != "()" or len(names) != len(answer.parts):
        return answer
    parts = zip(names, answer.parts, strict=True)
    named = tuple(Structure(part.kind, part.text, part.parts, name) for name, part in parts)
    return Structure("list", answer.text, named)


def _as_set(answer: Structure) -> str:
    """Write a set for the parser."""
    if answer.kind == "union":
        return r"\cup ".join(map(_as_set, answer.parts))
    if len(answer.kind) == 2 and answer.parts:
        ends = ",".join(dense(part.text) for part in answer.parts)
        return answer.kind[0] + ends + answer.kind[1]
    return dense(answer.text)


def _elements(answer: Structure) -> tuple[Structure, ...]:
    return answer.parts if answer.kind in ("list", "set") else (answer,)


def _whole(answer: Structure, other: Structure) -> Structure:
    """Put the name back before a value that is compared with an equation."""
    if answer.name and "=" in other.text:
        return Structure("leaf", f"{answer.name}={answer.text}")
    return answer


def _unit_name(text: str) -> str:
    r"""Return a unit as it is compared: `\mathrm{~cm}^{2}` is cm^2, hours is hour."""
    text = clean_reference(text)
    if text in (r"\%", r"^{\circ}"):
        return text
    text = re.sub(r"\\text|[{}\\ ~.]", "", text)
    return text[:-1] if len(text) > 3 and text.endswith("s") else text


def _words(text: str) -> str | None:
    """Return a text of words as it is compared, None if it is no text of words."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    plain = re.sub(r"^\((.*)\)$", r"\1", plain)
    if r"\text" not in text and not _WORDS.fullmatch(plain):
        return None
    plain = " ".join(plain.split())
    return plain.casefold() if len(plain) > 1 else plain


def _rational(text: str) -> Fraction | None:
    """Read a number that is written out: an integer, decimal, fraction or mixed number."""
    if len(text) > LONGEST_NUMBER or not (found := _RATIONAL.fullmatch(text)):
        return None
    if found["exponent"]:
        return (-1 if found["minus"] == "-" else 1) * Fraction(10) ** int(found["exponent"])
    try:
        value = _positive(found)
    except ZeroDivisionError:
        return None
    value *= Fraction(10) ** int(found["power"] or 0)
    return -value if found["sign"] == "-" else value


def _positive(found: re.Match[str]) -> Fraction:
    if found["decimal"]:
        return Fraction(found["decimal"])
    if found["repeated"]:
        places, period = len(found["fixed"]), 10 ** len(found["repeated"]) - 1
        whole = Fraction(int((found["whole"] + found["fixed"]) or "0"), 10**places)
        return whole + Fraction(int(found["repeated"]), period * 10**places)
    value = Fraction(int(found["n"] or found["top"]), int(found["d"] or found["bottom"]))
    if not found["mixed"]:
        return value
    return int(found["mixed"]) + value if 0 < value < 1 else int(found["mixed"]) * value


def _as_fraction(text: str) -> str:
    """Write a number as a fraction; other texts are left as they are."""
    value = _rational(text)
    return text if value is None else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _readable(text: str) -> str:
    """Write an expression so that the parser takes it as people do: exact, products as products."""
    text = _PROPER.sub(
        lambda found: found[1] if int(found[2]) < int(found[3]) else rf"{found[1]}\cdot ", text
    )
    text = re.sub(
        r"(\d*)\.(\d+)",
        lambda found: rf"\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}",
        text,
    )
    return _PRODUCT.sub(r"\\cdot ", text)
