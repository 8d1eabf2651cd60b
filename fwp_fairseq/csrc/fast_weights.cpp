// The training operators: schemas, and their implementation on the CPU. fwp_fairseq/ops/native.py adds shapes and autograd.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "fast_weights_cpu.h"
#include "fast_weights_tensors.h"

namespace {

using at::Tensor;
using std::optional;

using fwp::gate_of;
using fwp::rows_of;
using fwp::state_type;
using fwp::with_rows;

// The operators as they are called; holds whatever copies the pointers in `problem` need.
struct Call {
    fwp::Problem problem{};
    std::vector<Tensor> held;
    int64_t streams;

    Call(const optional<Tensor>& q, const Tensor& k, const Tensor& v, const optional<Tensor>& write,
         const optional<Tensor>& erase, const optional<Tensor>& decay, const optional<Tensor>& initial_state) {
        TORCH_CHECK_VALUE(k.dim() == 4 && v.dim() == 4, "k and v must have four dimensions, (B, H, L, D)");
        TORCH_CHECK_VALUE(k.sizes().slice(0, 3) == v.sizes().slice(0, 3), "k and v differ in B, H or L");
        TORCH_CHECK_VALUE(!q || q->sizes() == k.sizes(), "q and k differ in shape");
        TORCH_CHECK_VALUE(k.size(2) > 0 && k.size(3) > 0 && v.size(3) > 0, "k or v is empty");
        TORCH_CHECK_VALUE(k.scalar_type() == v.scalar_type() && (!q || q->scalar_type() == k.scalar_type()),
                          "q, k and v differ in type");
        problem.heads = k.size(1), problem.length = k.size(2), problem.dk = k.size(3), problem.dv = v.size(3);
        problem.segments = (problem.length + fwp::kSegment - 1) / fwp::kSegment;
        streams = k.size(0) * k.size(1);
        if (q) problem.q = rows_of(hold(*q));
        problem.k = rows_of(hold(k));
        problem.v = rows_of(hold(v));
        const auto gate = [&](const optional<Tensor>& x, const char* name) -> fwp::Sequence {
            if (!x) return {};
            TORCH_CHECK_VALUE(x->sizes() == k.sizes().slice(0, 3), name, " is not of shape (B, H, L)");
            return gate_of(*x);
        };
        problem.write = gate(write, "write");
        problem.erase = gate(erase, "erase");
        problem.decay = gate(decay, "decay");
        problem.initial_state = state(initial_state, "initial_state");
        divide_columns();
    }

    const Tensor& hold(const Tensor& x) { return held.emplace_back(with_rows(x)); }

    const void* state(const optional<Tensor>& x, const char* name) {
        if (!x) return nullptr;
        const Tensor& k = held[problem.q.data ? 1 : 0];
        TORCH_CHECK_VALUE(x->scalar_type() == state_type(k) &&
                              x->sizes() == at::IntArrayRef({k.size(0), k.size(1), problem.dk, problem.dv}),
                          name, " must be (B, H, Dk, Dv) in the type of the state");
        return held.emplace_back(x->contiguous()).data_ptr();
    }

    // Value columns do not depend on each other: divide them where sequences alone cannot keep all threads busy, or
    // where a memory is too large for a core's own cache.
    void divide_columns() {
        constexpr int64_t kLeast = 16, kMost = 128;
        const int64_t threads = at::get_num_threads(), dv = problem.dv;
        int64_t blocks = (dv + kMost - 1) / kMost;
        const auto uneven = [&] { return streams * blocks < 8 * threads && streams * blocks % threads != 0; };
        while (uneven() && (dv + blocks) / (blocks + 1) >= kLeast) ++blocks;
        if (uneven()) blocks = (dv + kMost - 1) / kMost;
        problem.block_columns = (dv + blocks - 1) / blocks;
        problem.blocks = (dv + problem.block_columns - 1) / problem.block_columns;
    }

    template <class Kernel>
    void run(const Kernel& kernel) const {
        const int64_t items = streams * problem.blocks;
        const int64_t cost = problem.length * problem.dk * problem.block_columns * 8;
        // Starting threads takes some microseconds.
        at::parallel_for(0, items, std::max<int64_t>(1, 200000 / cost), kernel);
    }
};

std::tuple<Tensor, Tensor, Tensor> scan(
    const optional<Tensor>& q, const Tensor& k, const Tensor& v, const optional<Tensor>& write,
    const optional<Tensor>& erase, const optional<Tensor>& decay, const optional<Tensor>& initial_state,
    bool keep_borders) {
    Call call(q, k, v, write, erase, decay, initial_state);
    fwp::Problem& p = call.problem;
    const auto memories = k.options().dtype(state_type(k));
    Tensor out = q ? at::empty(v.sizes(), v.options()) : at::empty({0}, v.options());
    Tensor state = at::empty({k.size(0), k.size(1), p.dk, p.dv}, memories);
    Tensor borders = at::empty({k.size(0), k.size(1), keep_borders ? p.segments - 1 : 0, p.dk, p.dv}, memories);
    if (q) p.out = rows_of(out);
    p.final_state = state.data_ptr();
    if (borders.numel()) p.borders = borders.data_ptr();
    call.run([&](int64_t begin, int64_t end) {
        state.scalar_type() == at::kDouble ? fwp::forward<double>(p, begin, end) : fwp::forward<float>(p, begin, end);
    });
    return {out, state, borders};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const optional<Tensor>& grad_out, const optional<Tensor>& grad_state, const optional<Tensor>& q, const Tensor& k,
    const Tensor& v, const optional<Tensor>& write, const optional<Tensor>& erase, const optional<Tensor>& decay,
    const optional<Tensor>& initial_state, const Tensor& borders) {
    Call call(q, k, v, write, erase, decay, initial_state);
    fwp::Problem& p = call.problem;
    TORCH_CHECK_VALUE(borders.size(2) == p.segments - 1, "borders are not those of the forward pass");
    p.borders = borders.numel() ? call.held.emplace_back(borders.contiguous()).data_ptr() : nullptr;
    p.grad_final_state = call.state(grad_state, "grad_state");
    if (q) {
        const Tensor grad = grad_out ? grad_out->to(v.scalar_type()) : at::zeros(v.sizes(), v.options());
        TORCH_CHECK_VALUE(grad.sizes() == v.sizes(), "grad_out and v differ in shape");
        p.grad_out = rows_of(call.hold(grad));
    }

    // Where columns are divided every block has a share in the gradients of keys, queries and gates: in parts of their
    // own, in the type of accumulation, that are added up in order.
    const bool parts = p.blocks > 1;
    const auto like = [&](const optional<Tensor>& x, at::ScalarType type, bool divided) {
        auto sizes = x ? x->sizes().vec() : std::vector<int64_t>{0};
        divided = divided && x.has_value();
        if (divided) sizes.insert(sizes.begin(), p.blocks);
        return at::empty(sizes, k.options().dtype(divided ? state_type(k) : type));
    };
    Tensor gq = like(q, k.scalar_type(), parts), gk = like(k, k.scalar_type(), parts);
    Tensor gv = like(v, v.scalar_type(), false), gs = like(initial_state, state_type(k), false);
    Tensor gw = like(write, state_type(k), parts), ge = like(erase, state_type(k), parts);
    Tensor gd = like(decay, state_type(k), parts);
    if (q) p.grad_q = rows_of(gq);
    p.grad_k = rows_of(gk);
    p.grad_v = rows_of(gv);
    if (write) p.grad_write = gate_of(gw);
    if (erase) p.grad_erase = gate_of(ge);
    if (decay) p.grad_decay = gate_of(gd);
    if (initial_state) p.grad_initial_state = gs.data_ptr();
    call.run([&](int64_t begin, int64_t end) {
        k.scalar_type() == at::kDouble ? fwp::backward<double>(p, begin, end) : fwp::backward<float>(p, begin, end);
    });
    if (parts) {
        const auto add_up = [](Tensor& x, at::ScalarType type) {
            if (x.numel()) x = x.sum(0).to(type);
        };
        add_up(gq, k.scalar_type()), add_up(gk, k.scalar_type());
        for (Tensor* gate : {&gw, &ge, &gd}) add_up(*gate, state_type(k));
    }
    return {gq, gk, gv, gw, ge, gd, gs};
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
