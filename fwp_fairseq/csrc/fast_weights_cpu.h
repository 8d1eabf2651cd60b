// The kernels for a processor. Of torch they use only its half-precision number types.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "fast_weights.h"

namespace fwp {

using c10::BFloat16;
using c10::Half;

// Work items [begin, end); an item is a column block of a sequence. T is the type of accumulation.
template <class T>
void forward(const Problem& problem, int64_t begin, int64_t end);
template <class T>
void backward(const Problem& problem, int64_t begin, int64_t end);

// Name of the instruction set in use.
const char* instruction_set();

}  // namespace fwp
