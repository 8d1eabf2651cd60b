// The recurrence of fast weights on a GPU, forward and backward. The mathematics, with its names, is at the top of
// fast_weights_cpu_kernels.h; here a chunk is one block's work, and systems with the unit triangular matrix
// I + diag(erase) A are solved by substitution, one value column to a thread, instead of inverting it.
//
// One block takes one sequence (batch entry and head) and a tile of N value columns, which do not depend on the others,
// through all chunks. It keeps in shared memory
//     memory     W of the tile, or dW in the backward pass           Dk x N
//     slab       [Q; K] of the chunk, for kSlab features at a time   32 x 32
//     u          U                                                   16 x N
//     pairs      S and A; in the backward pass then the masked dots  32 x 16
//     remaining  P, and gates
// and in the backward pass dO with dR (32 x N), the slab's rows of W0 (32 x N) and dP. Everything that has Dk in it is
// a sum over slabs or is done slab by slab, so that only `memory` grows with Dk: N of 64, 32 and 16 hold Dk of 128, 256
// and 480 in 48 KB (backward: N = 32 and 16 hold 160 and 384); up to Dk = 512 it is 58 KB, for which a launch asks.
//
// Work for each token and tile, multiply and add counted apart: forward 6 Dk N, beside 4 * 16 Dk of overlaps, which
// every tile computes again, so that a wide tile has the least to do; narrow tiles are for filling the device. From
// global memory come 2 Dk (keys twice where Dk > 32, the second time from a cache) + 2 N numbers for each token and
// tile: 6 Dk N / (8 Dk + 8 N) FLOPs for each byte of float32, 24 for Dk = N = 64. Shared memory has to give much more:
// what a thread reads there at once, up to four numbers, is multiplied 2 to 4 times each.
//
// Backward: memories at every kSegment-th token are kept from the forward pass. A block computes those at the chunks of
// one segment again, in `memory`, and leaves them, U and R in its part of the workspace, where dW waits meanwhile.
// Writes are never undone. Gradients of q, k and gates have a share from every tile; each tile writes a part of its own. So
// every sum has one order, and the same input gives the same bits.

#pragma once

#include "fast_weights_cuda.h"
#include "fast_weights_device.cuh"
#include "fast_weights_launch.cuh"

namespace fwp::gpu {

constexpr int kThreads = 128;
constexpr int kGroups = 16;                // threads side by side over value columns, and over features of a slab
constexpr int kRows = kThreads / kGroups;  // threads over tokens, 2 for each, and over the rows of a slab, 4 for each
constexpr int kSlab = 4 * kRows;           // features of a slab
constexpr int kPairs = 2;                  // pairs (t, s) of tokens for each thread: s and s + 8
constexpr int kSlabRow = kSlab + 4;        // row lengths in shared memory: with 4 more neighbouring rows begin in other
constexpr int kPairsRow = kChunk + 4;      // banks
constexpr int kSegmentChunks = kSegment / kChunk;
static_assert(2 * kRows == kChunk && kThreads * kPairs == kChunk * kChunk && 2 * kGroups == kSlab);

template <class T, int N>
struct Scan {
    static constexpr int kColumns = N / kGroups;                // adjacent value columns of a thread
    static constexpr int kRow = N + (sizeof(T) == 4 ? 4 : 0);  // of double, which is for tests, less would fit
    using Tile = T[2][kColumns];                                // of a thread: its two tokens and its columns

    const Problem& p;
    int64_t stream, b, h, tile;
    int thread, group, row;  // row: tokens 2 row and 2 row + 1, or features 4 row to 4 row + 3 of a slab
    int column, columns;     // the first value column, and how many there are
    int slabs;
    bool queries, erases, decays;
    int64_t first;  // token of the chunk
    int count;      // tokens that it has; of what lies beyond keys, queries, values and write are 0, decay is 1

    T *memory, *slab, *u, *pairs, *remaining, *write, *erase, *from_start;
    T *grads, *before, *dp, *partial;  // backward only

    static __host__ __device__ int64_t padded(int64_t dk) { return (dk + kSlab - 1) / kSlab * kSlab; }

    static int64_t shared_bytes(int64_t dk, bool backward) {
        int64_t elements = padded(dk) * kRow + 2 * kChunk * kSlabRow + kChunk * kRow + 3 * kChunk * kPairsRow;
        elements += 3 * kChunk;
        if (backward) elements += 2 * kChunk * kRow + kSlab * kRow + kChunk * kPairsRow + kThreads / kWarp;
        return elements * sizeof(T);
    }

    // Of one block, in elements: memories, U and R for each chunk of a segment, and dW.
    static __host__ __device__ int64_t workspace(int64_t dk) {
        return (kSegmentChunks + 1) * dk * N + 2 * kSegmentChunks * kChunk * N;
    }

    __device__ __forceinline__ Scan(const Problem& problem, T* shared, bool backward) : p(problem) {
        stream = blockIdx.x / p.blocks, tile = blockIdx.x % p.blocks;
        b = stream / p.heads, h = stream % p.heads;
        thread = threadIdx.x, group = thread % kGroups, row = thread / kGroups;
        column = int(tile * N), columns = int(p.dv - column < N ? p.dv - column : N);
        slabs = int(padded(p.dk) / kSlab);
        queries = p.q.data, erases = p.erase.data, decays = p.decay.data;
        const auto take = [&](int64_t elements) {
            T* taken = shared;
            shared += elements;
            return taken;
        };
        memory = take(padded(p.dk) * kRow);
        slab = take(2 * kChunk * kSlabRow);
        u = take(kChunk * kRow);
        pairs = take(2 * kChunk * kPairsRow);
        remaining = take(kChunk * kPairsRow);
        write = take(kChunk), erase = take(kChunk), from_start = take(kChunk);
        if (!backward) return;
        grads = take(2 * kChunk * kRow);
        before = take(kSlab * kRow);
        dp = take(kChunk * kPairsRow);
        partial = take(kThreads / kWarp);
    }

    // --- In and out --------------------------------------------------------------------------------------------------

    // Memories of tensors, rows of Dv, and of the workspace, rows of N.
    __device__ void load_memory(const T* from, int64_t from_row, int columns) {
        for (int at = thread; at < slabs * kSlab * N; at += kThreads) {
            const int i = at / N, j = at % N;
            memory[i * kRow + j] = from && i < p.dk && j < columns ? from[i * from_row + j] : T(0);
        }
    }

    __device__ void store_memory(T* to, int64_t to_row, int columns) const {
        for (int at = thread; at < p.dk * N; at += kThreads) {
            const int i = at / N, j = at % N;
            if (j < columns) to[i * to_row + j] = memory[i * kRow + j];
        }
    }

    // Of this sequence and tile, in a tensor with `each` memories for each sequence.
    __device__ int64_t memory_at(int64_t each = 1, int64_t index = 0) const {
        return (stream * each + index) * p.dk * p.dv + column;
    }

    // Tokens of the chunk, features of a slab, into rows of `slab`.
    __device__ __forceinline__ void load_rows(const Sequence& x, int feature, T* to) {
        const int i = thread % kSlab;
        const bool there = feature + i < p.dk;
        const int64_t at = start_of(x, b, h) + feature + i;
        typed<T>(x, [&](const auto* data) {
#pragma unroll
            for (int t = thread / kSlab; t < kChunk; t += kThreads / kSlab)
                to[t * kSlabRow + i] = there && t < count ? widen<T>(data[at + (first + t) * x.row]) : T(0);
        });
    }

    __device__ __forceinline__ void load_slab(int feature, bool with_queries) {
        if (with_queries) load_rows(p.q, feature, slab);
        load_rows(p.k, feature, slab + kChunk * kSlabRow);
    }

    // This thread's tokens and value columns.
    __device__ __forceinline__ void load_values(const Sequence& x, Tile& to) const {
        const int64_t at = start_of(x, b, h) + column + kColumns * group;
        typed<T>(x, [&](const auto* data) {
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    const int t = 2 * row + m;
                    const bool there = t < count && kColumns * group + n < columns;
                    to[m][n] = there ? widen<T>(data[at + (first + t) * x.row + n]) : T(0);
                }
        });
    }

    __device__ __forceinline__ void store_values(const Tile& from, const Sequence& x) const {
        const int64_t at = start_of(x, b, h) + column + kColumns * group;
        typed<T>(x, [&](auto* data) {
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    const int t = 2 * row + m;
                    if (t < count && kColumns * group + n < columns)
                        narrow(from[m][n], data + at + (first + t) * x.row + n);
                }
        });
    }

    // The same elements in shared memory (rows of kRow), or in the workspace (rows of N).
    __device__ __forceinline__ void get(const T* from, int from_row, Tile& to) const {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kColumns; ++n) to[m][n] = from[(2 * row + m) * from_row + kColumns * group + n];
    }

    __device__ __forceinline__ void put(const Tile& from, T* to, int to_row) const {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kColumns; ++n) to[(2 * row + m) * to_row + kColumns * group + n] = from[m][n];
    }

    // --- The parts of a chunk ----------------------------------------------------------------------------------------

    // Turn to the chunk at a token: its gates, g and P, by the first warp. Others see them after the next barrier.
    __device__ void start(int64_t token) {
        first = token;
        count = int(p.length - token < kChunk ? p.length - token : kChunk);
        if (thread >= kWarp) return;
        if (thread < kChunk) {
            const int64_t t = first + thread;
            const bool there = thread < count;
            const auto gate = [&](const Sequence& x, T otherwise) {
                return x.data ? load<T>(x, start_of(x, b, h) + t * x.row) : otherwise;
            };
            write[thread] = there ? gate(p.write, T(1)) : T(0);
            erase[thread] = there ? gate(p.erase, T(0)) : T(0);
            from_start[thread] = there ? gate(p.decay, T(1)) : T(1);  // the token's decay, for now
        }
        __syncwarp();
        T products[kChunk], product = 1;
        const int s = thread % kChunk;
#pragma unroll
        for (int t = 0; t < kChunk; ++t) {
            const T decay = from_start[t];
            product = thread == kChunk ? product * decay : t < s ? T(0) : t == s ? T(1) : product * decay;
            products[t] = product;
        }
        __syncwarp();
        if (thread <= kChunk) {
            T* to = thread == kChunk ? from_start : remaining + s;
            const int stride = thread == kChunk ? 1 : kPairsRow;
#pragma unroll
            for (int t = 0; t < kChunk; ++t) to[t * stride] = products[t];
        }
    }

    // p_s = P[n, s]: the share of write s that is left at the end of the chunk.
    __device__ T to_end(int s) const { return remaining[(kChunk - 1) * kPairsRow + s]; }

    // This thread's pairs of tokens are (t, s) and (t, s + 8), of queries with keys and of keys with keys.
    __device__ int pair_t() const { return thread / 8; }
    __device__ int pair_s(int i) const { return thread % 8 + 8 * i; }

    __device__ __forceinline__ void add_overlaps(
        bool of_queries, bool of_keys, T (&qk)[1][kPairs], T (&kk)[1][kPairs]) {
        const T *keys = slab + kChunk * kSlabRow, *right = keys + pair_s(0) * kSlabRow;
        if (of_queries) multiply_by_transposed<kSlab>(slab + pair_t() * kSlabRow, kSlabRow, right, 8 * kSlabRow, qk);
        if (of_keys) multiply_by_transposed<kSlab>(keys + pair_t() * kSlabRow, kSlabRow, right, 8 * kSlabRow, kk);
    }

    // S and A.
    __device__ __forceinline__ void put_overlaps(const T (&qk)[1][kPairs], const T (&kk)[1][kPairs]) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int t = pair_t(), s = pair_s(i);
            const T left = remaining[t * kPairsRow + s];  // 0 for s > t
            pairs[t * kPairsRow + s] = left * qk[0][i];
            pairs[(kChunk + t) * kPairsRow + s] = s < t ? left * kk[0][i] : T(0);
        }
    }

    // U, in `u`, from the memory before the chunk; with queries what they read of that memory is left in `read`, with
    // `retrieved` R is. Begins and ends with a barrier.
    __device__ __forceinline__ void write_chunk(bool with_queries, Tile& read, Tile* retrieved) {
        T qk[1][kPairs] = {}, kk[1][kPairs] = {};
        Tile value, old = {};
        load_values(p.v, value);  // early: it is waited for after the products
        for (int i = 0; i < slabs; ++i) {
            __syncthreads();
            load_slab(i * kSlab, with_queries);
            __syncthreads();
            const T *rows = slab + 2 * row * kSlabRow, *w = memory + i * kSlab * kRow + kColumns * group;
            if (with_queries) multiply<kSlab>(rows, kSlabRow, w, kRow, read);
            if (erases) multiply<kSlab>(rows + kChunk * kSlabRow, kSlabRow, w, kRow, old);
            add_overlaps(with_queries, erases, qk, kk);
        }
        put_overlaps(qk, kk);
        Tile wanted;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const int t = 2 * row + m;
                read[m][n] *= from_start[t];
                old[m][n] *= from_start[t];
                wanted[m][n] = write[t] * value[m][n] - erase[t] * old[m][n];
            }
        put(wanted, u, kRow);
        __syncthreads();
        if (!erases) return;
        solve();
        __syncthreads();
        if (!retrieved) return;
        multiply<kChunk>(
            pairs + (kChunk + 2 * row) * kPairsRow, kPairsRow, u + kColumns * group, kRow, old);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kColumns; ++n) (*retrieved)[m][n] = old[m][n];
    }

    // (I + diag(erase) A) U = wanted, in place, from the first token to the last.
    __device__ __forceinline__ void solve() {
        if (thread >= N) return;
        T x[kChunk];
#pragma unroll
        for (int t = 0; t < kChunk; ++t) {
            T sum = 0;
#pragma unroll
            for (int s = 0; s < t; ++s) sum += pairs[(kChunk + t) * kPairsRow + s] * x[s];
            x[t] = u[t * kRow + thread] - erase[t] * sum;
        }
        // Not on the way: `pairs` could not be loaded ahead of stores that may change it.
#pragma unroll
        for (int t = 0; t < kChunk; ++t) u[t * kRow + thread] = x[t];
    }

    // (I + diag(erase) A)^T G = dU, in place, from the last token to the first.
    __device__ __forceinline__ void solve_transposed(T* du) {
        if (thread >= N) return;
        T x[kChunk];
#pragma unroll
        for (int t = 0; t < kChunk; ++t) x[t] = du[t * kRow + thread];
#pragma unroll
        for (int t = kChunk - 1; t >= 0; --t) {
            const T known = erase[t] * x[t];
#pragma unroll
            for (int s = 0; s < t; ++s) x[s] -= pairs[(kChunk + t) * kPairsRow + s] * known;
        }
#pragma unroll
        for (int t = 0; t < kChunk; ++t) du[t * kRow + thread] = x[t];
    }

    // W1 = g_n W0 + K^T diag(p) U. Changes `u` to diag(p) U. To begin with, all threads must be done with U.
    __device__ __forceinline__ void advance_memory() {
        if (decays) {
            Tile kept;
            get(u, kRow, kept);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) kept[m][n] *= to_end(2 * row + m);
            put(kept, u, kRow);
            __syncthreads();
        }
        const T scale = from_start[kChunk - 1];
        for (int i = 0; i < slabs; ++i) {
            if (slabs > 1) {
                __syncthreads();
                load_slab(i * kSlab, false);
                __syncthreads();
            }
            T w[4][kColumns];
            T* at = memory + (i * kSlab + 4 * row) * kRow + kColumns * group;
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) w[m][n] = scale * at[m * kRow + n];
            multiply_transposed<kChunk>(
                slab + kChunk * kSlabRow + 4 * row, kSlabRow, u + kColumns * group, kRow, w);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) at[m * kRow + n] = w[m][n];
        }
    }

    // --- Forward -----------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void forward() {
        const T* initial = static_cast<const T*>(p.initial_state);
        load_memory(initial ? initial + memory_at() : nullptr, p.dv, columns);
        for (int64_t token = 0; token < p.length; token += kChunk) {
            __syncthreads();
            if (p.borders && token && token % kSegment == 0)
                store_memory(
                    static_cast<T*>(p.borders) + memory_at(p.segments - 1, token / kSegment - 1), p.dv, columns);
            start(token);
            Tile read = {};
            write_chunk(queries, read, nullptr);
            if (queries) {
                multiply<kChunk>(pairs + 2 * row * kPairsRow, kPairsRow, u + kColumns * group, kRow, read);
                store_values(read, p.out);
                __syncthreads();
            }
            advance_memory();
        }
        __syncthreads();
        store_memory(static_cast<T*>(p.final_state) + memory_at(), p.dv, columns);
    }

    // --- Backward ----------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void backward(T* workspace) {
        T* memories = workspace + blockIdx.x * Scan::workspace(p.dk);
        T* us = memories + kSegmentChunks * p.dk * N;
        T* retrieveds = us + kSegmentChunks * kChunk * N;
        T* waiting = retrieveds + kSegmentChunks * kChunk * N;
        const T* last = static_cast<const T*>(p.grad_final_state);
        load_memory(last ? last + memory_at() : nullptr, p.dv, columns);
        for (int64_t segment = p.segments - 1; segment >= 0; --segment) {
            const int64_t begin = segment * kSegment;
            const int64_t end = begin + kSegment < p.length ? begin + kSegment : p.length;
            __syncthreads();
            // Each thread puts away, replaces and gets back the same elements of `memory`.
            store_memory(waiting, N, N);
            recompute(segment, begin, end, memories, us, retrieveds);
            load_memory(waiting, N, N);
            for (int64_t token = (end - 1) / kChunk * kChunk; token >= begin; token -= kChunk) {
                const int64_t index = (token - begin) / kChunk;
                __syncthreads();
                chunk_backward(
                    token, memories + index * p.dk * N, us + index * kChunk * N, retrieveds + index * kChunk * N);
            }
        }
        __syncthreads();
        if (p.grad_initial_state) store_memory(static_cast<T*>(p.grad_initial_state) + memory_at(), p.dv, columns);
    }

    // Memories before the chunks of a segment, U and R. Ends with a barrier.
    __device__ __forceinline__ void recompute(
        int64_t segment, int64_t begin, int64_t end, T* memories, T* us, T* retrieveds) {
        const T* from = segment ? static_cast<const T*>(p.borders) : static_cast<const T*>(p.initial_state);
        if (from) from += segment ? memory_at(p.segments - 1, segment - 1) : memory_at();
        load_memory(from, p.dv, columns);
        for (int64_t token = begin; token < end; token += kChunk) {
            const int64_t index = (token - begin) / kChunk;
            __syncthreads();
            store_memory(memories + index * p.dk * N, N, N);
            start(token);
            Tile unused = {}, kept = {};
            write_chunk(false, unused, &kept);
            put(kept, retrieveds + index * kChunk * N, N);
            get(u, kRow, kept);
            put(kept, us + index * kChunk * N, N);
            __syncthreads();
            if (token + kChunk < end) advance_memory();
        }
    }

    // From dW1, in `memory`, to dW0, and the gradients of the chunk on the way.
    __device__ __forceinline__ void chunk_backward(
        int64_t token, const T* memory_before, const T* written, const T* retrieved) {
        T* dr = grads + kChunk * kRow;  // dU and G on the way to dR
        start(token);

        // S and A again, dU
        T qk[1][kPairs] = {}, kk[1][kPairs] = {};
        Tile value, du = {}, tile_of = {};
        load_values(p.v, value);
        if (queries) load_values(p.grad_out, tile_of);
        put(tile_of, grads, kRow);
        get(written, N, tile_of);
        put(tile_of, u, kRow);
        for (int i = 0; i < slabs; ++i) {
            __syncthreads();
            load_slab(i * kSlab, queries);
            __syncthreads();
            add_overlaps(queries, erases, qk, kk);
            multiply<kSlab>(
                slab + (kChunk + 2 * row) * kSlabRow, kSlabRow, memory + i * kSlab * kRow + kColumns * group, kRow, du);
        }
        put_overlaps(qk, kk);
        __syncthreads();
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kColumns; ++n) du[m][n] *= to_end(2 * row + m);
        if (queries) multiply_transposed<kChunk>(pairs + 2 * row, kPairsRow, grads + kColumns * group, kRow, du);

        // G, dV, dwrite, derase, dR
        if (erases) {
            put(du, dr, kRow);
            __syncthreads();
            solve_transposed(dr);
            __syncthreads();
            get(dr, kRow, du);
        }
        if (erases) get(retrieved, N, tile_of);
        T of_write[2] = {}, of_erase[2] = {};
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const T g = du[m][n];
                of_write[m] += g * value[m][n];
                of_erase[m] -= g * tile_of[m][n];
                du[m][n] = write[2 * row + m] * g;
                tile_of[m][n] = -erase[2 * row + m] * g;
            }
        put(tile_of, dr, kRow);
        store_values(du, p.grad_v);
        put_gate(p.grad_write, of_write);
        put_gate(p.grad_erase, of_erase);
        __syncthreads();

        // dO U^T and dR U^T, in dP as they are and in `pairs` masked, that of keys with its transpose
        T of_queries[1][kPairs] = {}, of_keys[1][kPairs] = {};
        {
            const T *left = grads + pair_t() * kRow, *right = u + pair_s(0) * kRow;
            if (queries) multiply_by_transposed<N>(left, kRow, right, 8 * kRow, of_queries);
            if (erases) multiply_by_transposed<N>(left + kChunk * kRow, kRow, right, 8 * kRow, of_keys);
        }
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const int t = pair_t(), s = pair_s(i);
            const T left = remaining[t * kPairsRow + s];
            dp[t * kPairsRow + s + 1] =
                (s <= t ? of_queries[0][i] * qk[0][i] : T(0)) + (s < t ? of_keys[0][i] * kk[0][i] : T(0));
            pairs[t * kPairsRow + s] = left * of_queries[0][i];
            T* symmetric = pairs + kChunk * kPairsRow;
            const T key = left * of_keys[0][i];
            if (s < t) symmetric[t * kPairsRow + s] = symmetric[s * kPairsRow + t] = key;
            if (s == t) symmetric[t * kPairsRow + s] = 0;
        }

        // dQ, dK, dW0; what was written above is read after the first barrier in here
        const T scale = from_start[kChunk - 1];
        T of_start[2] = {}, of_end[2] = {}, of_memory = 0;
        for (int i = 0; i < slabs; ++i) {
            if (i) __syncthreads();
            if (slabs > 1) load_slab(i * kSlab, queries);
            for (int at = thread; at < kSlab * N; at += kThreads) {
                const int feature = i * kSlab + at / N;
                before[at / N * kRow + at % N] = feature < p.dk ? memory_before[int64_t(feature) * N + at % N] : T(0);
            }
            __syncthreads();
            keys_and_queries_backward(i * kSlab, of_start, of_end);
            __syncthreads();
            T w[4][kColumns];
            T* at = memory + (i * kSlab + 4 * row) * kRow + kColumns * group;
            const T* old = before + 4 * row * kRow + kColumns * group;
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    w[m][n] = at[m * kRow + n];
                    of_memory += w[m][n] * old[m * kRow + n];
                    w[m][n] *= scale;
                }
            const T *keys = slab + kChunk * kSlabRow, *g = decays ? from_start : nullptr;
            if (queries)
                multiply_transposed<kChunk>(slab + 4 * row, kSlabRow, grads + kColumns * group, kRow, w, g);
            if (erases) multiply_transposed<kChunk>(keys + 4 * row, kSlabRow, dr + kColumns * group, kRow, w, g);
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < kColumns; ++n) at[m * kRow + n] = w[m][n];
        }
        if (decays) decay_backward(of_start, of_end, of_memory);
    }

    // dQ and dK for this thread's tokens and the features `group` and `group` + 16 of a slab; in passing its share of
    // rowsum(Q o dO W0^T) + rowsum(K o dR W0^T) and of rowsum(K o U dW1^T).
    __device__ __forceinline__ void keys_and_queries_backward(int feature, T (&of_start)[2], T (&of_end)[2]) {
        const T *keys = slab + kChunk * kSlabRow, *symmetric = pairs + kChunk * kPairsRow;
        T dq[2][2] = {}, dk[2][2] = {}, through_end[2][2] = {};
        const T *rows = grads + 2 * row * kRow, *old = before + group * kRow;
        if (queries) multiply_by_transposed<N>(rows, kRow, old, kGroups * kRow, dq);
        if (erases) multiply_by_transposed<N>(rows + kChunk * kRow, kRow, old, kGroups * kRow, dk);
        multiply_by_transposed<N>(
            u + 2 * row * kRow, kRow, memory + (feature + group) * kRow, kGroups * kRow, through_end);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int t = 2 * row + m, at = t * kSlabRow + group + n * kGroups;
                if (queries) of_start[m] += slab[at] * dq[m][n];
                of_start[m] += keys[at] * dk[m][n];
                of_end[m] += keys[at] * through_end[m][n];
                dq[m][n] *= from_start[t];
                dk[m][n] = from_start[t] * dk[m][n] + to_end(t) * through_end[m][n];
            }
#pragma unroll 4
        for (int s = 0; s < kChunk; ++s) {
            T k[2], q[2] = {};
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                k[n] = keys[s * kSlabRow + group + n * kGroups];
                if (queries) q[n] = slab[s * kSlabRow + group + n * kGroups];
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int t = 2 * row + m;
                const T read = pairs[t * kPairsRow + s], is_read = pairs[s * kPairsRow + t];
                const T both = symmetric[t * kPairsRow + s];
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    dq[m][n] += read * k[n];
                    dk[m][n] += both * k[n] + is_read * q[n];
                }
            }
        }
        if (queries) put_features(dq, p.grad_q, feature);
        put_features(dk, p.grad_k, feature);
    }

    __device__ __forceinline__ void put_features(const T (&from)[2][2], const Sequence& x, int feature) const {
        const int64_t at = start_of(x, b, h, tile) + feature + group;
        typed<T>(x, [&](auto* data) {
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int t = 2 * row + m;
                    if (t < count && feature + group + n * kGroups < p.dk)
                        narrow(from[m][n], data + at + (first + t) * x.row + n * kGroups);
                }
        });
    }

    // The gradient of a gate for this thread's tokens: the sum over value columns, that is over its row of threads.
    __device__ __forceinline__ void put_gate(const Sequence& x, const T (&shares)[2]) const {
        if (!x.data) return;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const T sum = sum_over_lanes<kGroups>(shares[m]);
            const int t = 2 * row + m;
            if (group == 0 && t < count) store(x, start_of(x, b, h, tile) + (first + t) * x.row, sum);
        }
    }

    // A decay gets from every product P[t, s] and g_t that it is a factor of the product of the others. `dp` has a row
    // for each token and a column for W0, then one for each token.
    __device__ __forceinline__ void decay_backward(
        const T (&of_start)[2], const T (&of_end)[2], T of_memory) {
        const T whole = sum_over_lanes<kWarp>(of_memory);
        if (thread % kWarp == 0) partial[thread / kWarp] = whole;
        T start_sum[2], end_sum[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            start_sum[m] = sum_over_lanes<kGroups>(of_start[m]);
            end_sum[m] = sum_over_lanes<kGroups>(of_end[m]);
        }
        if (group == 0)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                dp[(2 * row + m) * kPairsRow] = start_sum[m];
                dp[(kChunk - 1) * kPairsRow + 2 * row + m + 1] += end_sum[m];
            }
        __syncthreads();
        const int r = thread;
        if (r >= count) return;
        T sum = 0;
        for (int j = 0; j <= r; ++j) {
            T later = 0;
            for (int t = r; t < kChunk; ++t) later += dp[t * kPairsRow + j] * remaining[t * kPairsRow + r];
            if (j == 0)
                for (int i = 0; i < kThreads / kWarp; ++i) later += partial[i] * to_end(r);
            // g_{r-1}, or P[r-1, j-1], or the empty product
            sum += later * (r == 0 ? T(1) : j == 0 ? from_start[r - 1] : remaining[(r - 1) * kPairsRow + j - 1]);
        }
        store(p.grad_decay, start_of(p.grad_decay, b, h, tile) + (first + r) * p.grad_decay.row, sum);
    }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 3) scan_forward(const __grid_constant__ Problem problem) {
    FWP_DYNAMIC_SHARED(shared);
    Scan<T, N>(problem, reinterpret_cast<T*>(shared), false).forward();
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads, (sizeof(T) == 4 ? 3 : 2)) scan_backward(const __grid_constant__ Problem problem, T* workspace) {
    FWP_DYNAMIC_SHARED(shared);
    Scan<T, N>(problem, reinterpret_cast<T*>(shared), true).backward(workspace);
}

// --- Launches --------------------------------------------------------------------------------------------------------

template <class T, int N>
ScanLaunch scan_launch(int64_t streams, int64_t dk, int64_t dv, bool backward) {
    const int64_t tiles = (dv + N - 1) / N;
    return {N, tiles, streams * tiles, Scan<T, N>::shared_bytes(dk, backward),
            backward ? streams * tiles * Scan<T, N>::workspace(dk) : 0};
}

// The widest tile that does not ask for more than 48 KB, has columns to fill it and gives every multiprocessor one and a
// half blocks; the narrowest where there is none.
template <class T>
ScanLaunch plan_scan(int64_t streams, int64_t dk, int64_t dv, bool backward, const Device& device) {
    ScanLaunch narrow = scan_launch<T, 16>(streams, dk, dv, backward);
    if constexpr (std::is_same_v<T, float>) {
        const auto good = [&](const ScanLaunch& launch) {
            return launch.shared_bytes <= 48 * 1024 && dv > launch.columns / 2 &&
                   2 * launch.blocks >= 3 * device.multiprocessors;
        };
        const ScanLaunch wide = scan_launch<T, 64>(streams, dk, dv, backward);
        if (!backward && good(wide)) return wide;
        const ScanLaunch middle = scan_launch<T, 32>(streams, dk, dv, backward);
        if (good(middle)) return middle;
    }
    if (dk > kLargest<T> || narrow.shared_bytes > device.shared_bytes) narrow.columns = 0;
    return narrow;
}

// `problem` is divided into tiles as `plan` says.
template <class T>
cudaError_t launch_scan(Problem problem, const ScanLaunch& plan, bool backward, void* workspace, cudaStream_t stream) {
    if (!plan.columns) return cudaErrorInvalidValue;
    problem.blocks = plan.tiles, problem.block_columns = plan.columns;
    const auto run = [&](auto* kernel, auto... arguments) {
        return launch(kernel, plan.blocks, kThreads, plan.shared_bytes, stream, problem, arguments...);
    };
    T* space = static_cast<T*>(workspace);
    if constexpr (std::is_same_v<T, float>) {
        if (plan.columns == 64) return run(&scan_forward<T, 64>);
        if (plan.columns == 32) return backward ? run(&scan_backward<T, 32>, space) : run(&scan_forward<T, 32>);
    }
    return backward ? run(&scan_backward<T, 16>, space) : run(&scan_forward<T, 16>);
}

}  // namespace fwp::gpu
