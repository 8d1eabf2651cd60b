"""What the paper says of update rules and of attention normalisation holds for the operators."""

import pytest
import torch
from conftest import backends
from registered import UNBOUNDED_RULES, gates_of

from fwp_fairseq.ops import (
    UPDATE_RULES,
    Gates,
    fast_weight_memory,
    fast_weight_scan,
    normalized_memory,
    normalized_read,
    normalized_scan,
    normalized_step,
)


def orthonormal_keys(number: int) -> torch.Tensor:
    return torch.eye(number, dtype=torch.float64)[None, None]


@backends()
@pytest.mark.parametrize("rule", ["delta", "gated", "sum"])
def test_rewriting_one_of_orthonormal_keys(rule, backend):
    """Appendix B: the delta rule replaces one value and leaves the others; gating decays them all; the sum adds up."""
    keys = orthonormal_keys(4)
    values = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    memory = keys.transpose(-1, -2) @ values
    new_value, beta = torch.randn(1, 1, 1, 3, dtype=torch.float64), torch.full((1, 1, 1), 0.7, dtype=torch.float64)
    gates = UPDATE_RULES[rule].gates(beta, None)
    after = keys @ fast_weight_memory(keys[:, :, 1:2], new_value, *gates, initial_state=memory, backend=backend)
    others = [0, 2, 3]
    kept, added = {"delta": (0.3, 0.7), "gated": (0.3, 0.7), "sum": (1.0, 1.0)}[rule]
    torch.testing.assert_close(after[:, :, 1:2], kept * values[:, :, 1:2] + added * new_value)
    torch.testing.assert_close(after[:, :, others], values[:, :, others] * (0.3 if rule == "gated" else 1.0))


@backends()
def test_delta_rule_with_full_strength_reads_back_the_latest_value(backend):
    keys = orthonormal_keys(3)[:, :, [0, 1, 2, 0, 1, 0]]
    values = torch.randn(1, 1, 6, 2, dtype=torch.float64)
    ones = torch.ones(1, 1, 6, dtype=torch.float64)
    out, _ = fast_weight_scan(keys, keys, values, ones, ones, backend=backend)
    torch.testing.assert_close(out, values)


def test_gates_of_each_rule_are_those_of_the_table():
    beta, alpha = torch.rand(2, 1, 2, 3)
    expected = {
        "sum": (None, None, None),
        "delta": (beta, beta, None),
        "gated": (beta, None, 1 - beta),
        "gated-delta": (beta, beta, alpha),
        "fwm": (beta, beta, None),
    }
    for name, gates in expected.items():
        for ours, theirs in zip(UPDATE_RULES[name].gates(beta, alpha), gates):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("name", sorted(UPDATE_RULES))
def test_padding_gates_leave_the_memory_alone(name):
    gate = torch.rand(1, 1, 3)
    padding = torch.tensor([[[True, False, True]]])
    gates = gates_of(name, gate, gate, padding)
    assert (gates.write[padding] == 0).all() and (gates.write[~padding] > 0).all()
    assert gates.erase is None or (gates.erase[padding] == 0).all()
    assert gates.decay is None or (gates.decay[padding] == 1).all()


def normalised_by_the_book(q, k, v, write, erase, decay, state, z):
    """Equations 26-28 token by token, with a decay of z where the rule has one."""
    outputs = []
    for t in range(k.size(0)):
        left = 1.0 if decay is None else decay[t]
        state, z = left * state, left * z
        retrieved = torch.zeros_like(v[t])
        if z @ k[t] > 0:
            retrieved = (k[t] @ state) / (z @ k[t])
        strength = 1.0 if write is None else write[t]
        erased = 0.0 if erase is None else erase[t]
        state = state + torch.outer(k[t], strength * v[t] - erased * retrieved)
        z = z + k[t] * (strength if erase is None else 1.0)
        outputs.append((q[t] @ state) / (z @ q[t]))
    return torch.stack(outputs), state, z


@backends()
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", UNBOUNDED_RULES)
def test_attention_normalisation_is_equations_26_to_28(name, started, backend):
    torch.manual_seed(0)
    length = 70
    q, k = torch.rand(2, 1, 1, length, 5, dtype=torch.float64) + 0.1
    v = torch.randn(1, 1, length, 3, dtype=torch.float64)
    beta, alpha = torch.rand(2, 1, 1, length, dtype=torch.float64) * 0.9 + 0.05
    gates = gates_of(name, beta, alpha)
    state = torch.rand(1, 1, 5, 3, dtype=torch.float64) * started
    z = torch.rand(1, 1, 5, 1, dtype=torch.float64) * started
    flat = [None if gate is None else gate[0, 0] for gate in gates]
    expected = normalised_by_the_book(q[0, 0], k[0, 0], v[0, 0], *flat, state[0, 0], z[0, 0, :, 0])
    start = {"initial_state": state, "initial_normalizer": z} if started else {}

    out, final, final_z = normalized_scan(q, k, v, gates, **start, backend=backend)
    for actual, wanted in zip((out[0, 0], final[0, 0], final_z[0, 0, :, 0]), expected):
        torch.testing.assert_close(actual, wanted)

    memory, memory_z = normalized_memory(k, v, gates, **start, backend=backend)
    torch.testing.assert_close(memory, final)
    torch.testing.assert_close(memory_z, final_z)
    torch.testing.assert_close(normalized_read(q[:, :, -1:], memory, memory_z), out[:, :, -1:])

    for t in range(length):
        token = Gates(*(None if gate is None else gate[:, :, t] for gate in gates))
        step = normalized_step(q[:, :, t], k[:, :, t], v[:, :, t], token, state, z)
        torch.testing.assert_close(step, out[:, :, t])
    torch.testing.assert_close(state, final)
    torch.testing.assert_close(z, final_z)


@backends()
def test_normalised_sum_rule_is_linear_attention(backend):
    """Equation 18: the read-out is the mean of values weighted by k · q over the past."""
    q, k = torch.rand(2, 1, 2, 10, 4, dtype=torch.float64)
    v = torch.randn(1, 2, 10, 3, dtype=torch.float64)
    weights = (q @ k.transpose(-1, -2)).tril()
    expected = (weights / weights.sum(dim=-1, keepdim=True)) @ v
    torch.testing.assert_close(normalized_scan(q, k, v, Gates(), backend=backend)[0], expected)


@backends()
@pytest.mark.parametrize("name", ["sum", "delta"])
def test_normalised_reading_of_an_empty_memory_is_zero_with_finite_gradients(name, backend):
    q = torch.rand(1, 1, 5, 4, requires_grad=True)
    k = torch.zeros(1, 1, 5, 4, requires_grad=True)
    beta = torch.full((1, 1, 5), 0.5, requires_grad=True)
    v = torch.randn(1, 1, 5, 3)
    out, _, _ = normalized_scan(q, k, v, UPDATE_RULES[name].gates(beta, None), backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    (out.sum() + 0 * beta.sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, beta))


@pytest.mark.parametrize("name", ["sum", "delta", "gated"])
def test_padding_is_not_counted_by_the_normaliser(name):
    rule = UPDATE_RULES[name]
    q, k = torch.rand(2, 1, 1, 6, 4, dtype=torch.float64)
    v = torch.randn(1, 1, 6, 3, dtype=torch.float64)
    beta = torch.rand(1, 1, 6, dtype=torch.float64)
    padding = torch.tensor([[[True, True, False, False, True, False]]])
    keep = ~padding[0, 0]
    out, state, z = normalized_scan(q, k, v, rule.gates(beta, None, padding))
    short_gates = rule.gates(beta[:, :, keep], None)
    expected, short_state, short_z = normalized_scan(q[:, :, keep], k[:, :, keep], v[:, :, keep], short_gates)
    torch.testing.assert_close(out[:, :, keep], expected)
    torch.testing.assert_close(state, short_state)
    torch.testing.assert_close(z, short_z)
