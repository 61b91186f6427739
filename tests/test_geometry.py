"""The geometry of updates: against closed forms, SciPy and invariants."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from opd import geometry
from opd.geometry import Spectrum
from opd.geometry_rows import parameter_of

SHAPES = [(40, 25), (25, 40), (30, 30), (7, 1), (600, 530)]  # the last is beyond EXACT


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values, m, n, seed=0):
    """A matrix whose singular values, and directions, are known."""
    u, _ = torch.linalg.qr(random_matrix(m, len(values), seed=seed))
    v, _ = torch.linalg.qr(random_matrix(n, len(values), seed=seed + 1))
    s = torch.tensor(values, dtype=torch.float64)
    return (u * s) @ v.T, u, s, v


# --- spectra --------------------------------------------------------------------------------------


def test_a_spectrum_of_known_values():
    """s = 4, 3 and 198 zeros, two of which are in the upper hundredth of 200."""
    spectrum = Spectrum.of(torch.tensor([4.0, 3.0] + [0.0] * 198))
    assert spectrum.norm == 5.0
    assert spectrum.spectral_norm == 4.0
    assert spectrum.spectral_ratio == 0.8
    p = [4 / 7, 3 / 7]
    assert spectrum.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert spectrum.top_ratio == 1.0
    assert Spectrum.of(torch.tensor([4.0, 3.0] + [0.0] * 98)).top_ratio == pytest.approx(0.8)
    assert Spectrum.of(torch.tensor([4.0, 3.0] + [0.0] * 99)).top_ratio == 1.0  # ceil(1.01) = 2


@pytest.mark.parametrize("r", [1, 2, 64])
def test_equal_values_have_full_rank_and_one_value_has_rank_one(r):
    equal = Spectrum.of(torch.full((r,), 3.0))
    assert equal.effective_rank == pytest.approx(r)
    assert equal.spectral_ratio == pytest.approx(1 / math.sqrt(r))
    alone = Spectrum.of(torch.tensor([3.0] + [0.0] * (r - 1)))
    assert alone.effective_rank == pytest.approx(1)
    assert alone.spectral_ratio == 1.0


def test_an_update_of_nothing_has_no_ratio():
    spectrum = Spectrum.of(torch.zeros(4))
    assert (spectrum.norm, spectrum.spectral_norm) == (0.0, 0.0)
    assert math.isnan(spectrum.spectral_ratio)
    assert math.isnan(spectrum.effective_rank)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_scipy(shape):
    matrix = random_matrix(*shape)
    wanted = scipy.linalg.svdvals(matrix.numpy())
    found = geometry.singular_values(matrix.float()).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6 * wanted[0])


def test_a_large_matrix_of_low_rank_has_no_further_values():
    matrix, _, s, _ = with_values([5.0, 2.0, 0.5], 700, 600)
    found = geometry.singular_values(matrix)
    assert torch.allclose(found[:3], s)
    assert found[3:].max() <= geometry.GRAM_ERROR * 5


@pytest.mark.parametrize("size", [4, 600])
def test_of_a_matrix_that_is_not_finite_no_singular_value_is_known(size):
    matrix = torch.ones(size, size)
    matrix[1, 2] = math.inf
    found = geometry.singular_values(matrix)
    assert found.shape == (size,)
    assert found.isnan().all()


# --- decompositions -------------------------------------------------------------------------------


LARGE = [(900, 600), (600, 900)]


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), *LARGE])
def test_known_directions_are_found(shape):
    matrix, u, s, v = with_values([9.0, 5.0, 3.0, 1.0], *shape)
    matrix += 1e-3 * random_matrix(*shape, seed=5) / math.sqrt(max(shape))
    found = geometry.decompose(matrix, 3)
    assert found.u.shape == (shape[0], 3)
    assert found.v.shape == (shape[1], 3)
    assert torch.allclose(found.s, s[:3], rtol=1e-3)
    assert geometry.cosines(found.u, u[:, :3]).min() > 0.999
    assert geometry.cosines(found.v, v[:, :3]).min() > 0.999


@pytest.mark.parametrize("k", [20, 37, 38, 200, None])  # few of 600, and many
@pytest.mark.parametrize("shape", LARGE)
def test_directions_of_a_flat_spectrum_are_those_of_scipy(shape, k):
    """Their values are a hundredth apart and less; a randomised decomposition cannot tell them."""
    matrix = random_matrix(*shape)
    found = geometry.decompose(matrix, k)
    u, s, vh = (torch.tensor(part) for part in scipy.linalg.svd(matrix.numpy(), False))
    assert found.s.shape == s[:k].shape
    torch.testing.assert_close(found.s, s[:k], rtol=1e-9, atol=0)
    assert geometry.cosines(found.u, u[:, :k]).min() > 1 - 1e-9
    assert geometry.cosines(found.v, vh[:k].T).min() > 1 - 1e-9
    torch.testing.assert_close(matrix @ found.v, found.u * found.s)  # so signs go together


@pytest.mark.parametrize("shape", [(40, 25), *LARGE])
def test_values_and_directions_at_once_are_those_of_each_alone(shape):
    matrix = random_matrix(*shape)
    values, found = geometry.decompose_with_values(matrix, 7)
    torch.testing.assert_close(values, geometry.singular_values(matrix))
    alone = geometry.decompose(matrix, 7)
    for name in ("u", "s", "v"):
        assert torch.equal(getattr(found, name), getattr(alone, name))


@pytest.mark.parametrize("shape", LARGE)
def test_of_a_matrix_of_zeros_or_of_low_rank_there_is_nothing_more(shape):
    nothing = geometry.decompose(torch.zeros(shape), 3)
    assert nothing.s.tolist() == [0, 0, 0]
    assert nothing.part(0).count_nonzero() == 0
    matrix, *_ = with_values([5.0, 2.0], *shape)
    for k in (20, 300):
        found = geometry.decompose(matrix, k)
        assert found.u.isfinite().all()
        assert found.v.isfinite().all()
        torch.testing.assert_close(found.part(0), matrix)


def test_a_decomposition_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    first = geometry.decompose(random_matrix(600, 600), 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(geometry.decompose(random_matrix(600, 600), 5).u, first.u)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_the_top_and_the_rest_give_the_update_back_and_share_its_norm(shape):
    matrix = random_matrix(*shape)
    parts = geometry.decompose(matrix)
    for k in (0, 1, 7, 25):
        top, rest = parts.part(0, k), parts.part(k)
        assert torch.allclose(top + rest, matrix)
        norm = top.norm().square() + rest.norm().square()
        assert norm == pytest.approx(matrix.norm().square())
        assert torch.linalg.matrix_rank(top) == k
    assert torch.equal(geometry.decompose(matrix, 3).u, parts.u[:, :3])


# --- angles, norms --------------------------------------------------------------------------------


def test_known_angles():
    e = torch.eye(3)
    turned = torch.stack([e[0], (e[1] + e[2]) / math.sqrt(2), -e[2]], dim=1)
    assert geometry.cosines(e, turned).tolist() == pytest.approx([1.0, math.sqrt(0.5), 1.0])


def test_the_cosine_of_updates_of_several_tensors():
    one = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0]])]
    other = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert geometry.cosine(one, other) == pytest.approx(0.6)
    assert geometry.cosine(one, [-t for t in one]) == pytest.approx(-1.0)
    assert math.isnan(geometry.cosine(one, [torch.zeros(2), torch.zeros(1, 1)]))


def test_the_cosine_of_shards_is_that_of_the_whole_where_sums_are_added_up():
    """[3, 0] with [3, 4], an element on each of two ranks; this is the first."""
    other_rank = torch.tensor([0.0, 0.0, 16.0], dtype=torch.float64)
    mine = [torch.tensor([3.0])], [torch.tensor([3.0])]
    assert geometry.cosine(*mine) == 1.0
    assert geometry.cosine(*mine, lambda own: own + other_rank) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("r", "percent", "wanted"), [(200, 10, 20), (25, 10, 2), (4, 1, 1), (4, 100, 4), (7, 50, 4)]
)
def test_shares_of_a_rank(r, percent, wanted):
    assert geometry.share(r, percent) == wanted


def test_norms_are_matched():
    update = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(geometry.rescaled(update, 10.0), 2 * update)
    assert torch.equal(geometry.rescaled(torch.zeros(2), 10.0), torch.zeros(2))
    # |dW_e| = 5, |dW_f| = 15: b = 0.5 goes half of the way, to 10
    for strength, factor in [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0), (1.2, 3.4)]:
        found = geometry.norm_matched(update, 15.0, strength)
        assert torch.allclose(found, factor * update)


def test_directions_follow_each_other():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-0.8, 0.6])
    found = geometry.aligned([a, b, -b, -a])
    assert [d.tolist() for d in found] == [a.tolist(), (-b).tolist(), (-b).tolist(), a.tolist()]
    turning = [a, torch.tensor([0.6, 0.8]), torch.tensor([-0.6, 0.8])]  # by less than 90 degrees
    assert all(map(torch.equal, geometry.aligned(turning), turning))


def test_points_in_a_plane_and_a_little_out_of_it():
    plane = torch.tensor(
        [[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 0.5], [0, 0, -0.5]]
    )
    points, explained = geometry.principal_components(plane + 7)
    assert explained == pytest.approx((8 + 2) / (8 + 2 + 0.5))
    assert points.abs()[:, 0].tolist() == pytest.approx([2, 2, 0, 0, 0, 0], abs=1e-6)
    assert geometry.principal_components(torch.ones(3, 4))[1] == 1.0
    assert geometry.principal_components(torch.ones(1, 4))[0].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(200, 200), (400, 30)])
def test_the_estimate_of_rounding_is_above_it_and_not_far(dtype, shape):
    weight = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    made = torch.linalg.matrix_norm(weight.to(dtype).double() - weight, 2)
    assert made < geometry.rounding(weight, dtype) < 4 * made


@pytest.mark.parametrize(
    ("name", "shape", "names"),
    [
        ("h.0.mlp.up_proj.weight", (4, 3), ["h.0.mlp.up_proj.weight"]),
        ("h.0.mlp.experts.up_proj", (2, 4, 3), [f"h.0.mlp.experts.up_proj[{e}]" for e in (0, 1)]),
    ],
)
def test_a_parameter_is_a_matrix_or_has_one_for_each_expert(name, shape, names):
    assert geometry.has_matrices(name, shape)
    tensor = torch.randn(shape)
    found = dict(geometry.matrices_of(name, tensor))
    assert list(found) == geometry.names_of(name, shape) == names
    assert torch.equal(torch.stack(list(found.values())).view(shape), tensor)
    assert {parameter_of(matrix) for matrix in found} == {name}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h.0.norm.weight", (4,)),
        ("h.0.mlp.up_proj.bias", (4, 1)),
        ("h.0.mlp.experts.up_proj_bias", (2, 4)),
        ("h.0.mlp.gate.weight", (2, 4)),
        ("h.0.mlp.router.weight", (2, 4)),
        ("conv", (2, 4, 3, 3)),
    ],
)
def test_biases_and_what_chooses_experts_are_no_matrices(name, shape):
    assert not geometry.has_matrices(name, shape)
