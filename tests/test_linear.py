"""Lines through trajectories, against the decompositions that they stand for."""

import numpy as np
import pytest
import torch

from opd import linear
from opd.errors import UserError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_how_far_weights_have_moved_and_how_far_along_the_direction():
    """From (3, 4 | 0) by (3, 4 | 5), with the anchor at the origin: c = 1, 5 and sqrt(50) long."""
    weights = [torch.tensor([3.0, 4.0]), torch.zeros(1)]
    anchor = [torch.zeros(2), torch.zeros(1)]
    move = linear.move_to(weights, anchor, (w * 2 if len(w) == 2 else w + 5 for w in weights))
    assert [w.tolist() for w in weights] == [[6, 8], [5]]
    assert (move.coefficient, move.direction_norm) == (1, 5)
    assert move.norm == pytest.approx(50**0.5)
    still = linear.move_to(weights, weights, [w + 1 for w in weights])
    assert (still.coefficient, still.direction_norm) == (0, 0)


def test_a_move_of_shards_is_that_of_all():
    """Two ranks with a number each: this one has moved by 1 along 1, the other by 2 along 3."""
    other = torch.tensor([6.0, 9.0, 4.0], dtype=torch.float64)
    move = linear.move_to(
        [torch.ones(1)], [torch.zeros(1)], [torch.full((1,), 2.0)], lambda sums: sums + other
    )
    assert move.coefficient == pytest.approx(7 / 10)
    assert (move.direction_norm, move.norm) == (10**0.5, 5**0.5)


def test_a_move_that_runs_out_of_memory_is_half_done():
    def targets():
        yield torch.ones(1)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match=r"out of memory in a move of the weights, .* half done"):
        linear.move_to([torch.zeros(1)] * 2, [torch.zeros(1)] * 2, targets())


def test_inner_products_are_taken_a_part_at_a_time(monkeypatch):
    rows = random(3, 50)
    monkeypatch.setattr(linear, "AT_A_TIME", 7)
    found = linear.gram([row.view(5, 10) for row in rows])
    torch.testing.assert_close(found, rows @ rows.T)


def test_a_trajectory_is_followed_along_its_first_direction():
    """numpy's SVD of the displacements, and its line through their coefficients."""
    steps, target = [2, 3, 7, 8], 20
    noise = random(2, 4, 30)
    trajectories = torch.tensor(steps).view(4, 1) * random(2, 1, 30, seed=1) + noise
    grams = torch.stack([linear.gram(list(rows)) for rows in trajectories])
    beta, share = linear.rank_one_line(grams, steps, target)
    squares, kept = 0.0, 0.0
    for rows, factors in zip(trajectories, beta, strict=True):
        _, s, vt = np.linalg.svd(rows.numpy(), full_matrices=False)
        slope, intercept = np.polyfit(steps, rows.numpy() @ vt[0], 1)
        expected = 1 + torch.from_numpy((slope * target + intercept) * vt[0])
        anchor = torch.ones(30, dtype=torch.float64)
        torch.testing.assert_close(linear.combine(anchor, list(rows), factors.tolist()), expected)
        assert torch.equal(anchor, torch.ones_like(anchor))
        squares, kept = squares + (s**2).sum(), kept + s[0] ** 2
    assert share == pytest.approx(kept / squares)


def test_what_has_not_moved_stays():
    beta, share = linear.rank_one_line(torch.zeros(1, 3, 3, dtype=torch.float64), [1, 2, 3], 9)
    anchor = random(4)
    found = linear.combine(anchor, [torch.zeros(4)] * 3, beta[0].tolist())
    assert torch.equal(found, anchor)
    assert share == 0


def test_the_first_component_is_as_long_as_the_matrix():
    matrix = random(20, 30).float()
    u, s, vt = np.linalg.svd(matrix.double().numpy())
    x, v = linear.first_component(matrix, None)
    expected = np.sqrt((s**2).sum()) * np.outer(u[:, 0], vt[0])
    torch.testing.assert_close(
        torch.outer(x, v).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5
    )
    assert x.norm() == pytest.approx(float(matrix.norm()))
    for sign in (1, -1):
        again, w = linear.first_component(matrix, sign * x)
        torch.testing.assert_close(again, sign * x)
        torch.testing.assert_close(w, sign * v)


def test_where_a_score_is_by_hand():
    """Points on a line, scores along it: 0.2 at (1, 2), 0.6 at (3, 2), so 1.0 at (5, 2)."""
    points = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    found = linear.where_score_is(points, torch.tensor([0.2, 0.6]), 1.0)
    torch.testing.assert_close(found, torch.tensor([5.0, 2.0], dtype=torch.float64))


def test_where_a_score_is_of_points_that_scatter():
    """Centred X = [[-1, 0], [0, 1], [1, -1]], y = [-1, 0, 1], means (1, 1) and 0.

    X^T y = (2, -1); t = (-2, -1, 3), t.t = 14; p = (5, -4) / 14; q = 5 / 14. So y = 1 is at t =
    14 / 5, and there x = (1, 1) + (5, -4) / 5.
    """
    points = torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 0.0]])
    found = linear.where_score_is(points, torch.tensor([-1.0, 0.0, 1.0]), 1.0)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.2], dtype=torch.float64))


def test_scores_that_do_not_differ_say_nothing():
    points = random(3, 2)
    assert linear.where_score_is(points, torch.full((3,), 0.5), 1.0) is None
    assert linear.where_score_is(points[:1], torch.tensor([0.5]), 1.0) is None
    scores = torch.tensor([0.5, float("nan"), 0.6])
    assert linear.where_score_is(points, scores, 1.0) is None
