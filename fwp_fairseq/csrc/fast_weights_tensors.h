// From tensors to what the kernels take.

#pragma once

#include <ATen/core/Tensor.h>

#include "fast_weights.h"

namespace fwp {

inline Type type_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
    case at::kFloat: return Type::float32;
    case at::kDouble: return Type::float64;
    case at::kHalf: return Type::float16;
    case at::kBFloat16: return Type::bfloat16;
    default: TORCH_CHECK_VALUE(false, "fast weights take floating-point tensors, not ", x.scalar_type());
    }
}

// Type of memories and of accumulation.
inline at::ScalarType state_type(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// `x`, or a copy of it with adjacent features.
inline at::Tensor with_rows(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

// (B, H, L, D), or (P, B, H, L, D) for parts.
inline Sequence rows_of(const at::Tensor& x) {
    const int64_t d = x.dim() - 4;
    return {x.data_ptr(), type_of(x), x.stride(d), x.stride(d + 1), x.stride(d + 2), d ? x.stride(0) : 0};
}

// (B, H, L), or (P, B, H, L) for parts.
inline Sequence gate_of(const at::Tensor& x) {
    const int64_t d = x.dim() - 3;
    return {x.data_ptr(), type_of(x), x.stride(d), x.stride(d + 1), x.stride(d + 2), d ? x.stride(0) : 0};
}

// (n, H, D) of one token, or (n, H).
inline Sequence token_of(const at::Tensor& x) { return {x.data_ptr(), type_of(x), x.stride(0), x.stride(1)}; }

}  // namespace fwp
