// Squared norm, sketch and inner products of per-example gradients on the CPU.
//
// v1  A block of rows (positions of one or of several examples) meets all columns at once, projections and centres side
//     by side, so act and grad are read once; the two strips of products stay in the L2 cache, where they are multiplied
//     and summed over T. Rows are read where they lie, only the columns are packed (bench/kernels/bench_grad_dot.py,
//     bench_grad_quantities.py).
#include "grad_quantities.h"

#include "projections.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch columns_scratch, rows_scratch, sqnorm_scratch, example_scratch;

template <typename in_t> void grad_quantities_kernel(const LinearFactors& f, const Questions& q, int threads) {
  using acc = acc_t<in_t>;
  const bool dots = q.dot && q.K, products = dots || q.sketch;
  auto side_of = [&](const void* rows, int64_t stride_b, int64_t stride_t, int64_t F, const void* projection, int64_t S,
                     const void* centers, bool constant) {
    const acc* used = q.sketch ? static_cast<const acc*>(projection) : nullptr;
    return Side<in_t>{static_cast<const in_t*>(rows), stride_b, stride_t, F, used, static_cast<const acc*>(centers),
                      used ? S : 0, dots ? q.K : 0, dots ? q.rank : 0, constant, q.sketch && !used, nullptr};
  };
  auto A = side_of(f.act, f.act_stride_b, f.act_stride_t, f.I, q.right, q.Q, q.center_act, f.bias);
  auto D = side_of(f.grad, f.grad_stride_b, f.grad_stride_t, f.O, q.left, q.P, q.center_grad, false);
  A.packed = columns_scratch.get<acc>(A.packed_size() + D.packed_size());
  D.packed = A.packed + A.packed_size();

  const int64_t T = f.T, A_ld = A.strip_width(), D_ld = D.strip_width();
  const int64_t most = rows_of_block<acc>(A_ld + D_ld);
  const int64_t examples = max_of(1, most / T), groups = (f.B + examples - 1) / examples;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < (A.columns() + D.columns() + 2 * NR<acc>) / NR<acc>; ++c) {
      int64_t A_panels = (A.columns() + NR<acc> - 1) / NR<acc>;
      if (c < A_panels)
        pack_panel(A, c * NR<acc>);
      else if ((c - A_panels) * NR<acc> < D.columns())
        pack_panel(D, (c - A_panels) * NR<acc>);
    }
    // Tiles read up to NR columns past a strip's last row.
    acc* A_strip = rows_scratch.get<acc>((A_ld + D_ld) * most + 2 * NR<acc> + most * BLOCK_DEPTH);
    acc *D_strip = A_strip + A_ld * most + NR<acc>, *converted = D_strip + D_ld * most + NR<acc>;
    double *A_sqnorm = sqnorm_scratch.get<double>(2 * most), *D_sqnorm = A_sqnorm + most;
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      int64_t b0 = group * examples, b_end = min_of(b0 + examples, f.B);
      bool rank1 = q.sqnorm && T == 1;
      // All rows of several short examples, or one long example, a block of rows at a time.
      for (int64_t t0 = 0; (products || rank1) && t0 < T; t0 += examples > 1 ? T : most) {
        Rows block{b0 * T + t0, examples > 1 ? (b_end - b0) * T : min_of(most, T - t0), T};
        project(A, block, A_strip, rank1 ? A_sqnorm : nullptr, converted);
        project(D, block, D_strip, rank1 ? D_sqnorm : nullptr, converted);
        for (int64_t b = b0; b < b_end; ++b) {
          int64_t row = (b - b0) * T, count = examples > 1 ? T : block.count;
          const acc *a = A_strip + row * A_ld, *d = D_strip + row * D_ld;
          if (rank1)
            static_cast<acc*>(q.sqnorm)[b] = sqnorm_rank1(
                A_sqnorm[row], D_sqnorm[row], static_cast<const in_t*>(f.act) + b * f.act_stride_b,
                static_cast<const in_t*>(f.grad) + b * f.grad_stride_b, f.I, f.O, f.bias, example_scratch);
          if (dots)
            dot_rows(d + D.S, D_ld, a + A.S, A_ld, count, q.K, q.rank, static_cast<acc*>(q.dot) + b * q.K, t0 > 0);
          if (q.sketch)
            sketch_rows(d + D.sketch_begin(), D_ld, a + A.sketch_begin(), A_ld, count, q.P, q.Q,
                        static_cast<acc*>(q.sketch) + b * q.P * q.Q, t0 > 0);
        }
      }
      if (q.sqnorm && T > 1)
        for (int64_t b = b0; b < b_end; ++b) {
          static_cast<acc*>(q.sqnorm)[b] =
              sqnorm_sequence(q.route, static_cast<const in_t*>(f.act) + b * f.act_stride_b, f.act_stride_t,
                              static_cast<const in_t*>(f.grad) + b * f.grad_stride_b, f.grad_stride_t, T, f.I, f.O,
                              f.bias, example_scratch);
        }
    }
  }
}

}  // namespace

void grad_quantities_cpu(const LinearFactors& f, const Questions& q, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    // Without features everything is 0, and a matrix without rows has no address to tell it from the identity.
    if (f.T > 0 && f.B > 0 && f.O > 0 && f.I + f.bias > 0) return grad_quantities_kernel<in_t>(f, q, threads);
    if (q.sqnorm) memset(q.sqnorm, 0, size_t(f.B) * sizeof(acc));
    if (q.sketch) memset(q.sketch, 0, size_t(f.B * q.P * q.Q) * sizeof(acc));
    if (q.dot) memset(q.dot, 0, size_t(f.B * q.K) * sizeof(acc));
  });
}

}  // namespace gradclust::GRADCLUST_ISA
