"""FastWeightAttention behaves as fairseq expects of an attention module, for every combination that is allowed."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import backends
from registered import UNBOUNDED_RULES, another_value

from fwp_fairseq.modules import FastWeightAttention, FastWeightConfig, FastWeightCrossAttention
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.modules.places import PLACES
from fwp_fairseq.modules.stages import STAGES
from fwp_fairseq.ops import (
    FEATURE_MAPS,
    KEY_NORMALIZATIONS,
    UPDATE_RULES,
    fast_weight_memory,
    fast_weight_scan,
)

WIDTH, HEADS = 8, 2


def allowed(config: FastWeightConfig) -> bool:
    try:
        config.check(WIDTH, HEADS, "decoder")
    except ValueError:
        return False
    return True


CONFIGS = [
    config
    for rule, feature_map, normalization, attention_normalization in itertools.product(
        UPDATE_RULES,
        FEATURE_MAPS,
        KEY_NORMALIZATIONS,
        (False, True),
    )
    if allowed(
        config := FastWeightConfig(
            update_rule=rule,
            feature_map=feature_map,
            key_normalization=normalization,
            attention_normalization=attention_normalization,
            favor_features=5,
        )
    )
]
# Each option of the stages with each rule, and all of them together.
_EACH = [{option.name: another_value(option)} for stage in STAGES for option in stage.options]
_ALL = {name: value for option in _EACH for name, value in option.items()}
CONFIGS += [
    config
    for rule, options in itertools.product(UPDATE_RULES, [*_EACH, _ALL])
    if allowed(config := FastWeightConfig(update_rule=rule, **options))
    and not {*options} & {*config.without_effect(PLACES)}
]


def name_of(config: FastWeightConfig) -> str:
    more = ["an"] if config.attention_normalization else []
    more += [f"{name}={value}" for name, other in _ALL.items() if (value := getattr(config, name)) == other]
    return "-".join([config.update_rule, config.feature_map, config.key_normalization, *more])


every_config = pytest.mark.parametrize("config", CONFIGS, ids=name_of)


def build(config: FastWeightConfig, kind: type[FastWeightAttention] = FastWeightAttention, **kwargs):
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, config, **kwargs).double().eval()


def build_cross(config: FastWeightConfig) -> FastWeightCrossAttention:
    return build(config, FastWeightCrossAttention)


READINGS = ("causal", "whole", "two-directions", "cross")


def build_reading(config: FastWeightConfig, reading: str) -> FastWeightAttention:
    """Attention that reads in one of READINGS."""
    if reading == "cross":
        return build_cross(config)
    if reading == "two-directions":
        config = replace(config, encoder_reading=reading, encoder_slots=0)
    return build(config, causal=reading == "causal")


def inputs(length: int, batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(length, batch, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def buffer(attention: FastWeightAttention, incremental_state: dict) -> dict:
    return attention._get_input_buffer(incremental_state)


def test_the_combinations_have_everything_that_is_registered():
    assert {config.update_rule for config in CONFIGS} == {*UPDATE_RULES}
    assert {config.feature_map for config in CONFIGS} == {*FEATURE_MAPS}
    assert {config.key_normalization for config in CONFIGS} == {*KEY_NORMALIZATIONS}
    normalized = {config.update_rule for config in CONFIGS if config.attention_normalization}
    assert normalized == {*UNBOUNDED_RULES}
    assert all(any(getattr(config, name) == value for config in CONFIGS) for name, value in _ALL.items())


@every_config
@torch.no_grad()
def test_token_by_token_equals_parallel_and_the_state_never_grows(config):
    attention = build(config, causal=True)
    x = inputs(9)
    parallel, weights = attention(x, x, x)
    assert weights is None
    state: dict = {}
    sizes = set()
    for t in range(9):
        step, _ = attention(x[t : t + 1], x[t : t + 1], x[t : t + 1], incremental_state=state)
        torch.testing.assert_close(step[0], parallel[t])
        sizes.add(tuple((name, tensor.shape) for name, tensor in buffer(attention, state).items()))
    rows = attention.features.size
    memory = ("prev_key", (3, HEADS, rows, WIDTH // HEADS))
    normalizer = [("normalizer", (3, HEADS, rows, 1))] if config.attention_normalization else []
    assert len(sizes) == 1 and {memory, *normalizer} <= {*sizes.pop()}


@every_config
@torch.no_grad()
def test_a_prefix_of_many_tokens_then_steps_equals_parallel(config):
    attention = build(config, causal=True)
    x = inputs(8)
    parallel, _ = attention(x, x, x)
    state: dict = {}
    parts = [attention(x[part], x[part], x[part], incremental_state=state)[0] for part in (slice(0, 5), [5], [6], [7])]
    torch.testing.assert_close(torch.cat(parts), parallel)


@every_config
@torch.no_grad()
def test_what_follows_padding_goes_on_from_what_was_before_it(config):
    attention = build(config, causal=True)
    x = inputs(8)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = padding[2, 1:] = padding[2, :1] = True
    state: dict = {}
    attention(x[:6], x[:6], x[:6], padding, state)
    found = torch.cat([attention(x[[t]], x[[t]], x[[t]], incremental_state=state)[0] for t in (6, 7)])
    for row in range(3):
        alone = torch.cat([x[:6, row : row + 1][~padding[row]], x[6:, row : row + 1]])
        torch.testing.assert_close(found[:, row], attention(alone, alone, alone)[0][-2:, 0])


@every_config
@torch.no_grad()
def test_causal_attention_does_not_see_the_future(config):
    attention = build(config, causal=True)
    x, other = inputs(6), inputs(6)
    other[4:] += 1
    torch.testing.assert_close(attention(x, x, x)[0][:4], attention(other, other, other)[0][:4])


@every_config
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reading", READINGS[:3])
@torch.no_grad()
def test_padding_is_a_no_op(config, reading, side):
    attention = build_reading(config, reading)
    x = inputs(7)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    for row, padded in enumerate((0, 2, 5)):
        if padded:
            padding[row, slice(padded) if side == "left" else slice(7 - padded, None)] = True
    out, _ = attention(x, x, x, key_padding_mask=padding)
    assert torch.isfinite(out).all()
    for row in range(3):
        keep = ~padding[row]
        alone = x[keep, row : row + 1]
        torch.testing.assert_close(out[keep, row], attention(alone, alone, alone)[0][:, 0])


@every_config
@torch.no_grad()
def test_padding_is_a_no_op_in_cross_attention_and_in_incremental_decoding(config):
    cross = build_cross(config)
    source, query = inputs(7), inputs(4, seed=2)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, :3] = True
    out, _ = cross(query, source, source, key_padding_mask=padding)
    alone = source[3:, 1:2]
    torch.testing.assert_close(out[:, 1], cross(query[:, 1:2], alone, alone)[0][:, 0])

    causal = build(config, causal=True)
    state: dict = {}
    for t, padded in enumerate((True, True, False, False)):
        mask = torch.tensor([[False], [padded], [False]])
        step, _ = causal(query[t : t + 1], query[t : t + 1], query[t : t + 1], mask, state)
    short = query[2:, 1:2]
    torch.testing.assert_close(step[0, 1], causal(short, short, short)[0][-1, 0])


@every_config
@torch.no_grad()
def test_whole_memory_lets_every_query_read_every_token(config):
    attention = build(config)
    x = inputs(6)
    out, _ = attention(x, x, x)
    one_by_one = torch.cat([attention(x[t : t + 1], x, x)[0] for t in range(6)])
    torch.testing.assert_close(out, one_by_one)
    changed = x.clone()
    changed[-1] += 1
    assert (attention(x[:1], changed, changed)[0] - out[:1]).abs().max() > 1e-6


@every_config
@torch.no_grad()
def test_cross_attention_projects_the_source_once_and_keeps_one_matrix(config):
    cross = build_cross(config)
    source, query = inputs(7), inputs(4, seed=2)
    whole, _ = cross(query, source, source, static_kv=True)
    state: dict = {}
    calls = []
    cross.k_proj.register_forward_hook(lambda *_: calls.append(1))
    for t in range(4):
        step, _ = cross(query[t : t + 1], source, source, incremental_state=state, static_kv=True)
        torch.testing.assert_close(step[0], whole[t])
    assert len(calls) == 1
    rows = cross.features.size if cross.slots is None else cross.slots.size
    assert buffer(cross, state)["prev_key"].shape == (3, HEADS, rows, WIDTH // HEADS)


@every_config
@torch.no_grad()
def test_beams_share_their_sentence_s_memory_and_survive_finished_sentences(config):
    cross = build_cross(config)
    source, query = inputs(5), inputs(3, batch=6, seed=2)
    beam_source = source.repeat_interleave(2, dim=1)
    expected, _ = cross(query, beam_source, beam_source)
    state: dict = {}
    first, _ = cross(query[:1], beam_source, beam_source, incremental_state=state, static_kv=True)
    torch.testing.assert_close(first[0], expected[0])
    assert buffer(cross, state)["prev_key"].size(0) == 3
    # Beams change places within their sentences.
    cross.reorder_incremental_state(state, torch.tensor([1, 0, 2, 2, 5, 4]))
    second, _ = cross(query[1:2], beam_source, beam_source, incremental_state=state, static_kv=True)
    torch.testing.assert_close(second[0], expected[1])
    # The sentence in the middle is finished and leaves the batch.
    left = torch.tensor([1, 0, 4, 4])
    cross.reorder_incremental_state(state, left)
    rows = [0, 1, 4, 5]
    third, _ = cross(query[2:, rows], None, None, incremental_state=state, static_kv=True)
    torch.testing.assert_close(third[0], expected[2, rows])


@torch.no_grad()
def test_rows_of_different_sentences_never_share_a_memory():
    """Whatever was said of beams, and also when the rows of a sentence leave one by one."""
    cross = build_cross(CONFIGS[0])
    source, query = inputs(5, batch=4), inputs(3, batch=4, seed=2)
    expected, _ = cross(query, source, source)
    state: dict = {}
    first, _ = cross(query[:1], source, source, incremental_state=state, static_kv=True)
    torch.testing.assert_close(first[0], expected[0])
    cross.reorder_incremental_state(state, torch.tensor([3, 1]))
    second, _ = cross(query[1:2, [3, 1]], None, None, incremental_state=state, static_kv=True)
    torch.testing.assert_close(second[0], expected[1, [3, 1]])
    twice = torch.tensor([0, 0, 1, 1])
    expected, _ = cross(query, source[:, twice], source[:, twice])
    state = {}
    cross(query[:1], source[:, twice], source[:, twice], incremental_state=state, static_kv=True)
    assert buffer(cross, state)["prev_key"].size(0) == 2
    for left in ([0, 3], [1]):
        cross.reorder_incremental_state(state, torch.tensor(left))
    found, _ = cross(query[1:2, [3]], None, None, incremental_state=state, static_kv=True)
    torch.testing.assert_close(found[0], expected[1, [3]])


@every_config
@torch.no_grad()
def test_reordered_rows_go_on_from_the_history_they_were_given(config):
    attention = build(config, causal=True)
    x, order = inputs(4), torch.tensor([2, 2, 0])
    state: dict = {}
    for t in range(3):
        attention(x[t : t + 1], x[t : t + 1], x[t : t + 1], incremental_state=state)
    attention.reorder_incremental_state(state, order)
    step, _ = attention(x[3:], x[3:], x[3:], incremental_state=state)
    history = torch.cat([x[:3, order], x[3:]])
    torch.testing.assert_close(step[0], attention(history, history, history)[0][-1])


@every_config
def test_gradients_reach_every_parameter_and_are_finite(config):
    for reading in READINGS[:3]:
        attention = build_reading(config, reading).train()
        x = inputs(6).requires_grad_()
        attention(x, x, x)[0].square().sum().backward()
        for name, parameter in [*attention.named_parameters(), ("x", x)]:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_attention_is_composed_of_projections_features_rule_and_operator():
    """The delta rule with sum-normalised ELU+1, spelt out."""
    config = FastWeightConfig(update_rule="delta", feature_map="elu")
    attention = build(config, causal=True)
    x = inputs(5)
    q, k, v = (
        projection(x).view(5, 3, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
    q, k = (y / y.sum(dim=-1, keepdim=True) for y in (q, k))
    beta = torch.sigmoid(x @ attention.write_proj.weight.T).permute(1, 2, 0)
    out, _ = fast_weight_scan(q, k, v, beta, beta, backend="loop")
    expected = attention.out_proj(out.permute(2, 0, 1, 3).reshape(5, 3, WIDTH))
    torch.testing.assert_close(attention(x, x, x)[0], expected)
    memory = q @ fast_weight_memory(k, v, beta, beta, backend="loop")
    whole = build(config)
    whole.load_state_dict(attention.state_dict())
    expected = attention.out_proj(memory.permute(2, 0, 1, 3).reshape(5, 3, WIDTH))
    torch.testing.assert_close(whole(x, x, x)[0], expected)


@backends()
def test_two_directions_are_causal_attention_to_the_words_and_to_those_in_reverse(backend):
    """Each with half of the heads; values and gradients, against the token loop."""
    kinds = {(c.update_rule, c.attention_normalization): c for c in CONFIGS if not c.short_convolution}
    for config in kinds.values():
        if not allowed(with_backend := replace(config, fast_weight_backend=backend)):
            continue
        both = build_reading(with_backend, "two-directions")
        causal = build(replace(config, fast_weight_backend="loop"), causal=True)
        assert both.load_state_dict(causal.state_dict())
        causal.out_proj = torch.nn.Identity()
        x, half = inputs(5), WIDTH // 2
        read = torch.cat([causal(x, x, x)[0][..., :half], causal(*[x.flip(0)] * 3)[0].flip(0)[..., half:]], dim=-1)
        expected, found = both.out_proj(read), both(x, x, x)[0]
        torch.testing.assert_close(found, expected)
        wanted = [name for name, _ in causal.named_parameters()]
        gradients = (
            torch.autograd.grad(out.sin().sum(), [module.get_parameter(name) for name in wanted])
            for out, module in ((found, both), (expected, causal))
        )
        torch.testing.assert_close(*gradients)


def test_tokens_before_the_first_query_are_written_first():
    """What fairseq's --cross-self-attention passes: encoder output, then the target."""
    attention = build(FastWeightConfig(), causal=True)
    x = inputs(9)
    torch.testing.assert_close(attention(x[6:], x, x)[0], attention(x, x, x)[0][6:])


def test_write_strength_has_no_bias_unless_asked_for():
    assert build(FastWeightConfig()).write_proj.bias is None
    assert build(FastWeightConfig(write_strength_bias=True)).write_proj.bias is not None
    assert build(FastWeightConfig(update_rule="sum")).write_proj is None


def test_biases_of_the_projections_can_be_left_out():
    attention = build(FastWeightConfig(no_attention_bias=True))
    assert not any(name.endswith("bias") for name, _ in attention.named_parameters())


def test_initialisation_follows_fairseq_s_attention():
    from fairseq.modules import MultiheadAttention

    torch.manual_seed(0)
    ours = FastWeightAttention(512, 8, FastWeightConfig())
    theirs = MultiheadAttention(512, 8, self_attention=True)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        mine, other = getattr(ours, name).weight, getattr(theirs, name).weight
        torch.testing.assert_close(mine.std(), other.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(mine.abs().max(), other.abs().max(), rtol=0.01, atol=0)
    assert ours.out_proj.bias.abs().max() == 0


def test_dropout_acts_in_training_only_and_on_what_is_read():
    attention = build(FastWeightConfig(), causal=True, dropout=0.5)
    x = inputs(6)
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.train()
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.dropout_module.p = 1.0
    torch.testing.assert_close(attention(x, x, x)[0], attention.out_proj.bias.expand(6, 3, WIDTH))


def test_favor_draws_anew_in_training_and_is_fixed_in_evaluation():
    features = KeyFeatures("favor", "sum", 4, favor_features=3)
    x = torch.randn(2, 4)
    fixed = features.projection.clone()
    features.train()
    drawn = [features(x)[0] for _ in range(2)]
    assert not torch.equal(*drawn) and torch.equal(features.projection, fixed)
    queries, keys = features(x, x)
    assert torch.equal(queries, keys)  # one call, one draw
    features.eval()
    assert torch.equal(features(x)[0], features(x)[0])
    assert "projection" in features.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_models_keep_a_float32_state(dtype):
    attention = build(FastWeightConfig(), causal=True).to(dtype)
    x = inputs(4).to(dtype)
    state: dict = {}
    out, _ = attention(x, x, x, incremental_state=state)
    step, _ = attention(x[:1], x[:1], x[:1], incremental_state=state)
    assert out.dtype == step.dtype == dtype
    assert buffer(attention, state)["prev_key"].dtype == torch.float32


def test_a_mask_over_the_whole_memory_is_refused():
    attention = build(FastWeightConfig())
    x = inputs(3)
    with pytest.raises(ValueError, match="attn_mask needs softmax"):
        attention(x, x, x, attn_mask=torch.zeros(3, 3))
