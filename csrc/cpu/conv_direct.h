// G_b of a convolution, direct route: 2·T·I·O FLOP, reading the padded image of one example from the cache.
//
// v1  One tile is TILE_WIDTH output channels (lanes, packed [T][TILE_WIDTH]) × TILE_ROWS columns of G_b. A column (c, δ)
//     is nothing but a pointer into channel c's padded plane, displaced by kernel element δ: no im2col, any stride and
//     dilation, no waste for 3 input channels. The tile sums over all positions in registers.
// v2  Many positions are cut into blocks that keep the lanes in L1; partial tiles wait in a panel of columns × TILE_WIDTH.
#pragma once
#include "conv.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

struct DirectPlan {
  int64_t C, O, I, kernel, T;       // of one group
  int64_t extent[3], plane;         // the part of the padded image that some output position sees; from plane to plane
  int64_t outer, inner, block;      // output rows, positions in a row, rows in a block
  int64_t step;                     // from one position of a row to the next in the padded plane
  bool in_place;                    // the image itself serves as padded planes
  int64_t* row_offset;              // [outer] output row → start in the padded plane
  int64_t* position;                // [T] output position → its first kernel element in the padded plane
  int64_t* column_offset;           // [I] column of G_b → start in the padded planes
  Workspace tables;

  int64_t blocks() const { return ceil_div(outer, block); }
};

// copy: planes are copied even where the image could be read in place, for callers that walk over many channels (a power
// of two apart, they share cache sets).
template <typename T> void plan_direct(const ConvFactors& f, DirectPlan& p, bool copy = false) {
  p.C = f.C / f.groups, p.O = f.O / f.groups, p.kernel = f.kernel[0] * f.kernel[1] * f.kernel[2];
  p.I = p.C * p.kernel, p.T = f.out[0] * f.out[1] * f.out[2];
  for (int d = 0; d < 3; ++d) p.extent[d] = (f.out[d] - 1) * f.stride[d] + (f.kernel[d] - 1) * f.dilation[d] + 1;
  const bool accumulator = f.dtype == DType::f32 || f.dtype == DType::f64;
  p.in_place = !copy && accumulator && f.pad[0] == 0 && f.pad[1] == 0 && f.pad[2] == 0;
  for (int d = 0; d < 3; ++d) p.in_place = p.in_place && p.extent[d] <= f.size[d];
  // No power of two: planes would share cache sets.
  p.plane = p.in_place ? f.act_stride[1] : round_up(p.extent[0] * p.extent[1] * p.extent[2], 16) | 16;
  const int64_t along[3] = {p.in_place ? f.act_stride[2] : p.extent[1] * p.extent[2],
                            p.in_place ? f.act_stride[3] : p.extent[2], p.in_place ? f.act_stride[4] : 1};
  p.step = f.stride[2] * along[2];
  p.outer = f.out[0] * f.out[1], p.inner = f.out[2];
  constexpr int64_t BLOCK = 16384 / int64_t(TILE_WIDTH<T> * sizeof(T));  // positions whose lanes take half of L1
  p.block = max_of(1, min_of(p.outer, BLOCK / p.inner));
  p.tables.reserve(Workspace::bytes<int64_t>(p.outer) + Workspace::bytes<int64_t>(p.T) + Workspace::bytes<int64_t>(p.I));
  p.row_offset = p.tables.take<int64_t>(p.outer);
  p.position = p.tables.take<int64_t>(p.T);
  p.column_offset = p.tables.take<int64_t>(p.I);
  for (int64_t i = 0; i < p.outer; ++i)
    p.row_offset[i] = i / f.out[1] * f.stride[0] * along[0] + i % f.out[1] * f.stride[1] * along[1];
  for (int64_t t = 0; t < p.T; ++t) p.position[t] = p.row_offset[t / p.inner] + t % p.inner * p.step;
  for (int64_t i = 0; i < p.I; ++i) {
    int64_t e = i % p.kernel, k2 = e % f.kernel[2], k1 = e / f.kernel[2] % f.kernel[1], k0 = e / f.kernel[2] / f.kernel[1];
    p.column_offset[i] = i / p.kernel * p.plane + k0 * f.dilation[0] * along[0] + k1 * f.dilation[1] * along[1] +
                         k2 * f.dilation[2] * along[2];
  }
}

// Numbers that C packed planes take.
inline int64_t planes_size(const DirectPlan& p, int64_t C) { return p.in_place ? 0 : C * p.plane; }

// Channels c0 … c0 + C of example b, zero-padded: [C, plane], in `planes` or, where the plan says so, in the image.
template <typename in_t> const acc_t<in_t>* pack_planes(const ConvFactors& f, const DirectPlan& p, int64_t b, int64_t c0,
                                                        int64_t C, acc_t<in_t>* __restrict planes) {
  using acc = acc_t<in_t>;
  const in_t* image = static_cast<const in_t*>(f.act) + b * f.act_stride[0];
  if (p.in_place) return as_accumulator(image + c0 * f.act_stride[1]);
  int64_t step = f.act_stride[4], first = min_of(f.pad[2], p.extent[2]);
  int64_t last = max_of(first, min_of(p.extent[2], f.size[2] + f.pad[2]));  // columns [first, last) are inside the image
  for (int64_t c = 0; c < C; ++c) {
    acc* to = planes + c * p.plane;
    for (int64_t z = 0; z < p.extent[0]; ++z)
      for (int64_t y = 0; y < p.extent[1]; ++y, to += p.extent[2]) {
        int64_t iz = z - f.pad[0], iy = y - f.pad[1];
        if (iz < 0 || iz >= f.size[0] || iy < 0 || iy >= f.size[1]) {
          for (int64_t x = 0; x < p.extent[2]; ++x) to[x] = 0;
          continue;
        }
        const in_t* row =
            image + (c0 + c) * f.act_stride[1] + iz * f.act_stride[2] + iy * f.act_stride[3] - f.pad[2] * step;
        for (int64_t x = 0; x < first; ++x) to[x] = 0;
        if (step == 1)
          for (int64_t x = first; x < last; ++x) to[x] = load(row[x]);
        else
          for (int64_t x = first; x < last; ++x) to[x] = load(row[x * step]);
        for (int64_t x = last; x < p.extent[2]; ++x) to[x] = acc(0);
      }
  }
  return planes;
}

// Output channels o0 … o0 + n of example b's grad as lanes: [T, TILE_WIDTH], spare lanes zero.
template <typename in_t> void pack_lanes(const ConvFactors& f, int64_t b, int64_t o0, int64_t n,
                                         acc_t<in_t>* __restrict lanes) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + o0 * f.grad_stride[1];
  const int64_t step_o = f.grad_stride[1], step = f.grad_stride[4];
  int64_t rows = f.out[1], run = f.out[2];  // positions that follow one another in memory
  if (step == 1 && f.grad_stride[3] == run) run *= rows, rows = 1;
  for (int64_t z = 0; z < f.out[0]; ++z)
    for (int64_t y = 0; y < rows; ++y, lanes += run * N) {
      const in_t* from = grad + z * f.grad_stride[2] + y * f.grad_stride[3];
      if (step == 1) {
        pack_rows(lanes, N, from, step_o, run, n);
        continue;
      }
      for (int64_t x = 0; x < run; ++x)
        for (int64_t o = 0; o < N; ++o) lanes[x * N + o] = o < n ? load(from[o * step_o + x * step]) : acc(0);
    }
}

// Rows of G_b's columns [i, i + TILE_ROWS) of `columns` in all, as the micro-kernel takes them; spare rows repeat the first.
template <typename T> GRADCLUST_INLINE void column_pointers(const DirectPlan& p, const T* planes, int64_t i,
                                                            int64_t columns, const T** a) {
  for (int r = 0; r < TILE_ROWS; ++r) a[r] = planes + p.column_offset[i + r < columns ? i + r : 0];
}

// out[0 … TILE_WIDTH) = Σ_t lanes[t]
template <typename T> void sum_lanes_over_positions(const T* lanes, int64_t positions, T* out) {
  constexpr int64_t N = TILE_WIDTH<T>;
  const int L = LANES<T>;
  vec_t<T> sum[TILE_VECTORS] = {};
  for (int64_t t = 0; t < positions; ++t)
    for (int v = 0; v < TILE_VECTORS; ++v) sum[v] += load_vec(lanes + t * N + v * L);
  for (int v = 0; v < TILE_VECTORS; ++v) store_vec(out + v * L, sum[v]);
}

// The lanes' part of G_b, one block of lanes against the packed planes: panel [columns (+ 1 for the bias), TILE_WIDTH].
// Up to TILE_ROWS more rows of panel are overwritten.
template <typename T> void direct_panel(const DirectPlan& p, const T* planes, const T* lanes, int64_t columns,
                                        bool bias, T* panel) {
  constexpr int64_t N = TILE_WIDTH<T>;
  for (int64_t begin = 0; begin < p.outer; begin += p.block)
    for (int64_t i = 0; i < columns; i += TILE_ROWS) {
      const T* a[TILE_ROWS];
      column_pointers(p, planes, i, columns, a);
      multiply<T>(panel + i * N, N, begin > 0, a, p.row_offset + begin, min_of(p.block, p.outer - begin), p.inner,
                  p.step, lanes + begin * p.inner * N);
    }
  if (bias) sum_lanes_over_positions(lanes, p.T, panel + columns * N);
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
