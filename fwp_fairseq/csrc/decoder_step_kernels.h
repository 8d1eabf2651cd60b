// What a decoder's step has beside its memories and float32 products: layer norms, softmax attention to a source, and
// products of 8-bit integers. Included like fast_weights_cpu_kernels.h, after few_rows_linear_kernel.h.

namespace FWP_ISA {

inline void layer_norm(const Norm& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float* x = p.x + row * p.width;
        float* y = p.y + row * p.width;
        // Two passes, and as many sums as a vector has lanes, so that it is exact and quick.
        constexpr int kLanes = 16;
        float sums[kLanes] = {}, squares[kLanes] = {}, sum = 0, square = 0;
        int64_t i = 0;
        for (; i + kLanes <= p.width; i += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane];
        for (; i < p.width; ++i) sum += x[i];
        for (float lane : sums) sum += lane;
        const float mean = sum / p.width;
        for (i = 0; i + kLanes <= p.width; i += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) squares[lane] += (x[i + lane] - mean) * (x[i + lane] - mean);
        for (; i < p.width; ++i) square += (x[i] - mean) * (x[i] - mean);
        for (float lane : squares) square += lane;
        const float scale = 1 / std::sqrt(square / p.width + p.epsilon);
        for (i = 0; i < p.width; ++i) y[i] = (x[i] - mean) * scale * p.weight[i] + p.bias[i];
    }
}

// Rows [begin, end), all heads of each.
inline void attend(const Attend& p, int64_t begin, int64_t end) {
    const int64_t d = p.head_dim, width = p.heads * d, sharing = p.rows / p.sentences;
    const float scale = 1 / std::sqrt(float(d));
    std::vector<float> weights(p.length), query(d);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t sentence = row / sharing;
        float* average = p.average ? p.average + row * p.length : nullptr;
        if (average) std::fill_n(average, p.length, 0.f);
        for (int64_t head = 0; head < p.heads; ++head) {
            const float* key = p.keys + (sentence * p.heads + head) * p.length * d;
            const float* value = p.values + (sentence * p.heads + head) * p.length * d;
            float* out = p.out + row * width + head * d;
            for (int64_t i = 0; i < d; ++i) query[i] = p.q[row * width + head * d + i] * scale;
            linear<float>({query.data(), key, nullptr, weights.data(), 1, d, p.length, d, p.length}, 0, p.length);
            float largest = -std::numeric_limits<float>::infinity(), sum = 0;
            for (int64_t s = 0; s < p.length; ++s) {
                if (p.padding && p.padding[sentence * p.length + s]) weights[s] = -std::numeric_limits<float>::infinity();
                largest = std::max(largest, weights[s]);
            }
            for (int64_t s = 0; s < p.length; ++s) sum += weights[s] = std::exp(weights[s] - largest);
            for (int64_t s = 0; s < p.length; ++s) weights[s] /= sum;
            for_columns<float>(d, [&](auto columns, auto count, int64_t column) {
                read_columns<decltype(columns), count.value>(weights.data(), value, p.length, d, out, column);
            });
            if (average)
                for (int64_t s = 0; s < p.length; ++s) average[s] += weights[s] / p.heads;
        }
    }
}

// --- Products of 8-bit integers ----------------------------------------------------------------------------------

#if defined(FWP_VNNI)
using Integers = __m512i;
inline Integers load_integers(const void* from) { return _mm512_loadu_si512(from); }
inline Integers four_inputs(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}
inline Integers add_products(Integers sum, Integers x, Integers w) {
    // As _mm512_dpbusd_epi32, for which compilers copy the sum, and load w for each row.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
}
inline Integers no_integers() { return _mm512_setzero_si512(); }
constexpr int kIntegerRows = 6, kIntegerPanels = 4;
#elif defined(FWP_AVX2)
struct Integers {
    __m256i low, high;
};
inline Integers load_integers(const void* from) {
    const __m256i* both = static_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(both), _mm256_loadu_si256(both + 1)};
}
inline __m256i four_inputs(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
}
inline __m256i add_products(__m256i sum, __m256i x, __m256i w) {
    // Sums of pairs fit 16 bits, since x is at most 127 here.
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}
inline Integers add_products(Integers sum, __m256i x, Integers w) {
    return {add_products(sum.low, x, w.low), add_products(sum.high, x, w.high)};
}
inline Integers no_integers() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
constexpr int kIntegerRows = 3, kIntegerPanels = 1;
#else
struct Integers {
    int32_t of[kPanel];
};
struct Bytes {
    const int8_t* of;
};
inline Bytes load_integers(const void* from) { return {static_cast<const int8_t*>(from)}; }
inline const uint8_t* four_inputs(const uint8_t* from) { return from; }
inline Integers add_products(Integers sum, const uint8_t* x, Bytes w) {
    for (int o = 0; o < kPanel; ++o)
        for (int i = 0; i < 4; ++i) sum.of[o] += int32_t(x[i]) * w.of[4 * o + i];
    return sum;
}
inline Integers no_integers() { return {}; }
constexpr int kIntegerRows = 2, kIntegerPanels = 1;
#endif

// ROWS rows, PANELS panels of kPanel outputs from `panel` on.
template <int ROWS, int PANELS>
inline void integer_tile(const IntegerLinear& p, int64_t row, int64_t panel) {
    const int64_t fours = (p.inputs + 3) / 4;
    const uint8_t* x = p.x + row * 4 * fours;
    const int8_t* w = p.weight + panel * fours * 4 * kPanel;
    Integers sum[ROWS][PANELS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < PANELS; ++n) sum[r][n] = no_integers();
    for (int64_t i = 0; i < fours; ++i) {
        decltype(load_integers(w)) weight[PANELS];
#pragma GCC unroll 4
        for (int n = 0; n < PANELS; ++n) {
            weight[n] = load_integers(w + (n * fours + i) * 4 * kPanel);
            if (ROWS <= 2) __builtin_prefetch(w + (n * fours + i + 16) * 4 * kPanel);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const auto four = four_inputs(x + (r * fours + i) * 4);
#pragma GCC unroll 4
            for (int n = 0; n < PANELS; ++n) sum[r][n] = add_products(sum[r][n], four, weight[n]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < PANELS; ++n) {
            int32_t found[kPanel];
            std::memcpy(found, &sum[r][n], sizeof found);
            const int64_t first = (panel + n) * kPanel, count = p.outputs - first;
            // Of as many outputs as there usually are the compiler makes a vector.
            const auto finish = [&, step = p.step[row + r], y = p.y + (row + r) * p.y_row + first](int64_t outputs) {
                for (int64_t o = 0; o < outputs; ++o) {
                    const float product = float(found[o] - p.offset[first + o]) * p.worth[first + o] * step;
                    y[o] = p.bias ? p.bias[first + o] + product : product;
                }
            };
            count < kPanel ? finish(count) : finish(kPanel);
        }
}

template <int PANELS>
inline void integer_rows(const IntegerLinear& p, int64_t panel) {
    for (int64_t row = 0, tiles = (p.rows + kIntegerRows - 1) / kIntegerRows; tiles > 0; --tiles) {
        const int64_t now = (p.rows - row + tiles - 1) / tiles;
        const auto tile = [&](auto rows) {
            if constexpr (rows.value <= kIntegerRows) integer_tile<rows.value, PANELS>(p, row, panel);
        };
        switch (now) {
        case 6: tile(std::integral_constant<int, 6>()); break;
        case 5: tile(std::integral_constant<int, 5>()); break;
        case 4: tile(std::integral_constant<int, 4>()); break;
        case 3: tile(std::integral_constant<int, 3>()); break;
        case 2: tile(std::integral_constant<int, 2>()); break;
        default: tile(std::integral_constant<int, 1>());
        }
        row += now;
    }
}

// Panels [begin, end) of outputs.
inline void integer_linear(const IntegerLinear& p, int64_t begin, int64_t end) {
    int64_t panel = begin;
    for (; panel + kIntegerPanels <= end; panel += kIntegerPanels) integer_rows<kIntegerPanels>(p, panel);
    for (; panel < end; ++panel) integer_rows<1>(p, panel);
}

// Each of `rows` rows of x as integers of kSteps steps of its largest number, and an offset of kSteps + 1: to `y`, whose
// rows are rounded up to fours.
inline void to_integers(const float* x, int64_t rows, int64_t inputs, uint8_t* y, float* steps) {
    const int64_t row_bytes = (inputs + 3) / 4 * 4;
    for (int64_t row = 0; row < rows; ++row, x += inputs, y += row_bytes) {
        constexpr int kLanes = 16;
        float largest[kLanes] = {}, most = 0;
        // What is not a number is larger than all numbers here.
        const auto larger = [](float a, float b) { return a > b || a != a ? a : b; };
        int64_t i = 0;
        for (; i + kLanes <= inputs; i += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) largest[lane] = larger(std::abs(x[i + lane]), largest[lane]);
        for (; i < inputs; ++i) most = larger(std::abs(x[i]), most);
        for (float lane : largest) most = larger(lane, most);
        float step = most / kSteps;
        if (step < std::numeric_limits<float>::min()) step = std::numeric_limits<float>::min();
        steps[row] = step;
        // Cut off, not rounded: with a half more it is the nearest.
        for (i = 0; i < inputs; ++i) y[i] = uint8_t(int32_t(x[i] / step + (kSteps + 1.5f)));
        for (; i < row_bytes; ++i) y[i] = 0;
    }
}

}  // namespace FWP_ISA
