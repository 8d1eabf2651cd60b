// One token of decoding on a CPU, and reads of finished memories. Included like fast_weights_cpu_kernels.h, after it.
//
// A step moves its memories once: D^2 numbers in and out for each hypothesis and head, with 2 to 3 multiply-adds for
// each, so it is limited by memory as soon as the memories are larger than the last cache. A column of a memory needs
// nothing of the others: a few vectors of columns at a time are read for what the key retrieves, which brings them into
// the first cache, and then written and read by the query. Without erasing the first pass is not needed.

namespace FWP_ISA {

// --- Keys and queries ------------------------------------------------------------------------------------------------

// The floor for divisors of ops/numerics.py.
template <class T>
T smallest_divisor() { return std::sqrt(std::numeric_limits<T>::min()); }

// 1 / total where there is something to divide by, else 0.
template <class T>
T inverse_of(T total) { return total > smallest_divisor<T>() ? 1 / total : T(0); }

template <class T>
T sum_of(const T* x, int64_t count) {
    constexpr int width = Simd<T>::width;
    typename Simd<T>::type sums = {};
    T total = 0;
    int64_t i = 0;
    for (; i + width <= count; i += width) sums += *reinterpret_cast<const typename Simd<T>::unaligned*>(x + i);
    for (; i < count; ++i) total += x[i];
    for (int lane = 0; lane < width; ++lane) total += sums[lane];
    return total;
}

// softmax([p; -p]) for p in the first half of `x`.
template <class T>
void softmax_of_both_signs(T* x, int64_t half) {
    T largest = 0, sum = 0;
    for (int64_t i = 0; i < half; ++i) largest = std::max(largest, std::abs(x[i]));
    for (int64_t i = 0; i < half; ++i) {
        const T p = x[i];
        x[i] = std::exp(p - largest), x[half + i] = std::exp(-p - largest);
        sum += x[i] + x[half + i];
    }
    for (int64_t i = 0; i < 2 * half; ++i) x[i] /= sum;
}

// What a projected key or query `x` addresses a memory with, to `out`. `scratch` has 2 d_key places.
template <class T>
void address(const Features& f, const T* x, T* out, T* scratch) {
    const int64_t d = f.d_key, half = f.dk / 2;
    switch (f.map) {
    case FeatureMap::none: std::memcpy(out, x, d * sizeof(T)); break;
    case FeatureMap::elu:
        for (int64_t i = 0; i < d; ++i) out[i] = x[i] > 0 ? x[i] + 1 : std::exp(x[i]);
        break;
    case FeatureMap::tanh:
        for (int64_t i = 0; i < d; ++i) out[i] = std::tanh(x[i]);
        break;
    case FeatureMap::dpfp:
        // Written so that NaN stays NaN.
        for (int64_t i = 0; i < d; ++i) scratch[i] = x[i] < 0 ? 0 : x[i], scratch[d + i] = x[i] > 0 ? 0 : -x[i];
        for (int64_t shift = 1; shift <= f.nu; ++shift, out += 2 * d) {
            for (int64_t i = 0; i < shift; ++i) out[i] = scratch[i] * scratch[2 * d + i - shift];
            for (int64_t i = shift; i < 2 * d; ++i) out[i] = scratch[i] * scratch[i - shift];
        }
        out -= f.dk;
        break;
    case FeatureMap::favor: {
        const T* row = static_cast<const T*>(f.projection);
        for (int64_t i = 0; i < half; ++i, row += d) out[i] = dot(row, x, int(d));
        // Features of large keys are too small for T, but not relative to each other.
        if (f.normalization != KeyNormalization::none) {
            softmax_of_both_signs(out, half);
            if (f.normalization == KeyNormalization::sum) return;
            break;
        }
        const T square = dot(x, x, int(d)) / 2, scale = 1 / std::sqrt(T(f.dk)), largest = 40;
        for (int64_t i = 0; i < half; ++i) {
            const T p = out[i];
            out[i] = scale * std::exp(std::min(p - square, largest));
            out[half + i] = scale * std::exp(std::min(-p - square, largest));
        }
        break;
    }
    }
    T divisor = 1;
    if (f.normalization == KeyNormalization::sum) {
        divisor = std::max(sum_of(out, f.dk), smallest_divisor<T>());
    } else if (f.normalization == KeyNormalization::l2) {
        // Squares of small features would be below the floor.
        T largest = smallest_divisor<T>();
        for (int64_t i = 0; i < f.dk; ++i) largest = std::max(largest, std::abs(out[i]));
        for (int64_t i = 0; i < f.dk; ++i) out[i] /= largest;
        divisor = std::sqrt(std::max(dot(out, out, int(f.dk)), T(1)));
    }
    if (divisor != 1)
        for (int64_t i = 0; i < f.dk; ++i) out[i] /= divisor;
}

// --- Columns of a memory ---------------------------------------------------------------------------------------------

// A token's part in a step: `to` = decay `from` + k (write v - erase decay from^T k); out = to^T q.
template <class T>
struct Token {
    int64_t dk, dv;
    const T *q, *k, *v;
    T write, erase, decay;
    const T* from;
    T *to, *out;
};

// Columns that are computed together: a vector of them, or one.
template <class T>
struct Vectors {
    using Group = typename Simd<T>::type;
    static constexpr int64_t width = Simd<T>::width;

    static Group load(const T* from) { return *reinterpret_cast<const typename Simd<T>::unaligned*>(from); }
    static void store(const Group& group, T* to) { *reinterpret_cast<typename Simd<T>::unaligned*>(to) = group; }
};

template <class T>
struct Scalars {
    using Group = T;
    static constexpr int64_t width = 1;

    static Group load(const T* from) { return *from; }
    static void store(Group group, T* to) { *to = group; }
};

// N groups of columns from `column` on.
template <class Columns, int N, class T>
inline void step_columns(const Token<T>& token, int64_t column) {
    using Group = typename Columns::Group;
    const auto at = [&](int64_t row, int n) { return row * token.dv + column + n * Columns::width; };
    Group written[N], read[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) written[n] = read[n] = Group{};
    if (token.erase != 0) {
        for (int64_t i = 0; i < token.dk; ++i)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) written[n] += token.k[i] * Columns::load(token.from + at(i, n));
    }
    const T erase = token.erase * token.decay;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) written[n] = token.write * Columns::load(token.v + at(0, n)) - erase * written[n];
    for (int64_t i = 0; i < token.dk; ++i) {
        const T key = token.k[i], query = token.q[i];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const Group element = token.decay * Columns::load(token.from + at(i, n)) + key * written[n];
            Columns::store(element, token.to + at(i, n));
            read[n] += query * element;
            // The next head's memory, for memory to be busy meanwhile.
            if (Columns::width > 1) __builtin_prefetch(token.from + at(i + token.dk, n), 0, 2);
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) Columns::store(read[n], token.out + at(0, n));
}

template <class Columns, int N, class T>
inline void read_columns(const T* q, const T* memory, int64_t dk, int64_t dv, T* out, int64_t column) {
    typename Columns::Group read[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) read[n] = typename Columns::Group{};
    for (int64_t i = 0; i < dk; ++i)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) read[n] += q[i] * Columns::load(memory + i * dv + column + n * Columns::width);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) Columns::store(read[n], out + column + n * Columns::width);
}

// Calls f(columns, count, first column) until all had their turn: four vectors at a time, then one, then one column.
template <class T, class F>
void for_columns(int64_t dv, const F& f) {
    constexpr int64_t width = Simd<T>::width;
    int64_t column = 0;
    for (; column + 4 * width <= dv; column += 4 * width) f(Vectors<T>(), std::integral_constant<int, 4>(), column);
    for (; column + width <= dv; column += width) f(Vectors<T>(), std::integral_constant<int, 1>(), column);
    for (; column < dv; ++column) f(Scalars<T>(), std::integral_constant<int, 1>(), column);
}

// --- Steps and reads -------------------------------------------------------------------------------------------------

// Buffers for one row and head.
template <class T>
struct Row {
    std::vector<T> storage;
    T *x, *scratch, *q, *k, *v, *out;

    Row(const Features& f, int64_t dv) : storage(3 * f.d_key + 2 * f.dk + 2 * dv) {
        x = storage.data(), scratch = x + f.d_key, q = scratch + 2 * f.d_key, k = q + f.dk, v = k + f.dk, out = v + dv;
    }

    void address_with(const Features& f, const Sequence& projected, int64_t row, int64_t head, T* to) {
        load(projected.at(row, head, 0), 0, 1, 0, int(f.d_key), x, f.d_key);
        address(f, x, to, scratch);
    }
};

template <class T>
T gate_of(const Sequence& gate, int64_t row, int64_t head, T value) {
    if (gate.data) load(gate.at(row, head, 0), 0, 1, 0, 1, &value, 1);
    return value;
}

// Row `row` goes on from the memory in place `from`, to place `to`.
template <class T>
void step_row(const Step& p, int64_t row, int64_t head, int64_t from, int64_t to, Row<T>& buffers) {
    const Features& f = p.features;
    const int64_t dk = f.dk, dv = p.dv;
    buffers.address_with(f, p.q, row, head, buffers.q);
    buffers.address_with(f, p.k, row, head, buffers.k);
    load(p.v.at(row, head, 0), 0, 1, 0, int(dv), buffers.v, dv);
    Token<T> token{dk, dv, buffers.q, buffers.k, buffers.v, 1, 0, 1, nullptr, nullptr, buffers.out};
    token.write = gate_of(p.write, row, head, T(1)), token.erase = gate_of(p.erase, row, head, T(0));
    token.decay = gate_of(p.decay, row, head, T(1));
    T scale = 1;
    if (p.normalizer) {
        // ops/attention_normalization.py: z counts a token in full where the rule erases, else what it writes.
        const T* z = static_cast<const T*>(p.normalizer) + (from * p.heads + head) * dk;
        T* next = static_cast<T*>(p.normalizer) + (to * p.heads + head) * dk;
        const T counted = p.erase.data ? T(token.write != 0) : token.write;
        if (p.erase.data) token.erase *= inverse_of(token.decay * dot(z, token.k, int(dk)));
        for (int64_t i = 0; i < dk; ++i) next[i] = token.decay * z[i] + counted * token.k[i];
        scale = inverse_of(dot(next, token.q, int(dk)));
    }
    token.from = static_cast<const T*>(p.state) + (from * p.heads + head) * dk * dv;
    token.to = static_cast<T*>(p.state) + (to * p.heads + head) * dk * dv;
    for_columns<T>(dv, [&](auto columns, auto count, int64_t column) {
        step_columns<decltype(columns), count.value>(token, column);
    });
    if (p.normalizer)
        for (int64_t j = 0; j < dv; ++j) buffers.out[j] *= scale;
    store(buffers.out, dv, p.out.at(row, head, 0), 0, 1, 0, int(dv));
}

template <class T>
void step(const Step& p, const Moves& moves, int64_t begin, int64_t end) {
    Row<T> buffers(p.features, p.dv);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t family = item / p.heads, head = item % p.heads;
        // The row that keeps its parent's place comes last, when nobody needs the parent any more.
        for (int64_t i = moves.begin[family]; i < moves.begin[family + 1]; ++i)
            step_row(p, moves.row[i], head, moves.from[family], moves.to[i], buffers);
    }
}

template <class T>
void read(const Read& p, int64_t begin, int64_t end) {
    Row<T> buffers(p.features, p.dv);
    const int64_t dk = p.features.dk, dv = p.dv, sharing = p.rows / p.memories;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t memory = item / p.heads, head = item % p.heads;
        const T* state = static_cast<const T*>(p.state) + item * dk * dv;
        for (int64_t row = memory * sharing; row < (memory + 1) * sharing; ++row) {
            buffers.address_with(p.features, p.q, row, head, buffers.q);
            for_columns<T>(dv, [&](auto columns, auto count, int64_t column) {
                read_columns<decltype(columns), count.value>(buffers.q, state, dk, dv, buffers.out, column);
            });
            if (p.normalizer) {
                const T* z = static_cast<const T*>(p.normalizer) + item * dk;
                const T scale = inverse_of(dot(z, buffers.q, int(dk)));
                for (int64_t j = 0; j < dv; ++j) buffers.out[j] *= scale;
            }
            store(buffers.out, dv, p.out.at(row, head, 0), 0, 1, 0, int(dv));
        }
    }
}

}  // namespace FWP_ISA
