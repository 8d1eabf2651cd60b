"""What each fast-weight attention of a model does with one sentence or text, from its inputs in one parallel pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import AttentionState
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.ops import Gates, fast_weight_read, implied_attention, normalized_read

# With more tokens their weights, whose number is quadratic, are left out.
MOST_WEIGHTS = 1024


@dataclass
class Memory:
    """What one attention did. Of each head, and of the tokens that were written (S) or asked with (T).

    write, decay: (H, S), β and α as the recurrence has them, or None where the rule has none. weights: (H, T, S), or
    None (FWM, or too many tokens). norm, rank: (H, S), Frobenius norm and effective rank of the memory after each
    token, of which ``bound`` is the largest that there can be; last_norm, last_rank: (H,), after all of them. found:
    (H, S), the length of what the key retrieves before it is written, as a share of the value's; agreement: (H, S), the
    cosine of the two.
    """

    name: str
    write: Optional[Tensor]
    decay: Optional[Tensor]
    weights: Optional[Tensor]
    norm: Tensor
    rank: Tensor
    last_norm: Tensor
    last_rank: Tensor
    bound: int
    found: Tensor
    agreement: Tensor


def effective_rank(memory: Tensor) -> Tensor:
    """exp of the entropy of the singular values, scaled to sum one (Roy and Vetterli, 2007): (..., Dk, Dv) -> (...)."""
    values = torch.linalg.svdvals(memory.float())
    shares = values / values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(dim=-1).exp()


def inputs_by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an attention was called with, as a forward hook is given it."""
    return {**dict(zip(("query", "key", "value", "key_padding_mask"), args)), **kwargs}


def written(attention: FastWeightAttention, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Gates]:
    """What the recurrence of an attention gets: q and k as mapped, v, and gates, in the order of each head's writes."""
    tokens = attention._project(inputs["query"], inputs["key"], inputs["value"], inputs.get("key_padding_mask"))
    tokens = attention._mix(tokens, AttentionState())
    q, k = attention.addresses(tokens)
    gates = Gates(*(None if gate is None else attention.in_order(gate) for gate in attention.gates(tokens)))
    return attention.in_order(q), attention.in_order(k), attention.in_order(tokens.v), gates


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within this context: by name, each fast-weight attention that was called, and the inputs of its last call."""
    calls: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = module, inputs_by_name(args, kwargs)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, FastWeightAttention):
                handle = module.register_forward_pre_hook(keep(name), with_kwargs=True)
                stack.callback(handle.remove)
        yield calls


@torch.no_grad()
def look(
    name: str,
    attention: FastWeightAttention,
    inputs: dict[str, Any],
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda tokens: tokens,
) -> Memory:
    """What ``attention`` did with ``inputs`` of one row. ``progress`` goes over the tokens, one after the other."""

    def by_token(x: Tensor) -> Tensor:
        """(1, H, L, ...) along the writes of each head -> (H, L, ...) along the tokens."""
        return attention.in_order(x)[0]

    q, k, v, gates = written(attention, inputs)
    length, normalized = k.size(2), attention.attention_normalization

    weights = None
    if attention.gives_weights and max(q.size(2), length) <= MOST_WEIGHTS:
        causal = attention.causal or attention.two_directions
        weights = implied_attention(q, k, gates, causal=causal, normalized=normalized)
        weights = by_token(attention.in_order(weights.transpose(2, 3)).transpose(2, 3))

    memory = k.new_zeros(*k.shape[:2], k.size(3), v.size(3))
    normalizer = memory[..., :1] if normalized else None
    rows: list[tuple[Tensor, ...]] = []
    for t in progress(range(length)):
        here = slice(t, t + 1)
        key, value = k[:, :, here], v[:, :, here]
        now = Gates(*(None if gate is None else gate[:, :, here] for gate in gates))
        found = fast_weight_read(key, memory) if normalizer is None else normalized_read(key, memory, normalizer)
        if now.decay is not None:
            found = found * now.decay[..., None]
        memory, normalizer = attention.recurrence.write(key, value, now, memory, normalizer)
        length_of_value = value.norm(dim=-1).clamp(min=1e-12)
        rows.append(
            (
                memory.square().sum(dim=(2, 3)).sqrt(),
                effective_rank(memory),
                (found.norm(dim=-1) / length_of_value)[..., 0],
                torch.cosine_similarity(found, value, dim=-1)[..., 0],
            )
        )
    norm, rank, found_share, agreement = (by_token(torch.stack(column, dim=-1)) for column in zip(*rows))
    last_norm, last_rank, *_ = (column[0] for column in rows[-1])
    return Memory(
        name,
        None if gates.write is None else by_token(gates.write),
        None if gates.decay is None else by_token(gates.decay),
        weights,
        norm,
        rank,
        last_norm,
        last_rank,
        min(memory.shape[2:]),
        found_share,
        agreement,
    )
