"""The Triton kernels on the processor, by Triton's interpreter: the contract of all backends, values and gradients.

Not in bfloat16, whose products the interpreter gets wrong. On a GPU: test_triton_gpu.py.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Optional

import numpy
import pytest
import torch
from test_ops_contract import Inputs, assert_agree, make_inputs, results, rules
from torch import Tensor

from fwp_fairseq.ops import fast_weight_memory, fast_weight_scan, token_loop, triton_scan

pytestmark = [
    pytest.mark.skipif(not triton_scan.installed, reason="Triton is not installed"),
    # It takes arrays of one element for numbers, which numpy no longer does.
    pytest.mark.skipif(int(numpy.__version__.split(".")[0]) > 1, reason="Triton's interpreter needs numpy 1"),
]

KERNELS = "fwp_fairseq.ops.triton_kernels"
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3}
types = pytest.mark.parametrize("dtype", TOLERANCES)


def take_out_triton() -> dict[str, ModuleType]:
    """Its modules, and that of the kernels, as far as they are written in Python."""
    names = [n for n in sys.modules if n == KERNELS or (n + ".").startswith("triton.") and "._C" not in n]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels for the interpreter: Triton decides it for all functions, its own as well, where they are defined."""
    usual = take_out_triton()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module(KERNELS)
        yield
    take_out_triton()
    sys.modules.update(usual)


def check(inputs: Inputs, tolerance: Optional[float] = None) -> dict[str, Tensor]:
    """Compares with the float64 loop, and returns what was found."""
    exact = results({n: None if x is None else x.double() for n, x in inputs.items()}, "loop")
    found = results(inputs, "triton")
    assert_agree(found, exact, tolerance or TOLERANCES[inputs["k"].dtype])
    return found


@types
@rules
@pytest.mark.parametrize("shape", [(2, 1, 1, 4, 5), (1, 2, 40, 5, 7)])
def test_values_and_gradients_agree_with_the_float64_loop(dtype, uses, shape):
    found = check(make_inputs(shape, uses, dtype))
    assert found["out"].dtype == dtype and found["state"].dtype == torch.float32


@pytest.mark.parametrize(
    "dtype, shape",
    [
        # A token below, at and above a chunk, and several; keys and values below, at and above a tile, and several.
        *((torch.float32, (1, 1, length, 20, 16)) for length in (15, 16, 17, 40)),
        *((torch.float16, (1, 1, length, 20, 16)) for length in (63, 64, 65, 150)),
        *((torch.float16, (1, 1, length, 16, 3)) for length in (31, 33)),
        (torch.float32, (2, 1, 35, 3, 9)),
        *((dtype, (1, 1, 36, 40, 70)) for dtype in TOLERANCES),
        *((dtype, (1, 1, 20, 130, 65)) for dtype in TOLERANCES),
    ],
)
def test_any_length_and_any_size_of_heads(dtype, shape):
    inputs = make_inputs(shape, (True, True, True), dtype)
    inputs["q"] = inputs["q"] * 8 / shape[3]  # so that read-outs are not much larger than one
    check(inputs)


@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.float16, (1, 1, 70, 20, 40)), (torch.float16, (1, 1, 35, 70, 20)), (torch.float32, (1, 1, 20, 20, 20))],
)
def test_tiles_of_two_warps(dtype, shape, monkeypatch):
    """As for a Hopper whose assembler is not sound."""
    monkeypatch.setattr(triton_scan, "warpgroups_are_sound", lambda device: False)
    check(make_inputs(shape, (True, True, True), dtype), 2 * TOLERANCES[dtype])  # memories are rounded more often


@types
def test_a_decay_of_zero_forgets_everything_and_has_its_gradient(dtype):
    inputs = make_inputs((1, 2, 70, 4, 3), (True, True, True), dtype)
    inputs["decay"][:, 0, [0, 3, 4, 40, 64, 69]] = 0.0
    inputs["decay"][:, 1, [5, 9]] = torch.tensor([1e-39, 1e-30]).to(dtype)
    found = check(inputs)
    assert found["d_initial_state"][:, 0].abs().max() == 0 and found["d_initial_state"][:, 1].abs().max() > 0
    zeros = found["d_decay"][:, 0, [0, 3, 4, 40, 64, 69]]
    assert (zeros != 0).all()


def test_decays_of_any_sign_and_size():
    inputs = make_inputs((1, 2, 70, 4, 3), (True, True, True), torch.float32)
    inputs["decay"] = 3 * inputs["decay"] - 1.5
    inputs["decay"][:, :, [7, 8, 33]] = 0.0
    check(inputs)


def test_small_decays_have_exact_gradients():
    inputs = make_inputs((1, 1, 70, 4, 3), (True, False, True), torch.float32)
    inputs["decay"] = inputs["decay"].pow(8)
    check(inputs)


@types
def test_without_queries_and_without_a_state(dtype):
    inputs = make_inputs((1, 2, 70, 5, 7), (True, True, True), dtype)
    del inputs["q"], inputs["initial_state"]
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    found, expected = fast_weight_memory(**leaves, backend="triton"), fast_weight_memory(**exact, backend="loop")
    assert_agree({"memory": found}, {"memory": expected}, TOLERANCES[dtype])
    of_found, of_expected = (
        dict(zip(x, torch.autograd.grad(memory.cos().sum(), list(x.values()))))
        for memory, x in ((found, leaves), (expected, exact))
    )
    assert_agree(of_found, of_expected, TOLERANCES[dtype])


def test_only_read_outs_or_only_the_state_are_differentiated():
    inputs = make_inputs((1, 1, 40, 4, 3), (True, True, True), torch.float32)
    for index in (0, 1):
        grads = []
        for backend, dtype in (("triton", torch.float32), ("loop", torch.float64)):
            leaves = {n: x.detach().to(dtype).requires_grad_() for n, x in inputs.items()}
            outputs = fast_weight_scan(**leaves, backend=backend)
            wanted = list(leaves.values())
            found = torch.autograd.grad(outputs[index].sin().sum(), wanted, allow_unused=True)
            grads.append({n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found)})
        assert_agree(*grads, 2e-5)


def test_non_contiguous_and_expanded_inputs_are_read_correctly():
    inputs = make_inputs((2, 3, 40, 4, 6), (True, True, True), torch.float32)
    odd = {n: x.transpose(-1, -2).contiguous().transpose(-1, -2) for n, x in inputs.items()}
    odd["k"] = odd["k"][:1].expand(2, -1, -1, -1)
    odd["v"] = inputs["v"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    odd["write"] = odd["write"][:, :1].expand(-1, 3, -1)
    odd["erase"] = odd["write"]
    odd["decay"] = odd["decay"][:, :, :1].expand(-1, -1, 40)
    check(odd)


def test_a_token_with_write_0_erase_0_decay_1_changes_nothing():
    inputs = make_inputs((1, 1, 50, 4, 3), (True, True, True), torch.float32)
    state = inputs.pop("initial_state")
    padded = torch.zeros(50, dtype=torch.bool)
    padded[[0, 1, 2, 15, 16, 33, 48, 49]] = True
    neutral = {"write": 0.0, "erase": 0.0, "decay": 1.0}
    masked = {n: x.masked_fill(padded, neutral[n]) if n in neutral else x for n, x in inputs.items()}
    short = {n: x[:, :, ~padded] for n, x in inputs.items()}
    out, final = fast_weight_scan(**masked, initial_state=state, backend="triton")
    expected, expected_final = fast_weight_scan(**short, initial_state=state, backend="triton")
    torch.testing.assert_close(out[:, :, ~padded], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, expected_final, rtol=1e-5, atol=1e-6)


def test_the_inverse_of_a_chunk_is_exact_where_keys_repeat():
    """All keys the same and erased twice over: the inverse alternates, and powers of the matrix are enormous."""
    length = 64
    k = torch.zeros(1, 1, length, 3)
    k[..., 0] = 1
    erase = torch.full((1, 1, length), 2.0)
    v = torch.rand(1, 1, length, 2, generator=torch.Generator().manual_seed(1))
    out, _ = fast_weight_scan(k, k, v, None, erase, backend="triton")
    exact, _ = token_loop.scan(
        *(x.double() for x in (k, k, v)), None, erase.double(), None, torch.zeros(1, 1, 3, 2).double()
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_operators_keep_torchs_rules_for_operators():
    for uses in ((False, False, False), (True, True, True)):
        inputs = make_inputs((1, 2, 19, 5, 4), uses, torch.float32)
        arguments = [None if x is None else x.requires_grad_() for x in inputs.values()]
        torch.library.opcheck(torch.ops.fwp_fairseq.triton_scan.default, (*arguments, True))


@pytest.mark.parametrize(
    "version, sound", [("release 12.8, V12.8.93", False), ("release 13.0, V13.0.88", False), ("release 13.3, V", True)]
)
def test_products_by_four_warps_need_a_sound_assembler_on_hopper(version, sound, monkeypatch):
    compiler = ModuleType("compiler")
    compiler.get_ptxas_version = lambda architecture: f"ptxas: NVIDIA\nCuda compilation tools, {version}"
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.compiler", compiler)
    gpus = {"cuda:0": (9, 0), "cuda:1": (8, 0), "cuda:2": (10, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=gpus[str(device)][0]))
    triton_scan._assembler.cache_clear()
    try:
        assert [triton_scan.warpgroups_are_sound(torch.device(name)) for name in gpus] == [sound, True, True]
        torch.compiler.reset()
        compiled = torch.compile(lambda x: x + triton_scan._assembler_is_sound(), fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)).item() == sound
    finally:
        triton_scan._assembler.cache_clear()
    assert triton_scan.warpgroups_are_sound(torch.device("cpu"))


def test_a_second_derivative_is_refused_in_words():
    x = torch.rand(1, 1, 5, 3, requires_grad=True)
    out, _ = fast_weight_scan(x, x, x, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; backend 'loop' can"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "dtype, d_k, message", [(torch.float64, 3, "not float64"), (torch.float32, 300, "at most 256 features.*300")]
)
def test_what_the_kernels_do_not_have_is_named(dtype, d_k, message):
    x = torch.rand(1, 1, 4, d_k, dtype=dtype)
    with pytest.raises(ValueError, match=f"backend is 'triton', .*{message}"):
        fast_weight_scan(x, x, x, backend="triton")


def test_without_a_gpu_and_without_triton_it_says_so(monkeypatch):
    x = torch.rand(1, 1, 4, 3)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend is 'triton', which needs tensors on a GPU, these are on cpu"):
        fast_weight_scan(x, x, x, backend="triton")
    monkeypatch.setattr(triton_scan, "installed", False)
    with pytest.raises(RuntimeError, match="backend is triton, but Triton is not installed"):
        fast_weight_scan(x, x, x, backend="triton")
    assert not triton_scan.supports("cuda")
