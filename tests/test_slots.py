"""Cross-attention by slots: what it is, and that with a slot for each token it is softmax attention."""

import pytest
import torch
from fairseq.modules import MultiheadAttention
from test_attention import HEADS, WIDTH, build_cross, inputs
from tiny_models import build_translation, places

from fwp_fairseq.modules import FastWeightConfig, FastWeightCrossAttention, fast_weight_attention

SIZE = WIDTH // HEADS


def build_slots(slots: int) -> FastWeightCrossAttention:
    return build_cross(FastWeightConfig(cross_slots=slots))


def read_one_by_one(cross: FastWeightCrossAttention, query: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What queries (T, WIDTH) read of a source (S, WIDTH), with loops over heads and slots."""
    slots, heads = cross.slots.size, []
    for head in range(HEADS):
        here = slice(head * SIZE, (head + 1) * SIZE)
        q, k, v = cross.q_proj(query)[:, here], cross.k_proj(source)[:, here], cross.v_proj(source)[:, here]
        logits = cross.slot_proj(source)[:, head * slots : (head + 1) * slots].clone()
        for s in range(len(source)):
            logits[s, s * slots // max(slots, len(source))] += cross.slots.own[head, 0, 0]
        filled = range(min(slots, len(source)))
        keys = torch.stack([logits[:, j].softmax(0) @ k for j in filled])
        values = torch.stack([logits[:, j].softmax(0) @ v for j in filled])
        heads.append((q @ keys.T / SIZE**0.5).softmax(-1) @ values)
    return cross.out_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("length", [1, 3, 4, 11])
@torch.no_grad()
def test_queries_choose_among_means_of_the_source(length):
    cross = build_slots(4)
    cross.slots.own.uniform_(-1, 1)
    query, source = inputs(5), inputs(length, seed=2)
    found, _ = cross(query, source, source)
    for row in range(3):
        torch.testing.assert_close(found[:, row], read_one_by_one(cross, query[:, row], source[:, row]))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_with_a_slot_for_each_token_it_is_softmax_attention(side):
    cross = build_slots(7)
    cross.slots.own.fill_(100)
    softmax = MultiheadAttention(WIDTH, HEADS, encoder_decoder_attention=True).double().eval()
    softmax.load_state_dict({name: x for name, x in cross.state_dict().items() if name in softmax.state_dict()})
    query, source = inputs(5), inputs(7, seed=2)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, :3] = padding[2, :6] = True
    padding = padding if side == "left" else padding.flip(1)
    expected, weights = softmax(query, source, source, padding, need_head_weights=True)
    found, found_weights = cross(query, source, source, padding, need_head_weights=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_weights.mean(0), weights)


def test_all_that_slots_learn_with_makes_a_difference():
    cross = build_slots(4)
    query, source = inputs(5), inputs(7, seed=2)
    cross(query, source, source)[0].square().sum().backward()
    learning = {name: x.grad.abs().max() for name, x in cross.named_parameters() if name.startswith("slot")}
    assert learning.keys() == {"slots.own", "slot_proj.weight"} and min(learning.values()) > 1e-6


@torch.no_grad()
def test_a_source_of_padding_alone_gives_what_one_without_tokens_gives():
    cross, source = build_slots(4), inputs(6)
    found, expected = (cross(inputs(2), x, x, torch.ones(3, len(x), dtype=torch.bool))[0] for x in (source, source[:0]))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_source_without_tokens_gives_what_a_memory_without_associations_gives():
    nothing = torch.zeros(0, 3, WIDTH).double()
    found, expected = (build_cross(FastWeightConfig(cross_slots=n))(inputs(2), nothing, nothing)[0] for n in (4, 0))
    torch.testing.assert_close(found, expected)


def test_slots_have_no_feature_map_and_no_rule_and_other_places_have_no_slots():
    model = build_translation(*places("fast-weight"), "--update-rule", "gated-delta", "--cross-slots", "3")
    layer = model.decoder.layers[0]
    assert layer.encoder_attn.slots.size == 3 and layer.encoder_attn.write_proj is None
    assert layer.self_attn.slots is None and layer.self_attn.write_proj is not None
    assert "sum rule" in str(layer.encoder_attn) and "3" in str(layer.encoder_attn.slots)


def test_a_slot_is_a_row_of_the_memory_that_a_backend_is_chosen_for(monkeypatch):
    monkeypatch.setattr(fast_weight_attention, "choose_backend", lambda *given: f"for {given[3]} rows")
    assert "backend auto (for 300 rows)" in str(build_slots(300))


@pytest.mark.parametrize("slots", [1, -1, 1025])
def test_a_number_of_slots_that_there_cannot_be_is_refused(slots):
    with pytest.raises(ValueError, match=f"--cross-slots is {slots}, allowed is 0, for none, or 2 to 1024"):
        build_translation(*places("fast-weight", "cross-attention"), "--cross-slots", str(slots))


def test_a_backend_that_cannot_write_slots_is_refused_with_their_flag():
    with pytest.raises(ValueError, match="--fast-weight-backend is fla, which has .* without .*--encoder-slots"):
        build_translation(*places("fast-weight"), "--encoder-slots", "3", "--fast-weight-backend", "fla")
