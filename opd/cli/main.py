"""``opd``: the one front door.

``fit``, ``validate``, ``test`` and ``predict`` are a LightningCLI; the other commands are functions
whose arguments and help come from their signatures.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.cli import ranks
from opd.cli.explain import one_line
from opd.errors import UserError

USAGE_ERROR = 2
LOST_CONTACT = 1
TERMINATED = 128 + signal.SIGTERM  # what a shell reports of a program that a signal has ended
INTERRUPTED = 128 + signal.SIGINT
NEGATIVE = re.compile(r"-\.?\d.*|-inf|-nan")
NOBODY_READS = 128 + signal.SIGPIPE


@dataclass(frozen=True)
class Several:
    """An option that takes several values.

    Attributes:
        count: How many; "+": one or more, and it cannot be left out.
        metavar: What help calls them.
        help: What they are.
    """

    count: int | str
    metavar: str | tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Command:
    """A command of the front door.

    Attributes:
        help: One line for ``opd --help``.
        function: ``module:function`` that runs it; None: LightningCLI does.
        positional: Name of the argument that is given without an option, if any.
        runs_others: Whether it runs further commands, as a YAML file says.
        several: Options that take several values, by name.
        passes_on: Argument of the function that takes what stands after ``--``.
    """

    help: str
    function: str | None = None
    positional: str | None = None
    runs_others: bool = False
    several: Mapping[str, Several] = field(default_factory=dict)
    passes_on: str | None = None


COMMANDS = {
    "fit": Command("distil a student on-policy; resume with --ckpt_path last"),
    "validate": Command("accuracy and teacher KL of a student on held-out prompts"),
    "test": Command("the same, logged as test/*"),
    "predict": Command(
        "sample completions and write them, with what the teacher thinks of each token, as JSONL"
    ),
    "evaluate": Command(
        "evaluate a model on lm-eval tasks",
        "eval.evaluate:evaluate",
        several={"compare": Several(2, ("A", "B"), "Two folders.")},
    ),
    "export": Command("turn a checkpoint into a Hugging Face folder", "opd.cli.export:export"),
    "serve": Command(
        "a vLLM server that samples for a student, or reads as its teacher",
        "opd.cli.serve:serve",
        passes_on="others",
    ),
    "report": Command(
        "one HTML page with curves, tables and rollouts", "eval.report:report", "runs"
    ),
    "analyze": Command(
        "what updates look like: spectra, directions, what parts of them do",
        "eval.analyze.command:analyze",
        several={
            "checkpoints": Several(
                *("+", "CHECKPOINT"),
                "What the base became, in order; a run folder stands for all of its checkpoints. "
                "Those of several runs as LABEL=CHECKPOINT.",
            )
        },
    ),
    "bench": Command("speed and memory of a step, beside TRL's", "eval.bench.command:bench"),
    "study": Command(
        "methods x learning rates x seeds, compared", "eval.study.command:study", runs_others=True
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 where the user can put right what went wrong, and one line on stderr says what; 143
        after SIGTERM, 130 after Ctrl-C; 141 if nobody reads what it prints any more, as in ``opd
        --help | head -1``; 1 if another rank is gone.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _main(args)
        finally:
            sys.stdout.flush()  # here, where it can be handled, rather than when Python ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _main(args: list[str]) -> int:
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else USAGE_ERROR
    if args[0] == "--version":
        print(f"opd {importlib.metadata.version('opd')}")
        return 0
    name, *rest = _joined(args)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? See" if near else "see"
        print(f"opd: unknown command {name!r}; {hint} opd --help", file=sys.stderr)
        return USAGE_ERROR
    try:
        run_command(name, rest)
    except BrokenPipeError:
        raise
    except OSError as error:  # of a disk that is full or gone; what was saved before is whole
        _complain(name, f"error: {error}")
        return USAGE_ERROR
    except KeyboardInterrupt:  # where there is nothing to save
        _complain(name, "stopped by Ctrl-C")
        return INTERRUPTED
    except _usage_errors() as error:
        _complain(name, f"error: {one_line(error)}")
        return USAGE_ERROR
    except _told_to_stop() as stopped:
        by_user = signal.SIGINT in stopped.args
        by = "Ctrl-C" if by_user else "SIGTERM"
        _complain(name, f"stopped by {by}; go on with --ckpt_path last")
        return INTERRUPTED if by_user else TERMINATED
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):  # which Lightning turns into this
            raise
        _complain(name, "stopped by Ctrl-C")
        return INTERRUPTED
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        _complain(
            name,
            "error: no contact with another rank, which has died, hangs or cannot be reached: see "
            f"its output, and go on with --ckpt_path last ({one_line(error)})",
        )
        return LOST_CONTACT
    return 0


def _joined(args: Sequence[str]) -> list[str]:
    """Write ``--lr -1e-4`` as ``--lr=-1e-4``: argparse takes the number for an option."""
    joined: list[str] = []
    for arg in args:
        if joined and NEGATIVE.fullmatch(arg) and re.fullmatch(r"--[^=]+", joined[-1]):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


# Python asks for these when something has been raised: Lightning takes seconds to import, and not
# every command needs it.


def _usage_errors() -> tuple[type[Exception], ...]:
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return UserError, ArgumentError, MisconfigurationException


def _told_to_stop() -> type[BaseException]:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    return SIGTERMException


def _complain(name: str, message: str) -> None:
    """Print one line; processes other than the first say who they are."""
    rank = ranks.name()
    print(f"opd {name}: {rank + ': ' if rank else ''}{message}", file=sys.stderr)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed: NCCL has a type for it, gloo only its source files' names."""
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _usage() -> str:
    lines = ["On-policy distillation of language models.", "", "usage: opd COMMAND ...", ""]
    lines += [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
    lines += ["", "opd COMMAND --help lists the options of one command; opd --version."]
    return "\n".join(lines)


def run_command(name: str, args: list[str]) -> Any:
    """Run a command; returns what its function returns, or the LightningCLI.

    Raises:
        UserError: The user can put it right.
        jsonargparse.ArgumentError: An option is unknown or has a wrong value.
    """
    command = COMMANDS[name]
    if command.function is None:
        return _run_lightning([name, *args])
    from jsonargparse import ArgumentParser

    from opd.cli import recipes

    module, _, function_name = command.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), function_name)
    parser = ArgumentParser(
        prog=f"opd {name}", description=command.help, exit_on_error=False, allow_abbrev=False
    )
    if command.positional:
        parser.add_argument(command.positional, nargs="+", type=str)
    skip: set[str | int] = {command.positional} if command.positional else set()
    passed_on: dict[str, Any] = {}
    if command.passes_on:
        skip.add(command.passes_on)
        own = args.index("--") if "--" in args else len(args)
        args, passed_on[command.passes_on] = args[:own], args[own + 1 :]
    if command.runs_others:
        names = ", ".join(recipes.names("study"))
        help_ = f"YAML file with these options, or one of {names}"
        parser.add_argument("--config", action=recipes.StudyAction, help=help_)
        skip.add("opd")
    parser.add_function_arguments(function, skip=skip | set(command.several))
    for option, takes in command.several.items():
        parser.add_argument(
            f"--{option}",
            nargs=takes.count,
            metavar=takes.metavar,
            required=takes.count == "+",
            help=takes.help,
        )
    options = parser.instantiate(parser.parse_args(_as_named(args, function))).as_dict()
    options.pop("config", None)
    _check_null(options, function)
    if command.runs_others:
        passed_on["opd"] = main
    return function(**options, **passed_on)


def _check_null(options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse null, which the parser takes for any option, where a function has no use for it.

    Raises:
        UserError: An option is null.
    """
    kinds = inspect.get_annotations(function, eval_str=True)
    for name, value in options.items():
        if value is None and name in kinds and type(None) not in typing.get_args(kinds[name]):
            raise UserError(f"{name}: must not be null; leave it out for its default")


def _as_named(args: Sequence[str], function: Callable[..., Any]) -> list[str]:
    """Let ``--allow-code-execution`` be ``--allow_code_execution true``, as others write it."""
    kinds = inspect.get_annotations(function, eval_str=True)
    named: list[str] = []
    for i, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in kinds:
            named.append(arg)
            continue
        bare = not equals and kinds[name] is bool and (args[i + 1 : i + 2] or ["--"])[0][:2] == "--"
        named += [f"--{name}{equals}{value}", *(["true"] if bare else [])]
    return named


# --- fit, validate, test, predict -----------------------------------------------------------------


def _run_lightning(args: list[str]) -> Any:
    """Run LightningCLI as if ``args`` had been typed: launchers start other ranks from sys.argv."""
    from opd.cli.fit import OPDCLI

    typed = sys.argv
    sys.argv = [typed[0], *args]
    try:
        return OPDCLI.run()
    finally:
        sys.argv = typed
