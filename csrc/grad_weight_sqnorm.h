// A linear layer's weight gradient and ‖G_b‖² of every example, together. The kernel is in cpu/grad_weight_sqnorm.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// weight_grad [O, I], or [O, I + 1] with a bias; sqnorm [B]; float64 for float64 factors, else float32. Nothing may be
// empty.
GRADCLUST_CPU_LAUNCHER(grad_weight_sqnorm_cpu, const LinearFactors& f, void* weight_grad, void* sqnorm, int threads)

}  // namespace gradclust
