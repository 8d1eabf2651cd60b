"""Attention of Transformer-XL (Dai et al. 2019, sec. 3.2-3.3): a memory of earlier hidden states, relative positions.

Queries come from the segment, keys and values from what the memory has and the segment. With r_d the sinusoids of
distance d, a query at position i scores position j ≤ i as

    (q_i + u)ᵀ k_j + (q_i + v)ᵀ W_r r_{i-j}        times 1 / √head_dim

with learned u and v of every head. The memory has the ``memory_length`` last inputs of this layer, without gradient.
"""

import math
from typing import Any, Optional

import torch
from fairseq.modules.fairseq_dropout import FairseqDropout
from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import MEMORY
from fwp_fairseq.modules.carried_state import AttentionWithState


class RelativeAttention(AttentionWithState):
    """Causal self-attention with a memory, behind the interface of fairseq's MultiheadAttention.

    ``memory_length`` is that of training, ``eval_memory_length`` (default: the same) that of evaluation and decoding.
    There are no biases but u and v. Shapes are fairseq's: (T, B, embed_dim); the memory is (B, up to memory_length,
    embed_dim). Padding is taken to be at the end, where causality hides it from all that count.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        memory_length: int,
        eval_memory_length: Optional[int] = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"--decoder-attention-heads is {num_heads}, it must divide --decoder-embed-dim, which is {embed_dim}"
            )
        for flag, length in ("--memory-length", memory_length), ("--eval-memory-length", eval_memory_length):
            if length is not None and length < 1:
                raise ValueError(f"{flag} is {length}, it must be at least 1")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.memory_length = memory_length
        self.eval_memory_length = memory_length if eval_memory_length is None else eval_memory_length
        self.q_proj, self.k_proj, self.v_proj, self.position_proj, self.out_proj = (
            nn.Linear(embed_dim, embed_dim, bias=False) for _ in range(5)
        )
        self.content_bias = nn.Parameter(torch.empty(num_heads, 1, self.head_dim))  # u
        self.position_bias = nn.Parameter(torch.empty(num_heads, 1, self.head_dim))  # v
        # Under fairseq's name, which --retain-dropout-modules goes by.
        self.dropout_module = FairseqDropout(dropout, module_name="MultiheadAttention")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections as fairseq's attention has them, u and v as Dai et al. do."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.position_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out_proj.weight)
        for bias in (self.content_bias, self.position_bias):
            nn.init.normal_(bias, std=0.02)

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}, memory of {self.memory_length} ({self.eval_memory_length})"

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Any = None,
        need_weights: bool = False,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """query: (T, B, embed_dim), which is key and value, too. Returns ((T, B, embed_dim), None)."""
        state = self._kept(incremental_state, query.size(1))
        memory = state.get(MEMORY)
        context = query if memory is None else torch.cat([memory.to(query).transpose(0, 1), query])
        state.put(**{MEMORY: self._last(context)})
        self._keep(incremental_state, state)

        q, k, v = (self._split_heads(x) for x in (self.q_proj(query), self.k_proj(context), self.v_proj(context)))
        r = self._split_heads(self.position_proj(_sinusoids(context)))  # (1, H, S, head_dim)
        by_content = (q + self.content_bias) @ k.transpose(2, 3)
        by_position = _align((q + self.position_bias) @ r.transpose(2, 3))
        length, width = by_content.shape[2:]
        future = torch.ones(length, width, dtype=torch.bool, device=query.device).triu(width - length + 1)
        scores = (by_content + by_position).float() / math.sqrt(self.head_dim)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1).to(v.dtype)
        read = self.dropout_module(weights) @ v
        # (B, H, T, head_dim) -> (T, B, embed_dim)
        return self.out_proj(read.permute(2, 0, 1, 3).reshape(query.shape)), None

    def _last(self, context: Tensor) -> Tensor:
        """The memory for what comes after the (S, B, embed_dim) inputs so far."""
        length = self.memory_length if self.training else self.eval_memory_length
        return context[-length:].detach().transpose(0, 1).contiguous()

    def _split_heads(self, x: Tensor) -> Tensor:
        """(T, B, embed_dim) -> (B, H, T, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)


def _sinusoids(context: Tensor) -> Tensor:
    """r of the distances S - 1 to 0 for an (S, B, embed_dim) context: (S, 1, embed_dim)."""
    length, _, size = context.shape
    distances = torch.arange(length - 1, -1, -1, device=context.device, dtype=torch.float32)
    frequencies = 10_000 ** -(torch.arange(0, size, 2, device=context.device, dtype=torch.float32) / size)
    angles = distances[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, None, :size].to(context.dtype)


def _align(scores: Tensor) -> Tensor:
    """(B, H, T, S) scores of the distances S - 1 to 0 -> of the positions 0 to S - 1, where those are not the future.

    Query t is at position S - T + t, so that its row moves left by T - 1 - t: the trick of appendix B. What comes in
    from the right belongs to the future.
    """
    batch, heads, length, width = scores.shape
    padded = torch.cat([scores.new_zeros(batch, heads, length, 1), scores], dim=3)
    return padded.view(batch, heads, width + 1, length)[:, :, 1:].reshape(batch, heads, length, width)
