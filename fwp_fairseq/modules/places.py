"""The places of a Transformer that can have fast weights, and the options that say which have them."""

from dataclasses import field
from typing import Any

from fairseq.dataclass import ChoiceEnum

ATTENTION_KINDS = ("softmax", "fast-weight")
AttentionKind = ChoiceEnum(list(ATTENTION_KINDS))

ENCODER_SELF_ATTENTION = "encoder_self_attention"
DECODER_SELF_ATTENTION = "decoder_self_attention"
CROSS_ATTENTION = "cross_attention"
PLACES = (ENCODER_SELF_ATTENTION, DECODER_SELF_ATTENTION, CROSS_ATTENTION)

# Each is a flag of the same name.
PLACE_FIELDS: dict[str, Any] = {
    ENCODER_SELF_ATTENTION: field(default="softmax", metadata={"help": "attention of the encoder"}),
    DECODER_SELF_ATTENTION: field(default="fast-weight", metadata={"help": "causal self-attention of the decoder"}),
    CROSS_ATTENTION: field(default="softmax", metadata={"help": "attention of the decoder to the encoder"}),
}
