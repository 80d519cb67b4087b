// Plain structs that cross the Python boundary. No torch, no pybind11: CPU, CUDA and bindings share them.
#pragma once
#include <cstdint>

namespace gradclust {

// The codes of gradclust_fast/_native.py:DTYPES.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Factors of the per-example gradients of one linear layer: G_b = grad[b]ᵀ act[b], [O, I].
// Strides count elements; the feature dimension has stride 1. With bias, act has one more, constant-1 feature.
struct LinearFactors {
  const void* act;   // [B, T, I]
  const void* grad;  // [B, T, O]
  DType dtype;
  int64_t B, T, I, O;
  int64_t act_stride_b, act_stride_t, grad_stride_b, grad_stride_t;
  bool bias;
};

}  // namespace gradclust
