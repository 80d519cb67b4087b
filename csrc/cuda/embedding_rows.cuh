// How kernels of embedding tables read an example's gradients.
#pragma once
#include "common.cuh"
#include "embedding.h"

namespace gradclust {

// Features of a lane: one 16-byte vector, or one number where rows are not aligned.
template <typename in_t, bool WIDE> constexpr int LANE_FEATURES = WIDE ? 16 / int(sizeof(in_t)) : 1;

// Whether every row of gradients is made of aligned 16-byte vectors.
inline bool is_wide(const EmbeddingFactors& f, int64_t size) {
  return reinterpret_cast<uintptr_t>(f.grad) % 16 == 0 && f.D * size % 16 == 0 && f.grad_stride_b * size % 16 == 0 &&
         f.grad_stride_t * size % 16 == 0;
}

template <typename in_t, bool WIDE>
__device__ void load_features(const in_t* from, in_t (&values)[LANE_FEATURES<in_t, WIDE>]) {
  if constexpr (WIDE)
    *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(from));
  else
    values[0] = *from;
}

inline void describe(const EmbeddingFactors& f, char (&text)[96]) {
  snprintf(text, sizeof text, "B=%lld, T=%lld, D=%lld, V=%lld", (long long)f.B, (long long)f.T, (long long)f.D,
           (long long)f.V);
}

}  // namespace gradclust
