// The kernels for a GPU as the binding calls them. Nothing of torch here.

#pragma once

#include <cuda_runtime_api.h>

#include "fast_weights.h"

namespace fwp::gpu {

// What a device has; filled in by whoever launches.
struct Device {
    int multiprocessors = 0;
    int64_t shared_bytes = 0;  // that a block may ask for
};

// How a scan is divided into blocks: tiles of value columns, for each sequence.
struct ScanLaunch {
    int columns = 0;  // of a tile; 0: no kernel fits this problem and device
    int64_t tiles = 0, blocks = 0, shared_bytes = 0;
    int64_t workspace = 0;  // elements, in the type of accumulation; of a backward pass only
};

// `wide`: accumulation is in double, for tensors of double.
ScanLaunch plan_scan(const Problem& problem, int64_t streams, bool wide, bool backward, const Device& device);
cudaError_t scan(
    const Problem& problem, const ScanLaunch& plan, bool wide, bool backward, void* workspace, cudaStream_t stream);

// `scratch`: that many ints, where the step has order or places, else null.
int64_t step_scratch(const Step& problem);
cudaError_t step(const Step& problem, bool wide, int* scratch, cudaStream_t stream);
cudaError_t read(const Read& problem, bool wide, cudaStream_t stream);

// The largest Dk.
int64_t largest_key(bool wide);

}  // namespace fwp::gpu
