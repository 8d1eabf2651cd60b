"""Decoding on a GPU in a captured graph: one launch for a token in place of some two hundred.

With fast weights in a decoder's self-attention nothing that a step reads or writes changes its shape. So the second
token of a search is decoded in tensors that stay where they are, by fairseq's own forward pass, which is captured as it
is, and replayed from the third token on. What differs from token to token is copied in before: the words and the
position as they are looked up, since fairseq computes them on the host; the tokens, which may be padding; the order of
the beams. When sentences leave the batch their rows go on without anybody looking at them.

A graph belongs to one search and goes with it: it is in the incremental state. It reads the weights that there were at
the search's beginning. It is not kept for the next search, for which it would have to be known that nothing in the
model has changed, and capturing costs little more than the host's part of one token.

Whoever wants none sets FWP_CUDA_GRAPHS=0. A step is not captured, and decoding goes on as without this file,

- with softmax in the decoder's self-attention, whose keys and values grow;
- with gradients, autocast, torch.func, a compiler or an exporter at work, or in a capture of the caller's own;
- with hooks, dropout that stays on, or modules of others in the decoder, which may do on the host whatever they like;
- with options of fairseq's forward pass (``features_only``, ``alignment_layer`` and the like).

The same holds of the steps on a processor (``compiled_step``), which are taken and left in the same way.
"""

import copy
import logging
import os
import threading
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Optional

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fwp_fairseq.models.compiled_step import CompiledSteps, program_of
from fwp_fairseq.modules.carried_state import IncrementalState
from fwp_fairseq.modules.convolved_softmax import ConvolvedSoftmaxAttention
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention
from fwp_fairseq.modules.fast_weight_cross_attention import FastWeightCrossAttention
from fwp_fairseq.modules.fast_weight_layers import FastWeightDecoderLayer
from fwp_fairseq.modules.few_rows_linear import has_own_forward
from fwp_fairseq.ops import native
from fwp_fairseq.ops.torch_modes import is_transformed

logger = logging.getLogger(__name__)

SWITCH = "FWP_CUDA_GRAPHS"
# Names in the incremental state: the step, and what makes it.
_STEP = "step"
_STEPS = "steps"
# With fewer rows a step takes as long as its launches, and one for half of them would be no quicker.
_FEW_ROWS = 64


class CapturesSteps:
    """Mixin for fairseq's Transformer decoders: a token of incremental decoding is one step, where it can be.

    On a GPU it is a captured step, on a processor a compiled one. Outputs are those of the forward pass, but for
    ``inner_states``, which a step does not give.
    """

    embed_tokens: Any
    embed_positions: Any
    layers: Any
    training: bool
    keeps_constant_state: Callable[[], bool]
    get_incremental_state: Callable[..., Any]
    set_incremental_state: Callable[..., Any]

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any = None,
        incremental_state: Optional[IncrementalState] = None,
        **kwargs: Any,
    ) -> Any:
        if incremental_state is not None:
            wanted = all(x is None or x is False for x in kwargs.values()) and _is_plain(prev_output_tokens)
            wanted = wanted and not self.training and (encoder_out is not None or self.layers[0].encoder_attn is None)
            found = self._step(prev_output_tokens, encoder_out, incremental_state, wanted)
            if found is not None:
                logits, attn = found
                return logits, {"attn": [attn], "inner_states": None}
        return super().forward(prev_output_tokens, encoder_out, incremental_state, **kwargs)  # type: ignore[misc]

    def note_order(self, incremental_state: IncrementalState, order: Tensor) -> bool:
        """Whether there is a step in this search, which then applies ``order`` before the next token."""
        step = self.get_incremental_state(incremental_state, _STEP)
        if step is not None:
            step.note_order(order)
        return step is not None

    def _step(
        self, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState, wanted: bool
    ) -> Optional[tuple[Tensor, Optional[Tensor]]]:
        """Logits (B, 1, words) and attention (B, 1, S) or None, by a step; None: there cannot be one."""
        step = self.get_incremental_state(incremental_state, _STEP)
        if step is not None:
            if wanted and step.begin(tokens.size(0)):
                step.replay(self, tokens, encoder_out, incremental_state)
                return step.outputs(self)
            self.set_incremental_state(incremental_state, _STEP, None)
            step.leave(self, incremental_state)
        if not wanted:
            return None
        steps = self.get_incremental_state(incremental_state, _STEPS)
        if steps is None:
            if not all(x._get_input_buffer(incremental_state) for x in _attentions(self)):
                return None  # the first token, which writes the source and makes the state
            steps = _steps_of(self, tokens)
            self.set_incremental_state(incremental_state, _STEPS, steps)
        step = steps.make(self, tokens, encoder_out, incremental_state)
        if step is None:
            return None
        self.set_incremental_state(incremental_state, _STEP, step if step.goes_on else None)
        return step.outputs(self)


def _steps_of(decoder: Any, tokens: Tensor) -> Any:
    """What makes steps of a search: of its ``make`` a step has decoded the last token, or is None."""
    if _is_on_gpu(tokens):
        return CapturedSteps(tokens.size(0) if can_be_captured(decoder) else 0)
    return CompiledSteps(program_of(decoder) if is_known(decoder) else None)


def can_be_captured(decoder: Any) -> bool:
    """Whether all that a step of ``decoder`` does is known to be the same for every token.

    Raises ValueError if FWP_CUDA_GRAPHS is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {switch}, allowed are 0 and 1")
    return switch == "1" and is_known(decoder)


def is_known(decoder: Any) -> bool:
    """Whether its state does not grow, and nobody but this package, fairseq and torch has a part in its steps."""
    return (
        decoder.keeps_constant_state()
        and all(type(layer) is FastWeightDecoderLayer for layer in decoder.layers)
        and all(isinstance(x, (FastWeightAttention, MultiheadAttention)) for x in _attentions(decoder))
        and not _has_any_global_hook()
        and all(_is_known(module, module is decoder) for module in decoder.modules())
    )


def _is_known(module: nn.Module, is_around: bool) -> bool:
    """``is_around``: a step is made within its call, and so within what is around that."""
    return (
        type(module).__module__.partition(".")[0] in ("torch", "fairseq", __name__.partition(".")[0])
        and (is_around or not (module._forward_hooks or module._forward_pre_hooks or has_own_forward(module)))
        and not (module.training or getattr(module, "apply_during_inference", False))
    )


def _attentions(decoder: Any) -> list[Any]:
    return [x for layer in decoder.layers for x in (layer.self_attn, layer.encoder_attn) if x is not None]


def _is_plain(tokens: Tensor) -> bool:
    """Whether nobody looks at what is computed, but the device, or compiled code."""
    return (
        (_is_on_gpu(tokens) or (tokens.device.type == "cpu" and native.unavailable is None))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(tokens.device.type)
        and not is_transformed()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def _is_on_gpu(tokens: Tensor) -> bool:
    return tokens.is_cuda and not torch.cuda.is_current_stream_capturing()


# Of tensors that cross-attention has of the sources: how many rows share one of theirs, and whether rows can leave it.
# fairseq's attention takes for granted that a row stays with its sentence until one leaves the batch.
_Sharing = tuple[int, bool]


class CapturedSteps:
    """Makes the steps of a search, for as many rows as ``most``."""

    def __init__(self, most: int) -> None:
        self.most = most

    def make(
        self, decoder: Any, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState
    ) -> "Optional[CapturedStep]":
        """A step that has decoded the last of ``tokens``, (B, T), or None: for so many rows there is none."""
        rows = tokens.size(0)
        if not 0 < rows <= self.most:
            return None
        step = CapturedStep(decoder, tokens, encoder_out, incremental_state)
        self.most = rows // 2 if step.goes_on else 0
        return step


class CapturedStep:
    """A step of ``decoder`` for as many rows as ``tokens`` has, or fewer. Making it decodes the last of these tokens.

    tokens: (B, T). What the modules have in ``incremental_state`` stays where it is from then on, and is of B rows;
    ``leave`` gives it back. ``graph`` is None if the step could not be captured.
    """

    graph: Optional["Graph"]

    def __init__(self, decoder: Any, tokens: Tensor, encoder_out: Any, incremental_state: IncrementalState) -> None:
        self.rows = self._most_rows = tokens.size(0)
        # The order of the beams for the next token, if there is one.
        self._noted: Optional[Tensor] = None
        self._in_order = torch.arange(self.rows, device=tokens.device)
        # What a step reads. A graph knows addresses only: what is there must not be freed.
        self._order = self._in_order.clone()
        self._tokens = tokens[:, -1:].clone()
        self._looked_up = [x.clone() for x in _look_up(decoder, tokens)]
        self._weights = [x.detach() for x in (*decoder.parameters(), *decoder.buffers())]
        self._states = [
            attention.kept_state(incremental_state)
            for attention in _attentions(decoder)
            if isinstance(attention, (FastWeightAttention, ConvolvedSoftmaxAttention))
        ]
        self._sources: dict[_Sharing, list[Tensor]] = {}
        for layer in decoder.layers:
            for x in _sources_of(layer, incremental_state):
                sharing = self.rows // x.size(0), isinstance(layer.encoder_attn, FastWeightCrossAttention)
                self._sources.setdefault(sharing, []).append(x)
        self._decode_and_capture(self._reader(decoder), encoder_out, incremental_state)

    @property
    def goes_on(self) -> bool:
        """Whether there is a graph for the tokens that follow."""
        return self.graph is not None

    def _reader(self, decoder: Any) -> Any:
        """``decoder``, with the same layers, but what is looked up comes from here."""
        reader = copy.copy(decoder)
        reader._modules = dict(decoder._modules)
        for name, x in zip(("embed_tokens", "embed_positions"), self._looked_up):
            setattr(reader, name, _Given(x))
        # So fairseq takes the mask of padding as it is, and does not ask the device whether there is any.
        reader.cross_self_attention = True
        return reader

    def _decode_and_capture(self, reader: Any, encoder_out: Any, incremental_state: IncrementalState) -> None:
        def step() -> list[Tensor]:
            for state in self._states:
                state.reorder_rows(self._order)
            features, extra = reader.extract_features(self._tokens, encoder_out, incremental_state)
            return [x for x in (features, *extra["attn"]) if x is not None]

        def step_in_place() -> None:
            for kept, x in zip(self._outputs, step()):
                kept.copy_(x)
            for state, left in zip(self._states, self._left):
                for name, x in state.as_left().items():
                    if x is not left[name]:
                        left[name].copy_(x)

        # All that is launched has to have been launched before: by the token itself.
        self._outputs = step()
        self._left = [state.as_left() for state in self._states]
        try:
            self.graph = Graph(step_in_place, self._tokens.device)
        except RuntimeError as error:
            self.graph = None
            logger.warning("decoding goes on without a captured graph: %s", error)
        for state, left in zip(self._states, self._left):
            state.go_on_in(left)

    def note_order(self, order: Tensor) -> None:
        """Let row i of the next token go on from row ``order[i]`` of what there is then."""
        self._noted = order if self._noted is None else self._noted.index_select(0, order)

    def begin(self, rows: int) -> bool:
        """Whether the next token can be decoded for so many rows, in the order that was noted."""
        order = self._in_order[: self.rows] if self._noted is None else self._noted
        half_would_do = rows <= self._most_rows // 2 and self._most_rows > _FEW_ROWS
        if self.graph is None or not self.graph.is_here():
            return False
        if order.size(0) != rows or rows > self._most_rows or half_would_do or not self._move_sources(order):
            return False
        if rows < self.rows:
            # Each row that nobody looks at goes on by itself: siblings would have to wait for each other.
            self._order.copy_(self._in_order)
        self._order[:rows].copy_(order)
        self.rows, self._noted = rows, None
        return True

    def _move_sources(self, order: Tensor) -> bool:
        """Let each sentence that is left have its own; False if beams of one sentence are not next to each other."""
        rows, moves = order.size(0), []
        for (beams, can_leave_sentence), sources in self._sources.items():
            if rows == self.rows and not can_leave_sentence:
                continue
            sentences = order // beams
            if rows == self.rows and sentences.equal(self._in_order[:rows] // beams):
                continue
            where = sentences[::beams]
            if rows % beams or not sentences.equal(where.repeat_interleave(beams)):
                return False
            moves += [(x, where) for x in sources]
        for x, where in moves:
            x[: where.size(0)].copy_(x.index_select(0, where))
        return True

    def replay(self, decoder: Any, tokens: Tensor, *_: Any) -> None:
        """Decode the last of ``tokens``, (B, T), for which ``begin`` was asked."""
        for here, x in zip((self._tokens, *self._looked_up), (tokens[:, -1:], *_look_up(decoder, tokens))):
            here[: x.size(0)].copy_(x)
        assert self.graph is not None
        self.graph.replay()

    def outputs(self, decoder: Any) -> tuple[Tensor, Optional[Tensor]]:
        """Logits (B, 1, words), and attention (B, 1, S) or None, of the token that was decoded last."""
        features, *attn = (x[: self.rows].clone() for x in self._outputs)
        return decoder.output_layer(features), attn[0] if attn else None

    def __deepcopy__(self, memo: Any) -> "CapturedStep":
        """A copy of a search goes on without the graph, which is of this one's tensors."""
        other = copy.copy(self)
        other.graph = None
        return other

    def leave(self, decoder: Any, incremental_state: IncrementalState) -> None:
        """Let the modules go on without this step."""
        order = self._in_order[: self.rows] if self._noted is None else self._noted
        decoder.reorder_incremental_state_scripting(incremental_state, order)


def _look_up(decoder: Any, tokens: Tensor) -> list[Tensor]:
    """Embedding of the last of the tokens (B, T), (B, 1, C), and of its position, (1, 1, C), if there are positions."""
    words = decoder.embed_tokens(tokens[:, -1:].contiguous())
    if decoder.embed_positions is None:
        return [words]
    return [words, decoder.embed_positions(tokens, incremental_state={})[:1]]


def _sources_of(layer: Any, incremental_state: IncrementalState) -> Collection[Tensor]:
    """All that cross-attention has of the sources, sentence by sentence, as tensors that nobody else has."""
    attention = layer.encoder_attn
    if attention is None:
        return ()
    if isinstance(attention, FastWeightCrossAttention):
        return attention.kept_state(incremental_state).of_sentences().values()
    kept = attention._get_input_buffer(incremental_state)
    own = {name: x.clone(memory_format=torch.contiguous_format) for name, x in kept.items() if x is not None}
    kept.update(own)
    return own.values()


class _Given(nn.Module):
    """Stands for an embedding that was looked up before."""

    def __init__(self, looked_up: Tensor) -> None:
        super().__init__()
        self.looked_up = looked_up

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.looked_up


class Graph:
    """All that ``function`` launches on a GPU, which ``replay`` launches at once on the stream that is current now.

    Capturing runs nothing. Raises RuntimeError if ``function`` does what cannot be captured. All graphs of a stream
    have one pool of memory, which the last of them keeps: what they have there is for the time of a replay, and replays
    on a stream follow each other.
    """

    # Of each stream, the one that its captures are on, by one thread at a time, and its last graph.
    _lock = threading.Lock()
    _beside: ClassVar[dict[torch.cuda.Stream, torch.cuda.Stream]] = {}
    _last: ClassVar[dict[torch.cuda.Stream, torch.cuda.CUDAGraph]] = {}

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._graph = torch.cuda.CUDAGraph()
        with self._lock:
            if self._stream not in self._beside:
                # Of those with priority, which hardly anybody else draws: torch gives out the same few in turn.
                self._beside[self._stream] = torch.cuda.Stream(device, priority=-1)
            last = self._last.get(self._stream)
            with torch.cuda.stream(self._beside[self._stream]):
                # Meanwhile other threads may do what they like, but for drawing random numbers on this device.
                self._graph.capture_begin(None if last is None else last.pool(), capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    # Should it fail, its pool is of no use any more.
                    self._last.pop(self._stream, None)
                    self._graph.capture_end()
            self._last[self._stream] = self._graph

    def is_here(self) -> bool:
        """Whether it can be replayed: its stream is the current one."""
        return torch.cuda.current_stream(self._stream.device) == self._stream

    def replay(self) -> None:
        """Launch what was captured."""
        self._graph.replay()
