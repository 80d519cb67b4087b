// Σ_b G_b and Σ_b G_b∘G_b of an embedding table on the CPU.
//
// v1  The batch's positions are chained by row in one hash table; a task adds up one row's chain over one block of
//     features, example by example, in registers and L1. grad is read once and of the outputs only rows that were looked
//     up are written; no [B, V, D], and no segment sums in memory (bench/kernels/bench_embedding_moments.py).
#include "embedding_rows.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch chain_scratch;

constexpr int64_t FEATURES = 128;

// One row of the table: features [begin, begin + n) of the positions from i on.
template <typename in_t>
void sum_chain(const EmbeddingFactors& f, const Chains& chains, int64_t i, int64_t begin, int64_t n, acc_t<in_t>* first,
               acc_t<in_t>* second) {
  using acc = acc_t<in_t>;
  if (chains.next[i] < 0) {
    convert(grad_row<in_t>(f, i) + begin, first, n);
    for (int64_t d = 0; d < n; ++d) second[d] = first[d] * first[d];
    return;
  }
  acc sum[FEATURES];
  double total[FEATURES] = {}, squares[FEATURES] = {};  // a frequent row has as many terms as the batch has examples
  while (i >= 0) {
    int64_t b = i / f.T;
    convert(grad_row<in_t>(f, i) + begin, sum, n);
    while ((i = chains.next[i]) >= 0 && i / f.T == b) add_row(sum, grad_row<in_t>(f, i) + begin, n);
    for (int64_t d = 0; d < n; ++d) {
      double x = sum[d];
      total[d] += x;
      squares[d] += x * x;
    }
  }
  for (int64_t d = 0; d < n; ++d) {
    first[d] = acc(total[d]);
    second[d] = acc(squares[d]);
  }
}

template <typename in_t>
void embedding_moments_kernel(const EmbeddingFactors& f, acc_t<in_t>* first, acc_t<in_t>* second, int threads) {
  Chains chains = chains_of_batch(f, chain_scratch);
  const int64_t blocks = (f.D + FEATURES - 1) / FEATURES;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t task = 0; task < chains.count * blocks; ++task) {
    int64_t i = chains.first[task / blocks], begin = task % blocks * FEATURES, n = min_of(FEATURES, f.D - begin);
    int64_t to = chains.keys[i] * f.D + begin;
    sum_chain<in_t>(f, chains, i, begin, n, first + to, second + to);
  }
}

}  // namespace

void embedding_moments_cpu(const EmbeddingFactors& f, void* first, void* second, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    embedding_moments_kernel<in_t>(f, static_cast<acc*>(first), static_cast<acc*>(second), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
