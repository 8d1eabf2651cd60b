// The kernels for a processor. Of torch they use only its half-precision number types.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <vector>

#include "fast_weights.h"

namespace fwp {

using c10::BFloat16;
using c10::Half;

// Work items [begin, end); an item is a column block of a sequence. T is the type of accumulation.
template <class T>
void forward(const Problem& problem, int64_t begin, int64_t end);
template <class T>
void backward(const Problem& problem, int64_t begin, int64_t end);

// Which row of a step goes on from which memory. Rows of one parent are a family: rows [begin[f], begin[f + 1]) of `row`
// and `to`, the one that keeps the parent's place `from[f]` at the end.
struct Moves {
    std::vector<int64_t> begin, from, row, to;

    int64_t families() const { return int64_t(from.size()); }
};

// Work items [begin, end) of a step: a family and a head; of a read: a memory and a head.
template <class T>
void step(const Step& problem, const Moves& moves, int64_t begin, int64_t end);
template <class T>
void read(const Read& problem, int64_t begin, int64_t end);

// y = x W^T + bias. Rows of x and y are contiguous, those of the weight `weight_row` apart; bias may be null.
struct Linear {
    const void *x, *weight, *bias;
    void* y;
    int64_t rows, inputs, outputs, weight_row;
};

// Outputs [begin, end) of all rows.
template <class T>
void linear(const Linear& problem, int64_t begin, int64_t end);

// Name of the instruction set in use.
const char* instruction_set();

}  // namespace fwp
