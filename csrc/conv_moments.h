// Sums of a convolution's per-example gradients and of their squares. The kernel is in cpu/conv_moments.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// first, second [O, I], or [O, I + 1] with a bias; float64 for float64 factors, else float32. Nothing may be empty.
GRADCLUST_CPU_LAUNCHER(conv_moments_cpu, const ConvFactors& f, GradientRoute route, void* first, void* second,
                       int threads)

}  // namespace gradclust
