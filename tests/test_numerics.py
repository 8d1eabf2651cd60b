"""A sample of the random cases of campaigns/numerics.py, and of the faults that these found, one test for each."""

import random

import pytest
import torch
from conftest import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import features_of

pytest.importorskip("fairseq")
from campaigns.numerics import DTYPES, draw_case, run_case  # noqa: E402

from fwp_fairseq.ops import Gates, l2_normalize, native, normalized_scan, normalized_step  # noqa: E402


@settings(max_examples=300, deadline=None)
@given(draw=st.randoms(use_true_random=False))
def test_finite_in_gives_finite_out_at_a_bounded_distance_from_the_definition(draw: random.Random) -> None:
    case = draw_case(draw, longest=500)
    assert run_case(case)["wrong"] == [], case


def test_keys_whose_features_have_squares_below_the_floor_get_length_one() -> None:
    features = torch.tensor([[3e-12, 4e-12], [0.0, 0.0], [3e12, 4e12]], requires_grad=True)
    unit = l2_normalize(features)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]))
    # The derivative of a direction goes with the inverse length.
    (grad,) = torch.autograd.grad(unit[:, 0].sum(), features)
    torch.testing.assert_close(grad[0], torch.tensor([0.64, -0.48]) / 5e-12)
    assert grad.isfinite().all()


@needs_native
@pytest.mark.parametrize("feature_map, size", [("dpfp", 1e-6), ("favor", 30.0), ("elu", 1.0)])
def test_the_compiled_step_normalises_to_length_one_as_the_module_does(feature_map: str, size: float) -> None:
    module = features_of(feature_map, "l2", 8, favor_features=5).eval()
    torch.manual_seed(1)
    q, k = size * torch.randn(2, 3, 2, 8)
    expected_q, expected_k = module(q, k)
    torch.testing.assert_close(expected_k.norm(dim=-1), torch.ones(3, 2))
    v, state = torch.randn(3, 2, 4), torch.zeros(3, 2, module.size, 4)
    out, _ = native.step(q, k, v, None, None, None, state, None, None, None, module.address_features())
    torch.testing.assert_close(state, expected_k[..., :, None] * v[..., None, :], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, (expected_q * expected_k).sum(-1, keepdim=True) * v, rtol=1e-4, atol=1e-5)


def test_float16_has_to_hold_means_but_not_the_sums_that_they_are_made_of() -> None:
    torch.manual_seed(1)
    k, v = (100 * torch.rand(1, 1, 50, 4)).half(), 1000 * torch.ones(1, 1, 50, 2, dtype=torch.float16)
    beta = torch.ones(1, 1, 50)
    for gates in (Gates(), Gates(beta, None, 1 - 0.1 * beta)):
        state, z = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 1)
        for t in range(50):
            now = Gates(*(None if gate is None else gate[:, :, t] for gate in gates))
            out = normalized_step(k[:, :, t], k[:, :, t], v[:, :, t], now, state, z)
        torch.testing.assert_close(out.float(), torch.full((1, 1, 2), 1000.0), rtol=2e-3, atol=0)
    out, _, _ = normalized_scan(k, k, v, Gates(beta, beta))
    assert out.isfinite().all()


@pytest.mark.parametrize("feature_map", ["dpfp", "elu"])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_features_that_are_not_normalised_are_finite_in_every_type(feature_map: str, dtype: torch.dtype) -> None:
    module = features_of(feature_map, "none", 4, dpfp_nu=2)
    (features,) = module(torch.tensor([6e4, 6e4, -6e4, 6e4]).to(dtype))
    assert features.isfinite().all() and features.max() > 1e4
