// Linear layers by 8-bit integers, for decoding on a CPU.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "fast_weights_cpu.h"

namespace {

using at::Tensor;
using fwp::kPanel;

std::tuple<Tensor, Tensor> pack_integers(const Tensor& weight) {
    TORCH_CHECK_VALUE(
        weight.dim() == 2 && weight.scalar_type() == at::kChar, "weight must be (outputs, inputs), of int8");
    const Tensor rows = weight.contiguous();
    const int64_t outputs = rows.size(0), inputs = rows.size(1);
    const int64_t panels = (outputs + kPanel - 1) / kPanel, fours = (inputs + 3) / 4;
    Tensor packed = at::zeros({panels, fours, kPanel, 4}, rows.options());
    Tensor offset = at::empty({outputs}, rows.options().dtype(at::kInt));
    const int8_t* from = rows.const_data_ptr<int8_t>();
    int8_t* to = packed.data_ptr<int8_t>();
    for (int64_t o = 0; o < outputs; ++o) {
        int32_t sum = 0;
        for (int64_t i = 0; i < inputs; ++i) {
            const int8_t value = from[o * inputs + i];
            to[((o / kPanel * fours + i / 4) * kPanel + o % kPanel) * 4 + i % 4] = value;
            sum += value;
        }
        offset.data_ptr<int32_t>()[o] = (fwp::kSteps + 1) * sum;
    }
    return {packed, offset};
}

Tensor integer_linear(
    const Tensor& x, const Tensor& packed, const Tensor& offset, const Tensor& worth,
    const std::optional<Tensor>& bias) {
    const int64_t inputs = x.size(-1), outputs = worth.numel(), row_bytes = (inputs + 3) / 4 * 4;
    TORCH_CHECK_VALUE(
        x.scalar_type() == at::kFloat && packed.scalar_type() == at::kChar && packed.is_contiguous() &&
            packed.numel() == (outputs + kPanel - 1) / kPanel * kPanel * row_bytes && offset.numel() == outputs &&
            offset.scalar_type() == at::kInt && worth.scalar_type() == at::kFloat,
        "x is ", x.sizes(), " of ", x.scalar_type(), ", it must be (..., inputs) of the packed weight, in float32");
    TORCH_CHECK_VALUE(
        !bias || (bias->numel() == outputs && bias->scalar_type() == at::kFloat), "bias must be (outputs), float32");
    const Tensor input = x.contiguous(), added = bias ? bias->contiguous() : Tensor();
    auto sizes = x.sizes().vec();
    sizes.back() = outputs;
    Tensor y = at::empty(sizes, x.options());
    const int64_t rows = x.numel() / std::max<int64_t>(1, inputs);
    std::vector<uint8_t> integers(rows * row_bytes);
    std::vector<float> steps(rows);
    at::parallel_for(0, rows, 1 + 50000 / (1 + inputs), [&](int64_t begin, int64_t end) {
        fwp::to_integers(input.const_data_ptr<float>() + begin * inputs, end - begin, inputs,
                         integers.data() + begin * row_bytes, steps.data() + begin);
    });
    const fwp::IntegerLinear problem{
        integers.data(), steps.data(), packed.const_data_ptr<int8_t>(), offset.const_data_ptr<int32_t>(),
        worth.const_data_ptr<float>(), bias ? added.const_data_ptr<float>() : nullptr, y.data_ptr<float>(),
        rows, inputs, outputs, outputs,
    };
    // Starting threads takes some microseconds.
    const int64_t panel = kPanel * (1 + inputs) * (1 + rows / 8);
    at::parallel_for(0, (outputs + kPanel - 1) / kPanel, 1 + 300000 / panel, [&](int64_t begin, int64_t end) {
        fwp::integer_linear(problem, begin, end);
    });
    return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fwp_fairseq, m) {
    m.def("pack_integers(Tensor weight) -> (Tensor packed, Tensor offset)");
    m.def("integer_linear(Tensor x, Tensor packed, Tensor offset, Tensor worth, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(fwp_fairseq, CPU, m) {
    m.impl("pack_integers", &pack_integers);
    m.impl("integer_linear", &integer_linear);
}
