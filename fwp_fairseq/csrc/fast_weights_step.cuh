// Decoding on a GPU: one token for each hypothesis, and reading of finished memories.
//
// A step has to read and write every memory once, 2 Dk Dv numbers for each row and head, and everything else is small:
// keys, queries and values are Dk + Dv numbers. So it does no more than that. A block reads a tile of a memory,
// Dk x 32, into registers, neighbouring lanes neighbouring value columns, 128 bytes to a row. In one pass over them it gets both
// W^T k and W^T q, since the query need not wait for the write:
//
//     v̄ = decay W^T k,  u = write v - erase v̄,  W_new^T q = decay W^T q + (k . q) u
//
// and it writes decay W + k u^T from the same registers, once for every hypothesis that goes on from this memory: the
// reordering of a beam search costs no pass of its own. Feature maps, gates and attention normalisation are computed on
// the way from what the projections give, in each tile's block again.
//
// Several children of one parent: one block takes all of them, so that no one else overwrites the parent's place, and
// others write to places that nobody descends from, which no block reads. With attention normalisation a block
// takes all tiles of a memory, because each needs z, which the first child overwrites.

#pragma once

#include <climits>

#include "fast_weights_features.cuh"
#include "fast_weights_launch.cuh"

namespace fwp::gpu {

// --- Who descends from whom ------------------------------------------------------------------------------------------

// What plan_step() finds out, on the device: the rows that go on from a place, as a list. Which row comes first in it
// is up to chance; all are treated alike.
struct Descent {
    int *first_row = nullptr;  // (slots): or -1
    int *next_row = nullptr;   // (rows): or -1
    int *keeper = nullptr;     // (slots): the lowest row that goes on from the place, or INT_MAX
    int *free_places = nullptr;  // (slots): those that nobody goes on from

    static int64_t elements(int64_t rows, int64_t slots) { return rows + 3 * slots; }
    Descent() = default;
    Descent(int* scratch, int64_t rows, int64_t slots)
        : first_row(scratch), next_row(scratch + slots), keeper(next_row + rows), free_places(keeper + slots) {}
};

__device__ __forceinline__ int64_t parent_of(const Step& step, int64_t row) {
    const auto check = [](int64_t index, int64_t count) {
        if (index < 0 || index >= count) __trap();  // as torch's own indexing does
        return index;
    };
    if (step.order) row = check(step.order[row], step.parents);
    return check(step.places ? step.places[row] : row, step.slots);
}

// Calls found(index, rank) for the indices below `count` that are wanted, in order.
template <class Wanted, class Found>
__device__ __forceinline__ void rank(
    int64_t count, int (*sums)[kStepThreads], const Wanted& wanted, const Found& found) {
    const int thread = threadIdx.x;
    int before = 0;
    for (int64_t start = 0; start < count; start += kStepThreads) {
        const int64_t index = start + thread;
        const bool is_wanted = index < count && wanted(index);
        int side = 0;
        sums[side][thread] = is_wanted;
        __syncthreads();
        for (int distance = 1; distance < kStepThreads; distance *= 2, side = 1 - side) {
            sums[1 - side][thread] = sums[side][thread] + (thread < distance ? 0 : sums[side][thread - distance]);
            __syncthreads();
        }
        if (is_wanted) found(index, before + sums[side][thread] - 1);
        before += sums[side][kStepThreads - 1];
        __syncthreads();
    }
}

// One block, any number of rows and slots.
__global__ void __launch_bounds__(kStepThreads) plan_step(const __grid_constant__ Step step, Descent descent) {
    FWP_DYNAMIC_SHARED(shared);
    auto* sums = reinterpret_cast<int(*)[kStepThreads]>(shared);
    const int thread = threadIdx.x;
    for (int64_t slot = thread; slot < step.slots; slot += kStepThreads)
        descent.first_row[slot] = -1, descent.keeper[slot] = INT_MAX;
    __syncthreads();
    for (int64_t row = thread; row < step.rows; row += kStepThreads) {
        const int64_t parent = parent_of(step, row);
        descent.next_row[row] = atomicExch(descent.first_row + parent, int(row));
        atomicMin(descent.keeper + parent, int(row));
    }
    __syncthreads();
    rank(
        step.slots, sums, [&](int64_t slot) { return descent.keeper[slot] == INT_MAX; },
        [&](int64_t slot, int nth) { descent.free_places[nth] = int(slot); });
    rank(
        step.rows, sums,
        [&](int64_t row) {
            const int64_t parent = parent_of(step, row);
            if (descent.keeper[parent] != row) return true;
            step.new_places[row] = parent;
            return false;
        },
        [&](int64_t row, int nth) { step.new_places[row] = descent.free_places[nth]; });
}

// --- Reading and writing ---------------------------------------------------------------------------------------------

// Blocks at a time on a multiprocessor, for which registers are shared out: so that enough of memory is on its way.
template <class T, int ROWS>
constexpr int kStepBlocks = sizeof(T) * ROWS > 128 ? 1 : ROWS > 8 ? 2 : 3;

// Lanes are value columns; feature i of a memory is with warp i % kStepWarps, in register i / kStepWarps.
template <class T, int ROWS>
struct Access {
    static constexpr int kColumns = kWarp;

    int thread, lane, warp, dk, d_key;
    int dv, column = 0;
    T w[ROWS];
    T *x, *phi, *z, *shares, *scratch;  // (2, d_key), (2, dk), (dk), (2, warps, lanes)

    static int64_t shared_bytes(const Features& f) {
        return (2 * f.d_key + 3 * f.dk + 2 * kStepThreads + kScratch) * int64_t(sizeof(T));
    }

    __device__ __forceinline__ Access(const Features& f, int64_t dv, T* shared) : dv(int(dv)) {
        thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
        dk = int(f.dk), d_key = int(f.d_key);
        x = shared, phi = x + 2 * d_key, z = phi + 2 * dk, shares = z + dk, scratch = shares + 2 * kStepThreads;
    }

    __device__ __forceinline__ void load_memory(const T* from, int tile) {
        column = tile * kColumns + lane;
        from += warp * dv + column;
#pragma unroll
        for (int r = 0; r < ROWS; ++r, from += kStepWarps * dv)  // not ROWS addresses in registers
            w[r] = r * kStepWarps + warp < dk && column < dv ? *from : T(0);
    }

    __device__ __forceinline__ void load_projected(const Sequence& from, int64_t row, int64_t head, T* to) const {
        const int64_t at = start_of(from, row, head);
        typed<T>(from, [&](const auto* data) {
#pragma unroll 1
            for (int i = thread; i < d_key; i += kStepThreads) to[i] = widen<T>(data[at + i]);
        });
    }

    // W^T of each vector of features, for this thread's column. Has one barrier: before the next call there must be
    // another, that of make_features().
    template <int VECTORS>
    __device__ __forceinline__ void retrieve(T (&found)[VECTORS]) const {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) found[v] = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int i = r * kStepWarps + warp;
            if (i < dk)
#pragma unroll
                for (int v = 0; v < VECTORS; ++v) found[v] += w[r] * phi[v * dk + i];
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) shares[v * kStepThreads + thread] = found[v];
        __syncthreads();
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            found[v] = 0;
#pragma unroll
            for (int other = 0; other < kStepWarps; ++other)
                found[v] += shares[v * kStepThreads + other * kWarp + lane];
        }
    }
};

// 1 / total where there is something to divide by, else 0.
template <class T>
__device__ __forceinline__ T inverse(T total) { return total > smallest_divisor<T>() ? 1 / total : T(0); }

// Blocks are (row, head, tile), tiles fastest; with attention normalisation (row, head).
template <class T, int ROWS>
__global__ void __launch_bounds__(kStepThreads, (kStepBlocks<T, ROWS>))
    write_and_read(const __grid_constant__ Step step, const __grid_constant__ Descent descent, int tiles) {
    FWP_DYNAMIC_SHARED(shared);
    const bool normalizes = step.normalizer;
    const int blocks = normalizes ? 1 : tiles, heads = int(step.heads);  // blocks of one memory
    const int head = int(blockIdx.x) / blocks % heads, first_row = int(blockIdx.x) / blocks / heads;
    const int first_tile = normalizes ? 0 : int(blockIdx.x) % tiles, end_tile = normalizes ? tiles : first_tile + 1;
    int place = first_row;
    if (descent.first_row) {
        place = int(parent_of(step, first_row));
        if (descent.first_row[place] != first_row) return;
    }
    Access<T, ROWS> access(step.features, step.dv, reinterpret_cast<T*>(shared));
    const int thread = access.thread, dk = access.dk, dv = access.dv;
    const auto memory = [&](int64_t at) { return static_cast<T*>(step.state) + (at * heads + head) * dk * dv; };
    const auto normalizer = [&](int64_t at) { return static_cast<T*>(step.normalizer) + (at * heads + head) * dk; };
    T *k = access.phi, *q = access.phi + dk, *z = access.z;
    if (normalizes)
#pragma unroll 1
        for (int i = thread; i < dk; i += kStepThreads) z[i] = normalizer(place)[i];

    for (int tile = first_tile; tile < end_tile; ++tile) {
        access.load_memory(memory(place), tile);
        for (int row = first_row; row >= 0; row = descent.first_row ? descent.next_row[row] : -1) {
            const int64_t to = descent.first_row ? step.new_places[row] : row;
            access.load_projected(step.k, row, head, access.x);
            access.load_projected(step.q, row, head, access.x + access.d_key);
            make_features<2>(step.features, access.x, access.phi, access.scratch);

            const auto gate = [&](const Sequence& x, T value) {
                return x.data ? load<T>(x, start_of(x, row, head)) : value;
            };
            const T write = gate(step.write, T(1)), decay = gate(step.decay, T(1));
            T erase = gate(step.erase, T(0)), share = 1;  // of what is read

            T dots[3] = {};  // k . q, z . k, z . q
#pragma unroll 1
            for (int i = thread; i < dk; i += kStepThreads) {
                dots[0] += k[i] * q[i];
                if (normalizes) dots[1] += z[i] * k[i], dots[2] += z[i] * q[i];
            }
            block_sums(dots, access.scratch);
            if (normalizes) {
                // Rules that erase count every token that writes at all in full, the others what it writes.
                const T count = step.erase.data ? T(write != 0) : write;
                erase *= inverse(decay * dots[1]);
                share = inverse(decay * dots[2] + count * dots[0]);
                if (tile == first_tile)
#pragma unroll 1
                    for (int i = thread; i < dk; i += kStepThreads)
                        normalizer(to)[i] = decay * z[i] + count * k[i];
            }

            T found[2];
            access.retrieve(found);
            const int column = access.column;
            if (column < dv) {
                const T value = load<T>(step.v, start_of(step.v, row, head) + column);
                const T u = write * value - erase * (decay * found[0]);
                if (access.warp == 0)
                    store(step.out, start_of(step.out, row, head) + column, share * (decay * found[1] + dots[0] * u));
                T* at = memory(to) + access.warp * dv + column;
#pragma unroll
                for (int r = 0; r < ROWS; ++r, at += kStepWarps * dv) {
                    const int i = r * kStepWarps + access.warp;
                    if (i < dk) *at = decay * access.w[r] + k[i] * u;
                }
            }
        }
    }
}

// Blocks are (memory, head, tile), tiles fastest. A memory is loaded once for all rows that share it.
template <class T, int ROWS>
__global__ void __launch_bounds__(kStepThreads, (kStepBlocks<T, ROWS>))
    read_memories(const __grid_constant__ Read read, int tiles) {
    FWP_DYNAMIC_SHARED(shared);
    const int head = int(blockIdx.x) / tiles % int(read.heads), memory = int(blockIdx.x) / tiles / int(read.heads);
    const int rows = int(read.rows / read.memories);
    const int64_t at = int64_t(memory) * read.heads + head;
    Access<T, ROWS> access(read.features, read.dv, reinterpret_cast<T*>(shared));
    const int thread = access.thread, dk = access.dk;
    access.load_memory(static_cast<const T*>(read.state) + at * dk * read.dv, int(blockIdx.x) % tiles);
    const T* z = static_cast<const T*>(read.normalizer);
    for (int row = memory * rows; row < (memory + 1) * rows; ++row) {
        access.load_projected(read.q, row, head, access.x);
        make_features<1>(read.features, access.x, access.phi, access.scratch);
        T total[1] = {};
        if (z) {
#pragma unroll 1
            for (int i = thread; i < dk; i += kStepThreads) total[0] += z[at * dk + i] * access.phi[i];
            block_sums(total, access.scratch);
        }
        T found[1];
        access.retrieve(found);
        if (access.warp == 0 && access.column < read.dv)
            store(
                read.out, start_of(read.out, row, head) + access.column, z ? inverse(total[0]) * found[0] : found[0]);
    }
}

// --- Launches --------------------------------------------------------------------------------------------------------

// Calls body(rows), an integral constant: registers of a memory for each thread, enough for Dk. Accumulation in double
// has one size.
template <class T, class Body>
cudaError_t with_rows(int64_t dk, const Body& body) {
    if (dk > kLargest<T>) return cudaErrorInvalidValue;
    if constexpr (std::is_same_v<T, float>) {
        if (dk <= 8 * kStepWarps) return body(std::integral_constant<int, 8>());
        if (dk <= 16 * kStepWarps) return body(std::integral_constant<int, 16>());
        if (dk <= 32 * kStepWarps) return body(std::integral_constant<int, 32>());
    }
    return body(std::integral_constant<int, kLargest<T> / kStepWarps>());
}

// `scratch`: Descent::elements() ints, or null where neither order nor places are given.
template <class T>
cudaError_t launch_step(const Step& step, int* scratch, cudaStream_t stream) {
    Descent descent;
    if (scratch) {
        descent = Descent(scratch, step.rows, step.slots);
        const cudaError_t error =
            launch(&plan_step, 1, kStepThreads, 2 * kStepThreads * int64_t(sizeof(int)), stream, step, descent);
        if (error != cudaSuccess) return error;
    }
    const int tiles = int((step.dv + kWarp - 1) / kWarp);
    return with_rows<T>(step.features.dk, [&](auto rows) {
        return launch(
            &write_and_read<T, rows.value>, step.rows * step.heads * (step.normalizer ? 1 : tiles), kStepThreads,
            Access<T, rows.value>::shared_bytes(step.features), stream, step, descent, tiles);
    });
}

template <class T>
cudaError_t launch_read(const Read& read, cudaStream_t stream) {
    const int tiles = int((read.dv + kWarp - 1) / kWarp);
    return with_rows<T>(read.features.dk, [&](auto rows) {
        return launch(
            &read_memories<T, rows.value>, read.memories * read.heads * tiles, kStepThreads,
            Access<T, rows.value>::shared_bytes(read.features), stream, read, tiles);
    });
}

}  // namespace fwp::gpu
