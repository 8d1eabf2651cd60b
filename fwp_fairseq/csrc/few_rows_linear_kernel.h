// x W^T + bias for few rows of x. Included like fast_weights_cpu_kernels.h, after it.
//
// W has to come from memory for every token, so a call is as fast as that when the multiply-adds keep up: every vector
// of W is loaded once and meets a group of rows, two rows of W at a time. 5 rows need 10 accumulators, 2 vectors of W
// and 1 of x: 13 of AVX2's 16 registers. More rows take their turns while the two rows of W are in the first cache. For
// one or two rows four rows of W are read side by side: the more of them, the less each waits for memory.

namespace FWP_ISA {

// y[r][o] for ROWS rows r and OUTPUTS outputs o: dot products of rows of x and of w.
template <class T, int ROWS, int OUTPUTS>
inline void dot_tile(int64_t inputs, const T* x, int64_t x_row, const T* w, int64_t w_row, const T* bias, T* y, int64_t y_row) {
    using Vector = typename Simd<T>::type;
    using Loose = typename Simd<T>::unaligned;
    constexpr int width = Simd<T>::width;
    Vector sum[OUTPUTS][ROWS] = {};
    int64_t i = 0;
    for (; i + width <= inputs; i += width) {
        Vector weight[OUTPUTS];
#pragma GCC unroll 4
        for (int o = 0; o < OUTPUTS; ++o) {
            weight[o] = *reinterpret_cast<const Loose*>(w + o * w_row + i);
            __builtin_prefetch(w + (o + OUTPUTS) * w_row + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vector value = *reinterpret_cast<const Loose*>(x + r * x_row + i);
#pragma GCC unroll 4
            for (int o = 0; o < OUTPUTS; ++o) sum[o][r] += weight[o] * value;
        }
    }
    for (int o = 0; o < OUTPUTS; ++o)
        for (int r = 0; r < ROWS; ++r) {
            T lanes[width];
            *reinterpret_cast<Loose*>(lanes) = sum[o][r];
#pragma GCC unroll 5
            for (int half = width / 2; half > 0; half /= 2)
#pragma GCC unroll 8
                for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
            T total = lanes[0] + (bias ? bias[o] : T(0));
            for (int64_t rest = i; rest < inputs; ++rest) total += w[o * w_row + rest] * x[r * x_row + rest];
            y[r * y_row + o] = total;
        }
}

template <class T, int OUTPUTS>
inline void dot_rows(const Linear& p, int64_t output) {
    constexpr int64_t kTileRows = 5;
    const T* x = static_cast<const T*>(p.x);
    const T* w = static_cast<const T*>(p.weight) + output * p.weight_row;
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + output : nullptr;
    T* y = static_cast<T*>(p.y) + output;
    for (int64_t r = 0, tiles = (p.rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t now = (p.rows - r + tiles - 1) / tiles;
        const auto tile = [&](auto rows) {
            dot_tile<T, rows.value, OUTPUTS>(
                p.inputs, x + r * p.inputs, p.inputs, w, p.weight_row, bias, y + r * p.y_row, p.y_row);
        };
        switch (now) {
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
    if (p.rows <= 2)
        for (; output + 4 <= end; output += 4) dot_rows<T, 4>(p, output);
    for (; output + 2 <= end; output += 2) dot_rows<T, 2>(p, output);
    if (output < end) dot_rows<T, 1>(p, output);
}

}  // namespace FWP_ISA
