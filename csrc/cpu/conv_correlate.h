// G_b of a convolution with few output channels a group (depthwise above all): its entries one pair of channels at a
// time, each kernel element a short correlation of two images.
//
// v1  Lanes run along the image's rows. One vector of grad meets up to 9 displaced vectors of the padded channel, so a
//     3×3 kernel loads 10 vectors for 9 multiply-adds. Strided columns are split into phases when the channel is packed,
//     so every displacement is a plain vector load.
#pragma once
#include "conv.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int TAPS = 9;

struct CorrelatePlan {
  int64_t C, O, kernel;
  int64_t outer, width;      // output rows; output columns, rounded up to whole vectors
  int64_t rows, columns;     // of a packed channel: padded rows, columns of all phases side by side
  int64_t* column;           // [columns] image column, or −1: zero
  int64_t* row_offset;       // [outer] output row → start in the packed channel
  int64_t* tap;              // [kernel, rounded up to TAPS] kernel element → displacement
  Workspace tables;
  size_t bytes;
};

template <typename T> void plan_correlate(const ConvFactors& f, CorrelatePlan& p) {
  p.C = f.C / f.groups, p.O = f.O / f.groups, p.kernel = f.kernel[0] * f.kernel[1] * f.kernel[2];
  p.outer = f.out[0] * f.out[1], p.width = round_up(f.out[2], LANES<T>);
  int64_t extent[2];
  for (int d = 0; d < 2; ++d) extent[d] = (f.out[d] - 1) * f.stride[d] + (f.kernel[d] - 1) * f.dilation[d] + 1;
  p.rows = extent[0] * extent[1];
  Workspace scratch;
  scratch.reserve(Workspace::bytes<Axis>(f.kernel[2]) + Workspace::bytes<int64_t>(f.kernel[2]));
  Axis* axes = scratch.take<Axis>(f.kernel[2]);
  int64_t* start = scratch.take<int64_t>(f.kernel[2]);
  int64_t phases = plan_axis(f, 2, axes);
  p.columns = 0;
  for (int64_t a = 0; a < phases; ++a) {
    start[a] = p.columns;
    p.columns += p.width + axes[a].high - axes[a].low;
  }
  int64_t taps = round_up(p.kernel, TAPS);
  p.tables.reserve(Workspace::bytes<int64_t>(p.columns) + Workspace::bytes<int64_t>(p.outer) +
                   Workspace::bytes<int64_t>(taps));
  p.column = p.tables.take<int64_t>(p.columns);
  p.row_offset = p.tables.take<int64_t>(p.outer);
  p.tap = p.tables.take<int64_t>(taps);
  for (int64_t a = 0; a < phases; ++a)
    for (int64_t u = 0; u < p.width + axes[a].high - axes[a].low; ++u) {
      int64_t image = (u + axes[a].low) * f.stride[2] + axes[a].phase;
      p.column[start[a] + u] = image >= 0 && image < f.size[2] && is_met(f, 2, image) ? image : -1;
    }
  for (int64_t i = 0; i < p.outer; ++i)
    p.row_offset[i] = ((i / f.out[1]) * f.stride[0] * extent[1] + (i % f.out[1]) * f.stride[1]) * p.columns;
  for (int64_t e = 0; e < taps; ++e) {
    int64_t element = e < p.kernel ? e : 0;  // spare taps repeat the first and are not read
    int64_t k2 = element % f.kernel[2], k1 = element / f.kernel[2] % f.kernel[1], k0 = element / f.kernel[2] / f.kernel[1];
    int64_t reach = floor_div(axis_origin(f, 2, k2), f.stride[2]);
    int64_t phase = axis_origin(f, 2, k2) - reach * f.stride[2], a = 0;
    while (axes[a].phase != phase) ++a;
    p.tap[e] = (k0 * f.dilation[0] * extent[1] + k1 * f.dilation[1]) * p.columns + start[a] + reach - axes[a].low;
  }
  p.bytes = Workspace::bytes<T>(p.rows * p.columns) + Workspace::bytes<T>(p.outer * p.width);
}

// Channel c of example b: [rows, columns], zeros outside the image.
template <typename in_t> void pack_channel(const ConvFactors& f, const CorrelatePlan& p, int64_t b, int64_t c,
                                           acc_t<in_t>* __restrict out) {
  using acc = acc_t<in_t>;
  const in_t* image = static_cast<const in_t*>(f.act) + b * f.act_stride[0] + c * f.act_stride[1];
  int64_t extent = (f.out[1] - 1) * f.stride[1] + (f.kernel[1] - 1) * f.dilation[1] + 1, step = f.act_stride[4];
  for (int64_t i = 0; i < p.rows; ++i, out += p.columns) {
    int64_t z = i / extent - f.pad[0], y = i % extent - f.pad[1];
    bool inside = z >= 0 && z < f.size[0] && y >= 0 && y < f.size[1];
    const in_t* row = image + z * f.act_stride[2] + y * f.act_stride[3];
    for (int64_t u = 0; u < p.columns; ++u) out[u] = inside && p.column[u] >= 0 ? load(row[p.column[u] * step]) : acc(0);
  }
}

// Row o of G_b, channels c0 … c0 + C of its group: emit(column, entry), the bias as the column after the last.
template <typename in_t, typename Emit>
void correlate_row(const ConvFactors& f, const CorrelatePlan& p, int64_t b, int64_t o, int64_t c0, int64_t C, bool bias,
                   Emit&& emit) {
  using acc = acc_t<in_t>;
  const int L = LANES<acc>;
  Workspace& work = thread_workspace();
  work.reserve(p.bytes);
  acc* channel = work.take<acc>(p.rows * p.columns);
  acc* rows = work.take<acc>(p.outer * p.width);
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + o * f.grad_stride[1];
  acc total = 0;
  for (int64_t i = 0; i < p.outer; ++i) {
    const in_t* row = grad + i / f.out[1] * f.grad_stride[2] + i % f.out[1] * f.grad_stride[3];
    acc* out = rows + i * p.width;
    for (int64_t x = 0; x < f.out[2]; ++x) out[x] = load(row[x * f.grad_stride[4]]);
    for (int64_t x = f.out[2]; x < p.width; ++x) out[x] = acc(0);
    if (bias)
      for (int64_t x = 0; x < f.out[2]; ++x) total += out[x];
  }
  if (bias) emit(C * p.kernel, total);
  for (int64_t c = 0; c < C; ++c) {
    // With several output channels a group the channel is packed again for each: cheaper than keeping all of them.
    pack_channel<in_t>(f, p, b, o / p.O * p.C + c0 + c, channel);
    for (int64_t e = 0; e < p.kernel; e += TAPS) {
      const acc* tap[TAPS];
      vec_t<acc> sum[TAPS] = {};
#pragma GCC unroll 9
      for (int k = 0; k < TAPS; ++k) tap[k] = channel + p.tap[e + k];
      for (int64_t i = 0; i < p.outer; ++i)
        for (int64_t x = 0; x < p.width; x += L) {
          vec_t<acc> d = load_vec(rows + i * p.width + x);
          int64_t offset = p.row_offset[i] + x;
#pragma GCC unroll 9
          for (int k = 0; k < TAPS; ++k) sum[k] += d * load_vec(tap[k] + offset);
        }
      for (int k = 0; k < min_of(TAPS, p.kernel - e); ++k) emit(c * p.kernel + e + k, sum_lanes<acc>(sum[k]));
    }
  }
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
