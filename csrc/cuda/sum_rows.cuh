// Sums of rows and over a block, in a fixed order: what kernels that leave one number a block end with.
#pragma once
#include "common.cuh"

namespace gradclust {

// The sum of `mine` over a block of `warps` warps → *out. Overwrites the first numbers of `memory`.
template <typename acc> __device__ void leave_block_sum(acc mine, int warps, unsigned char* memory, acc* out) {
  acc* sums = reinterpret_cast<acc*>(memory);
  mine = warp_sum(mine);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  acc total = 0;
  for (int w = 0; w < warps; ++w) total += sums[w];
  *out = total;
}

// A warp a row of partial [B, width].
template <typename acc>
__global__ void __launch_bounds__(256)
    sum_rows_kernel(const acc* __restrict__ partial, int64_t B, int width, acc* __restrict__ out) {
  int64_t b = (int64_t(blockIdx.x) * 256 + threadIdx.x) / 32;
  if (b >= B) return;
  acc total = 0;
  for (int i = threadIdx.x % 32; i < width; i += 32) total += partial[b * width + i];
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) out[b] = total;
}

template <typename acc>
const char* sum_rows(const char* sizes, const acc* partial, int64_t B, int width, acc* out, void* stream) {
  return launch("sum_rows_kernel", sizes, sum_rows_kernel<acc>, unsigned((B + 7) / 8), 256, 0, stream, partial, B, width,
                out);
}

}  // namespace gradclust
