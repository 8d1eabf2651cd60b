// The arguments of the training operators, checked and turned into what the kernels take, for any device.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "fast_weights_tensors.h"

namespace fwp {

// The sequences and gates of a call; holds whatever copies the pointers in `problem` need.
struct ScanCall {
    Problem problem{};
    std::vector<at::Tensor> held;
    int64_t streams;

    ScanCall(
        const std::optional<at::Tensor>& q, const at::Tensor& k, const at::Tensor& v,
        const std::optional<at::Tensor>& write, const std::optional<at::Tensor>& erase,
        const std::optional<at::Tensor>& decay, const std::optional<at::Tensor>& initial_state) {
        TORCH_CHECK_VALUE(k.dim() == 4 && v.dim() == 4, "k and v must have four dimensions, (B, H, L, D)");
        TORCH_CHECK_VALUE(k.sizes().slice(0, 3) == v.sizes().slice(0, 3), "k and v differ in B, H or L");
        TORCH_CHECK_VALUE(!q || q->sizes() == k.sizes(), "q and k differ in shape");
        TORCH_CHECK_VALUE(k.size(2) > 0 && k.size(3) > 0 && v.size(3) > 0, "k or v is empty");
        TORCH_CHECK_VALUE(k.scalar_type() == v.scalar_type() && (!q || q->scalar_type() == k.scalar_type()),
                          "q, k and v differ in type");
        problem.heads = k.size(1), problem.length = k.size(2), problem.dk = k.size(3), problem.dv = v.size(3);
        problem.segments = (problem.length + kSegment - 1) / kSegment;
        streams = k.size(0) * k.size(1);
        if (q) problem.q = rows_of(hold(*q));
        problem.k = rows_of(hold(k));
        problem.v = rows_of(hold(v));
        const auto gate = [&](const std::optional<at::Tensor>& x, const char* name) -> Sequence {
            if (!x) return {};
            TORCH_CHECK_VALUE(x->sizes() == k.sizes().slice(0, 3), name, " is not of shape (B, H, L)");
            return gate_of(*x);
        };
        problem.write = gate(write, "write");
        problem.erase = gate(erase, "erase");
        problem.decay = gate(decay, "decay");
        problem.initial_state = state(initial_state, "initial_state");
    }

    const at::Tensor& hold(const at::Tensor& x) { return held.emplace_back(with_rows(x)); }

    const void* state(const std::optional<at::Tensor>& x, const char* name) {
        if (!x) return nullptr;
        const at::Tensor& k = held[problem.q.data ? 1 : 0];
        TORCH_CHECK_VALUE(x->scalar_type() == state_type(k) &&
                              x->sizes() == at::IntArrayRef({k.size(0), k.size(1), problem.dk, problem.dv}),
                          name, " must be (B, H, Dk, Dv) in the type of the state");
        return held.emplace_back(x->contiguous()).data_ptr();
    }
};

// Calls run(call) for the operator `scan`.
template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor> scan_with(
    const Run& run, const std::optional<at::Tensor>& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& write, const std::optional<at::Tensor>& erase,
    const std::optional<at::Tensor>& decay, const std::optional<at::Tensor>& initial_state, bool keep_borders) {
    ScanCall call(q, k, v, write, erase, decay, initial_state);
    Problem& p = call.problem;
    const auto memories = k.options().dtype(state_type(k));
    at::Tensor out = q ? at::empty(v.sizes(), v.options()) : at::empty({0}, v.options());
    at::Tensor state = at::empty({k.size(0), k.size(1), p.dk, p.dv}, memories);
    at::Tensor borders = at::empty({k.size(0), k.size(1), keep_borders ? p.segments - 1 : 0, p.dk, p.dv}, memories);
    if (q) p.out = rows_of(out);
    p.final_state = state.data_ptr();
    if (borders.numel()) p.borders = borders.data_ptr();
    run(call);
    return {out, state, borders};
}

// Calls divide(call), which says into how many blocks value columns are divided, and run(call) for `scan_backward`.
template <class Divide, class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_backward_with(
    const Divide& divide, const Run& run, const std::optional<at::Tensor>& grad_out,
    const std::optional<at::Tensor>& grad_state, const std::optional<at::Tensor>& q, const at::Tensor& k,
    const at::Tensor& v, const std::optional<at::Tensor>& write, const std::optional<at::Tensor>& erase,
    const std::optional<at::Tensor>& decay, const std::optional<at::Tensor>& initial_state,
    const at::Tensor& borders) {
    ScanCall call(q, k, v, write, erase, decay, initial_state);
    Problem& p = call.problem;
    TORCH_CHECK_VALUE(borders.size(2) == p.segments - 1, "borders are not those of the forward pass");
    p.borders = borders.numel() ? call.held.emplace_back(borders.contiguous()).data_ptr() : nullptr;
    p.grad_final_state = call.state(grad_state, "grad_state");
    if (q) {
        const at::Tensor grad = grad_out ? grad_out->to(v.scalar_type()) : at::zeros(v.sizes(), v.options());
        TORCH_CHECK_VALUE(grad.sizes() == v.sizes(), "grad_out and v differ in shape");
        p.grad_out = rows_of(call.hold(grad));
    }
    divide(call);

    // Where columns are divided every block has a share in the gradients of keys, queries and gates: in parts of their
    // own, in the type of accumulation, that are added up in order.
    const bool parts = p.blocks > 1;
    const auto like = [&](const std::optional<at::Tensor>& x, at::ScalarType type, bool divided) {
        auto sizes = x ? x->sizes().vec() : std::vector<int64_t>{0};
        divided = divided && x.has_value();
        if (divided) sizes.insert(sizes.begin(), p.blocks);
        return at::empty(sizes, k.options().dtype(divided ? state_type(k) : type));
    };
    at::Tensor gq = like(q, k.scalar_type(), parts), gk = like(k, k.scalar_type(), parts);
    at::Tensor gv = like(v, v.scalar_type(), false), gs = like(initial_state, state_type(k), false);
    at::Tensor gw = like(write, state_type(k), parts), ge = like(erase, state_type(k), parts);
    at::Tensor gd = like(decay, state_type(k), parts);
    if (q) p.grad_q = rows_of(gq);
    p.grad_k = rows_of(gk);
    p.grad_v = rows_of(gv);
    if (write) p.grad_write = gate_of(gw);
    if (erase) p.grad_erase = gate_of(ge);
    if (decay) p.grad_decay = gate_of(gd);
    if (initial_state) p.grad_initial_state = gs.data_ptr();
    run(call);
    if (parts) {
        const auto add_up = [](at::Tensor& x, at::ScalarType type) {
            if (x.numel()) x = x.sum(0).to(type);
        };
        add_up(gq, k.scalar_type()), add_up(gk, k.scalar_type());
        for (at::Tensor* gate : {&gw, &ge, &gd}) add_up(*gate, state_type(k));
    }
    return {gq, gk, gv, gw, ge, gd, gs};
}

}  // namespace fwp
