// ‖G_b‖² of a convolution. Launchers; the kernels are in cpu/conv_sqnorm*.cpp.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// The codes of gradclust_fast/ops/conv_sqnorm.py:ROUTES.
enum class ConvRoute : int { direct = 0, gram = 1, correlate = 2 };

// out [B], float64 for float64 factors, else float32. At least one position and one channel on either side.
GRADCLUST_CPU_LAUNCHER(conv_sqnorm_cpu, const ConvFactors& f, ConvRoute route, void* out, int threads)

}  // namespace gradclust
