// Two-sided projection of a convolution's per-example gradients. The kernel is in cpu/conv_sketch.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// The codes of gradclust_fast/ops/conv_sketch.py:ROUTES.
enum class SketchRoute : int { filters = 0, mixed = 1, direct = 2, correlate = 3 };

// left [O, P] and right [I, Q] ([I + 1, Q] with a bias) in the accumulator's dtype, dense; null is the identity.
struct Sides {
  const void *left, *right;
  int64_t P, Q;
};

// out [B, P, Q], float64 for float64 factors, else float32. Nothing may be empty. Route filters needs right, mixed left.
GRADCLUST_CPU_LAUNCHER(conv_sketch_cpu, const ConvFactors& f, const Sides& sides, SketchRoute route, void* out,
                       int threads)

}  // namespace gradclust
