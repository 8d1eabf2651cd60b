// What the kernels for a GPU share: numbers in and out of tensors, and small products out of shared memory.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "fast_weights.h"

// A block's shared memory, of the size that its launch asks for.
#ifndef FWP_DYNAMIC_SHARED
#define FWP_DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#endif

namespace fwp::gpu {

// The largest Dk that kernels have room for. Accumulation in double is for tests of gradients.
template <class T>
constexpr int64_t kLargest = std::is_same_v<T, double> ? 256 : 512;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- Numbers ---------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T widen(float x) { return T(x); }
template <class T>
__device__ __forceinline__ T widen(double x) { return T(x); }
template <class T>
__device__ __forceinline__ T widen(__half x) { return T(__half2float(x)); }
template <class T>
__device__ __forceinline__ T widen(__nv_bfloat16 x) { return T(__bfloat162float(x)); }

template <class T>
__device__ __forceinline__ void narrow(T x, float* to) { *to = float(x); }
template <class T>
__device__ __forceinline__ void narrow(T x, double* to) { *to = double(x); }
template <class T>
__device__ __forceinline__ void narrow(T x, __half* to) { *to = __float2half_rn(float(x)); }
template <class T>
__device__ __forceinline__ void narrow(T x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(float(x)); }

// Calls body(elements), typed. Types are told apart here and not by instantiations of the kernels: a branch that all
// threads take alike, for each row that is loaded, costs little beside the 2 N multiplications of a loaded element.
// Accumulation in double is for tensors of double only.
template <class T, class Body>
__device__ __forceinline__ void typed(const Sequence& x, const Body& body) {
    if constexpr (std::is_same_v<T, double>) {
        body(static_cast<double*>(x.data));
    } else {
        switch (x.type) {
        case Type::float16: body(static_cast<__half*>(x.data)); break;
        case Type::bfloat16: body(static_cast<__nv_bfloat16*>(x.data)); break;
        default: body(static_cast<float*>(x.data));
        }
    }
}

template <class T>
__device__ __forceinline__ T load(const Sequence& x, int64_t at) {
    T value{};
    typed<T>(x, [&](const auto* data) { value = widen<T>(data[at]); });
    return value;
}

template <class T>
__device__ __forceinline__ void store(const Sequence& x, int64_t at, T value) {
    typed<T>(x, [&](auto* data) { narrow(value, data + at); });
}

// Where a sequence of batch entry b and head h begins, in its part of a gradient.
__device__ __forceinline__ int64_t start_of(const Sequence& x, int64_t b, int64_t h, int64_t part = 0) {
    return b * x.batch + h * x.head + part * x.block;
}

// --- Products of tiles in shared memory ------------------------------------------------------------------------------

// Adjacent elements, moved by one instruction as far as there is one: 16 bytes.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT < 16 ? sizeof(T) * COUNT : 16) Pack {
    T at[COUNT];
};

template <int COUNT, class T>
__device__ __forceinline__ Pack<T, COUNT> pack(const T* from) { return *reinterpret_cast<const Pack<T, COUNT>*>(from); }

// Every thread has its own part c of a product, ROWS x COLUMNS, and adds to it what the depth of the tiles gives.
// Row lengths and offsets are multiples of 4 where four elements are read at once.

// c += a b: a (ROWS, DEPTH), b (DEPTH, COLUMNS).
template <int DEPTH, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply(const T* a, int a_row, const T* b, int b_row, T (&c)[ROWS][COLUMNS]) {
#pragma unroll 2
    for (int depth = 0; depth < DEPTH; depth += 4) {
        Pack<T, 4> factors[ROWS];
#pragma unroll
        for (int m = 0; m < ROWS; ++m) factors[m] = pack<4>(a + m * a_row + depth);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Pack<T, COLUMNS> row = pack<COLUMNS>(b + (depth + i) * b_row);
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
#pragma unroll
                for (int n = 0; n < COLUMNS; ++n) c[m][n] += factors[m].at[i] * row.at[n];
        }
    }
}

// c += a b^T: a (ROWS, DEPTH), b (COLUMNS, DEPTH).
template <int DEPTH, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply_by_transposed(
    const T* a, int a_row, const T* b, int b_row, T (&c)[ROWS][COLUMNS]) {
#pragma unroll 2
    for (int depth = 0; depth < DEPTH; depth += 4) {
        Pack<T, 4> left[ROWS], right[COLUMNS];
#pragma unroll
        for (int m = 0; m < ROWS; ++m) left[m] = pack<4>(a + m * a_row + depth);
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) right[n] = pack<4>(b + n * b_row + depth);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int m = 0; m < ROWS; ++m)
#pragma unroll
                for (int n = 0; n < COLUMNS; ++n) c[m][n] += left[m].at[i] * right[n].at[i];
    }
}

// c += a^T diag(scale) b: a (DEPTH, ROWS), b (DEPTH, COLUMNS); scale null: 1.
template <int DEPTH, class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply_transposed(
    const T* a, int a_row, const T* b, int b_row, T (&c)[ROWS][COLUMNS], const T* scale = nullptr) {
#pragma unroll 4
    for (int depth = 0; depth < DEPTH; ++depth) {
        const Pack<T, ROWS> left = pack<ROWS>(a + depth * a_row);
        Pack<T, COLUMNS> right = pack<COLUMNS>(b + depth * b_row);
        if (scale)
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) right.at[n] *= scale[depth];
#pragma unroll
        for (int m = 0; m < ROWS; ++m)
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n) c[m][n] += left.at[m] * right.at[n];
    }
}

// The sum over LANES neighbouring lanes, in all of them.
template <int LANES, class T>
__device__ __forceinline__ T sum_over_lanes(T x) {
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

}  // namespace fwp::gpu
