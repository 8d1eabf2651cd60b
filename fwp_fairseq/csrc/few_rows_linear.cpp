// Linear layers with few rows, for decoding on a CPU.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "fast_weights_cpu.h"
#include "fast_weights_tensors.h"

namespace {

using at::Tensor;

// One matrix and what its outputs are; holds what the pointers of the problem point to.
struct Layer {
    Layer(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
        const at::ScalarType type = x.scalar_type();
        TORCH_CHECK_VALUE(
            x.dim() > 0 && weight.dim() == 2 && x.size(-1) == weight.size(1), "x is ", x.sizes(), " and weight ",
            weight.sizes(), ", they must be (..., inputs) and (outputs, inputs)");
        TORCH_CHECK_VALUE(weight.scalar_type() == type, "weight is ", weight.scalar_type(), ", x is ", type);
        const bool biased = bias && bias->defined();
        TORCH_CHECK_VALUE(
            !biased || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type),
            "bias must be (outputs), ", type);
        matrix = fwp::with_rows(weight);
        if (biased) added = bias->contiguous();
        auto sizes = x.sizes().vec();
        const int64_t inputs = sizes.back(), rows = c10::multiply_integers(sizes.begin(), sizes.end() - 1);
        sizes.back() = weight.size(0);
        y = x.new_empty(sizes);
        problem = {
            x.data_ptr(), matrix.data_ptr(), biased ? added.data_ptr() : nullptr,
            y.data_ptr(), rows,              inputs,
            sizes.back(), matrix.stride(0), sizes.back(),
        };
    }

    Tensor matrix, added, y;
    fwp::Linear problem;
};

// Outputs of all layers are one range, which the threads share.
void compute(const Tensor& x, const Layer* layers, size_t count) {
    int64_t outputs = 0;
    for (size_t i = 0; i < count; ++i) outputs += layers[i].problem.outputs;
    if (outputs == 0 || layers[0].problem.rows == 0) return;
    // Starting threads takes some microseconds, a weight less than a nanosecond.
    const int64_t grain = std::max<int64_t>(1, 50000 / std::max<int64_t>(1, x.size(-1)));
    at::parallel_for(0, outputs, grain, [&](int64_t begin, int64_t end) {
        for (size_t i = 0; i < count; ++i) {
            const fwp::Linear& p = layers[i].problem;
            const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, p.outputs);
            if (from < to)
                x.scalar_type() == at::kDouble ? fwp::linear<double>(p, from, to) : fwp::linear<float>(p, from, to);
            begin -= p.outputs, end -= p.outputs;
        }
    });
}

Tensor with_adjacent_rows(const Tensor& x) {
    const at::ScalarType type = x.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "x is ", type, ", it must be float32 or float64");
    return x.contiguous();
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const Tensor input = with_adjacent_rows(x);
    const Layer layer(input, weight, bias);
    compute(input, &layer, 1);
    return layer.y;
}

std::vector<Tensor> few_rows_linears(
    const Tensor& x, at::TensorList weights, const c10::List<std::optional<Tensor>>& biases) {
    TORCH_CHECK_VALUE(
        weights.size() == biases.size(), "there are ", weights.size(), " weights and ", biases.size(), " biases");
    const Tensor input = with_adjacent_rows(x);
    std::vector<Layer> layers;
    layers.reserve(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) layers.emplace_back(input, weights[i], biases.get(i));
    compute(input, layers.data(), layers.size());
    std::vector<Tensor> outputs;
    for (const Layer& layer : layers) outputs.push_back(layer.y);
    return outputs;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fwp_fairseq, m) {
    m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
    m.def("few_rows_linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fwp_fairseq, CPU, m) {
    m.impl("few_rows_linear", &few_rows_linear);
    m.impl("few_rows_linears", &few_rows_linears);
}
