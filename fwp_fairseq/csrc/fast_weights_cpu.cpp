// The CPU kernels, compiled for a baseline that every processor has, for AVX2 with FMA, and those of decoding also for
// AVX-512 with VNNI, and products of integers for AMX; chosen when they run.

#include "fast_weights_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
// Assemblers that come with older compilers do not know its instructions.
#if defined(__x86_64__) && defined(__linux__) && (__clang_major__ >= 12 || __GNUC__ >= 11)
#define FWP_AMX_IS_KNOWN
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fwp {

#if defined(FWP_AMX_IS_KNOWN)
namespace {

// Whether the processor has matrices of 8-bit integers (AMX), and Linux lets this process use them.
bool has_amx() {
    static const bool has = [] {
        constexpr unsigned kTiles = 1 << 24, kIntegers = 1 << 25, kBoth = kTiles | kIntegers;
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBoth) != kBoth) return false;
        constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
    }();
    return has;
}

}  // namespace
#endif

#define FWP_ISA baseline
#define FWP_VECTOR_BYTES 16
#include "fast_weights_cpu_kernels.h"
#include "fast_weights_cpu_step.h"
#include "few_rows_linear_kernel.h"
#include "decoder_step_kernels.h"
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
#define FWP_AVX2
#include "fast_weights_cpu_kernels.h"
#include "fast_weights_cpu_step.h"
#include "few_rows_linear_kernel.h"
#include "decoder_step_kernels.h"
#undef FWP_ISA
#undef FWP_VECTOR_BYTES
#undef FWP_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")
#endif
#define FWP_ISA avx512
#define FWP_VECTOR_BYTES 64
#define FWP_VNNI
#if defined(FWP_AMX_IS_KNOWN)
#define FWP_AMX
#endif
#include "fast_weights_cpu_kernels.h"
#include "fast_weights_cpu_step.h"
#include "few_rows_linear_kernel.h"
#include "decoder_step_kernels.h"
#undef FWP_ISA
#undef FWP_VECTOR_BYTES
#undef FWP_VNNI
#undef FWP_AMX
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

bool has_avx512() {
#ifdef FWP_HAS_AVX2
    static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    return has;
#else
    return false;
#endif
}

}  // namespace

const char* instruction_set() { return has_avx2() ? "avx2" : "baseline"; }

#ifdef FWP_HAS_AVX2
#define FWP_DISPATCH(call) return has_avx2() ? avx2::call : baseline::call
#define FWP_DISPATCH_DECODING(call) return has_avx512() ? avx512::call : has_avx2() ? avx2::call : baseline::call
#else
#define FWP_DISPATCH(call) return baseline::call
#define FWP_DISPATCH_DECODING(call) FWP_DISPATCH(call)
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
    FWP_DISPATCH_DECODING(step<T>(problem, moves, begin, end));
}

template <class T>
void read(const Read& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH_DECODING(read<T>(problem, begin, end));
}

template <class T>
void linear(const Linear& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH_DECODING(linear<T>(problem, begin, end));
}

void layer_norm(const Norm& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH_DECODING(layer_norm(problem, begin, end));
}

void attend(const Attend& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH_DECODING(attend(problem, begin, end));
}

void integer_linear(const IntegerLinear& problem, int64_t begin, int64_t end) {
    FWP_DISPATCH_DECODING(integer_linear(problem, begin, end));
}

void to_integers(const float* x, int64_t rows, int64_t inputs, uint8_t* y, float* steps) {
    FWP_DISPATCH_DECODING(to_integers(x, rows, inputs, y, steps));
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
