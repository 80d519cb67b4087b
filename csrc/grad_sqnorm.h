// ‖G_b‖² of a linear layer. Launchers; the kernels are in cpu/grad_sqnorm.cpp and cuda/grad_sqnorm.cu.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// out [B], float64 for float64 factors, else float32. For T > 1, gram chooses the Gram sum over the direct product.
GRADCLUST_CPU_LAUNCHER(grad_sqnorm_cpu, const LinearFactors& f, bool gram, void* out, int threads)

// T = 1 only. Returns an error text, or nullptr.
const char* grad_sqnorm_cuda(const LinearFactors& f, void* out, void* stream);

}  // namespace gradclust
