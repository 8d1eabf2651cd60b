"""Attention of a decoder to a source, which is written into fast weights once and then only read."""

from typing import Any, Optional

from torch import Tensor

from fwp_fairseq.modules.attention_state import MEMORY, NORMALIZER, AttentionState, LayerState, beams_of
from fwp_fairseq.modules.carried_state import IncrementalState
from fwp_fairseq.modules.fast_weight_attention import EMPTY_SLOTS, SLOT_KEYS, FastWeightAttention, marks_of
from fwp_fairseq.modules.stages import Tokens

# The memory of values that say which token of the source they are.
_MARKS = "marks"


class FastWeightCrossAttention(FastWeightAttention):
    """FastWeightAttention that reads the memory of another sequence, the source.

    In incremental decoding the source is written in the first step, once for all beams of a sentence, which share the
    memory from then on; key and value are not looked at again.

    Attention weights are given in evaluation, and in training if ``with_weights`` says so. In decoding they cost a
    second memory, of as many columns as the source has tokens.
    """

    encoder_decoder_attention = True
    # Whether weights are given to those who ask; None: in evaluation. fairseq's decoder asks its last layer always.
    with_weights: Optional[bool] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal:
            raise ValueError("cross-attention reads the whole memory: causal=True does not go with it")

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what is kept of a source, as far as there is such a thing."""
        return (MEMORY, NORMALIZER) if self.slots is None else (SLOT_KEYS, MEMORY, EMPTY_SLOTS)

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
            values = [source.v, *([marks_of(source)] if weights_wanted else [])]
            reads, memories, more = self._write_and_read(asked.q, source, values)
            state.share(query.size(1), **dict(zip((MEMORY, _MARKS), memories)), **more)
        if decoding:
            self._keep(incremental_state, state)
        read, *weights = reads
        return read.to(query.dtype), weights[0] if weights else None, asked

    def _read(self, q: Tensor, kept: LayerState, names: tuple[str, ...]) -> list[Tensor]:
        """What later queries read of the memories of these names."""
        if self.slots is None:
            normalizer = kept.get(NORMALIZER)
            return [self.recurrence.read(q, kept[name], normalizer, self.features) for name in names]
        chosen = self._by_slots(q, kept[SLOT_KEYS], kept[EMPTY_SLOTS])
        return [self.recurrence.read_mapped(chosen, kept[name], None) for name in names]
