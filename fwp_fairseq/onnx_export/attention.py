"""What stands for the attention of a model while its graph is recorded.

``attention.forward`` of each layer is answered by one of these, with the projections and feature maps of that
attention. Shapes are fairseq's: time first, (T, B, embed_dim).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor

from fwp_fairseq.modules.convolved_softmax import ConvolvedSoftmaxAttention
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.modules.stages import Mixing, ReadOut, Tokens
from fwp_fairseq.onnx_export.graph import Graph
from fwp_fairseq.onnx_export.recurrence import Recurrence
from fwp_fairseq.ops.update_rules import Gates


@contextmanager
def answered(module: Any, forward: Any) -> Iterator[None]:
    """Within this context ``forward`` is what ``module`` does."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def is_fast_weight(attention: Any) -> bool:
    return isinstance(attention, FastWeightAttention)


def _mixings(attention: Any) -> list[Any]:
    if is_fast_weight(attention):
        return list(attention.stages(Mixing))
    return [attention.short_convolution] if isinstance(attention, ConvolvedSoftmaxAttention) else []


def state_shapes(attention: Any, name: str) -> dict[str, list[int]]:
    """What a row keeps for an attention, by name: the memory of self-attention, and what convolutions keep."""
    shapes = {} if attention.encoder_decoder_attention else {f"{name}.state": memory_shape(attention)}
    for stage in _mixings(attention):
        for part in ("q",) if attention.encoder_decoder_attention else ("q", "k", "v"):
            shapes[f"{name}.convolved_{part}"] = [stage.width - 1, attention.num_heads, attention.head_dim]
    return shapes


def memory_shape(attention: Any) -> list[int]:
    """Of one row: heads, features of a key, and of a value with, if z is counted, one column more."""
    return [
        attention.num_heads,
        attention.features.size,
        attention.head_dim + bool(attention.attention_normalization),
    ]


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_heads, attention.embed_dim // attention.num_heads))


class Attention:
    """Base of all. ``states``: what it goes on from, by names that begin with ``name``, and afterwards what is left."""

    def __init__(
        self, attention: Any, graph: Graph, name: str = "", states: Optional[dict[str, Tensor]] = None
    ) -> None:
        self.attention = attention
        self.graph = graph
        self.name = name
        self.states = {} if states is None else states

    def queries(self, query: Tensor, padding: Optional[Tensor] = None) -> Tensor:
        """Of (B, T, C): q before the feature map, if there is one, (B, T, H, D)."""
        return self._mix("q", self.attention.q_proj(query), padding)

    def _mix(self, part: str, projected: Tensor, padding: Optional[Tensor]) -> Tensor:
        """What the convolution makes of what was projected, (B, T, C) -> (B, T, H, D)."""
        x = _heads(self.attention, projected)
        for stage in _mixings(self.attention):
            if padding is not None:
                x = x.masked_fill(padding[..., None, None], 0.0)
            later, weight = stage.later[part], getattr(stage, part).squeeze(2)
            before = stage.width - 1 - later
            name = f"{self.name}.convolved_{part}"
            if name in self.states:
                x = torch.cat([self.states[name], x], dim=1)
                self.states[name] = x[:, -before:] if padding is None else self._last(x, padding, before)
            else:
                rows, length, heads, size = x.shape
                ends = self.graph.ints(0, before, 0, 0, 0, later, 0, 0)
                x = self.graph.value(self.graph.node("Pad", x, ends), rows, length + stage.width - 1, heads, size)
            shifted = (x[:, shift : shift - stage.width + 1 or None] for shift in range(stage.width))
            x = sum(part_of_x * weight[shift] for shift, part_of_x in enumerate(shifted))
        return x

    def _last(self, x: Tensor, padding: Tensor, count: int) -> Tensor:
        """Of each row of (B, count + T, H, D) the ``count`` that end with the last one that is no padding."""
        graph, (rows, length) = self.graph, padding.shape
        after = graph.node("Add", graph.node("Squeeze", graph.size(padding, 1)), graph.constant(1))
        range_ = graph.node("Range", graph.constant(1), after, graph.constant(1))
        positions = graph.value(range_, length, dtype=torch.int64)
        ends = (positions * (~padding).long()).amax(dim=1)
        index = (ends[:, None] + torch.arange(count))[..., None]
        return graph.value(graph.node("GatherND", x, index, batch_dims=1), rows, count, *x.shape[2:])


class FastWeights(Attention):
    """Fast-weight attention. ``form`` is one of ``recurrence.FORMS``."""

    def __init__(
        self, attention: Any, graph: Graph, form: str, name: str = "", states: Optional[dict[str, Tensor]] = None
    ) -> None:
        super().__init__(attention, graph, name, states)
        self.recurrence = Recurrence(graph, form, bool(attention.attention_normalization))

    def keys_and_gates(self, key: Tensor, padding: Optional[Tensor]) -> tuple[Tensor, Tensor, Gates]:
        """Of (B, T, C): k before the feature map, v (B, T, H, D), and gates (B, T, H or 1)."""
        a = self.attention
        logits = (None if f is None else f(key) for f in (a.write_proj, a.decay_proj))
        gates = a.gates.gates_of(*logits, None if padding is None else padding[..., None])
        k, v = (self._mix(part, f(key), padding) for part, f in (("k", a.k_proj), ("v", a.v_proj)))
        return k, v, gates

    def memory(self, key: Tensor, padding: Optional[Tensor]) -> Tensor:
        """The state after the tokens of (B, T, C)."""
        k, v, gates = self.keys_and_gates(key, padding)
        (k,) = self._features(k)
        return self.recurrence.memory(k, v, gates)

    def _features(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of (B, T, H, D), before the feature map: (B, T, H, Dk)."""
        if not self.attention.features.learned:
            return self.attention.features(*inputs)
        return tuple(x.transpose(1, 2) for x in self.attention.features(*(x.transpose(1, 2) for x in inputs)))

    def read(self, q: Tensor, *kept: Tensor) -> Tensor:
        """(B, H, T, D) queries before the feature map -> (B, T, H, D), of what ``memory`` gave."""
        (q,) = self.attention.features(q)
        return self.recurrence.read(q, *kept).transpose(1, 2)

    def put_out(self, read: Tensor, query: Tensor) -> Tensor:
        """(B, T, H, D) and what asked for it, (B, T, C) -> (T, B, C)."""
        a = self.attention
        wanted = [layer.name for stage in a.stages(ReadOut) for layer in stage.projections() if layer.wanted]
        tokens = Tokens(projected={name: _heads(a, getattr(a, name)(query)) for name in wanted})
        for stage in a.stages(ReadOut):
            read = stage(read, tokens)
        return a.out_proj(read.flatten(2, 3).transpose(0, 1))


class CausalFastWeights(FastWeights):
    """Self-attention of the decoder."""

    def __init__(
        self, attention: Any, graph: Graph, form: str, name: str, states: dict[str, Tensor], one_token: bool
    ) -> None:
        super().__init__(attention, graph, form, name, states)
        self.one_token = one_token

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        padding, memory = None if self.one_token else key_padding_mask, f"{self.name}.state"
        k, v, gates = self.keys_and_gates(x, padding)
        q, k = self._features(self.queries(x, padding), k)
        read, self.states[memory] = self.recurrence.causal(q, k, v, gates, self.states[memory], self.one_token)
        return self.put_out(read, x), None


class WholeFastWeights(FastWeights):
    """Self-attention of the encoder."""

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        q = self.queries(x, key_padding_mask).transpose(1, 2)
        return self.put_out(self.read(q, self.memory(x, key_padding_mask)), x), None


class FastWeightsInTwoDirections(FastWeights):
    """Self-attention of the encoder with --encoder-reading two-directions."""

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        k, v, gates = self.keys_and_gates(x, key_padding_mask)
        q, k = self._features(self.queries(x, key_padding_mask), k)
        each_head = torch.ones(self.attention.num_heads)
        turned = Gates(*(None if gate is None else self._turned(gate * each_head) for gate in gates))
        read = self.recurrence.causal(self._turned(q), self._turned(k), self._turned(v), turned)[0]
        return self.put_out(self._turned(read), x), None

    def _turned(self, x: Tensor) -> Tensor:
        """(B, T, H, ...), the second half of the heads from the last token to the first."""
        half = self.attention.num_heads // 2
        return torch.cat([x[:, :, :half], x[:, :, half:].flip(1)], dim=2)


class Slots(FastWeights):
    """Attention with --encoder-slots or --cross-slots."""

    def keys_and_values(self, key: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (B, S, C): keys and values of the slots, (B, H, slots, D), and which are empty."""
        a = self.attention
        k, v, _ = self.keys_and_gates(key, padding)
        logits = a.slot_proj(key).unflatten(-1, (a.num_heads, a.slots.size)).transpose(1, 2)
        shares, empty = a.slots.keys(Tokens(projected={"slot_proj": logits}, padding=padding))
        shares = shares.transpose(2, 3)
        return shares @ k.transpose(1, 2), shares @ v.transpose(1, 2), empty

    def read(self, q: Tensor, *kept: Tensor) -> Tensor:
        """(B, H, T, D) queries -> (B, T, H, D), of what ``keys_and_values`` gave."""
        keys, values, empty = kept
        return (self.attention.slots.queries(q, keys, empty) @ values).transpose(1, 2)

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        assert key_padding_mask is not None
        q = self.queries(x, key_padding_mask).transpose(1, 2)
        return self.put_out(self.read(q, *self.keys_and_values(x, key_padding_mask)), x), None


class Softmax(Attention):
    """fairseq's attention to tokens that are all there, convolved or not."""

    def keys_and_values(self, key: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, S, C): keys (B, H, D, S) and values (B, H, S, D)."""
        k, v = (
            self._mix(part, f(key), padding) for part, f in zip("kv", (self.attention.k_proj, self.attention.v_proj))
        )
        return k.permute(0, 2, 3, 1), v.transpose(1, 2)

    def read(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        """(B, H, T, D) queries -> (B, T, H, D); padding is (B, S), True at what is not to be seen."""
        scores = (q * self.attention.scaling) @ k
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    def put_out(self, read: Tensor, query: Tensor) -> Tensor:
        """(B, T, H, D) -> (T, B, C)."""
        return self.attention.out_proj(read.flatten(2, 3).transpose(0, 1))

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        assert key_padding_mask is not None
        q = self.queries(x, key_padding_mask).transpose(1, 2)
        return self.put_out(self.read(q, *self.keys_and_values(x, key_padding_mask), key_padding_mask), x), None


def encoder_self_attention(attention: Any, graph: Graph, form: str) -> Any:
    if not is_fast_weight(attention):
        return Softmax(attention, graph)
    if attention.slots is not None:
        return Slots(attention, graph, form)
    return (FastWeightsInTwoDirections if attention.two_directions else WholeFastWeights)(attention, graph, form)


class CrossAttention:
    """Attention of the decoder to the encoder: what the encoder leaves of a source, and how a decoder reads it.

    What is left has one row for a sentence, which the rows of its hypotheses share.
    """

    def __init__(
        self, attention: Any, graph: Graph, form: str, name: str, states: Optional[dict[str, Tensor]] = None
    ) -> None:
        self.graph = graph
        self.attention = attention
        self.kind: Any = Softmax(attention, graph, f"{name}.cross", states)
        self.kept: dict[str, list[Any]]
        heads, size = attention.num_heads, attention.head_dim
        if is_fast_weight(attention):
            kind = FastWeights if attention.slots is None else Slots
            self.kind = kind(attention, graph, form, f"{name}.cross", states)
        if isinstance(self.kind, Slots):
            shape = [heads, attention.slots.size, size]
            self.kept = {f"{name}.keys": shape, f"{name}.values": shape, f"{name}.empty": [attention.slots.size]}
        elif is_fast_weight(attention):
            self.kept = {f"{name}.memory": memory_shape(attention)}
        else:
            self.kept = {
                f"{name}.keys": [heads, size, "source_length"],
                f"{name}.values": [heads, "source_length", size],
            }

    def write(self, encoder_out: Tensor, padding: Tensor) -> Sequence[Tensor]:
        """What is kept of (B, S, C)."""
        if isinstance(self.kind, (Slots, Softmax)):
            return self.kind.keys_and_values(encoder_out, padding)
        return [self.kind.memory(encoder_out, padding)]

    def reader(self, kept: Sequence[Tensor], padding: Optional[Tensor]) -> Any:
        """The forward pass of a decoder's layer, for one token of every hypothesis."""

        def forward(query: Tensor, *_: Any, **__: Any) -> Any:
            x = query.transpose(0, 1)
            q = self.kind.queries(x)
            heads, size = q.shape[2:]
            # Hypotheses of a sentence read what they share as if they were further time steps of it.
            sentences = self.graph.size(kept[0], 0)
            shape = self.graph.node("Concat", sentences, self.graph.ints(-1, heads, size), axis=0)
            together = self.graph.value(
                self.graph.node("Reshape", q, shape), kept[0].size(0), q.size(0) // kept[0].size(0), heads, size
            )
            more = [] if padding is None or is_fast_weight(self.attention) else [padding]
            read = self.kind.read(together.transpose(1, 2), *kept, *more)
            apart = self.graph.node("Reshape", read, self.graph.ints(-1, 1, heads, size))
            return self.kind.put_out(self.graph.value(apart, *q.shape), x), None

        return forward
