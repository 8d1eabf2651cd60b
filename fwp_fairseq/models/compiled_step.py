"""Decoding on a processor with all layers in one call: no Python between the some hundred operators of a token.

What the layers do is written down as a program when a search has decoded its first token, from their modules, and runs
in compiled code (``csrc/decoder_step.cpp``) from the second token on. The rest, words and positions, is fairseq's own
forward pass, of a decoder whose layers are that program.

A program belongs to one search, and reads the weights that there were at its beginning. A decoder that does anything
else than what is written here decodes as without this file: ``program_of``.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from fairseq import utils
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import MEMORY, NORMALIZER, AttentionState
from fwp_fairseq.modules.carried_state import IncrementalState
from fwp_fairseq.modules.convolved_softmax import ConvolvedSoftmaxAttention
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.modules.fast_weight_cross_attention import FastWeightCrossAttention
from fwp_fairseq.modules.fast_weight_layers import FastWeightDecoderLayer
from fwp_fairseq.modules.few_rows_linear import product_of
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.modules.stages import ShortConvolution, TokenGates
from fwp_fairseq.ops import native

_ACTIVATIONS = ("relu", "gelu")
# Tensors that cross-attention has of the sources, of softmax and of fast weights.
_OF_SOURCES = 3


class Program(NamedTuple):
    """A native.DecoderStep for the layers of a decoder, and whether also for what comes after them: logits."""

    compiled: Any
    is_whole: bool


def program_of(decoder: Any) -> Optional[Program]:
    """The layers of ``decoder`` as a program, or None if they are, or do, anything that it cannot do.

    The modules are known to be fairseq's, torch's and this package's own, in evaluation, without hooks and dropout.
    """
    compiled = native.new_decoder_step()
    is_whole = decoder.adaptive_softmax is None
    histories = itertools.count()
    try:
        for index, layer in enumerate(decoder.layers):
            _write_layer(compiled, layer, index, index == len(decoder.layers) - 1, histories)
        if is_whole:
            if decoder.layer_norm is not None:
                _write_norm(compiled, decoder.layer_norm)
            for layer in (decoder.project_out_dim, decoder.output_projection):
                if layer is not None:
                    _write_products(compiled, layer)
    except _NotCovered:
        return None
    return Program(compiled, is_whole)


class _NotCovered(Exception):
    """A program cannot do it."""


def _need(*conditions: bool) -> None:
    if not all(conditions):
        raise _NotCovered


def _write_layer(program: Any, layer: Any, index: int, is_last: bool, histories: Iterator[int]) -> None:
    _need(
        type(layer) is FastWeightDecoderLayer,
        not (layer.cross_self_attention or layer.onnx_trace),
        all(x is None for x in (layer.c_attn, layer.attn_ln, layer.ffn_layernorm, layer.w_resid)),
    )
    with _Residual(program, layer, layer.self_attn_layer_norm):
        _write_self_attention(program, layer.self_attn, index, histories)
    if layer.encoder_attn is not None:
        with _Residual(program, layer, layer.encoder_attn_layer_norm):
            _write_cross_attention(program, layer.encoder_attn, _OF_SOURCES * index, is_last, histories)
    with _Residual(program, layer, layer.final_layer_norm):
        _write_products(program, layer.fc1)
        names = [x for x in _ACTIVATIONS if layer.activation_fn is utils.get_activation_fn(x)]
        _need(len(names) == 1)
        program.activate(names[0])
        _write_products(program, layer.fc2)


class _Residual:
    """What is written within this context is added to its input, with the layer norm where the layer has it."""

    def __init__(self, program: Any, layer: Any, norm: Any) -> None:
        self.program, self.norm_first, self.norm = program, layer.normalize_before, norm

    def __enter__(self) -> None:
        self.program.keep()
        if self.norm_first:
            self._normalize()

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            self.program.add()
            if not self.norm_first:
                self._normalize()

    def _normalize(self) -> None:
        _write_norm(self.program, self.norm)


def _write_norm(program: Any, norm: Any) -> None:
    parameters = norm._parameters.get("weight"), norm._parameters.get("bias")
    _need(type(norm) is nn.LayerNorm, len(norm.normalized_shape) == 1)
    _need(*(type(x) is nn.Parameter and x.dtype == torch.float32 for x in parameters))
    program.normalize(*parameters, norm.eps)


def _write_products(program: Any, *layers: nn.Module) -> None:
    weights: list[Tensor] = []
    others: list[tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]] = []
    for product in map(product_of, layers):
        if product is None or product.weight.stride(1) != 1:
            raise _NotCovered
        if product.integers is None:
            weights.append(product.weight)
            others.append((product.bias, None, None))
        else:
            packed, offset, worth = product.integers.of(product.weight)
            weights.append(packed)
            others.append((product.bias, offset, worth))
    program.multiply(layers[0].in_features, weights, *map(list, zip(*others)))


def _write_self_attention(program: Any, attention: Any, index: int, histories: Iterator[int]) -> None:
    gates = attention.gates
    rule = attention.rule.as_sums(**gates.rule_options)
    _need(
        type(attention) is FastWeightAttention,
        type(gates) is TokenGates,
        rule is not None,
        _is_compiled(attention),
    )
    _write_products(program, *(getattr(attention, name) for name, _ in attention._layers))
    _write_mixing(program, attention, "qkv", histories)
    takes = attention.rule.takes
    program.remember(
        index,
        attention.num_heads,
        *_address(attention.features),
        attention.attention_normalization,
        "beta" in takes,
        "alpha" in takes,
        gates.range,
        [list(x or ()) for x in rule],
    )
    _write_products(program, attention.out_proj)


def _write_cross_attention(
    program: Any, attention: Any, first: int, gives_weights: bool, histories: Iterator[int]
) -> None:
    _write_products(program, attention.q_proj)
    if type(attention) is FastWeightCrossAttention and attention.slots is not None:
        _need(not attention.gives_weights)
        _write_mixing(program, attention, "q", histories)
        program.look_at(first, attention.num_heads, False)
    elif type(attention) is FastWeightCrossAttention:
        _need(_is_compiled(attention), not attention.gives_weights)
        _write_mixing(program, attention, "q", histories)
        features = _address(attention.features)
        program.recall(first, attention.num_heads, *features, attention.attention_normalization)
    else:
        if type(attention) is ConvolvedSoftmaxAttention:
            _write_convolution(program, attention.short_convolution, attention.num_heads, "q", histories)
        _need(
            type(attention) in (MultiheadAttention, ConvolvedSoftmaxAttention),
            not (attention.use_xformers or attention.onnx_trace or attention.add_zero_attn),
            attention.bias_k is None,
        )
        program.look_at(first, attention.num_heads, gives_weights)
    _write_products(program, attention.out_proj)


def _write_mixing(program: Any, attention: FastWeightAttention, parts: str, histories: Iterator[int]) -> None:
    """Of the stages that there are, the gates are written elsewhere."""
    for stage in attention.stages():
        if type(stage) is ShortConvolution:
            _write_convolution(program, stage, attention.num_heads, parts, histories)
        else:
            _need(stage in (attention.gates, attention.slots))


def _write_convolution(
    program: Any, convolution: ShortConvolution, heads: int, parts: str, histories: Iterator[int]
) -> None:
    weights = [getattr(convolution, part) for part in parts]
    _need(*(type(x) is nn.Parameter and x.dtype == torch.float32 for x in weights))
    first, *_ = [next(histories) for _ in parts]
    flat = [x.detach().flatten(1).contiguous() for x in weights]
    # Padding of the target hides keys, not who asks.
    program.convolve(first, heads, flat, "k" in parts)


def _is_compiled(attention: FastWeightAttention) -> bool:
    return (
        attention.backend in ("auto", "native")
        and attention.rule.max_norm is None
        and native.has_feature_map(attention.features.feature_map)
    )


def _address(features: KeyFeatures) -> tuple[int, int, str, int, str, Optional[Tensor]]:
    feature_map, nu, normalization, projection = features.address_features()
    projection = None if projection is None else projection.to(torch.float32)
    return features.d_key, features.size, feature_map, nu, normalization, projection


class CompiledSteps:
    """Makes the steps of a search by a ``program_of`` its decoder, or none, if there is no program."""

    def __init__(self, program: Optional[Program]) -> None:
        self._program = program

    def make(
        self, decoder: Any, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState
    ) -> "Optional[CompiledStep]":
        """A step that has decoded the last of ``tokens``, (B, T), or None: there is none."""
        if self._program is None or tokens.size(0) == 0:
            return None
        return CompiledStep(decoder, tokens, encoder_out, incremental_state, self._program)

    def __deepcopy__(self, memo: Any) -> "CompiledSteps":
        """Nothing changes it."""
        return self


class _Layers(nn.Module):
    """Stands for all layers of a decoder, and has what they keep in a search."""

    def __init__(
        self,
        program: Any,
        states: list[AttentionState],
        sources: list[Tensor],
        histories: list[tuple[AttentionState, str, Tensor]],
    ) -> None:
        super().__init__()
        self.program, self.states, self.sources = program, states, sources
        self.memories = [x for state in states if (x := state.in_place(MEMORY)) is not None]
        self.normalizers = [x for state in states if (x := state.in_place(NORMALIZER)) is not None]
        # What short convolutions keep, and whose it is.
        self.owners = [(state, name) for state, name, _ in histories]
        self.histories = [x for *_, x in histories]
        # From which row each goes on; a list, since setting an attribute of a module takes a while.
        self.order: list[Optional[Tensor]] = [None]

    def forward(
        self, x: Tensor, *_: Any, self_attn_padding_mask: Optional[Tensor] = None, **__: Any
    ) -> tuple[Tensor, Optional[Tensor], None]:
        """x: (1, B, C), as fairseq's layers have it. Returns as these do, with weights of one head, (1, B, 1, S)."""
        (order,) = self.order
        places = self.states[0].where()
        x, weights, moved, self.histories[:] = self.program.run(
            x.squeeze(0), self_attn_padding_mask, self.memories, self.normalizers, order, places, self.sources,
            self.histories,
        )  # fmt: skip
        for (owner, name), history in zip(self.owners, self.histories):
            owner.put(**{name: history})
        places = None if order is None and places is None else moved
        for state in self.states:
            state.stepped_to(places)
        return x.unsqueeze(0), weights.unsqueeze(0) if weights.numel() else None, None


class CompiledStep:
    """A step of ``decoder`` by its ``program``. Making it decodes the last of ``tokens``, (B, T).

    What the modules keep stays in ``incremental_state``, as they would keep it.
    """

    goes_on = True

    def __init__(
        self, decoder: Any, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState, program: Program
    ) -> None:
        self.rows = tokens.size(0)
        # The order of the beams for the next token, if there is one.
        self._noted: Optional[Tensor] = None
        states = [x.kept_state(incremental_state) for x in decoder.self_attentions()]
        where, *others = [state.where() for state in states]
        if not all(x is where or (x is not None and where is not None and x.equal(where)) for x in others):
            for state in states:
                state.put(**state.rows())
        self._layers: Optional[_Layers] = _Layers(
            program.compiled, states, _sources(decoder, incremental_state), _histories(decoder, incremental_state)
        )
        self._reader = copy.copy(decoder)
        self._reader._modules = {**decoder._modules, "layers": nn.ModuleList([self._layers])}
        self._is_whole = program.is_whole
        if self._is_whole:
            self._reader._modules |= {"layer_norm": None, "project_out_dim": None}
        self._reader.num_layers = 1
        self._cross_attentions = [x.encoder_attn for x in decoder.layers if x.encoder_attn is not None]
        # fairseq's attention takes for granted that a row stays with its sentence until one leaves the batch.
        self._can_leave_sentence = any(isinstance(x, FastWeightCrossAttention) for x in self._cross_attentions)
        self.replay(decoder, tokens, encoder_out, incremental_state)

    def note_order(self, order: Tensor) -> None:
        """Let row i of the next token go on from row ``order[i]`` of what there is then."""
        self._noted = order if self._noted is None else self._noted.index_select(0, order)

    def begin(self, rows: int) -> bool:
        """Whether the next token can be decoded for so many rows, in the order that was noted."""
        noted = self.rows if self._noted is None else self._noted.size(0)
        return self._layers is not None and 0 < rows == noted <= self._layers.memories[0].size(0)

    def replay(self, decoder: Any, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState) -> None:
        """Decode the last of ``tokens``, (B, T), for which ``begin`` was asked."""
        assert self._layers is not None
        order = self._layers.order[0] = self._noted
        if order is not None and self._leaves_sentence(order):
            for attention in self._cross_attentions:
                attention.reorder_incremental_state(incremental_state, order)
            self._layers.sources = _sources(decoder, incremental_state)
        self.rows, self._noted = tokens.size(0), None
        features, extra = self._reader.extract_features(tokens, encoder_out, incremental_state)
        self._outputs = features, extra["attn"][0]

    def _leaves_sentence(self, order: Tensor) -> bool:
        """Whether a row goes on from one of another sentence, or sentences are left out."""
        if not self._cross_attentions or not self._can_leave_sentence:
            return order.size(0) != self.rows
        assert self._layers is not None
        beams = self.rows // self._layers.sources[0].size(0)
        return order.size(0) != self.rows or not (order // beams).equal(torch.arange(self.rows) // beams)

    def outputs(self, decoder: Any) -> tuple[Tensor, Optional[Tensor]]:
        """Logits (B, 1, words), and attention (B, 1, S) or None, of the token that was decoded last."""
        found, attn = self._outputs
        return found if self._is_whole else decoder.output_layer(found), attn

    def __deepcopy__(self, memo: Any) -> "CompiledStep":
        """A copy of a search goes on without this step, which is of this one's tensors."""
        other = copy.copy(self)
        other._layers = None
        return other

    def leave(self, decoder: Any, incremental_state: IncrementalState) -> None:
        """Let the modules go on without this step."""
        if self._noted is not None:
            decoder.reorder_incremental_state_scripting(incremental_state, self._noted)


def _sources(decoder: Any, incremental_state: IncrementalState) -> list[Tensor]:
    """What cross-attention of each layer has of the sources: _OF_SOURCES tensors, the last of which may be empty."""
    found: list[Tensor] = []
    for layer in decoder.layers:
        attention = layer.encoder_attn
        if attention is None:
            continue
        kept = attention._get_input_buffer(incremental_state)
        own = {name: x.contiguous() for name in _kept(attention) if (x := kept.get(name)) is not None}
        if isinstance(kept, dict):
            kept.update(own)
        # fairseq may have numbers for a mask, which comes last.
        found += [x.bool() if name.endswith("mask") else x for name, x in own.items()]
        found += [torch.empty(0)] * (-len(found) % _OF_SOURCES)
    return found


def _kept(attention: Any) -> tuple[str, ...]:
    if isinstance(attention, FastWeightCrossAttention):
        return attention.kept
    return "prev_key", "prev_value", "prev_key_padding_mask"


def _histories(decoder: Any, incremental_state: IncrementalState) -> list[tuple[AttentionState, str, Tensor]]:
    """What short convolutions keep, in the order in which they are written, with its owner and its name there."""
    found = []
    for layer in decoder.layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            if isinstance(attention, (FastWeightAttention, ConvolvedSoftmaxAttention)):
                state = attention.kept_state(incremental_state)
                for part in "q" if attention.encoder_decoder_attention else "qkv":
                    history = state.get(name := f"convolved_{part}")
                    if history is not None:
                        found.append((state, name, history.contiguous()))
    return found
