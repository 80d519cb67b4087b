// ‖G_b‖² on CUDA devices, T = 1.
//
// v1  One warp per example reads both rows with 16-byte loads, several in flight, and multiplies the two sums:
//     memory-bound, each byte read once. Not measured yet.
#include "common.cuh"
#include "grad_sqnorm.h"

namespace gradclust {
namespace {

constexpr int WARPS = 8;  // per block

// In double from block to block: the rounding of a float32 sum over a million equal numbers is 4e-4 of it.
template <typename in_t>
__device__ double row_sqnorm(const in_t* __restrict__ row, int64_t n, int lane, bool aligned) {
  using acc = acc_t<in_t>;
  constexpr int WIDTH = 16 / sizeof(in_t);
  constexpr int64_t BLOCK = 32 * 64;  // loads of a warp
  double total = 0;
  int64_t done = 0;
  if (aligned) {  // 16-byte loads need 16-byte rows
    const uint4* wide = reinterpret_cast<const uint4*>(row);
    const int64_t count = n / WIDTH;
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
      const int64_t end = begin + BLOCK < count ? begin + BLOCK : count;
      acc sum = 0;
#pragma unroll 4
      for (int64_t i = begin + lane; i < end; i += 32) {
        uint4 bits = __ldg(wide + i);
        const in_t* x = reinterpret_cast<const in_t*>(&bits);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum += load(x[j]) * load(x[j]);
      }
      total += sum;
    }
    done = count * WIDTH;
  }
  for (int64_t begin = done; begin < n; begin += BLOCK) {
    const int64_t end = begin + BLOCK < n ? begin + BLOCK : n;
    acc sum = 0;
    for (int64_t i = begin + lane; i < end; i += 32) sum += load(row[i]) * load(row[i]);
    total += sum;
  }
  return warp_sum(total);
}

template <typename in_t>
__global__ void __launch_bounds__(32 * WARPS)
    grad_sqnorm_rank1_kernel(LinearFactors f, acc_t<in_t>* __restrict__ out, bool act_aligned, bool grad_aligned) {
  int lane = threadIdx.x % 32;
  int64_t stride = int64_t(gridDim.x) * WARPS;
  for (int64_t b = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; b < f.B; b += stride) {
    const in_t* act = static_cast<const in_t*>(f.act) + b * f.act_stride_b;
    const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
    const double a = row_sqnorm(act, f.I, lane, act_aligned) + (f.bias ? 1 : 0);
    const double d = row_sqnorm(grad, f.O, lane, grad_aligned);
    if (lane == 0) out[b] = acc_t<in_t>(a * d);
  }
}

bool rows_are_16_byte_aligned(const void* base, int64_t stride, size_t size) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * int64_t(size) % 16 == 0;
}

}  // namespace

const char* grad_sqnorm_cuda(const LinearFactors& f, void* out, void* stream) {
  if (f.B == 0) return nullptr;
  int64_t blocks = (f.B + WARPS - 1) / WARPS;
  if (blocks > 65535) blocks = 65535;
  char sizes[96];
  snprintf(sizes, sizeof sizes, "B=%lld, I=%lld, O=%lld", (long long)f.B, (long long)f.I, (long long)f.O);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    error = launch("grad_sqnorm_rank1_kernel", sizes, grad_sqnorm_rank1_kernel<in_t>, unsigned(blocks), 32 * WARPS, 0,
                   stream, f, static_cast<acc_t<in_t>*>(out),
                   rows_are_16_byte_aligned(f.act, f.act_stride_b, sizeof(in_t)),
                   rows_are_16_byte_aligned(f.grad, f.grad_stride_b, sizeof(in_t)));
  });
  return error;
}

}  // namespace gradclust
