"""Multi-head attention whose memory is a fast-weight matrix, behind the interface of fairseq's MultiheadAttention."""

import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
from fairseq.modules import LayerNorm
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn

from fwp_fairseq.modules.carried_state import MEMORY, AttentionWithState
from fwp_fairseq.modules.fast_weight_config import FastWeightConfig
from fwp_fairseq.modules.few_rows_linear import call_linears
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
from fwp_fairseq.ops.fast_weights import choose_backend
from fwp_fairseq.ops.numerics import state_dtype
from fwp_fairseq.ops.torch_modes import is_transformed

IncrementalState = dict[str, dict[str, Optional[Tensor]]]

_NORMALIZER = "normalizer"
# With the compiled step: where rows of the batch have their memories, and the beam order that is yet to be applied.
_PLACES = "places"
_ORDER = "order"
# Of cross-attention: which memory each row reads. Neighbours share one, and each memory has as many.
_SOURCES = "sources"


class FastWeightAttention(AttentionWithState):
    """Attention that writes (key, value) associations into a matrix per head and reads them with queries.

    It composes projections, a feature map with its normalisation, an update rule, optional attention normalisation,
    and one of two readings of the memory:

    - causal (decoder self-attention): every query reads right after its own token is written;
    - whole (``self_attention=True, causal=False``: encoder; ``encoder_decoder_attention=True``: cross-attention): all
      tokens are written, then every query reads the finished memory.

    The write strength is a sigmoid of a projection to one scalar per head (eq. 21). Padded keys leave the memory as
    it is. ``dropout`` (--attention-dropout) acts on what is read, before the output projection: there are no attention
    weights to drop, and dropping writes would change the rule.

    In incremental decoding the state is the memory, (B, H, Dk, Dv) float32, and with attention normalisation the
    normalizer, (B, H, Dk, 1); neither grows. Cross-attention writes the source once, and beams of a sentence share it.

    Shapes are fairseq's: time first, (L, B, embed_dim). The second output, attention weights, is always None.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        config: Optional[FastWeightConfig] = None,
        *,
        kdim: Optional[int] = None,
        vdim: Optional[int] = None,
        dropout: float = 0.0,
        causal: bool = False,
        encoder_decoder_attention: bool = False,
        q_noise: float = 0.0,
        qn_block_size: int = 8,
    ) -> None:
        super().__init__()
        config = config or FastWeightConfig()
        config.check(embed_dim, num_heads, "decoder" if causal or encoder_decoder_attention else "encoder")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.causal = causal
        self.encoder_decoder_attention = encoder_decoder_attention
        self.rule = config.rule
        self.backend = str(config.fast_weight_backend)
        self.attention_normalization = config.attention_normalization

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return quant_noise(nn.Linear(inputs, outputs, bias=bias), q_noise, qn_block_size)

        bias = not config.no_attention_bias
        self.k_proj = linear(self.kdim, embed_dim, bias)
        self.v_proj = linear(self.vdim, embed_dim, bias)
        self.q_proj = linear(embed_dim, embed_dim, bias)
        self.out_proj = linear(embed_dim, embed_dim, bias)
        self.write_proj = nn.Linear(self.kdim, num_heads, config.write_strength_bias) if self.rule.strength else None
        self.decay_proj = nn.Linear(self.kdim, num_heads) if self.rule.forgets == "learned" else None
        self.features = KeyFeatures(
            str(config.feature_map),
            str(config.key_normalization),
            self.head_dim,
            nu=config.dpfp_nu,
            m=config.favor_features,
        )
        # FWM reads through a layer norm (sec. 6.1.2): the bound on its memory bounds what can be read.
        normalize_read = config.read_layer_norm or self.rule.max_norm is not None
        self.read_layer_norm = LayerNorm(self.head_dim) if normalize_read else None
        # Under fairseq's name, which --retain-dropout-modules goes by.
        self.dropout_module = FairseqDropout(dropout, module_name="MultiheadAttention")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As fairseq's attention; the write strength starts near 1/2, the kept share of a gated memory near 1."""
        same = self.kdim == self.embed_dim and self.vdim == self.embed_dim
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2) if same else 1.0)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        if self.write_proj is not None:
            nn.init.xavier_uniform_(self.write_proj.weight)
            if self.write_proj.bias is not None:
                nn.init.zeros_(self.write_proj.bias)
        if self.decay_proj is not None:
            # σ(4) = 0.98: a memory of some fifty tokens to start from.
            nn.init.xavier_uniform_(self.decay_proj.weight)
            nn.init.constant_(self.decay_proj.bias, 4.0)

    def extra_repr(self) -> str:
        reading = "causal" if self.causal else "whole memory"
        normalization = ", attention normalisation" if self.attention_normalization else ""
        heads = f"{self.num_heads} heads of {self.head_dim}{normalization}"
        backend = f"backend {self.backend}"
        if self.backend == "auto":
            weight = next(self.parameters(), torch.empty(0))
            keys = self.features.size, state_dtype(weight.dtype)
            backend += f" ({choose_backend('auto', self.rule.max_norm, weight.device.type, *keys)})"
        return f"{self.rule.name} rule, {reading}, {heads}, {backend}"

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks every module for what it shall compile in its stead."""
        raise NotImplementedError(
            "torch.jit.script cannot compile fast weights: use torch.compile, or train with softmax in all places "
            "(--encoder-self-attention, --decoder-self-attention, --cross-attention)"
        )

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[IncrementalState] = None,
        need_weights: bool = False,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """query: (T, B, embed_dim), key, value: (S, B, kdim / vdim), key_padding_mask: (B, S), True at padding.

        Causal attention takes ``attn_mask`` for what it is, the mask of the future, which the order of writes implies.
        Its key may be longer than its query: what comes before the first query is written first. Raises ValueError for
        an ``attn_mask`` on the whole memory, which cannot hide one token from one query. Arguments about attention
        weights are accepted and have no effect. Returns ((T, B, embed_dim), None).
        """
        if attn_mask is not None and not self.causal:
            raise ValueError("fast weights read the memory as a whole: an attn_mask needs softmax attention here")
        if self.causal:
            read = self._read_causal(query, key, value, key_padding_mask, incremental_state)
        else:
            read = self._read_whole(query, key, value, key_padding_mask, incremental_state)
        if self.read_layer_norm is not None:
            read = self.read_layer_norm(read)
        # (B, H, T, head_dim) -> (T, B, embed_dim)
        read = read.permute(2, 0, 1, 3).reshape(query.shape)
        return self.out_proj(self.dropout_module(read)), None

    def _read_causal(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        padding: Optional[Tensor],
        incremental_state: Optional[IncrementalState],
    ) -> Tensor:
        assert key is not None and value is not None
        if incremental_state is not None and key.size(0) == 1 and self._decodes_natively(query):
            return self._step_natively(query, key, value, padding, incremental_state)
        q, k, v = self._split_heads(self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k = self.features(q, k)
        gates = self._gates(key, padding)
        memory, normalizer = _in_rows(self._kept(incremental_state, query.size(1)))

        before = k.size(2) - q.size(2)
        if before > 0:
            memory, normalizer = self._write(
                k[:, :, :before], v[:, :, :before], _cut(gates, slice(0, before)), memory, normalizer
            )
            k, v, gates = k[:, :, before:], v[:, :, before:], _cut(gates, slice(before, None))

        # In place, which is not for a memory that was carried here.
        in_place = incremental_state is not None and q.size(2) == 1 and not torch.is_grad_enabled()
        if in_place and memory is not None:
            read = self._step(q[:, :, 0], k[:, :, 0], v[:, :, 0], _cut(gates, 0), memory, normalizer)[:, :, None]
        elif self.attention_normalization:
            read, memory, normalizer = normalized_scan(
                q, k, v, gates, initial_state=memory, initial_normalizer=normalizer, backend=self.backend
            )
        else:
            read, memory = fast_weight_scan(
                q, k, v, *gates, initial_state=memory, backend=self.backend, max_norm=self.rule.max_norm
            )
        self._keep(incremental_state, {MEMORY: memory, _NORMALIZER: normalizer})
        return read

    def _decodes_natively(self, query: Tensor) -> bool:
        """Whether one compiled operator can do all of this token's work on the memory."""
        return (
            query.size(0) == 1
            and self.backend in ("auto", "native")
            and self.rule.max_norm is None
            and not self.training
            and not torch.is_grad_enabled()
            and native.unavailable is None
            and not is_transformed()
            and native.supports(query.device.type, self.features.size, state_dtype(query.dtype))
        )

    def _step_natively(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Optional[Tensor], incremental_state: IncrementalState
    ) -> Tensor:
        rows, heads = query.size(1), (query.size(1), self.num_heads, self.head_dim)
        buffer = self._kept(incremental_state, rows)
        memory, normalizer = buffer.get(MEMORY), buffer.get(_NORMALIZER)
        if memory is None:
            memory = query.new_zeros(*heads[:2], self.features.size, self.head_dim, dtype=state_dtype(query.dtype))
            normalizer = memory.new_zeros(*memory.shape[:3], 1) if self.attention_normalization else None
        q, k, v, *logits = self._project(query, key, value)
        write_logit, decay_logit = (None if logit is None else logit[0] for logit in logits)
        gates = self._gates_of(write_logit, decay_logit, None if padding is None else padding.bool())
        gates = Gates(*(None if gate is None else gate.expand(rows, self.num_heads) for gate in gates))
        read, places = native.step(
            q.view(heads),
            k.view(heads),
            v.view(heads),
            *gates,
            memory,
            normalizer,
            buffer.get(_ORDER),
            buffer.get(_PLACES),
            self.features.address_features(),
        )
        self._set_input_buffer(incremental_state, {MEMORY: memory, _NORMALIZER: normalizer, _PLACES: places})
        return read[:, :, None]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Any]:
        """Of (1, B, .): q, k, v and, where the rule has them, the write strength and the kept share."""
        layers = [self.q_proj, self.k_proj, self.v_proj, self.write_proj, self.decay_proj]
        if not (query is key is value):
            return [None if f is None else f(x) for f, x in zip(layers, (query, key, value, key, key))]
        outputs = iter(call_linears([layer for layer in layers if layer is not None], query))
        return [None if layer is None else next(outputs) for layer in layers]

    def _read_whole(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        padding: Optional[Tensor],
        incremental_state: Optional[IncrementalState],
    ) -> Tensor:
        # Only cross-attention decodes incrementally; its memory is written once.
        incremental_state = incremental_state if self.encoder_decoder_attention else None
        buffer = self._get_input_buffer(incremental_state)
        memory, normalizer = buffer.get(MEMORY), buffer.get(_NORMALIZER)
        (q,) = self._split_heads(self.q_proj(query))
        if memory is None:
            assert key is not None and value is not None
            if incremental_state is not None:
                # The beams of a sentence have the same source.
                beams = _beams(key.transpose(0, 1), value.transpose(0, 1), padding)
                key, value = key[:, ::beams], value[:, ::beams]
                padding = None if padding is None else padding[::beams]
            k, v = self._split_heads(self.k_proj(key), self.v_proj(value))
            q, k = self.features(q, k)
            memory, normalizer = self._write(k, v, self._gates(key, padding))
            self._set_input_buffer(incremental_state, _shared(memory, normalizer, rows=query.size(1)))
        elif self._decodes_natively(query):
            return native.read(q[:, :, 0], memory, normalizer, self.features.address_features())[:, :, None]
        else:
            (q,) = self.features(q)

        # Beams read the memory that they share as if they were further time steps of one sentence.
        beams, sentences = q.size(0), memory.size(0)
        if beams != sentences:
            q = q.unflatten(0, (sentences, -1)).transpose(1, 2).flatten(2, 3)
        read = fast_weight_read(q, memory) if normalizer is None else normalized_read(q, memory, normalizer)
        if beams != sentences:
            read = read.unflatten(2, (beams // sentences, -1)).transpose(1, 2).flatten(0, 1)
        return read.to(query.dtype)

    def _write(
        self, k: Tensor, v: Tensor, gates: Gates, memory: Optional[Tensor] = None, normalizer: Optional[Tensor] = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        if self.attention_normalization:
            return normalized_memory(
                k, v, gates, initial_state=memory, initial_normalizer=normalizer, backend=self.backend
            )
        memory = fast_weight_memory(
            k, v, *gates, initial_state=memory, backend=self.backend, max_norm=self.rule.max_norm
        )
        return memory, None

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, memory: Tensor, normalizer: Optional[Tensor]
    ) -> Tensor:
        if normalizer is not None:
            return normalized_step(q, k, v, gates, memory, normalizer)
        return fast_weight_step(q, k, v, *gates, memory, max_norm=self.rule.max_norm)

    def _gates(self, key: Tensor, padding: Optional[Tensor]) -> Gates:
        """Scalars of the update rule for (S, B, kdim) keys: (B, H, S), in the state's type."""
        write_logit, decay_logit = (
            None if projection is None else projection(key).permute(1, 2, 0)
            for projection in (self.write_proj, self.decay_proj)
        )
        padding = None if padding is None else padding.bool()[:, None, :].expand(-1, self.num_heads, -1)
        return self._gates_of(write_logit, decay_logit, padding)

    def _gates_of(
        self, write_logit: Optional[Tensor], decay_logit: Optional[Tensor], padding: Optional[Tensor]
    ) -> Gates:
        """Scalars of the update rule from what is projected, and where padding leaves the memory as it is."""
        beta, alpha = (
            None if logit is None else logit.to(state_dtype(logit.dtype)).sigmoid()
            for logit in (write_logit, decay_logit)
        )
        return self.rule.gates(beta, alpha, padding)

    def _split_heads(self, *projected: Tensor) -> tuple[Tensor, ...]:
        """(T, B, embed_dim) -> (B, H, T, head_dim)."""
        return tuple(x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in projected)

    def reorder_incremental_state(
        self, incremental_state: Optional[IncrementalState], new_order: Tensor
    ) -> Optional[IncrementalState]:
        """Let row i go on from what row ``new_order[i]`` has written so far."""
        buffer = self._get_input_buffer(incremental_state)
        memory, order, sources = buffer.get(MEMORY), buffer.get(_ORDER), buffer.get(_SOURCES)
        if memory is None:
            return incremental_state
        if sources is not None:
            # Beams change places within their sentence, which is no change here, and whole sentences leave the batch.
            new_sources = sources.index_select(0, new_order)
            if new_sources.equal(sources):
                return incremental_state
            where = new_sources[:: _beams(new_sources[:, None])]
            normalizer = buffer.get(_NORMALIZER)
            normalizer = None if normalizer is None else normalizer.index_select(0, where)
            shared = _shared(memory.index_select(0, where), normalizer, rows=new_order.size(0))
            return self._set_input_buffer(incremental_state, shared)
        if order is not None:
            new_order = order.index_select(0, new_order)
        reordered = {**buffer, _ORDER: new_order}
        # The next step finds the memories where they are; there are not places for more rows than before.
        if new_order.size(0) > memory.size(0):
            memory, normalizer = _in_rows(reordered)
            reordered = {MEMORY: memory, _NORMALIZER: normalizer}
        return self._set_input_buffer(incremental_state, reordered)


def _beams(*tensors: Optional[Tensor]) -> int:
    """The size of the largest groups of neighbours that are equal in all tensors and make up all of their rows."""
    given = [x for x in tensors if x is not None]
    equal = torch.stack([(x[1:] == x[:-1]).flatten(1).all(dim=1) for x in given]).all(dim=0)
    borders = 1 + equal.logical_not().nonzero().flatten()
    return math.gcd(given[0].size(0), *borders.tolist()) or 1


def _shared(memory: Tensor, normalizer: Optional[Tensor], rows: int) -> dict[str, Optional[Tensor]]:
    """What cross-attention keeps: memories of which each is read by as many of the ``rows`` of the batch."""
    memories = torch.arange(memory.size(0), device=memory.device)
    sources = memories.repeat_interleave(rows // max(1, memory.size(0)))
    return {MEMORY: memory, _NORMALIZER: normalizer, _SOURCES: sources}


def _cut(gates: Gates, where: "slice | int") -> Gates:
    return Gates(*(None if gate is None else gate[:, :, where] for gate in gates))


def _in_rows(buffer: Mapping[str, Optional[Tensor]]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Memory and normalizer of each row of the batch, from a buffer that says where they are."""
    memory, normalizer, places, order = (buffer.get(name) for name in (MEMORY, _NORMALIZER, _PLACES, _ORDER))
    if order is not None and places is not None:
        order = places.index_select(0, order)
    where = places if order is None else order
    if memory is None or where is None:
        return memory, normalizer
    return memory.index_select(0, where), None if normalizer is None else normalizer.index_select(0, where)
