"""Attention weights that fast weights imply: what is read is a weighted sum of the values that were written.

The recurrence is linear in the values, and neither keys nor gates depend on them: o_t = Σ_s A[t, s] v_s for whatever
values. With those that are one at token s and zero elsewhere the read-outs are A itself, so that it is as exact as the
recurrence, for every rule but FWM, whose bound on the memory depends on the values. Attention normalisation divides by
what depends on keys and gates only, and changes nothing of this.

Weights of the rules that erase can be negative, and need not sum to one.
"""

from typing import Optional

import torch
from torch import Tensor

from fwp_fairseq.ops.attention_normalization import normalized_memory, normalized_read, normalized_scan
from fwp_fairseq.ops.fast_weights import fast_weight_memory, fast_weight_read, fast_weight_scan
from fwp_fairseq.ops.torch_modes import without_autocast
from fwp_fairseq.ops.update_rules import Gates

# Tokens whose weights are computed at a time: memories of as many columns.
BLOCK = 128


@without_autocast
def implied_attention(
    q: Tensor,
    k: Tensor,
    gates: Optional[Gates] = None,
    *,
    causal: bool = True,
    normalized: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A with o = A v: (B, H, T, S), in the type of the state.

    q: (B, H, T, Dk), k: (B, H, S, Dk), gates (B, H, S) or None. ``causal``: each query reads right after its own token
    is written (T = S), else after all. ``normalized``: with attention normalisation (eq. 26-28).
    """
    gates = gates or Gates()
    if not causal:
        memory, normalizer = memory_of_tokens(k, gates, normalized=normalized, backend=backend)
        return fast_weight_read(q, memory) if normalizer is None else normalized_read(q, memory, normalizer)
    blocks = []
    for tokens in _tokens(k):
        if normalized:
            blocks.append(normalized_scan(q, k, tokens, gates, backend=backend)[0])
        else:
            blocks.append(fast_weight_scan(q, k, tokens, *gates, backend=backend)[0])
    return torch.cat(blocks, dim=3)


@without_autocast
def memory_of_tokens(
    k: Tensor, gates: Gates, *, normalized: bool = False, backend: str = "auto"
) -> tuple[Tensor, Optional[Tensor]]:
    """The finished memory (B, H, Dk, S) of values that say which token they are, and its normalizer (B, H, Dk, 1).

    What a query reads of it are its weights.
    """
    blocks, normalizer = [], None
    for tokens in _tokens(k):
        if normalized:
            memory, normalizer = normalized_memory(k, tokens, gates, backend=backend)
        else:
            memory = fast_weight_memory(k, tokens, *gates, backend=backend)
        blocks.append(memory)
    return torch.cat(blocks, dim=3), normalizer


def _tokens(k: Tensor) -> list[Tensor]:
    """Values that are one at their own token, (B, H, S, up to BLOCK) for each block of tokens."""
    which = torch.eye(k.size(2), device=k.device, dtype=k.dtype)
    return [block.expand(*k.shape[:2], -1, -1) for block in which.split(BLOCK, dim=1)]
