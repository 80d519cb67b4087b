// The processor's floating-point peak: independent float32 multiply-adds on registers alone.
//
// v1  Twelve accumulators cover the latency of two multiply-add units (4 to 5 cycles each) and fit the 16 registers of
//     AVX2 beside the two constants. The ceiling of `gradclust bench`.
#include "ceilings.h"
#include "isa.h"

namespace gradclust::GRADCLUST_ISA {

void fma_peak_cpu(int64_t rounds, double* sink, int64_t* flops, int threads) {
  constexpr int CHAINS = 12;
  using vec = vec_t<float>;
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    vec chain[CHAINS];
    for (int i = 0; i < CHAINS; ++i) chain[i] = vec{} + float(i);
    // towards 1, and never a denormal; volatile, or the compiler computes the result
    volatile float shrink = 0.999f, lift = 0.001f;
    const vec times = vec{} + float(shrink), plus = vec{} + float(lift);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
      for (int i = 0; i < CHAINS; ++i) chain[i] = chain[i] * times + plus;
    for (int i = 0; i < CHAINS; ++i) total += sum_lanes<float>(chain[i]);
  }
  *sink = total;
  *flops = 2 * int64_t(LANES<float>) * CHAINS * rounds * threads;
}

}  // namespace gradclust::GRADCLUST_ISA
