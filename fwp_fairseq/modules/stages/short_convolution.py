"""A short convolution over what is projected, before the feature map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import AttentionState
from fwp_fairseq.modules.stages.stage import Mixing, Sizes, Tokens
from fwp_fairseq.ops import Option

if TYPE_CHECKING:
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig

LARGEST_WIDTH = 16


def _why_no_width(width: int, *_: Any) -> Optional[str]:
    allowed = width == 0 or 2 <= width <= LARGEST_WIDTH
    return None if allowed else f"allowed is 0, for none, or 2 to {LARGEST_WIDTH}"


class ShortConvolution(Mixing):
    """x_t ← Σ_j w_j ∘ x_{t-j}, j = 0..W-1, of each channel of q, k and v (Fu et al., 2023; Yang et al., 2024).

    A key that knows the words before its own can be written for what comes after them. Where all words are there the
    keys, the values and the encoder's queries have W // 2 words before and (W - 1) // 2 after them instead. Padding
    counts as nothing. It begins as the identity, and keeps W - 1 projections of each token.
    """

    name = "short_convolution"
    options = (
        Option(
            "short_convolution",
            0,
            f"width of a convolution over queries, keys and values, 2 to {LARGEST_WIDTH}; 0: none",
            why_not=_why_no_width,
        ),
    )

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.width = config.short_convolution
        # How many of the words that are seen come later.
        whole = 0 if sizes.causal else (self.width - 1) // 2
        self.later = {"q": 0 if sizes.cross else whole, "k": whole, "v": whole}
        # Padding is of what is written: not of the queries to a source.
        self.padded = "kv" if sizes.cross else "qkv"
        for part, later in self.later.items():
            weight = torch.zeros(self.width, sizes.num_heads, 1, sizes.head_dim)
            weight[self.width - 1 - later] = 1
            self.register_parameter(part, nn.Parameter(weight))

    @classmethod
    def is_wanted(cls, config: FastWeightConfig) -> bool:
        return config.short_convolution != 0

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(self, tokens: Tokens, state: AttentionState) -> Tokens:
        padding = None if tokens.padding is None else tokens.padding.bool()
        mixed: dict[str, Any] = {
            part: self._convolve(x, padding if part in self.padded else None, part, state)
            for part in self.later
            if (x := getattr(tokens, part)) is not None
        }
        return tokens._replace(**mixed)

    def _convolve(self, x: Tensor, padding: Optional[Tensor], part: str, state: AttentionState) -> Tensor:
        """(B, H, L, head_dim) -> the same."""
        length, later, weight = x.size(2), self.later[part], getattr(self, part)
        if padding is not None:
            # The last tokens are those of the padding: there may be fewer queries than keys.
            padding = padding[:, -length:]
            x = x.masked_fill(padding[:, None, :, None], 0)
        before = state.get(f"convolved_{part}")
        if before is None:
            before = x.new_zeros(*x.shape[:2], self.width - 1 - later, x.size(3))
        x = torch.cat([before.to(x.dtype), x, x.new_zeros(*x.shape[:2], later, x.size(3))], dim=2)
        if not later:
            state.put(**{f"convolved_{part}": self._last(x, padding)})
        mixed = x[:, :, :length] * weight[0]
        for shift in range(1, self.width):
            mixed = torch.addcmul(mixed, x[:, :, shift : shift + length], weight[shift])
        return mixed

    def _last(self, x: Tensor, padding: Optional[Tensor]) -> Tensor:
        """What comes before the token after these: of each row the W - 1 that end with the last that is no padding."""
        if padding is None:
            return x[:, :, x.size(2) - self.width + 1 :]
        positions = torch.arange(1, padding.size(1) + 1, device=x.device)
        ends = (positions * ~padding).amax(dim=1, keepdim=True)
        index = ends + torch.arange(self.width - 1, device=x.device)
        return x.gather(2, index[:, None, :, None].expand(-1, x.size(1), -1, x.size(3)))
