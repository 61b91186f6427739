"""EffOPD's pure functions against what the paper and hand calculation say."""

import math

import pytest
import torch

from opd.extrapolation import (
    Score,
    SearchResult,
    Tried,
    direction_norm,
    parse_accept,
    parse_coefficients,
    parse_schedule,
    search,
    select_parameters,
    set_candidate,
)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("powers_of_two", [1, 2, 4, 8, 16]),
        ("every 5", [5, 10, 15, 20]),
        (7, [7]),
        ([3, 7, 20], [3, 7, 20]),
        (["powers_of_two", "every 6"], [1, 2, 4, 6, 8, 12, 16, 18]),
    ],
)
def test_schedule(spec, steps):
    schedule = parse_schedule(spec)
    assert [t for t in range(21) if schedule.due(t)] == steps


@pytest.mark.parametrize(
    ("spec", "found", "steps"),
    [
        ("adaptive 4", {}, [1, 3, 7, 11, 15, 19]),
        ("adaptive 4", {1: 3.0, 2: 1.0, 3: -0.5}, [1, 2, 3, 4, 6, 10, 14, 18]),
        ("adaptive 8", {7: 1.0, 11: -0.75, 13: 7.0}, [1, 3, 7, 11, 13, 14, 16, 20]),
        (["adaptive 8", 5], {}, [1, 3, 5, 13]),
    ],
)
def test_a_schedule_backs_off_while_nothing_is_found(spec, found, steps):
    schedule, searched = parse_schedule(spec), []
    for t in range(1, 21):
        if schedule.due(t):
            searched.append(t)
            schedule.searched(t, found.get(t, 0.0))
    assert searched == steps


@pytest.mark.parametrize(
    "spec",
    [
        "sometimes",
        "every",
        "every 0",
        "every 1.5",
        0,
        [],
        "powers_of_two 3",
        "adaptive",
        "adaptive 0",
    ],
)
def test_schedule_refuses_nonsense(spec):
    with pytest.raises(ValueError, match=r"EffOPD\.schedule"):
        parse_schedule(spec)


def walk(spec, accepts, *, first=False):
    """The coefficients tried when ``accepts`` holds those that improve."""
    candidates = parse_coefficients(spec)(first)
    tried = [next(candidates)]
    try:
        while True:
            tried.append(candidates.send(tried[-1] in accepts))
    except StopIteration:
        return tried


@pytest.mark.parametrize(
    ("spec", "accepts", "tried"),
    [
        ([2, 4, 6, 8, 10], {2, 4}, [2, 4, 6]),
        ([2, 4, 6, 8, 10], {2, 4, 6, 8, 10}, [2, 4, 6, 8, 10]),
        ([2, 4], set(), [2]),
        ("doubling", {2.0**n for n in range(99)}, [1, 2, 4, 8, 16, 32, 64]),
        ("doubling 4", {1, 2, 4}, [1, 2, 4]),
        ("doubling", set(), [1]),
        ("two_sided 8", {1}, [1, 2]),
        ("two_sided 8", {1, 2}, [1, 2, 4]),
        ("two_sided", {-0.5, -0.75}, [1, -0.5, -0.75, -0.875]),
        ("two_sided", {-0.5, -0.75, -0.875, -0.9375, -1}, [1, -0.5, -0.75, -0.875, -0.9375, -1]),
        ("bracket", {1, 3, 7}, [1, 3]),
        ("bracket 8", {1}, [1, 3]),
        ("bracket 8", set(), [1, -0.5]),
        ("bracket 8", {-0.5, -0.75}, [1, -0.5, -0.75, -0.875]),
        ("bracket", {-0.5, -0.75}, [1, -0.5, -0.75, -1]),
        ("bracket", {-0.5, -0.75, -1}, [1, -0.5, -0.75, -1]),
    ],
)
def test_coefficients(spec, accepts, tried):
    assert walk(spec, accepts) == tried


@pytest.mark.parametrize(
    ("accepts", "tried"),
    [
        ({2.0**n - 1 for n in range(1, 9)}, [-1, *(2.0**n - 1 for n in range(1, 10))]),
        (set(), [-1, 1, -0.5]),
        # the step has diverged: the anchor is better than W, and only an eighth than the anchor
        ({-1, -0.875}, [-1, -0.5, -0.75, -0.875, -0.9375]),
        ({-1}, [-1, *(2.0**-n - 1 for n in range(1, 21))]),
    ],
)
def test_the_first_bracket_has_no_limit_and_begins_with_the_anchor(accepts, tried):
    assert walk("bracket 4", accepts, first=True) == tried


@pytest.mark.parametrize("spec", ["tripling", "doubling 0.5", "doubling x", "bracket 1", [], [0.0]])
def test_coefficients_refuse_nonsense(spec):
    with pytest.raises(ValueError, match=r"EffOPD\.coefficients"):
        parse_coefficients(spec)


def point(value: float) -> Score:
    return Score(torch.tensor([value]), torch.ones(1))


def test_search_keeps_the_last_accepted():
    scores = {0.0: 0.5, 2.0: 0.6, 4.0: 0.6, 6.0: 0.55}
    results = {
        rule: search(
            parse_coefficients([2, 4, 6, 8])(False), lambda c: point(scores[c]), parse_accept(rule)
        )
        for rule in ("not_worse", "better")
    }
    assert results["not_worse"].coefficient == 4  # an equal score is accepted
    assert [t.coefficient for t in results["not_worse"].tried] == [2, 4, 6]
    assert results["better"].coefficient == 2
    assert results["better"].score_after == pytest.approx(0.6)
    assert results["better"].score_before == 0.5


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_weights_that_have_diverged_are_worse_than_all_others(broken):
    def found(w, candidate):
        scores = {0.0: w, 2.0: candidate}
        candidates = parse_coefficients([2])(False)
        rule = parse_accept("not_worse")
        return search(candidates, lambda c: point(scores[c]), rule).coefficient

    assert found(0.5, broken) == 0
    assert found(broken, 0.5) == 2
    assert found(broken, broken) == 0


@pytest.mark.parametrize(
    ("coefficient", "refused", "steps", "factor"),
    [
        (0.0, [], 1, 1.0),
        (0.0, [], 4, 1.0),
        (3.0, [7.0], 1, 4.0),
        (3.0, [7.0], 4, 1.75),
        (-0.75, [-0.875], 1, 0.25),
        (-0.75, [-0.875], 4, 0.25),
        (-1.0, [1.0, -0.5, -0.75], 1, 0.125),
        (-1.0, [1.0, -0.5, -0.75], 4, 0.125),
    ],
)
def test_a_learning_rate_is_to_be_as_much_longer_as_a_step(coefficient, refused, steps, factor):
    tried = [Tried(c, 0.0, False) for c in refused] + [Tried(coefficient, 0.0, True)]
    assert SearchResult(0.0, 0.0, coefficient, tried).learning_rate_factor(steps) == factor


def test_margin_is_in_standard_errors_of_the_paired_difference():
    best = Score(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.ones(4))
    better = Score(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.ones(4))
    comparison = better.compare(best, lambda tensor: tensor)
    changes = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert comparison.difference == pytest.approx(0.25)
    assert comparison.standard_error == pytest.approx((changes.std() / 2).item())
    assert parse_accept("better 0.9")(comparison)
    assert not parse_accept("better 1.1")(comparison)


@pytest.mark.parametrize(
    "spec", ["", "worse", "better -1", "better x", "better 1 2", "not_worse 1"]
)
def test_acceptance_refuses_nonsense(spec):
    with pytest.raises(ValueError, match=r"EffOPD\.accept"):
        parse_accept(spec)


def test_difference_and_standard_error_are_per_token():
    """Changes 1, 0, 0 have the variance 1/3; of 2 + 3 + 5 tokens: (3 x 1/3) ** 0.5 / 10."""
    lengths = torch.tensor([2.0, 3.0, 5.0])
    best = Score(torch.tensor([-4.0, -6.0, -5.0]), lengths)
    comparison = Score(torch.tensor([-3.0, -6.0, -5.0]), lengths).compare(best, lambda x: x)
    assert comparison.difference == pytest.approx(0.1)
    assert comparison.standard_error == pytest.approx(0.1)


def test_score_is_a_mean_over_tokens_not_over_completions():
    score = Score(torch.tensor([-2.0, -9.0]), torch.tensor([1.0, 3.0]))
    assert score.mean(lambda tensor: tensor) == pytest.approx(-11 / 4)


def random_weights(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 30, generator=generator), torch.randn(17, generator=generator)]


@pytest.mark.parametrize("coefficient", [2.0, 4.0, 10.0, 64.0, -0.5, -1.0])
def test_candidate_is_exact_whatever_came_before(coefficient):
    base = random_weights(0)
    anchor = [w + 1e-4 * n for w, n in zip(base, random_weights(1), strict=True)]
    weights = [w.clone() for w in base]
    for earlier in (6.0, -0.75):
        set_candidate(weights, base, anchor, earlier)
    set_candidate(weights, base, anchor, coefficient)
    for w, b, a in zip(weights, base, anchor, strict=True):
        exact = b.double() + coefficient * (b.double() - a.double())
        # One rounding each of the difference, the product and the sum.
        scale = b.double().abs() + abs(coefficient) * (b.double() - a.double()).abs()
        assert ((w.double() - exact).abs() <= 2 * torch.finfo(torch.float32).eps * scale).all()


def test_coefficient_0_gives_back_w_bit_for_bit():
    base, anchor = random_weights(0), random_weights(1)
    weights = [w.clone() for w in base]
    set_candidate(weights, base, anchor, 10.0)
    set_candidate(weights, base, anchor, 0.0)
    assert all(torch.equal(w, b) for w, b in zip(weights, base, strict=True))


def test_the_way_back_from_a_step_that_has_diverged_is_exact():
    """W is a million away: W + c (W - anchor) would leave nothing of the anchor's digits."""
    anchor = random_weights(0)
    base = [a + 1e6 * n for a, n in zip(anchor, random_weights(1), strict=True)]
    weights = [w.clone() for w in base]
    set_candidate(weights, base, anchor, 2.0**-20 - 1)
    for w, b, a in zip(weights, base, anchor, strict=True):
        exact = a.double() + 2.0**-20 * (b.double() - a.double())
        assert torch.allclose(w.double(), exact, rtol=1e-6, atol=1e-6)
    base[0][0] = torch.inf
    set_candidate(weights, base, anchor, -1.0)
    assert all(torch.equal(w, a) for w, a in zip(weights, anchor, strict=True))


def test_published_factors_give_the_papers_points():
    """2, 2/3, 2/5, 2/7, 2/9 applied in place to (W - anchor) are W + 2k (W - anchor)."""
    base = [w.double() for w in random_weights(0)]
    anchor = [w.double() for w in random_weights(1)]
    in_place = [w.clone() for w in base]
    for k in range(1, 6):
        in_place = [w + 2 / (2 * k - 1) * (w - a) for w, a in zip(in_place, anchor, strict=True)]
        ours = [w.clone() for w in base]
        set_candidate(ours, base, anchor, 2.0 * k)
        for left, right in zip(ours, in_place, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_direction_norm_is_over_all_tensors():
    assert direction_norm([torch.tensor([3.0])], [torch.tensor([0.0])]) == 3.0
    assert direction_norm([torch.ones(9), torch.ones(16)], [torch.zeros(9), torch.zeros(16)]) == 5.0


NAMES = [
    "student.model.embed_tokens.weight",
    "student.model.layers.0.self_attn.q_proj.weight",
    "student.model.layers.0.self_attn.q_norm.weight",
    "student.model.layers.0.mlp.up_proj.weight",
    "student.model.layers.0.input_layernorm.weight",
    "student.model.layers.0.post_attention_layernorm.weight",
    "student.model.norm.weight",
    "student.lm_head.weight",
]


def test_parameters_of_the_published_code():
    """Moved: q_norm and post_attention_layernorm. Not: embeddings, head, other norms."""
    assert select_parameters(NAMES, "attention_and_mlp") == [NAMES[i] for i in (1, 2, 3, 5)]


def test_parameters_by_pattern():
    assert select_parameters(NAMES, "all") == NAMES
    assert select_parameters(NAMES, ["*.mlp.*", "*lm_head*"]) == [NAMES[3], NAMES[7]]
    with pytest.raises(ValueError, match="matches no parameter"):
        select_parameters(NAMES, "*.experts.*")
