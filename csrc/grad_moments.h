// Sums of a linear layer's per-example gradients and of their squares. The kernel is in cpu/grad_moments.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// first, second [O, I], or [O, I + 1] with a bias; float64 for float64 factors, else float32.
GRADCLUST_CPU_LAUNCHER(grad_moments_cpu, const LinearFactors& f, void* first, void* second, int threads)

}  // namespace gradclust
