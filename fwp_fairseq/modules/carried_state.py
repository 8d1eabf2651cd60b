"""What a decoder carries from one segment of a text to the next, so that the context has no limit.

Each layer's self-attention owns what it carries: a dict of tensors whose first dimension is the batch. Gradients are
cut between segments.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

from torch import Tensor

LayerState = dict[str, Tensor]
DecoderState = list[LayerState]


class CarriesState:
    """Mixin for fairseq's decoders. It needs of each layer's ``self_attn`` a context manager ``carry``.

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
                "positions would be counted from the start of each segment: "
                "give --no-token-positional-embeddings, as the paper's models without truncation have it"
            )
        return None
