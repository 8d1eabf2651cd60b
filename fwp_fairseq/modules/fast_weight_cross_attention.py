"""Attention of a decoder to a source, which is written into fast weights once and then only read."""

from typing import Any, Optional

from torch import Tensor

from fwp_fairseq.modules.attention_state import MEMORY, NORMALIZER, AttentionState, LayerState, beams_of
from fwp_fairseq.modules.carried_state import IncrementalState
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention, marks_of
from fwp_fairseq.modules.recurrence import apart, together
from fwp_fairseq.modules.stages import Slots, Tokens
from fwp_fairseq.ops import Gates

# The memory of values that say which token of the source they are.
_MARKS = "marks"
# What queries choose a slot by.
SLOT_KEYS = "slot_keys"


class FastWeightCrossAttention(FastWeightAttention):
    """FastWeightAttention that reads the memory of another sequence, the source.

    In incremental decoding the source is written in the first step, once for all beams of a sentence, which share the
    memory from then on; key and value are not looked at again. With --cross-slots keys and queries are mapped by
    ``Slots``.

    Attention weights are given in evaluation, and in training if ``with_weights`` says so. In decoding they cost a
    second memory, of as many columns as the source has tokens.
    """

    encoder_decoder_attention = True
    # Whether weights are given to those who ask; None: in evaluation. fairseq's decoder asks its last layer always.
    with_weights: Optional[bool] = None
    slots: Optional[Slots]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal:
            raise ValueError("cross-attention reads the whole memory: causal=True does not go with it")

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what is kept of a source, as far as there is such a thing."""
        return (MEMORY, NORMALIZER) if self.slots is None else (SLOT_KEYS, MEMORY)

    @property
    def gives_weights(self) -> bool:
        wanted = not self.training if self.with_weights is None else self.with_weights
        return wanted and super().gives_weights

    def _attend(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        padding: Optional[Tensor],
        incremental_state: Optional[IncrementalState],
        weights_wanted: bool,
    ) -> tuple[Tensor, Optional[Tensor], Tokens]:
        decoding = incremental_state is not None
        state = self._kept(incremental_state, query.size(1)) if decoding else AttentionState()
        asked = self._mix(self._project(query, None, None, decoding=decoding), state)
        kept = state.of_sentences()
        if kept:
            reads = self._read(asked.q, kept, (MEMORY, _MARKS) if weights_wanted and _MARKS in kept else (MEMORY,))
        else:
            assert key is not None and value is not None
            if decoding:
                beams = beams_of(key.transpose(0, 1), value.transpose(0, 1), padding)
                key, value = (key[:, ::beams],) * 2 if key is value else (key[:, ::beams], value[:, ::beams])
                padding = None if padding is None else padding[::beams]
            source = self._mix(self._project(None, key, value, padding), AttentionState())
            values = {MEMORY: source.v, **({_MARKS: marks_of(source)} if weights_wanted else {})}
            reads, written = self._write_and_read(asked.q, source, values)
            state.share(query.size(1), **written)
        if decoding:
            self._keep(incremental_state, state)
        read, *weights = reads
        return read.to(query.dtype), weights[0] if weights else None, asked

    def _write_and_read(
        self, q: Tensor, source: Tokens, values: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Optional[Tensor]]]:
        """What the first queries read of each of the ``values`` of a source, and what is kept of it, by name."""
        if self.slots is None:
            features, gates = self.features, self.gates(source)
            reads, memories, normalizer = self.recurrence.whole(q, source.k, gates, features, *values.values())
            return reads, {**dict(zip(values, memories)), NORMALIZER: normalizer}
        shares, names = self._into_slots(source)
        addresses = self._by_slots(q, names), shares.to(source.k.dtype)
        reads, memories, _ = self.recurrence.whole(*addresses, Gates(), lambda *mapped: mapped, *values.values())
        return reads, {SLOT_KEYS: names, **dict(zip(values, memories))}

    def _read(self, q: Tensor, kept: LayerState, names: tuple[str, ...]) -> list[Tensor]:
        """What later queries read of the memories of these names."""
        if self.slots is None:
            normalizer = kept.get(NORMALIZER)
            return [self.recurrence.read(q, kept[name], normalizer, self.features) for name in names]
        chosen = self._by_slots(q, kept[SLOT_KEYS])
        return [self.recurrence.read_mapped(chosen, kept[name], None) for name in names]

    def addresses(self, tokens: Tokens) -> tuple[Tensor, ...]:
        if self.slots is None:
            return super().addresses(tokens)
        shares, names = self._into_slots(tokens)
        return self._by_slots(tokens.q, names), shares

    def _into_slots(self, source: Tokens) -> tuple[Tensor, Tensor]:
        """Keys as mapped, (B, H, S, slots), and the keys of the slots, (B, H, slots, head_dim)."""
        assert self.slots is not None
        shares = self.slots.keys(source)
        return shares, shares.transpose(2, 3) @ source.k.to(shares.dtype)

    def _by_slots(self, q: Tensor, names: Tensor) -> Tensor:
        """Queries (B', H, T, head_dim) as mapped; ``names``, (B, H, slots, head_dim), are the keys of slots."""
        assert self.slots is not None
        return apart(self.slots.queries(together(q, names), names), q.size(0))
