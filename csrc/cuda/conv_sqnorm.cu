// ‖G_b‖² of a convolution on CUDA devices.
//
// v1  A block per tile of G_b (conv_tiles.cuh) sums over all of an example's positions in registers, squares there and
//     leaves one number; a second kernel adds an example's tiles in a fixed order. 2·T·I·O FLOP on tensor cores (bf16,
//     fp16, tf32; float32 and float64 without). grad is read once per kernel row and 64 channels, the image once per
//     kernel row, so both stay near the layer's own traffic; no patch and no G_b is stored. Not measured yet.
// v1  Few channels a group: conv_correlate.cuh. Not measured yet.
#include "conv_sqnorm.h"

#include "conv_correlate.cuh"
#include "conv_tiles.cuh"
#include "sum_rows.cuh"

namespace gradclust {
namespace {

// partial [B, tiles].
template <typename in_t, int BLOCKS>
__global__ void __launch_bounds__(TILE_THREADS)
    conv_sqnorm_tensor_kernel(const __grid_constant__ ConvTiles p, int64_t first, float* __restrict__ partial) {
  GRADCLUST_SHARED(memory);
  int64_t index = first + blockIdx.x;
  TileOrigin t = tile_origin(p, index / p.tiles, int(index % p.tiles));
  TensorTile<in_t, BLOCKS> tile(t);
  TensorSums<BLOCKS> sums = {};
  tile.multiply(p, t, memory, sums);
  float square = 0;
#pragma unroll
  for (int s = 0; s < PAIRS; ++s)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (tile.octet(s, h) >= t.columns) continue;
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) square += sums[m][s][h][i] * sums[m][s][h][i];
    }
  leave_block_sum(square, TILE_WARPS, memory, partial + index);
}

template <typename acc>
__global__ void __launch_bounds__(TILE_THREADS)
    conv_sqnorm_scalar_kernel(const __grid_constant__ ConvTiles p, int64_t first, acc* __restrict__ partial) {
  GRADCLUST_SHARED(memory);
  int64_t index = first + blockIdx.x;
  TileOrigin t = tile_origin(p, index / p.tiles, int(index % p.tiles));
  ScalarTile<acc, SCALAR_ROWS> tile;
  ScalarSums<acc, SCALAR_ROWS> sums = {};
  tile.multiply(p, t, memory, sums);
  acc square = 0;
#pragma unroll
  for (int s = 0; s < PAIRS; ++s) {
    if (tile.octet(s) >= t.columns) continue;
#pragma unroll
    for (int m = 0; m < SCALAR_ROWS; ++m)
#pragma unroll
      for (int v = 0; v < VECTOR<acc>; ++v) square += sums[m][s][v] * sums[m][s][v];
  }
  leave_block_sum(square, TILE_WARPS, memory, partial + index);
}

template <typename in_t>
__global__ void __launch_bounds__(32 * CORRELATE_WARPS, 2)
    conv_sqnorm_correlate_kernel(const __grid_constant__ CorrelateTiles p, int64_t first,
                                 acc_t<in_t>* __restrict__ partial) {
  using acc = acc_t<in_t>;
  GRADCLUST_SHARED(memory);
  acc* sums = reinterpret_cast<acc*>(memory);  // [warps, taps, 32]
  int64_t index = first + blockIdx.x, b = index / p.tiles;
  int rest = int(index % p.tiles), tap = rest % p.tap_tiles * CORRELATE_TAPS;
  rest /= p.tap_tiles;
  int64_t o = rest / p.C * 32 + threadIdx.x % 32;
  acc square = 0;
  correlate_block<in_t>(p, b, o, rest % p.C, tap, sums, [&](int, acc total) { square += total * total; });
  __syncthreads();
  leave_block_sum(square, CORRELATE_WARPS, memory, partial + index);
}

// Launches a kernel over all tiles, and the sum of an example's.
template <typename Plan, typename acc>
const char* launch_tiles(const char* name, const char* sizes, void (*kernel)(Plan, int64_t, acc*), const Plan& plan,
                         unsigned threads, int64_t bytes, acc* partial, acc* out, void* stream) {
  acc* target = plan.tiles > 1 ? partial : out;
  const char* error = in_grids(plan.f.B * plan.tiles, [&](int64_t first, unsigned blocks) {
    return launch(name, sizes, kernel, blocks, threads, size_t(bytes), stream, plan, first, target);
  });
  if (error || plan.tiles == 1) return error;
  return sum_rows(sizes, partial, plan.f.B, plan.tiles, out, stream);
}

template <typename in_t>
const char* run_tensor(const ConvFactors& f, const ConvTiles& plan, const char* sizes, void* partial, void* out,
                       void* stream) {
  auto kernel = tensor_rows(f) == 32 ? conv_sqnorm_tensor_kernel<in_t, 2> : conv_sqnorm_tensor_kernel<in_t, 4>;
  return launch_tiles<ConvTiles, float>("conv_sqnorm_tensor_kernel", sizes, kernel, plan, TILE_THREADS,
                                        plan.stages * plan.stage_bytes, static_cast<float*>(partial),
                                        static_cast<float*>(out), stream);
}

template <typename in_t>
const char* run_scalar(const ConvTiles& plan, const char* sizes, void* partial, void* out, void* stream) {
  return launch_tiles<ConvTiles, in_t>("conv_sqnorm_scalar_kernel", sizes, conv_sqnorm_scalar_kernel<in_t>, plan,
                                       TILE_THREADS, plan.stages * plan.stage_bytes, static_cast<in_t*>(partial),
                                       static_cast<in_t*>(out), stream);
}

}  // namespace

int64_t conv_sqnorm_cuda_partials(const ConvFactors& f, ConvCudaRoute route) {
  int64_t tiles = 0;
  dispatch(f.dtype, [&](auto zero) {
    tiles = route == ConvCudaRoute::correlate ? plan_correlate(f).tiles
                                              : plan_large_tiles<decltype(zero)>(f, route, false).tiles;
  });
  return tiles > 1 ? tiles : 0;
}

bool conv_sqnorm_cuda_in_bulk(const ConvFactors& f, ConvCudaRoute route) {
  bool bulk = false;
  dispatch(f.dtype, [&](auto zero) {
    bulk = route != ConvCudaRoute::correlate && plan_large_tiles<decltype(zero)>(f, route).bulk;
  });
  return bulk;
}

const char* conv_sqnorm_cuda(const ConvFactors& f, ConvCudaRoute route, void* partial, void* out, void* stream) {
  char sizes[192];
  describe(f, sizes);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    if (route == ConvCudaRoute::correlate) {
      error = launch_tiles<CorrelateTiles, acc>("conv_sqnorm_correlate_kernel", sizes, conv_sqnorm_correlate_kernel<in_t>,
                                                plan_correlate(f), 32 * CORRELATE_WARPS,
                                                32 * CORRELATE_WARPS * CORRELATE_TAPS * sizeof(acc),
                                                static_cast<acc*>(partial), static_cast<acc*>(out), stream);
      return;
    }
    ConvTiles plan = plan_large_tiles<in_t>(f, route);
    if constexpr (sizeof(in_t) <= 4) {
      if (on_tensor_cores(f, route)) error = run_tensor<in_t>(f, plan, sizes, partial, out, stream);
    }
    if constexpr (sizeof(in_t) >= 4) {
      if (!on_tensor_cores(f, route)) error = run_scalar<in_t>(plan, sizes, partial, out, stream);
    }
  });
  return error;
}

}  // namespace gradclust
