// What every CUDA kernel includes first: element conversion and launch checks. No torch headers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

#include "types.h"

namespace gradclust {

template <typename in_t> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename in_t> using acc_t = typename Accumulator<in_t>::type;

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }

template <typename Fn> void dispatch(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32: fn(float{}); break;
    case DType::f64: fn(double{}); break;
    case DType::bf16: fn(__nv_bfloat16{}); break;
    case DType::f16: fn(__half{}); break;
  }
}

// The error of the last launch as a text that names the kernel, or nullptr.
inline const char* launch_error(const char* kernel, const char* shapes) {
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return nullptr;
  static thread_local char text[512];
  snprintf(text, sizeof text, "%s (%s): %s", kernel, shapes, cudaGetErrorString(error));
  return text;
}

}  // namespace gradclust
