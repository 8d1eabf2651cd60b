"""Transformer-XL (Dai et al. 2019) as a language model for streaming_language_modeling: the baseline of table 4.

fairseq's Transformer decoder with RelativeAttention in its layers and no positions in its input. What it carries is the
memory: layers × memory length × width numbers. Unlike Dai et al. there is no dropout on the position vectors, and every
layer has its own u and v.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn

from fwp_fairseq.models.fwp_transformer_lm import LanguageModel, LanguageModelConfig, set_wiki103_defaults
from fwp_fairseq.modules.carried_state import CarriesState
from fwp_fairseq.modules.fast_weight_layers import wrap_layer
from fwp_fairseq.modules.relative_attention import RelativeAttention


@dataclass
class TransformerXLLanguageModelConfig(LanguageModelConfig):
    """Options of fairseq's transformer_lm, and of the memory."""

    memory_length: int = field(
        default=256, metadata={"help": "earlier hidden states that each layer keeps in training"}
    )
    eval_memory_length: Optional[int] = field(
        default=None, metadata={"help": "the same in evaluation and generation (default: as in training)"}
    )


class TransformerXLDecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer with RelativeAttention."""

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> nn.Module:
        heads, dropout = cfg.decoder.attention_heads, cfg.attention_dropout
        return RelativeAttention(embed_dim, heads, cfg.memory_length, cfg.eval_memory_length, dropout)


class TransformerXLDecoder(CarriesState, TransformerDecoderBase):
    """fairseq's Transformer decoder with TransformerXLDecoderLayer."""

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        return wrap_layer(TransformerXLDecoderLayer(cfg, no_encoder_attn), cfg)

    def buffered_future_mask(self, tensor: Tensor) -> None:
        """None: the attention has its own, which is wider by the memory."""


@register_model("transformer_xl_lm", dataclass=TransformerXLLanguageModelConfig)
class TransformerXLLanguageModel(LanguageModel):
    """Decoder-only Transformer with relative positions and a memory of the earlier segments."""

    @classmethod
    def build_decoder(cls, cfg: Any, args: Any, dictionary: Any, embed_tokens: nn.Module) -> nn.Module:
        cfg.no_token_positional_embeddings = True
        cfg.memory_length, cfg.eval_memory_length = args.memory_length, args.eval_memory_length
        return TransformerXLDecoder(cfg, dictionary, embed_tokens, no_encoder_attn=True)


@register_model_architecture("transformer_xl_lm", "transformer_xl_wiki103_medium")
def transformer_xl_wiki103_medium(args: Any) -> None:
    """Table 4's baseline: sizes of fwp_transformer_lm_wiki103_medium."""
    set_wiki103_defaults(args, decoder_embed_dim=256)
