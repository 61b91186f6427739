"""Answers that are programs: right if they pass the tests that stand where an answer would."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from opd.answers import Verifier
from opd.errors import UserError
from opd.rewards.apps import IMPORTS, read_apps
from opd.rewards.code import CodeTests, CodeVerifier
from opd.rewards.sandbox import Sandbox

log = logging.getLogger(__name__)


class ProgramVerifier(Verifier):
    """Runs the last fenced block of a completion on its prompt's tests, in a sandbox.

    The tests are the prompt's answer: JSON with ``inputs`` and ``outputs``, and ``fn_name`` where a
    function is asked for, as APPS, TACO and Eurus have them. Where they cannot be read, no program
    is right.

    Args:
        allow_code_execution: Run the programs that the student writes. Must be set to true.
        seconds: Of processor time, for each test.
        memory_gib: Of address space, for each program.
        workers: Programs that run at a time, on each rank. None: as many as it has processors.

    Raises:
        UserError: Nothing was allowed to run, or nothing can be run here in confinement.
    """

    def __init__(
        self,
        allow_code_execution: bool = False,
        seconds: float = 10.0,
        memory_gib: float = 4.0,
        workers: int | None = None,
    ) -> None:
        if not allow_code_execution:
            raise UserError(
                "ProgramVerifier runs programs that the student writes; allow it with "
                "--model.verifier.allow_code_execution true"
            )
        for name, value in [
            ("seconds", seconds),
            ("memory_gib", memory_gib),
            ("workers", 1 if workers is None else workers),
        ]:
            if value <= 0:
                raise UserError(f"ProgramVerifier.{name}={value} must be above 0")
        self.seconds = seconds
        self.memory = int(memory_gib * 2**30)
        self.workers = workers or len(os.sched_getaffinity(0))
        self._judge = CodeVerifier(Sandbox())

    def check(self, references: Sequence[str]) -> None:
        """Count the tests that cannot be read.

        Raises:
            UserError: None can: they are no tests.
        """
        reasons = [reason for reason in map(_unreadable, references) if reason]
        if not reasons:
            return
        if len(reasons) == len(references):
            raise UserError(
                "ProgramVerifier: the answer of a prompt must be its tests, as JSON with inputs "
                f"and outputs, and no answer is ({reasons[0]}: {references[0][:60]!r}); name their "
                "field with data.format.answer_field"
            )
        log.warning(
            "%d of %d prompts have tests that are none or cannot be read; completions to them "
            "count as wrong",
            *(len(reasons), len(references)),
        )

    def __call__(self, completion: str, reference: str) -> bool:
        """Whether the completion's program passes all tests."""
        try:
            tests = self._tests(reference)
        except UserError:  # counted by `check`
            return False
        return self._judge(completion, tests).passed

    def verify(self, completions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Judge several completions, some at a time."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self, completions, references))

    def _tests(self, reference: str) -> CodeTests:
        apps = read_apps(reference)
        return CodeTests(
            apps.kind,
            apps.cases,
            apps.entry_point,
            setup=IMPORTS,
            seconds=self.seconds,
            memory=self.memory,
        )


def _unreadable(reference: str) -> str | None:
    try:
        tests = read_apps(reference)
        CodeTests(tests.kind, tests.cases, tests.entry_point)
    except UserError as error:
        return str(error)
    return None
