// Σ_b G_b of a convolution in parts, and something made of every tile's squares while it is in registers.
//
// v1  The sums are cut into units of some output and input channels; a thread owns a unit, or a unit and a part of the
//     batch where there are few units. Each tile of G_b is added into the sums, and squared, as soon as its positions are
//     summed; no G_b exists. Short images are packed several together, so that a tile's sums stay in the L1 cache while
//     they pass. Parts of the batch depend on the sizes alone and are added in order: the same bits for any number of
//     threads (bench/kernels/bench_conv_moments.py, bench_conv_weight_sqnorm.py).
#pragma once
#include "conv_units.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch shared_scratch, sums_scratch;

constexpr int64_t UNIT_ENTRIES = 36864;      // 64 → 64 channels, 3 × 3: 144 KB
constexpr int64_t LEAST_ENTRIES = 4608;
constexpr int64_t TASKS = 16, LEAST_EXAMPLES = 8;
constexpr int64_t PACKED_BYTES = 128 << 10, MOST_EXAMPLES = 64;  // packed together

template <typename T> GRADCLUST_INLINE void add_vector(T* to, vec_t<T> x) { store_vec(to, load_vec(to) + x); }

// What becomes of the squares: `begin` and `end` around some examples, `end_panel` after some output channels; for every
// tile of each `tile`, `add` row by row, the first row first, and `finish`.
// Entry by entry, beside the sums and laid out as they are.
template <typename T> struct EntrySquares {
  struct Tile {
    T* to;
    __attribute__((always_inline)) void add(int64_t at, int, int, vec_t<T> G) { add_vector(to + at, G * G); }
    __attribute__((always_inline)) void finish() {}
  };
  T* sums;
  void begin(int64_t) {}
  __attribute__((always_inline)) Tile tile(int64_t, int64_t at) { return {sums + at}; }
  void end_panel(int64_t) {}
  void end(int64_t, int64_t) {}
};

// One number an example: the unit's part of ‖G_b‖².
template <typename T> struct NormSquares {
  static constexpr int64_t N = TILE_WIDTH<T>;
  struct Tile {
    T* to;
    vec_t<T> sum[TILE_VECTORS];  // set by the first row: before it, the product needs every register
    __attribute__((always_inline)) void add(int64_t, int r, int v, vec_t<T> G) {
      sum[v] = (r == 0 ? load_vec(to + v * LANES<T>) : sum[v]) + G * G;
    }
    __attribute__((always_inline)) void finish() {
      for (int v = 0; v < TILE_VECTORS; ++v) store_vec(to + v * LANES<T>, sum[v]);
    }
  };
  double* norms;                 // [B]
  T lanes[MOST_EXAMPLES * N];    // of one panel of output channels
  double total[MOST_EXAMPLES];
  void begin(int64_t count) {
    memset(lanes, 0, size_t(count * N) * sizeof(T));
    for (int64_t e = 0; e < count; ++e) total[e] = 0;
  }
  __attribute__((always_inline)) Tile tile(int64_t example, int64_t) {
    Tile tile;
    tile.to = lanes + example * N;
    return tile;
  }
  void end_panel(int64_t count) {
    for (int64_t e = 0; e < count; ++e)
      total[e] += sum_lanes<T>(load_vec(lanes + e * N) + load_vec(lanes + e * N + LANES<T>));
    memset(lanes, 0, size_t(count * N) * sizeof(T));
  }
  void end(int64_t b, int64_t count) {
    end_panel(count);
    for (int64_t e = 0; e < count; ++e) norms[b + e] = total[e];
  }
};

// Row r of a tile, at `at` in its sums.
template <typename T, typename Tile>
GRADCLUST_INLINE void add_row(const T* G, int64_t at, int r, T* sums, Tile& tile) {
  for (int v = 0; v < TILE_VECTORS; ++v) {
    const vec_t<T> x = load_vec(G + v * LANES<T>);
    add_vector(sums + at + v * LANES<T>, x);
    tile.add(at + v * LANES<T>, r, v, x);
  }
}

// Examples b0 … b1 into a unit's sums.
template <typename in_t, typename Squares>
void add_direct(const ConvFactors& f, const DirectPlan& p, const Unit& u, int64_t b0, int64_t b1, acc_t<in_t>* sums,
                Squares& squares) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  const int64_t columns = u.C * p.kernel, image = planes_size(p, u.C), lanes_size = p.T * N;
  const int64_t example = image + round_up(u.rows, N) * p.T;
  const bool several = p.blocks() > 1;  // blocks of positions: tiles of one example wait until its last block
  const int64_t fitting = min_of(MOST_EXAMPLES, PACKED_BYTES / int64_t(sizeof(acc)) / example);
  const int64_t most = several ? 1 : max_of(1, min_of(b1 - b0, fitting));
  const int64_t tiles = (several ? round_up(columns, TILE_ROWS) : TILE_ROWS) * N;
  Workspace& work = thread_workspace();
  work.reserve(Workspace::bytes<acc>(most * example) + Workspace::bytes<acc>(tiles));
  acc* packed = work.take<acc>(most * example);
  const acc* image_of[MOST_EXAMPLES];
  acc* panel = work.take<acc>(tiles);
  for (int64_t b = b0; b < b1; b += most) {
    const int64_t count = min_of(most, b1 - b);
    for (int64_t e = 0; e < count; ++e) {
      image_of[e] = pack_planes<in_t>(f, p, b + e, u.row0 / p.O * p.C + u.c0, u.C, packed + e * example);
      for (int64_t o = 0; o < u.rows; o += N)
        pack_lanes<in_t>(f, b + e, u.row0 + o, min_of(N, u.rows - o), packed + e * example + image + o / N * lanes_size);
    }
    squares.begin(count);
    for (int64_t o = 0; o < u.rows; o += N) {
      for (int64_t begin = 0; begin < p.outer; begin += p.block)
        for (int64_t i = 0; i < columns; i += TILE_ROWS)
          for (int64_t e = 0; e < count; ++e) {
            const acc *lanes = packed + e * example + image + o / N * lanes_size, *a[TILE_ROWS];
            column_pointers(p, image_of[e], i, columns, a);
            acc* partial = several ? panel + i * N : panel;
            const acc* b_lanes = lanes + begin * p.inner * N;
            const int64_t rows = min_of(p.block, p.outer - begin), first = o * u.columns + i * N;
            const bool last = begin + rows == p.outer, whole = i + TILE_ROWS <= columns;
            if (last && whole) {
              auto tile = squares.tile(e, first);
              acc* to = sums + first;
              multiply_and<acc>(partial, N, begin > 0, a, p.row_offset + begin, rows, p.inner, p.step, b_lanes,
                                [&](int r, int v, vec_t<acc> G) __attribute__((always_inline)) {
                                  int64_t at = r * N + v * LANES<acc>;
                                  add_vector(to + at, G);
                                  tile.add(at, r, v, G);
                                });
              tile.finish();
              continue;
            }
            multiply<acc>(partial, N, begin > 0, a, p.row_offset + begin, rows, p.inner, p.step, b_lanes);
            if (!last) continue;
            auto tile = squares.tile(e, first);
            for (int r = 0; r < columns - i; ++r) add_row(partial + r * N, r * N, r, sums + first, tile);
            tile.finish();
          }
      if (u.bias)
        for (int64_t e = 0; e < count; ++e) {
          const int64_t first = o * u.columns + columns * N;
          sum_lanes_over_positions(packed + e * example + image + o / N * lanes_size, p.T, panel);
          auto tile = squares.tile(e, first);
          add_row(panel, 0, 0, sums + first, tile);
          tile.finish();
        }
      squares.end_panel(count);
    }
    squares.end(b, count);
  }
}

// How many entries a unit may have: with few examples smaller ones, or there would be fewer tasks than threads.
inline int64_t unit_entries(const ConvFactors& f) {
  const int64_t entries = f.O * (f.C / f.groups) * f.kernel[0] * f.kernel[1] * f.kernel[2];
  const int64_t parts = max_of(1, min_of(TASKS, f.B / LEAST_EXAMPLES));
  return max_of(LEAST_ENTRIES, min_of(UNIT_ENTRIES, entries * parts / TASKS));
}

// Numbers from one of a unit's sums to the next.
template <typename T> int64_t sums_room(const Units<T>& units) { return round_up(units.room(), 16); }

// out[0 … SUMS) [O, I (+ 1)] from each unit's sums. squares_of(unit's number, its second sum) → the Squares of a task;
// both sums are zero at first.
template <typename in_t, int SUMS, typename SquaresOf>
void sum_units(const ConvFactors& f, const Units<acc_t<in_t>>& units, acc_t<in_t>* const* out, int threads,
               const SquaresOf& squares_of) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  const int64_t room = sums_room(units), wide = units.C * units.kernel + f.bias;
  const int64_t parts = max_of(1, min_of(TASKS / units.count, f.B / LEAST_EXAMPLES)), share = ceil_div(f.B, parts);
  acc* partial = parts > 1 ? shared_scratch.get<acc>(units.count * parts * SUMS * room) : nullptr;

  auto put = [&](const Unit& u, const acc* sums) {
    for (int64_t row = 0; row < u.rows; ++row)
      for (int64_t j = 0; j < u.columns; ++j) {
        int64_t from = (row / N * u.columns + j) * N + row % N, to = (u.row0 + row) * wide + units.column(u, j);
        for (int s = 0; s < SUMS; ++s) out[s][to] = sums[s * room + from];
      }
  };
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < units.count * parts; ++task) {
      const Unit u = units.at(task / parts);
      const int64_t b0 = task % parts * share, b1 = min_of(f.B, b0 + share), extra = parts > 1 ? 0 : SUMS * room;
      acc* scratch = sums_scratch.get<acc>(extra + room);
      acc *sums = parts > 1 ? partial + task * SUMS * room : scratch, *G = scratch + extra;
      memset(sums, 0, size_t(SUMS * room) * sizeof(acc));
      auto squares = squares_of(task / parts, sums + room);
      if (units.route == GradientRoute::direct)
        add_direct<in_t>(f, units.direct, u, b0, b1, sums, squares);
      else
        for (int64_t b = b0; b < b1; ++b) {
          unit_gradient<in_t>(f, units, u, b, G);
          squares.begin(1);
          constexpr int64_t PIECE = 256 * N;
          for (int64_t begin = 0; begin < units.size(u); begin += PIECE) {
            const int64_t end = min_of(begin + PIECE, units.size(u));
            auto tile = squares.tile(0, begin);
            for (int64_t i = begin; i < end; i += N) add_row(G + i, i - begin, i > begin, sums + begin, tile);
            tile.finish();
            squares.end_panel(1);
          }
          squares.end(b, 1);
        }
      if (parts == 1) put(u, sums);
    }
    if (parts > 1) {
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < units.count; ++n) {
        acc* sums = partial + n * parts * SUMS * room;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = 0; i < SUMS * room; ++i) sums[i] += sums[part * SUMS * room + i];
        put(units.at(n), sums);
      }
    }
  }
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
