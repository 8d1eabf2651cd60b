"""The graphs of a model: ``encoder`` and ``decoder_step`` for translation, ``step`` and ``prompt`` for language models.

They are recorded from fairseq's own forward passes, with the modules answered that keep something between tokens or
choose by data: attention, positions, adaptive input and softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import onnx
import torch
from fairseq import utils
from fairseq.modules import AdaptiveInput, LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from fairseq.modules.adaptive_softmax import TiedHeadModule
from torch import Tensor

from fwp_fairseq.onnx_export.attention import (
    CausalFastWeights,
    CrossAttention,
    answered,
    encoder_self_attention,
    is_fast_weight,
    state_shapes,
)
from fwp_fairseq.onnx_export.graph import CannotExport, Graph


class ModelGraphs:
    """Graphs of one model, which is not changed. It must not have been prepared for generation.

    ``form``: one of ``recurrence.FORMS``. ``quantize``: matrices of weights in 8 bits. Raises CannotExport for a model
    that no graph can be made of.
    """

    def __init__(self, model: Any, opset: int, form: str = "plain", quantize: bool = False) -> None:
        self.model = model.eval()
        self.decoder = model.decoder
        self.encoder: Any = getattr(model, "encoder", None)
        self.opset, self.form, self.quantize = opset, form, quantize
        self.names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        check(model)

    def graphs(self) -> dict[str, onnx.ModelProto]:
        """All graphs by name."""
        with torch.no_grad():
            if self.encoder is None:
                return {"step": self.decoder_step("step"), "prompt": self.prompt()}
            return {"encoder": self.encoder_graph(), "decoder_step": self.decoder_step("decoder_step")}

    def states(self) -> dict[str, list[int]]:
        """What a decoder keeps for each row, by the name of the input: its shape."""
        shapes: dict[str, list[int]] = {}
        for i, layer in enumerate(self.decoder.layers):
            shapes.update(state_shapes(layer.self_attn, f"layer_{i}"))
            if layer.encoder_attn is not None:
                shapes.update(state_shapes(layer.encoder_attn, f"layer_{i}.cross"))
        return shapes

    def kept_of_source(self) -> dict[str, list[Any]]:
        """What a decoder reads of each sentence, by the name of the input: its shape."""
        shapes: dict[str, list[Any]] = {}
        for cross in self._cross_attentions(self._graph()):
            shapes.update(cross.kept)
        if any("source_length" in shape for shape in shapes.values()):
            shapes["source_padding"] = ["source_length"]
        return shapes

    def _graph(self) -> Graph:
        return Graph(self.opset, self.names, self.quantize)

    def _cross_attentions(self, graph: Graph, states: Optional[dict[str, Tensor]] = None) -> list[CrossAttention]:
        layers = self.decoder.layers if self.encoder is not None else []
        return [
            CrossAttention(layer.encoder_attn, graph, self.form, f"layer_{i}", states) for i, layer in enumerate(layers)
        ]

    # --- Translation -------------------------------------------------------------------------------------------------

    def encoder_graph(self) -> onnx.ModelProto:
        """source_tokens (sentences, source_length), padded on either side -> what is kept of each sentence."""
        graph, encoder = self._graph(), self.encoder
        tokens = graph.input("source_tokens", ["sentences", "source_length"], torch.int64)
        padding = tokens.eq(encoder.padding_idx)
        with ExitStack() as stack:
            stack.enter_context(answered_positions(encoder.embed_positions, graph))
            for layer in encoder.layers:
                attention = layer.self_attn
                answer = encoder_self_attention(attention, graph, self.form)
                stack.enter_context(answered(attention, answer))
            out = encoder(tokens)["encoder_out"][0].transpose(0, 1)
        shapes = self.kept_of_source()
        for cross in self._cross_attentions(graph):
            for (name, shape), value in zip(cross.kept.items(), cross.write(out, padding)):
                graph.output(name, value, ["sentences", *shape])
        if "source_padding" in shapes:
            graph.output("source_padding", padding, ["sentences", "source_length"])
        return graph.finish("encoder")

    def decoder_step(self, name: str) -> onnx.ModelProto:
        """One token of every row, which goes on from row ``order`` of the states before it.

        tokens, position (how many tokens were before), order: (rows,), states: (rows_before, ...), what is kept of the
        sentences, whose hypotheses are rows one after the other -> log_probabilities (rows, words), states (rows, ...).
        """
        graph = self._graph()
        tokens = graph.input("tokens", ["rows"], torch.int64)
        position = graph.input("position", ["rows"], torch.int64)
        order = graph.input("order", ["rows"], torch.int64)
        states = {
            state: graph.input(state, ["rows_before", *shape]).index_select(0, order)
            for state, shape in self.states().items()
        }
        shapes, of_source = self.kept_of_source(), {}
        for kept_name, shape in shapes.items():
            dtype = torch.bool if kept_name.endswith(("padding", ".empty")) else torch.float32
            of_source[kept_name] = graph.input(kept_name, ["sentences", *shape], dtype)
        with ExitStack() as stack:
            for layer, cross in zip(self.decoder.layers, self._cross_attentions(graph, states)):
                kept = [of_source[kept_name] for kept_name in cross.kept]
                answer = cross.reader(kept, of_source.get("source_padding"))
                stack.enter_context(answered(layer.encoder_attn, answer))
            features = self._decode(graph, tokens[:, None], position[:, None], states, one_token=True)
            graph.output("log_probabilities", log_probabilities(self.decoder, features[:, 0]), ["rows", self._words()])
        for state, shape in self.states().items():
            graph.output(f"{state}.new", states[state], ["rows", *shape])
        return graph.finish(name)

    # --- Language models ---------------------------------------------------------------------------------------------

    def prompt(self) -> onnx.ModelProto:
        """Many tokens of every row, in parallel: tokens (rows, length), padded at the end, position: (rows,), of the
        first of them, and states -> states."""
        graph = self._graph()
        tokens = graph.input("tokens", ["rows", "length"], torch.int64)
        position = graph.input("position", ["rows"], torch.int64)
        states = {name: graph.input(name, ["rows", *shape]) for name, shape in self.states().items()}
        length = graph.node("Squeeze", graph.size(tokens, 1))
        index = graph.node("Range", graph.constant(0), length, graph.constant(1))
        index = graph.value(index, tokens.size(1), dtype=torch.int64)
        self._decode(graph, tokens, position[:, None] + index, states, one_token=False)
        for name, shape in self.states().items():
            graph.output(f"{name}.new", states[name], ["rows", *shape])
        return graph.finish("prompt")

    def _decode(
        self, graph: Graph, tokens: Tensor, position: Tensor, states: dict[str, Tensor], one_token: bool
    ) -> Tensor:
        """Features of (rows, T) tokens; ``states`` has what they leave afterwards."""
        decoder = self.decoder
        answers = [
            CausalFastWeights(layer.self_attn, graph, self.form, f"layer_{i}", states, one_token)
            for i, layer in enumerate(decoder.layers)
        ]
        with ExitStack() as stack:
            stack.enter_context(answered_positions(decoder.embed_positions, graph, position))
            if isinstance(decoder.embed_tokens, AdaptiveInput):
                stack.enter_context(answered(decoder.embed_tokens, adaptive_input(decoder.embed_tokens)))
            for layer, answer in zip(decoder.layers, answers):
                stack.enter_context(answered(layer.self_attn, answer))
            # The layers only look whether there is an encoder. Without a mask of the future: the order of writes is it.
            encoder_out = None if self.encoder is None else {"encoder_out": [tokens], "encoder_padding_mask": []}
            features, _ = decoder.extract_features(tokens, encoder_out, full_context_alignment=True)
        return features

    def _words(self) -> int:
        softmax = self.decoder.adaptive_softmax
        return self.decoder.output_projection.out_features if softmax is None else softmax.vocab_size


def check(model: Any) -> None:
    """Raise CannotExport, naming the flag, for a model that no graph can be made of."""
    attentions = []
    for layer in model.decoder.layers:
        attention: Any = getattr(layer, "self_attn", None)
        if not is_fast_weight(attention):
            raise CannotExport(
                "--decoder-self-attention is softmax, which keeps the keys and values of all tokens: only a state of "
                "constant size can be exported, that of fast-weight"
            )
        attentions.append(attention)
        if hasattr(model, "encoder"):
            if layer.encoder_attn is None:
                raise CannotExport("--no-cross-attention: there is nothing that the decoder reads of a source")
            attentions.append(layer.encoder_attn)
    if model.decoder.cross_self_attention:
        raise CannotExport("--cross-self-attention cannot be exported: what is kept would grow with the source")
    attentions += [layer.self_attn for layer in model.encoder.layers] if hasattr(model, "encoder") else []
    for attention in attentions:
        if is_fast_weight(attention) and attention.rule.max_norm is not None:
            raise CannotExport(f"--update-rule {attention.rule.name} cannot be exported: allowed are all the others")
    embedding = model.decoder.embed_tokens
    if not isinstance(embedding, (torch.nn.Embedding, AdaptiveInput)):
        raise CannotExport(f"the input of the model is a {type(embedding).__name__}, which cannot be exported")


@contextmanager
def answered_positions(module: Any, graph: Graph, position: Optional[Tensor] = None) -> Iterator[None]:
    """Positions as fairseq's modules count them: from padding + 1, and padding has its own.

    ``position``, (B, T): how many tokens are before each; else all of a sentence are there.
    """
    if module is None:
        yield
        return
    padding = module.padding_idx
    if isinstance(module, LearnedPositionalEmbedding):

        def embed(rows: Tensor) -> Tensor:
            return torch.nn.functional.embedding(rows, module.weight)
    elif isinstance(module, SinusoidalPositionalEmbedding):
        half = module.embedding_dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
        odd = torch.zeros(1) if module.embedding_dim % 2 else None

        def embed(rows: Tensor) -> Tensor:
            angles = rows[..., None].float() * frequencies
            waves = [angles.sin(), angles.cos()]
            if odd is not None:
                waves.append(angles[..., :1] * 0)
            return torch.cat(waves, dim=-1) * rows.ne(padding)[..., None].float()
    else:
        raise CannotExport(f"the model has positions of the kind {type(module).__name__}, which cannot be exported")

    def forward(tokens: Tensor, **_: Any) -> Tensor:
        if position is None:
            return embed(utils.make_positions(tokens, padding))
        return embed(position + (padding + 1))

    with answered(module, forward):
        yield


def adaptive_input(module: AdaptiveInput) -> Callable[[Tensor], Tensor]:
    """Words of each band by their own embedding, which is projected (Baevski and Auli, 2019)."""

    def forward(tokens: Tensor) -> Tensor:
        result: Any = 0
        start = 0
        for end, band in zip(module.cutoff, module.embeddings):
            within = (tokens >= start) & (tokens < end)
            inside = (tokens - start).clamp(min=0, max=end - start - 1)
            result = band(inside) * within[..., None].float() + result
            start = end
        return result

    return forward


def log_probabilities(decoder: Any, features: Tensor) -> Tensor:
    """(rows, D) -> (rows, words); with an adaptive softmax, those of each group of rare words times the group's."""
    softmax = decoder.adaptive_softmax
    if softmax is None:
        return decoder.output_projection(features).log_softmax(dim=-1)
    head = softmax.head
    if isinstance(head, TiedHeadModule):
        scores = torch.cat([head.word_proj(features), head.class_proj(features)], dim=-1)
    else:
        scores = head(features)
    scores = scores.log_softmax(dim=-1)
    common = softmax.cutoff[0]
    parts = [scores[:, :common]]
    for i, tail in enumerate(softmax.tail):
        parts.append(tail(features).log_softmax(dim=-1) + scores[:, common + i : common + i + 1])
    return torch.cat(parts, dim=-1)
