"""Values worked out by hand, definitions counted out, and intervals that hold in simulations."""

import itertools
import math
import random

import pytest
from scipy import stats

from eval.statistics import (
    Estimate,
    macro,
    majority,
    mean_with_error,
    paired_difference,
    pass_at_k,
    sample_metrics,
)
from opd.errors import UserError

PROBLEMS, SAMPLES = 30, 32  # an AIME's
REPETITIONS = 500
NOISE = 3 * math.sqrt(0.95 * 0.05 / REPETITIONS)  # of a coverage of 95% in so many simulations


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_completions_is_exact():
    assert pass_at_k(1000, 1, 500) == 0.5
    assert pass_at_k(1000, 1, 1) == 0.001
    assert pass_at_k(1000, 999, 2) == 1
    assert pass_at_k(1000, 0, 1000) == 0
    assert pass_at_k(900, 450, 300) == 1  # within 1e-100
    assert pass_at_k(4, 1, 2) == 0.5


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_of_nothing_is_an_error(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("groups", "right", "expected"),
    [
        ([0, 1, 1], [0, 1, 1], (True, False)),
        ([0, 1, 1, 0, 0], [0, 1, 1, 0, 0], (False, False)),
        ([3, 1, 1, 3], [1, 0, 0, 1], (True, True)),  # the group that is seen first
        ([1, 3, 3, 1], [0, 1, 1, 0], (False, True)),
        ([None, None, None, 5], [0, 0, 0, 1], (True, False)),  # no vote without an answer
        ([None, None], [0, 0], (False, False)),
        ([0, 1, 2], [0, 1, 0], (False, True)),
        ([7], [1], (True, False)),
    ],
)
def test_majority(groups, right, expected):
    assert majority(groups, list(map(bool, right))) == expected


def test_metrics_of_a_problem_by_hand():
    metrics = sample_metrics(
        right=[True, False, False, True, False, False],
        groups=[0, 1, 1, 0, None, 2],
        lengths=[10, 20, 30, 40, 60, 20],
        truncated=[False, False, False, False, True, False],
        answered=[True, True, True, True, False, True],
    )
    assert metrics == {
        "avg@6": pytest.approx(1 / 3),
        "pass@2": pytest.approx(1 - 6 / 15),
        "pass@4": pytest.approx(1 - 1 / 15),
        "pass@6": 1,
        "maj@6": 1,
        "maj_ties": 1,
        "length": 30,
        "truncated": pytest.approx(1 / 6),
        "no_answer": pytest.approx(1 / 6),
    }


@pytest.mark.parametrize(
    ("n", "names"),
    [
        (1, ["avg@1", "no_answer"]),
        (2, ["avg@2", "pass@2", "maj@2", "maj_ties", "no_answer"]),
        (3, ["avg@3", "pass@2", "pass@3", "maj@3", "maj_ties", "no_answer"]),
        (8, ["avg@8", "pass@2", "pass@4", "pass@8", "maj@8", "maj_ties", "no_answer"]),
    ],
)
def test_names_of_metrics(n, names):
    assert list(sample_metrics([True] * n, [0] * n, None, None, [True] * n)) == names


def test_programs_have_no_majority():
    metrics = sample_metrics([True, False], None, [5, 7], [False, False], [True, False])
    assert list(metrics) == ["avg@2", "pass@2", "length", "truncated", "no_answer"]


def test_sequences_of_unequal_lengths_are_an_error():
    with pytest.raises(ValueError, match="1 groups for 2 completions"):
        sample_metrics([True, True], [0], None, None, [True, True])
    with pytest.raises(ValueError, match="3 answered for 2 completions"):
        sample_metrics([True, True], None, None, None, [True] * 3)
    with pytest.raises(ValueError, match="2 groups for 1"):
        majority([0, 0], [True])
    with pytest.raises(ValueError, match="without completions"):
        sample_metrics([], [], [], [], [])


def test_student_interval_by_hand():
    values = [4.0, 8.0, 6.0, 2.0, 5.0]  # variance 5, t with 4 degrees 2.7764
    estimate = mean_with_error(values, share=False)
    assert (estimate.mean, estimate.stderr, estimate.n) == (5, 1, 5)
    assert estimate.low == pytest.approx(5 - 2.776445, abs=1e-6)
    assert estimate.high == pytest.approx(5 + 2.776445, abs=1e-6)


def test_a_share_in_the_middle_has_about_students_interval():
    values = [0.25, 0.5, 0.75, 0.375, 0.625] * 6
    share, plain = mean_with_error(values), mean_with_error(values, share=False)
    assert plain.low - 0.005 < share.low <= plain.low
    assert plain.high <= share.high < plain.high + 0.005


def test_a_share_near_zero_reaches_as_far_as_clopper_and_pearson():
    values = [1.0] * 8 + [0.0] * 92  # one completion per problem
    estimate, plain = mean_with_error(values), mean_with_error(values, share=False)
    effective = 99 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 99)) ** 2
    right = 0.08 * effective
    assert estimate.high == pytest.approx(stats.beta.ppf(0.975, right + 1, effective - right))
    assert estimate.high > plain.high + 0.01
    assert estimate.low == plain.low


def test_the_error_is_that_of_a_bootstrap_over_problems():
    draw = random.Random(0)
    values = [draw.betavariate(0.5, 1) for _ in range(PROBLEMS)]
    means = [math.fsum(draw.choices(values, k=PROBLEMS)) / PROBLEMS for _ in range(4000)]
    centre = math.fsum(means) / len(means)
    bootstrap = math.sqrt(math.fsum((mean - centre) ** 2 for mean in means) / len(means))
    expected = bootstrap * math.sqrt(PROBLEMS / (PROBLEMS - 1))
    assert mean_with_error(values).stderr == pytest.approx(expected, rel=0.04)


def test_one_problem_has_no_error():
    assert mean_with_error([0.5]) == Estimate(0.5, None, None, None, 1)


def test_none_of_thirty_is_not_certainly_zero():
    exact = 1 - 0.025 ** (1 / 30)  # Clopper and Pearson's
    none, all_of_them = mean_with_error([0.0] * 30), mean_with_error([1.0] * 30)
    assert (none.mean, none.stderr, none.low, none.high) == (0, 0, 0, pytest.approx(exact))
    assert (all_of_them.low, all_of_them.high) == (pytest.approx(1 - exact), 1)
    third = mean_with_error([1 / 3] * 30)
    assert third.stderr == 0
    assert third.low == pytest.approx((1 - exact) / 3)
    assert third.high == pytest.approx(1 / 3 + exact * 2 / 3)


def test_one_solved_once_is_hardly_surer_than_none():
    once = mean_with_error([1 / 32] + [0.0] * 29)
    assert once.low == 0
    assert once.high > mean_with_error([0.0] * 30).high


def test_other_values_that_are_all_equal_have_a_point():
    assert mean_with_error([7.0] * 5, share=False) == Estimate(7, 0, 7, 7, 5)


@pytest.mark.parametrize("values", [[], [float("nan"), 1], [0.5, 1.5], [-0.1, 0.5]])
def test_values_that_make_no_sense_are_an_error(values):
    with pytest.raises(ValueError, match=r"no values|finite|between 0 and 1"):
        mean_with_error(values)


def simulate(draw, difficulty):
    """Return avg@32 of each problem of a benchmark whose problems have such success rates."""
    rates = [draw.betavariate(*difficulty) for _ in range(PROBLEMS)]
    return [sum(draw.random() < rate for _ in range(SAMPLES)) / SAMPLES for rate in rates]


@pytest.mark.parametrize(
    "difficulty",
    [
        (2, 2),
        (0.5, 0.5),
        (0.2, 0.2),  # solved always or never
        (0.3, 2),  # 13%
        (20, 1),
        (0.3, 9.7),  # 3%, evenly
        (0.1, 3.2),
        (0.02, 0.65),  # 3%, of one or two problems
        (0.65, 0.02),
        (0.05, 50),  # 0.1%
    ],
)
def test_the_interval_of_an_aime_covers_the_truth(difficulty):
    draw, truth = random.Random(1), difficulty[0] / sum(difficulty)
    estimates = [mean_with_error(simulate(draw, difficulty)) for _ in range(REPETITIONS)]
    assert all(0 <= one.low <= one.mean <= one.high <= 1 for one in estimates)
    covered = sum(one.low <= truth <= one.high for one in estimates) / REPETITIONS
    assert covered >= 0.95 - NOISE


def test_a_difference_is_taken_problem_by_problem():
    a = {"p": 0.5, "q": 1.0, "r": 0.25, "only a": 0.0}
    b = {"q": 0.5, "p": 0.25, "r": 0.25, "only b": 1.0}
    difference = paired_difference(a, b)
    assert (difference.mean, difference.n) == (0.25, 3)
    assert difference.stderr == pytest.approx(0.25 / math.sqrt(3))
    assert difference.high > 0.25 + 4.3 * 0.25 / math.sqrt(3) - 1e-2
    back = paired_difference(b, a)
    assert (back.mean, back.low, back.high) == (-0.25, -difference.high, -difference.low)


def test_pairing_takes_out_what_problems_have_in_common():
    draw = random.Random(2)
    a = {i: draw.random() for i in range(PROBLEMS)}
    b = {i: 0.9 * a[i] for i in a}
    assert paired_difference(a, b).low > 0
    assert mean_with_error(list(a.values())).low < mean_with_error(list(b.values())).mean


def test_results_that_never_differ_may_differ_elsewhere():
    equal = paired_difference(dict.fromkeys(range(30), 0.5), dict.fromkeys(range(30), 0.5))
    assert (equal.mean, equal.stderr) == (0, 0)
    assert (equal.low, equal.high) == (pytest.approx(-0.1157, abs=1e-4), -equal.low)
    plain = paired_difference({1: 5.0, 2: 9.0}, {1: 4.0, 2: 8.0}, share=False)
    assert plain == Estimate(1, 0, 1, 1, 2)


def test_differences_without_a_problem_in_common_are_an_error():
    with pytest.raises(UserError, match="in common"):
        paired_difference({1: 0.5}, {2: 0.5})
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_difference({1: 5.0}, {1: 0.5})


def test_the_interval_of_a_difference_covers_the_truth():
    draw = random.Random(3)

    def share(rate):
        return sum(draw.random() < rate for _ in range(SAMPLES)) / SAMPLES

    def difference():
        rates = {i: draw.betavariate(1, 1) for i in range(PROBLEMS)}
        a = {i: share(rate) for i, rate in rates.items()}
        return paired_difference(a, {i: share(rate**2) for i, rate in rates.items()})

    truth = 1 / 2 - 1 / 3
    estimates = [difference() for _ in range(REPETITIONS)]
    covered = sum(one.low <= truth <= one.high for one in estimates) / REPETITIONS
    assert abs(covered - 0.95) <= NOISE


def test_macro_by_hand():
    combined = macro([Estimate(0.2, 0.03, 0.1, 0.5, 30), Estimate(0.4, 0.04, 0.25, 0.8, 500)])
    assert combined.mean == pytest.approx(0.3)
    assert combined.stderr == pytest.approx(0.025)
    assert combined.low == pytest.approx(0.3 - math.hypot(0.1, 0.15) / 2)
    assert combined.high == pytest.approx(0.3 + 0.25)
    assert combined.n == 530


def test_macro_of_one_task_is_the_task():
    one = mean_with_error([0.25, 0.5, 1.0])
    alone = macro([one])
    assert alone.mean == one.mean
    assert (alone.low, alone.high) == (pytest.approx(one.low), pytest.approx(one.high))


def test_macro_has_no_error_if_a_task_has_none():
    assert macro([mean_with_error([1.0]), mean_with_error([0.0] * 3)]).stderr is None
    with pytest.raises(ValueError, match="no tasks"):
        macro([])


def test_the_interval_of_a_macro_mean_covers_the_truth():
    draw, tasks = random.Random(4), [(2, 2), (0.5, 1), (0.3, 2)]
    truth = sum(a / (a + b) for a, b in tasks) / len(tasks)
    estimates = [
        macro([mean_with_error(simulate(draw, task)) for task in tasks]) for _ in range(REPETITIONS)
    ]
    covered = sum(one.low <= truth <= one.high for one in estimates) / REPETITIONS
    assert covered >= 0.95 - NOISE
