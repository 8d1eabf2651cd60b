// What launching a kernel takes.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fwp::gpu {

// Shared memory above 48 KB has to be asked for. Blocks are in one row.
template <class Kernel, class... Arguments>
cudaError_t launch(
    Kernel* kernel, int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fwp::gpu
