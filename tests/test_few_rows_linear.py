"""Linear layers of decoding: the same layers, quicker for few rows."""

import copy

import pytest
import torch
from conftest import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st

from fwp_fairseq.modules.few_rows_linear import call_linears, use_few_rows_linear
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
    for shape in ((1, rows, inputs), (rows, 1, 1, inputs)):
        assert native.few_rows_linear(x.view(shape), w, b).equal(found.view(*shape[:-1], outputs))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(dtype):
    torch.manual_seed(1)
    x, weight = torch.randn(14, 70, dtype=dtype), torch.randn(39, 70, dtype=dtype)
    alone = torch.cat([native.few_rows_linear(row, weight, None) for row in x.split(1)])
    for rows in range(2, len(x)):
        assert native.few_rows_linear(x[:rows], weight, None).equal(alone[:rows])
        assert native.few_rows_linear(x, weight[:rows], None).equal(alone[:, :rows])


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
        ((torch.randn(2, 3), torch.randn(4, 5), None), "must be \\(\\.\\.\\., inputs\\) and \\(outputs, inputs\\)"),
        ((torch.randn(()), torch.randn(4, 3), None), "must be \\(\\.\\.\\., inputs\\)"),
        ((torch.randn(2, 3), torch.randn(3), None), "must be \\(\\.\\.\\., inputs\\)"),
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
    ours = copy.deepcopy(plain)
    use_few_rows_linear(ours)
    x = torch.randn(*rows, 7, dtype=dtype)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)  # with gradients it is nn.Linear itself
    with torch.no_grad():
        found = ours(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain(x))


@needs_native
@given(
    rows=st.integers(0, 7),
    inputs=st.integers(0, 40),
    outputs=st.lists(st.integers(0, 20), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=100, deadline=None)
def test_several_layers_in_one_call_are_each_alone_to_the_bit(rows, inputs, outputs, dtype):
    torch.manual_seed(1)
    x = torch.randn(rows, inputs, dtype=dtype)
    weights = [torch.randn(n, inputs, dtype=dtype) for n in outputs]
    biases = [torch.randn(n, dtype=dtype) if i % 2 else None for i, n in enumerate(outputs)]
    found = native.few_rows_linears(x, weights, biases)
    assert len(found) == len(outputs)
    for y, weight, bias in zip(found, weights, biases):
        assert y.equal(native.few_rows_linear(x, weight, bias))


@needs_native
def test_several_layers_share_all_threads_and_give_the_same_bits():
    torch.manual_seed(1)
    x, weights = torch.randn(5, 512), [torch.randn(n, 512) for n in (301, 0, 8, 512)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.few_rows_linears(x, weights, [None] * 4))
    finally:
        torch.set_num_threads(before)
    for y, weight in zip(results[0], weights):
        torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-4)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other))


@needs_native
def test_several_layers_in_one_call_keep_torchs_rules_and_are_checked():
    x, weights = torch.randn(3, 5), [torch.randn(4, 5), torch.randn(2, 5)]
    operator = torch.ops.fwp_fairseq.few_rows_linears.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (x, weights, [torch.randn(4), None]), test_utils=checks)
    with pytest.raises(ValueError, match="there are 2 weights and 1 biases"):
        operator(x, weights, [None])
    with pytest.raises(ValueError, match="weight is Double, x is Float"):
        operator(x, [weights[0], weights[1].double()], [None, None])


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_native), False])
def test_layers_called_together_are_the_layers(rows, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "unavailable", "for this test")
    torch.manual_seed(1)
    layers = [torch.nn.Linear(7, 9), torch.nn.Linear(7, 3, bias=False), torch.nn.Linear(7, 1)]
    x = torch.randn(1, rows, 7)
    for _ in range(2):
        with torch.no_grad():
            for layer, out in zip(layers, call_linears(layers, x), strict=True):
                torch.testing.assert_close(out, layer(x))
        use_few_rows_linear(torch.nn.ModuleList(layers))
