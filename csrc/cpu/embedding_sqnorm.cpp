// ‖G_b‖² of an embedding table on the CPU.
//
// v1  One example a task: its positions are chained by row in a hash table that fits the L1 cache; a row that is looked up
//     once is squared where it lies, the others are added first. One read of grad, nothing as large as the table or as
//     grad is written (bench/kernels/bench_embedding_sqnorm.py).
#include "embedding_rows.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch chain_scratch, sum_scratch;

template <typename in_t> void embedding_sqnorm_kernel(const EmbeddingFactors& f, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t b = 0; b < f.B; ++b) {
    Chains chains(chain_scratch.get<int64_t>(Chains::memory(f.T)), f.T);
    for (int64_t t = 0; t < f.T; ++t) {
      int64_t row = f.index[b * f.index_stride_b + t * f.index_stride_t];
      if (row != f.padding) chains.add(t, row);
    }
    const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
    acc* sum = sum_scratch.get<acc>(f.D);
    double sqnorm = 0;
    for (int64_t u = 0; u < chains.count; ++u) {
      int64_t t = chains.first[u];
      const in_t* row = grad + t * f.grad_stride_t;
      if (chains.next[t] < 0) {
        sqnorm += row_sqnorm(row, f.D);
        continue;
      }
      convert(row, sum, f.D);
      while ((t = chains.next[t]) >= 0) add_row(sum, grad + t * f.grad_stride_t, f.D);
      sqnorm += row_sqnorm(sum, f.D);
    }
    out[b] = acc(sqnorm);
  }
}

}  // namespace

void embedding_sqnorm_cpu(const EmbeddingFactors& f, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    embedding_sqnorm_kernel<in_t>(f, static_cast<acc_t<in_t>*>(out), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
