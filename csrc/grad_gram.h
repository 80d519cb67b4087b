// All pairwise inner products of a linear layer's per-example gradients. The kernel is in cpu/grad_gram.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// out [B, B], float64 for float64 factors, else float32.
GRADCLUST_CPU_LAUNCHER(grad_gram_cpu, const LinearFactors& f, void* out, int threads)

}  // namespace gradclust
