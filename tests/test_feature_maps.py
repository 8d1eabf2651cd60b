"""Feature maps and normalisations are those of the paper, and stay finite."""

import math

import pytest
import torch

from fwp_fairseq.ops import (
    dpfp,
    draw_favor_projection,
    elu_plus_one,
    favor_plus,
    favor_plus_normalized,
    l2_normalize,
    sum_normalize,
)
from fwp_fairseq.ops.feature_maps import draw_learned, learned_exp, learned_exp_normalized


def test_elu_plus_one_is_equation_30():
    x = torch.tensor([-50.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    expected = torch.tensor([math.exp(-50), math.exp(-1), 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(elu_plus_one(x), expected, rtol=1e-15, atol=0)
    assert torch.autograd.gradcheck(elu_plus_one, torch.randn(20, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("d_key, nu", [(1, 1), (2, 1), (2, 3), (4, 2), (4, 7)])
def test_dpfp_is_equation_37_element_by_element(d_key, nu):
    x = torch.randn(d_key, dtype=torch.float64).tolist()
    u = [max(a, 0.0) for a in x + [-a for a in x]]
    # phi_{(j-1) 2d + i} = u_i * u_{i-j}, indices modulo 2d.
    expected = [u[i] * u[(i - j) % (2 * d_key)] for j in range(1, nu + 1) for i in range(2 * d_key)]
    actual = dpfp(torch.tensor(x, dtype=torch.float64), nu)
    assert actual.tolist() == expected and actual.shape == (2 * d_key * nu,)


@pytest.mark.parametrize("nu", [0, -1, 8])
def test_dpfp_refuses_nu_out_of_range(nu):
    with pytest.raises(ValueError, match=f"nu is {nu}, allowed is 1 to .* 7"):
        dpfp(torch.rand(3, 4), nu)


def test_dpfp_features_of_different_quadrants_are_orthogonal():
    """The point of DPFP in the paper's figure 1: sparse features that do not overlap between quadrants."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    overlaps = dpfp(corners, 3) @ dpfp(corners, 3).T
    assert torch.equal(overlaps, overlaps.diag().diag()) and (overlaps.diag() > 0).all()


@pytest.mark.parametrize("d_key, m", [(8, 3), (8, 8), (8, 20), (1, 4)])
def test_favor_projection_is_orthogonal_within_blocks(d_key, m):
    projection = draw_favor_projection(d_key, m, dtype=torch.float64)
    assert projection.shape == (m, d_key)
    for start in range(0, m, d_key):
        gram = projection[start : start + d_key] @ projection[start : start + d_key].T
        torch.testing.assert_close(gram, gram.diag().diag(), atol=1e-12, rtol=0)


def test_favor_projection_rows_are_standard_normal():
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([draw_favor_projection(4, 8, generator=generator) for _ in range(2000)])
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(rows.T.cov(), torch.eye(4), atol=0.04, rtol=0)
    # Kurtosis of a Gaussian: rows of a scaled rotation alone would have less.
    torch.testing.assert_close(rows.pow(4).mean(dim=0), torch.full((4,), 3.0), atol=0.25, rtol=0)


def test_favor_projection_refuses_sizes_below_one():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            draw_favor_projection(*sizes)


def test_favor_plus_estimates_the_softmax_kernel():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator) * 0.25
    projection = draw_favor_projection(8, 100_000, dtype=torch.float64, generator=generator)
    estimate = favor_plus(x, projection) @ favor_plus(y, projection).T
    torch.testing.assert_close(estimate, (x @ y.T).exp(), rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0])
def test_favor_plus_is_equations_31_and_32_whatever_the_size_of_a_key(dtype, tolerance, scale):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 20, 8, dtype=torch.float64, generator=generator) * scale
    projection = draw_favor_projection(8, 16, dtype=torch.float64, generator=generator)
    exponent = torch.cat([x @ projection.T, -x @ projection.T], dim=-1) - x.square().sum(dim=-1, keepdim=True) / 2
    expected = exponent.exp() / math.sqrt(32)
    actual = favor_plus(x.to(dtype), projection.to(dtype))
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_gradients_of_favor_plus_pass_gradcheck(scale):
    x = (torch.randn(2, 3, 4, dtype=torch.float64) * scale).requires_grad_()
    projection = draw_favor_projection(4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(favor_plus, (x, projection))


def test_a_feature_that_is_cut_off_has_no_gradient():
    x = torch.tensor([[1.0], [1e-3]], requires_grad=True)
    features = favor_plus(x, torch.tensor([[100.0]]))
    features.sum().backward()
    assert features[0, 0] == features.max() and x.grad[0].abs() < 1e-30 and x.grad[1].abs() > 0


def test_normalised_favor_equals_favor_then_sum_normalisation():
    x, projection = torch.randn(7, 4, dtype=torch.float64), draw_favor_projection(4, 6, dtype=torch.float64)
    torch.testing.assert_close(favor_plus_normalized(x, projection), sum_normalize(favor_plus(x, projection)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_normalisations_map_zero_to_zero_and_others_to_one(dtype):
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 5.0], [1e-4, 0.0, 1e-4]], dtype=dtype)
    assert torch.equal(sum_normalize(x)[0], torch.zeros(3, dtype=dtype))
    torch.testing.assert_close(sum_normalize(x).sum(dim=-1)[1:], torch.ones(2, dtype=dtype), rtol=1e-2, atol=0)
    assert torch.equal(l2_normalize(x)[0], torch.zeros(3, dtype=dtype))
    torch.testing.assert_close(l2_normalize(x).norm(dim=-1)[1:], torch.ones(2, dtype=dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize("normalize", [sum_normalize, l2_normalize])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 1e4])
def test_features_and_their_gradients_are_finite_at_any_scale(normalize, scale):
    projection = draw_favor_projection(8, 16)
    maps = [elu_plus_one, dpfp, lambda x: favor_plus(x, projection), lambda x: favor_plus_normalized(x, projection)]
    for feature_map in maps:
        x = (torch.randn(20, 8) * scale).requires_grad_()
        features = normalize(feature_map(x))
        features.square().sum().backward()
        assert torch.isfinite(features).all() and torch.isfinite(x.grad).all()


def test_learned_features_grow_at_first_as_the_weights_of_softmax_do():
    d_key, size = 8, 32
    start = {name: x.double() for name, x in draw_learned(3, d_key, size).items()}
    x, y = 1e-3 * torch.randn(2, 3, 100, d_key, dtype=torch.float64)
    phi_x, phi_y = learned_exp(x, **start), learned_exp(y, **start)
    lengths = (x.square() + y.square()).sum(dim=-1) / (2 * math.sqrt(d_key))
    kernel = (phi_x * phi_y).sum(dim=-1).log() - math.log(size)
    torch.testing.assert_close(kernel - lengths, (x * y).sum(dim=-1) / math.sqrt(d_key), rtol=0, atol=1e-9)


def test_normalised_learned_features_are_those_of_a_softmax():
    x, start = torch.randn(2, 3, 7, 4), draw_learned(3, 4, 5)
    assert start["weight"].shape == (3, 5, 4) and start["bias"].shape == (3, 1, 5)
    torch.testing.assert_close(learned_exp_normalized(x, **start), sum_normalize(learned_exp(x, **start)))
    far = learned_exp(1e6 * x, **start), learned_exp_normalized(1e6 * x, **start)
    assert all(features.isfinite().all() for features in far)
