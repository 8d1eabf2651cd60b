"""fairseq's Transformer for translation with fast weights in the encoder, the decoder and cross-attention.

Everything but the attention modules is fairseq's: this file only says which options there are, and hooks the layers in.
"""

import copy
import logging
from argparse import Namespace
from contextlib import AbstractContextManager
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any, Optional, cast

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
)
from fairseq.models.transformer import transformer_legacy as fairseq_architectures
from torch import Tensor, nn

from fwp_fairseq.models.captured_step import CapturesSteps
from fwp_fairseq.models.memory_log import LogsMemory
from fwp_fairseq.models.options import complete_pruning, name_dropout, plain_options
from fwp_fairseq.modules import int8_linear
from fwp_fairseq.modules.carried_state import CarriesState, IncrementalState, InThread
from fwp_fairseq.modules.conversion import check_shapes
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.modules.fast_weight_config import FastWeightConfig
from fwp_fairseq.modules.fast_weight_cross_attention import FastWeightCrossAttention
from fwp_fairseq.modules.fast_weight_layers import (
    FastWeightDecoderLayer,
    FastWeightEncoderLayer,
    is_own,
    wrap_layer,
)
from fwp_fairseq.modules.few_rows_linear import use_few_rows_linear
from fwp_fairseq.modules.int8_encoder import use_int8_encoder
from fwp_fairseq.modules.places import (
    CROSS_ATTENTION,
    DECODER_SELF_ATTENTION,
    ENCODER_SELF_ATTENTION,
    PLACE_FIELDS,
    PLACES,
    AttentionKind,
    places_with_fast_weights,
)
from fwp_fairseq.modules.stages import Mixing
from fwp_fairseq.ops import UPDATE_RULES, native

logger = logging.getLogger(__name__)

# Names in the incremental state: what the decoder has read ahead, and the modules that have a state.
_AHEAD = "read_ahead"
_MODULES = "modules"
# Implied attention can be negative, and the criterion with alignments takes logarithms.
_LEAST_WEIGHT = 1e-6

# Sizes that follow another one unless they are given, as in fairseq's architectures.
_FOLLOWS = {
    "decoder_embed_dim": "encoder_embed_dim",
    "decoder_ffn_embed_dim": "encoder_ffn_embed_dim",
    "decoder_input_dim": "decoder_embed_dim",
    "decoder_output_dim": "decoder_embed_dim",
}


def size_that_follows(source: str) -> Any:
    """Field of a size that is another option's unless it is given."""
    return field(default=None, metadata={"help": f"as --{source.replace('_', '-')} if not given"})


def flat_fields(config: type, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields of a nested fairseq configuration under the names of its flags: encoder.layers -> encoder_layers."""
    flat: list[tuple[str, Any, Any]] = []
    for option in fields(config):
        name = prefix + option.name
        if option.name == "_name":
            continue
        if is_dataclass(option.type):
            flat += flat_fields(cast(type, option.type), f"{name}_")
        elif name in _FOLLOWS:
            flat.append((name, Optional[int], size_that_follows(_FOLLOWS[name])))
        elif name.endswith("_layers_to_keep"):
            # A list in fairseq's configuration, but a string in all that reads it.
            flat.append((name, Optional[str], field(default=None, metadata=option.metadata)))
        else:
            flat.append((name, option.type, field(default=option.default, metadata=option.metadata)))
    return flat


# fairseq's own configuration is nested and reaches hydra and argparse by different ways. Flattened under the names of
# its flags it serves both, as transformer_lm's does, and follows whichever fairseq is installed.
FWPTransformerConfig = make_dataclass(
    "FWPTransformerConfig",
    [
        *flat_fields(TransformerConfig),
        *[(name, AttentionKind, option) for name, option in PLACE_FIELDS.items()],
    ],
    bases=(FastWeightConfig,),
)
FWPTransformerConfig.__doc__ = "Options of fairseq's transformer, of fast-weight attention, and of where it stands."
FWPTransformerConfig.__module__ = __name__


def resolve_sizes(args: Any, follows: dict[str, str]) -> None:
    """Fill in the sizes that were not given by those they follow. Raises ValueError for one below 1."""
    for name, source in follows.items():
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(args, source))
    for name in (*follows.values(), *follows):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")


class LoadsCheckpoints:
    """Mixed into a model: takes the layers that it is to keep of a checkpoint, in one part of the model or in both.

    A checkpoint of other sizes is refused in one sentence, where torch lists all of them.
    """

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        complete_pruning(self, state_dict, model_cfg)
        check_shapes(state_dict, self.state_dict())  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, strict, model_cfg, args)  # type: ignore[misc]


class PicklesWhenPrepared:
    """Mixed into a model: fairseq's guard against training once prepared is a local function, which no pickle takes."""

    def make_generation_fast_(self, **kwargs: Any) -> None:
        super().make_generation_fast_(**kwargs)  # type: ignore[misc]
        self.train = _refuse_to_train


def _refuse_to_train(mode: bool = True) -> None:
    if mode:
        raise RuntimeError("cannot train after make_generation_fast")


def attach_fast_weights(cfg: TransformerConfig, args: Any, places: tuple[str, ...] = PLACES) -> None:
    """Put on ``cfg`` what the layers read: the fast-weight options in ``args`` and the places that have them."""
    cfg.fast_weights = FastWeightConfig.from_args(args)
    cfg.fast_weight_places = places_with_fast_weights(args, places)
    if CROSS_ATTENTION in cfg.fast_weight_places and cfg.no_cross_attention:
        cfg.fast_weight_places.remove(CROSS_ATTENTION)
        logger.warning("--cross-attention fast-weight has no effect in this model: --no-cross-attention leaves it out")
    cfg.cross_softmax_layers = set()
    if CROSS_ATTENTION in cfg.fast_weight_places:
        cfg.cross_softmax_layers = cfg.fast_weights.layers_with_softmax(cfg.decoder.layers)
    if cfg.cross_softmax_layers and cfg.decoder.layers_to_keep:
        raise ValueError(
            f"--decoder-layers-to-keep is {cfg.decoder.layers_to_keep}, which would give other numbers to the layers "
            "of --cross-softmax-layers: it must be left out"
        )
    of_architecture = Namespace()
    ARCH_CONFIG_REGISTRY.get(getattr(args, "_name", None) or getattr(args, "arch", None), vars)(of_architecture)
    there = {*places} - ({CROSS_ATTENTION} if cfg.no_cross_attention else set())
    cfg.fast_weights.warn_without_effect(cfg.fast_weight_places, there, vars(of_architecture))


class FWPTransformerEncoder(TransformerEncoderBase):
    """fairseq's Transformer encoder with FastWeightEncoderLayer."""

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        return wrap_layer(FastWeightEncoderLayer(cfg, return_fc=self.return_fc), cfg)


class FWPTransformerDecoder(CapturesSteps, CarriesState, TransformerDecoderBase):
    """fairseq's Transformer decoder with FastWeightDecoderLayer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._here = InThread(prefix=None)

    def begin_with(self, prefix: Tensor) -> AbstractContextManager[None]:
        """Within this context, and this thread, every output is known to begin with ``prefix``, (sentences, P).

        Incremental decoding reads it in parallel in its first step, and answers the following ones with what it has.
        """
        return self._here.set(prefix=prefix)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        # fairseq builds one layer after the other, and does not say which.
        self._layers_built = getattr(self, "_layers_built", 0) + 1
        if self._layers_built in cfg.cross_softmax_layers:
            cfg = copy.copy(cfg)
            cfg.fast_weight_places = cfg.fast_weight_places - {CROSS_ATTENTION}
        return wrap_layer(FastWeightDecoderLayer(cfg, no_encoder_attn), cfg)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: Optional[IncrementalState] = None,
        **kwargs: Any,
    ) -> Any:
        position, prefix = prev_output_tokens.size(1) - 1, self._here.prefix
        if incremental_state is not None and prefix is not None and position == 0:
            # Now it is in the state of this search: not for another one that this one may call.
            self._here.prefix = None
            rows = prev_output_tokens.size(0) // prefix.size(0)
            words = prefix[:, :-1].repeat_interleave(rows, dim=0)
            self._read_ahead(torch.cat([prev_output_tokens, words], dim=1), encoder_out, incremental_state)
        ahead = self.get_incremental_state(incremental_state, _AHEAD)
        if ahead is None:
            return super().forward(prev_output_tokens, encoder_out, incremental_state, **kwargs)
        here = slice(position, position + 1)
        features, attn = ahead["features"], ahead["attn"]
        if here.stop == features.size(1):
            self.set_incremental_state(incremental_state, _AHEAD, None)
        extra = {"attn": [None if attn is None else attn[:, here]], "inner_states": None}
        return self.output_layer(features[:, here]), extra

    def _read_ahead(self, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState) -> None:
        with self.carry() as state:
            features, extra = self.extract_features(tokens, encoder_out)
        for attention, kept in zip(self.self_attentions(), state):
            attention.go_on_from(incremental_state, kept)
        self.set_incremental_state(incremental_state, _AHEAD, {"features": features, "attn": extra["attn"][0]})

    def give_weights(self, wanted: bool) -> None:
        """Whether cross-attention gives attention weights, which cost something (FastWeightCrossAttention)."""
        for module in self.modules():
            if isinstance(module, FastWeightCrossAttention):
                module.with_weights = wanted

    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        """As fairseq's, with attention as its criterion and searches expect it: above zero, and of sum one."""
        features, extra = super().extract_features(*args, **kwargs)
        (attn,) = extra["attn"]
        if attn is not None and CROSS_ATTENTION in self.cfg.fast_weight_places:
            attn = attn.clamp(min=_LEAST_WEIGHT)
            extra["attn"] = [attn / attn.sum(dim=-1, keepdim=True)]
        return features, extra

    def can_read_ahead(self) -> bool:
        """Whether all that decoding keeps of earlier tokens is of self-attention, as what ``carry`` yields is."""
        cross = (self.layers[i].encoder_attn for i in range(len(self.layers)))
        mixing = any(isinstance(stage, Mixing) for each in cross if each is not None for stage in each.modules())
        return self.keeps_constant_state() and not mixing

    def keeps_constant_state(self) -> bool:
        """Whether all that self-attention keeps of earlier tokens are fast weights."""
        return not self.cross_self_attention and all(
            isinstance(attention, FastWeightAttention) for attention in self.self_attentions()
        )

    def buffered_future_mask(self, tensor: Tensor) -> Optional[Tensor]:
        """None where no layer looks at it: its size is quadratic in the length."""
        return None if self.keeps_constant_state() else super().buffered_future_mask(tensor)

    def make_generation_fast_(self, **kwargs: Any) -> None:
        """fairseq calls this of every module of a model that is going to generate."""
        if int8 := self.multiplies_integers():
            self._check_integers()
        use_few_rows_linear(self, int8=int8)

    def multiplies_integers(self) -> bool:
        """Whether --decoding-weights asks for it."""
        return str(self.cfg.fast_weights.decoding_weights) == "int8"

    def _check_integers(self) -> None:
        """Raises ValueError without the compiled operators, which do it."""
        if not int8_linear.is_there():
            raise ValueError(
                "--decoding-weights is int8, which needs the compiled operators: allowed is float32 "
                f"({native.unavailable})"
            )
        weight = next(self.parameters())
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            logger.warning(
                "--decoding-weights int8 has no effect on %s in %s: it is for float32 on a processor",
                weight.device.type,
                str(weight.dtype).removeprefix("torch."),
            )

    def reorder_incremental_state_scripting(self, incremental_state: Any, new_order: Tensor) -> None:
        """As fairseq's, which for every token looks through all modules for those that have a state."""
        if self.note_order(incremental_state, new_order):
            return
        modules = self.get_incremental_state(incremental_state, _MODULES)
        if modules is None:
            modules = [x for x in self.modules() if hasattr(x, "reorder_incremental_state")]
            self.set_incremental_state(incremental_state, _MODULES, modules)
        for module in modules:
            module.reorder_incremental_state(incremental_state, new_order)

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> None:
        """fairseq calls this of every module in the decoder: here for what was read ahead."""
        ahead = self.get_incremental_state(incremental_state, _AHEAD)
        if ahead is not None:
            reordered = {name: None if x is None else x.index_select(0, new_order) for name, x in ahead.items()}
            self.set_incremental_state(incremental_state, _AHEAD, reordered)


@register_model("fwp_transformer", dataclass=FWPTransformerConfig)
class FWPTransformerModel(LogsMemory, LoadsCheckpoints, PicklesWhenPrepared, TransformerModelBase):
    """Encoder-decoder Transformer with fast weights; with softmax in every place it is fairseq's own."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        # TransformerModelBase would add the options of fairseq's configuration only.
        super(TransformerModelBase, cls).add_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "FWPTransformerModel":
        args = plain_options(cls, args, task)
        resolve_sizes(args, _FOLLOWS)
        cfg = TransformerConfig.from_namespace(args)
        attach_fast_weights(cfg, args)
        with_alignments = _needs_weights(cfg, getattr(task, "cfg", None), "load_alignments")
        model = super().build_model(cfg, task)
        if with_alignments:
            model.decoder.give_weights(True)
        model.log_memory = cfg.fast_weights.log_memory
        model.args = args  # as fairseq's `transformer` has it, and programs that use it read
        name_dropout(model)
        return model

    def prepare_for_inference_(self, cfg: Any) -> None:
        wanted = _needs_weights(self.cfg, cfg.generation, "print_alignment", "replace_unk")
        super().prepare_for_inference_(cfg)
        if isinstance(self.decoder, FWPTransformerDecoder):
            self.decoder.give_weights(wanted)
            if self.decoder.multiplies_integers():
                use_int8_encoder(self.encoder)

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: nn.Module) -> nn.Module:
        if not is_own(ENCODER_SELF_ATTENTION, cfg):
            return super().build_encoder(cfg, src_dict, embed_tokens)
        return FWPTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: nn.Module) -> nn.Module:
        if not any(is_own(place, cfg) for place in (DECODER_SELF_ATTENTION, CROSS_ATTENTION)):
            return super().build_decoder(cfg, tgt_dict, embed_tokens)
        return FWPTransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


def _needs_weights(cfg: Any, options: Any, *names: str) -> bool:
    """Whether one of these options needs attention weights. Raises ValueError if cross-attention has none."""
    given = {name: value for name in names if (value := getattr(options, name, None))}
    if given and CROSS_ATTENTION in cfg.fast_weight_places:
        rule = cfg.fast_weights.for_place(CROSS_ATTENTION).rule
        if rule.max_norm is not None:
            (name, value), *_ = given.items()
            allowed = ", ".join(name for name, rule in UPDATE_RULES.items() if rule.max_norm is None)
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, which needs attention weights, and cross-attention with the "
                f"rule {rule.name} has none: --cross-update-rule can be {allowed}"
            )
    return bool(given)


# Sizes and dropout of fairseq's architectures of the same names. The first is registered with the model already, but
# with an empty function.
ARCH_CONFIG_REGISTRY["fwp_transformer"] = fairseq_architectures.base_architecture
register_model_architecture("fwp_transformer", "fwp_transformer_wmt_en_de")(fairseq_architectures.transformer_wmt_en_de)
register_model_architecture("fwp_transformer", "fwp_transformer_wmt_en_de_big")(
    fairseq_architectures.transformer_wmt_en_de_big
)
