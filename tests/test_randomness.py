"""Numbers of a counter-based generator: the definition, uniformity, independence."""

import math

import pytest
import torch

from opd.randomness import derive_seed, uniform


def splitmix64(seed: int, position: int) -> float:
    """Steele, Lea and Flood (OOPSLA 2014) on Python's integers."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return ((z ^ (z >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("position", [0, 1, 16_383])
def test_uniform_is_splitmix64(position):
    seeds = [0, 1, 2**62 + 12345, derive_seed("any")]
    expected = [splitmix64(seed, position) for seed in seeds]
    assert uniform(torch.tensor(seeds), torch.tensor(position)).tolist() == expected


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_numbers_are_uniform_and_neighbours_independent(along):
    """Chi-squared over 64 cells, of numbers and of pairs of neighbours; 6 standard deviations."""
    count = 20_000
    if along == "seeds":
        numbers = uniform(
            torch.tensor([derive_seed("run", i) for i in range(count)]), torch.tensor(5)
        )
    else:
        one = torch.tensor([derive_seed("run")])
        numbers = uniform(one, torch.arange(count))
    cells = [(numbers * 64).long(), (numbers[:-1] * 8).long() * 8 + (numbers[1:] * 8).long()]
    for cell in cells:
        found = torch.bincount(cell, minlength=64).double()
        chi_squared = float(((found - len(cell) / 64).square() / (len(cell) / 64)).sum())
        assert abs(chi_squared - 63) < 6 * math.sqrt(2 * 63)
