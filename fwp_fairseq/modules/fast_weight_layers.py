"""Transformer layers with fast weights in the places that the model's configuration names, or convolved softmax.

``cfg`` is fairseq's TransformerConfig with two more attributes: ``fast_weights``, a FastWeightConfig, and
``fast_weight_places``, a subset of PLACES (``places``).
"""

from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import nn

from fwp_fairseq.modules.convolved_softmax import ConvolvedSoftmaxAttention
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.modules.fast_weight_cross_attention import FastWeightCrossAttention
from fwp_fairseq.modules.places import CROSS_ATTENTION, DECODER_SELF_ATTENTION, ENCODER_SELF_ATTENTION


def is_own(place: str, cfg: Any) -> bool:
    """Whether the attention in one of PLACES is of this package, and not fairseq's."""
    return place in cfg.fast_weight_places or cfg.fast_weights.softmax_short_convolution != 0


class FastWeightEncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer, with fast weights for self-attention where the configuration says so."""

    def build_self_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        if not is_own(ENCODER_SELF_ATTENTION, cfg):
            return super().build_self_attention(embed_dim, cfg)
        return _build_attention(ENCODER_SELF_ATTENTION, cfg, embed_dim)


class FastWeightDecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer, with fast weights for self- and cross-attention where the configuration says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of softmax fairseq asks for weights that nobody looks at.
        if isinstance(self.encoder_attn, FastWeightCrossAttention):
            self.need_attn = False

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> nn.Module:
        if not is_own(DECODER_SELF_ATTENTION, cfg):
            return super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return _build_attention(DECODER_SELF_ATTENTION, cfg, embed_dim, causal=True)

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        if not is_own(CROSS_ATTENTION, cfg):
            return super().build_encoder_attention(embed_dim, cfg)
        source = cfg.encoder.embed_dim
        return _build_attention(CROSS_ATTENTION, cfg, embed_dim, kdim=source, vdim=source)


def wrap_layer(layer: nn.Module, cfg: Any) -> nn.Module:
    """Activation checkpointing and FSDP around a layer, as fairseq's ``build_*_layer`` put them around theirs."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


def _build_attention(place: str, cfg: Any, embed_dim: int, **kwargs: Any) -> nn.Module:
    side = cfg.encoder if place == ENCODER_SELF_ATTENTION else cfg.decoder
    has_fast_weights = place in cfg.fast_weight_places
    if side.xformers_att_config is not None:
        what, instead = "--softmax-short-convolution", "that"
        if has_fast_weights:
            what, instead = "fast-weight attention", "choose softmax for this place"
        raise ValueError(
            f"xformers_att_config is {side.xformers_att_config!r}, but {what} has no xFormers form: leave it out, or "
            f"{instead}"
        )
    kwargs.update(
        dropout=cfg.attention_dropout, q_noise=cfg.quant_noise.pq, qn_block_size=cfg.quant_noise.pq_block_size
    )
    if not has_fast_weights:
        kwargs.update(
            self_attention=place != CROSS_ATTENTION and not (kwargs.get("causal") and cfg.cross_self_attention),
            encoder_decoder_attention=place == CROSS_ATTENTION,
        )
        return ConvolvedSoftmaxAttention(embed_dim, side.attention_heads, cfg.fast_weights, **kwargs)
    kind = FastWeightCrossAttention if place == CROSS_ATTENTION else FastWeightAttention
    try:
        return kind(embed_dim, side.attention_heads, cfg.fast_weights, **kwargs)
    except ValueError as error:
        if not cfg.fast_weights.differs_by_place():
            raise
        raise ValueError(
            f"with the --whole-memory-* and --cross-* options in place of those they replace: {error}"
        ) from None
