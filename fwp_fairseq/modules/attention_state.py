"""What attention keeps of the tokens that it has read, and what becomes of it in a beam search."""

import math
from collections.abc import Callable, Mapping
from typing import Optional

import torch
from torch import Tensor

LayerState = dict[str, Tensor]

# fairseq's decoder layer looks for this key to see whether decoding has begun (--cross-self-attention needs it).
MEMORY = "prev_key"
NORMALIZER = "normalizer"
# Large: a new order of the beams does not move them.
_IN_PLACES = (MEMORY, NORMALIZER)
_PLACES = "places"


class AttentionState:
    """Tensors by name, whose first dimension is the batch, or the sentences of the batch.

    Each is of one of three kinds:

    - of rows: x[i] is of row i;
    - in places, the memory and the normalizer: x[place of i] is of row i. An order of the beams is noted and nothing
      moves, until somebody asks for the rows, or a compiled step goes on from where they are (``step_in_places``);
    - of sentences: neighbouring rows share one, and each has as many (``share``).

    Who asks for a tensor has it by row, so that nobody else sees places or orders.
    """

    def __init__(self, rows: Optional[Mapping[str, Tensor]] = None) -> None:
        self._tensors: LayerState = dict(rows or {})
        self._places: Optional[Tensor] = None
        self._order: Optional[Tensor] = None
        # Of each row, the sentence whose tensors it shares.
        self._shared: LayerState = {}
        self._sources: Optional[Tensor] = None

    def tensors(self) -> LayerState:
        """All tensors as they lie in memory."""
        return {**self._tensors, **self._shared}

    def rows(self) -> LayerState:
        """All that is not of sentences, by row."""
        return {name: x for name in self._tensors if (x := self.get(name)) is not None}

    def get(self, name: str) -> Optional[Tensor]:
        """A tensor of rows, or None."""
        x = self._tensors.get(name)
        if x is None or name not in _IN_PLACES:
            return x
        where = self.where()
        return x if where is None else x.index_select(0, where)

    def put(self, **tensors: Optional[Tensor]) -> None:
        """Keep these in place of those of the same names; each is of rows."""
        if any(name in _IN_PLACES for name in tensors) and self.where() is not None:
            self._tensors = self.rows()
            self._places = self._order = None
        self._tensors.update({name: x for name, x in tensors.items() if x is not None})

    def in_place(self, name: str) -> Optional[Tensor]:
        """Memory or normalizer for ``step_in_places``: wherever its rows are."""
        return self._tensors.get(name)

    def step_in_places(
        self, step: Callable[[Optional[Tensor], Optional[Tensor]], tuple[Tensor, Optional[Tensor]]]
    ) -> Tensor:
        """What ``step(order, places)`` returns first; second are the places of the rows afterwards (``ops.native``)."""
        out, self._places = step(self._order, self._places)
        self._order = None
        return out

    def stepped_to(self, places: Optional[Tensor]) -> None:
        """Note where the rows have their memories after a step that somebody else made of them."""
        self._places, self._order = places, None

    def share(self, rows: int, **tensors: Optional[Tensor]) -> None:
        """Keep what is of sentences: each is for as many of the ``rows``."""
        self._shared = {name: x for name, x in tensors.items() if x is not None}
        first = next(iter(self._shared.values()))
        sentences = torch.arange(first.size(0), device=first.device)
        self._sources = sentences.repeat_interleave(rows // max(1, first.size(0)))

    def shared(self, name: str) -> Optional[Tensor]:
        """A tensor of sentences, or None."""
        return self._shared.get(name)

    def of_sentences(self) -> LayerState:
        """All tensors of sentences."""
        return self._shared

    def as_left(self) -> LayerState:
        """All that a step leaves for the next one: tensors of rows and in places, as they lie, and the places."""
        return {**self._tensors, **({} if self._places is None else {_PLACES: self._places})}

    def go_on_in(self, left: LayerState) -> None:
        """Let the next step find what is in ``left``, of an earlier ``as_left``."""
        self._tensors = {name: x for name, x in left.items() if name != _PLACES}
        self._places, self._order = left.get(_PLACES), None

    def reorder(self, order: Tensor) -> None:
        """Let row i go on from what row ``order[i]`` has."""
        self.reorder_rows(order)
        if self._sources is not None:
            # Beams change places within their sentence, which is no change here; whole sentences leave the batch.
            sources = self._sources.index_select(0, order)
            if not sources.equal(self._sources):
                where = sources[:: beams_of(sources[:, None])]
                self.share(order.size(0), **{name: x.index_select(0, where) for name, x in self._shared.items()})

    def reorder_rows(self, order: Tensor) -> None:
        """As ``reorder`` where row i and row ``order[i]`` are of the same sentence, which nobody asks the device."""
        for name, x in self._tensors.items():
            if name not in _IN_PLACES:
                self._tensors[name] = x.index_select(0, order)
        memory = self._tensors.get(MEMORY)
        if memory is not None:
            self._order = order if self._order is None else self._order.index_select(0, order)
            # The next step finds the memories where they are; there are not places for more rows than before.
            if order.size(0) > memory.size(0):
                self._tensors = self.rows()
                self._places = self._order = None

    def where(self) -> Optional[Tensor]:
        """The place where each row has its memory; None: row i in place i."""
        if self._order is None or self._places is None:
            return self._places if self._order is None else self._order
        return self._places.index_select(0, self._order)


def beams_of(*tensors: Optional[Tensor]) -> int:
    """The size of the largest groups of neighbours that are equal in all tensors and make up all of their rows."""
    given = [x for x in tensors if x is not None]
    equal = torch.stack([(x[1:] == x[:-1]).flatten(1).all(dim=1) for x in given]).all(dim=0)
    borders = 1 + equal.logical_not().nonzero().flatten()
    return math.gcd(given[0].size(0), *borders.tolist()) or 1
