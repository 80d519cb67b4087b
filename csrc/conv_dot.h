// Inner products of a convolution's per-example gradients with factored centres. The kernel is in cpu/conv_dot.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// C_k = Σ_r grad[k, r] ⊗ act[k, r]: grad [K, rank, O], act [K, rank, I] (I + 1 with a bias), accumulator's dtype, dense.
struct Centers {
  const void *grad, *act;
  int64_t K, rank;
};

// out [B, K], float64 for float64 factors, else float32. Nothing may be empty. Through filters, or through G_b.
GRADCLUST_CPU_LAUNCHER(conv_dot_cpu, const ConvFactors& f, const Centers& centers, bool filters, GradientRoute route,
                       void* out, int threads)

}  // namespace gradclust
