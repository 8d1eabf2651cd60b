// What a call of the kernels is about, on any device. Nothing of torch here: kernels do not depend on it.

#pragma once

#include <cstdint>

namespace fwp {

constexpr int kChunk = 16;     // tokens of one chunk
constexpr int kSegment = 128;  // tokens from one kept memory to the next, a multiple of kChunk

enum class Type { float32, float64, float16, bfloat16 };

// A tensor (B, H, L, D) with D contiguous, or gates (B, H, L). Strides count elements; a null pointer: not there.
struct Sequence {
    void* data = nullptr;
    Type type = Type::float32;
    int64_t batch = 0, head = 0, row = 0;
    int64_t block = 0;  // between the parts of a gradient that blocks of value columns have shares in

    int64_t bytes() const { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }  // of an element

    Sequence at(int64_t b, int64_t h, int64_t part) const {
        Sequence moved = *this;
        moved.data = static_cast<char*>(data) + (b * batch + h * head + part * block) * bytes();
        return moved;
    }
};

// Memories are contiguous (B, H, Dk, Dv), in the type of the accumulation.
struct Problem {
    int64_t heads, length, dk, dv;
    int64_t segments;               // of kSegment tokens
    int64_t blocks, block_columns;  // value columns are divided into, where sequences alone would not fill the threads
    Sequence q, k, v, write, erase, decay;
    const void* initial_state = nullptr;

    Sequence out;
    void* final_state = nullptr;
    void* borders = nullptr;  // (B, H, segments - 1, Dk, Dv): memories at segment borders, or null: not wanted

    Sequence grad_out, grad_q, grad_k, grad_v, grad_write, grad_erase, grad_decay;
    const void* grad_final_state = nullptr;
    void* grad_initial_state = nullptr;
};

enum class FeatureMap { none, elu, favor, dpfp, tanh };
enum class KeyNormalization { none, sum, l2 };

// How projected keys and queries (d_key) become the vectors (dk) that address a memory: ops/feature_maps.py.
struct Features {
    FeatureMap map = FeatureMap::none;
    KeyNormalization normalization = KeyNormalization::none;
    int64_t d_key = 0, dk = 0;
    int64_t nu = 1;                    // of dpfp
    const void* projection = nullptr;  // of favor: (dk / 2, d_key), contiguous, in the type of the accumulation
};

// One token for each of `rows` hypotheses. Memories stand in `slots` places, (slots, H, Dk, Dv), each read and written
// once; a hypothesis goes on from the memory of the one that it descends from.
//
// Row i finds its memory in place p = places[order[i]] (order null: places[i]; places null too: i). The first row of
// those with the same p keeps that place; every other one writes to a place that no row of this step descends from,
// before the first one writes. `new_places` says where rows have their memories then.
struct Step {
    int64_t rows, slots, heads, dv;
    int64_t parents;                         // rows of the step before: what `order` points to, and `places` has
    Features features;
    Sequence q, k;                           // (rows, H, d_key): batch and head strides
    Sequence v, out;                         // (rows, H, Dv)
    Sequence write, erase, decay;            // (rows, H); null: 1, 0, 1
    void* state = nullptr;                   // (slots, H, Dk, Dv), in the type of the accumulation
    void* normalizer = nullptr;              // (slots, H, Dk): z of attention normalisation, or null: none
    const int64_t *order = nullptr, *places = nullptr;
    int64_t* new_places = nullptr;           // (rows)
};

// Queries of finished memories: row i reads memory i / (rows / memories), without writing.
struct Read {
    int64_t rows, memories, heads, dv;
    Features features;
    Sequence q, out;                   // (rows, H, d_key), (rows, H, Dv)
    const void* state = nullptr;       // (memories, H, Dk, Dv)
    const void* normalizer = nullptr;  // (memories, H, Dk), or null
};

}  // namespace fwp
