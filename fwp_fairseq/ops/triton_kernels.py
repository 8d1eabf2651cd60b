# mypy: ignore-errors
"""The recurrence of fast weights on a GPU's tensor cores, forward and backward. ``triton_scan`` calls it.

Mathematics and names are those of ``csrc/fast_weights_cpu_kernels.h``, with chunks of C = 16, 32 or 64 tokens. Over a
chunk that starts from the memory W0, with P[t,s] = decay_{s+1} ... decay_t (0 for s > t), g_t = decay_1 ... decay_t and
p_s = P[C,s]:

    S = P o Q K^T with the diagonal,  A = P o K K^T without it,  T = (I + diag(erase) A)^-1
    U = T (diag(write) V - diag(erase g) K W0)
    O = diag(g) Q W0 + S U
    W1 = g_C W0 + K^T diag(p) U

    dU = diag(p) K dW1 + S^T dO,  G = T^T dU
    dW0 = g_C dW1 + Q^T diag(g) dO - K^T diag(erase g) G
    dV = diag(write) G,  dwrite = rowsum(G o V)
    dQ = diag(g) dO W0^T + (P o dO U^T) K
    dK = -diag(erase g) G W0^T - (M + M^T) K + (P o dO U^T)^T Q + diag(p) U dW1^T,  M = diag(erase) P o G U^T, strictly
    derase = -g o rowsum(K o G W0^T) - rowsum(A o G U^T)

What needs no memory is done for all chunks at once: ``prepare`` finds T and P, ``differentiate`` all gradients but
those of memories. What is left goes from chunk to chunk, ``advance`` forward and ``retreat`` backward, for each
sequence, head and tile of values alone, with the memory in registers. They leave what ``differentiate`` needs: W0, U,
dW1 and G, in the type of the inputs.

P is the exponential of differences of sums of logarithms, with zeros and signs counted apart, so that a decay of zero
forgets everything and has its gradient. It is never stored: ``spans`` has for each chunk these sums, g, p, and what the
keys erase of W0, erase g; ``marks`` has the counts.

Tokens after the last one have keys, values, queries and gates of zero and a decay of one, which change nothing. An
argument that is None is one that there is not: a program is compiled without it.
"""

import triton
import triton.language as tl

# Below it a decay is taken for zero: the smallest normal float32.
_SMALLEST = tl.constexpr(1.1754944e-38)
# Compiled once for all lengths and batches: only the strides of q, k and v count for how they are loaded.
_NUMBERS = ["H", "L", "N", *(f"{gate}_{stride}" for gate in "wed" for stride in "bht")]


@triton.jit
def _load(pointer, rows, columns, stride, count, width):
    """A tile, zero where there is no row or column."""
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, rows, columns, stride, count, width, x):
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _gate(pointer, rows, stride, count):
    return tl.load(pointer + rows * stride, mask=rows < count, other=0.0).to(tl.float32)


@triton.jit
def _share(log, mark, log_before, mark_before, ZEROS: tl.constexpr = 0):
    """What is left at a token of what was there at one before it; up to ZEROS decays of zero count as one.

    ``log`` is log2 |decay_1 ... decay_t| without the zeros, ``mark`` the number of negative decays, and from the 16th
    bit on that of zeros.
    """
    size = tl.exp2(log - log_before)
    size = tl.where((mark ^ mark_before) % 2 == 1, -size, size)
    return tl.where((mark >> 16) - (mark_before >> 16) <= ZEROS, size, 0.0)


@triton.jit
def _shares(spans, marks, last, o, ZEROS: tl.constexpr = 0, TRANSPOSED: tl.constexpr = False):
    """P of a chunk, or its transpose. ``last``: the mark of its last token."""
    log = tl.load(spans + o)
    difference = log[None, :] - log[:, None] if TRANSPOSED else log[:, None] - log[None, :]
    share = tl.exp2(difference)
    if last != 0:  # seldom
        mark = tl.load(marks + o)
        share = tl.where((mark[:, None] ^ mark[None, :]) % 2 == 1, -share, share)
        zeros = (mark >> 16)[None, :] - (mark >> 16)[:, None]
        share = tl.where((zeros if TRANSPOSED else -zeros) <= ZEROS, share, 0.0)
    return tl.where(o[:, None] <= o[None, :] if TRANSPOSED else o[:, None] >= o[None, :], share, 0.0)


@triton.jit
def _total(parts, o, PARTS: tl.constexpr, C: tl.constexpr):
    """The sum of vectors in memory."""
    total = tl.zeros([C], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * C + o)
    return total


@triton.jit
def _cut(x, marks, last, o):
    """Without pairs of tokens that a decay of zero separates."""
    if last >> 16 != 0:
        zeros = tl.load(marks + o) >> 16
        x = tl.where(zeros[:, None] == zeros[None, :], x, 0.0)
    return x


@triton.jit
def _invert(a, TYPE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular C x C: substitution in blocks of 16, then products that merge them."""
    BLOCKS: tl.constexpr = C // 16
    block, o = tl.arange(0, BLOCKS), tl.arange(0, 16)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    unit = tl.where(o[:, None] == o[None, :], 1.0, 0.0)[None, :, :]
    x = -tl.sum(tl.where(diagonal, tl.reshape(a, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    # Row t becomes itself and its products with the rows before it, which are finished.
    factors = tl.permute(x, [0, 2, 1]) + unit
    for t in tl.static_range(2, 16):
        factor = tl.gather(factors, tl.full([BLOCKS, 16, 16], t, tl.int32), 2)
        row = tl.sum(factor * x, 1)
        x = tl.where((o == t)[None, :, None], row[:, None, :], x)
    x += unit
    x = tl.reshape(tl.where(diagonal, x[:, :, None, :], 0.0), [C, C])
    c = tl.arange(0, C)
    for level in tl.static_range(0, 2):
        if 16 << level < C:
            # Of two blocks beside each other on the diagonal, what is below the first.
            row, column = c[:, None] // (16 << level), c[None, :] // (16 << level)
            below = tl.where((row % 2 == 1) & (column == row - 1), a, 0.0).to(TYPE)
            y = x.to(TYPE)
            z = tl.dot(y, below, input_precision=PRECISION).to(TYPE)
            x -= tl.dot(z, y, input_precision=PRECISION)
    return x


@triton.jit(do_not_specialize=_NUMBERS)
def prepare(
    k, erase, decay, inverses, spans, marks,
    H, L, N, k_b, k_h, k_t, e_b, e_h, e_t, d_b, d_h, d_t,
    DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T, spans and marks: a program for each sequence, head and chunk."""
    at = tl.program_id(0).to(tl.int64)
    b, h, first = at // N // H, at // N % H, at % N * C
    o = tl.arange(0, C)
    count = (L - first).to(tl.int32)
    spans += at * 4 * C
    if decay is not None:
        x = tl.load(decay + b * d_b + h * d_h + first * d_t + o * d_t, mask=o < count, other=1.0).to(tl.float32)
        size = tl.abs(x)
        log = tl.cumsum(tl.where(size < _SMALLEST, 0.0, tl.log2(tl.maximum(size, _SMALLEST))), 0)
        mark = tl.cumsum((size < _SMALLEST).to(tl.int32) * 65536 + (x < 0).to(tl.int32), 0)
        last = tl.sum(tl.where(o == C - 1, mark, 0), 0)
        log_end = tl.sum(tl.where(o == C - 1, log, 0.0), 0)
        tl.store(marks + at * C + o, mark)
        from_start = _share(log, mark, 0.0, 0)
        tl.store(spans + o, log)
        tl.store(spans + C + o, from_start)
        tl.store(spans + 2 * C + o, _share(log_end, last, log, mark))
    if erase is not None:
        k += b * k_b + h * k_h + first * k_t
        overlap = tl.zeros([C, C], tl.float32)
        for feature in range(0, DK, BK):
            keys = _load(k, o, feature + tl.arange(0, BK), k_t, count, DK)
            overlap = tl.dot(keys, tl.trans(keys), overlap, input_precision=PRECISION)
        if decay is not None:
            overlap *= _share(log[:, None], mark[:, None], log[None, :], mark[None, :])
        erased = _gate(erase + b * e_b + h * e_h + first * e_t, o, e_t, count)
        overlap *= erased[:, None]
        overlap = tl.where(o[:, None] > o[None, :], overlap, 0.0)
        inverse = _invert(overlap, k.dtype.element_ty, C, PRECISION)
        tl.store(inverses + at * C * C + o[:, None] * C + o[None, :], inverse.to(inverses.dtype.element_ty))
        tl.store(spans + 3 * C + o, erased * from_start if decay is not None else erased)


@triton.jit(do_not_specialize=_NUMBERS)
def advance(
    q, k, v, write, inverses, spans, marks, initial, out, final, memories, updates,
    H, L, N, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, w_b, w_h, w_t,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """O and the final memory, and where they are kept W0 and U of each chunk."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    n = (tl.program_id(0) // TILES).to(tl.int64)
    b, h = n // H, n % H
    o, f, j = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) % TILES * BV + tl.arange(0, BV)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    final += n * DK * DV
    if q is not None:
        q += b * q_b + h * q_h
    if write is not None:
        write += b * w_b + h * w_h
    memory = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        memory += _load(initial + n * DK * DV, f, j, DV, DK, DV)
    for i in tl.range(0, N, num_stages=STAGES):
        first, at = tl.cast(i, tl.int64) * C, n * N + i
        count = L - i * C
        keys = _load(k + first * k_t, o, f, k_t, count, DK)
        update = _load(v + first * v_t, o, j, v_t, count, DV).to(tl.float32)
        if inverses is not None:
            inverse = tl.load(inverses + at * C * C + o[:, None] * C + o[None, :])
        held = memory.to(keys.dtype)
        if memories is not None:
            _store(memories + at * DK * DV, f, j, DV, DK, DV, held)
        if marks is not None:
            from_start, to_end = tl.load(spans + at * 4 * C + C + o), tl.load(spans + at * 4 * C + 2 * C + o)
            whole, last = tl.load(spans + at * 4 * C + 2 * C - 1), tl.load(marks + at * C + C - 1)
        if write is not None:
            update *= _gate(write + first * w_t, o, w_t, count)[:, None]
        if inverses is not None:
            old = tl.load(spans + at * 4 * C + 3 * C + o)
            update -= old[:, None] * tl.dot(keys, held, input_precision=PRECISION)
            update = tl.dot(inverse, update.to(keys.dtype), input_precision=PRECISION)
        written = update.to(keys.dtype)
        if updates is not None:
            _store(updates + (n * L + first) * DV, o, j, DV, count, DV, written)
        weighted = written
        if marks is not None:
            weighted = (update * to_end[:, None]).to(keys.dtype)
            memory *= whole
        memory = tl.dot(tl.trans(keys), weighted, memory, input_precision=PRECISION)
        if q is not None:
            queries = _load(q + first * q_t, o, f, q_t, count, DK)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if marks is not None:
                scores *= _shares(spans + at * 4 * C, marks + at * C, last, o)
            else:
                scores = tl.where(o[:, None] >= o[None, :], scores, 0.0)
            scores = scores.to(keys.dtype)
            read = tl.dot(queries, held, input_precision=PRECISION)
            if marks is not None:
                read *= from_start[:, None]
            read = tl.dot(scores, written, read, input_precision=PRECISION)
            _store(out + (n * L + first) * DV, o, j, DV, count, DV, read)
    _store(final, f, j, DV, DK, DV, memory)


@triton.jit(do_not_specialize=_NUMBERS)
def retreat(
    q, k, inverses, spans, marks, grad_out, grad_final, grad_memories, grad_updates, grad_initial,
    H, L, N, q_b, q_h, q_t, k_b, k_h, k_t, o_b, o_h, o_t,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dW1 and G of each chunk, the last one first, and the gradient of the initial memory."""
    TILES: tl.constexpr = (DV + BV - 1) // BV
    n = (tl.program_id(0) // TILES).to(tl.int64)
    b, h = n // H, n % H
    o, f, j = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) % TILES * BV + tl.arange(0, BV)
    k += b * k_b + h * k_h
    if grad_out is not None:
        q += b * q_b + h * q_h
        grad_out += b * o_b + h * o_h
    grad = tl.zeros([BK, BV], tl.float32)
    if grad_final is not None:
        grad += _load(grad_final + n * DK * DV, f, j, DV, DK, DV)
    for step in tl.range(0, N, num_stages=STAGES):
        i = N - 1 - step
        first, at = tl.cast(i, tl.int64) * C, n * N + i
        count = L - i * C
        keys = _load(k + first * k_t, o, f, k_t, count, DK)
        if marks is not None:
            from_start, to_end = tl.load(spans + at * 4 * C + C + o), tl.load(spans + at * 4 * C + 2 * C + o)
            whole, last = tl.load(spans + at * 4 * C + 2 * C - 1), tl.load(marks + at * C + C - 1)
        if grad_out is not None:
            queries = _load(q + first * q_t, o, f, q_t, count, DK)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # transposed
            if marks is not None:
                scores *= _shares(spans + at * 4 * C, marks + at * C, last, o, 0, True)
            else:
                scores = tl.where(o[:, None] <= o[None, :], scores, 0.0)
            scores = scores.to(keys.dtype)
        held = grad.to(keys.dtype)
        _store(grad_memories + at * DK * DV, f, j, DV, DK, DV, held)
        if marks is not None:
            grad *= whole
        if grad_out is not None:
            read = _load(grad_out + first * o_t, o, j, o_t, count, DV)
            weighted = read
            if marks is not None:
                weighted = (read * from_start[:, None]).to(keys.dtype)
            grad = tl.dot(tl.trans(queries), weighted, grad, input_precision=PRECISION)
        update = tl.dot(keys, held, input_precision=PRECISION)
        if marks is not None:
            update *= to_end[:, None]
        if grad_out is not None:
            update = tl.dot(scores, read, update, input_precision=PRECISION)
        if inverses is not None:
            inverse = tl.load(inverses + at * C * C + o[:, None] * C + o[None, :])
            update = tl.dot(tl.trans(inverse), update.to(keys.dtype), input_precision=PRECISION)
            old = tl.load(spans + at * 4 * C + 3 * C + o)
            retrieved = (update * -old[:, None]).to(keys.dtype)
            grad = tl.dot(tl.trans(keys), retrieved, grad, input_precision=PRECISION)
        _store(grad_updates + (n * L + first) * DV, o, j, DV, count, DV, update)
    if grad_initial is not None:
        _store(grad_initial + n * DK * DV, f, j, DV, DK, DV, grad)


@triton.jit(do_not_specialize=_NUMBERS)
def differentiate(
    q, k, v, write, erase, decay, spans, marks, memories, updates, grad_out, grad_memories, grad_updates,
    grad_q, grad_k, grad_v, grad_write, grad_erase, grad_decay, sums,
    H, L, N, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, w_b, w_h, w_t, e_b, e_h, e_t, d_b, d_h, d_t,
    o_b, o_h, o_t,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's inputs: a program for each sequence, head and chunk."""
    at = tl.program_id(0).to(tl.int64)
    n, first = at // N, at % N * C
    b, h = n // H, n % H
    o = tl.arange(0, C)
    count = (L - first).to(tl.int32)
    k += b * k_b + h * k_h + first * k_t
    v += b * v_b + h * v_h + first * v_t
    memories += at * DK * DV
    grad_memories += at * DK * DV
    rows = n * L + first
    updates += rows * DV
    grad_updates += rows * DV
    if grad_out is not None:
        q += b * q_b + h * q_h + first * q_t
        grad_out += b * o_b + h * o_h + first * o_t
    if write is not None:
        strength = _gate(write + b * w_b + h * w_h + first * w_t, o, w_t, count)
    if erase is not None:
        erased = _gate(erase + b * e_b + h * e_h + first * e_t, o, e_t, count)
    if decay is not None:
        spans += at * 4 * C
        marks += at * C
        from_start, to_end = tl.load(spans + C + o), tl.load(spans + 2 * C + o)
        last = tl.load(marks + C - 1)

    # Sums over features that are wanted at the end go to memory, for each tile of them: so their terms leave the
    # registers.
    PARTS: tl.constexpr = (DK + BK - 1) // BK
    sums += at * (3 * PARTS + 1) * C
    of_reads, of_keys, of_end, of_pairs = sums, sums + PARTS * C, sums + 2 * PARTS * C, sums + 3 * PARTS * C

    # By pairs of tokens: dO U^T and G U^T, then what is read, erased and kept through them.
    of_share = tl.zeros([C, C], tl.float32)
    if decay is not None:
        share = _shares(spans, marks, last, o, 1)
    if grad_out is not None:
        pairs = tl.zeros([C, C], tl.float32)
        for value in range(0, DV, BV):
            j = value + tl.arange(0, BV)
            read, update = _load(grad_out, o, j, o_t, count, DV), _load(updates, o, j, DV, count, DV)
            pairs = tl.dot(read, tl.trans(update), pairs, input_precision=PRECISION)
        if decay is not None:
            overlap = tl.zeros([C, C], tl.float32)
            for feature in range(0, DK, BK):
                f = feature + tl.arange(0, BK)
                queries, keys = _load(q, o, f, q_t, count, DK), _load(k, o, f, k_t, count, DK)
                overlap = tl.dot(queries, tl.trans(keys), overlap, input_precision=PRECISION)
            pairs *= share
            of_share = pairs * overlap
            pairs = _cut(pairs, marks, last, o)
        else:
            pairs = tl.where(o[:, None] >= o[None, :], pairs, 0.0)
        scores = pairs.to(k.dtype.element_ty)
    if erase is not None:
        pairs = tl.zeros([C, C], tl.float32)
        for value in range(0, DV, BV):
            j = value + tl.arange(0, BV)
            grad_update, update = _load(grad_updates, o, j, DV, count, DV), _load(updates, o, j, DV, count, DV)
            pairs = tl.dot(grad_update, tl.trans(update), pairs, input_precision=PRECISION)
        overlap = tl.zeros([C, C], tl.float32)
        for feature in range(0, DK, BK):
            keys = _load(k, o, feature + tl.arange(0, BK), k_t, count, DK)
            overlap = tl.dot(keys, tl.trans(keys), overlap, input_precision=PRECISION)
        if decay is not None:
            pairs *= share
            of_share -= erased[:, None] * pairs * overlap
            pairs = _cut(pairs, marks, last, o)
        pairs = tl.where(o[:, None] > o[None, :], pairs, 0.0)
        tl.store(of_pairs + o, tl.sum(pairs * overlap, 1))
        retrieved = (pairs * -erased[:, None]).to(k.dtype.element_ty)
    if decay is not None:
        of_share = of_share.to(k.dtype.element_ty)

    # By tokens and features: products with the memories, and of pairs of tokens with keys and queries.
    of_memory = 0.0
    for feature in range(0, DK, BK):
        f = feature + tl.arange(0, BK)
        keys = _load(k, o, f, k_t, count, DK)
        if grad_out is not None:
            grad = tl.zeros([C, BK], tl.float32)
            for value in range(0, DV, BV):
                j = value + tl.arange(0, BV)
                read, memory = _load(grad_out, o, j, o_t, count, DV), _load(memories, f, j, DV, DK, DV)
                grad = tl.dot(read, tl.trans(memory), grad, input_precision=PRECISION)
            queries = _load(q, o, f, q_t, count, DK)
            if decay is not None:
                tl.store(of_reads + feature // BK * C + o, tl.sum(queries * grad, 1))
                grad *= from_start[:, None]
            grad = tl.dot(scores, keys, grad, input_precision=PRECISION)
            _store(grad_q + rows * DK, o, f, DK, count, DK, grad)
        grad = tl.zeros([C, BK], tl.float32)
        for value in range(0, DV, BV):
            j = value + tl.arange(0, BV)
            update, grad_memory = _load(updates, o, j, DV, count, DV), _load(grad_memories, f, j, DV, DK, DV)
            grad = tl.dot(update, tl.trans(grad_memory), grad, input_precision=PRECISION)
            if decay is not None:
                memory = _load(memories, f, j, DV, DK, DV)
                of_memory += tl.sum(memory.to(tl.float32) * grad_memory.to(tl.float32))
        if decay is not None:
            tl.store(of_end + feature // BK * C + o, tl.sum(keys * grad, 1))
            grad *= to_end[:, None]
        if erase is not None:
            erasing = tl.zeros([C, BK], tl.float32)
            for value in range(0, DV, BV):
                j = value + tl.arange(0, BV)
                grad_update, memory = _load(grad_updates, o, j, DV, count, DV), _load(memories, f, j, DV, DK, DV)
                erasing = tl.dot(grad_update, tl.trans(memory), erasing, input_precision=PRECISION)
            tl.store(of_keys + feature // BK * C + o, tl.sum(keys * erasing, 1))
            if decay is not None:
                erasing *= from_start[:, None]
            grad -= erased[:, None] * erasing
            grad = tl.dot(retrieved, keys, grad, input_precision=PRECISION)
            grad = tl.dot(tl.trans(retrieved), keys, grad, input_precision=PRECISION)
        if grad_out is not None:
            grad = tl.dot(tl.trans(scores), queries, grad, input_precision=PRECISION)
        _store(grad_k + rows * DK, o, f, DK, count, DK, grad)

    # By tokens and values.
    of_write = tl.zeros([C], tl.float32)
    for value in range(0, DV, BV):
        j = value + tl.arange(0, BV)
        grad = _load(grad_updates, o, j, DV, count, DV).to(tl.float32)
        if write is not None:
            of_write += tl.sum(grad * _load(v, o, j, v_t, count, DV), 1)
            grad *= strength[:, None]
        _store(grad_v + rows * DV, o, j, DV, count, DV, grad)
    if write is not None:
        tl.store(grad_write + rows + o, of_write, mask=o < count)
    tl.debug_barrier()  # before sums are read that other threads have written
    if erase is not None:
        of_erase = _total(of_keys, o, PARTS, C)
        if decay is not None:
            of_erase *= from_start
        tl.store(grad_erase + rows + o, -of_erase - tl.load(of_pairs + o), mask=o < count)
    if decay is not None:
        # A decay gets what the products of all between two tokens get, over itself. One of zero gets it where it is the
        # only one there: from those before it to which only it has put an end, to those after it before the next zero.
        log, mark = tl.load(spans + o), tl.load(marks + o)
        of_start = tl.where(o == C - 1, of_memory, 0.0)
        if grad_out is not None:
            of_start += _total(of_reads, o, PARTS, C)
        if erase is not None:
            of_start -= erased * _total(of_keys, o, PARTS, C)
        of_start *= _share(log, mark, 0.0, 0, 1)
        of_last = _total(of_end, o, PARTS, C) * _share(tl.load(spans + C - 1), last, log, mark, 1)
        mark, mark_before = mark >> 16, tl.load(marks + o - 1, mask=o > 0, other=0) >> 16
        after = (o[:, None] <= o[None, :]) & (mark[:, None] == mark[None, :])
        before = (o[:, None] > o[None, :]) & (mark_before[:, None] == mark[None, :])
        through = tl.where(mark == last >> 16, 1.0, 0.0)[:, None] * of_last[None, :]
        through = tl.dot(after.to(of_share.dtype), of_share, through, input_precision=PRECISION)
        of_start = tl.sum(tl.where(after, of_start[None, :], 0.0), 1)
        of_decay = tl.sum(tl.where(before, through, 0.0), 1) + tl.where(mark_before == 0, of_start, 0.0)
        x = tl.load(decay + b * d_b + h * d_h + first * d_t + o * d_t, mask=o < count, other=1.0)
        of_decay /= tl.where(mark == mark_before, x, 1.0)
        tl.store(grad_decay + rows + o, of_decay, mask=o < count)
