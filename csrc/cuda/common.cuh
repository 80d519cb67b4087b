// What every CUDA kernel includes first: element conversion, shared memory and launches. No torch headers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "types.h"

// The only shared memory that kernels use: its size is an argument of the launch. Aligned as swizzled copies need it.
#if defined(GRADCLUST_ON_HOST)
#define GRADCLUST_SHARED(name) unsigned char* name = emulator::shared_memory()
#else
#define GRADCLUST_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

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

// The sum over a warp, in every lane, added in a fixed order.
template <typename T> __device__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// n / divisor for 0 ≤ n < 2³¹ by a multiplication.
struct Divisor {
  uint32_t divisor, factor;
  int shift;

  Divisor() : Divisor(1) {}
  explicit Divisor(int64_t d) : divisor(uint32_t(d)), shift(31) {
    while ((int64_t(1) << (shift - 31)) < d) ++shift;
    factor = uint32_t(((uint64_t(1) << shift) + d - 1) / d);
  }
  __device__ int quotient(int n) const { return int(uint64_t(uint32_t(n)) * factor >> shift); }
};

// A text that names the kernel and its sizes, valid until this thread's next error.
inline const char* named_error(const char* kernel, const char* sizes, const char* error) {
  static thread_local char text[512];
  snprintf(text, sizeof text, "%s (%s): %s", kernel, sizes, error);
  return text;
}

// The sizes of a convolution for an error's text.
inline void describe(const ConvFactors& f, char (&text)[192]) {
  auto number = [](int64_t n) { return static_cast<long long>(n); };
  snprintf(text, sizeof text, "B=%lld, C=%lld, O=%lld, groups=%lld, image %lldx%lldx%lld, kernel %lldx%lldx%lld",
           number(f.B), number(f.C), number(f.O), number(f.groups), number(f.size[0]), number(f.size[1]),
           number(f.size[2]), number(f.kernel[0]), number(f.kernel[1]), number(f.kernel[2]));
}

// Queues a kernel on a stream. Returns nullptr, or an error that names the kernel and its sizes.
template <typename... Parameters, typename... Arguments>
const char* launch(const char* name, const char* sizes, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                   size_t shared_bytes, void* stream, Arguments... arguments) {
#if defined(GRADCLUST_ON_HOST)
  (void)stream;
  const char* error = emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  return error ? named_error(name, sizes, error) : nullptr;
#else
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : named_error(name, sizes, cudaGetErrorString(error));
#endif
}

// Calls start(first, blocks) for `all` blocks, as many at a time as a grid holds. Returns nullptr, or the first error.
template <typename Start> const char* in_grids(int64_t all, Start&& start) {
  constexpr int64_t MOST = (int64_t(1) << 31) - 1;
  const char* error = nullptr;
  for (int64_t first = 0; first < all && !error; first += MOST)
    error = start(first, unsigned(std::min(MOST, all - first)));
  return error;
}

}  // namespace gradclust
