"""Multi-head attention whose memory is a fast-weight matrix, behind the interface of fairseq's MultiheadAttention."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import NORMALIZER, AttentionState
from fwp_fairseq.modules.carried_state import AttentionWithState, IncrementalState
from fwp_fairseq.modules.fast_weight_config import FastWeightConfig
from fwp_fairseq.modules.few_rows_linear import call_linears
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.modules.places import CROSS_ATTENTION, DECODER_SELF_ATTENTION, ENCODER_SELF_ATTENTION
from fwp_fairseq.modules.recurrence import Recurrence, apart, together, turned
from fwp_fairseq.modules.stages import STAGES, Mixing, Projection, ReadOut, Sizes, Slots, Stage, TokenGates, Tokens
from fwp_fairseq.ops import UPDATE_RULES, Gates, UpdateRule
from fwp_fairseq.ops.fast_weights import choose_backend
from fwp_fairseq.ops.numerics import state_dtype

# What queries choose a slot by, and which they cannot choose.
SLOT_KEYS = "slot_keys"
EMPTY_SLOTS = "empty_slots_mask"


class FastWeightAttention(AttentionWithState):
    """Attention that writes (key, value) associations into a matrix per head and reads them with queries.

    It projects its inputs, runs the stages, and keeps the state:

        projections → mixing → features → gates → recurrence → read-out → output projection

    The memory is read in one of three ways:

    - causal (decoder self-attention): every query reads right after its own token is written;
    - whole (``causal=False``, encoder self-attention): all tokens are written, then every query reads the finished
      memory. FastWeightCrossAttention does so with a source. ``Slots`` may stand for features and gates then;
    - in two directions (the encoder's with --encoder-reading two-directions; Zhu et al. 2024, "Vision Mamba"): half of
      the heads are causal, the others are so from the last token to the first. Order counts, and no token is hidden.

    Padded keys leave the memory as it is. ``dropout`` (--attention-dropout) acts on what is read, before the output
    projection: there are no attention weights to drop, and dropping writes would change the rule.

    In incremental decoding the state is the memory, (B, H, Dk, Dv) float32, with attention normalisation the
    normalizer, (B, H, Dk, 1), and what mixing keeps; none of it grows.

    Shapes are fairseq's: time first, (L, B, embed_dim). The second output is None unless attention weights are asked
    for: then it is those by which the values are read (``ops.implied_attention``).
    """

    encoder_decoder_attention = False
    gates: TokenGates
    slots: Optional[Slots]
    # Of a checkpoint in which the projections of softmax attention are one matrix.
    upgrade_state_dict_named = MultiheadAttention.upgrade_state_dict_named

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
        q_noise: float = 0.0,
        qn_block_size: int = 8,
    ) -> None:
        """Of the ``config``, whose options may differ by place, those of this attention's place count."""
        super().__init__()
        self.causal = causal
        config = (config or FastWeightConfig()).for_place(self.place)
        in_encoder = self.place == ENCODER_SELF_ATTENTION
        config.check(embed_dim, num_heads, "encoder" if in_encoder else "decoder")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.two_directions = in_encoder and str(config.encoder_reading) == "two-directions"
        self.update_rule = config.rule.name
        self.backend = str(config.fast_weight_backend)
        self.attention_normalization = config.attention_normalization

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return quant_noise(nn.Linear(inputs, outputs, bias=bias), q_noise, qn_block_size)

        bias = not config.no_attention_bias
        self.k_proj = linear(self.kdim, embed_dim, bias)
        self.v_proj = linear(self.vdim, embed_dim, bias)
        self.q_proj = linear(embed_dim, embed_dim, bias)
        self.out_proj = linear(embed_dim, embed_dim, bias)
        self._stages = [kind.name for kind in STAGES if kind.is_wanted(config)]
        sizes = Sizes(num_heads, self.head_dim, causal, self.encoder_decoder_attention)
        for kind in STAGES:
            stage = kind(config, sizes) if kind.is_wanted(config) else None
            self.add_module(kind.name, stage)
            for layer in () if stage is None else stage.projections():
                inputs, outputs = embed_dim if layer.of == "query" else self.kdim, num_heads * layer.per_head
                self.add_module(layer.name, nn.Linear(inputs, outputs, layer.bias) if layer.wanted else None)
        self.features = KeyFeatures(
            str(config.feature_map),
            str(config.key_normalization),
            self.head_dim,
            num_heads,
            **config.choices(config.map.options),
        )
        # Linear layers by name, and the inputs that they are of.
        self._layers = [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")]
        self._layers += [(layer.name, layer.of) for layer in self._wanted_layers()]
        # Under fairseq's name, which --retain-dropout-modules goes by.
        self.dropout_module = FairseqDropout(dropout, module_name="MultiheadAttention")
        self.reset_parameters()

    @property
    def place(self) -> str:
        """Where in a Transformer it stands, one of PLACES."""
        if self.encoder_decoder_attention:
            return CROSS_ATTENTION
        return DECODER_SELF_ATTENTION if self.causal else ENCODER_SELF_ATTENTION

    @property
    def rule(self) -> UpdateRule:
        """By its name, which a pickle can take with it."""
        return UPDATE_RULES[self.update_rule]

    @property
    def recurrence(self) -> Recurrence:
        """How memories are written and read."""
        return Recurrence(self.backend, self.attention_normalization, self.rule.max_norm)

    def stages(self, kind: type[Stage] = Stage) -> list[Any]:
        """Those that are there, or those of a kind."""
        return [stage for name in self._stages if isinstance(stage := getattr(self, name), kind)]

    def _wanted_layers(self) -> Iterator[Projection]:
        return (layer for stage in self.stages() for layer in stage.projections() if layer.wanted)

    def reset_parameters(self) -> None:
        """The projections as fairseq's attention has them, and those of the stages as these say."""
        same = self.kdim == self.embed_dim and self.vdim == self.embed_dim
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2) if same else 1.0)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        for layer in self._wanted_layers():
            layer.initialize(getattr(self, layer.name))

    def extra_repr(self) -> str:
        reading = "causal" if self.causal else "two directions" if self.two_directions else "whole memory"
        normalization = ", attention normalisation" if self.attention_normalization else ""
        heads = f"{self.num_heads} heads of {self.head_dim}{normalization}"
        backend = f"backend {self.backend}"
        if self.backend == "auto":
            weight = next(self.parameters(), torch.empty(0))
            keys = (self.features if self.slots is None else self.slots).size, state_dtype(weight.dtype)
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
    ) -> tuple[Tensor, Optional[Tensor]]:
        """query: (T, B, embed_dim), key, value: (S, B, kdim / vdim), key_padding_mask: (B, S), True at padding.

        Causal attention takes ``attn_mask`` for what it is, the mask of the future, which the order of writes implies.
        Its key may be longer than its query: what comes before the first query is written first. Raises ValueError for
        an ``attn_mask`` in the encoder and in cross-attention, where no token can be hidden from one query alone.

        Returns (T, B, embed_dim), and, with ``need_weights``, implied attention weights, (B, T, S), or those of each
        head, (num_heads, B, T, S), with ``need_head_weights``. They are None where the tokens before are not there any
        more (causal attention that goes on from a state), and with a bound on the memory (FWM).
        """
        if attn_mask is not None and not self.causal:
            raise ValueError(
                "fast weights cannot hide one token from one query: an attn_mask needs softmax attention here"
            )
        weights_wanted = (need_weights or need_head_weights) and self.gives_weights
        read, weights, tokens = self._attend(query, key, value, key_padding_mask, incremental_state, weights_wanted)
        if weights is not None:
            weights = weights.transpose(0, 1) if need_head_weights else weights.mean(dim=1)
        for stage in self.stages(ReadOut):
            read = stage(read, tokens)
        # (B, H, T, head_dim) -> (T, B, embed_dim)
        read = read.permute(2, 0, 1, 3).reshape(query.shape)
        return self.out_proj(self.dropout_module(read)), weights

    @property
    def gives_weights(self) -> bool:
        """Whether there are attention weights for those who ask."""
        return self.rule.max_norm is None

    def _attend(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        padding: Optional[Tensor],
        incremental_state: Optional[IncrementalState],
        weights_wanted: bool,
    ) -> tuple[Tensor, Optional[Tensor], Tokens]:
        """What the queries read, (B, H, T, head_dim), by which weights, (B, H, T, S), and the tokens that they are of.

        Weights are what is read of values that say which token they are.
        """
        state = self._kept(incremental_state, query.size(1)) if self.causal else AttentionState()
        stateless = incremental_state is None and self._carried() is None
        decoding = self.causal and incremental_state is not None
        tokens = self._mix(self._project(query, key, value, padding, decoding), state)
        marks = marks_of(tokens) if weights_wanted and (stateless or not self.causal) else None
        if not self.causal:
            values = [tokens.v, *([] if marks is None else [marks])]
            if self.two_directions:
                given = tokens.q, tokens.k, self.gates(tokens), self.features
                reads = self.recurrence.two_directions(*given, *values)
            else:
                reads, *_ = self._write_and_read(tokens.q, tokens, values)
            return reads[0].to(query.dtype), None if marks is None else reads[1], tokens
        gates = self.gates(tokens)
        read, read_marks = self.recurrence.causal(
            tokens.q, tokens.k, tokens.v, gates, self.features, state, decoding, marks
        )
        self._keep(incremental_state, state)
        return read, read_marks, tokens

    def _write_and_read(self, q: Tensor, source: Tokens, values: list[Tensor]) -> tuple[list[Tensor], list[Any], Any]:
        """What queries read of the ``values`` of a source, written whole, of each, and the memory of each.

        Last, by name, is what else later queries need.
        """
        if self.slots is None:
            given = q, source.k, self.gates(source), self.features
            reads, memories, normalizer = self.recurrence.whole(*given, *values)
            return reads, memories, {NORMALIZER: normalizer}
        shares, *slots = self._into_slots(source)
        addresses = self._by_slots(q, *slots), shares.to(source.k.dtype)
        reads, memories, _ = self.recurrence.whole(*addresses, Gates(), lambda *mapped: mapped, *values)
        return reads, memories, dict(zip((SLOT_KEYS, EMPTY_SLOTS), slots))

    def addresses(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """Queries and keys as mapped, (B, H, T, Dk) and (B, H, S, Dk), of tokens after their mixing."""
        if self.slots is None:
            return self.features(tokens.q, tokens.k)
        shares, *slots = self._into_slots(tokens)
        return self._by_slots(tokens.q, *slots), shares

    def _into_slots(self, source: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Keys as mapped, (B, H, S, slots), those of the slots, (B, H, slots, head_dim), and which are empty."""
        assert self.slots is not None
        shares, empty = self.slots.keys(source)
        return shares, shares.transpose(2, 3) @ source.k.to(shares.dtype), empty

    def _by_slots(self, q: Tensor, names: Tensor, empty: Tensor) -> Tensor:
        """Queries (B', H, T, head_dim) as mapped, by the keys of slots and by which are empty."""
        assert self.slots is not None
        return apart(self.slots.queries(together(q, names), names, empty), q.size(0))

    def in_order(self, x: Tensor) -> Tensor:
        """(B, H, L, ...), the tokens in the order in which each head writes them; twice, they are as they were."""
        return turned(x) if self.two_directions else x

    def _mix(self, tokens: Tokens, state: AttentionState) -> Tokens:
        for stage in self.stages(Mixing):
            tokens = stage(tokens, state)
        return tokens

    def _project(
        self,
        query: Optional[Tensor],
        key: Optional[Tensor],
        value: Optional[Tensor],
        padding: Optional[Tensor] = None,
        decoding: bool = False,
    ) -> Tokens:
        """What the linear layers make of the inputs that are given: in decoding, all of them at the same time."""
        inputs = {"query": query, "key": key, "value": value}
        layers: list[Any] = [self._modules.get(name) or getattr(self, name) for name, _ in self._layers]
        outputs: Sequence[Optional[Tensor]]
        if decoding and query is not None and query is key is value:
            outputs = call_linears(layers, query)
        else:
            outputs = [None if inputs[of] is None else f(inputs[of]) for f, (_, of) in zip(layers, self._layers)]
        q, k, v, *wanted = (None if x is None else self._split_heads(x) for x in outputs)
        return Tokens(q, k, v, {name: x for (name, _), x in zip(self._layers[3:], wanted) if x is not None}, padding)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(T, B, num_heads * size) -> (B, H, T, size)."""
        length, rows, width = x.shape
        if length == 1:
            return x.reshape(rows, self.num_heads, 1, width // self.num_heads)
        return x.reshape(length, rows, self.num_heads, width // self.num_heads).permute(1, 2, 0, 3)


def marks_of(tokens: Tokens) -> Tensor:
    """Values that are one at their own token and zero elsewhere, (B, H, S, S)."""
    which = torch.eye(tokens.v.size(2), device=tokens.v.device, dtype=tokens.v.dtype)
    return which.expand(*tokens.v.shape[:2], -1, -1)
