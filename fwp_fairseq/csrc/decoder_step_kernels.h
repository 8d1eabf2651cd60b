// What a decoder's step has beside its memories and float32 products: layer norms, softmax attention to a source, and
// products of 8-bit integers. Included like fast_weights_cpu_kernels.h, after few_rows_linear_kernel.h.

namespace FWP_ISA {

// --- Vectors ---------------------------------------------------------------------------------------------------------

using Number = Simd<float>::type;
using LooseNumber = Simd<float>::unaligned;
constexpr int kNumbers = Simd<float>::width;
typedef int32_t Whole __attribute__((vector_size(FWP_VECTOR_BYTES)));
typedef int32_t LooseWhole __attribute__((vector_size(FWP_VECTOR_BYTES), aligned(4), may_alias));
typedef uint8_t Byte __attribute__((vector_size(kNumbers)));
typedef uint8_t LooseByte __attribute__((vector_size(kNumbers), aligned(1), may_alias));

inline Number numbers_at(const float* x) { return *reinterpret_cast<const LooseNumber*>(x); }
inline void put_numbers(float* to, Number x) { *reinterpret_cast<LooseNumber*>(to) = x; }
inline Whole integers_at(const int32_t* x) { return *reinterpret_cast<const LooseWhole*>(x); }

// e^x for x <= 0, to 2 units in the last place: 2^n e^r with |r| <= log(2) / 2, of which Taylor's series has seven
// terms. What is below the smallest normal number is 0.
inline Number exponential(Number x) {
    constexpr float kRounds = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
    const Number n = (x * 1.44269504f + kRounds) - kRounds;
    const Number r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts
    Number sum = r * (1 / 720.f) + 1 / 120.f;
    sum = sum * r + 1 / 24.f;
    sum = sum * r + 1 / 6.f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1;
    sum = sum * r + 1;
    const Number bounded = n < -126 ? Number{} - 126 : n;
    const Number scaled = sum * (Number)((__builtin_convertvector(bounded, Whole) + 127) << 23);
    return x < -87 ? Number{} : scaled;
}

// --- Layer norms and softmax attention -------------------------------------------------------------------------------

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

// Weights of as many numbers as vectors have, of which those after `length` are to be nothing.
inline void softmax(float* weights, int64_t length, int64_t whole, const bool* padding) {
    constexpr float kNothing = -std::numeric_limits<float>::infinity();
    std::fill(weights + length, weights + whole, kNothing);
    float largest = kNothing, sum = 0;
    for (int64_t s = 0; s < length; ++s) {
        if (padding && padding[s]) weights[s] = kNothing;
        largest = std::max(largest, weights[s]);
    }
    Number sums = {};
    for (int64_t s = 0; s < whole; s += kNumbers) {
        const Number weight = exponential(numbers_at(weights + s) - largest);
        put_numbers(weights + s, weight), sums += weight;
    }
    for (int lane = 0; lane < kNumbers; ++lane) sum += sums[lane];
    for (int64_t s = 0; s < whole; s += kNumbers) put_numbers(weights + s, numbers_at(weights + s) / sum);
}

// Rows of a sentence read its keys and values together.
inline void attend(const Attend& p, int64_t begin, int64_t end) {
    const int64_t d = p.head_dim, width = p.heads * d, sharing = p.rows / p.sentences;
    const int64_t whole = (p.length + kNumbers - 1) / kNumbers * kNumbers;
    const float scale = 1 / std::sqrt(float(d));
    std::vector<float> weights(sharing * whole), queries(sharing * d);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t sentence = item / p.heads, head = item % p.heads, first = sentence * sharing;
        const float *key = p.keys + item * p.length * d, *value = p.values + item * p.length * d;
        for (int64_t row = 0; row < sharing; ++row)
            for (int64_t i = 0; i < d; ++i)
                queries[row * d + i] = p.q[(first + row) * width + head * d + i] * scale;
        linear<float>({queries.data(), key, nullptr, weights.data(), sharing, d, p.length, d, whole}, 0, p.length);
        for (int64_t row = 0; row < sharing; ++row) {
            float* own = weights.data() + row * whole;
            softmax(own, p.length, whole, p.padding ? p.padding + sentence * p.length : nullptr);
            for_columns<float>(d, [&](auto columns, auto count, int64_t column) {
                read_columns<decltype(columns), count.value>(
                    own, value, p.length, d, p.out + (first + row) * width + head * d, column);
            });
            if (!p.average) continue;
            float* average = p.average + (first + row) * p.length;
            for (int64_t s = 0; s < p.length; ++s)
                average[s] = (head == 0 ? 0 : average[s]) + own[s] / float(p.heads);
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

// The outputs of a row and a panel, of which `found` are the products.
inline void to_numbers(const IntegerLinear& p, int64_t row, int64_t panel, const int32_t* found) {
    const int64_t first = panel * kPanel, count = std::min<int64_t>(kPanel, p.outputs - first);
    const float step = p.step[row], *bias = p.bias ? p.bias + first : nullptr;
    float* y = p.y + row * p.y_row + first;
    int64_t o = 0;
    for (; o + kNumbers <= count; o += kNumbers) {
        const Whole sums = integers_at(found + o) - integers_at(p.offset + first + o);
        const Number product = __builtin_convertvector(sums, Number) * numbers_at(p.worth + first + o) * step;
        put_numbers(y + o, bias ? numbers_at(bias + o) + product : product);
    }
    for (; o < count; ++o) {
        const float product = float(found[o] - p.offset[first + o]) * p.worth[first + o] * step;
        y[o] = bias ? bias[o] + product : product;
    }
}

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
            to_numbers(p, row + r, panel + n, found);
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

#if defined(FWP_AMX)
// Tiles of 16 rows of 64 bytes: 16 rows and inputs of x by a panel of W make 16 rows of sums. Two by two, so that each
// tile that is loaded serves twice.
inline void integer_tiles(const IntegerLinear& p, int64_t begin, int64_t end) {
    constexpr int64_t kRows = 16, kInputs = 64;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {};
    } shape;
    alignas(64) int32_t found[4][kRows * kPanel];
    for (int64_t row = 0; row < p.rows; row += 2 * kRows) {
        const int64_t upper = std::min(kRows, p.rows - row), lower = std::min(kRows, p.rows - row - upper);
        const uint8_t tile_rows[] = {
            uint8_t(upper), uint8_t(upper), uint8_t(lower), uint8_t(lower), uint8_t(upper), uint8_t(lower), 16, 16,
        };
        std::copy(std::begin(tile_rows), std::end(tile_rows), shape.rows);
        if (lower == 0) shape.row_bytes[2] = shape.row_bytes[3] = shape.row_bytes[5] = 0;
        asm volatile("ldtilecfg %0" ::"m"(shape));
        const uint8_t* x = p.x + row * p.inputs;
        for (int64_t panel = begin; panel < end; panel += 2) {
            const int64_t panels = std::min<int64_t>(2, end - panel), bytes = p.inputs * kPanel;
            // A panel that is not there is computed as the one before it.
            const int8_t *left = p.weight + panel * bytes, *right = left + (panels - 1) * bytes;
            asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1" ::);
            if (lower) asm volatile("tilezero %%tmm2\n\ttilezero %%tmm3" ::);
            for (int64_t i = 0; i < p.inputs; i += kInputs) {
                asm volatile(
                    "tileloadd (%0,%2,1), %%tmm4\n\t"
                    "tileloadd (%1,%4,1), %%tmm6\n\t"
                    "tileloadd (%3,%4,1), %%tmm7\n\t"
                    "tdpbusd %%tmm6, %%tmm4, %%tmm0\n\t"
                    "tdpbusd %%tmm7, %%tmm4, %%tmm1" ::"r"(x + i), "r"(left + i * kPanel), "r"(p.inputs),
                    "r"(right + i * kPanel), "r"(kInputs) : "memory");
                if (lower)
                    asm volatile(
                        "tileloadd (%0,%1,1), %%tmm5\n\t"
                        "tdpbusd %%tmm6, %%tmm5, %%tmm2\n\t"
                        "tdpbusd %%tmm7, %%tmm5, %%tmm3" ::"r"(x + kRows * p.inputs + i), "r"(p.inputs) : "memory");
            }
            asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(found[0]), "r"(kInputs) : "memory");
            asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(found[1]), "r"(kInputs) : "memory");
            if (lower) {
                asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(found[2]), "r"(kInputs) : "memory");
                asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(found[3]), "r"(kInputs) : "memory");
            }
            for (int64_t r = 0; r < upper + lower; ++r)
                for (int64_t n = 0; n < panels; ++n)
                    to_numbers(p, row + r, panel + n, found[r / kRows * 2 + n] + r % kRows * kPanel);
        }
    }
    asm volatile("tilerelease" ::);
}
#endif

// Panels [begin, end) of outputs.
inline void integer_linear(const IntegerLinear& p, int64_t begin, int64_t end) {
#if defined(FWP_AMX)
    if (p.rows >= 2 && p.inputs % 64 == 0 && has_amx()) return integer_tiles(p, begin, end);
#endif
    int64_t panel = begin;
    for (; panel + kIntegerPanels <= end; panel += kIntegerPanels) integer_rows<kIntegerPanels>(p, panel);
    for (; panel < end; ++panel) integer_rows<1>(p, panel);
}

// Each of `rows` rows of x as integers of kSteps steps of its largest number, and an offset of kSteps + 1: to `y`, whose
// rows are rounded up to fours.
inline void to_integers(const float* x, int64_t rows, int64_t inputs, uint8_t* y, float* steps) {
    const int64_t row_bytes = (inputs + 3) / 4 * 4;
    for (int64_t row = 0; row < rows; ++row, x += inputs, y += row_bytes) {
        Number largest = {};
        float most = 0;
        // What is not a number is larger than all numbers here.
        const auto larger = [](auto a, auto b) { return (a > b) | (a != a) ? a : b; };
        int64_t i = 0;
        for (; i + kNumbers <= inputs; i += kNumbers) {
            const Number number = numbers_at(x + i);
            largest = larger(number < 0 ? -number : number, largest);
        }
        for (; i < inputs; ++i) most = larger(std::abs(x[i]), most);
        for (int lane = 0; lane < kNumbers; ++lane) most = larger(largest[lane], most);
        float step = most / kSteps;
        if (step < std::numeric_limits<float>::min()) step = std::numeric_limits<float>::min();
        steps[row] = step;
        // Cut off, not rounded: with a half more it is the nearest.
        for (i = 0; i + kNumbers <= inputs; i += kNumbers) {
            const Whole counted = __builtin_convertvector(numbers_at(x + i) / step + (kSteps + 1.5f), Whole);
            *reinterpret_cast<LooseByte*>(y + i) = __builtin_convertvector(counted, Byte);
        }
        for (; i < inputs; ++i) y[i] = uint8_t(int32_t(x[i] / step + (kSteps + 1.5f)));
        for (; i < row_bytes; ++i) y[i] = 0;
    }
}

}  // namespace FWP_ISA
