"""One line out of what a library says about an option: which key, what is wrong, what was given.

jsonargparse lists what each member of a Union has to say, nested as deep as the option. The first
of them that is about more than the type's name is about the type that the value was meant to be.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from opd.errors import UserError

KEY = re.compile(r'Parser key "([^"]+)":?')
CLASS = re.compile(r"Problem with given class_path '([\w.]+)':?")
GIVEN = re.compile(r"(?:Got|Given) value: (\S.*?)(?:\. Got value:.*)?$", re.MULTILINE)
NOISE = re.compile(  # that only says that there are several types, or is of a type nobody meant
    r"Expected a path but|Does not validate against|Subtypes|Errors$|Given value|Not a valid sub"
    r"|Subclass types expect|a class path|a dict with|Type typing|Expected a <class 'NoneTyp"
)
TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}


def one_line(error: BaseException) -> str:
    """Boil an error down to one line that begins with the key, where there is one."""
    text = str(error)
    if isinstance(error, UserError) or not (KEY.search(text) or "Errors:" in text):
        return " ".join(text.split()) or type(error).__name__
    where: list[str] = []
    key = reason = ""
    for line in _lines(text):
        if found := KEY.search(line):
            key = f"{key}.{found[1]}" if key else found[1]
        if found := CLASS.search(line):
            where, key = [*where, key], found[1].rpartition(".")[2]
        rest = CLASS.sub("", KEY.sub("", line)).strip(": ")
        rest = re.sub(r"^Type typing\S.* callable class: ?", "", rest)
        if rest and not NOISE.match(rest):
            reason = rest
            break
    place = [part for part in [*where, key] if part]
    return ": ".join([*place, _said_plainly(reason, text)])


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if stripped := line.strip().removeprefix("- ").strip():
            yield stripped


def _said_plainly(reason: str, text: str) -> str:
    """Say what was expected as a person would, and what was given."""
    given = GIVEN.search(reason) or GIVEN.search(text)
    value = given[1] if given else ""
    if "Namespace(" in value or "NestedArg(" in value:
        value = ""
    reason = re.sub(r"\. Got value: .*", "", reason)
    expected = re.match(r"Expected a (.+)", reason)
    if expected is None:
        return reason or "cannot be used"
    wanted = expected[1]
    if choices := re.match(r"typing\.Literal\[(.*)\]", wanted):
        wanted = f"one of {choices[1]}"
    elif wanted.startswith("dot import path string"):
        wanted = "the name of a class, as package.Class"
    elif plain := re.fullmatch(r"<class '(?:[\w.]+\.)?(\w+)'>", wanted):
        wanted = TYPES.get(plain[1], f"a {plain[1]}")
    return f"must be {wanted}" + (f", not {value}" if value else "")


def cause(error: BaseException) -> BaseException:
    """Return what has caused an error that a parser wraps: ours if there is one, else the first."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    return next((e for e in chain if isinstance(e, UserError)), chain[-1])


def raised_in(error: BaseException) -> str:
    """Return the package whose code has raised an error, as ``lightning``; empty if unknown."""
    return next(iter(_modules(error)), "").partition(".")[0]


def is_refusal_of_lightning(error: BaseException) -> bool:
    """Whether Lightning has raised an error, or what one of its loggers stands for: wandb has."""
    modules = _modules(error)
    loggers = any(name.startswith("lightning.pytorch.loggers.") for name in modules)
    return loggers or raised_in(error) == "lightning"


def _modules(error: BaseException) -> list[str]:
    """Name the modules that an error has come through, the one that has raised it first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [str(frame.f_globals.get("__name__", "")) for frame in reversed(frames)]
