// Σ_b G_b and Σ_b G_b∘G_b of a convolution on the CPU: both sums at once, tile by tile.
#include "conv_moments.h"

#include "conv_unit_sums.h"

namespace gradclust::GRADCLUST_ISA {

void conv_moments_cpu(const ConvFactors& f, GradientRoute route, void* first, void* second, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    Units<acc> units;
    units.plan(f, route, unit_entries(f));
    acc* const out[2] = {static_cast<acc*>(first), static_cast<acc*>(second)};
    sum_units<in_t, 2>(f, units, out, threads, [&](int64_t, acc* squares) { return EntrySquares<acc>{squares}; });
  });
}

}  // namespace gradclust::GRADCLUST_ISA
