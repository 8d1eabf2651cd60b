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

    All else is fairseq's: its forward pass calls what is here in place of its projections. In incremental decoding the
    search keeps, beside fairseq's keys and values, which grow, the last projections that the convolution needs.

    Raises ValueError for a width that is not allowed.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, config: FastWeightConfig, *, causal: bool = False, **options: Any
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        width = config.softmax_short_convolution
        (option,) = ShortConvolution.options
        replace(option, name="softmax_short_convolution").check(width, self.head_dim, "", "")
        self.causal = causal
        self.short_convolution = ShortConvolution(
            replace(config, short_convolution=width),
            Sizes(num_heads, self.head_dim, causal, self.encoder_decoder_attention),
        )
        # Or else it would multiply by the weights of the projections without calling them.
        self._set_skip_embed_dim_check()

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[IncrementalState] = None,
        *args: Any,
        **options: Any,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """As fairseq's."""
        state = self.get_incremental_state(incremental_state, _CONVOLVED) or AttentionState()
        called = copy.copy(self)
        for part in "qkv":
            vars(called)[f"{part}_proj"] = partial(self._project, part, state, key_padding_mask)
        out = MultiheadAttention.forward(called, query, key, value, key_padding_mask, incremental_state, *args, **options)
        self.set_incremental_state(incremental_state, _CONVOLVED, state)
        return out

    def _project(self, part: str, state: AttentionState, padding: Optional[Tensor], x: Tensor) -> Tensor:
        """(L, B, inputs) -> (L, B, embed_dim), by the projection of the queries, keys or values, and the convolution."""
        projected = getattr(self, f"{part}_proj")(x)
        length, rows, width = projected.shape
        heads = projected.reshape(length, rows, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
        asks = self.encoder_decoder_attention and part == "q"
        tokens = Tokens(padding=None if asks else padding)._replace(**{part: heads})
        mixed = getattr(self.short_convolution(tokens, state if self.causal or asks else AttentionState()), part)
        return mixed.permute(2, 0, 1, 3).reshape(length, rows, width)

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> IncrementalState:
        """Let row i go on from what row ``new_order[i]`` has. fairseq calls this of every module."""
        state = self.get_incremental_state(incremental_state, _CONVOLVED)
        if state is not None:
            state.reorder(new_order)
        return super().reorder_incremental_state(incremental_state, new_order)
