// The training operators: schemas, and their implementation on the CPU. fwp_fairseq/ops/native.py adds shapes and autograd.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "fast_weights_cpu.h"
#include "fast_weights_training.h"

namespace {

using at::Tensor;
using std::optional;

// Value columns do not depend on each other: divide them where sequences alone cannot keep all threads busy, or where a
// memory is too large for a core's own cache.
void divide_columns(fwp::ScanCall& call) {
    constexpr int64_t kLeast = 16, kMost = 128;
    fwp::Problem& p = call.problem;
    const int64_t threads = at::get_num_threads(), dv = p.dv, streams = call.streams;
    int64_t blocks = (dv + kMost - 1) / kMost;
    const auto uneven = [&] { return streams * blocks < 8 * threads && streams * blocks % threads != 0; };
    while (uneven() && (dv + blocks) / (blocks + 1) >= kLeast) ++blocks;
    if (uneven()) blocks = (dv + kMost - 1) / kMost;
    p.block_columns = (dv + blocks - 1) / blocks;
    p.blocks = (dv + p.block_columns - 1) / p.block_columns;
}

template <class Kernel>
void run(const fwp::ScanCall& call, const Kernel& kernel) {
    const fwp::Problem& p = call.problem;
    const int64_t cost = p.length * p.dk * p.block_columns * 8;
    // Starting threads takes some microseconds.
    at::parallel_for(0, call.streams * p.blocks, std::max<int64_t>(1, 200000 / cost), kernel);
}

std::tuple<Tensor, Tensor, Tensor> scan(
    const optional<Tensor>& q, const Tensor& k, const Tensor& v, const optional<Tensor>& write,
    const optional<Tensor>& erase, const optional<Tensor>& decay, const optional<Tensor>& initial_state,
    bool keep_borders) {
    const bool wide = k.scalar_type() == at::kDouble;
    const auto forward = [&](fwp::ScanCall& call) {
        divide_columns(call);
        run(call, [&](int64_t begin, int64_t end) {
            wide ? fwp::forward<double>(call.problem, begin, end) : fwp::forward<float>(call.problem, begin, end);
        });
    };
    return fwp::scan_with(forward, q, k, v, write, erase, decay, initial_state, keep_borders);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const optional<Tensor>& grad_out, const optional<Tensor>& grad_state, const optional<Tensor>& q, const Tensor& k,
    const Tensor& v, const optional<Tensor>& write, const optional<Tensor>& erase, const optional<Tensor>& decay,
    const optional<Tensor>& initial_state, const Tensor& borders) {
    const bool wide = k.scalar_type() == at::kDouble;
    const auto backward = [&](fwp::ScanCall& call) {
        run(call, [&](int64_t begin, int64_t end) {
            wide ? fwp::backward<double>(call.problem, begin, end) : fwp::backward<float>(call.problem, begin, end);
        });
    };
    return fwp::scan_backward_with(
        divide_columns, backward, grad_out, grad_state, q, k, v, write, erase, decay, initial_state, borders);
}

std::string instruction_set() { return fwp::instruction_set(); }

}  // namespace

TORCH_LIBRARY(fwp_fairseq, m) {
    m.def(
        "scan(Tensor? q, Tensor k, Tensor v, Tensor? write, Tensor? erase, Tensor? decay, Tensor? initial_state, "
        "bool keep_borders) -> (Tensor out, Tensor final_state, Tensor borders)");
    m.def(
        "scan_backward(Tensor? grad_out, Tensor? grad_state, Tensor? q, Tensor k, Tensor v, Tensor? write, "
        "Tensor? erase, Tensor? decay, Tensor? initial_state, Tensor borders) -> "
        "(Tensor q, Tensor k, Tensor v, Tensor write, Tensor erase, Tensor decay, Tensor initial_state)");
    m.def("instruction_set() -> str", &instruction_set);
}

TORCH_LIBRARY_IMPL(fwp_fairseq, CPU, m) {
    m.impl("scan", &scan);
    m.impl("scan_backward", &scan_backward);
}
