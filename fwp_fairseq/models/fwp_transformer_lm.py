"""fairseq's Transformer language model with fast weights in place of causal self-attention."""

import ast
from dataclasses import dataclass
from typing import Any, Optional

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import DEFAULT_MAX_TARGET_POSITIONS, TransformerConfig, TransformerDecoderBase
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
)
from fairseq.modules import AdaptiveInput, CharacterTokenEmbedder
from torch import nn

from fwp_fairseq.models.fwp_transformer import (
    FWPTransformerDecoder,
    LoadsCheckpoints,
    PicklesWhenPrepared,
    attach_fast_weights,
    resolve_sizes,
    size_that_follows,
)
from fwp_fairseq.models.memory_log import LogsMemory
from fwp_fairseq.models.options import name_dropout, plain_options
from fwp_fairseq.modules.carried_state import AttentionWithState, CarriesState
from fwp_fairseq.modules.fast_weight_config import FastWeightConfig
from fwp_fairseq.modules.fast_weight_layers import is_own
from fwp_fairseq.modules.places import DECODER_SELF_ATTENTION, PLACE_FIELDS, AttentionKind

_FOLLOWS = {"decoder_input_dim": "decoder_embed_dim", "decoder_output_dim": "decoder_embed_dim"}


@dataclass
class LanguageModelConfig(TransformerLanguageModelConfig):
    """Options of fairseq's transformer_lm.

    Input and output width follow ``decoder_embed_dim`` unless they are given; fairseq leaves them at 512.
    """

    decoder_input_dim: Optional[int] = size_that_follows("decoder_embed_dim")
    decoder_output_dim: Optional[int] = size_that_follows("decoder_embed_dim")


class LanguageModel(LogsMemory, LoadsCheckpoints, PicklesWhenPrepared, TransformerLanguageModel):
    """fairseq's transformer_lm with a decoder of another kind, which subclasses build."""

    @classmethod
    def build_decoder(cls, cfg: Any, args: Any, dictionary: Any, embed_tokens: nn.Module) -> nn.Module:
        """``cfg`` is ``args`` as fairseq's TransformerConfig."""
        raise NotImplementedError

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "LanguageModel":
        args = plain_options(cls, args, task)
        resolve_sizes(args, _FOLLOWS)
        if args.decoder_layers_to_keep:
            args.decoder_layers = len(args.decoder_layers_to_keep.split(","))
        if args.max_target_positions is None:
            args.max_target_positions = args.tokens_per_sample or DEFAULT_MAX_TARGET_POSITIONS
        _check_tied_weights(args)
        embed_tokens = cls._build_input(args, task.source_dictionary)
        cfg = TransformerConfig.from_namespace(args)
        cfg.adaptive_softmax_cutoff = _cutoffs(args, "adaptive_softmax_cutoff", task.target_dictionary)
        model = cls(cls.build_decoder(cfg, args, task.target_dictionary, embed_tokens))
        model.log_memory = getattr(args, "log_memory", 0)
        name_dropout(model)
        return model

    def cannot_carry_state(self) -> Optional[str]:
        """Why segments of one text cannot be read one by one as the whole would be, or None: they can."""
        decoder = self.decoder
        attentions = decoder.self_attentions() if isinstance(decoder, CarriesState) else [None]
        if all(isinstance(attention, AttentionWithState) for attention in attentions):
            return decoder.cannot_carry_state()
        return (
            "--decoder-self-attention is softmax, which would have to keep the keys and values of all tokens: "
            "allowed is fast-weight (or the architecture transformer_xl_lm, whose memory has a fixed length)"
        )

    @classmethod
    def _build_input(cls, args: Any, dictionary: Any) -> nn.Module:
        """The input embedding that the options ask for: characters, adaptive (Baevski and Auli, 2019), or plain."""
        if args.character_embeddings:
            return CharacterTokenEmbedder(
                dictionary,
                # A checkpoint's configuration is data: fairseq's own eval() would run what it says.
                ast.literal_eval(args.character_filters),
                args.character_embedding_dim,
                args.decoder_embed_dim,
                args.char_embedder_highway_layers,
            )
        if args.adaptive_input:
            return AdaptiveInput(
                len(dictionary),
                dictionary.pad(),
                args.decoder_input_dim,
                args.adaptive_input_factor,
                args.decoder_embed_dim,
                _cutoffs(args, "adaptive_input_cutoff", dictionary),
                args.quant_noise_pq,
                args.quant_noise_pq_block_size,
            )
        return cls.build_embedding(args, dictionary, args.decoder_input_dim)


@dataclass
class FWPTransformerLanguageModelConfig(LanguageModelConfig, FastWeightConfig):
    """Options of fairseq's transformer_lm and of fast-weight attention."""

    decoder_self_attention: AttentionKind = PLACE_FIELDS[DECODER_SELF_ATTENTION]


@register_model("fwp_transformer_lm", dataclass=FWPTransformerLanguageModelConfig)
class FWPTransformerLanguageModel(LanguageModel):
    """Decoder-only Transformer with fast weights; with softmax attention it is fairseq's transformer_lm."""

    @classmethod
    def build_decoder(cls, cfg: Any, args: Any, dictionary: Any, embed_tokens: nn.Module) -> nn.Module:
        attach_fast_weights(cfg, args, (DECODER_SELF_ATTENTION,))
        decoder = FWPTransformerDecoder if is_own(DECODER_SELF_ATTENTION, cfg) else TransformerDecoderBase
        return decoder(cfg, dictionary, embed_tokens, no_encoder_attn=True)


def _check_tied_weights(args: Any) -> None:
    """Raise ValueError unless adaptive input and softmax have the same shape where they share weights."""
    if not args.tie_adaptive_weights:
        return
    if not args.adaptive_input:
        raise ValueError("--tie-adaptive-weights needs --adaptive-input")
    for flag in ("factor", "cutoff"):
        ours, theirs = getattr(args, f"adaptive_input_{flag}"), getattr(args, f"adaptive_softmax_{flag}")
        if ours != theirs:
            raise ValueError(
                f"--adaptive-input-{flag} is {ours} and --adaptive-softmax-{flag} is {theirs}: "
                "--tie-adaptive-weights needs them to be equal"
            )
    if args.decoder_input_dim != args.decoder_output_dim:
        raise ValueError(
            f"--decoder-input-dim is {args.decoder_input_dim} and --decoder-output-dim is {args.decoder_output_dim}: "
            "--tie-adaptive-weights needs them to be equal"
        )


def _cutoffs(args: Any, option: str, dictionary: Any) -> Optional[list[int]]:
    """Cut-off points of adaptive input or softmax as a list, from "20000,60000" or a list; None stays None.

    Raises ValueError unless they rise, and the last one is at most the number of words.
    """
    given = getattr(args, option)
    if given is None:
        return None
    try:
        points = ast.literal_eval(given) if isinstance(given, str) else given
        points = [int(point) for point in ([points] if isinstance(points, (int, float)) else points)]
    except (ValueError, TypeError, SyntaxError):
        points = []
    limits = [0, *points, len(dictionary) + 1]
    if not points or any(a >= b for a, b in zip(limits, limits[1:])):
        raise ValueError(
            f"--{option.replace('_', '-')} is {given}, allowed are rising numbers between commas, from 1 to the "
            f"{len(dictionary)} words of the dictionary"
        )
    return points


def set_defaults(args: Any, **defaults: Any) -> None:
    """Set the options that were not given."""
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name, value))


def set_wiki103_defaults(args: Any, decoder_embed_dim: int) -> None:
    """What the paper's models for WikiText-103 have in common: 16 layers, adaptive softmax of one width, tied."""
    set_defaults(
        args,
        decoder_layers=16,
        decoder_embed_dim=decoder_embed_dim,
        decoder_ffn_embed_dim=2048,
        decoder_attention_heads=8,
        dropout=0.1,
        adaptive_input=True,
        adaptive_input_factor=1,
        adaptive_input_cutoff="20000,40000,200000",
        adaptive_softmax_factor=1,
        adaptive_softmax_cutoff="20000,40000,200000",
        tie_adaptive_weights=True,
        tie_adaptive_proj=True,
    )


@register_model_architecture("fwp_transformer_lm", "fwp_transformer_lm_wiki103_small")
def fwp_transformer_lm_wiki103_small(args: Any) -> None:
    """The paper's small model (appendix D.3, F): 16 layers, width 128, 8 heads; adaptive softmax of one width, tied."""
    set_wiki103_defaults(args, decoder_embed_dim=128)
    set_defaults(args, no_attention_bias=True, feature_map="elu")


@register_model_architecture("fwp_transformer_lm", "fwp_transformer_lm_wiki103_medium")
def fwp_transformer_lm_wiki103_medium(args: Any) -> None:
    """The paper's medium model: as the small one, with width 256."""
    set_defaults(args, decoder_embed_dim=256)
    fwp_transformer_lm_wiki103_small(args)
