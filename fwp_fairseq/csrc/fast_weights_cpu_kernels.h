// The recurrence of fast weights on a CPU, forward and backward. No include guard: fast_weights_cpu.cpp includes this
// file once for each instruction set, with FWP_ISA (a namespace) and FWP_VECTOR_BYTES set.
//
// Mathematics. Over one chunk of n <= 16 tokens that starts from the memory W0, with P[t,s] = decay_{s+1} ... decay_t
// (0 for s > t), g_t = decay_1 ... decay_t, p_s = P[n,s], and rows for tokens:
//
//     S = P o Q K^T with the diagonal,  A = P o K K^T without it
//     R = diag(g) K W0 + A U                  what the keys retrieve
//     U = diag(write) V - diag(erase) R       what is written in the end; U = T (diag(write) V - diag(erase g) K W0)
//                                             with T = (I + diag(erase) A)^-1, unit lower triangular
//     O = diag(g) Q W0 + S U
//     W1 = g_n W0 + K^T diag(p) U
//
// Backward. Given dO and dW1, reading these lines from the last to the first:
//
//     dU = diag(p) K dW1 + S^T dO             from W1 and from O
//     G  = T^T dU                             through all later U that U has a part in
//     dV = diag(write) G,  dwrite = rowsum(G o V)
//     dR = -diag(erase) G, derase = -rowsum(G o R)
//     dQ = diag(g) dO W0^T + (P o dO U^T) K
//     dK = diag(g) dR W0^T + (P o dR U^T + its transpose, strictly triangular) K + (P o dO U^T)^T Q + diag(p) U dW1^T
//     dW0 = g_n dW1 + Q^T diag(g) dO + K^T diag(g) dR
//     dP = dO U^T o Q K^T + dR U^T o K K^T, in the last row also rowsum(K o U dW1^T)
//     dg = rowsum(Q o dO W0^T) + rowsum(K o dR W0^T), for the last token also <dW1, W0>
//
// and each decay gets from every product P, g that it is a factor of the product of the others, so that a decay of
// zero is exact. Memories are never reconstructed by undoing writes: those at every kSegment-th token are kept from the
// forward pass, and the others computed again.
//
// Cost for each token, D = Dk = Dv, multiply and add counted apart: forward 4 D^2 (sum) and 6 D^2 (delta), backward 10
// D^2 and 16 D^2 with the memories that are computed again, and about (2, 4; 5, 12) * 16 D of triangles. So a small
// chunk has the least to do; 16 tokens still fill the vector lanes and the accumulators of a 6 x 2-vector tile, and W0
// is read from the first or second cache once for 16 tokens. A memory takes part in products in three ways: as rows
// that vectors are loaded from, by elements (either index running fastest), never transposed. That is why some results
// have tokens in vector lanes (names ending in _t), and small chunk matrices are transposed instead of the memory.

namespace FWP_ISA {

constexpr int kLanes = 2 * kChunk;  // row length of matrices with tokens in their lanes: queries and keys side by side

template <class T>
struct Simd {
    static constexpr int width = FWP_VECTOR_BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(FWP_VECTOR_BYTES)));
    typedef T unaligned __attribute__((vector_size(FWP_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

// --- Products --------------------------------------------------------------------------------------------------------

// A matrix operand that is read by elements: either index may run fastest.
template <class T>
struct Elements {
    const T* data;
    int64_t row, column;
};

// c (ROWS x VECTORS vectors) = scale base + a b (ADD), or a b. The element (m, k) of a is a[m * a_row + k * a_column];
// base has rows like c, and may be c.
template <class T, int ROWS, int VECTORS, bool ADD>
inline void product_tile(
    int depth, const T* __restrict a, int64_t a_row, int64_t a_column, const T* __restrict b, int64_t b_row,
    const T* base, T* c, int64_t c_row, T scale) {
    using Vector = typename Simd<T>::type;
    using Loose = typename Simd<T>::unaligned;
    constexpr int width = Simd<T>::width;
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n)
            sum[m][n] = ADD ? *reinterpret_cast<const Loose*>(base + m * c_row + n * width) * scale : Vector{};
    for (int k = 0; k < depth; ++k) {
        Vector row[VECTORS];
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n) row[n] = *reinterpret_cast<const Loose*>(b + k * b_row + n * width);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; ++m) {
            const T factor = a[m * a_row + k * a_column];
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; ++n) sum[m][n] += factor * row[n];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n) *reinterpret_cast<Loose*>(c + m * c_row + n * width) = sum[m][n];
}

template <class T, int VECTORS, bool ADD>
inline void product_rows(
    int rows, int depth, Elements<T> a, const T* b, int64_t b_row, const T* base, T* c, int64_t c_row, T scale) {
    constexpr int kTileRows = 6;  // 12 accumulators, 2 vectors of b and 1 broadcast: 15 of AVX2's 16 registers
    // Rows are dealt out evenly, because a tile of few rows cannot hide the latency of its additions.
    for (int tiles = (rows + kTileRows - 1) / kTileRows, m = 0; tiles > 0; --tiles) {
        const int now = (rows - m + tiles - 1) / tiles;
        const auto tile = [&](auto tile_rows) {
            product_tile<T, tile_rows.value, VECTORS, ADD>(
                depth, a.data + m * a.row, a.row, a.column, b, b_row, base + m * c_row, c + m * c_row, c_row, scale);
        };
        switch (now) {
        case 6: tile(std::integral_constant<int, 6>()); break;
        case 5: tile(std::integral_constant<int, 5>()); break;
        case 4: tile(std::integral_constant<int, 4>()); break;
        case 3: tile(std::integral_constant<int, 3>()); break;
        case 2: tile(std::integral_constant<int, 2>()); break;
        default: tile(std::integral_constant<int, 1>());
        }
        m += now;
    }
}

// c (rows x columns) = a b. Rows of b and c are rounded up to whole vectors.
template <class T>
void product(int rows, int columns, int depth, Elements<T> a, const T* b, int64_t b_row, T* c, int64_t c_row) {
    constexpr int width = Simd<T>::width;
    int n = 0;
    for (; n + width < columns; n += 2 * width)
        product_rows<T, 2, false>(rows, depth, a, b + n, b_row, c + n, c + n, c_row, T(1));
    if (n < columns) product_rows<T, 1, false>(rows, depth, a, b + n, b_row, c + n, c + n, c_row, T(1));
}

// c = scale base + a b, where base has rows like c and may be c.
template <class T>
void add_product(
    int rows, int columns, int depth, Elements<T> a, const T* b, int64_t b_row, const T* base, T* c, int64_t c_row,
    T scale = T(1)) {
    constexpr int width = Simd<T>::width;
    int n = 0;
    for (; n + width < columns; n += 2 * width)
        product_rows<T, 2, true>(rows, depth, a, b + n, b_row, base + n, c + n, c_row, scale);
    if (n < columns) product_rows<T, 1, true>(rows, depth, a, b + n, b_row, base + n, c + n, c_row, scale);
}

template <class T>
Elements<T> plain(const T* data, int64_t row) { return {data, row, 1}; }

template <class T>
Elements<T> transposed(const T* data, int64_t row) { return {data, 1, row}; }

// --- Rows in and out -------------------------------------------------------------------------------------------------

template <class From, class To>
void convert(const From* from, int count, To* to) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// Rows [first, first + count) and columns [column, column + width) of a matrix of tokens.
template <class T>
void load(const Sequence& x, int64_t first, int count, int64_t column, int width, T* to, int64_t to_row) {
    for (int t = 0; t < count; ++t) {
        const int64_t at = (first + t) * x.row + column;
        switch (x.type) {
        case Type::float32: convert(static_cast<const float*>(x.data) + at, width, to + t * to_row); break;
        case Type::float64: convert(static_cast<const double*>(x.data) + at, width, to + t * to_row); break;
        case Type::float16: convert(static_cast<const Half*>(x.data) + at, width, to + t * to_row); break;
        case Type::bfloat16: convert(static_cast<const BFloat16*>(x.data) + at, width, to + t * to_row); break;
        }
    }
}

// Ask for rows that will be loaded next: they are a page further on, where the processor does not look by itself.
inline void prefetch(const Sequence& x, int64_t first, int count, int64_t column, int width) {
    for (int t = 0; t < count; ++t) {
        const char* row = static_cast<const char*>(x.data) + ((first + t) * x.row + column) * x.bytes();
        for (int64_t byte = 0; byte < width * x.bytes(); byte += 64) __builtin_prefetch(row + byte);
    }
}

template <class T>
void store(const T* from, int64_t from_row, const Sequence& x, int64_t first, int count, int64_t column, int width) {
    for (int t = 0; t < count; ++t) {
        const int64_t at = (first + t) * x.row + column;
        switch (x.type) {
        case Type::float32: convert(from + t * from_row, width, static_cast<float*>(x.data) + at); break;
        case Type::float64: convert(from + t * from_row, width, static_cast<double*>(x.data) + at); break;
        case Type::float16: convert(from + t * from_row, width, static_cast<Half*>(x.data) + at); break;
        case Type::bfloat16: convert(from + t * from_row, width, static_cast<BFloat16*>(x.data) + at); break;
        }
    }
}

template <class T>
void copy_memory(const T* from, int64_t from_row, int rows, int columns, T* to, int64_t to_row) {
    for (int i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, columns * sizeof(T));
}

template <class T>
void transpose(const T* __restrict from, int64_t from_row, int rows, int columns, T* __restrict to, int64_t to_row) {
    int i = 0;
    for (; i + 4 <= rows; i += 4) {
        int j = 0;
        for (; j + 4 <= columns; j += 4) {
            typedef T Four __attribute__((vector_size(4 * sizeof(T))));
            typedef T Loose __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
            const T* at = from + i * from_row + j;
            const Four a = *reinterpret_cast<const Loose*>(at);
            const Four b = *reinterpret_cast<const Loose*>(at + from_row);
            const Four c = *reinterpret_cast<const Loose*>(at + 2 * from_row);
            const Four d = *reinterpret_cast<const Loose*>(at + 3 * from_row);
            const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            T* out = to + j * to_row + i;
            *reinterpret_cast<Loose*>(out) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
            *reinterpret_cast<Loose*>(out + to_row) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
            *reinterpret_cast<Loose*>(out + 2 * to_row) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
            *reinterpret_cast<Loose*>(out + 3 * to_row) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
        }
        for (; j < columns; ++j)
            for (int m = 0; m < 4; ++m) to[j * to_row + i + m] = from[(i + m) * from_row + j];
    }
    for (; i < rows; ++i)
        for (int j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
}

template <class T>
T dot(const T* a, const T* b, int count) {
    T sums[8] = {};
    int i = 0;
    for (; i + 8 <= count; i += 8)
        for (int m = 0; m < 8; ++m) sums[m] += a[i + m] * b[i + m];
    for (; i < count; ++i) sums[0] += a[i] * b[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
void scale_rows(T* x, int64_t row, const T* factors, int rows, int columns) {
    for (int t = 0; t < rows; ++t)
        for (int j = 0; j < columns; ++j) x[t * row + j] *= factors[t];
}

template <class T>
void scale_columns(T* x, int64_t row, const T* factors, int rows, int columns) {
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < columns; ++t) x[i * row + t] *= factors[t];
}

// --- One chunk -------------------------------------------------------------------------------------------------------

// What one thread needs while it works on one column block of one sequence.
template <class T>
struct Work {
    const Problem& problem;
    int64_t stream = 0, block = 0;  // which sequence (batch and head), which block of value columns
    int dk, dv, column;             // sizes, and the first value column of this block
    int64_t k_row, v_row;           // their row lengths, in whole vectors
    int count = 0;                  // tokens of the current chunk
    int keys = 0;                   // where keys start in rows that hold queries first: count, or 0 without queries
    std::vector<T> storage;
    T *memory, *grad_memory;  // (Dk, Dv)
    T *qk;                    // (queries, then keys; Dk)
    T *k_t;                   // (Dk; tokens)
    T *v, *reads, *u;         // (tokens; Dv); reads holds queries, then keys
    T *overlap;               // (queries, then keys; keys): Q K^T and K K^T
    T *masked;                // the same, as S and A
    T *inverse;               // T, (tokens; tokens)
    T *retrieved;             // R, (tokens; Dv)
    T write[kChunk], erase[kChunk], decay[kChunk], from_start[kChunk], to_end[kChunk];
    T remaining[kChunk][kChunk];

    // Backward only.
    T *memories, *us, *inverses, *retrieveds;  // of each chunk of a segment
    T *du, *g, *grads;                         // (tokens; Dv); grads: dO, then dR
    T *u_t, *grads_t;                          // (Dv; tokens)
    T *dots, *mixed, *mixed_t;                 // like overlap
    T *dqk_t, *dk_t;                           // (Dk; tokens)
    T *rows;                                   // (tokens; Dk)

    Work(const Problem& p, bool backward) : problem(p), dk(int(p.dk)), dv(int(p.block_columns)), column(0) {
        k_row = padded(dk), v_row = padded(dv);
        const int64_t chunks = std::min<int64_t>(kSegment, p.length + kChunk - 1) / kChunk;
        const int64_t sizes[] = {
            dk * v_row, kLanes * k_row, dk * kLanes, kChunk * v_row, kLanes * v_row, kChunk * v_row,
            kLanes * kLanes, kLanes * kLanes, kChunk * kLanes, kChunk * v_row,
            dk * v_row, chunks * dk * v_row, chunks * kChunk * v_row, chunks * kChunk * kLanes,
            chunks * kChunk * v_row, kChunk * v_row, kChunk * v_row, kLanes * v_row, dv * kLanes, dv * kLanes,
            kLanes * kLanes, kLanes * kLanes, kChunk * kLanes, dk * kLanes, dk * kLanes, kChunk * k_row};
        T** fields[] = {
            &memory, &qk, &k_t, &v, &reads, &u, &overlap, &masked, &inverse, &retrieved,
            &grad_memory, &memories, &us, &inverses, &retrieveds, &du, &g, &grads, &u_t, &grads_t,
            &dots, &mixed, &mixed_t, &dqk_t, &dk_t, &rows};
        const int used = backward ? 26 : 10;
        int64_t total = kPad;
        for (int i = 0; i < used; ++i) total += padded(sizes[i]);
        // Zeros: lanes that pad a row out to whole vectors are computed with, though nothing reads their results.
        storage.assign(total, T(0));
        T* next = storage.data();
        while (reinterpret_cast<std::uintptr_t>(next) % 64) ++next;
        for (int i = 0; i < used; ++i) *fields[i] = next, next += padded(sizes[i]);
    }

    // Turn to one column block of one sequence.
    void start(int64_t item) {
        stream = item / problem.blocks;
        block = item % problem.blocks;
        column = int(block * problem.block_columns);
        dv = int(std::min(problem.block_columns, problem.dv - column));
    }

    // Where the block of a memory of this sequence begins in an array of `each` memories per sequence.
    int64_t memory_at(int64_t each = 1, int64_t index = 0) const {
        return (stream * each + index) * problem.dk * problem.dv + column;
    }

    static constexpr int64_t kPad = 64 / sizeof(T);
    static int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

    Sequence at(const Sequence& x) const { return x.at(stream / problem.heads, stream % problem.heads, block); }

    // `next`: the chunk that will be loaded after this one, or -1.
    void load_chunk(int64_t first, int64_t next) {
        const Problem& p = problem;
        count = int(std::min<int64_t>(kChunk, p.length - first));
        keys = p.q.data ? count : 0;
        if (p.q.data) load(at(p.q), first, count, 0, dk, qk, k_row);
        load(at(p.k), first, count, 0, dk, qk + keys * k_row, k_row);
        load(at(p.v), first, count, column, dv, v, v_row);
        if (next >= 0) {
            const int ahead = int(std::min<int64_t>(kChunk, p.length - next));
            if (p.q.data) prefetch(at(p.q), next, ahead, 0, dk);
            prefetch(at(p.k), next, ahead, 0, dk);
            prefetch(at(p.v), next, ahead, column, dv);
        }
        load_gate(p.write, first, write, T(1));
        load_gate(p.erase, first, erase, T(0));
        load_gate(p.decay, first, decay, T(1));
        if (p.decay.data) {
            for (int t = 0; t < count; ++t) {
                from_start[t] = t ? from_start[t - 1] * decay[t] : decay[0];
                for (int s = 0; s < count; ++s)
                    remaining[t][s] = s > t ? T(0) : s == t ? T(1) : remaining[t - 1][s] * decay[t];
            }
            for (int s = 0; s < count; ++s) to_end[s] = remaining[count - 1][s];
        }
    }

    void load_gate(const Sequence& gate, int64_t first, T* to, T otherwise) const {
        if (gate.data)
            load(at(gate), first, count, 0, 1, to, 1);
        else
            std::fill_n(to, count, otherwise);
    }

    // Q K^T and K K^T, as they are and masked with P: with the diagonal for queries, without it for keys.
    void compute_overlaps(bool queries, bool of_keys) {
        if (!queries && !of_keys) return;
        const int first = queries ? 0 : keys, end = of_keys ? keys + count : keys;
        transpose(qk + keys * k_row, k_row, count, dk, k_t, kLanes);
        product(
            end - first, count, dk, plain(qk + first * k_row, k_row), k_t, kLanes, overlap + first * kLanes, kLanes);
        mask(overlap, masked, first, end);
    }

    void mask(const T* from, T* to, int first, int end) const {
        for (int row = first; row < end; ++row) {
            const bool is_key = row >= keys;
            const int t = is_key ? row - keys : row, kept = is_key ? t : t + 1;
            const T *source = from + row * kLanes;
            T *target = to + row * kLanes;
            for (int s = 0; s < kept; ++s) target[s] = problem.decay.data ? source[s] * remaining[t][s] : source[s];
            for (int s = kept; s < kChunk; ++s) target[s] = 0;
        }
    }

    // T = (I + diag(erase) A)^-1, row by row: forward substitution on the unit matrix.
    void compute_inverse() {
        std::fill_n(inverse, kChunk * kLanes, T(0));
        for (int t = 0; t < count; ++t) {
            T* row = inverse + t * kLanes;
            const T* factors = masked + (keys + t) * kLanes;
            T sums[2][kChunk] = {};
            for (int s = 0; s < t; ++s)
                for (int j = 0; j < kChunk; ++j) sums[s & 1][j] += factors[s] * inverse[s * kLanes + j];
            for (int j = 0; j < kChunk; ++j) row[j] = -erase[t] * (sums[0][j] + sums[1][j]);
            row[t] = 1;
        }
    }

    // reads = diag(g) [Q; K] W0 for the rows asked for, then U. `empty`: W0 is zero.
    void compute_values(bool queries, bool empty, bool keep_retrieved) {
        const bool erases = problem.erase.data;
        const int first = queries ? 0 : keys, end = erases ? keys + count : keys;
        if (end > first) {
            if (empty)
                std::fill_n(reads + first * v_row, (end - first) * v_row, T(0));
            else
                product(
                    end - first, dv, dk, plain(qk + first * k_row, k_row), memory, v_row, reads + first * v_row, v_row);
            if (problem.decay.data && !empty) {
                if (queries) scale_rows(reads, v_row, from_start, count, dv);
                if (erases) scale_rows(reads + keys * v_row, v_row, from_start, count, dv);
            }
        }
        T* wanted = erases ? retrieved : u;  // scratch until T is applied
        for (int t = 0; t < count; ++t) {
            const T *value = v + t * v_row, *old = reads + (keys + t) * v_row;
            T* to = wanted + t * v_row;
            if (erases)
                for (int j = 0; j < dv; ++j) to[j] = write[t] * value[j] - erase[t] * old[j];
            else if (problem.write.data)
                for (int j = 0; j < dv; ++j) to[j] = write[t] * value[j];
            else
                std::memcpy(to, value, dv * sizeof(T));
        }
        if (erases) {
            product(count, dv, count, plain(inverse, kLanes), retrieved, v_row, u, v_row);
            if (keep_retrieved) {
                std::memcpy(retrieved, reads + keys * v_row, count * v_row * sizeof(T));
                add_product(
                    count, dv, count, plain(masked + keys * kLanes, kLanes), u, v_row, retrieved, retrieved, v_row);
            }
        }
    }

    // W1 = g_n W0 + K^T diag(p) U, to `next`, which may be the memory itself. `scaled` takes diag(p) U; it may be U.
    void advance_memory(T* next, T* scaled) {
        T scale = 1;
        const T* values = u;
        if (problem.decay.data) {
            scale = from_start[count - 1];
            for (int t = 0; t < count; ++t)
                for (int j = 0; j < dv; ++j) scaled[t * v_row + j] = u[t * v_row + j] * to_end[t];
            values = scaled;
        }
        add_product(
            dk, dv, count, transposed(qk + keys * k_row, k_row), values, v_row, memory, next, v_row, scale);
    }
};

// --- Forward ---------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Problem& p, int64_t begin, int64_t end) {
    Work<T> w(p, false);
    const bool queries = p.q.data, erases = p.erase.data;
    const T* initial = static_cast<const T*>(p.initial_state);
    for (int64_t item = begin; item < end; ++item) {
        w.start(item);
        if (initial)
            copy_memory(initial + w.memory_at(), p.dv, w.dk, w.dv, w.memory, w.v_row);
        else
            std::fill_n(w.memory, w.dk * w.v_row, T(0));
        for (int64_t first = 0; first < p.length; first += kChunk) {
            if (p.borders && first && first % kSegment == 0) {
                T* border = static_cast<T*>(p.borders) + w.memory_at(p.segments - 1, first / kSegment - 1);
                copy_memory(w.memory, w.v_row, w.dk, w.dv, border, p.dv);
            }
            w.load_chunk(first, first + kChunk < p.length ? first + kChunk : -1);
            w.compute_overlaps(queries, erases);
            if (erases) w.compute_inverse();
            w.compute_values(queries, !initial && !first, false);
            if (queries) {
                add_product(
                    w.count, w.dv, w.count, plain(w.masked, kLanes), w.u, w.v_row, w.reads, w.reads, w.v_row);
                store(w.reads, w.v_row, w.at(p.out), first, w.count, w.column, w.dv);
            }
            w.advance_memory(w.memory, w.u);
        }
        copy_memory(w.memory, w.v_row, w.dk, w.dv, static_cast<T*>(p.final_state) + w.memory_at(), p.dv);
    }
}

// --- Backward --------------------------------------------------------------------------------------------------------

// Gradient of the decays from that of P and g. `dp` has a row for each token and a column for W0, then one per token.
template <class T>
void grad_of_decay(const Work<T>& w, const T dp[kChunk][kChunk + 1], T* out) {
    const auto product_of = [&](int t, int column) -> T {  // g_t, or P[t, column - 1]; 1 for the empty product
        return t < 0 ? T(1) : column == 0 ? w.from_start[t] : w.remaining[t][column - 1];
    };
    for (int r = 0; r < w.count; ++r) {
        T sum = 0;
        for (int column = 0; column <= r; ++column) {
            T later = 0;
            for (int t = r; t < w.count; ++t) later += dp[t][column] * w.remaining[t][r];
            sum += later * product_of(r - 1, column);
        }
        out[r] = sum;
    }
}

template <class T>
struct Backward : Work<T> {
    using W = Work<T>;
    using W::problem, W::dk, W::dv, W::column, W::k_row, W::v_row, W::count, W::keys, W::qk, W::k_t, W::v, W::u;
    using W::masked, W::overlap, W::inverse, W::memory, W::grad_memory, W::memories, W::us, W::inverses, W::retrieveds;
    using W::du, W::g, W::grads, W::u_t, W::grads_t, W::dots, W::mixed, W::mixed_t, W::dqk_t, W::dk_t, W::rows;

    bool queries, erases, decays;

    explicit Backward(const Problem& p)
        : W(p, true), queries(p.q.data), erases(p.erase.data), decays(p.decay.data) {}

    void run(int64_t item) {
        const Problem& p = problem;
        this->start(item);
        const T* last = static_cast<const T*>(p.grad_final_state);
        if (last)
            copy_memory(last + this->memory_at(), p.dv, dk, dv, grad_memory, v_row);
        else
            std::fill_n(grad_memory, dk * v_row, T(0));
        for (int64_t segment = p.segments - 1; segment >= 0; --segment) {
            const int64_t begin = segment * kSegment, end = std::min(begin + kSegment, p.length);
            recompute(segment, begin, end);
            for (int64_t first = (end - 1) / kChunk * kChunk; first >= begin; first -= kChunk)
                chunk(first, int((first - begin) / kChunk));
        }
        if (p.grad_initial_state)
            copy_memory(
                grad_memory, v_row, dk, dv, static_cast<T*>(p.grad_initial_state) + this->memory_at(), p.dv);
    }

    void recompute(int64_t segment, int64_t begin, int64_t end) {
        const Problem& p = problem;
        const T* from = static_cast<const T*>(p.initial_state);
        if (segment)
            from = static_cast<const T*>(p.borders) + this->memory_at(p.segments - 1, segment - 1);
        else if (from)
            from += this->memory_at();
        if (from)
            copy_memory(from, p.dv, dk, dv, memories, v_row);
        else
            std::fill_n(memories, dk * v_row, T(0));
        for (int64_t first = begin; first < end; first += kChunk) {
            select(int((first - begin) / kChunk));
            this->load_chunk(first, first + kChunk < end ? first + kChunk : -1);
            this->compute_overlaps(false, erases);
            if (erases) this->compute_inverse();
            this->compute_values(false, first == 0 && !p.initial_state, true);
            if (first + kChunk < end) this->advance_memory(memory + dk * v_row, du);
        }
    }

    // Point to what recompute() left for a chunk.
    void select(int index) {
        memory = memories + index * dk * v_row;
        u = us + index * kChunk * v_row;
        inverse = inverses + index * kChunk * kLanes;
        this->retrieved = retrieveds + index * kChunk * v_row;
    }

    void chunk(int64_t first, int index) {
        const Problem& p = problem;
        const bool from_zero = first == 0 && !p.initial_state;                         // W0 = 0
        const bool to_nothing = first + kChunk >= p.length && !p.grad_final_state;     // dW1 = 0
        const bool to_start = first > 0 || p.grad_initial_state;                       // dW0 is wanted
        select(index);
        this->load_chunk(first, -1);  // recompute() has just read all of it but the read-outs' gradients
        if (queries && first >= kChunk) prefetch(this->at(p.grad_out), first - kChunk, kChunk, column, dv);
        this->compute_overlaps(queries, erases && decays);
        const int rows_read = keys + (erases ? count : 0);  // rows of dO and dR

        // dU, G
        if (to_nothing)
            std::fill_n(du, count * v_row, T(0));
        else
            product(count, dv, dk, plain(qk + keys * k_row, k_row), grad_memory, v_row, du, v_row);
        if (decays && !to_nothing) scale_rows(du, v_row, this->to_end, count, dv);
        if (queries) {
            load(this->at(p.grad_out), first, count, column, dv, grads, v_row);
            add_product(count, dv, count, transposed(masked, kLanes), grads, v_row, du, du, v_row);
        }
        T* through = du;
        if (erases) {
            product(count, dv, count, transposed(inverse, kLanes), du, v_row, g, v_row);
            through = g;
        }

        // dV, dwrite, derase, dR
        for (int t = 0; t < count; ++t) {
            T* row = through + t * v_row;
            if (p.grad_write.data) put_gate(p.grad_write, first + t, dot(row, v + t * v_row, dv));
            if (erases) {
                put_gate(p.grad_erase, first + t, -dot(row, this->retrieved + t * v_row, dv));
                T* dr = grads + (keys + t) * v_row;
                for (int j = 0; j < dv; ++j) dr[j] = -this->erase[t] * row[j];
            }
            if (p.write.data)
                for (int j = 0; j < dv; ++j) row[j] *= this->write[t];
        }
        store(through, v_row, this->at(p.grad_v), first, count, column, dv);

        // dO U^T and dR U^T; dO W0^T and dR W0^T; U dW1^T: tokens in the lanes
        transpose(u, v_row, count, dv, u_t, kLanes);
        const bool reads = rows_read && !from_zero;
        if (rows_read)
            product(rows_read, count, dv, plain(grads, v_row), u_t, kLanes, dots, kLanes);
        if (reads) {
            transpose(grads, v_row, rows_read, dv, grads_t, kLanes);
            product(dk, rows_read, dv, plain(memory, v_row), grads_t, kLanes, dqk_t, kLanes);
        } else {
            std::fill_n(dqk_t, dk * kLanes, T(0));
        }
        if (to_nothing)
            std::fill_n(dk_t, dk * kLanes, T(0));
        else
            product(dk, count, dv, plain(grad_memory, v_row), u_t, kLanes, dk_t, kLanes);
        if (decays) decay_gradient(first, rows_read, reads, to_nothing);

        // dQ and dK
        if (erases)
            for (int i = 0; i < dk; ++i)
                for (int t = 0; t < count; ++t) dk_t[i * kLanes + t] += dqk_t[i * kLanes + keys + t];
        if (rows_read) {
            this->mask(dots, mixed, 0, rows_read);
            if (queries) transpose(mixed, kLanes, count, count, mixed_t, kLanes);
            if (erases) {
                T* a = mixed + keys * kLanes;
                for (int t = 0; t < count; ++t)
                    for (int s = 0; s < t; ++s) a[s * kLanes + t] = a[t * kLanes + s];
            }
            add_product(dk, count, rows_read, transposed(qk, k_row), mixed, kLanes, dk_t, dk_t, kLanes);
            if (queries) {
                add_product(
                    dk, count, count, transposed(qk + keys * k_row, k_row), mixed_t, kLanes, dqk_t, dqk_t, kLanes);
                transpose(dqk_t, kLanes, dk, count, rows, k_row);
                store(rows, k_row, this->at(p.grad_q), first, count, 0, dk);
            }
        }
        transpose(dk_t, kLanes, dk, count, rows, k_row);
        store(rows, k_row, this->at(p.grad_k), first, count, 0, dk);

        // dW0
        if (!to_start) return;
        T scale = 1;
        if (decays) {
            scale = this->from_start[count - 1];
            if (queries) scale_rows(grads, v_row, this->from_start, count, dv);
            if (erases) scale_rows(grads + keys * v_row, v_row, this->from_start, count, dv);
        }
        if (rows_read || decays)
            add_product(
                dk, dv, rows_read, transposed(qk, k_row), grads, v_row, grad_memory, grad_memory, v_row, scale);
    }

    // Also applies g and p to the products with W0 and dW1 that it needs without them.
    void decay_gradient(int64_t first, int rows_read, bool reads, bool to_nothing) {
        T dp[kChunk][kChunk + 1] = {};
        T out[kChunk];
        for (int row = 0; row < rows_read; ++row) {
            const bool is_key = row >= keys;
            const int t = is_key ? row - keys : row, kept = is_key ? t : t + 1;
            for (int s = 0; s < kept; ++s) dp[t][s + 1] += dots[row * kLanes + s] * overlap[row * kLanes + s];
        }
        T sums[kLanes] = {};
        if (reads) {
            for (int i = 0; i < dk; ++i)
                for (int row = 0; row < rows_read; ++row) sums[row] += qk[row * k_row + i] * dqk_t[i * kLanes + row];
            for (int row = 0; row < rows_read; ++row) dp[row >= keys ? row - keys : row][0] += sums[row];
            if (queries) scale_columns(dqk_t, kLanes, this->from_start, dk, count);
            if (erases) scale_columns(dqk_t + keys, kLanes, this->from_start, dk, count);
        }
        if (!to_nothing) {
            std::fill_n(sums, kLanes, T(0));
            for (int i = 0; i < dk; ++i)
                for (int s = 0; s < count; ++s) sums[s] += qk[(keys + s) * k_row + i] * dk_t[i * kLanes + s];
            for (int s = 0; s < count; ++s) dp[count - 1][s + 1] += sums[s];
            for (int i = 0; i < dk; ++i) dp[count - 1][0] += dot(grad_memory + i * v_row, memory + i * v_row, dv);
            scale_columns(dk_t, kLanes, this->to_end, dk, count);
        }
        grad_of_decay(*this, dp, out);
        for (int t = 0; t < count; ++t) put_gate(problem.grad_decay, first + t, out[t]);
    }

    void put_gate(const Sequence& gate, int64_t t, T value) const {
        if (gate.data) store(&value, 1, this->at(gate), t, 1, 0, 1);
    }
};

template <class T>
void backward(const Problem& p, int64_t begin, int64_t end) {
    Backward<T> work(p);
    for (int64_t item = begin; item < end; ++item) work.run(item);
}

}  // namespace FWP_ISA
