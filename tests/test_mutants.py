"""The list of changes that tests must notice is up to date, and they do (slow)."""

import subprocess
import sys

import mutants
import pytest


def test_every_mutant_still_has_its_place():
    problems = {mutant.name: mutants.problem_of(mutant) for mutant in mutants.MUTANTS}
    assert {name: problem for name, problem in problems.items() if problem} == {}


@pytest.mark.slow
def test_no_change_of_meaning_goes_unnoticed():
    command = [sys.executable, mutants.__file__, "--jobs", "2"]
    assert subprocess.run(command).returncode == 0
