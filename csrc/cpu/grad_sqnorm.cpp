// ‖G_b‖² on the CPU.
//
// v1  T = 1: ‖G_b‖² = ‖act_b‖²‖grad_b‖². One read of both rows, four independent accumulators: memory-bound.
#include "grad_sqnorm.h"

#include "isa.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// Four vector accumulators hide the FMA latency; half types convert through a small stack buffer.
template <typename in_t> acc_t<in_t> row_sqnorm(const in_t* row, int64_t n) {
  using acc = acc_t<in_t>;
  constexpr int L = LANES<acc>, STEP = 4 * L;
  vec_t<acc> sum[4] = {};
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) {
    acc buffer[STEP];
    for (int j = 0; j < STEP; ++j) buffer[j] = load(row[i + j]);
    for (int j = 0; j < 4; ++j) {
      vec_t<acc> x = load_vec(buffer + j * L);
      sum[j] += x * x;
    }
  }
  acc total = sum_lanes<acc>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += load(row[i]) * load(row[i]);
  return total;
}

template <typename in_t> void grad_sqnorm_rank1_kernel(const LinearFactors& f, acc_t<in_t>* out, int threads) {
  const in_t* act = static_cast<const in_t*>(f.act);
  const in_t* grad = static_cast<const in_t*>(f.grad);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < f.B; ++b) {
    acc_t<in_t> a = row_sqnorm(act + b * f.act_stride_b, f.I) + (f.bias ? 1 : 0);
    out[b] = a * row_sqnorm(grad + b * f.grad_stride_b, f.O);
  }
}

}  // namespace

void grad_sqnorm_cpu(const LinearFactors& f, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    grad_sqnorm_rank1_kernel<in_t>(f, static_cast<acc_t<in_t>*>(out), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
