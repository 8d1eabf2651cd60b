"""The recurrence of fast-weight attention: keys and queries are mapped, memories written and read.

One compiled operator does all of that for a token of decoding, where it can; the operators of ``ops`` do otherwise.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fwp_fairseq.modules.attention_state import MEMORY, NORMALIZER, AttentionState
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.ops import (
    Gates,
    fast_weight_memory,
    fast_weight_read,
    fast_weight_scan,
    fast_weight_step,
    native,
    normalized_memory,
    normalized_read,
    normalized_scan,
    normalized_step,
)
from fwp_fairseq.ops.numerics import state_dtype
from fwp_fairseq.ops.torch_modes import is_transformed

Memory = tuple[Tensor, Optional[Tensor]]


class Recurrence(NamedTuple):
    """How memories are written and read: by which backend, divided by the accumulated keys or not, bounded or not.

    Queries (B, H, T, d_key) and keys (B, H, S, d_key) are as projected, values (B, H, S, Dv), gates (B, H, S). A memory
    is (B, H, Dk, Dv) in the type of the state, beside its normalizer, (B, H, Dk, 1), with attention normalisation.
    """

    backend: str
    normalized: bool
    max_norm: Optional[float]

    def causal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        features: KeyFeatures,
        state: AttentionState,
        decoding: bool,
        marks: Optional[Tensor] = None,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """Write every token and read right after it: (B, H, T, Dv). What there are more of keys is written before.

        It goes on from the memories in ``state`` and leaves the new ones there; ``decoding``: they may be overwritten.
        ``marks``: other values, (B, H, S, M), in place of v; what is read of them comes second. There must be nothing
        in ``state`` then, nor more keys than queries.
        """
        one_token = decoding and k.size(2) == q.size(2) == 1 and not torch.is_grad_enabled()
        if one_token and self._is_compiled(q, features):
            return self._compiled_step(q, k, v, gates, features, state), None
        q, k = features(q, k)
        read_marks = None if marks is None else self._scan(q, k, marks, gates, None, None)[0]
        memory, normalizer = state.get(MEMORY), state.get(NORMALIZER)
        before = k.size(2) - q.size(2)
        if before > 0:
            earlier = k[:, :, :before], v[:, :, :before], _cut(gates, slice(0, before))
            memory, normalizer = self.write(*earlier, memory, normalizer)
            k, v, gates = k[:, :, before:], v[:, :, before:], _cut(gates, slice(before, None))
        if one_token and memory is not None:
            read = self._step(q[:, :, 0], k[:, :, 0], v[:, :, 0], _cut(gates, 0), memory, normalizer)[:, :, None]
        else:
            read, memory, normalizer = self._scan(q, k, v, gates, memory, normalizer)
        state.put(**{MEMORY: memory, NORMALIZER: normalizer})
        return read, read_marks

    def whole(
        self,
        q: Tensor,
        k: Tensor,
        gates: Gates,
        features: "Callable[[Tensor, Tensor], tuple[Tensor, ...]]",
        *values: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], Optional[Tensor]]:
        """Write all tokens, then let every query read: (B', H, T, Dv), and the memory and the normalizer.

        ``features`` maps queries and keys. Each of the ``values`` is written into a memory of its own. There may be
        more rows of queries than of what is written: neighbours then share a memory, each as many.
        """
        q, k = features(q, k)
        memories, normalizers = zip(*(self.write(k, v, gates) for v in values))
        reads = [self.read_mapped(q, memory, normalizers[0]) for memory in memories]
        return reads, list(memories), normalizers[0]

    def two_directions(
        self, q: Tensor, k: Tensor, gates: Gates, features: KeyFeatures, *values: Tensor
    ) -> list[Tensor]:
        """Write every token and read right after it, half of the heads from the last token to the first: (B, H, T, Dv).

        Each of the ``values`` is written into a memory of its own. There are as many queries as keys.
        """
        q, k = (turned(x) for x in features(q, k))
        gates = Gates(*(None if gate is None else turned(gate) for gate in gates))
        return [turned(self._scan(q, k, turned(v), gates, None, None)[0]) for v in values]

    def read(self, q: Tensor, memory: Tensor, normalizer: Optional[Tensor], features: KeyFeatures) -> Tensor:
        """What queries read from memories that were finished before, shared as in ``whole``."""
        if q.size(2) == 1 and not torch.is_grad_enabled() and self._is_compiled(q, features):
            (asked,), compiled = _as_compiled(features, q)
            return native.read(asked, memory, normalizer, compiled).unsqueeze(2)
        (asked,) = features(q)
        return self.read_mapped(asked, memory, normalizer)

    def _is_compiled(self, q: Tensor, features: KeyFeatures) -> bool:
        """Whether one compiled operator can do all of a token's work on the memory."""
        return (
            self.backend in ("auto", "native")
            and self.max_norm is None
            and not features.training
            and native.unavailable is None
            and not is_transformed()
            and native.supports(q.device.type, features.size, state_dtype(q.dtype))
        )

    def _compiled_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, features: KeyFeatures, state: AttentionState
    ) -> Tensor:
        memory, normalizer = state.in_place(MEMORY), state.in_place(NORMALIZER)
        if memory is None:
            memory = q.new_zeros(*q.shape[:2], features.size, v.size(3), dtype=state_dtype(q.dtype))
            normalizer = memory.new_zeros(*memory.shape[:3], 1) if self.normalized else None
            state.put(**{MEMORY: memory, NORMALIZER: normalizer})
        (q, k), compiled = _as_compiled(features, q, k)
        v, (write, erase, decay) = v.squeeze(2), (None if gate is None else gate.squeeze(2) for gate in gates)
        return state.step_in_places(
            lambda order, places: native.step(q, k, v, write, erase, decay, memory, normalizer, order, places, compiled)
        ).unsqueeze(2)

    def write(
        self, k: Tensor, v: Tensor, gates: Gates, memory: Optional[Tensor] = None, normalizer: Optional[Tensor] = None
    ) -> Memory:
        """The memory after these tokens, of keys as mapped, and the normalizer."""
        if self.normalized:
            return normalized_memory(
                k, v, gates, initial_state=memory, initial_normalizer=normalizer, backend=self.backend
            )
        return fast_weight_memory(
            k, v, *gates, initial_state=memory, backend=self.backend, max_norm=self.max_norm
        ), None

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, memory: Optional[Tensor], normalizer: Optional[Tensor]
    ) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        if self.normalized:
            return normalized_scan(
                q, k, v, gates, initial_state=memory, initial_normalizer=normalizer, backend=self.backend
            )
        return *fast_weight_scan(
            q, k, v, *gates, initial_state=memory, backend=self.backend, max_norm=self.max_norm
        ), None

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, memory: Tensor, normalizer: Optional[Tensor]
    ) -> Tensor:
        if normalizer is not None:
            return normalized_step(q, k, v, gates, memory, normalizer)
        return fast_weight_step(q, k, v, *gates, memory, max_norm=self.max_norm)

    def read_mapped(self, q: Tensor, memory: Tensor, normalizer: Optional[Tensor]) -> Tensor:
        """As ``read``, with queries, (B', H, T, Dk), as mapped."""
        asked = together(q, memory)
        read = fast_weight_read(asked, memory) if normalizer is None else normalized_read(asked, memory, normalizer)
        return apart(read, q.size(0))


def together(q: Tensor, memory: Tensor) -> Tensor:
    """(B', H, T, ...) -> (B, H, B'/B T, ...): rows that share one of B memories as further time steps of one row."""
    rows, memories = q.size(0), memory.size(0)
    return q if rows == memories else q.unflatten(0, (memories, -1)).transpose(1, 2).flatten(2, 3)


def apart(read: Tensor, rows: int) -> Tensor:
    """``together`` turned back, for so many ``rows``."""
    memories = read.size(0)
    if rows == memories:
        return read
    return read.unflatten(2, (rows // memories, -1)).transpose(1, 2).flatten(0, 1)


def turned(x: Tensor) -> Tensor:
    """(B, H, L, ...), the second half of the heads from the last token to the first; turned twice it is as it was."""
    half = x.size(1) // 2
    return torch.cat([x[:, :half], x[:, half:].flip(2)], dim=1)


def _as_compiled(features: KeyFeatures, *projected: Tensor) -> tuple[tuple[Tensor, ...], native.AddressFeatures]:
    """Keys or queries of one token, (B, H, 1, d_key), for the compiled operators, and what these have to do.

    That is to map them, or to take them as mapped.
    """
    if native.has_feature_map(features.feature_map):
        return tuple(x.squeeze(2) for x in projected), features.address_features()
    return tuple(x.squeeze(2) for x in features(*projected)), native.AddressFeatures("none")


def _cut(gates: Gates, where: "slice | int") -> Gates:
    return Gates(*(None if gate is None else gate[:, :, where] for gate in gates))
