"""The weights by which values are read: exact for every rule, and what alignments are made of."""

import pytest
import torch
from conftest import backends
from registered import UNBOUNDED_RULES, gates_of
from test_attention import CONFIGS, READINGS, build_cross, build_reading, inputs, name_of
from tiny_models import build_translation, places, translation_batch
from torch import Tensor, nn

from fwp_fairseq.ops import (
    Gates,
    fast_weight_memory,
    fast_weight_read,
    fast_weight_scan,
    implied_attention,
    normalized_memory,
    normalized_read,
    normalized_scan,
)
from fwp_fairseq.ops.implied_attention import BLOCK

LONGER_THAN_A_BLOCK = BLOCK + 5


def draw(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    q, k = torch.rand(2, 2, 2, length, 5, dtype=dtype) / 2
    v = torch.randn(2, 2, length, 3, dtype=dtype)
    beta, alpha = torch.rand(2, 2, 2, length, dtype=dtype) * 0.9 + 0.05
    return q, k, v, beta, alpha


@backends()
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
def test_weighted_values_are_what_is_read(rule, normalized, backend):
    for length in (1, 7, LONGER_THAN_A_BLOCK) if backend != "loop" else (7,):
        q, k, v, beta, alpha = draw(length)
        gates = gates_of(rule, beta, alpha)
        weights = implied_attention(q, k, gates, normalized=normalized, backend=backend)
        scan = normalized_scan(q, k, v, gates) if normalized else fast_weight_scan(q, k, v, *gates)
        assert weights.shape == (2, 2, length, length) and torch.equal(weights, weights.tril())
        torch.testing.assert_close(weights @ v, scan[0])

        weights = implied_attention(q[:, :, :3], k, gates, causal=False, normalized=normalized, backend=backend)
        if normalized:
            read = normalized_read(q[:, :, :3], *normalized_memory(k, v, gates))
        else:
            read = fast_weight_read(q[:, :, :3], fast_weight_memory(k, v, *gates))
        torch.testing.assert_close(weights @ v, read)


@pytest.mark.parametrize("causal", [True, False])
def test_those_of_the_normalised_sum_rule_are_a_distribution(causal):
    q, k, _, _, _ = draw(9)
    weights = implied_attention(q, k, causal=causal, normalized=True)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64))


def test_padding_has_no_weight_and_a_key_that_was_written_anew_keeps_none():
    q, k, _, beta, _ = draw(4)
    padding = torch.tensor([False, True, False, False]).expand(2, 2, 4)
    assert (implied_attention(q, k, gates_of("delta", beta, None, padding))[..., 1] == 0).all()
    same = torch.nn.functional.normalize(torch.ones(1, 1, 3, 4), dim=-1)
    ones = torch.ones(1, 1, 3)
    torch.testing.assert_close(implied_attention(same, same, Gates(ones, ones))[0, 0], torch.eye(3))


def test_they_have_gradients():
    q, k, _, beta, _ = (x.requires_grad_() for x in draw(3))
    torch.autograd.gradcheck(lambda q, k, beta: implied_attention(q, k, Gates(beta, beta)), (q, k, beta))


# --- Attention -------------------------------------------------------------------------------------------------------

unbounded = pytest.mark.parametrize("config", [c for c in CONFIGS if c.rule.max_norm is None], ids=name_of)


@unbounded
@pytest.mark.parametrize("reading", READINGS)
@torch.no_grad()
def test_attention_gives_the_weights_by_which_it_reads(config, reading):
    attention = build_reading(config, reading)
    query, key = inputs(6), inputs(6 if reading != "cross" else 9)
    padding = torch.zeros(3, len(key), dtype=torch.bool)
    padding[1, -2:] = True
    expected, nothing = attention(query, key, key, padding)
    found, weights = attention(query, key, key, padding, need_head_weights=True)
    assert nothing is None and weights.shape == (attention.num_heads, 3, 6, len(key))
    assert torch.equal(found, expected)
    torch.testing.assert_close(attention(query, key, key, padding, need_weights=True)[1], weights.mean(0))
    assert (weights[:, 1, :, -2:] == 0).all()
    if not config.read_layer_norm and not config.output_gate and not config.short_convolution:
        attention.out_proj = nn.Identity()
        values = attention.v_proj(key).unflatten(-1, (attention.num_heads, -1)).permute(2, 1, 0, 3)
        read = (weights @ values).permute(2, 1, 0, 3).flatten(2)
        torch.testing.assert_close(attention(query, key, key, padding)[0], read)


@unbounded
@torch.no_grad()
def test_decoding_gives_the_weights_of_the_parallel_pass(config):
    cross, source, query = build_cross(config), inputs(7), inputs(4, batch=6)
    beams = source.repeat_interleave(2, dim=1)
    _, expected = cross(query, beams, beams, need_head_weights=True)
    state: dict = {}
    for t in range(4):
        _, weights = cross(query[t : t + 1], beams, beams, incremental_state=state, need_head_weights=True)
        torch.testing.assert_close(weights[:, :, 0], expected[:, :, t])


def test_without_weights_wanted_a_training_pays_nothing_and_decoding_keeps_nothing_for_them():
    config = next(c for c in CONFIGS if c.update_rule == "delta")
    cross, x = build_cross(config), inputs(3)
    assert cross.train()(x, x, x, need_head_weights=True)[1] is None
    cross.with_weights = True
    assert cross(x, x, x, need_head_weights=True)[1] is not None
    cross.with_weights = False
    state: dict = {}
    with torch.no_grad():
        cross.eval()(x[:1], x, x, incremental_state=state, need_head_weights=True)
    assert cross._get_input_buffer(state).keys() == {"prev_key"}


@pytest.mark.parametrize("kind", ["softmax", "fast-weight"])
def test_a_decoder_s_attention_is_a_distribution_that_can_be_learned_from(kind):
    model = build_translation(*places(kind, "cross-attention")).train()
    if kind == "fast-weight":
        model.decoder.give_weights(True)
    _, extra = model(**translation_batch(model))
    (attn,) = extra["attn"]
    assert (attn[0] > 0).all() or kind == "softmax"
    torch.testing.assert_close(attn.sum(-1), torch.ones(attn.shape[:2]))
    attn[0, 0, 0].log().backward()
    assert model.decoder.layers[-1].encoder_attn.k_proj.weight.grad.abs().sum() > 0
