// ‖G_b‖² of a linear layer. Launchers; the kernels are in cpu/grad_sqnorm.cpp and cuda/grad_sqnorm.cu.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// For T > 1: the direct product, the Gram sum, or the Gram sum of bf16 factors multiplied in pairs. The codes of
// gradclust_fast/ops/_linear.py:ROUTES.
enum class SequenceRoute : int { direct = 0, gram = 1, gram_of_pairs = 2 };

// out [B], float64 for float64 factors, else float32.
GRADCLUST_CPU_LAUNCHER(grad_sqnorm_cpu, const LinearFactors& f, SequenceRoute route, void* out, int threads)

// T = 1 only. Returns an error text, or nullptr.
const char* grad_sqnorm_cuda(const LinearFactors& f, void* out, void* stream);

}  // namespace gradclust
