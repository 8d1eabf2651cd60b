"""Linear layers of decoding: the same layers, quicker for few rows."""

import copy

import pytest
import torch
from conftest import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st

from fwp_fairseq.modules.few_rows_linear import FewRowsLinear, join_linears
from fwp_fairseq.ops import native


@needs_native
@given(
    rows=st.integers(0, 17),
    inputs=st.integers(0, 70),
    outputs=st.integers(0, 40),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    transposed=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_operator_is_a_linear_layer_of_any_shape(rows, inputs, outputs, bias, dtype, transposed):
    torch.manual_seed(1)
    x, w = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    b = torch.randn(outputs, dtype=dtype) if bias else None
    found = native.few_rows_linear(
        x.t().contiguous().t() if transposed else x, w.t().contiguous().t() if transposed else w, b
    )
    expected = x.double() @ w.double().t() + (0 if b is None else b.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * tolerance)


@needs_native
def test_the_operator_takes_parts_of_a_matrix_and_uses_all_threads_with_the_same_bits():
    torch.manual_seed(1)
    joint, x = torch.randn(1000, 520), torch.randn(5, 512)
    weight = joint[100:901, 3:515]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.few_rows_linear(x, weight, None))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], x @ weight.t(), rtol=1e-4, atol=1e-4)
    assert all(result.equal(results[0]) for result in results)


@needs_native
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.randn(2, 3), torch.randn(4, 5), None), "must be \\(rows, inputs\\) and \\(outputs, inputs\\)"),
        ((torch.randn(3), torch.randn(4, 3), None), "must be \\(rows, inputs\\)"),
        ((torch.randn(2, 3), torch.randn(4, 3).double(), None), "weight is Double, x is Float"),
        ((torch.randn(2, 3).half(), torch.randn(4, 3).half(), None), "must be float32 or float64"),
        ((torch.randn(2, 3), torch.randn(4, 3), torch.randn(3)), "bias must be"),
        ((torch.randn(2, 3), torch.randn(4, 3), torch.randn(4).double()), "bias must be"),
    ],
)
def test_the_operator_refuses_what_would_be_read_out_of_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.fwp_fairseq.few_rows_linear(*arguments)


@needs_native
def test_the_operator_keeps_torchs_rules_for_operators():
    arguments = (torch.randn(3, 5), torch.randn(4, 5), torch.randn(4))
    torch.library.opcheck(
        torch.ops.fwp_fairseq.few_rows_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3), (1, 200), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_layers_for_few_rows_are_linear_layers(rows, bias, dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "unavailable", "for this test")
    torch.manual_seed(1)
    plain = torch.nn.Linear(7, 9, bias=bias, dtype=dtype)
    ours = FewRowsLinear(7, 9, bias=bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(*rows, 7, dtype=dtype)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)  # with gradients it is nn.Linear itself
    with torch.no_grad():
        found = ours(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain(x))


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_joint_linear_layers_are_the_same_layers_with_the_same_weights(rows):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(7, 9), None, FewRowsLinear(7, 3, bias=False), torch.nn.Linear(7, 1)]
    state = copy.deepcopy([layer and layer.state_dict() for layer in layers])
    joint = join_linears(layers)
    x = torch.randn(rows, 7)
    with torch.no_grad():
        for layer, before, out in zip([f for f in layers if f], [s for s in state if s], joint(x), strict=True):
            torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
            torch.testing.assert_close(out, layer(x))
        # New values in the old place are seen; a layer that has other tensors no longer takes part.
        layers[0].load_state_dict({name: x + 1 for name, x in state[0].items()})
        assert joint.is_current()
        torch.testing.assert_close(joint(x)[0], layers[0](x))
    assert not copy.deepcopy(joint).is_current()
    layers[2].double()
    assert not joint.is_current()
    assert join_linears([torch.nn.Linear(7, 9), torch.nn.Identity()]) is None
