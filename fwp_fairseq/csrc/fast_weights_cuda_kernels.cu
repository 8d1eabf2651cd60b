// The kernels for a GPU, instantiated.

#include "fast_weights_scan.cuh"
#include "fast_weights_step.cuh"

namespace fwp::gpu {

ScanLaunch plan_scan(const Problem& problem, int64_t streams, bool wide, bool backward, const Device& device) {
    return wide ? plan_scan<double>(streams, problem.dk, problem.dv, backward, device)
                : plan_scan<float>(streams, problem.dk, problem.dv, backward, device);
}

cudaError_t scan(
    const Problem& problem, const ScanLaunch& plan, bool wide, bool backward, void* workspace, cudaStream_t stream) {
    return wide ? launch_scan<double>(problem, plan, backward, workspace, stream)
                : launch_scan<float>(problem, plan, backward, workspace, stream);
}

int64_t step_scratch(const Step& problem) {
    return problem.new_places ? Descent::elements(problem.rows, problem.slots) : 0;
}

cudaError_t step(const Step& problem, bool wide, int* scratch, cudaStream_t stream) {
    return wide ? launch_step<double>(problem, scratch, stream) : launch_step<float>(problem, scratch, stream);
}

cudaError_t read(const Read& problem, bool wide, cudaStream_t stream) {
    return wide ? launch_read<double>(problem, stream) : launch_read<float>(problem, stream);
}

int64_t largest_key(bool wide) { return wide ? kLargest<double> : kLargest<float>; }

}  // namespace fwp::gpu
