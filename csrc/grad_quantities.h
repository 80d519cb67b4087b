// Squared norm, sketch and inner products of a linear layer's per-example gradients in one read of the factors.
// grad_sketch and grad_dot are the same kernel asked for one thing. The kernel is in cpu/grad_quantities.cpp.
#pragma once
#include "grad_sqnorm.h"
#include "launch.h"
#include "types.h"

namespace gradclust {

// What is asked, and where it goes; a null output is not asked. Everything is dense, row-major and of the accumulator's
// type. I' = I, or I + 1 with a bias.
struct Questions {
  void* sqnorm;             // [B]
  SequenceRoute route;      // of the norms, for T > 1
  void* sketch;             // [B, P, Q]
  const void* left;         // [O, P]; null is the identity, P = O
  const void* right;        // [I', Q]; null is the identity, Q = I'
  int64_t P, Q;
  void* dot;                // [B, K]
  const void* center_grad;  // [K, rank, O]
  const void* center_act;   // [K, rank, I']
  int64_t K, rank;
};

GRADCLUST_CPU_LAUNCHER(grad_quantities_cpu, const LinearFactors& f, const Questions& q, int threads)

}  // namespace gradclust
