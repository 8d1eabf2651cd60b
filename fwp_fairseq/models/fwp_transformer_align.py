"""fairseq's Transformer that learns to align (Garg et al. 2019), with fast weights: its options, and its forward pass.

One layer's cross-attention is supervised with alignments, by the criterion label_smoothed_cross_entropy_with_alignment.
With fast weights there, that is implied attention.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model
from fairseq.models.transformer import base_architecture
from fairseq.models.transformer_align import TransformerAlignModel

from fwp_fairseq.models.fwp_transformer import FWPTransformerConfig, FWPTransformerModel
from fwp_fairseq.modules.places import DECODER_SELF_ATTENTION

logger = logging.getLogger(__name__)


@dataclass
class FWPTransformerAlignConfig(FWPTransformerConfig):
    """Options of fwp_transformer, and of fairseq's transformer_align."""

    alignment_heads: int = field(default=1, metadata={"help": "heads of cross-attention that learn to align"})
    alignment_layer: int = field(default=4, metadata={"help": "layer of the decoder that learns to align, from 0"})
    full_context_alignment: bool = field(
        default=False,
        metadata={"help": "align with the whole target in sight: softmax in the decoder's self-attention"},
    )


@register_model("fwp_transformer_align", dataclass=FWPTransformerAlignConfig)
class FWPTransformerAlignModel(FWPTransformerModel):
    """Encoder-decoder Transformer with fast weights, of which one layer's cross-attention learns to align."""

    # fairseq's, which are of a class that has options of its own and no configuration.
    forward = TransformerAlignModel.forward
    forward_decoder = TransformerAlignModel.forward_decoder

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "FWPTransformerAlignModel":
        model = super().build_model(args, task)
        assert isinstance(model, cls)
        options = model.args
        model.alignment_heads, model.alignment_layer = options.alignment_heads, options.alignment_layer
        model.full_context_alignment = options.full_context_alignment
        for name, below in (
            ("alignment_layer", options.decoder_layers),
            ("alignment_heads", options.decoder_attention_heads + 1),
        ):
            value, least = getattr(options, name), int(name == "alignment_heads")
            if not least <= value < below:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value}, it must be between {least} and {below - 1} in this model"
                )
        if options.full_context_alignment and DECODER_SELF_ATTENTION in model.cfg.fast_weight_places:
            raise ValueError(
                "--full-context-alignment lets the decoder's self-attention see the whole target, and fast weights see "
                "what comes before a token: --decoder-self-attention can be softmax"
            )
        return model


ARCH_CONFIG_REGISTRY["fwp_transformer_align"] = base_architecture
