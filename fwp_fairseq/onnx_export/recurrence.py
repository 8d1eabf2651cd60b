"""The one recurrence (``ops/token_loop``) in ONNX operators, and LinearAttention where it is that.

q, k: (B, T, H, Dk), v: (B, T, H, Dv), gates: (B, T, H), or None for write 1, erase 0, decay 1. The state is (B, H, Dk,
Dv); with attention normalisation it has one more column, the accumulated keys z of ``ops/attention_normalization``.
Everything is float32.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from fwp_fairseq.onnx_export.graph import Graph
from fwp_fairseq.ops.numerics import smallest_divisor
from fwp_fairseq.ops.update_rules import Gates

# How the recurrence can be written down: operators that every runtime has; onnxruntime's own LinearAttention; that of
# opset 27.
FORMS = ("plain", "onnxruntime", "standard")
STANDARD_OPSET = 27

# Tokens that are written in one turn of a loop, in parallel. A power of two.
CHUNK = 16


class Recurrence:
    """Writes and reads of a memory in one form. ``normalized``: with attention normalisation."""

    def __init__(self, graph: Graph, form: str, normalized: bool) -> None:
        self.graph = graph
        self.form = form
        self.normalized = normalized

    # --- The readings ------------------------------------------------------------------------------------------------

    def causal(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Optional[Tensor] = None, one_token: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read after each write. Returns out (B, T, H, Dv) and the last state. ``one_token``: T is 1, after a state."""
        if self._is_operator(gates):
            out, state = self._operator(q, k, v, gates, state)
        elif one_token and state is not None:
            out, state = self._step(q, k, v, gates, state)
        else:
            out, state = self._chunks(q, k, v, gates, state)
        return self._ratio(out), state

    def memory(self, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """The state after all tokens are written."""
        if gates.erase is None:
            return self._sum(k, v, gates)
        if self._is_operator(gates):
            return self._operator(k, k, v, gates, None)[1]
        return self._chunks(None, k, v, gates, None)[1]

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        """Of a finished memory: (B, H, T, Dk) queries -> (B, H, T, Dv)."""
        return self._ratio(q @ state)

    def _ratio(self, out: Tensor) -> Tensor:
        if not self.normalized:
            return out
        return out[..., :-1] * _inverse(out[..., -1:])

    # --- Plain operators ---------------------------------------------------------------------------------------------

    def _step(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        write, erase, decay = (None if gate is None else gate.transpose(1, 2)[..., None] for gate in gates)
        if decay is not None:
            state = state * decay
        found = k @ state if erase is not None else None
        new = self._new_values(v, write, erase, found)
        state = state + k.transpose(2, 3) @ new
        return (q @ state).transpose(1, 2), state

    def _new_values(
        self, v: Tensor, write: Optional[Tensor], erase: Optional[Tensor], found: Optional[Tensor]
    ) -> Tensor:
        """What a token adds under its key; ``found`` is what is there. Gates are (B, H, 1, 1)."""
        new = v if write is None else v * write
        if erase is not None and found is not None:
            retrieved = self._ratio(found)
            new = new - erase * retrieved
        return self._with_count(new, write, erase)

    def _with_count(self, new: Tensor, write: Optional[Tensor], erase: Optional[Tensor]) -> Tensor:
        """With a column more, for z: what is written, or, where the rule erases, one for each token that writes."""
        if not self.normalized:
            return new
        return torch.cat([new, _count(new, write, erase)], dim=-1)

    def _sum(self, k: Tensor, v: Tensor, gates: Gates) -> Tensor:
        """Σ_t (product of later decays) k_t ⊗ write_t v_t."""
        k, v = k.permute(0, 2, 3, 1), v.transpose(1, 2)
        write, _, decay = (None if gate is None else gate.transpose(1, 2)[..., None] for gate in gates)
        new = self._with_count(v if write is None else v * write, write, None)
        if decay is not None:
            later = self.graph.node("CumSum", _log(decay), self.graph.constant(2), reverse=1, exclusive=1)
            new = new * self.graph.value(later, *decay.shape).exp()
        return k @ new

    def _chunks(
        self, q: Optional[Tensor], k: Tensor, v: Tensor, gates: Gates, state: Optional[Tensor]
    ) -> tuple[Any, Tensor]:
        """Chunk by chunk, and parallel within each: what is written solves a triangular system (``ops/chunkwise``).

        Without queries there is no out; without a state there is nothing in it.
        """
        if state is None:
            heads, d_k, d_v = k.size(2), k.size(3), v.size(3) + self.normalized
            shape = self.graph.node("Concat", self.graph.size(k, 0), self.graph.ints(heads, d_k, d_v), axis=0)
            zeros = self.graph.node("Expand", self.graph.constant(0.0), shape)
            state = self.graph.value(zeros, k.size(0), heads, d_k, d_v)
        logs = None if gates.decay is None else _log(gates.decay)
        given = [q, k, v, *map(_column, (gates.write, gates.erase, logs))]

        def chunk(memory: Tensor, *items: Tensor) -> tuple[Tensor, Optional[Tensor]]:
            item = iter(items)
            return self._one_chunk(memory, *(None if x is None else next(item) for x in given))  # type: ignore[arg-type]

        state, out = self.graph.loop(chunk, state, [self._in_chunks(x) for x in given if x is not None])
        if out is None:
            return None, state
        # (chunks, B, H, C, Dv) -> (B, T, H, Dv), without what was put in at the end
        out = out.permute(1, 0, 3, 2, 4).flatten(1, 2)
        cut = self.graph.node("Slice", out, self.graph.ints(0), self.graph.size(k, 1), self.graph.ints(1))
        return self.graph.value(cut, *k.shape[:3], out.size(-1)), state

    def _in_chunks(self, x: Tensor) -> Tensor:
        """(B, T, H, D) -> (chunks, B, H, C, D), with zeros at the end."""
        graph = self.graph
        missing = graph.node("Mod", graph.node("Neg", graph.size(x, 1)), graph.ints(CHUNK))
        ends = graph.node("Concat", graph.ints(*[0] * 5), missing, graph.ints(0, 0), axis=0)
        padded = graph.node("Pad", x, ends)
        batch, _, heads, size = x.shape
        chunks = graph.node("Reshape", padded, graph.ints(0, -1, CHUNK, heads, size))
        # Of how many there are nothing depends.
        return graph.value(chunks, batch, 3, CHUNK, heads, size).permute(1, 0, 3, 2, 4)

    def _one_chunk(
        self,
        state: Tensor,
        q: Optional[Tensor],
        k: Tensor,
        v: Tensor,
        write: Tensor,
        erase: Optional[Tensor],
        logs: Optional[Tensor],
    ) -> tuple[Tensor, Optional[Tensor]]:
        """q, k: (B, H, C, Dk), v: (B, H, C, Dv), gates: (B, H, C, 1), ``logs`` of decay."""
        until = torch.ones(CHUNK, CHUNK).tril()
        kept: Optional[Tensor] = None
        since_start: Optional[Tensor] = None
        kept_state, kept_keys = state, k
        if logs is not None:
            total = logs.cumsum(2)
            # Of a later token for an earlier one there is nothing, and the difference may be large.
            kept = torch.where(until.bool(), total - total.transpose(2, 3), -torch.inf).exp()
            since_start, last = total.exp(), total[:, :, -1:]
            kept_state, kept_keys = state * last.exp(), k * (last - total).exp()
        new = v * write
        if erase is not None:
            found = _times(k @ state, since_start)
            among = _times(k @ k.transpose(2, 3), kept) * until.tril(-1)
            if self.normalized:
                erase = erase * _inverse(found[..., -1:] + among @ _count(v, write, erase))
                found = found[..., :-1]
            new = _inverse_of_unit_triangular(among * erase) @ (new - erase * found)
        new = self._with_count(new, write, erase)
        out = None
        if q is not None:
            among = _times(q @ k.transpose(2, 3), kept) * until
            out = _times(q @ state, since_start) + among @ new
        return kept_state + kept_keys.transpose(2, 3) @ new, out

    # --- LinearAttention ---------------------------------------------------------------------------------------------

    def _is_operator(self, gates: Gates) -> bool:
        """Whether the operator is what is to be done: it has no divisor in what it erases."""
        return self.form != "plain" and not (self.normalized and gates.erase is not None)

    def _operator(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Optional[Tensor]
    ) -> tuple[Tensor, Tensor]:
        graph, heads = self.graph, k.size(2)
        write, erase, decay = gates
        if erase is None:
            v = self._with_count(v if write is None else v * write[..., None], _column(write), None)
        rule = {(False, False): "linear", (False, True): "gated", (True, False): "delta", (True, True): "gated_delta"}[
            erase is not None, decay is not None
        ]
        logs = None if decay is None else _log(decay)
        inputs: list[Optional[Tensor]] = [*(x.flatten(2, 3) for x in (q, k, v)), state, logs, erase]
        while inputs[-1] is None:
            inputs.pop()
        domain = "" if self.form == "standard" else "com.microsoft"
        options = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "update_rule": rule}
        out, last = graph.node("LinearAttention", *inputs, outputs=2, domain=domain, **options)
        shape = (*k.shape[:2], heads * v.size(3))
        out = graph.value(out, *shape).unflatten(-1, (heads, v.size(3)))
        return out, graph.value(last, k.size(0), heads, k.size(3), v.size(3))


def _times(x: Tensor, factor: Optional[Tensor]) -> Tensor:
    return x if factor is None else x * factor


def _column(gate: Optional[Tensor]) -> Optional[Tensor]:
    return None if gate is None else gate[..., None]


def _log(decay: Tensor) -> Tensor:
    """A memory that is forgotten altogether has a finite logarithm."""
    return decay.clamp(min=torch.finfo(torch.float32).tiny).log()


def _count(like: Tensor, write: Optional[Tensor], erase: Optional[Tensor]) -> Tensor:
    """What a token adds to z, a column for (..., D) values: its write strength, or where the rule erases one."""
    nothing = like[..., :1] * 0
    if write is None:
        return nothing + 1
    return nothing + (write if erase is None else write.ne(0).float())


def _inverse(total: Tensor) -> Tensor:
    """1 / total where there is something to divide by, else 0."""
    floor = smallest_divisor(torch.float32)
    return (total > floor) / total.clamp(min=floor)


def _inverse_of_unit_triangular(lower: Tensor) -> Tensor:
    """(I + A)⁻¹ for strictly lower triangular A: (..., C, C), by inverses of diagonal blocks of twice the size each.

    With X the inverse of the diagonal blocks and B the part of A below them within the larger ones, that of the larger
    is X − X B X. Every number on the way is one of an inverse; powers of A, as in its Neumann series, can be large.
    """
    place = torch.arange(CHUNK)
    inverse: Any = None
    size = 1
    while size < CHUNK:
        same, halves = place // (2 * size), place // size
        below = (same[:, None] == same) & (halves[:, None] > halves)
        block = lower * below.float()
        identity = torch.eye(CHUNK)
        inverse = identity - block if inverse is None else inverse - inverse @ block @ inverse
        size *= 2
    return inverse
