// What a call of the CPU kernels is about. No autograd here, and of torch only its half-precision number types.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace fwp {

using c10::BFloat16;
using c10::Half;

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

// Work items [begin, end); an item is a column block of a sequence. T is the type of accumulation.
template <class T>
void forward(const Problem& problem, int64_t begin, int64_t end);
template <class T>
void backward(const Problem& problem, int64_t begin, int64_t end);

// Name of the instruction set in use.
const char* instruction_set();

}  // namespace fwp
