"""fairseq's softmax attention over queries, keys and values that a short convolution has mixed (So et al. 2021)."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Optional

from fairseq.modules import MultiheadAttention
from torch import Tensor

from fwp_fairseq.modules.attention_state import AttentionState
from fwp_fairseq.modules.carried_state import IncrementalState
from fwp_fairseq.modules.fast_weight_config import FastWeightConfig
from fwp_fairseq.modules.stages import ShortConvolution, Sizes, Tokens

# Name in the incremental state, beside that of fairseq's keys and values.
_CONVOLVED = "convolved"


class ConvolvedSoftmaxAttention(MultiheadAttention):
    """MultiheadAttention whose projections go through ``ShortConvolution`` (--softmax-short-convolution).

    The rest is fairseq's, whose forward pass calls ``_project`` in place of the linear layers. In incremental decoding
    a search keeps, beside fairseq's keys and values of all tokens, the last W - 1 projections.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, config: FastWeightConfig, *, causal: bool = False, **options: Any
    ) -> None:
        """``options`` are fairseq's. Raises ValueError for a width that is not allowed."""
        super().__init__(embed_dim, num_heads, **options)
        self.causal = causal
        (option,) = ShortConvolution.options
        own: dict[str, Any] = {option.name: config.softmax_short_convolution}
        replace(option, name="softmax_short_convolution").check(own[option.name], self.head_dim, "head size", "")
        sizes = Sizes(num_heads, self.head_dim, causal, self.encoder_decoder_attention)
        self.short_convolution = ShortConvolution(replace(config, **own), sizes)
        # Without it fairseq has torch multiply by the weights of the linear layers, past these.
        self._set_skip_embed_dim_check()

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks every module for what it shall compile in its stead."""
        raise NotImplementedError(
            "torch.jit.script cannot compile --softmax-short-convolution: use torch.compile, or train without it"
        )

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[IncrementalState] = None,
        *more: Any,
        **options: Any,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As fairseq's."""
        state = self.kept_state(incremental_state) or AttentionState()
        # What belongs to one call must not be on the module: threads share it.
        this_call = copy.copy(self)
        for part in "qkv":
            this_call.__dict__[f"{part}_proj"] = partial(self._project, part, state, key_padding_mask)
        out = MultiheadAttention.forward(
            this_call, query, key, value, key_padding_mask, incremental_state, *more, **options
        )
        self.set_incremental_state(incremental_state, _CONVOLVED, state)
        return out

    def _project(self, part: str, state: AttentionState, padding: Optional[Tensor], x: Tensor) -> Tensor:
        """Queries, keys or values, (L, B, embed_dim), of (L, B, inputs). padding: (B, S), of the keys."""
        projected = getattr(self, f"{part}_proj")(x)
        heads = projected.unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3)
        tokens = Tokens(**{part: heads}, padding=padding)
        mixed = getattr(self.short_convolution(tokens, state), part)
        return mixed.permute(2, 0, 1, 3).reshape(projected.shape)

    def kept_state(self, incremental_state: Optional[IncrementalState]) -> Any:
        """What its convolution keeps in a search, an AttentionState, or None."""
        return self.get_incremental_state(incremental_state, _CONVOLVED)

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> IncrementalState:
        """Let row i go on from what row ``new_order[i]`` has. fairseq calls this of every module."""
        state = self.kept_state(incremental_state)
        if state is not None:
            state.reorder(new_order)
        return super().reorder_incremental_state(incremental_state, new_order)
