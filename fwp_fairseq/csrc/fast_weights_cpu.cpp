// The CPU kernels, compiled for a baseline that every processor has and for AVX2 with FMA, chosen when they run.

#include "fast_weights_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace fwp {

#define FWP_ISA baseline
#define FWP_VECTOR_BYTES 16
#include "fast_weights_cpu_kernels.h"
#include "fast_weights_cpu_step.h"
#include "few_rows_linear_kernel.h"
#undef FWP_ISA
#undef FWP_VECTOR_BYTES

#if defined(__x86_64__)
#define FWP_HAS_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define FWP_ISA avx2
#define FWP_VECTOR_BYTES 32
#include "fast_weights_cpu_kernels.h"
#include "fast_weights_cpu_step.h"
#include "few_rows_linear_kernel.h"
#undef FWP_ISA
#undef FWP_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

bool has_avx2() {
#ifdef FWP_HAS_AVX2
    static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return has;
#else
    return false;
#endif
}

}  // namespace

const char* instruction_set() { return has_avx2() ? "avx2" : "baseline"; }

#ifdef FWP_HAS_AVX2
#define FWP_DISPATCH(call) return has_avx2() ? avx2::call : baseline::call
#else
#define FWP_DISPATCH(call) return baseline::call
#endif

template <class T>
void forward(const Problem& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH(forward<T>(problem, begin, end));
}

template <class T>
void backward(const Problem& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH(backward<T>(problem, begin, end));
}

template <class T>
void step(const Step& problem, const Moves& moves, int64_t begin, int64_t end) {
    FWP_DISPATCH(step<T>(problem, moves, begin, end));
}

template <class T>
void read(const Read& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH(read<T>(problem, begin, end));
}

template <class T>
void linear(const Linear& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH(linear<T>(problem, begin, end));
}

template void forward<float>(const Problem&, int64_t, int64_t);
template void forward<double>(const Problem&, int64_t, int64_t);
template void backward<float>(const Problem&, int64_t, int64_t);
template void backward<double>(const Problem&, int64_t, int64_t);
template void step<float>(const Step&, const Moves&, int64_t, int64_t);
template void step<double>(const Step&, const Moves&, int64_t, int64_t);
template void read<float>(const Read&, int64_t, int64_t);
template void read<double>(const Read&, int64_t, int64_t);
template void linear<float>(const Linear&, int64_t, int64_t);
template void linear<double>(const Linear&, int64_t, int64_t);

}  // namespace fwp
