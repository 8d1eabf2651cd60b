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

// Raises IndexError for an order or places out of range. Fills in `new_places`.
Moves plan(const Step& problem);

// Work items [begin, end) of a step: a family and a head; of a read: a memory and a head.
template <class T>
void step(const Step& problem, const Moves& moves, int64_t begin, int64_t end);
template <class T>
void read(const Read& problem, int64_t begin, int64_t end);

// y = x W^T + bias. Rows of x are contiguous, those of the weight and of y `weight_row` and `y_row` apart; bias may be
// null.
struct Linear {
    const void *x, *weight, *bias;
    void* y;
    int64_t rows, inputs, outputs, weight_row;
    int64_t y_row;
};

// Outputs [begin, end) of all rows.
template <class T>
void linear(const Linear& problem, int64_t begin, int64_t end);

// y = (x - mean) / sqrt(variance + epsilon) weight + bias of each row; y may be x.
struct Norm {
    const float *x, *weight, *bias;
    float* y;
    int64_t width;
    float epsilon;
};

// Rows [begin, end).
void layer_norm(const Norm& problem, int64_t begin, int64_t end);

// Softmax attention of one query a row, (rows, H, D), to keys and values (sentences, H, length, D): neighbouring rows
// share a sentence, each as many. Padding (sentences, length) or null: none; average (rows, length): the mean of the
// heads' weights, or null.
struct Attend {
    const float *q, *keys, *values;
    const bool* padding;
    float *out, *average;
    int64_t rows, sentences, heads, head_dim, length;
};

// Work items [begin, end): a sentence and a head. With an average, all heads of a sentence are computed in order.
void attend(const Attend& problem, int64_t begin, int64_t end);

// Rows are rounded to kSteps steps on either side of zero: sums of two products with a weight fit 16 bits.
constexpr int kSteps = 63;
constexpr int kPanel = 16;  // outputs whose weights lie together

// y = x W^T + bias by 8-bit integers. x: rows of `to_integers`. W in panels of kPanel outputs: of four inputs at a time
// the four weights of each output, what there is not as zero. Of output o, `worth` is the size of a step of its weights
// and `offset` the sum of the weights times that of x.
struct IntegerLinear {
    const uint8_t* x;
    const float* step;
    const int8_t* weight;
    const int32_t* offset;
    const float *worth, *bias;
    float* y;
    int64_t rows, inputs, outputs, y_row;
};

// Panels [begin, end).
void integer_linear(const IntegerLinear& problem, int64_t begin, int64_t end);
// Each of the rows of x in steps of its own, counted from -kSteps - 1, to y, with rows rounded up to fours of inputs.
void to_integers(const float* x, int64_t rows, int64_t inputs, uint8_t* y, float* steps);

// Name of the instruction set in use.
const char* instruction_set();

}  // namespace fwp
