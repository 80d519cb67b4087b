// ⟨G_b, G_c⟩ of a convolution on the CPU.
//
// v1  Through G: a unit of every example's G_b is made by the direct kernel and stored, about 8 MB in all, and its
//     products are added to the lower triangle while it is in the last cache: 2·B·T·I·O + B²·I·O FLOP.
// v2  Few positions: from products of positions, conv_gram_positions.h (bench/kernels/bench_conv_gram.py).
#include "conv_gram.h"

#include "conv_gram_positions.h"
#include "conv_products.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch scratch;

constexpr int64_t STORED_BYTES = 8 << 20;

template <typename in_t>
void gram_by_gradient(const ConvFactors& f, GradientRoute route, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
  const int64_t B = f.B;
  Units<acc> units;
  units.plan(f, route, STORED_BYTES / int64_t(sizeof(acc)) / B);
  const int64_t stride = round_up(units.room(), 16) | 16;
  Products<acc> products{B, B, nullptr};
  acc* stored = scratch.get<acc>(B * stride + products.size());
  products.sums = stored + B * stride;
  memset(products.sums, 0, size_t(products.size()) * sizeof(acc));
#pragma omp parallel num_threads(threads)
  {
    for (int64_t n = 0; n < units.count; ++n) {
      const Unit unit = units.at(n);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < B; ++b) unit_gradient<in_t>(f, units, unit, b, stored + b * stride);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < products.tasks(); ++task)
        products.template add<true>(task, stored, stride, stored, stride, units.size(unit));
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c <= b; ++c) out[b * B + c] = products.at(b, c);
  }
}

}  // namespace

void conv_gram_cpu(const ConvFactors& f, bool positions, GradientRoute route, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    acc_t<in_t>* gram = static_cast<acc_t<in_t>*>(out);
    if (positions)
      gram_by_positions<in_t>(f, gram, threads);
    else
      gram_by_gradient<in_t>(f, route, gram, threads);
    for (int64_t b = 0; b < f.B; ++b)
      for (int64_t c = b + 1; c < f.B; ++c) gram[b * f.B + c] = gram[c * f.B + b];
  });
}

}  // namespace gradclust::GRADCLUST_ISA
