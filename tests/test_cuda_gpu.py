"""The recurrence on a GPU: the contract of all backends there, and what only a GPU has. Skipped without one."""

import importlib.util

import pytest
import torch
from test_ops_contract import SHAPES, assert_agree, make_inputs, results, rules

from fwp_fairseq.ops import fast_weight_scan, native
from fwp_fairseq.ops.fast_weights import choose_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_kernels = pytest.mark.skipif(
    not native.supports("cuda"), reason="the library was built without kernels for a GPU"
)
# Of the largest value: sums over 300 tokens of 512 features each, in an order of their own.
FLOAT32 = 5e-5
backends = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_kernels), "chunk"])


def on_gpu(inputs: dict) -> dict:
    return {name: None if x is None else x.cuda() for name, x in inputs.items()}


def on_cpu(found: dict) -> dict:
    return {name: x.cpu() for name, x in found.items()}


def exact(inputs: dict) -> dict:
    return results({name: None if x is None else x.double().cpu() for name, x in inputs.items()}, "loop")


@backends
@rules
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 300, 40, 70), (2, 1, 50, 256, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, FLOAT32)])
def test_values_and_gradients_agree_with_the_float64_loop(backend, uses, shape, dtype, tolerance):
    inputs = on_gpu(make_inputs(shape, uses, dtype))
    assert_agree(on_cpu(results(inputs, backend)), exact(inputs), tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("d_v", [8, 130])
def test_half_precision(dtype, tolerance, d_v):
    inputs = on_gpu(make_inputs((1, 2, 150, 8, d_v), (True, True, False), dtype))
    found = results(inputs, "native")
    assert found["out"].dtype == dtype and found["state"].dtype == torch.float32
    assert_agree(on_cpu(found), exact(inputs), tolerance)


@backends
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.bfloat16, 2e-2)])
def test_strided_and_expanded_inputs(backend, dtype, tolerance):
    """As attention has them, heads within rows, and gates that are one for all heads."""
    inputs = on_gpu(make_inputs((2, 3, 150, 24, 40), (True, True, True), dtype))
    for name in ("q", "k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["decay"] = inputs["decay"][:, :1].expand(-1, 3, -1)
    inputs["erase"] = inputs["erase"][..., :1].expand(-1, -1, 150)
    assert_agree(on_cpu(results(inputs, backend)), exact(inputs), tolerance)


@needs_kernels
def test_work_goes_to_the_current_stream():
    inputs = on_gpu(make_inputs((2, 2, 400, 64, 64), (True, True, True), torch.float32))
    expected = results(inputs, "native")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Whoever does not wait for this stream reads what was there before.
        torch.cuda._sleep(50_000_000)
        late = {name: torch.zeros_like(x) for name, x in inputs.items()}
        for name, x in inputs.items():
            late[name].copy_(x)
        found = results(late, "native")
    side.synchronize()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@needs_kernels
@pytest.mark.parametrize("d_k, d_v", [(512, 512), (512, 1), (1, 512), (300, 130)])
def test_large_heads(d_k, d_v):
    """Also those whose blocks ask for more than 48 KB of shared memory."""
    inputs = on_gpu(make_inputs((1, 1, 35, d_k, d_v), (True, True, True), torch.float32))
    assert_agree(on_cpu(results(inputs, "native")), exact(inputs), FLOAT32)


@needs_kernels
def test_the_same_input_gives_the_same_bits():
    inputs = on_gpu(make_inputs((3, 5, 400, 40, 70), (True, True, True), torch.float32))
    first = results(inputs, "native")
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in results(inputs, "native").items())


@needs_kernels
@pytest.mark.parametrize("uses", [(False, False, False), (True, True, True)])
def test_the_operators_keep_torchs_rules_for_operators(uses):
    inputs = on_gpu(make_inputs((1, 2, 135, 5, 4), uses, torch.float32))
    arguments = [None if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(torch.ops.fwp_fairseq.scan.default, (*arguments, True))


@needs_kernels
def test_auto_takes_kernels_where_there_are_some():
    assert choose_backend("auto", device_type="cuda", dtype=torch.float64) == "native"
    assert choose_backend("auto", device_type="cuda", d_k=512) == "native"
    assert choose_backend("auto", device_type="cuda", d_k=513) == "chunk"
    x = torch.rand(1, 1, 4, 600, device="cuda")
    with pytest.raises(RuntimeError, match="no compiled operators for cuda tensors with keys of 600 features"):
        fast_weight_scan(x, x, x, backend="native")


@needs_kernels
def test_tensors_on_two_devices_are_refused():
    x = torch.rand(1, 1, 4, 3, device="cuda")
    with pytest.raises((ValueError, RuntimeError), match="several devices|same device"):
        torch.ops.fwp_fairseq.scan(x, x, x, torch.rand(1, 1, 4), None, None, None, False)


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("decays", [False, True])
def test_flash_linear_attention_agrees(decays):
    inputs = on_gpu(make_inputs((2, 3, 150, 64, 64), (True, False, decays), torch.bfloat16))
    inputs["erase"] = inputs["write"]
    try:
        found = results(inputs, "fla")
    except RuntimeError as error:  # it knows which versions of Triton it cannot work with
        if "Triton" not in str(error):
            raise
        pytest.skip(str(error))
    assert_agree(on_cpu(found), exact(inputs), 3e-2)
