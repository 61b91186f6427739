"""The ledger: tokens summed over ranks, seconds averaged, each counted once."""

import time

import pytest

from opd.ledger import SECONDS, TOKENS, Ledger, peak_memory_bytes


def test_tokens_are_summed_and_seconds_averaged_over_ranks():
    """Three ranks that spend alike."""
    ledger = Ledger()
    ledger.count("rollout_tokens", 5)
    ledger.count("rollout_tokens", 7)
    ledger.count("search_generated_tokens", 2)
    start = time.perf_counter()
    with ledger.phase("search"):
        time.sleep(0.02)
    most = time.perf_counter() - start
    ledger.synchronize(lambda values: 3 * values, world_size=3)
    totals = dict(ledger.totals)
    assert 0.02 <= totals.pop("search_seconds") <= most
    spent = {name: value for name, value in totals.items() if value}
    assert spent == {"rollout_tokens": 36, "search_generated_tokens": 6}


def test_what_is_synchronized_is_not_counted_again():
    ledger = Ledger()
    for tokens in (5, 7):
        ledger.count("train_tokens", tokens)
        ledger.synchronize(lambda values: values, world_size=1)
    ledger.synchronize(lambda values: values, world_size=1)
    assert ledger.totals["train_tokens"] == 12


def test_a_phase_that_fails_is_charged_too():
    ledger = Ledger()
    with pytest.raises(ValueError, match="sleep length"), ledger.phase("teacher"):
        time.sleep(0.01) or time.sleep(-1)
    with ledger.phase("teacher"):
        time.sleep(0.01)
    ledger.synchronize(lambda values: values, world_size=1)
    assert 0.02 <= ledger.totals["teacher_seconds"] < 5


def test_metrics_are_the_totals_and_the_peak_of_memory():
    ledger = Ledger()
    ledger.totals["search_tokens"] = 11.0
    names = {f"cost/{name}" for name in (*TOKENS, *(f"{phase}_seconds" for phase in SECONDS))}
    metrics = ledger.metrics()
    assert metrics.keys() == names | {"cost/peak_memory_bytes"}
    assert metrics["cost/search_tokens"] == 11.0
    assert 5e7 < metrics["cost/peak_memory_bytes"] <= peak_memory_bytes() < 1e11
