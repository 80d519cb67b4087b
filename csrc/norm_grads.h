// Per-example gradients of a normalisation layer's weight and bias: Σ_t grad∘x̂ and Σ_t grad. Launchers; the kernels are
// in cpu/norm_grads.cpp and cuda/norm_grads.cu. Results are float64 for float64 inputs, else float32.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// Strides count elements; the last dimension has stride 1.
struct NormFactors {
  const void* input;  // [B, T, D], every row normalised; with groups [B, C, S], every group of C/groups rows
  const void* grad;
  DType dtype;
  int64_t B, T, D;  // with groups T is C and D is S
  int64_t groups;   // 0: rows
  int64_t input_stride_b, input_stride_t, grad_stride_b, grad_stride_t;
};

// weight, bias: [B, D], with groups [B, C]. With rms the mean is taken for 0.
GRADCLUST_CPU_LAUNCHER(norm_grads_cpu, const NormFactors& f, double eps, bool rms, void* weight, void* bias, int threads)

// Workspaces: stats [B · T, 2], with groups [B · groups, 2]; partial [slices, 2, B, D], unused with groups. Nothing may be
// empty. Returns an error text, or nullptr.
const char* norm_grads_cuda(const NormFactors& f, double eps, bool rms, int slices, void* stats, void* partial,
                            void* weight, void* bias, void* stream);

}  // namespace gradclust
