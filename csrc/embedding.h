// Gradients of an embedding table: G_b[v] = Σ_{t: index[b, t] = v} grad[b, t], [V, D]. Launchers; the kernels are in
// cpu/embedding_*.cpp and cuda/embedding_*.cu. Every index lies in [0, V); results are float64 for a float64 grad, else float32.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// Strides count elements; the feature dimension of grad has stride 1.
struct EmbeddingFactors {
  const int64_t* index;  // [B, T]
  const void* grad;      // [B, T, D]
  DType dtype;
  int64_t B, T, D, V;
  int64_t padding;  // the row that gets no gradient; −1 for none
  int64_t index_stride_b, index_stride_t, grad_stride_b, grad_stride_t;
};

// out [B]
GRADCLUST_CPU_LAUNCHER(embedding_sqnorm_cpu, const EmbeddingFactors& f, void* out, int threads)

// The indices of every example sorted, and their positions in that order, [B, T] both; partial [B, …_blocks(f)]. At least
// one example, position and feature. Returns an error text, or nullptr.
const char* embedding_sqnorm_cuda(const EmbeddingFactors& f, const int64_t* sorted, const int64_t* order, void* partial,
                                  void* out, void* stream);
int64_t embedding_sqnorm_cuda_blocks(const EmbeddingFactors& f);

// out [B, B]
GRADCLUST_CPU_LAUNCHER(embedding_gram_cpu, const EmbeddingFactors& f, void* out, int threads)
const char* embedding_gram_cuda(const EmbeddingFactors& f, const int64_t* sorted, const int64_t* order, void* out,
                                void* stream);

// first, second [V, D], zero on entry.
GRADCLUST_CPU_LAUNCHER(embedding_moments_cpu, const EmbeddingFactors& f, void* first, void* second, int threads)

// The same from all indices sorted, by a stable sort, and their positions b · T + t in that order, [B · T] both.
const char* embedding_moments_cuda(const EmbeddingFactors& f, const int64_t* sorted, const int64_t* order, void* first,
                                   void* second, void* stream);

// out [B, P, Q]; left [V, P] and right [D, Q], contiguous in out's dtype, or null for the identity.
GRADCLUST_CPU_LAUNCHER(embedding_sketch_cpu, const EmbeddingFactors& f, const void* left, const void* right, int64_t P,
                       int64_t Q, void* out, int threads)

// out [B, K]; center_index [K, rank, V] and center_grad [K, rank, D], contiguous in out's dtype.
GRADCLUST_CPU_LAUNCHER(embedding_dot_cpu, const EmbeddingFactors& f, const void* center_index, const void* center_grad,
                       int64_t K, int64_t rank, void* out, int threads)

// The same two with left given. partial [B, P · Q or K, splits] is a workspace where there is more than one split (width: Q
// or K; P = 1 for inner products). At least one example, position, feature and number of the result.
int embedding_products_cuda_splits(const EmbeddingFactors& f, int64_t P, int64_t width);
const char* embedding_sketch_cuda(const EmbeddingFactors& f, const void* left, const void* right, int64_t P, int64_t Q,
                                  void* partial, void* out, void* stream);
const char* embedding_dot_cuda(const EmbeddingFactors& f, const void* center_index, const void* center_grad, int64_t K,
                               int64_t rank, void* partial, void* out, void* stream);

}  // namespace gradclust
