// Σ_b G_b and Σ_b G_b∘G_b of a convolution on CUDA devices.
//
// v1  A block keeps one tile of G_b, and its sum and sum of squares over a slice of the examples, in registers: tiles of
//     half the rows of conv_sqnorm's leave room for the three. Slices are many enough to fill the device and are added in
//     a fixed order by a second kernel. No G_b is stored. Not measured yet.
// v1  Few channels a group: conv_correlate.cuh, a block over a slice of the examples. Not measured yet.
#include "conv_moments.h"

#include "conv_correlate.cuh"
#include "conv_tiles.cuh"

namespace gradclust {
namespace {

constexpr int BLOCKS = 2, THREAD_ROWS = 4, ROWS = 32;  // 16 · BLOCKS = 8 · THREAD_ROWS output channels of a tile
constexpr int FULL = 528;                              // blocks that fill a large device, with four each

// Where a slice's sums go: [slices, 2, O, I], I = C / groups · kernel elements, as in weight.flatten(1).
template <typename acc> struct Moments {
  acc* partial;
  int64_t O, I;
  __device__ acc* at(int slice, int which, int64_t o, int64_t column) const {
    return partial + ((int64_t(slice) * 2 + which) * O + o) * I + column;
  }
};

struct Slice { int64_t begin, end; };
__device__ Slice slice_of(int64_t B, int slice, int slices) { return {B * slice / slices, B * (slice + 1) / slices}; }

template <typename in_t>
__global__ void __launch_bounds__(TILE_THREADS)
    conv_moments_tensor_kernel(const __grid_constant__ ConvTiles p, int slices, Moments<float> out) {
  GRADCLUST_SHARED(memory);
  int slice = blockIdx.x / p.tiles, index = blockIdx.x % p.tiles;
  Slice examples = slice_of(p.f.B, slice, slices);
  TileOrigin t = tile_origin(p, 0, index);
  TensorTile<in_t, BLOCKS> tile(t);
  TensorSums<BLOCKS> first = {}, second = {};
  for (t.b = examples.begin; t.b < examples.end; ++t.b) {
    TensorSums<BLOCKS> sums = {};
    tile.multiply(p, t, memory, sums);
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
      for (int s = 0; s < PAIRS; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float x = sums[m][s][i / 4][i % 4];
          first[m][s][i / 4][i % 4] += x;
          second[m][s][i / 4][i % 4] += x * x;
        }
  }
#pragma unroll
  for (int s = 0; s < PAIRS; ++s)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int64_t column = weight_column(p, t, tile.octet(s, i / 4), tile.column(i % 4));
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
        int row = tile.row(m, i % 4);
        if (column < 0 || row >= t.O) continue;
        int64_t o = int64_t(t.group) * p.O + t.o0 + row;
        *out.at(slice, 0, o, column) = first[m][s][i / 4][i % 4];
        *out.at(slice, 1, o, column) = second[m][s][i / 4][i % 4];
      }
    }
}

template <typename acc>
__global__ void __launch_bounds__(TILE_THREADS)
    conv_moments_scalar_kernel(const __grid_constant__ ConvTiles p, int slices, Moments<acc> out) {
  GRADCLUST_SHARED(memory);
  int slice = blockIdx.x / p.tiles, index = blockIdx.x % p.tiles;
  Slice examples = slice_of(p.f.B, slice, slices);
  TileOrigin t = tile_origin(p, 0, index);
  ScalarTile<acc, THREAD_ROWS> tile;
  ScalarSums<acc, THREAD_ROWS> first = {}, second = {};
  for (t.b = examples.begin; t.b < examples.end; ++t.b) {
    ScalarSums<acc, THREAD_ROWS> sums = {};
    tile.multiply(p, t, memory, sums);
#pragma unroll
    for (int m = 0; m < THREAD_ROWS; ++m)
#pragma unroll
      for (int s = 0; s < PAIRS; ++s)
#pragma unroll
        for (int v = 0; v < VECTOR<acc>; ++v) {
          first[m][s][v] += sums[m][s][v];
          second[m][s][v] += sums[m][s][v] * sums[m][s][v];
        }
  }
#pragma unroll
  for (int s = 0; s < PAIRS; ++s)
#pragma unroll
    for (int v = 0; v < VECTOR<acc>; ++v) {
      int64_t column = weight_column(p, t, tile.octet(s), tile.column(s, v));
#pragma unroll
      for (int m = 0; m < THREAD_ROWS; ++m) {
        if (column < 0 || tile.row(m) >= t.O) continue;
        int64_t o = int64_t(t.group) * p.O + t.o0 + tile.row(m);
        *out.at(slice, 0, o, column) = first[m][s][v];
        *out.at(slice, 1, o, column) = second[m][s][v];
      }
    }
}

template <typename in_t>
__global__ void __launch_bounds__(32 * CORRELATE_WARPS, 2)
    conv_moments_correlate_kernel(const __grid_constant__ CorrelateTiles p, int slices, Moments<acc_t<in_t>> out) {
  using acc = acc_t<in_t>;
  GRADCLUST_SHARED(memory);
  acc* sums = reinterpret_cast<acc*>(memory);
  int slice = blockIdx.x / p.tiles, rest = blockIdx.x % p.tiles, tap = rest % p.tap_tiles * CORRELATE_TAPS;
  rest /= p.tap_tiles;
  int64_t o = rest / p.C * 32 + threadIdx.x % 32;
  Slice examples = slice_of(p.f.B, slice, slices);
  acc first[CORRELATE_MINE] = {}, second[CORRELATE_MINE] = {};
  for (int64_t b = examples.begin; b < examples.end; ++b) {
    correlate_block<in_t>(p, b, o, rest % p.C, tap, sums, [&](int i, acc total) {
      first[i] += total;
      second[i] += total * total;
    });
    __syncthreads();
  }
  if (o >= p.f.O) return;
#pragma unroll
  for (int i = 0; i < CORRELATE_MINE; ++i) {
    int j = int(threadIdx.x) / 32 + i * CORRELATE_WARPS;
    if (j >= CORRELATE_TAPS || tap + j >= p.taps) continue;
    int64_t column = int64_t(rest % p.C) * p.taps + tap + j;
    *out.at(slice, 0, o, column) = first[i];
    *out.at(slice, 1, o, column) = second[i];
  }
}

// first, second [O, I] with rows `pitch` numbers apart.
template <typename acc>
__global__ void __launch_bounds__(256)
    conv_moments_total_kernel(Moments<acc> sums, int slices, int64_t pitch, acc* __restrict__ first,
                              acc* __restrict__ second) {
  int64_t size = sums.O * sums.I, i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= 2 * size) return;
  int which = i >= size;
  acc total = 0;
  for (int slice = 0; slice < slices; ++slice) total += sums.partial[int64_t(slice) * 2 * size + i];
  int64_t at = which ? i - size : i;
  (which ? second : first)[at / sums.I * pitch + at % sums.I] = total;
}

template <typename in_t> ConvTiles plan_of(const ConvFactors& f, ConvCudaRoute route, bool bulk = true) {
  return plan_tiles(f, on_tensor_cores(f, route), sizeof(in_t), ROWS, bulk && route != ConvCudaRoute::tiles_cp_async);
}

int slices_for(int64_t B, int64_t tiles) {
  return int(std::max<int64_t>(1, std::min<int64_t>(B, (FULL + tiles - 1) / tiles)));
}

}  // namespace

int64_t conv_moments_cuda_slices(const ConvFactors& f, ConvCudaRoute route) {
  int64_t tiles = 0;
  dispatch(f.dtype, [&](auto zero) {
    tiles = route == ConvCudaRoute::correlate ? plan_correlate(f).tiles : plan_of<decltype(zero)>(f, route, false).tiles;
  });
  return slices_for(f.B, tiles);
}

bool conv_moments_cuda_in_bulk(const ConvFactors& f, ConvCudaRoute route) {
  bool bulk = false;
  dispatch(f.dtype, [&](auto zero) {
    bulk = route != ConvCudaRoute::correlate && plan_of<decltype(zero)>(f, route).bulk;
  });
  return bulk;
}

const char* conv_moments_cuda(const ConvFactors& f, ConvCudaRoute route, void* partial, void* first, void* second,
                              void* stream) {
  char sizes[192];
  describe(f, sizes);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    int64_t I = f.C / f.groups * f.kernel[0] * f.kernel[1] * f.kernel[2];
    Moments<acc> out{static_cast<acc*>(partial), f.O, I};
    int slices = 0;
    auto start = [&](const char* name, auto kernel, const auto& plan, unsigned threads, size_t bytes) {
      slices = slices_for(f.B, plan.tiles);
      error = launch(name, sizes, kernel, unsigned(plan.tiles * slices), threads, bytes, stream, plan, slices, out);
    };
    if (route == ConvCudaRoute::correlate) {
      start("conv_moments_correlate_kernel", conv_moments_correlate_kernel<in_t>, plan_correlate(f), 32 * CORRELATE_WARPS,
            32 * CORRELATE_WARPS * CORRELATE_TAPS * sizeof(acc));
    } else {
      ConvTiles plan = plan_of<in_t>(f, route);
      size_t bytes = size_t(plan.stages * plan.stage_bytes);
      if constexpr (sizeof(in_t) <= 4) {
        if (on_tensor_cores(f, route))
          start("conv_moments_tensor_kernel", conv_moments_tensor_kernel<in_t>, plan, TILE_THREADS, bytes);
      }
      if constexpr (sizeof(in_t) >= 4) {
        if (!on_tensor_cores(f, route))
          start("conv_moments_scalar_kernel", conv_moments_scalar_kernel<in_t>, plan, TILE_THREADS, bytes);
      }
    }
    if (error) return;
    error = launch("conv_moments_total_kernel", sizes, conv_moments_total_kernel<acc>,
                   unsigned((2 * f.O * I + 255) / 256), 256, 0, stream, out, slices, I + f.bias,
                   static_cast<acc*>(first), static_cast<acc*>(second));
  });
  return error;
}

}  // namespace gradclust
