"""The Triton kernels on a GPU: the contract of all backends, in all types. Skipped without one.

On the processor: test_triton_on_cpu.py and test_triton_compile.py.
"""

from itertools import product

import pytest
import torch
from test_ops_contract import SHAPES, Inputs, assert_agree, make_inputs, results
from torch import Tensor

from fwp_fairseq.ops import fast_weight_memory, fast_weight_scan, triton_scan
from fwp_fairseq.ops.fast_weights import choose_backend

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not triton_scan.supports("cuda"), reason="needs a GPU, from Ampere on, and Triton"
)

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
types = pytest.mark.parametrize("dtype", TOLERANCES)
# Which of write, erase and decay there are.
uses_of_gates = pytest.mark.parametrize("uses", list(product((False, True), repeat=3)))


def make(shape: tuple[int, ...], uses: tuple[bool, bool, bool], dtype: torch.dtype) -> Inputs:
    """Inputs on the GPU. Read-outs are not much larger than one, and so are exact to the last bits of their type."""
    inputs = make_inputs(shape, uses, dtype)
    inputs["q"] = inputs["q"] * min(1, 8 / shape[3])
    return {n: None if x is None else x.cuda() for n, x in inputs.items()}


def check(inputs: Inputs) -> dict[str, Tensor]:
    """Compares with float64: the loop on the processor, for long sequences chunks on the GPU."""
    long = inputs["k"].size(2) > 500
    exact = {n: None if x is None else x.double() if long else x.double().cpu() for n, x in inputs.items()}
    expected = results(exact, "chunk" if long else "loop")
    found = results(inputs, "triton")
    assert found["out"].dtype == inputs["v"].dtype and found["state"].dtype == torch.float32
    assert_agree(
        {n: x.cpu() for n, x in found.items()},
        {n: x.cpu() for n, x in expected.items()},
        TOLERANCES[inputs["k"].dtype],
    )
    return found


@types
@uses_of_gates
@pytest.mark.parametrize("shape", [(1, 2, 150, 24, 20), (2, 3, 200, 64, 64)])
def test_values_and_gradients_agree_with_float64(dtype, uses, shape):
    check(make(shape, uses, dtype))


@types
@pytest.mark.parametrize("uses", [(True, True, False), (True, True, True)])
@pytest.mark.parametrize(
    "shape",
    [
        *(*SHAPES, (1, 2, 300, 40, 70), (2, 1, 50, 256, 64), (1, 2, 130, 128, 64), (3, 2, 100, 32, 32)),
        *((1, 1, 80, 16, 16), (1, 1, 90, 64, 256), (2, 4, 2048, 64, 64)),
    ],
)
def test_any_length_and_any_size_of_heads(dtype, uses, shape):
    check(make(shape, uses, dtype))


@types
def test_a_decay_of_zero_forgets_everything_and_has_its_gradient(dtype):
    inputs = make((2, 2, 200, 32, 32), (True, True, True), dtype)
    inputs["decay"][:, :, [0, 3, 4, 64, 127, 199]] = 0.0
    found = check(inputs)
    assert found["d_initial_state"].abs().max() == 0


@types
def test_strided_and_expanded_inputs(dtype):
    """Queries, keys and values as attention has them, of (L, B, heads x features); one of them the same for all."""
    inputs = make((4, 3, 70, 32, 32), (True, True, True), dtype)
    strided = {n: x.permute(2, 0, 1, *range(3, x.dim())).contiguous() for n, x in inputs.items()}
    strided = {n: x.permute(1, 2, 0, *range(3, x.dim())) for n, x in strided.items()}
    strided["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    strided["k"] = inputs["k"][:1].expand(4, -1, -1, -1)
    strided["v"] = inputs["v"].mT.contiguous().mT
    check(strided)


def test_many_sequences():
    inputs = make((70, 1000, 3, 4, 4), (True, True, False), torch.float32)  # more than 65,535
    check(inputs)


@types
def test_the_same_input_gives_the_same_bits(dtype):
    inputs = make((3, 5, 400, 40, 70), (True, True, True), dtype)
    first = results(inputs, "triton")
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in results(inputs, "triton").items())


def test_the_result_within_autocast_is_that_without():
    inputs = make((1, 2, 100, 24, 20), (True, True, True), torch.float32)
    expected, _ = fast_weight_scan(**inputs, backend="triton")
    with torch.autocast("cuda", torch.bfloat16):
        found, _ = fast_weight_scan(**inputs, backend="triton")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("uses", [(False, False, False), (True, True, True)])
def test_the_operators_keep_torchs_rules_for_operators(uses):
    inputs = make((1, 2, 135, 5, 4), uses, torch.float32)
    arguments = [None if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(torch.ops.fwp_fairseq.triton_scan.default, (*arguments, True))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_it_compiles_with_torch(backend):
    inputs = make((2, 2, 100, 16, 16), (True, True, True), torch.bfloat16)

    def scan(**leaves: Tensor) -> Tensor:
        out, state = fast_weight_scan(**leaves, backend=backend)
        return out.float().square().sum() + state.sum()

    grads = []
    for function in (scan, torch.compile(scan, fullgraph=True)):
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        function(**leaves).backward()
        grads.append({n: x.grad for n, x in leaves.items()})
    assert_agree(*grads, 2e-2)


def test_a_training_step_is_captured_in_a_graph():
    inputs = make((2, 2, 200, 64, 64), (True, True, True), torch.bfloat16)
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}

    def step() -> list[Tensor]:
        out, state = fast_weight_scan(**leaves, backend="triton")
        return [out, *torch.autograd.grad([out, state], list(leaves.values()), [out.detach(), state.detach()])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for x in found:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


@types
def test_peak_memory_of_training_is_a_small_factor_of_the_inputs(dtype):
    inputs = make((2, 4, 4096, 64, 64), (True, True, True), dtype)
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = fast_weight_scan(**leaves, backend="triton")
    torch.autograd.grad(out, list(leaves.values()), out.detach())
    factor = (torch.cuda.max_memory_allocated() - before) / sum(leaves[n].nbytes for n in "qkv")
    print(f"{dtype}: peak of forward and backward beyond the inputs is {factor:.2f} times q, k and v")
    assert 1.0 < factor < 6.0


def test_auto_takes_them_for_what_they_have():
    # On a Hopper with an assembler that is not sound, memories of larger keys do not fit.
    largest = 256 if triton_scan.warpgroups_are_sound(torch.device("cuda", torch.cuda.current_device())) else 128
    assert choose_backend("auto", device_type="cuda", d_k=largest) == "triton"
    assert choose_backend("auto", device_type="cuda", d_k=largest + 1) != "triton"
    assert choose_backend("auto", device_type="cuda", dtype=torch.float64) != "triton"
    assert choose_backend("auto", max_norm=1.0, device_type="cuda") == "chunk"


def test_tensors_on_two_devices_are_refused():
    x = torch.rand(1, 1, 4, 3, device="cuda")
    with pytest.raises(ValueError, match="several devices"):
        fast_weight_memory(x, x, torch.rand(1, 1, 4), backend="triton")
