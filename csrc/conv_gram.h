// Pairwise inner products of a convolution's per-example gradients. The kernel is in cpu/conv_gram.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// out [B, B], float64 for float64 factors, else float32. Nothing may be empty. From products of positions, or through G_b.
GRADCLUST_CPU_LAUNCHER(conv_gram_cpu, const ConvFactors& f, bool positions, GradientRoute route, void* out, int threads)

}  // namespace gradclust
