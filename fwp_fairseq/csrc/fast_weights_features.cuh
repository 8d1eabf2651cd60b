// Feature maps and the normalisation of keys and queries, by one block: ops/feature_maps.py, modules/key_features.py.
// Features stay in the type of accumulation.

#pragma once

#include "fast_weights_device.cuh"

namespace fwp::gpu {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarp;
constexpr int kScratch = 3 * kStepWarps;  // elements that block_sums() uses

// smallest_divisor() of ops/numerics.py: the root of the smallest normal number.
template <class T>
__device__ constexpr T smallest_divisor() {
    return std::is_same_v<T, double> ? T(1.4916681462400413e-154) : T(1.0842021724855044e-19);
}

// Where a is NaN, so is the result.
template <class T>
__device__ __forceinline__ T larger(T a, T b) { return b > a ? b : a; }

template <class T>
__device__ __forceinline__ T smaller(T a, T b) { return b < a ? b : a; }

// A number over all threads of a block, COUNT times, in all of them. Has a barrier within; before `scratch` is used
// again there must be another one.
template <int COUNT, class T>
__device__ __forceinline__ void block_sums(T (&x)[COUNT], T* scratch) {
    static_assert(COUNT <= 3);
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        x[i] = sum_over_lanes<kWarp>(x[i]);
        if (threadIdx.x % kWarp == 0) scratch[i * kStepWarps + warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        x[i] = 0;
#pragma unroll 1
        for (int w = 0; w < kStepWarps; ++w) x[i] += scratch[i * kStepWarps + w];
    }
}

// The same of the largest; ends with a barrier, so that sums can follow.
template <int COUNT, class T>
__device__ __forceinline__ void block_maxima(T (&x)[COUNT], T* scratch) {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int distance = kWarp / 2; distance; distance /= 2)
            x[i] = larger(x[i], __shfl_xor_sync(kAllLanes, x[i], distance));
        if (threadIdx.x % kWarp == 0) scratch[i * kStepWarps + warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll 1
        for (int w = 0; w < kStepWarps; ++w) x[i] = larger(x[i], scratch[i * kStepWarps + w]);
    __syncthreads();
}

// Features (VECTORS, dk) of projected vectors `x` (VECTORS, d_key), both in shared memory. Begins and ends with a
// barrier.
template <int VECTORS, class T>
__device__ void make_features(const Features& f, const T* x, T* out, T* scratch) {
    const int thread = threadIdx.x, d_key = int(f.d_key), dk = int(f.dk);
    const auto each = [&](const auto& change) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v)
#pragma unroll 1
            for (int i = thread; i < dk; i += kStepThreads) change(v, i, out[v * dk + i]);
    };
    __syncthreads();
    if (f.map == FeatureMap::dpfp) {
        // u = relu([x; -x]); block j of the features is u times u rolled by j.
        each([&](int v, int i, T& to) {
            const T* from = x + v * d_key;
            const auto u = [&](int at) { return larger(at < d_key ? from[at] : -from[at - d_key], T(0)); };
            const int shift = i / (2 * d_key) + 1, at = i % (2 * d_key);
            to = u(at) * u(at < shift ? at - shift + 2 * d_key : at - shift);
        });
    } else if (f.map == FeatureMap::favor) {
        // R x by warps, a row of R each, which both vectors share.
        const int m = dk / 2, lane = thread % kWarp;
        T most[VECTORS] = {}, squares[VECTORS] = {};
#pragma unroll 1
        for (int j = thread / kWarp; j < m; j += kStepWarps) {
            const T* row = static_cast<const T*>(f.projection) + int64_t(j) * d_key;
            T projected[VECTORS] = {};
#pragma unroll 1
            for (int i = lane; i < d_key; i += kWarp) {
                const T factor = row[i];
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) projected[v] += factor * x[v * d_key + i];
            }
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                projected[v] = sum_over_lanes<kWarp>(projected[v]);
                most[v] = larger(most[v], larger(projected[v], -projected[v]));
                if (lane == 0) out[v * dk + j] = projected[v], out[v * dk + m + j] = -projected[v];
            }
        }
        if (f.normalization != KeyNormalization::none) {
            // softmax([R x; -R x]), as far as its sum: exp(-|x|^2 / 2) cancels.
            block_maxima(most, scratch);
            each([&](int v, int, T& to) { to = exp(to - most[v]); });
        } else {
#pragma unroll
            for (int v = 0; v < VECTORS; ++v)
#pragma unroll 1
                for (int i = thread; i < d_key; i += kStepThreads) squares[v] += x[v * d_key + i] * x[v * d_key + i];
            block_sums(squares, scratch);
            const T root = sqrt(T(dk));
            each([&](int v, int, T& to) { to = exp(smaller(to - squares[v] / 2, T(40))) / root; });
        }
    } else {
        each([&](int v, int i, T& to) {
            const T value = x[v * d_key + i];
            to = f.map == FeatureMap::elu    ? larger(value, T(0)) + exp(smaller(value, T(0)))
                 : f.map == FeatureMap::tanh ? tanh(value)
                                             : value;
        });
    }
    if (f.normalization != KeyNormalization::none) {
        // Threads go over the same elements each time: no barrier but those of the sums.
        const bool squared = f.normalization == KeyNormalization::l2;
        const T least = smallest_divisor<T>();
        if (squared) {
            // Squares of small features would be below the floor.
            T most[VECTORS] = {};
            each([&](int v, int, T& value) { most[v] = larger(most[v], larger(value, -value)); });
            block_maxima(most, scratch);
            each([&](int v, int, T& value) { value /= larger(most[v], least); });
        }
        T sums[VECTORS] = {};
        each([&](int v, int, T& value) { sums[v] += squared ? value * value : value; });
        block_sums(sums, scratch);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) sums[v] = squared ? sqrt(larger(sums[v], T(1))) : larger(sums[v], least);
        each([&](int v, int, T& value) { value /= sums[v]; });
    }
    __syncthreads();
}

}  // namespace fwp::gpu
