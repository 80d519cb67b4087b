// Sums of a convolution's per-example gradients and of their squares. The kernels are in
// cpu/conv_moments.cpp and cuda/conv_moments.cu.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// first, second [O, I], or [O, I + 1] with a bias; float64 for float64 factors, else float32. Nothing may be empty.
GRADCLUST_CPU_LAUNCHER(conv_moments_cpu, const ConvFactors& f, GradientRoute route, void* first, void* second,
                       int threads)

// The same without the bias's column, which is left as it is; partial [conv_moments_cuda_slices(…), 2, O, I] is a
// workspace. Returns an error text, or nullptr.
const char* conv_moments_cuda(const ConvFactors& f, ConvCudaRoute route, void* partial, void* first, void* second,
                              void* stream);
int64_t conv_moments_cuda_slices(const ConvFactors& f, ConvCudaRoute route);

// Whether the current device would fetch the tiles by bulk tensor copies.
bool conv_moments_cuda_in_bulk(const ConvFactors& f, ConvCudaRoute route);

}  // namespace gradclust
