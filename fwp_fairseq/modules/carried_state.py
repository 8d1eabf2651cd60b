"""What a decoder carries from one segment of a text to the next, so that the context has no limit.

Each layer's self-attention owns what it carries: a dict of tensors whose first dimension is the batch. Gradients are
cut between segments.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

from fairseq.incremental_decoding_utils import with_incremental_state
from torch import Tensor, nn

LayerState = dict[str, Tensor]
DecoderState = list[LayerState]

# fairseq's decoder layer looks for this key to see whether decoding has begun (--cross-self-attention needs it).
MEMORY = "prev_key"


@with_incremental_state
class AttentionWithState(nn.Module):
    """Base of attention that keeps tensors, whose first dimension is the batch, of the tokens that it has read.

    In incremental decoding they are in fairseq's ``incremental_state``. A parallel pass goes on from, and leaves, what
    ``carry`` says.
    """

    # What fairseq's decorator adds.
    get_incremental_state: Callable[..., Any]
    set_incremental_state: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        # While ``carry`` is in effect: what a parallel pass goes on from, and where it leaves what it has in the end.
        self._before: LayerState = {}
        self._after: Optional[LayerState] = None

    @contextmanager
    def carry(self, before: LayerState) -> Iterator[LayerState]:
        """Within this context a parallel pass goes on from ``before``: what an earlier context yielded, or empty.

        The yielded dict then has what the next pass can go on from, without gradient. ``before`` stays as it is, so
        that --checkpoint-activations can repeat the pass.
        """
        self._before, self._after = before, dict(before)
        try:
            yield self._after
        finally:
            self._before, self._after = {}, None

    def _kept(self, incremental_state: Any) -> Mapping[str, Optional[Tensor]]:
        """What was kept of the tokens before: in decoding, or by the parallel pass before."""
        return self._before if incremental_state is None else self._get_input_buffer(incremental_state)

    def _keep(self, incremental_state: Any, state: Mapping[str, Optional[Tensor]]) -> None:
        """Keep this for the tokens to come."""
        self._set_input_buffer(incremental_state, state)
        if incremental_state is None and self._after is not None:
            self._after.update({name: x.detach() for name, x in state.items() if x is not None})

    def _get_input_buffer(self, incremental_state: Any) -> dict[str, Optional[Tensor]]:
        return self.get_incremental_state(incremental_state, "attn_state") or {}

    def _set_input_buffer(self, incremental_state: Any, buffer: Mapping[str, Optional[Tensor]]) -> Any:
        return self.set_incremental_state(incremental_state, "attn_state", buffer)


class CarriesState:
    """Mixin for fairseq's decoders whose layers have AttentionWithState as ``self_attn``.

    ``starting_state``, of one row or one for each sentence, or None: what incremental decoding begins with.
    """

    layers: Any
    embed_positions: Any
    starting_state: Optional[DecoderState] = None

    @contextmanager
    def carry(self, before: Optional[DecoderState] = None) -> Iterator[DecoderState]:
        """Within this context a parallel pass goes on from ``before``; the yielded list then has what it leaves.

        ``before`` is the yield of an earlier context, or None at the start of a text. It is not changed. A layer that
        is dropped (--decoder-layerdrop) leaves what it had.
        """
        states: DecoderState = [{} for _ in self.self_attentions()] if before is None else before
        with ExitStack() as stack:
            yield [
                stack.enter_context(attention.carry(state)) for attention, state in zip(self.self_attentions(), states)
            ]

    def self_attentions(self) -> list[Any]:
        """Of all layers: iterating over ``layers`` leaves some out under --decoder-layerdrop, and draws which."""
        return [self.layers[i].self_attn for i in range(len(self.layers))]

    def put_state(self, state: DecoderState, incremental_state: Any, rows: int) -> None:
        """Let incremental decoding of ``rows`` hypotheses go on from ``state``, which is copied."""
        for attention, layer_state in zip(self.self_attentions(), state):
            buffer = {name: x.repeat_interleave(rows // x.size(0), dim=0) for name, x in layer_state.items()}
            attention._set_input_buffer(incremental_state, buffer)

    def forward(
        self, prev_output_tokens: Tensor, encoder_out: Any = None, incremental_state: Any = None, **kwargs: Any
    ) -> Any:
        """fairseq's; the first step of decoding, whose state is empty, begins with ``starting_state``."""
        if self.starting_state is not None and incremental_state is not None and not incremental_state:
            self.put_state(self.starting_state, incremental_state, prev_output_tokens.size(0))
        return super().forward(prev_output_tokens, encoder_out, incremental_state, **kwargs)  # type: ignore[misc]

    def cannot_carry_state(self) -> Optional[str]:
        """Why segments of one text cannot be read one by one as the whole would be, or None: they can."""
        if self.embed_positions is not None:
            return (
                "without --no-token-positional-embeddings, which the paper's models without truncation have, positions "
                "would be counted from the start of each segment"
            )
        return None
