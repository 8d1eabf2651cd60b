// x W^T + bias for few rows of x. Included like fast_weights_cpu_kernels.h, after it.
//
// W has to come from memory for every token, so a call is as fast as that when the multiply-adds keep up: every vector
// of W is loaded once and meets a group of rows, and four rows of W are read side by side: the more of them, the less each
// waits for memory. Further rows take their turns while these are in the first cache. The lanes of as many sums as a
// vector has are added up together, which otherwise takes as long as all multiply-adds.

namespace FWP_ISA {

// Sum i of the result: that of the lanes of sum[i]. Halves of two vectors are interleaved and added until one is left.
template <class T>
inline typename Simd<T>::type sums_of_lanes(typename Simd<T>::type (&sum)[Simd<T>::width]) {
    using Vector = typename Simd<T>::type;
    constexpr int width = Simd<T>::width;
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Index __attribute__((vector_size(FWP_VECTOR_BYTES)));
    Index low, high;
    for (int i = 0; i < width; ++i) low[i] = i / 2 + i % 2 * width, high[i] = low[i] + width / 2;
#pragma GCC unroll 4
    for (int n = width / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) {
            const Vector a = sum[i], b = sum[i + n];
#if defined(__clang__)
            Vector both;
            for (int lane = 0; lane < width; ++lane) {
                const Vector& of = lane % 2 ? b : a;
                both[lane] = of[lane / 2] + of[lane / 2 + width / 2];
            }
            sum[i] = both;
#else
            sum[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
        }
    return sum[0];
}

// y[r][o] for ROWS rows r and OUTPUTS outputs o: dot products of rows of x and of w.
// If it READS_AHEAD, the next rows of w come from memory meanwhile.
template <class T, int ROWS, int OUTPUTS, bool READS_AHEAD>
inline void dot_tile(int64_t inputs, const T* x, int64_t x_row, const T* w, int64_t w_row, const T* bias, T* y, int64_t y_row) {
    using Vector = typename Simd<T>::type;
    using Loose = typename Simd<T>::unaligned;
    constexpr int width = Simd<T>::width;
    constexpr int groups = (ROWS * OUTPUTS + width - 1) / width;
    Vector sum[groups][width] = {};
    int64_t i = 0;
    for (; i + width <= inputs; i += width) {
        Vector weight[OUTPUTS];
#pragma GCC unroll 4
        for (int o = 0; o < OUTPUTS; ++o) {
            weight[o] = *reinterpret_cast<const Loose*>(w + o * w_row + i);
            if (READS_AHEAD) __builtin_prefetch(w + (o + OUTPUTS) * w_row + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vector value = *reinterpret_cast<const Loose*>(x + r * x_row + i);
#pragma GCC unroll 4
            for (int o = 0; o < OUTPUTS; ++o) sum[(r * OUTPUTS + o) / width][(r * OUTPUTS + o) % width] += weight[o] * value;
        }
    }
    T total[groups * width];
#pragma GCC unroll 4
    for (int n = 0; n < groups; ++n) *reinterpret_cast<Loose*>(total + n * width) = sums_of_lanes<T>(sum[n]);
    for (int r = 0; r < ROWS; ++r)
        for (int o = 0; o < OUTPUTS; ++o) {
            T own = total[r * OUTPUTS + o] + (bias ? bias[o] : T(0));
            for (int64_t rest = i; rest < inputs; ++rest) own += w[o * w_row + rest] * x[r * x_row + rest];
            y[r * y_row + o] = own;
        }
}

// Of OUTPUTS outputs, all rows, dealt out evenly to tiles.
template <class T, int OUTPUTS>
inline void dot_rows(const Linear& p, int64_t output) {
    // With four outputs, as many sums as there are registers for.
    constexpr int kTileRows = FWP_VECTOR_BYTES == 64 ? 6 : 2;
    const T* x = static_cast<const T*>(p.x);
    const T* w = static_cast<const T*>(p.weight) + output * p.weight_row;
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + output : nullptr;
    T* y = static_cast<T*>(p.y) + output;
    for (int64_t r = 0, tiles = (p.rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t now = (p.rows - r + tiles - 1) / tiles;
        const auto tile = [&](auto rows) {
            if constexpr (rows.value <= kTileRows) {
                const auto turn = r == 0 ? dot_tile<T, rows.value, OUTPUTS, true> : dot_tile<T, rows.value, OUTPUTS, false>;
                turn(p.inputs, x + r * p.inputs, p.inputs, w, p.weight_row, bias, y + r * p.y_row, p.y_row);
            }
        };
        switch (now) {
        case 6: tile(std::integral_constant<int, 6>()); break;
        case 5: tile(std::integral_constant<int, 5>()); break;
        case 4: tile(std::integral_constant<int, 4>()); break;
        case 3: tile(std::integral_constant<int, 3>()); break;
        case 2: tile(std::integral_constant<int, 2>()); break;
        default: tile(std::integral_constant<int, 1>());
        }
        r += now;
    }
}

template <class T>
void linear(const Linear& p, int64_t begin, int64_t end) {
    int64_t output = begin;
    for (; output + 4 <= end; output += 4) dot_rows<T, 4>(p, output);
    for (; output < end; ++output) dot_rows<T, 1>(p, output);
}

}  // namespace FWP_ISA
