"""The places of a Transformer that can have fast weights, and the options that say which have them."""

from collections.abc import Collection
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


def places_with_fast_weights(options: Any, places: Collection[str] = PLACES) -> set[str]:
    """Those of the ``places`` of a model that have fast weights by its options, a namespace.

    Raises ValueError for an attention that there is not.
    """
    chosen = set()
    for place in places:
        kind = str(getattr(options, place, PLACE_FIELDS[place].default))
        if kind not in ATTENTION_KINDS:
            raise ValueError(f"--{place.replace('_', '-')} is {kind}, allowed are {', '.join(ATTENTION_KINDS)}")
        if kind == "fast-weight":
            chosen.add(place)
    return chosen
