"""What a decoder carries from one segment of a text to the next, so that the context has no limit.

Each layer's self-attention owns what it carries: a dict of tensors, one row for each of the batch. Gradients are cut
between segments.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Optional

import torch
from fairseq.incremental_decoding_utils import with_incremental_state
from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import AttentionState, LayerState

DecoderState = list[LayerState]
# fairseq's; what is kept of each module is an AttentionState, or fairseq's own.
IncrementalState = dict[str, Any]


class InThread(threading.local):
    """Attributes that every thread has of its own, with these values at first; so has a copy, or one from a pickle.

    For what a caller says to a module through fairseq's code, which would not pass it on: threads share the module.
    """

    def __init__(self, **initial: Any) -> None:
        self._initial = initial
        vars(self).update(initial)

    def __reduce__(self) -> Any:
        return partial(InThread, **self._initial), ()

    @contextmanager
    def set(self, **values: Any) -> Iterator[None]:
        """Within this context, and this thread, the attributes have these values."""
        before = {name: getattr(self, name) for name in values}
        vars(self).update(values)
        try:
            yield
        finally:
            vars(self).update(before)


@with_incremental_state
class AttentionWithState(nn.Module):
    """Base of attention that keeps something of the tokens that it has read, as an AttentionState.

    In incremental decoding that is in fairseq's ``incremental_state``. What a parallel pass goes on from and leaves,
    and what decoding begins with, ``carry`` says.
    """

    # What fairseq's decorator adds.
    get_incremental_state: Callable[..., Any]
    set_incremental_state: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        # While ``carry`` is in effect: what a pass goes on from, and where it leaves what it has in the end.
        self._here = InThread(carried=None)
        self._anywhere: Optional[tuple[LayerState, LayerState]] = None

    @contextmanager
    def carry(self, before: LayerState) -> Iterator[LayerState]:
        """Within this context a pass goes on from ``before``: what an earlier context yielded, or empty.

        After a parallel pass the yielded dict has what the next one can go on from, without gradient. Incremental
        decoding begins with ``before``, of one row or one for each sentence. It stays as it is, so that
        --checkpoint-activations can repeat the pass. Other threads are not concerned.
        """
        after = dict(before)
        self._anywhere = before, after
        try:
            with self._here.set(carried=(before, after)):
                yield after
        finally:
            self._anywhere = None

    def _carried(self) -> Optional[tuple[LayerState, LayerState]]:
        if self._here.carried is None and self._anywhere is not None and torch._C._current_graph_task_id() != -1:
            # A pass that --checkpoint-activations repeats: on a GPU the backward pass has a thread of its own.
            return self._anywhere
        return self._here.carried

    def _kept(self, incremental_state: Optional[IncrementalState], rows: int) -> AttentionState:
        """What was kept of the tokens before, by decoding or by the parallel pass before, for the rows of this one."""
        if incremental_state is not None:
            state = self.kept_state(incremental_state)
            if state is not None:
                return state
        carried = self._carried()
        if carried is None:
            return AttentionState()
        before, _ = carried
        if incremental_state is None:
            return AttentionState(before)
        # Copies, since decoding writes into them.
        return AttentionState({name: x.repeat_interleave(rows // x.size(0), dim=0) for name, x in before.items()})

    def kept_state(self, incremental_state: Optional[IncrementalState]) -> Any:
        """What it keeps in a search, an AttentionState, or None."""
        return self.get_incremental_state(incremental_state, "attn_state")

    def _keep(self, incremental_state: Optional[IncrementalState], state: AttentionState) -> None:
        """Keep this for the tokens to come."""
        if incremental_state is not None:
            self.set_incremental_state(incremental_state, "attn_state", state)
            return
        carried = self._carried()
        if carried is not None:
            carried[1].update({name: x.detach() for name, x in state.rows().items()})

    def go_on_from(self, incremental_state: IncrementalState, rows: LayerState) -> None:
        """Let decoding go on from what ``carry`` yielded, for the same rows. Decoding writes into these tensors."""
        self._keep(incremental_state, AttentionState({name: x.contiguous() for name, x in rows.items()}))

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> IncrementalState:
        """Let row i go on from what row ``new_order[i]`` has read so far. fairseq calls this of every module."""
        state = self.kept_state(incremental_state)
        if state is not None:
            state.reorder(new_order)
        return incremental_state

    def _get_input_buffer(self, incremental_state: Optional[IncrementalState]) -> LayerState:
        """Under fairseq's name, whose decoder layer looks into it."""
        state = self.kept_state(incremental_state)
        return {} if state is None else state.tensors()


class CarriesState:
    """Mixin for fairseq's decoders whose layers have AttentionWithState as ``self_attn``."""

    layers: Any
    embed_positions: Any

    @contextmanager
    def carry(self, before: Optional[DecoderState] = None) -> Iterator[DecoderState]:
        """Within this context a parallel pass goes on from ``before``; the yielded list then has what it leaves.

        ``before`` is the yield of an earlier context, or None at the start of a text; incremental decoding begins with
        it, too. It is not changed. A layer that is dropped (--decoder-layerdrop) leaves what it had.
        """
        states: DecoderState = [{} for _ in self.self_attentions()] if before is None else before
        with ExitStack() as stack:
            yield [
                stack.enter_context(attention.carry(state)) for attention, state in zip(self.self_attentions(), states)
            ]

    def self_attentions(self) -> list[Any]:
        """Of all layers: iterating over ``layers`` leaves some out under --decoder-layerdrop, and draws which."""
        return [self.layers[i].self_attn for i in range(len(self.layers))]

    def cannot_carry_state(self) -> Optional[str]:
        """Why segments of one text cannot be read one by one as the whole would be, or None: they can."""
        if self.embed_positions is not None:
            return (
                "without --no-token-positional-embeddings, which the paper's models without truncation have, positions "
                "would be counted from the start of each segment"
            )
        return None
