// ‖G_b‖² of a convolution on the CPU: one example a task, all of its operands in that core's cache.
#include "conv_sqnorm.h"

#include "conv_correlate.h"
#include "conv_direct.h"
#include "conv_gram.h"

namespace gradclust::GRADCLUST_ISA {

void conv_sqnorm_cpu(const ConvFactors& f, ConvRoute route, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    acc* sqnorm = static_cast<acc*>(out);
    if (route == ConvRoute::gram) {
      GramPlan plan;
      plan_gram<acc>(f, plan);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sqnorm[b] = gram_sqnorm<in_t>(f, plan, b);
    } else if (route == ConvRoute::correlate) {
      CorrelatePlan plan;
      plan_correlate<acc>(f, plan);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sqnorm[b] = correlate_sqnorm<in_t>(f, plan, b);
    } else {
      DirectPlan plan;
      plan_direct<acc>(f, plan);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sqnorm[b] = direct_sqnorm<in_t>(f, plan, b);
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
