// ‖G_b‖² of a convolution, direct route: 2·T·I·O FLOP, reading the padded image of one example from the cache.
//
// v1  One tile is NR output channels (lanes, packed [T][NR]) × MR columns of G_b. A column (c, δ) is nothing but a
//     pointer into channel c's padded plane, displaced by kernel element δ: no im2col, any stride and dilation, no
//     waste for 3 input channels. The tile sums over all positions in registers and is squared there.
// v2  Many positions are cut into blocks that keep the lanes in L1; partial tiles wait in a strip of I × NR.
#pragma once
#include "conv.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

struct DirectPlan {
  int64_t C, O, I, kernel;          // of one group
  int64_t extent[3], plane;         // the part of the padded image that some output position sees
  int64_t outer, inner, block;      // output rows, positions in a row, rows in a block
  int64_t* row_offset;              // [outer] output row → start in the padded plane
  int64_t* column_offset;           // [I, rounded up to MR] column of G_b → start in the padded planes
  Workspace tables;
  size_t bytes;
};

template <typename T> void plan_direct(const ConvFactors& f, DirectPlan& p) {
  p.C = f.C / f.groups, p.O = f.O / f.groups, p.kernel = f.kernel[0] * f.kernel[1] * f.kernel[2];
  p.I = p.C * p.kernel;
  for (int d = 0; d < 3; ++d) p.extent[d] = (f.out[d] - 1) * f.stride[d] + (f.kernel[d] - 1) * f.dilation[d] + 1;
  p.plane = p.extent[0] * p.extent[1] * p.extent[2];
  p.outer = f.out[0] * f.out[1], p.inner = f.out[2];
  constexpr int64_t BLOCK = 16384 / int64_t(NR<T> * sizeof(T));  // positions whose lanes take half of L1
  p.block = most(1, least(p.outer, BLOCK / p.inner));
  int64_t columns = round_up(p.I, MR);
  p.tables.reserve(Workspace::bytes<int64_t>(p.outer) + Workspace::bytes<int64_t>(columns));
  p.row_offset = p.tables.take<int64_t>(p.outer);
  p.column_offset = p.tables.take<int64_t>(columns);
  for (int64_t i = 0; i < p.outer; ++i)
    p.row_offset[i] = ((i / f.out[1]) * f.stride[0] * p.extent[1] + (i % f.out[1]) * f.stride[1]) * p.extent[2];
  for (int64_t i = 0; i < columns; ++i) {
    int64_t column = i < p.I ? i : 0, element = column % p.kernel;  // a spare row of the last tile repeats column 0
    int64_t k2 = element % f.kernel[2], k1 = element / f.kernel[2] % f.kernel[1], k0 = element / f.kernel[2] / f.kernel[1];
    p.column_offset[i] = column / p.kernel * p.plane +
                         (k0 * f.dilation[0] * p.extent[1] + k1 * f.dilation[1]) * p.extent[2] + k2 * f.dilation[2];
  }
  p.bytes = Workspace::bytes<T>(p.C * p.plane) + Workspace::bytes<T>(p.outer * p.inner * NR<T>) +
            Workspace::bytes<T>(columns * NR<T>);
}

// Channels c0 … c0 + C of example b, zero-padded: [C, extent].
template <typename in_t> void pack_planes(const ConvFactors& f, const DirectPlan& p, int64_t b, int64_t c0,
                                          acc_t<in_t>* __restrict planes) {
  using acc = acc_t<in_t>;
  const in_t* image = static_cast<const in_t*>(f.act) + b * f.act_stride[0];
  int64_t step = f.act_stride[4], first = least(f.pad[2], p.extent[2]);
  int64_t last = most(first, least(p.extent[2], f.size[2] + f.pad[2]));  // columns [first, last) are inside the image
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t z = 0; z < p.extent[0]; ++z)
      for (int64_t y = 0; y < p.extent[1]; ++y, planes += p.extent[2]) {
        int64_t iz = z - f.pad[0], iy = y - f.pad[1];
        if (iz < 0 || iz >= f.size[0] || iy < 0 || iy >= f.size[1]) {
          for (int64_t x = 0; x < p.extent[2]; ++x) planes[x] = 0;
          continue;
        }
        const in_t* row = image + (c0 + c) * f.act_stride[1] + iz * f.act_stride[2] + iy * f.act_stride[3] - f.pad[2] * step;
        for (int64_t x = 0; x < first; ++x) planes[x] = 0;
        if (step == 1)
          for (int64_t x = first; x < last; ++x) planes[x] = load(row[x]);
        else
          for (int64_t x = first; x < last; ++x) planes[x] = load(row[x * step]);
        for (int64_t x = last; x < p.extent[2]; ++x) planes[x] = acc(0);
      }
}

// Output channels o0 … o0 + n of example b's grad as lanes: [T, NR], spare lanes zero.
template <typename in_t> void pack_lanes(const ConvFactors& f, int64_t b, int64_t o0, int64_t n,
                                         acc_t<in_t>* __restrict lanes) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = NR<acc>;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + o0 * f.grad_stride[1];
  int64_t step_o = f.grad_stride[1], step = f.grad_stride[4];
  for (int64_t z = 0; z < f.out[0]; ++z)
    for (int64_t y = 0; y < f.out[1]; ++y, lanes += f.out[2] * N) {
      const in_t* row = grad + z * f.grad_stride[2] + y * f.grad_stride[3];
      if (step_o == 1 && n == N) {
        for (int64_t x = 0; x < f.out[2]; ++x)
          for (int64_t o = 0; o < N; ++o) lanes[x * N + o] = load(row[x * step + o]);
        continue;
      }
      for (int64_t o = 0; o < n; ++o)
        for (int64_t x = 0; x < f.out[2]; ++x) lanes[x * N + o] = load(row[o * step_o + x * step]);
      for (int64_t o = n; o < N; ++o)
        for (int64_t x = 0; x < f.out[2]; ++x) lanes[x * N + o] = acc(0);
    }
}

template <typename in_t> acc_t<in_t> direct_sqnorm(const ConvFactors& f, const DirectPlan& p, int64_t b) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = NR<acc>;
  const int L = LANES<acc>;
  int64_t T = p.outer * p.inner, blocks = ceil_div(p.outer, p.block);
  Workspace& work = thread_workspace();
  work.reserve(p.bytes);
  acc* planes = work.take<acc>(p.C * p.plane);
  acc* lanes = work.take<acc>(T * N);
  acc* strip = work.take<acc>(round_up(p.I, MR) * N);  // partial tiles; with one block the first is used again and again
  vec_t<acc> total[NV] = {};
  for (int64_t g = 0; g < f.groups; ++g) {
    pack_planes<in_t>(f, p, b, g * p.C, planes);
    for (int64_t o = 0; o < p.O; o += N) {
      pack_lanes<in_t>(f, b, g * p.O + o, least(N, p.O - o), lanes);
      if (f.bias) {
        vec_t<acc> sum[NV] = {};
        for (int64_t t = 0; t < T; ++t)
          for (int v = 0; v < NV; ++v) sum[v] += load_vec(lanes + t * N + v * L);
        for (int v = 0; v < NV; ++v) total[v] += sum[v] * sum[v];
      }
      for (int64_t begin = 0; begin < p.outer; begin += p.block) {
        int64_t rows = least(p.block, p.outer - begin);
        for (int64_t i = 0; i < p.I; i += MR) {
          const acc* a[MR];
          for (int r = 0; r < MR; ++r) a[r] = planes + p.column_offset[i + r];
          acc* tile = blocks > 1 ? strip + i * N : strip;
          multiply<acc>(tile, N, begin > 0, a, p.row_offset + begin, rows, p.inner, f.stride[2],
                        lanes + begin * p.inner * N);
          if (begin + rows == p.outer)
            for (int r = 0; r < least(MR, p.I - i); ++r)
              for (int v = 0; v < NV; ++v) {
                vec_t<acc> G = load_vec(tile + r * N + v * L);
                total[v] += G * G;
              }
        }
      }
    }
  }
  return sum_lanes<acc>(total[0] + total[1]);
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
