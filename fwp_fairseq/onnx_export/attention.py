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

from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.modules.stages import ReadOut, Tokens
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


def state_shape(attention: Any) -> list[int]:
    """Of one row: heads, features of a key, and of a value with, if z is counted, one column more."""
    return [
        attention.num_heads,
        attention.features.size,
        attention.head_dim + bool(attention.attention_normalization),
    ]


def _heads(attention: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attention.num_heads, attention.embed_dim // attention.num_heads))


class FastWeights:
    """Fast-weight attention. ``form`` is one of ``recurrence.FORMS``."""

    def __init__(self, attention: Any, graph: Graph, form: str) -> None:
        self.attention = attention
        self.recurrence = Recurrence(graph, form, bool(attention.attention_normalization))

    def keys_and_gates(self, key: Tensor, padding: Optional[Tensor]) -> tuple[Tensor, Tensor, Gates]:
        """Of (B, T, C): k before the feature map, v (B, T, H, D), and gates (B, T, H or 1)."""
        a = self.attention
        beta, alpha = (None if f is None else f(key).sigmoid() for f in (a.write_proj, a.decay_proj))
        gates = a.rule.gates(beta, alpha, None if padding is None else padding[..., None])
        return _heads(a, a.k_proj(key)), _heads(a, a.v_proj(key)), gates

    def memory(self, key: Tensor, padding: Optional[Tensor]) -> Tensor:
        """The state after the tokens of (B, T, C)."""
        k, v, gates = self.keys_and_gates(key, padding)
        (k,) = self.attention.features(k)
        return self.recurrence.memory(k, v, gates)

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        """(B, H, T, D) queries before the feature map -> (B, T, H, D)."""
        (q,) = self.attention.features(q)
        return self.recurrence.read(q, state).transpose(1, 2)

    def put_out(self, read: Tensor) -> Tensor:
        """(B, T, H, D) -> (T, B, C)."""
        for stage in self.attention.stages(ReadOut):
            read = stage(read, Tokens())
        return self.attention.out_proj(read.flatten(2, 3).transpose(0, 1))


class CausalFastWeights(FastWeights):
    """Self-attention of the decoder: goes on from ``state``, and then has the new one there."""

    def __init__(self, attention: Any, graph: Graph, form: str, state: Tensor, one_token: bool) -> None:
        super().__init__(attention, graph, form)
        self.state = state
        self.one_token = one_token

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        k, v, gates = self.keys_and_gates(x, None if self.one_token else key_padding_mask)
        q, k = self.attention.features(_heads(self.attention, self.attention.q_proj(x)), k)
        read, self.state = self.recurrence.causal(q, k, v, gates, self.state, self.one_token)
        return self.put_out(read), None


class WholeFastWeights(FastWeights):
    """Self-attention of the encoder."""

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        q = _heads(self.attention, self.attention.q_proj(x)).transpose(1, 2)
        return self.put_out(self.read(q, self.memory(x, key_padding_mask))), None


class Softmax:
    """fairseq's attention to tokens that are all there."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def keys_and_values(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Of (B, S, C): keys (B, H, D, S) and values (B, H, S, D)."""
        a = self.attention
        return _heads(a, a.k_proj(key)).permute(0, 2, 3, 1), _heads(a, a.v_proj(key)).transpose(1, 2)

    def read(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        """(B, H, T, D) queries -> (B, T, H, D); padding is (B, S), True at what is not to be seen."""
        scores = (q * self.attention.scaling) @ k
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)

    def put_out(self, read: Tensor) -> Tensor:
        return self.attention.out_proj(read.flatten(2, 3).transpose(0, 1))

    def __call__(self, query: Tensor, *_: Any, key_padding_mask: Optional[Tensor] = None, **__: Any) -> Any:
        x = query.transpose(0, 1)
        q = _heads(self.attention, self.attention.q_proj(x)).transpose(1, 2)
        assert key_padding_mask is not None
        return self.put_out(self.read(q, *self.keys_and_values(x), key_padding_mask)), None


def encoder_self_attention(attention: Any, graph: Graph, form: str) -> Any:
    return WholeFastWeights(attention, graph, form) if is_fast_weight(attention) else Softmax(attention)


class CrossAttention:
    """Attention of the decoder to the encoder: what the encoder leaves of a source, and how a decoder reads it.

    What is left has one row for a sentence, which the rows of its hypotheses share.
    """

    def __init__(self, attention: Any, graph: Graph, form: str, name: str) -> None:
        self.graph = graph
        self.attention = attention
        self.kind: Any = FastWeights(attention, graph, form) if is_fast_weight(attention) else Softmax(attention)
        if is_fast_weight(attention):
            self.kept: dict[str, list[Any]] = {f"{name}.memory": state_shape(attention)}
        else:
            heads, size = attention.num_heads, attention.head_dim
            self.kept = {
                f"{name}.keys": [heads, size, "source_length"],
                f"{name}.values": [heads, "source_length", size],
            }

    def write(self, encoder_out: Tensor, padding: Tensor) -> Sequence[Tensor]:
        """What is kept of (B, S, C)."""
        if is_fast_weight(self.attention):
            return [self.kind.memory(encoder_out, padding)]
        return self.kind.keys_and_values(encoder_out)

    def reader(self, kept: Sequence[Tensor], padding: Optional[Tensor]) -> Any:
        """The forward pass of a decoder's layer, for one token of every hypothesis."""

        def forward(query: Tensor, *_: Any, **__: Any) -> Any:
            q = _heads(self.attention, self.attention.q_proj(query.transpose(0, 1)))
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
            return self.kind.put_out(self.graph.value(apart, *q.shape)), None

        return forward
