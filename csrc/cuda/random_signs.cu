// Random matrices with entries ±scale on CUDA devices: the bits of gradclust_fast/reference/sign_product.py:sign_matrix.
//
// v1  A thread makes the 128 bits of one Philox counter; a warp then writes one lane's 128 entries after the other with
//     16-byte stores side by side, so the generator's cost (about 100 instructions for 128 entries) hides behind the
//     writes. Transposed, neighbouring lanes are neighbouring rows and write side by side at once. Not measured yet.
#include "common.cuh"
#include "philox.cuh"
#include "random_signs.h"

namespace gradclust {
namespace {

constexpr int WARPS = 8;

template <typename T> __device__ T signed_entry(uint32_t word, int bit, T scale) {
  return word >> bit & 1 ? -scale : scale;
}

// out [rows, cols], or [cols, rows] transposed. A warp takes 32 counters: along a row, or transposed 32 rows.
template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(32 * WARPS)
    random_signs_kernel(T* __restrict__ out, int64_t rows, int64_t cols, int64_t blocks, uint32_t key0, uint32_t key1,
                        T scale) {
  int lane = threadIdx.x % 32;
  int64_t warp = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  int64_t index = warp * 32 + lane;  // of this lane's counter
  int64_t row = TRANSPOSED ? index % rows : index / blocks, block = TRANSPOSED ? index / rows : index % blocks;
  uint4 bits = philox4x32(uint4{uint32_t(block), uint32_t(row), 0, 0}, key0, key1);
  if constexpr (TRANSPOSED) {
    if (block >= blocks) return;
    uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; ++w)
      for (int bit = 0; bit < 32; ++bit) {
        int64_t column = block * 128 + w * 32 + bit;
        if (column < cols) out[column * rows + row] = signed_entry(words[w], bit, scale);
      }
  } else {
    bool wide = cols % 4 == 0;
    int64_t r = warp * 32 / blocks, start = warp * 32 % blocks * 128;  // of lane 0's counter, then of the next
    for (int from = 0; from < 32; ++from) {
      uint32_t x = __shfl_sync(0xffffffffu, bits.x, from), y = __shfl_sync(0xffffffffu, bits.y, from);
      uint32_t z = __shfl_sync(0xffffffffu, bits.z, from), w = __shfl_sync(0xffffffffu, bits.w, from);
      int64_t column = start + 4 * lane, of_row = r;
      start += 128;
      if (start >= cols) start = 0, ++r;
      if (of_row >= rows || column >= cols) continue;
      uint32_t word = lane < 16 ? (lane < 8 ? x : y) : (lane < 24 ? z : w);
      int bit = 4 * lane % 32;
      T* target = out + of_row * cols + column;
      T values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = signed_entry(word, bit + j, scale);
      if (wide) {
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<float4*>(target) = make_float4(values[0], values[1], values[2], values[3]);
        } else {
          reinterpret_cast<double2*>(target)[0] = make_double2(values[0], values[1]);
          reinterpret_cast<double2*>(target)[1] = make_double2(values[2], values[3]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (column + j < cols) target[j] = values[j];
      }
    }
  }
}

}  // namespace

const char* random_signs_cuda(void* out, DType dtype, int64_t rows, int64_t cols, uint32_t key0, uint32_t key1,
                              double scale, bool transposed, void* stream) {
  if (rows == 0 || cols == 0) return nullptr;
  int64_t blocks = (cols + 127) / 128;
  int64_t grid = (rows * blocks + 32 * WARPS - 1) / (32 * WARPS);
  char sizes[96];
  snprintf(sizes, sizeof sizes, "rows=%lld, cols=%lld", (long long)rows, (long long)cols);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return launch("random_signs_kernel", sizes, transposed ? random_signs_kernel<T, true> : random_signs_kernel<T, false>,
                  unsigned(grid), 32 * WARPS, 0, stream, static_cast<T*>(out), rows, cols, blocks, key0, key1, T(scale));
  };
  return dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace gradclust
