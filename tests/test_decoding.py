"""The compiled decoding operators: one token for every hypothesis, and reads of finished memories."""

import argparse
import itertools
import unittest.mock

import pytest
import torch
from conftest import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from registered import NON_NEGATIVE_MAPS, UNBOUNDED_RULES, features_of, gates_of
from test_attention import CONFIGS, buffer, build, inputs, name_of
from test_models import generate, sharpened
from tiny_models import PLACES, places, translation_batch
from torch import Tensor

from fwp_fairseq.models import captured_step
from fwp_fairseq.modules.few_rows_linear import use_few_rows_linear
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.ops import (
    FEATURE_MAPS,
    KEY_NORMALIZATIONS,
    UPDATE_RULES,
    Gates,
    fast_weight_step,
    native,
    normalized_read,
    normalized_step,
)

pytestmark = needs_native

# As the attention has them: a map without compiled code is applied before the compiled step, and passed as none.
MAPS = [
    (feature_map, normalization)
    for feature_map, normalization in itertools.product(FEATURE_MAPS, KEY_NORMALIZATIONS)
    if native.unavailable is None and native.has_feature_map(feature_map)
    if feature_map in NON_NEGATIVE_MAPS or normalization != "sum"
]
# With and without attention normalisation, which needs non-negative features.
READINGS = [
    (*pair, normalized)
    for pair in MAPS
    for normalized in (False, True)
    if pair[0] in NON_NEGATIVE_MAPS or not normalized
]
readings = pytest.mark.parametrize("feature_map, normalization, normalized", READINGS)


def make_features(feature_map: str, normalization: str, d_key: int, nu: int = 3) -> KeyFeatures:
    torch.manual_seed(5)
    return features_of(feature_map, normalization, d_key, dpfp_nu=nu, favor_features=5).eval().double()


class Hypotheses:
    """Rows that decode by the compiled step, and beside them by plain tensors in float64."""

    def __init__(self, rule: str, features: KeyFeatures, rows: int, d_v: int, normalized: bool, dtype: torch.dtype):
        self.rule, self.features, self.d_v = rule, features, d_v
        self.generator = torch.Generator().manual_seed(3)
        self.dtype = dtype
        self.exact = self.draw(rows, features.size, d_v, dtype=torch.float64)
        self.exact_z = self.draw(rows, features.size, 1, dtype=torch.float64).abs() if normalized else None
        wide = torch.promote_types(dtype, torch.float32)
        self.state = self.exact.to(wide, copy=True)
        self.z = None if self.exact_z is None else self.exact_z.to(wide, copy=True)
        self.places: Tensor | None = None

    def draw(self, rows: int, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(rows, 2, *size, dtype=torch.float64, generator=self.generator)
        return x.to(dtype or self.dtype)

    def step(self, order: Tensor | None, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read-outs of both."""
        rows = self.exact.size(0) if order is None else order.size(0)
        q, k, v = self.draw(rows, self.features.d_key), self.draw(rows, self.features.d_key), self.draw(rows, self.d_v)
        beta, alpha = (self.draw(rows).double().sigmoid() for _ in range(2))

        if order is not None:
            self.exact = self.exact[order]
            self.exact_z = None if self.exact_z is None else self.exact_z[order]
        gates = gates_of(self.rule, beta, alpha, None if padding is None else padding[:, None].expand(rows, 2))
        gates = Gates(*(None if g is None else g.double().expand(rows, 2) for g in gates))
        address_q, address_k = self.features(q.double(), k.double())
        if self.exact_z is None:
            expected = fast_weight_step(address_q, address_k, v.double(), *gates, self.exact)
        else:
            expected = normalized_step(address_q, address_k, v.double(), gates, self.exact, self.exact_z)

        found, self.places = native.step(
            q, k, v, *(None if g is None else g.to(self.state.dtype) for g in gates), self.state, self.z, order,
            self.places, self.features.address_features(),
        )  # fmt: skip
        return found, expected

    def rows(self) -> Tensor:
        return self.state if self.places is None else self.state[self.places]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item())
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.1e}, scale {scale:.1e}"


@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
@readings
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_steps_in_any_order_equal_plain_steps_of_gathered_memories(
    rule, feature_map, normalization, normalized, dtype, tolerance
):
    if UPDATE_RULES[rule].erases and normalization == "none":
        tolerance *= 100  # the delta rule diverges here, and errors with it
    hypotheses = Hypotheses(rule, make_features(feature_map, normalization, 6), 6, 37, normalized, dtype)
    orders = [None, [0, 1, 2, 3, 4, 5], [5, 5, 5, 0, 1, 1], [2, 2, 2, 2, 2, 2], None, [3, 1, 1, 0], [1, 1, 0], [2]]
    for order in orders:
        found, expected = hypotheses.step(None if order is None else torch.tensor(order))
        assert_close(found, expected, tolerance)
        assert_close(hypotheses.rows(), hypotheses.exact, tolerance)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    d_key=st.integers(1, 9),
    d_v=st.integers(1, 70),
    rule=st.sampled_from(UNBOUNDED_RULES),
    normalized=st.booleans(),
    draw=st.data(),
)
def test_any_shape_and_any_orders(rows, d_key, d_v, rule, normalized, draw):
    features = make_features("dpfp", "sum", d_key, nu=draw.draw(st.integers(1, 2 * d_key - 1)))
    hypotheses = Hypotheses(rule, features, rows, d_v, normalized, torch.float64)
    for _ in range(4):
        order = draw.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
        rows = rows if order is None else len(order)
        padding = draw.draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))
        found, expected = hypotheses.step(
            None if order is None else torch.tensor(order), None if padding is None else torch.tensor(padding)
        )
        assert_close(found, expected, 1e-9)
        assert_close(hypotheses.rows(), hypotheses.exact, 1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
def test_half_precision_steps_keep_a_float32_memory(rule, dtype, tolerance):
    hypotheses = Hypotheses(rule, make_features("dpfp", "sum", 6), 3, 16, False, dtype)
    for order in (None, [2, 0, 0]):
        found, expected = hypotheses.step(None if order is None else torch.tensor(order))
        assert found.dtype == dtype and hypotheses.state.dtype == torch.float32
        assert_close(found, expected, tolerance)
        assert_close(hypotheses.rows(), hypotheses.exact, 1e-5)


@readings
def test_rows_read_the_memory_they_share(feature_map, normalization, normalized):
    features = make_features(feature_map, normalization, 6)
    generator = torch.Generator().manual_seed(4)
    q, state = (
        torch.randn(size, dtype=torch.float64, generator=generator) for size in ((6, 2, 6), (2, 2, features.size, 21))
    )
    z = state[..., :1].abs() if normalized else None
    (address,) = features(q)
    by_sentence = address.unflatten(0, (2, 3)).transpose(1, 2)
    expected = by_sentence @ state if z is None else normalized_read(by_sentence, state, z)
    expected = expected.transpose(1, 2).flatten(0, 1)
    assert_close(native.read(q, state, z, features.address_features()), expected, 1e-12)
    single = (None if x is None else x.float() for x in (q, state, z))
    assert_close(native.read(*single, features.float().address_features()), expected, 1e-4)


@pytest.mark.parametrize("feature_map, normalization", MAPS)
def test_zero_and_extreme_vectors_stay_finite_and_equal_the_plain_features(feature_map, normalization):
    features = make_features(feature_map, normalization, 4).float()
    q = torch.tensor([[0.0, 0, 0, 0], [1e-30, 0, 0, 0], [1e4, -1e4, 3, 0], [-90, -95, -100, -200], [30, 30, -30, 1]])
    state = torch.eye(features.size).expand(1, 1, -1, -1).contiguous()
    found = native.read(q[:, None], state, None, features.address_features())[:, 0]
    (expected,) = features(q)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30)


def test_the_operators_keep_torchs_rules_for_operators():
    q, v = torch.randn(4, 2, 3), torch.randn(4, 2, 5)
    state, z = torch.randn(4, 2, 6, 5), torch.rand(4, 2, 6, 1)
    gate, order = torch.rand(4, 2), torch.tensor([1, 1, 0, 3])
    # Aliases and shapes; there is no gradient to check.
    checks = ("test_schema", "test_faketensor")
    arguments = (q, q, v, gate, gate, None, state, z, order, None, None, "dpfp", 1, "sum")
    torch.library.opcheck(torch.ops.fwp_fairseq.step.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.fwp_fairseq.read.default, (q, state, z, None, "dpfp", 1, "sum"), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"order": torch.tensor([0, 1, 2, 4])}, "order has 4, there are 4 rows"),
        ({"order": torch.tensor([0, -1, 2, 3])}, "order has -1"),
        ({"places": torch.tensor([0, 1, 2, 7])}, "places has 7"),
        ({"order": torch.tensor([0, 1, 2])}, "order must be"),
        ({"order": torch.tensor([0.0, 1, 2, 3])}, "of int64"),
        ({"state": torch.randn(4, 2, 5, 5)}, "the state has 5 rows, these keys have 6 features"),
        ({"state": torch.randn(3, 2, 6, 5)}, "4 rows, but 3 memories"),
        ({"state": torch.randn(4, 2, 5, 6).mT}, "contiguous"),
        ({"state": torch.randn(4, 2, 6, 5).double()}, "type of accumulation"),
        ({"normalizer": torch.randn(4, 2, 5, 1)}, "normalizer must be"),
        ({"write": torch.rand(4)}, "write is not of shape"),
        ({"decay": torch.rand(3, 2)}, "decay is not of shape"),
        ({"nu": 6}, "nu is 6, allowed is 1 to 2"),
        ({"feature_map": "relu"}, "feature_map is relu"),
        ({"feature_map": "favor"}, "favor needs a projection"),
        ({"key_normalization": "max"}, "key_normalization is max"),
    ],
)
def test_the_raw_operator_refuses_what_would_be_read_or_written_out_of_bounds(change, message):
    arguments = {
        "q": torch.randn(4, 2, 3), "k": torch.randn(4, 2, 3), "v": torch.randn(4, 2, 5), "write": None,
        "erase": None, "decay": None, "state": torch.randn(4, 2, 6, 5), "normalizer": None, "order": None,
        "places": None, "projection": None, "feature_map": "dpfp", "nu": 1, "key_normalization": "sum",
    }  # fmt: skip
    torch.ops.fwp_fairseq.step(*arguments.values())
    before = arguments["state"].clone()
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        torch.ops.fwp_fairseq.step(*{**arguments, **change}.values())
    assert before.equal(arguments["state"])


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.rule.max_norm is None], ids=name_of)
def test_attention_decodes_as_without_the_compiled_step(config, monkeypatch):
    """Also when hypotheses change places, twice before a step too, and when padded tokens come."""
    step = unittest.mock.Mock(wraps=native.step)
    monkeypatch.setattr(native, "step", step)
    attention = build(config, causal=True)
    plain = build(config, causal=True)
    plain.load_state_dict(attention.state_dict())
    plain.backend = "chunk"
    use_few_rows_linear(attention)
    states: tuple[dict, dict] = ({}, {})
    orders: list[list[list[int]]] = [[], [[1, 1, 0]], [[2, 0, 2]], [[1, 2, 0], [0, 2]], [], [[1]]]
    rows = 3
    for i, before in enumerate(orders):
        composed = torch.arange(rows)
        for order in before:
            attention.reorder_incremental_state(states[0], torch.tensor(order))
            composed = composed[order]
        if before:
            plain.reorder_incremental_state(states[1], composed)
        rows = len(composed)
        x = inputs(1, batch=rows, seed=i)
        padding = None if i != 2 else torch.tensor([[True], [False], [False]])
        with torch.no_grad():
            found, expected = (
                module(x, x, x, incremental_state=state, key_padding_mask=padding)[0]
                for module, state in zip((attention, plain), states)
            )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert buffer(attention, states[0])["prev_key"].size(0) == 3  # it never grew
    assert step.call_count == len(orders)


def test_reordering_copies_nothing_and_the_memory_stays_in_place():
    attention = build(CONFIGS[0], causal=True)
    state: dict = {}
    with torch.no_grad():
        for step in range(6):
            x = inputs(1, batch=3, seed=step)
            attention(x, x, x, incremental_state=state)
            address = buffer(attention, state)["prev_key"].data_ptr()
            if step:
                assert address == earlier  # noqa: F821
            earlier = address  # noqa: F841
            attention.reorder_incremental_state(state, torch.tensor([2, 2, step % 3]))
            assert buffer(attention, state)["prev_key"].data_ptr() == address


def test_more_hypotheses_than_before_get_memories_of_their_own():
    attention = build(CONFIGS[0], causal=True)
    state: dict = {}
    with torch.no_grad():
        x = inputs(1, batch=3)
        attention(x, x, x, incremental_state=state)
        attention.reorder_incremental_state(state, torch.tensor([2, 2, 1, 0, 1]))
        y = inputs(1, batch=5, seed=2)
        found, _ = attention(y, y, y, incremental_state=state)
        x = x[:, [2, 2, 1, 0, 1]]
        both = torch.cat([x, y])
        expected, _ = attention(both, both, both)
    torch.testing.assert_close(found, expected[1:], rtol=1e-5, atol=1e-6)


MODELS = [
    [f"--update-rule={rule}", f"--feature-map={feature_map}", f"--key-normalization={normalization}"]
    + ["--attention-normalization"] * normalized
    for rule in UNBOUNDED_RULES
    for feature_map, normalization, normalized in READINGS
]


@pytest.mark.parametrize("flags", MODELS, ids=" ".join)
def test_beam_search_is_the_same_with_the_compiled_step(flags, monkeypatch):
    flags = [*flags, *places("fast-weight", *PLACES), "--favor-features=4"]
    model = sharpened(20, flags)
    batch = translation_batch(model, batch=3, source=6)
    step, read = unittest.mock.Mock(wraps=native.step), unittest.mock.Mock(wraps=native.read)
    monkeypatch.setattr(native, "step", step)
    monkeypatch.setattr(native, "read", read)
    results = []
    # In one call for each layer; all layers in one call are test_compiled_step.py's.
    monkeypatch.setattr(captured_step, "program_of", lambda decoder: None)
    for backend in ("chunk", "native"):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        results.append(generate(model, batch, beam=4, max_len=8))
        assert (step.call_count > 4) == (backend == "native")
        model.prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=4)))
    # Beams read their sentence's memory of the source: it is there once.
    assert max(call.args[1].size(0) for call in read.call_args_list) == 3
    for found, expected in zip(*results):
        assert [h["tokens"].tolist() for h in found] == [h["tokens"].tolist() for h in expected]
        for a, b in zip(found, expected):
            torch.testing.assert_close(a["score"], b["score"], rtol=0, atol=1e-4)
            torch.testing.assert_close(a["positional_scores"], b["positional_scores"], rtol=0, atol=1e-4)


def test_a_search_without_beams_after_one_with_beams():
    flags = places("fast-weight", *PLACES)
    model, fresh = sharpened(20, flags), sharpened(20, flags)
    batch = translation_batch(model, batch=4, source=6)
    generate(model, batch, beam=2, max_len=8)
    found, expected = (generate(m, batch, beam=1, max_len=8) for m in (model, fresh))
    assert [h[0]["tokens"].tolist() for h in found] == [h[0]["tokens"].tolist() for h in expected]
