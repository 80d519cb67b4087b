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

// Factors of the per-example gradients of one convolution: act [B, C, *size], grad [B, O, *out], G_b [O, C/groups·kernel].
// Always three spatial dimensions; 1-d and 2-d layers have leading ones. pad is the zeros before each dimension (those
// after follow from out). Strides count elements: example, channel, then the spatial dimensions.
struct ConvFactors {
  const void* act;
  const void* grad;
  DType dtype;
  int64_t B, C, O, groups;
  bool bias;
  int64_t size[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
  int64_t act_stride[5], grad_stride[5];
};

// How entries of a convolution's G_b are made. The codes of gradclust_fast/ops/_conv_routes.py:GRADIENT_ROUTES.
enum class GradientRoute : int { direct = 0, correlate = 1 };

// How a CUDA kernel gets at a convolution's gradients. The codes of gradclust_fast/ops/_conv_cuda.py:ROUTES.
// tiles_cp_async: tiles without bulk tensor copies, where those would be used, to compare the two.
enum class ConvCudaRoute : int { tiles = 0, tiles_tf32 = 1, correlate = 2, tiles_cp_async = 3 };

inline bool on_tensor_cores(const ConvFactors& f, ConvCudaRoute route) {
  return f.dtype == DType::bf16 || f.dtype == DType::f16 || (f.dtype == DType::f32 && route == ConvCudaRoute::tiles_tf32);
}

}  // namespace gradclust
