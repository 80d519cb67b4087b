// What the processor can do, measured by the benchmarks; no op uses it.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// Multiply-adds on registers alone, on every thread; flops becomes the number of their operations.
GRADCLUST_CPU_LAUNCHER(fma_peak_cpu, int64_t rounds, double* sink, int64_t* flops, int threads)

}  // namespace gradclust
