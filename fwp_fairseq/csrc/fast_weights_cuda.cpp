// The operators' implementation on a GPU: kernels are launched on the current stream and never waited for.

#include "fast_weights_cuda.h"

#include <ATen/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "fast_weights_decoding.h"
#include "fast_weights_training.h"

namespace {

using at::Tensor;
using std::optional;

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it is said here: whoever asks next has nothing to do with it
    TORCH_CHECK(false, "the kernel of fast weights was not launched: ", cudaGetErrorString(error));
}

// Pointers say nothing of where they point.
template <class... Tensors>
void check_devices(const Tensor& first, const Tensors&... others) {
    const auto here = [&](const optional<Tensor>& x) { return !x || x->device() == first.device(); };
    TORCH_CHECK_VALUE((here(others) && ...), "tensors are on several devices");
}

fwp::gpu::Device capacity_of(const Tensor& x) {
    int multiprocessors = 0, shared_bytes = 0;
    const int index = x.get_device();
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    return {multiprocessors, shared_bytes};
}

// Dk is what decides whether there is a kernel.
void check_key(int64_t dk, bool wide) {
    const int64_t largest = fwp::gpu::largest_key(wide);
    TORCH_CHECK_VALUE(dk <= largest, "keys have ", dk, " features, on a GPU they can have ", largest,
                      wide ? " in float64" : "");
}

fwp::gpu::ScanLaunch plan(fwp::ScanCall& call, const Tensor& k, bool backward) {
    const bool wide = k.scalar_type() == at::kDouble;
    check_key(call.problem.dk, wide);
    const auto launch = fwp::gpu::plan_scan(call.problem, call.streams, wide, backward, capacity_of(k));
    TORCH_CHECK(launch.columns, "this GPU has too little shared memory for keys with ", call.problem.dk, " features");
    return launch;
}

std::tuple<Tensor, Tensor, Tensor> scan(
    const optional<Tensor>& q, const Tensor& k, const Tensor& v, const optional<Tensor>& write,
    const optional<Tensor>& erase, const optional<Tensor>& decay, const optional<Tensor>& initial_state,
    bool keep_borders) {
    check_devices(k, q, v, write, erase, decay, initial_state);
    const at::DeviceGuard guard(k.device());
    const auto forward = [&](fwp::ScanCall& call) {
        if (!call.streams) return;
        const auto stream = c10::cuda::getCurrentCUDAStream();
        check(fwp::gpu::scan(
            call.problem, plan(call, k, false), k.scalar_type() == at::kDouble, false, nullptr, stream));
    };
    return fwp::scan_with(forward, q, k, v, write, erase, decay, initial_state, keep_borders);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const optional<Tensor>& grad_out, const optional<Tensor>& grad_state, const optional<Tensor>& q, const Tensor& k,
    const Tensor& v, const optional<Tensor>& write, const optional<Tensor>& erase, const optional<Tensor>& decay,
    const optional<Tensor>& initial_state, const Tensor& borders) {
    check_devices(k, grad_out, grad_state, q, v, write, erase, decay, initial_state, borders);
    const at::DeviceGuard guard(k.device());
    fwp::gpu::ScanLaunch launch;
    const auto divide = [&](fwp::ScanCall& call) {
        launch = plan(call, k, true);
        call.problem.blocks = launch.tiles;
    };
    const auto backward = [&](fwp::ScanCall& call) {
        if (!call.streams) return;
        const Tensor workspace = at::empty({launch.workspace}, k.options().dtype(fwp::state_type(k)));
        const auto stream = c10::cuda::getCurrentCUDAStream();
        check(fwp::gpu::scan(
            call.problem, launch, k.scalar_type() == at::kDouble, true, workspace.data_ptr(), stream));
    };
    return fwp::scan_backward_with(
        divide, backward, grad_out, grad_state, q, k, v, write, erase, decay, initial_state, borders);
}

std::tuple<Tensor, Tensor> step(
    const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& write, const optional<Tensor>& erase,
    const optional<Tensor>& decay, const Tensor& state, const optional<Tensor>& normalizer,
    const optional<Tensor>& order, const optional<Tensor>& places, const optional<Tensor>& projection,
    std::string_view feature_map, int64_t nu, std::string_view key_normalization) {
    check_devices(k, q, v, write, erase, decay, state, normalizer, order, places, projection);
    const at::DeviceGuard guard(k.device());
    const fwp::StepCall call(
        q, k, v, write, erase, decay, state, normalizer, order, places, projection, feature_map, nu,
        key_normalization);
    const fwp::Step& p = call.problem;
    const bool wide = state.scalar_type() == at::kDouble;
    check_key(p.features.dk, wide);
    if (p.rows && p.heads && p.dv) {
        const Tensor scratch = at::empty({fwp::gpu::step_scratch(p)}, k.options().dtype(at::kInt));
        int* ints = scratch.numel() ? scratch.data_ptr<int>() : nullptr;
        check(fwp::gpu::step(p, wide, ints, c10::cuda::getCurrentCUDAStream()));
    }
    return {call.out, call.new_places};
}

Tensor read_memory(
    const Tensor& q, const Tensor& state, const optional<Tensor>& normalizer, const optional<Tensor>& projection,
    std::string_view feature_map, int64_t nu, std::string_view key_normalization) {
    check_devices(q, state, normalizer, projection);
    const at::DeviceGuard guard(q.device());
    const fwp::ReadCall call(q, state, normalizer, projection, feature_map, nu, key_normalization);
    const bool wide = state.scalar_type() == at::kDouble;
    check_key(call.problem.features.dk, wide);
    if (call.out.numel()) check(fwp::gpu::read(call.problem, wide, c10::cuda::getCurrentCUDAStream()));
    return call.out;
}

}  // namespace

// Only a library with the kernels for a GPU has this operator.
TORCH_LIBRARY_FRAGMENT(fwp_fairseq, m) { m.def("largest_cuda_key(bool float64) -> int", &fwp::gpu::largest_key); }

TORCH_LIBRARY_IMPL(fwp_fairseq, CUDA, m) {
    m.impl("scan", &scan);
    m.impl("scan_backward", &scan_backward);
    m.impl("step", &step);
    m.impl("read", &read_memory);
}
