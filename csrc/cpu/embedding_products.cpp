// Sketches of an embedding table's per-example gradients, and their inner products with centres, on the CPU.
//
// v1  A block of grad's rows meets all columns of right (or of the centres) in one packed product, as in
//     grad_quantities.cpp; the other factor is one-hot, so its strip is looked up instead of multiplied: P or K numbers a
//     position from left or from the centres. Both strips stay in the L2 cache, where they are multiplied and summed over
//     T (bench/kernels/bench_embedding_sketch.py, bench_embedding_dot.py).
#include "embedding.h"

#include "projections.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch columns_scratch, rows_scratch;

// What is asked: a sketch, with left [V, P] or null, or inner products with centres [K, rank, V].
template <typename acc> struct Lookup {
  const acc *left, *centers;
  int64_t P, Q, K, rank;
  acc* out;

  int64_t width() const { return centers ? K * rank : left ? P : 0; }

  // Columns of one position that looks up row v, to[r * K + k] for centres.
  void copy(int64_t v, int64_t V, acc* to) const {
    if (left) memcpy(to, left + v * P, size_t(P) * sizeof(acc));
    if (centers)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t r = 0; r < rank; ++r) to[r * K + k] = centers[(k * rank + r) * V + v];
  }
};

template <typename in_t>
void embedding_products_kernel(const EmbeddingFactors& f, const acc_t<in_t>* right, const acc_t<in_t>* center_grad,
                               const Lookup<acc_t<in_t>>& q, int threads) {
  using acc = acc_t<in_t>;
  const bool dots = q.centers != nullptr;
  Side<in_t> G{static_cast<const in_t*>(f.grad), f.grad_stride_b, f.grad_stride_t, f.D, right, center_grad,
               right ? q.Q : 0, dots ? q.K : 0, dots ? q.rank : 0, false, !dots && !right, nullptr};
  G.packed = columns_scratch.get<acc>(G.packed_size());
  const int64_t T = f.T, G_ld = G.strip_width(), H_ld = round_up(q.width(), LANES<acc>);
  const int64_t most = rows_of_block<acc>(G_ld + H_ld);
  const int64_t examples = max_of(1, most / T), groups = (f.B + examples - 1) / examples;
  const int64_t size = dots ? q.K : q.P * q.Q;  // of one example's result

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < G.columns(); begin += NR<acc>) pack_panel(G, begin);
    // Tiles read up to NR columns past a strip's last row.
    acc* G_strip = rows_scratch.get<acc>((G_ld + H_ld) * most + 2 * NR<acc> + most * BLOCK_DEPTH);
    acc *H_strip = G_strip + G_ld * most + NR<acc>, *converted = H_strip + H_ld * most + NR<acc>;
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      int64_t b0 = group * examples, b_end = min_of(b0 + examples, f.B);
      if (!dots && !q.left) memset(q.out + b0 * size, 0, size_t((b_end - b0) * size) * sizeof(acc));
      // All rows of several short examples, or one long example, a block of rows at a time.
      for (int64_t t0 = 0; t0 < T; t0 += examples > 1 ? T : most) {
        Rows block{b0 * T + t0, examples > 1 ? (b_end - b0) * T : min_of(most, T - t0), T};
        project(G, block, G_strip, nullptr, converted);
        for (int64_t r = 0; r < block.count; ++r) {
          int64_t b = (block.first + r) / T, t = (block.first + r) % T;
          int64_t v = f.index[b * f.index_stride_b + t * f.index_stride_t];
          acc *g = G_strip + r * G_ld, *h = H_strip + r * H_ld;
          if (v == f.padding) {  // both: a NaN of the one times a zero of the other would be NaN
            memset(g, 0, size_t(G_ld) * sizeof(acc));
            memset(h, 0, size_t(H_ld) * sizeof(acc));
          } else if (q.width()) {
            q.copy(v, f.V, h);
          } else {
            acc* to = q.out + b * size + v * q.Q;
            for (int64_t j = 0; j < q.Q; ++j) to[j] += g[G.sketch_begin() + j];
          }
        }
        for (int64_t b = b0; q.width() && b < b_end; ++b) {
          int64_t row = (b - b0) * T, count = examples > 1 ? T : block.count;
          const acc *g = G_strip + row * G_ld, *h = H_strip + row * H_ld;
          if (dots)
            dot_rows(h, H_ld, g + G.S, G_ld, count, q.K, q.rank, q.out + b * size, t0 > 0);
          else
            sketch_rows(h, H_ld, g + G.sketch_begin(), G_ld, count, q.P, q.Q, q.out + b * size, t0 > 0);
        }
      }
    }
  }
}

// Without positions, features or ranks every product is 0.
template <typename acc> bool is_zero(const EmbeddingFactors& f, int64_t rank, void* out, int64_t size) {
  if (f.T > 0 && f.D > 0 && rank > 0 && size > 0) return false;
  memset(out, 0, size_t(f.B * size) * sizeof(acc));
  return true;
}

}  // namespace

void embedding_sketch_cpu(const EmbeddingFactors& f, const void* left, const void* right, int64_t P, int64_t Q,
                          void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    if (is_zero<acc>(f, 1, out, P * Q)) return;
    Lookup<acc> q{static_cast<const acc*>(left), nullptr, P, Q, 0, 0, static_cast<acc*>(out)};
    embedding_products_kernel<in_t>(f, static_cast<const acc*>(right), nullptr, q, threads);
  });
}

void embedding_dot_cpu(const EmbeddingFactors& f, const void* center_index, const void* center_grad, int64_t K,
                       int64_t rank, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    if (is_zero<acc>(f, rank, out, K)) return;
    Lookup<acc> q{nullptr, static_cast<const acc*>(center_index), 0, 0, K, rank, static_cast<acc*>(out)};
    embedding_products_kernel<in_t>(f, nullptr, static_cast<const acc*>(center_grad), q, threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
