// Linear layers with few rows, for decoding on a CPU.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "fast_weights_cpu.h"
#include "fast_weights_tensors.h"

namespace {

using at::Tensor;

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const at::ScalarType type = x.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "x is ", type, ", it must be float32 or float64");
    TORCH_CHECK_VALUE(
        x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x is ", x.sizes(), " and weight ",
        weight.sizes(), ", they must be (rows, inputs) and (outputs, inputs)");
    TORCH_CHECK_VALUE(weight.scalar_type() == type, "weight is ", weight.scalar_type(), ", x is ", type);
    const bool biased = bias && bias->defined();
    TORCH_CHECK_VALUE(
        !biased || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type),
        "bias must be (outputs), ", type);
    const Tensor rows = x.contiguous(), matrix = fwp::with_rows(weight);
    const Tensor added = biased ? bias->contiguous() : Tensor();
    Tensor y = x.new_empty({x.size(0), weight.size(0)});
    const fwp::Linear problem = {
        rows.data_ptr(),    matrix.data_ptr(), biased ? added.data_ptr() : nullptr,
        y.data_ptr(),       x.size(0),         x.size(1),
        weight.size(0),     matrix.stride(0),
    };
    if (y.numel() == 0) return y;
    // Starting threads takes some microseconds, a weight less than a nanosecond.
    const int64_t grain = std::max<int64_t>(1, 50000 / std::max<int64_t>(1, x.size(1)));
    at::parallel_for(0, weight.size(0), grain, [&](int64_t begin, int64_t end) {
        type == at::kDouble ? fwp::linear<double>(problem, begin, end) : fwp::linear<float>(problem, begin, end);
    });
    return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fwp_fairseq, m) {
    m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(fwp_fairseq, CPU, m) { m.impl("few_rows_linear", &few_rows_linear); }
