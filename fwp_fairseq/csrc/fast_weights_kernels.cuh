// The kernels for a GPU. Nothing of torch here; fast_weights_cuda.cu gives them to torch.

#pragma once

#include "fast_weights_scan.cuh"
#include "fast_weights_step.cuh"
