"""FastWeightAttention and its layers under torch's modes: autocast, checkpointing, torch.func, export; empty inputs."""

from typing import Any

import pytest
import torch
from fairseq.modules import MultiheadAttention
from test_attention import READINGS, WIDTH, build_reading, inputs
from tiny_models import build_lm, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fwp_fairseq.modules import FastWeightAttention, FastWeightConfig

# Every rule, feature map and normalisation, without all of their combinations.
CONFIGS = {
    "sum": {"feature_map": "elu", "key_normalization": "none", "attention_normalization": True},
    "delta": {"feature_map": "dpfp", "key_normalization": "sum"},
    "gated": {"feature_map": "favor", "key_normalization": "none"},
    "gated-delta": {"feature_map": "learned", "key_normalization": "sum", "attention_normalization": True},
    "fwm": {"feature_map": "tanh", "key_normalization": "none"},
}
every_rule = pytest.mark.parametrize("rule", CONFIGS)
every_reading = pytest.mark.parametrize("reading", READINGS)


def make(rule: str, reading: str, backend: str = "auto") -> FastWeightAttention:
    options: Any = {"update_rule": rule, "fast_weight_backend": backend, "favor_features": 5, **CONFIGS[rule]}
    return build_reading(FastWeightConfig(**options), reading)


@every_rule
@torch.no_grad()
def test_steps_within_autocast_go_on_from_one_another_as_the_parallel_pass_does(rule):
    attention, x = make(rule, "causal").float(), inputs(12).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parallel, _ = attention(x, x, x)
        state: dict = {}
        steps = [attention(x[t : t + 1], x[t : t + 1], x[t : t + 1], incremental_state=state)[0] for t in range(12)]
    kept = attention._get_input_buffer(state)["prev_key"]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(torch.cat(steps), parallel, rtol=5e-2, atol=0.1)


@every_rule
@every_reading
def test_autocast_rounds_projections_but_not_what_is_summed(rule, reading):
    """Between the projections and the output projection all is as without, for inputs that are rounded already."""
    attention = make(rule, reading, "chunk").float()
    attention.k_proj = attention.v_proj = attention.q_proj = nn.Identity()
    attention.out_proj = nn.Identity()
    for name in ("write_proj", "decay_proj"):
        if getattr(attention, name) is not None:
            setattr(attention, name, First(attention.num_heads))
    x = inputs(80).bfloat16().float()
    expected, _ = attention(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = attention(x, x, x)
    assert torch.equal(actual, expected)


class First(nn.Module):
    """A projection that autocast has nothing to do with."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.outputs]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["auto", "chunk"])
@every_rule
@every_reading
def test_attention_that_is_checkpointed_has_the_same_gradients(rule, reading, backend, use_reentrant):
    attention = make(rule, reading, backend).train()
    x = inputs(70).requires_grad_()
    found = []
    for run in (lambda x: attention(x, x, x)[0], lambda x: checkpointed(attention, x, use_reentrant)):
        torch.manual_seed(1)  # FAVOR+ draws
        run(x).sin().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in attention.parameters())])
        x.grad = None
        attention.zero_grad()
    torch.testing.assert_close(*found)


def checkpointed(attention: FastWeightAttention, x: Tensor, use_reentrant: bool) -> Tensor:
    return checkpoint(lambda x: attention(x, x, x)[0], x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("rule", ["delta", "fwm"])
def test_a_layer_with_checkpoint_activations_has_the_same_gradients(rule):
    flags = ["--update-rule", rule, "--fast-weight-backend", "chunk", "--dropout", "0"]
    found = []
    for extra in ([], ["--checkpoint-activations"]):
        torch.manual_seed(0)
        model = build_lm(*flags, *extra, "--no-token-positional-embeddings").train()
        torch.manual_seed(1)
        model(tokens(model, 2, 70))[0].sin().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)


@every_rule
@every_reading
def test_torch_func_gives_the_gradients_of_each_sentence(rule, reading):
    attention = make(rule, reading)
    parameters = dict(attention.named_parameters())
    x = inputs(9)

    def loss(parameters: dict[str, Tensor], sentence: Tensor) -> Tensor:
        whole = sentence[:, None]
        return torch.func.functional_call(attention, parameters, (whole, whole, whole))[0].sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, x)
    attention(x, x, x)[0].sin().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@every_rule
@torch.no_grad()
def test_vmap_goes_through_steps_of_decoding(rule):
    attention, x = make(rule, "causal"), inputs(4)

    def decode(sentence: Tensor) -> Tensor:
        state: dict = {}
        steps = [token[None, None] for token in sentence]
        return torch.cat([attention(step, step, step, incremental_state=state)[0] for step in steps])

    torch.testing.assert_close(torch.func.vmap(decode, in_dims=1)(x)[:, :, 0], attention(x, x, x)[0].transpose(0, 1))


class Sentences(nn.Module):
    """Attention of sentences to themselves."""

    def __init__(self, attention: FastWeightAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, padding)[0]


@pytest.mark.parametrize(
    "rule, reading, backend, grad",
    [
        ("gated-delta", "causal", "chunk", False),
        ("gated-delta", "causal", "auto", True),
        ("gated-delta", "two-directions", "auto", False),
        ("delta", "cross", "auto", True),
    ],
)
def test_exported_attention_takes_any_batch_and_length(rule, reading, backend, grad):
    module = Sentences(make(rule, reading, backend))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")

    def sentences(length: int, batch: int) -> tuple[Tensor, Tensor]:
        return inputs(length, batch), torch.arange(length).expand(batch, -1) >= max(1, length - 2)

    with torch.set_grad_enabled(grad):
        dims = ({0: length, 1: batch}, {0: batch, 1: length})
        exported = torch.export.export(module, sentences(5, 3), dynamic_shapes=dims).module()
        for size in ((5, 3), (1, 1), (260, 2)):
            torch.testing.assert_close(exported(*sentences(*size)), module(*sentences(*size)))


# (T, S, B): no sentences, no queries, no source.
@pytest.mark.parametrize("queries, source, batch", [(2, 3, 0), (0, 3, 2), (2, 0, 2), (0, 0, 2)])
@pytest.mark.parametrize("backend", ["auto", "chunk", "loop"])
@every_rule
def test_empty_cross_attention_has_the_gradients_of_softmax(rule, backend, queries, source, batch):
    softmax = MultiheadAttention(WIDTH, 2, encoder_decoder_attention=True).double()
    # fairseq's own takes anything but an empty source.
    for attention in (make(rule, "cross", backend), *([softmax] if source else [])):
        q, kv = inputs(queries, batch).requires_grad_(), inputs(source, batch).requires_grad_()
        out, _ = attention(q, kv, kv, key_padding_mask=torch.zeros(batch, source, dtype=torch.bool))
        assert out.shape == q.shape
        out.sum().backward()
        assert q.grad is not None and kv.grad is not None and not kv.grad.any()
        assert all(x.grad is not None for x in attention.parameters()) and not attention.k_proj.weight.grad.any()


@pytest.mark.parametrize("length, batch", [(3, 0), (0, 2), (1, 0)])
@pytest.mark.parametrize("reading", READINGS[:3])
@every_rule
def test_empty_self_attention_has_gradients_of_zero(rule, reading, length, batch):
    attention, x = make(rule, reading), inputs(length, batch).requires_grad_()
    out, _ = attention(x, x, x, key_padding_mask=torch.zeros(batch, length, dtype=torch.bool))
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None and all(p.grad is not None and not p.grad.any() for p in attention.parameters())


@every_rule
@torch.no_grad()
def test_a_batch_of_no_sentences_can_be_decoded(rule):
    attention, x = make(rule, "causal").float(), inputs(1, 0).float()
    cross = make(rule, "cross").float()
    state: dict = {}
    for _ in range(3):
        assert attention(x, x, x, incremental_state=state)[0].shape == x.shape
        assert cross(x, x, x, incremental_state=state, static_kv=True)[0].shape == x.shape
        for module in (attention, cross):
            module.reorder_incremental_state(state, torch.zeros(0, dtype=torch.long))
