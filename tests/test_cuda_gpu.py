"""The operators on a GPU: the contract of all backends there, and what only a GPU has. Skipped without one."""

import importlib.util

import pytest
import test_decoding
import torch
from registered import UNBOUNDED_RULES
from test_ops_contract import SHAPES, assert_agree, make_inputs, results, rules
from torch import Tensor

from fwp_fairseq.ops import fast_weight_scan, native
from fwp_fairseq.ops.fast_weights import choose_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_kernels = pytest.mark.skipif(
    not native.supports("cuda"), reason="the library was built without kernels for a GPU"
)
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
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_values_and_gradients_agree_with_the_float64_loop(backend, uses, shape, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
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


@needs_kernels
@pytest.mark.parametrize("d_k, d_v", [(512, 512), (512, 1), (1, 512), (300, 130)])
def test_large_heads(d_k, d_v):
    """Also those whose blocks ask for more than 48 KB of shared memory."""
    inputs = on_gpu(make_inputs((1, 1, 35, d_k, d_v), (True, True, True), torch.float32))
    assert_agree(on_cpu(results(inputs, "native")), exact(inputs), 3e-5)


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


# --- Decoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests of the decoding operators, which compare with plain tensors on the processor, call those here."""
    step, read = native.step, native.read

    def moved(x):
        return (
            x._replace(projection=moved(x.projection))
            if hasattr(x, "_replace")
            else x.cuda()
            if torch.is_tensor(x)
            else x
        )

    def step_here(*arguments, **options):
        there = [moved(x) for x in arguments]
        out, places = step(*there, **options)
        for index in (6, 7):  # state and normalizer are updated in place
            if arguments[index] is not None:
                arguments[index].copy_(there[index])
        return out.cpu(), None if places is None else places.cpu()

    monkeypatch.setattr(native, "step", step_here)
    monkeypatch.setattr(native, "read", lambda *arguments: read(*(moved(x) for x in arguments)).cpu())


@needs_kernels
@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
@test_decoding.readings
def test_steps_in_any_order(plain_on_cpu, rule, feature_map, normalization, normalized):
    test_decoding.test_steps_in_any_order_equal_plain_steps_of_gathered_memories(
        rule, feature_map, normalization, normalized, torch.float32, 1e-4
    )


@needs_kernels
@test_decoding.readings
def test_reads(plain_on_cpu, feature_map, normalization, normalized):
    test_decoding.test_rows_read_the_memory_they_share(feature_map, normalization, normalized)


@needs_kernels
def test_a_step_is_captured_in_a_graph():
    def step(state: Tensor, places: Tensor) -> Tensor:
        features = native.AddressFeatures("dpfp", 1, "sum")
        out, moved = native.step(q, k, v, beta, beta, None, state, None, order, places, features)
        places.copy_(moved)
        return out

    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(6, 2, 8, device="cuda", generator=generator) for _ in range(3))
    beta = torch.rand(6, 2, device="cuda", generator=generator)
    order = torch.tensor([1, 1, 0, 5, 5, 5], device="cuda")
    start = torch.randn(6, 2, 16, 8, device="cuda", generator=generator)

    state, places = start.clone(), torch.arange(6, device="cuda")
    expected = [step(state, places) for _ in range(4)]

    replayed, replayed_places = start.clone(), torch.arange(6, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(start.clone(), torch.arange(6, device="cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(replayed, replayed_places)
    for wanted in expected:
        graph.replay()
        assert torch.equal(out, wanted)
    assert torch.equal(replayed, state) and torch.equal(replayed_places, places)


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("decays", [False, True])
def test_flash_linear_attention_agrees(decays):
    inputs = on_gpu(make_inputs((2, 3, 150, 64, 64), (True, False, decays), torch.bfloat16))
    inputs["erase"] = inputs["write"]
    assert_agree(on_cpu(results(inputs, "fla")), exact(inputs), 3e-2)
