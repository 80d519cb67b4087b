// ‖G_b‖² on the CPU.
//
// v1  T = 1: ‖G_b‖² = ‖act_b‖²‖grad_b‖². One read of both rows, four independent accumulators: memory-bound.
// v2  Sequences: each example is packed once into panels of register-tile width. Gram: both T × T products tile by tile
//     over the lower triangle, multiplied and summed while a strip is in cache; direct: G strip by strip. Half the FLOPs
//     of two full Gram products, no page faults on T × T temporaries (bench/kernels/bench_grad_sqnorm.py).
// v3  Both factors are centred, with sums in double: near-constant activations or gradients keep their digits. Where
//     squares would leave the range of float32 although the norm does not, the example is done again, scaled.
// v4  The Gram sum is first taken as it is, and again with centred factors where it cancelled: 0.57 to 0.76 of the time at
//     T = 8, 0.75 to 0.78 at T = 32. Pairs of bf16 stay pairs where the processor multiplies them.
#include "grad_sqnorm.h"

#include "sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch scratch;

template <typename in_t> void grad_sqnorm_rank1_kernel(const LinearFactors& f, acc_t<in_t>* out, int threads) {
  const in_t* act = static_cast<const in_t*>(f.act);
  const in_t* grad = static_cast<const in_t*>(f.grad);
  constexpr int64_t ROWS = 16;  // of one factor after the other: long streams suit the prefetcher
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b0 = 0; b0 < f.B; b0 += ROWS) {
    int64_t end = min_of(b0 + ROWS, f.B);
    double act_sqnorm[ROWS];
    for (int64_t b = b0; b < end; ++b) act_sqnorm[b - b0] = row_sqnorm(act + b * f.act_stride_b, f.I);
    for (int64_t b = b0; b < end; ++b) {
      const in_t *a = act + b * f.act_stride_b, *d = grad + b * f.grad_stride_b;
      out[b] = acc_t<in_t>(sqnorm_rank1(act_sqnorm[b - b0], row_sqnorm(d, f.O), a, d, f.I, f.O, f.bias, scratch));
    }
  }
}

template <typename in_t>
void grad_sqnorm_sequence_kernel(const LinearFactors& f, SequenceRoute route, acc_t<in_t>* out, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < f.B; ++b) {
    const in_t* act = static_cast<const in_t*>(f.act) + b * f.act_stride_b;
    const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
    out[b] = sqnorm_sequence(route, act, f.act_stride_t, grad, f.grad_stride_t, f.T, f.I, f.O, f.bias, scratch);
  }
}

}  // namespace

void grad_sqnorm_cpu(const LinearFactors& f, SequenceRoute route, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    if (f.T == 1)
      grad_sqnorm_rank1_kernel<in_t>(f, static_cast<acc_t<in_t>*>(out), threads);
    else
      grad_sqnorm_sequence_kernel<in_t>(f, route, static_cast<acc_t<in_t>*>(out), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
