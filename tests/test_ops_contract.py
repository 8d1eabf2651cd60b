"""The contract of every backend of the fast-weight operators, against the float64 token loop.

A backend joins by its entry in ``BACKENDS``.
"""

import subprocess
import sys
from typing import Optional

import pytest
import torch
from conftest import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fwp_fairseq.ops import BACKENDS, dpfp, fast_weight_memory, fast_weight_scan, fast_weight_step
from fwp_fairseq.ops.chunkwise import DEFAULT_CHUNK_SIZE
from fwp_fairseq.ops.fast_weights import GPU_BACKENDS

# What each rule of the table uses of (write, erase, decay).
rules = pytest.mark.parametrize(
    "uses", [(False, False, False), (True, True, False), (True, False, True), (True, True, True), (False, False, True)]
)

# Every backend, and those that have it with a bound on the memory (FWM), too.
forms = pytest.mark.parametrize(
    "backend, max_norm",
    [
        *(
            pytest.param(name, None, marks=needs_native if name == "native" else ())
            for name in sorted(set(BACKENDS) - set(GPU_BACKENDS))
        ),
        ("chunk", 1.0),
        ("loop", 1.0),
    ],
)

Inputs = dict[str, Optional[Tensor]]

# (B, H, L, Dk, Dv): one token, a length below, at and just above a chunk, several chunks, Dk ≠ Dv, one head.
SHAPES = [
    (2, 3, 1, 4, 5),
    (1, 1, DEFAULT_CHUNK_SIZE, 8, 8),
    (2, 1, DEFAULT_CHUNK_SIZE + 1, 3, 9),
    (1, 2, 2 * DEFAULT_CHUNK_SIZE + 22, 16, 1),
    (1, 2, 7, 1, 3),
]


def make_inputs(shape: tuple[int, ...], uses: tuple[bool, bool, bool], dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs with keys of sum one, as the rules need them to stay bounded, and a non-zero initial state."""
    b, h, length, d_k, d_v = shape
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, dtype=torch.float64, generator=generator).to(dtype)

    gates = {n: uniform(b, h, length) if used else None for n, used in zip(("write", "erase", "decay"), uses)}
    return {
        "q": uniform(b, h, length, d_k),
        "k": uniform(b, h, length, d_k).softmax(dim=-1),
        "v": uniform(b, h, length, d_v) - 0.5,
        **gates,
        "initial_state": uniform(b, h, d_k, d_v).to(torch.promote_types(dtype, torch.float32)),
    }


def results(inputs: Inputs, backend: str, **options: Optional[float]) -> dict[str, Tensor]:
    """Read-outs, final states and all gradients of one fixed function of them, in float64."""
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    sequences = {n: x for n, x in leaves.items() if n != "initial_state"}
    state_in = leaves["initial_state"]
    out, state = fast_weight_scan(**sequences, initial_state=state_in, backend=backend, **options)  # type: ignore
    del sequences["q"]
    memory = fast_weight_memory(**sequences, initial_state=state_in, backend=backend, **options)  # type: ignore
    loss = out.double().sin().sum() + state.double().cos().sum() + memory.double().square().sum()
    wanted = {n: x for n, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    named = {f"d_{name}": gradient for name, gradient in zip(wanted, gradients)}
    return {"out": out, "state": state, "memory": memory, **named}


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        scale = max(1.0, expected[name].abs().max().item())
        error = (value.double() - expected[name].double()).abs().max().item()
        assert error <= tolerance * scale, f"{name}: error {error:.1e}, scale {scale:.1e}"


@forms
@rules
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_values_and_gradients_agree_with_the_float64_loop(backend, max_norm, uses, shape, dtype, tolerance):
    inputs = make_inputs(shape, uses, dtype)
    exact = results({n: None if x is None else x.double() for n, x in inputs.items()}, "loop", max_norm=max_norm)
    assert_agree(results(inputs, backend, max_norm=max_norm), exact, tolerance)


@forms
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_accumulate_in_float32_and_return_their_type(backend, max_norm, dtype, tolerance):
    inputs = make_inputs((1, 2, 150, 8, 8), (True, True, False), dtype)
    actual = results(inputs, backend, max_norm=max_norm)
    assert actual["out"].dtype == dtype and actual["state"].dtype == torch.float32
    exact = results({n: None if x is None else x.double() for n, x in inputs.items()}, "loop", max_norm=max_norm)
    assert_agree(
        {"state": actual["state"], "memory": actual["memory"]}, {n: exact[n] for n in ("state", "memory")}, 1e-5
    )
    assert_agree(actual, exact, tolerance)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    uses=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    chunk_size=st.integers(1, 41),
    max_norm=st.sampled_from([None, 0.3, 1.0, 5.0]),
    seed=st.integers(0, 2**20),
)
def test_any_chunk_size_gives_the_same_result(shape, uses, chunk_size, max_norm, seed):
    inputs = make_inputs(shape, uses, torch.float64, seed)
    expected = results(inputs, "loop", max_norm=max_norm)
    assert_agree(results(inputs, "chunk", chunk_size=chunk_size, max_norm=max_norm), expected, 1e-11)


@forms
@rules
def test_gradients_pass_gradcheck(backend, max_norm, uses):
    inputs = {n: x for n, x in make_inputs((1, 2, 6, 3, 2), uses, torch.float64).items() if x is not None}

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors))
        state = named.pop("initial_state")
        return fast_weight_scan(**named, initial_state=state, backend=backend, max_norm=max_norm)

    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.autograd.gradcheck(scan, leaves)


@forms
@rules
@pytest.mark.parametrize("border", [1, 30, 64, 99])
def test_scan_of_a_concatenation_continues_from_the_state_of_its_first_part(backend, max_norm, uses, border):
    inputs = make_inputs((2, 2, 100, 5, 4), uses, torch.float64)
    state = inputs.pop("initial_state")
    whole, final = fast_weight_scan(**inputs, initial_state=state, backend=backend, max_norm=max_norm)
    parts = []
    for part in (slice(0, border), slice(border, None)):
        cut = {n: None if x is None else x[:, :, part] for n, x in inputs.items()}
        out, state = fast_weight_scan(**cut, initial_state=state, backend=backend, max_norm=max_norm)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, final)


@forms
@rules
def test_steps_equal_the_scan(backend, max_norm, uses):
    inputs = make_inputs((2, 3, 20, 6, 4), uses, torch.float64)
    initial = inputs.pop("initial_state")
    whole, final = fast_weight_scan(**inputs, initial_state=initial, backend=backend, max_norm=max_norm)
    state = initial.clone()
    for t in range(20):
        out = fast_weight_step(*(None if x is None else x[:, :, t] for x in inputs.values()), state, max_norm=max_norm)
        torch.testing.assert_close(out, whole[:, :, t])
    torch.testing.assert_close(state, final)


@forms
def test_non_contiguous_and_expanded_inputs_are_read_correctly(backend, max_norm):
    inputs = make_inputs((2, 3, 40, 4, 6), (True, True, True), torch.float64)
    odd = {n: x.transpose(-1, -2).contiguous().transpose(-1, -2) for n, x in inputs.items() if x is not None}
    odd["k"] = odd["k"][:1].expand(2, -1, -1, -1)
    plain = {n: x.contiguous() for n, x in odd.items()}
    assert_agree(results(odd, backend, max_norm=max_norm), results(plain, "loop", max_norm=max_norm), 1e-12)


@forms
def test_a_token_with_write_0_erase_0_decay_1_changes_nothing(backend, max_norm):
    inputs = make_inputs((1, 2, 90, 4, 3), (True, True, True), torch.float64)
    state = inputs.pop("initial_state") / 10  # within the bound
    padded = torch.zeros(90, dtype=torch.bool)
    padded[[0, 1, 2, 30, 64, 65, 88, 89]] = True
    neutral = {"write": 0.0, "erase": 0.0, "decay": 1.0}
    masked = {n: x.masked_fill(padded, neutral[n]) if n in neutral else x for n, x in inputs.items()}
    short = {n: x[:, :, ~padded] for n, x in inputs.items()}
    out, final = fast_weight_scan(**masked, initial_state=state, backend=backend, max_norm=max_norm)
    expected, expected_final = fast_weight_scan(**short, initial_state=state, backend=backend, max_norm=max_norm)
    torch.testing.assert_close(out[:, :, ~padded], expected)
    torch.testing.assert_close(final, expected_final)


@forms
@pytest.mark.parametrize("erase", [False, True])
def test_a_decay_of_zero_forgets_everything_with_finite_gradients(backend, max_norm, erase):
    inputs = make_inputs((1, 1, 70, 4, 3), (True, erase, True), torch.float64)
    inputs["decay"][:, :, [3, 4, 64]] = 0.0
    actual = results(inputs, backend, max_norm=max_norm)
    assert all(torch.isfinite(x).all() for x in actual.values())
    assert_agree(actual, results(inputs, "loop", max_norm=max_norm), 1e-12)
    assert actual["d_initial_state"].abs().max() > 0  # the tokens before the first zero do read it


@forms
@rules
def test_no_tokens_leave_the_state_as_it_is(backend, max_norm, uses):
    inputs = make_inputs((2, 1, 0, 4, 3), uses, torch.float32)
    initial = inputs.pop("initial_state").requires_grad_()
    out, state = fast_weight_scan(**inputs, initial_state=initial, backend=backend, max_norm=max_norm)
    assert out.shape == (2, 1, 0, 3) and torch.equal(state, initial)
    assert torch.equal(torch.autograd.grad(state.sum(), initial)[0], torch.ones_like(initial))


@forms
def test_gradients_flow_only_where_they_are_wanted(backend, max_norm):
    inputs = make_inputs((1, 1, 70, 4, 3), (True, True, False), torch.float64)
    state = inputs.pop("initial_state")
    inputs["v"].requires_grad_()
    fast_weight_scan(**inputs, initial_state=state, backend=backend, max_norm=max_norm)[0].sum().backward()
    assert inputs["v"].grad is not None and inputs["k"].grad is None
    frozen = {n: None if x is None else x.detach() for n, x in inputs.items()}
    out, _ = fast_weight_scan(**frozen, initial_state=state.requires_grad_(), backend=backend, max_norm=max_norm)
    (grad,) = torch.autograd.grad(out.sum(), state)
    assert grad.abs().sum() > 0


@forms
def test_the_initial_state_is_not_changed_and_not_shared(backend, max_norm):
    inputs = make_inputs((1, 1, 3, 2, 2), (True, True, False), torch.float32)
    state = inputs.pop("initial_state")
    before = state.clone()
    _, final = fast_weight_scan(**inputs, initial_state=state, backend=backend, max_norm=max_norm)
    final.zero_()
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", ["loop", "chunk"])
def test_a_bound_holds_and_one_that_is_never_reached_changes_nothing(backend):
    inputs = make_inputs((1, 2, 90, 4, 3), (True, True, False), torch.float64)
    inputs["v"] = inputs["v"] * 100
    state = inputs.pop("initial_state")
    for length in (1, 2, 33, 90):
        cut = {n: None if x is None else x[:, :, :length] for n, x in inputs.items() if n != "q"}
        final = fast_weight_memory(**cut, initial_state=state, max_norm=1.0, backend=backend)
        assert (final.norm(dim=(-2, -1)) <= 1 + 1e-12).all()
    expected = results({**inputs, "initial_state": state}, backend)
    assert_agree(results({**inputs, "initial_state": state}, backend, max_norm=1e6), expected, 1e-12)


@needs_native
def test_a_bound_is_refused_by_a_backend_that_has_none():
    k, v = torch.rand(1, 1, 5, 3), torch.rand(1, 1, 5, 2)
    with pytest.raises(ValueError, match="'native'.* 'chunk', 'loop' or 'auto'"):
        fast_weight_memory(k, v, max_norm=1.0, backend="native")


@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_a_bounded_memory_takes_keys_of_any_size_as_the_loop_does(size, dtype, tolerance):
    """FWM's features are not normalised: a write can be scaled down ten thousandfold."""
    inputs = make_inputs((2, 2, 100, 32, 9), (True, True, False), dtype)
    generator = torch.Generator().manual_seed(1)
    for name in "qk":
        inputs[name] = dpfp(torch.randn(2, 2, 100, 16, generator=generator) * size).to(dtype)
    inputs["initial_state"] = inputs["initial_state"] * 0
    exact = results({n: None if x is None else x.double() for n, x in inputs.items()}, "loop", max_norm=1.0)
    assert_agree(results(inputs, "chunk", max_norm=1.0), exact, tolerance)


def test_a_zero_key_in_a_bounded_memory_has_finite_gradients():
    inputs = make_inputs((2, 1, 100, 6, 5), (True, True, False), torch.float64)
    inputs["initial_state"] = inputs["initial_state"] * 0
    zero = torch.zeros(100, dtype=torch.bool)
    zero[[0, 1, 30, 31, 32, 63, 64, 99]] = True
    inputs["k"] = 10 * inputs["k"]
    inputs["k"][:, :, zero] = 0
    actual, expected = (results(inputs, backend, max_norm=1.0) for backend in ("chunk", "loop"))
    assert all(x.isfinite().all() for x in actual.values())
    # A memory at its bound stays there under a zero key, exactly at the kink, where that key's gradient can be either.
    for each in actual, expected:
        each["d_k"] = each["d_k"][:, :, ~zero]
    assert_agree(actual, expected, 1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backend": "fast"}, "backend is 'fast', allowed are auto"),
        ({"write": torch.rand(1, 1, 4)}, r"write has shape \(1, 1, 4\).*\(1, 1, 5\)"),
        ({"erase": torch.rand(1, 5)}, r"erase has shape \(1, 5\)"),
        ({"q": torch.rand(1, 1, 4, 3)}, "q has shape .* and k .* equal"),
        ({"v": torch.rand(1, 1, 4, 3)}, r"k has shape \(1, 1, 5, 3\) and v \(1, 1, 4, 3\)"),
        ({"initial_state": torch.rand(1, 1, 3, 3)}, r"initial_state has shape .* \(1, 1, 3, 2\)"),
        ({"v": torch.ones(1, 1, 5, 2, dtype=torch.long)}, "floating-point"),
        ({"backend": "chunk", "chunk_size": 0}, "chunk size is 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"q": torch.rand(1, 1, 5, 3), "k": torch.rand(1, 1, 5, 3), "v": torch.rand(1, 1, 5, 2)}
    with pytest.raises(ValueError, match=message):
        fast_weight_scan(**{**good, "write": None, **change})


def test_a_step_refuses_a_query_of_another_shape():
    k, v = torch.rand(1, 2, 3), torch.rand(1, 2, 4)
    with pytest.raises(ValueError, match="q has shape .* and k .* equal"):
        fast_weight_step(torch.rand(1, 2, 4), k, v, None, None, None, torch.zeros(1, 2, 3, 4))


def test_the_state_has_its_type_even_after_no_tokens():
    k, v = torch.rand(1, 1, 0, 3, dtype=torch.float64), torch.rand(1, 1, 0, 2, dtype=torch.float64)
    assert fast_weight_memory(k, v, initial_state=torch.rand(1, 1, 3, 2)).dtype == torch.float64


def test_a_step_refuses_a_state_of_another_shape_or_type():
    q, v = torch.rand(1, 2, 3), torch.rand(1, 2, 4)
    for state in (torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 3, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="state is"):
            fast_weight_step(q, q, v, None, None, None, state)


# Resets the kernel's high-water mark of this process, so that only what comes after counts.
MEMORY_PROBE = """
import re, sys, torch
from fwp_fairseq.ops import fast_weight_scan
torch.set_num_threads(1)
def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
def run(length):
    q, k, v = (torch.full((1, 4, length, 64), 1 / 64, requires_grad=True) for _ in range(3))
    gate = torch.full((1, 4, length), 0.5, requires_grad=True)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    max_norm = float(sys.argv[2]) if sys.argv[2:] else None
    fast_weight_scan(q, k, v, gate, gate, backend=sys.argv[1], max_norm=max_norm)[0].sum().backward()
    return resident("VmHWM") - before, 3 * q.numel() * 4
run(128)
peak, inputs = run(8192)
print(peak / inputs)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read in Linux units")
@pytest.mark.parametrize("form", ["chunk", "chunk 1.0", pytest.param("native", marks=needs_native)])
def test_training_memory_stays_within_a_small_factor_of_the_inputs(form):
    """L = 8192, Dk = Dv = 64: gradients and read-outs alone are 1.3 times q, k and v; a state per token is 21 times."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, *form.split()], capture_output=True, text=True, check=True, timeout=120
    )
    factor = float(run.stdout)
    print(f"{form}: peak of forward and backward beyond the inputs is {factor:.2f} times q, k and v")
    assert 1.0 < factor < 4.0
