// Σ_b G_b and every ‖G_b‖² of a convolution on the CPU, in the FLOPs of the first alone.
//
// v1  conv_moments with the squares of a tile added up in two registers instead of beside its sums: the weight gradient
//     that a backward needs anyway brings the norms along (bench/kernels/bench_conv_weight_sqnorm.py).
#include "conv_weight_sqnorm.h"

#include "conv_unit_sums.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch norms_scratch;

}  // namespace

void conv_weight_sqnorm_cpu(const ConvFactors& f, GradientRoute route, void* weight_grad, void* sqnorm, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    Units<acc> units;
    units.plan(f, route, unit_entries(f));
    acc *const out[1] = {static_cast<acc*>(weight_grad)}, *total = static_cast<acc*>(sqnorm);
    double* norms = norms_scratch.get<double>(units.count * f.B);
    sum_units<in_t, 1>(f, units, out, threads, [&](int64_t unit, acc*) {
      NormSquares<acc> squares;
      squares.norms = norms + unit * f.B;
      return squares;
    });
    for (int64_t b = 0; b < f.B; ++b) {
      double sum = 0;
      for (int64_t unit = 0; unit < units.count; ++unit) sum += norms[unit * f.B + b];
      total[b] = acc(sum);
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
