r"""Bring the LaTeX of an answer into one form, so that what means the same is written the same.

Golds of benchmarks keep their dollars and boxes, write `27.0`, `1,024` and `4.5e33`, and forget
backslashes; models write `\dfrac12`, `\left(`, `\!`, a Unicode minus. Only the writing is changed
here, never the mathematics: what is equal is decided in `opd/equality.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

LONGEST = 1000  # characters that are cleaned; longer texts are only stripped

_CHARACTERS = {
    **dict.fromkeys("−–—‐‑﹣－", "-"),  # noqa: RUF001 - the minus, and dashes that stand for it
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000\t\r\n", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"},
    **{"¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    **{"×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "∕": "/"},  # noqa: RUF001
    **{"±": r"\pm ", "∓": r"\mp ", "π": r"\pi ", "∞": r"\infty ", "°": r"^{\circ}"},
    **{"α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda "},  # noqa: RUF001
    **{"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}"},  # noqa: RUF001
    **{"％": r"\%", "，": ", ", "（": "(", "）": ")", "。": "."},  # noqa: RUF001
}
_TRANSLATION = str.maketrans(_CHARACTERS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_FUNCTIONS = r"arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm|det"
_GROUP = r"\{([^{}]*)\}"
_DEEP_GROUP = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
_END = r"(?![A-Za-z])"  # of a command's or a word's letters
_ALONE = r"(?<![\\A-Za-z])"  # before a word that lacks its backslash
_GRID = r"(?<!\\)"  # `\\ ` ends the row of a matrix; `\ ` is a space

_Replacement = str | Callable[[re.Match[str]], str]
_SUBSTITUTIONS: list[tuple[str, _Replacement]] = [
    # what encloses an answer, or only moves it on the page
    (rf"\\?\$|{_GRID}\\[()\[\]]", ""),
    (rf"\\(?:left|right|[bB]igg?[lr]?){_END}\.?", ""),
    (rf"\\(?:(?:display|text|script)style|limits){_END}|{_GRID}\\!", ""),
    (r"(?<=\\\\)\[[\d.]+ ?(?:pt|em|ex|mm|cm)\]", ""),  # between rows of a matrix
    (r"\{,\}", ","),
    (r"(?<![\w}\\])\{\s*\}", ""),  # what a ^ stands on that stands on nothing
    (rf"(?<=\d)(?:{_GRID}\\[,;: ]|~| )(?=\d{{3}}(?!\d))", "\xa0"),  # of thousands, perhaps
    (rf"{_GRID}\\[,;: >]|~|\\q?quad{_END}", " "),
    # one name for one thing
    (r"√\s*(\d+)", r"\\sqrt{\1}"),
    (r"√", r"\\sqrt "),
    (r"([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", lambda found: f"^{{{found[1].translate(_SUPERSCRIPTS)}}}"),
    (r"([₀₁₂₃₄₅₆₇₈₉]+)", lambda found: f"_{{{found[1].translate(_SUPERSCRIPTS)}}}"),
    (rf"\\[dtc]frac{_END}", r"\\frac"),
    (rf"\\[dt]binom{_END}", r"\\binom"),
    (rf"{_ALONE}(frac|sqrt)(?=\s*[{{(\d])", r"\\\1"),
    (rf"{_ALONE}(?:infinity|infty|inf){_END}|\\infin{_END}", r"\\infty "),
    (rf"{_ALONE}pi{_END}", r"\\pi "),
    (r"\+\s*\\infty", r"\\infty"),
    (rf"\\(?:le|leqslant){_END}|<=|=<", r"\\leq "),
    (rf"\\(?:ge|geqslant){_END}|>=", r"\\geq "),
    (rf"\\lt{_END}", "<"),
    (rf"\\gt{_END}", ">"),
    (rf"\\ne{_END}|!=", r"\\neq "),
    (rf"\\(?:varnothing|empty){_END}", r"\\emptyset "),
    (rf"\\lbrace{_END}", r"\\{"),
    (rf"\\rbrace{_END}", r"\\}"),
    (r"\\\{\s*\\\}", r"\\emptyset "),
    (rf"\\lbrack{_END}", "["),
    (rf"\\rbrack{_END}", "]"),
    (rf"\\[lr]vert{_END}", "|"),
    (rf"\\(?:ast|cdotp){_END}|\*", r"\\cdot "),
    (rf"\\(?:operatorname|mathrm|text)\*?\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
    (r"\\mathrm\{\s*([eid])\s*\}", r"\1 "),  # constants and the d of integrals
    (rf"\\(?:text(?:bf|it|rm|up|sf)|mbox|operatorname|math(?:rm|bf|it)){_GROUP}", r"\\text{\1}"),
    (r"\\mathbb\s*R", r"\\mathbb{R}"),
    (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ{_END})|\\degree{_END}", r"^{\\circ}"),
    (r"\\text\{\s*degrees?\s*\}|(?<=\d) ?degrees?\b", r"^{\\circ}"),
    (r"\\?%|\\text\{\s*per ?cent\s*\}|(?<=\d) ?per ?cent\b", r"\\%"),
    # braces that TeX lets one leave out
    (r"\\sqrt\s*\(([^()]*)\)(?!\s*\^)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([\dA-Za-z])", r"\\sqrt{\1}"),
    (r"\\(frac|binom)\s*([\dA-Za-z])", r"\\\1{\2}"),
    (rf"\\(frac|binom)\s*{_DEEP_GROUP}\s*([\dA-Za-z])", r"\\\1{\2}{\3}"),
    # TeX raises one digit; who leaves out the braces of several means them all
    (r"([_^])\s*([-+]?\d+(?:\.\d+)?|[A-Za-z])", r"\1{\2}"),
    # numbers
    (r"(?<![\w.}])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d+)(?![\w.^])", r"\1 \\times 10^{\2}"),
    (r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1"),
    (r"(?<![\d.,\w}])\.(?=\d)", "0."),
    # several answers
    (r",?\s*\\text\{[,\s]*(?:and|or)[,\s]*\}\s*,?", ", "),
    (r",?\s+(?:and|or)\s+", ", "),
    (r"\s*,[\s,]*,", ","),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _SUBSTITUTIONS]
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_THOUSANDS = re.compile(
    "(?<![\\w.,\xa0])\\d{1,3}(?:(?:,\\d{3})+|(?:\xa0\\d{3})+)(?!\\d|[,\xa0]\\d)"
)


def clean_reference(text: str) -> str:
    r"""Return an answer's LaTeX in the one form that answers are compared in.

    Boxes, dollars, spacing and closing full stops are gone; `\dfrac12` is `\frac{1}{2}`, `27.0` is
    `27`, `1,024` is `1024` (but `1, 024` and `(1,024)` remain two numbers), `4.5e33` is
    `4.5 \times 10^{33}`, "3 or 4" is `3, 4`; a forgotten backslash of `sqrt` and `frac` is put
    in. Cleaning what is clean changes nothing. Texts of more than `LONGEST` characters are only
    stripped.
    """
    text = text.strip()
    return _cleaned(text) if len(text) <= LONGEST else text


@functools.lru_cache(maxsize=1 << 14)
def _cleaned(text: str) -> str:
    for _ in range(10):  # one pass does nearly all; a second shows that there is no more to do
        before, text = text, _pass(text)
        if text == before:
            break
    return text


def _pass(text: str) -> str:
    text = _unboxed(text.translate(_TRANSLATION))
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", _joined_thousands(text)).strip()
    return text if text.endswith("..") else re.sub(r"[\s.,;:]+$", "", text)


def _unboxed(text: str) -> str:
    """Put the content of each box in its place, if its braces are closed."""
    while box := _BOX.search(text):
        depth, end = 1, box.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        text = f"{text[: box.start()]} {text[box.end() : end - 1]} {text[end:]}"
    return text


def _joined_thousands(text: str) -> str:
    """Take the separators out of numbers, except in brackets, where a comma separates places."""

    def joined(found: re.Match[str]) -> str:
        before = text[: found.start()]
        opened = sum(map(before.count, ("(", "[", r"\{")))
        closed = sum(map(before.count, (")", "]", r"\}")))
        return found[0] if opened > closed else re.sub(r"\D", "", found[0])

    return _THOUSANDS.sub(joined, text)
