// Per-example gradients of convolutions with few channels a group (depthwise first of all), by short correlations.
//
// v1  A thread owns one output channel, one channel of its group and up to 9 kernel elements, whose sums stay in
//     registers; neighbouring lanes are neighbouring output channels, so channels-last factors are read side by side and
//     a pixel's further reads hit the cache. Warps share the output rows. Not measured yet.
#pragma once
#include "common.cuh"

namespace gradclust {

constexpr int CORRELATE_WARPS = 8, CORRELATE_TAPS = 9;

// Tiles of one example: 32 output channels × a channel of the group × CORRELATE_TAPS kernel elements.
struct CorrelateTiles {
  ConvFactors f;
  int C, O, taps;
  int tap_tiles, tiles;
  Divisor by_out_y;
};

inline CorrelateTiles plan_correlate(const ConvFactors& f) {
  CorrelateTiles p{f, int(f.C / f.groups), int(f.O / f.groups), int(f.kernel[0] * f.kernel[1] * f.kernel[2]), 0, 0,
                   Divisor(f.out[1])};
  p.tap_tiles = (p.taps + CORRELATE_TAPS - 1) / CORRELATE_TAPS;
  p.tiles = int((f.O + 31) / 32) * p.C * p.tap_tiles;
  return p;
}

// This lane's sums over the warp's share of the output rows.
template <typename in_t>
__device__ __forceinline__ void correlate(const CorrelateTiles& p, int64_t b, int64_t o, int c, int first, int warp,
                                          acc_t<in_t> (&sum)[CORRELATE_TAPS]) {
  const ConvFactors& f = p.f;
  const in_t* act = static_cast<const in_t*>(f.act) + b * f.act_stride[0] + (o / p.O * p.C + c) * f.act_stride[1];
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + o * f.grad_stride[1];
  int depth = int(f.out[0] * f.out[1]), width = int(f.out[2]);
  for (int q = warp; q < depth; q += CORRELATE_WARPS) {
    int z = p.by_out_y.quotient(q), y = q - z * int(f.out[1]);
    const in_t* row = grad + z * f.grad_stride[2] + y * f.grad_stride[3];
    const in_t* pixel[CORRELATE_TAPS];  // where kernel element j meets position x = 0
    int column[CORRELATE_TAPS];         // its column there; far below 0 where its row lies outside of the image
#pragma unroll
    for (int j = 0; j < CORRELATE_TAPS; ++j) {
      int tap = min(first + j, p.taps - 1), kx = tap % int(f.kernel[2]), rest = tap / int(f.kernel[2]);
      int kz = rest / int(f.kernel[1]), ky = rest - kz * int(f.kernel[1]);
      int64_t iz = z * f.stride[0] + kz * f.dilation[0] - f.pad[0], iy = y * f.stride[1] + ky * f.dilation[1] - f.pad[1];
      bool inside = iz >= 0 && iz < f.size[0] && iy >= 0 && iy < f.size[1];
      int at = int(kx * f.dilation[2] - f.pad[2]);
      column[j] = inside ? at : -0x7fffffff - 1;
      pixel[j] = act + (inside ? iz * f.act_stride[2] + iy * f.act_stride[3] + at * f.act_stride[4] : 0);
    }
#pragma unroll 1  // the taps are ten loads in flight; more would not fit the registers
    for (int x = 0; x < width; ++x) {
      acc_t<in_t> d = load(*row);
#pragma unroll
      for (int j = 0; j < CORRELATE_TAPS; ++j) {
        if (unsigned(column[j]) < unsigned(f.size[2])) sum[j] += d * acc_t<in_t>(load(*pixel[j]));
        column[j] += int(f.stride[2]), pixel[j] += f.stride[2] * f.act_stride[4];
      }
      row += f.grad_stride[4];
    }
  }
}

constexpr int CORRELATE_MINE = (CORRELATE_TAPS + CORRELATE_WARPS - 1) / CORRELATE_WARPS;

// Calls use(i, total) with the block's sum for kernel element first + warp + i · CORRELATE_WARPS, in the lane of channel o.
template <typename in_t, typename Fn>
__device__ __forceinline__ void correlate_block(const CorrelateTiles& p, int64_t b, int64_t o, int c, int first,
                                                acc_t<in_t>* sums, Fn&& use) {  // sums [warps, taps, 32] in shared memory
  using acc = acc_t<in_t>;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  acc sum[CORRELATE_TAPS] = {};
  if (o < p.f.O) correlate<in_t>(p, b, o, c, first, warp, sum);
#pragma unroll
  for (int j = 0; j < CORRELATE_TAPS; ++j) sums[(warp * CORRELATE_TAPS + j) * 32 + lane] = sum[j];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < CORRELATE_MINE; ++i) {
    int j = warp + i * CORRELATE_WARPS;
    if (j >= min(CORRELATE_TAPS, p.taps - first)) continue;
    acc total = 0;
    for (int w = 0; w < CORRELATE_WARPS; ++w) total += sums[(w * CORRELATE_TAPS + j) * 32 + lane];
    use(i, total);
  }
}

}  // namespace gradclust
