// ‖G_b‖² of a convolution. Launchers; the kernels are in cpu/conv_sqnorm.cpp and cuda/conv_sqnorm.cu.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// The codes of gradclust_fast/ops/conv_sqnorm.py:ROUTES.
enum class ConvRoute : int { direct = 0, gram = 1, correlate = 2 };

// out [B], float64 for float64 factors, else float32. At least one position and one channel on either side.
GRADCLUST_CPU_LAUNCHER(conv_sqnorm_cpu, const ConvFactors& f, ConvRoute route, void* out, int threads)

// Numbers of the accumulator's type that the workspace `partial` holds for each example; 0 where it is not needed.
int64_t conv_sqnorm_cuda_partials(const ConvFactors& f, ConvCudaRoute route);

// Whether the current device would fetch the tiles by bulk tensor copies.
bool conv_sqnorm_cuda_in_bulk(const ConvFactors& f, ConvCudaRoute route);

// out [B] without the bias. At least one example, position and channel on either side. Returns an error text, or nullptr.
const char* conv_sqnorm_cuda(const ConvFactors& f, ConvCudaRoute route, void* partial, void* out, void* stream);

}  // namespace gradclust
