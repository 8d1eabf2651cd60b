"""The operators under torch's modes: autocast, activation checkpointing, torch.func, export; and on empty inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import pytest
import torch
from conftest import backends, needs_native
from registered import defaults
from test_ops_contract import Inputs, forms, make_inputs, results, rules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fwp_fairseq.ops import (
    FEATURE_MAPS,
    UPDATE_RULES,
    Gates,
    fast_weight_memory,
    fast_weight_read,
    fast_weight_scan,
    fast_weight_step,
    favor_plus,
    l2_normalize,
    native,
    normalized_memory,
    normalized_read,
    normalized_scan,
    normalized_step,
    sum_normalize,
)
from fwp_fairseq.ops.chunkwise import DEFAULT_CHUNK_SIZE

SEVERAL_CHUNKS = DEFAULT_CHUNK_SIZE + 6
PROJECTION = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: sum_normalize(x.exp()),
    "l2": l2_normalize,
}


def _register(name: str) -> None:
    feature_map = FEATURE_MAPS[name]
    learned = {} if feature_map.learned is None else feature_map.learned(1, 4, **defaults(feature_map))

    def apply(x: Tensor, normalization: str = "none") -> Tensor:
        drawn = {} if feature_map.draw is None else {"projection": PROJECTION.to(x.dtype)}
        drawn |= {name: parameter.squeeze().to(x.dtype) for name, parameter in learned.items()}
        return feature_map.features(x, normalization, **defaults(feature_map), **drawn)

    FUNCTIONS[name] = apply
    if feature_map.up_to_a_factor is not None:
        FUNCTIONS[f"{name}, normalised"] = partial(apply, normalization="sum")


for _name in FEATURE_MAPS:
    _register(_name)
feature_maps = pytest.mark.parametrize("feature_map", FUNCTIONS.values(), ids=FUNCTIONS)
kinds_of_checkpointing = pytest.mark.parametrize("use_reentrant", [False, True])


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


# Autocast.


@forms
@rules
def test_autocast_changes_nothing_in_a_scan(backend, max_norm, uses):
    inputs = make_inputs((1, 2, SEVERAL_CHUNKS, 8, 8), uses, torch.float32)

    def values() -> dict[str, Tensor]:
        out, state = fast_weight_scan(**inputs, backend=backend, max_norm=max_norm)
        rest = {n: x for n, x in inputs.items() if n != "q"}
        return {"out": out, "state": state, "memory": fast_weight_memory(**rest, backend=backend, max_norm=max_norm)}

    expected = values()
    with autocast():
        assert_same(values(), expected)


@pytest.mark.parametrize(
    "backend, max_norm", [("chunk", None), ("chunk", 1.0), pytest.param("native", None, marks=needs_native)]
)
def test_a_backward_pass_within_autocast_has_the_same_gradients(backend, max_norm):
    inputs = make_inputs((1, 2, SEVERAL_CHUNKS, 8, 8), (True, True, False), torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]

    def gradients(within: bool) -> dict[str, Tensor]:
        out, state = fast_weight_scan(**inputs, backend=backend, max_norm=max_norm)
        grads = [torch.ones_like(out), torch.ones_like(state)]
        with autocast(within):
            found = torch.autograd.grad([out, state], leaves, grads)
        return {str(i): grad for i, grad in enumerate(found)}

    assert_same(gradients(True), gradients(False))


def test_a_backward_pass_of_favor_within_autocast_has_the_same_gradients():
    x, projection = (draw(*shape, dtype=torch.float32).requires_grad_() for shape in ((3, 7, 4), (5, 4)))
    features = favor_plus(x, projection)
    expected = torch.autograd.grad(features, (x, projection), torch.ones_like(features), retain_graph=True)
    with autocast():
        actual = torch.autograd.grad(features, (x, projection), torch.ones_like(features))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@feature_maps
def test_autocast_changes_nothing_in_features(feature_map):
    x = draw(3, 7, 4, dtype=torch.float32)
    expected = feature_map(x)
    with autocast():
        assert_same({"features": feature_map(x)}, {"features": expected})


@backends()
@pytest.mark.parametrize("rule", ["sum", "delta", "gated-delta"])
def test_autocast_changes_nothing_in_normalised_attention_and_in_what_is_read(rule, backend):
    inputs = make_inputs((2, 2, 70, 4, 3), (True, True, False), torch.float32)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    gates = UPDATE_RULES[rule].gates(inputs["write"], inputs["erase"])

    def values() -> dict[str, Tensor]:
        out, state, normalizer = normalized_scan(q, k, v, gates, backend=backend)
        memory, total = normalized_memory(k, v, gates, backend=backend)
        found = {"out": out, "state": state, "normalizer": normalizer, "memory": memory, "total": total}
        found["read"], found["mean"] = fast_weight_read(q, memory), normalized_read(q, memory, total)
        now = Gates(*(None if gate is None else gate[:, :, 0] for gate in gates))
        found["step"] = fast_weight_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], *now, memory)
        found["next"] = normalized_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], now, memory, total)
        return found

    expected = values()
    with autocast():
        assert_same(values(), expected)


# Activation checkpointing.


@forms
@rules
@kinds_of_checkpointing
def test_a_scan_that_is_checkpointed_has_the_same_gradients(backend, max_norm, uses, use_reentrant):
    inputs = make_inputs((1, 2, SEVERAL_CHUNKS, 4, 3), uses, torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]

    def scan(*tensors: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        named = dict(zip(inputs, tensors))
        return fast_weight_scan(**named, backend=backend, max_norm=max_norm)

    def gradients(out: Tensor, state: Tensor) -> dict[str, Tensor]:
        (out.sin().sum() + state.cos().sum()).backward()
        found = {str(i): x.grad for i, x in enumerate(leaves)}
        for x in leaves:
            x.grad = None
        return found

    expected = gradients(*scan(*inputs.values()))
    assert_same(gradients(*checkpoint(scan, *inputs.values(), use_reentrant=use_reentrant)), expected)


@feature_maps
@kinds_of_checkpointing
def test_features_that_are_checkpointed_have_the_same_gradients(feature_map, use_reentrant):
    x = draw(3, 7, 4).requires_grad_()
    found = []
    for features in (feature_map(x), checkpoint(feature_map, x, use_reentrant=use_reentrant)):
        features.sin().sum().backward()
        found.append(x.grad)
        x.grad = None
    assert torch.equal(*found)


# torch.func, and gradients of gradients.


def losses(backend: str, inputs: Inputs, max_norm: Optional[float]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A scalar function of the tensors of ``inputs``, and the tensors."""
    names = [name for name, x in inputs.items() if x is not None]

    def loss(*tensors: Tensor) -> Tensor:
        given = {**dict.fromkeys(inputs), **dict(zip(names, tensors))}
        out, state = fast_weight_scan(**given, backend=backend, max_norm=max_norm)
        return out.sin().sum() + state.cos().sum()

    return loss, [inputs[name] for name in names]


# What torch.func goes through: every backend that is torch code, and "auto".
transformable = pytest.mark.parametrize(
    "backend, max_norm", [(b, bound) for b in ("loop", "chunk", "auto") for bound in (None, 1.0)]
)


@transformable
@rules
@pytest.mark.parametrize("length", [5, DEFAULT_CHUNK_SIZE + 6])
def test_torch_func_gives_the_gradients_of_each_sample(backend, max_norm, uses, length):
    loss, tensors = losses(backend, make_inputs((2, 1, length, 3, 2), uses, torch.float64), max_norm)
    everything = tuple(range(len(tensors)))
    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, everything)(*tensors), expected)
    samples = [x[:, None] for x in tensors]
    each = torch.func.vmap(torch.func.grad(loss, everything))(*samples)
    torch.testing.assert_close(tuple(x.squeeze(1) for x in each), expected)


@transformable
def test_forward_mode_gives_the_slope(backend, max_norm):
    inputs = make_inputs((1, 1, DEFAULT_CHUNK_SIZE + 6, 3, 2), (True, True, False), torch.float64)
    loss, tensors = losses(backend, inputs, max_norm)
    directions = tuple(draw(*x.shape, seed=i) for i, x in enumerate(tensors))
    _, slope = torch.func.jvp(loss, tuple(tensors), directions)
    gradients = torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(slope, sum((g * d).sum() for g, d in zip(gradients, directions)))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, d) for x, d in zip(tensors, directions)]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(*duals)).tangent, slope)


@needs_native
@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
def test_torch_func_of_the_compiled_operators_is_refused_in_words(transform):
    def total(x: Tensor) -> Tensor:
        return fast_weight_scan(x, x, x, backend="native")[0].sum()

    with pytest.raises(RuntimeError, match="backend is 'native', which torch.func cannot transform; 'auto', 'chunk'"):
        transform(total)(torch.rand(2, 1, 1, 3, 4) if transform is torch.func.vmap else torch.rand(1, 1, 3, 4))


@rules
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_loop_can_be_differentiated_twice(max_norm, uses):
    loss, tensors = losses("loop", make_inputs((1, 1, 4, 2, 2), uses, torch.float64), max_norm)
    torch.autograd.gradgradcheck(loss, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize(
    "backend, max_norm", [("chunk", None), ("chunk", 1.0), pytest.param("native", None, marks=needs_native)]
)
def test_a_gradient_that_cannot_be_differentiated_again_is_no_constant(backend, max_norm):
    """A penalty on the gradient of a sum: what comes into the backward pass needs no gradient, what was saved does."""
    inputs = make_inputs((1, 1, SEVERAL_CHUNKS, 3, 2), (True, True, False), torch.float64)
    inputs["k"].requires_grad_()
    out, _ = fast_weight_scan(**inputs, backend=backend, max_norm=max_norm)
    (grad,) = torch.autograd.grad(out.sum(), inputs["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; backend 'loop' can"):
        (out.sum() + grad.square().sum()).backward()


@feature_maps
def test_features_can_be_differentiated_twice_and_transformed(feature_map):
    x = 0.5 + draw(3, 4).abs()
    torch.autograd.gradgradcheck(feature_map, x.clone().requires_grad_())
    torch.autograd.gradcheck(feature_map, x.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    torch.testing.assert_close(torch.func.vmap(feature_map)(x), feature_map(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(feature_map(leaf).sin().sum(), leaf)
    each = torch.func.vmap(torch.func.grad(lambda y: feature_map(y).sin().sum()))(x)
    torch.testing.assert_close(each, expected)


def test_favor_has_all_derivatives_in_its_projection_too():
    inputs = (draw(3, 4).requires_grad_(), PROJECTION.clone().requires_grad_())
    torch.autograd.gradcheck(favor_plus, inputs, check_forward_ad=True)
    torch.autograd.gradgradcheck(favor_plus, inputs)


# Export.


class Operator(torch.nn.Module):
    """What every operator makes of its tensors."""

    def __init__(self, backend: str, max_norm: Optional[float] = None, attention_normalization: bool = False) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"backend": backend}
        if not attention_normalization:
            self.options["max_norm"] = max_norm
        self.attention_normalization = attention_normalization

    def forward(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        if self.attention_normalization:
            gates = Gates(beta, beta, alpha)
            return *normalized_scan(q, k, v, gates, **self.options), *normalized_memory(k, v, gates, **self.options)
        out, state = fast_weight_scan(q, k, v, beta, beta, alpha, **self.options)
        return out, state, fast_weight_memory(k, v, beta, None, alpha, **self.options)


def tensors_for(batch: int, length: int) -> tuple[Tensor, ...]:
    inputs = make_inputs((batch, 2, length, 4, 3), (True, True, False), torch.float64)
    return tuple(inputs[name] for name in ("q", "k", "v", "write", "erase"))


ANY = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("length")},) * 5


@backends("loop")
@pytest.mark.parametrize("attention_normalization", [False, True])
def test_an_exported_operator_takes_any_batch_and_length(backend, attention_normalization):
    operator = Operator(backend, attention_normalization=attention_normalization)
    strict = not attention_normalization  # by both of torch.export's ways of tracing
    exported = torch.export.export(operator, tensors_for(2, 5), dynamic_shapes=ANY, strict=strict).module()
    for size in ((2, 5), (1, 1), (3, 2 * native.SEGMENT + 1)):
        torch.testing.assert_close(exported(*tensors_for(*size)), operator(*tensors_for(*size)))


@forms
def test_an_exported_operator_takes_the_length_that_it_is_exported_for(backend, max_norm):
    operator, tensors = Operator(backend, max_norm), tensors_for(2, 3)
    torch.testing.assert_close(torch.export.export(operator, tensors).module()(*tensors), operator(*tensors))


@pytest.mark.parametrize("backend, max_norm", [("loop", None), ("loop", 1.0), ("chunk", 1.0)])
def test_export_of_a_varying_length_is_refused_in_words_where_tokens_follow_each_other(backend, max_norm):
    with pytest.raises(RuntimeError, match="needs backend 'chunk' or 'native', and no bound"):
        torch.export.export(Operator(backend, max_norm), tensors_for(2, 5), dynamic_shapes=ANY)


# Nothing to read or write.

# A batch, heads, a length, keys and values of none.
EMPTY_SHAPES = [tuple(0 if axis == i else 2 for i in range(5)) for axis in range(5)]


@forms
@rules
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_empty_inputs_have_outputs_with_a_graph_and_gradients_of_zero(backend, max_norm, uses, shape):
    found = results(make_inputs(shape, uses, torch.float32), backend, max_norm=max_norm)
    assert found["out"].shape == (*shape[:3], shape[4]) and not found["out"].any()
    assert all(not x.any() for name, x in found.items() if name.startswith("d_") and name != "d_initial_state")


@backends()
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("rule", ["sum", "delta", "gated", "gated-delta"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES[:3])
def test_empty_inputs_of_normalised_attention_have_gradients_of_zero(rule, backend, started, shape):
    leaves = make_inputs(shape, (True, True, False), torch.float32)
    for x in leaves.values():
        if x is not None:
            x.requires_grad_()
    q, k, v, beta, alpha, state = (leaves[n] for n in ("q", "k", "v", "write", "erase", "initial_state"))
    gates = UPDATE_RULES[rule].gates(beta, alpha)
    before = {"initial_state": state, "initial_normalizer": state.detach()[..., :1]} if started else {}
    out, *memory = normalized_scan(q, k, v, gates, **before, backend=backend)
    assert out.shape == v.shape
    wanted = [q, k, v, *(gate for gate in gates if gate is not None)]
    gradients = torch.autograd.grad([out.sum(), sum(x.sum() for x in memory)], wanted)
    assert all(not x.any() for x in gradients)
    memory = normalized_memory(k, v, gates, **before, backend=backend)
    assert all(not x.any() for x in torch.autograd.grad(sum(x.sum() for x in memory), [k, v]))


@feature_maps
def test_features_of_nothing_have_a_gradient(feature_map):
    x = torch.rand(0, 3, 4).requires_grad_()
    features = feature_map(x)
    assert features.shape[:2] == (0, 3)
    assert torch.autograd.grad(features.sum(), x)[0].shape == x.shape


# A memory that is given in part.


@backends()
@pytest.mark.parametrize("rule", ["sum", "delta", "gated", "gated-delta"])
@pytest.mark.parametrize("given", ["initial_state", "initial_normalizer"])
def test_a_state_or_a_normaliser_alone_is_gone_on_from_and_the_other_is_zero(rule, given, backend):
    inputs = make_inputs((2, 2, 7, 4, 3), (True, True, False), torch.float64)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    gates = UPDATE_RULES[rule].gates(inputs["write"], inputs["erase"])
    both = {"initial_state": inputs["initial_state"], "initial_normalizer": inputs["initial_state"][..., :1]}
    alone = {given: both[given]}
    zero = {name: x if name == given else torch.zeros_like(x) for name, x in both.items()}
    expected = normalized_scan(q, k, v, gates, **zero, backend=backend)
    torch.testing.assert_close(normalized_scan(q, k, v, gates, **alone, backend=backend), expected)
    torch.testing.assert_close(normalized_memory(k, v, gates, **alone, backend=backend), expected[1:])
