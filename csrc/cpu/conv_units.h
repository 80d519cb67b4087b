// G_b of a convolution in parts: what makes entries of every example's G_b, some output and input channels at a time.
//
// v1  A unit is a block of rows of G_b by a block of input channels, large enough that packing image and grad is little
//     beside its sums, small enough that the unit of all examples can be stored.
#pragma once
#include "conv_correlate.h"
#include "conv_direct.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// Rows row0 … of G_b (output channels), input channels c0 … of their groups, and perhaps the bias as the last column.
// Stored [⌈rows / TILE_WIDTH⌉][columns][TILE_WIDTH]; spare lanes hold nothing of use, but numbers.
struct Unit {
  int64_t row0, rows, c0, C, columns;
  bool bias;
};

template <typename T> struct Units {
  static constexpr int64_t N = TILE_WIDTH<T>;
  GradientRoute route;
  DirectPlan direct;
  CorrelatePlan correlate;
  int64_t C, kernel;                     // input channels of a group, kernel elements
  int64_t band, rows, row_parts;         // rows that share a group's input; most rows in a unit, units in a band
  int64_t channels, channel_parts;       // most input channels in a unit, units side by side
  int64_t count;
  bool bias;

  // About `most` entries a unit.
  void plan(const ConvFactors& f, GradientRoute how, int64_t most) {
    route = how, bias = f.bias;
    C = f.C / f.groups, kernel = f.kernel[0] * f.kernel[1] * f.kernel[2];
    if (route == GradientRoute::direct)
      plan_direct<T>(f, direct);
    else
      plan_correlate<T>(f, correlate);
    band = route == GradientRoute::direct ? f.O / f.groups : f.O;  // a correlated row finds its own group
    rows = min_of(round_up(band, N), 4 * N);
    channels = max_of(1, min_of(C, most / (rows * kernel)));
    row_parts = ceil_div(band, rows), channel_parts = ceil_div(C, channels);
    channels = ceil_div(C, channel_parts);
    channel_parts = ceil_div(C, channels);
    count = f.O / band * row_parts * channel_parts;
  }
  Unit at(int64_t n) const {
    int64_t c = n % channel_parts * channels, part = n / channel_parts % row_parts * rows;
    int64_t first = n / channel_parts / row_parts * band;
    Unit u{first + part, min_of(rows, band - part), c, min_of(channels, C - c), 0, bias && c + channels >= C};
    u.columns = u.C * kernel + u.bias;
    return u;
  }
  int64_t size(const Unit& u) const { return round_up(u.rows, N) * u.columns; }
  // Numbers that a unit takes, with the room that unit_gradient needs behind it.
  int64_t room() const { return rows * (channels * kernel + bias) + TILE_ROWS * N; }
  // Column of G_b that a unit's column is.
  int64_t column(const Unit& u, int64_t j) const { return u.bias && j == u.columns - 1 ? C * kernel : u.c0 * kernel + j; }
};

template <typename in_t>
void unit_gradient(const ConvFactors& f, const Units<acc_t<in_t>>& units, const Unit& u, int64_t b, acc_t<in_t>* out) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  const int64_t columns = u.columns;
  if (units.route == GradientRoute::correlate) {
    if (u.rows % N) memset(out + u.rows / N * columns * N, 0, size_t(columns * N) * sizeof(acc));
    for (int64_t row = 0; row < u.rows; ++row) {
      acc* to = out + row / N * columns * N + row % N;
      correlate_row<in_t>(f, units.correlate, b, u.row0 + row, u.c0, u.C, u.bias,
                          [&](int64_t column, acc entry) { to[column * N] = entry; });
    }
    return;
  }
  const DirectPlan& p = units.direct;
  Workspace& work = thread_workspace();
  work.reserve(Workspace::bytes<acc>(planes_size(p, u.C)) + Workspace::bytes<acc>(p.T * N));
  acc* packed = work.take<acc>(planes_size(p, u.C));
  acc* lanes = work.take<acc>(p.T * N);
  const acc* planes = pack_planes<in_t>(f, p, b, u.row0 / p.O * p.C + u.c0, u.C, packed);
  for (int64_t o = 0; o < u.rows; o += N) {
    pack_lanes<in_t>(f, b, u.row0 + o, min_of(N, u.rows - o), lanes);
    direct_panel(p, planes, lanes, u.C * p.kernel, u.bias, out + o * columns);
  }
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
