// Σ_b G_b and Σ_b G_b∘G_b of a convolution on the CPU.
//
// v1  The sums are cut into units of some output and input channels; a thread owns a unit, or a unit and a part of the
//     batch where there are few units. Each tile of G_b is added and squared into the sums as soon as its positions are
//     summed; no G_b exists. Short images are packed several together, so that a tile's sums stay in the L1 cache while
//     they pass. Parts of the batch depend on the sizes alone and are added in order: the same bits for any number of
//     threads (bench/kernels/bench_conv_moments.py).
#include "conv_moments.h"

#include "conv_units.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch shared_scratch, sums_scratch;

constexpr int64_t UNIT_ENTRIES = 36864;      // 64 → 64 channels, 3 × 3: both sums are 288 KB
constexpr int64_t TASKS = 16, LEAST_EXAMPLES = 8;
constexpr int64_t PACKED_BYTES = 128 << 10, MOST_EXAMPLES = 64;  // packed together

// first[0 … LANES) += G, second … += G∘G
template <typename T> GRADCLUST_INLINE void add_vector(vec_t<T> G, T* first, T* second) {
  store_vec(first, load_vec(first) + G);
  store_vec(second, load_vec(second) + G * G);
}
template <typename T> GRADCLUST_INLINE void add_row(const T* G, T* first, T* second) {
  for (int v = 0; v < TILE_WIDTH<T>; v += LANES<T>) add_vector<T>(load_vec(G + v), first + v, second + v);
}

// Examples b0 … b1 into a unit's sums, both zero at first.
template <typename in_t>
void direct_moments(const ConvFactors& f, const DirectPlan& p, const Unit& u, int64_t b0, int64_t b1, acc_t<in_t>* first,
                    acc_t<in_t>* second) {
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
    for (int64_t o = 0; o < u.rows; o += N) {
      acc *to = first + o * u.columns, *squares = second + o * u.columns;
      for (int64_t begin = 0; begin < p.outer; begin += p.block)
        for (int64_t i = 0; i < columns; i += TILE_ROWS)
          for (int64_t e = 0; e < count; ++e) {
            const acc *lanes = packed + e * example + image + o / N * lanes_size, *a[TILE_ROWS];
            column_pointers(p, image_of[e], i, columns, a);
            acc *tile = several ? panel + i * N : panel, *sum = to + i * N, *square = squares + i * N;
            const acc* b_lanes = lanes + begin * p.inner * N;
            const int64_t rows = min_of(p.block, p.outer - begin);
            const bool last = begin + rows == p.outer, whole = i + TILE_ROWS <= columns;
            if (last && whole) {
              multiply_and<acc>(tile, N, begin > 0, a, p.row_offset + begin, rows, p.inner, p.step, b_lanes,
                                [&](int r, int v, vec_t<acc> G) __attribute__((always_inline)) {
                                  int64_t at = r * N + v * LANES<acc>;
                                  add_vector<acc>(G, sum + at, square + at);
                                });
              continue;
            }
            multiply<acc>(tile, N, begin > 0, a, p.row_offset + begin, rows, p.inner, p.step, b_lanes);
            if (last)
              for (int64_t r = 0; r < columns - i; ++r) add_row(tile + r * N, sum + r * N, square + r * N);
          }
      if (u.bias)
        for (int64_t e = 0; e < count; ++e) {
          sum_lanes_over_positions(packed + e * example + image + o / N * lanes_size, p.T, panel);
          add_row(panel, to + columns * N, squares + columns * N);
        }
    }
  }
}

template <typename in_t>
void conv_moments_kernel(const ConvFactors& f, GradientRoute route, acc_t<in_t>* first, acc_t<in_t>* second, int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  Units<acc> units;
  units.plan(f, route, UNIT_ENTRIES);
  const int64_t room = round_up(units.room(), 16), wide = units.C * units.kernel + f.bias;
  const int64_t parts = max_of(1, min_of(TASKS / units.count, f.B / LEAST_EXAMPLES)), share = ceil_div(f.B, parts);
  acc* partial = parts > 1 ? shared_scratch.get<acc>(units.count * parts * 2 * room) : nullptr;

  auto put = [&](const Unit& u, const acc* sums) {
    for (int64_t row = 0; row < u.rows; ++row)
      for (int64_t j = 0; j < u.columns; ++j) {
        int64_t from = (row / N * u.columns + j) * N + row % N, to = (u.row0 + row) * wide + units.column(u, j);
        first[to] = sums[from], second[to] = sums[room + from];
      }
  };
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < units.count * parts; ++task) {
      const Unit u = units.at(task / parts);
      const int64_t b0 = task % parts * share, b1 = min_of(f.B, b0 + share), extra = parts > 1 ? 0 : 2 * room;
      acc* scratch = sums_scratch.get<acc>(extra + room);
      acc *sums = parts > 1 ? partial + task * 2 * room : scratch, *G = scratch + extra;
      memset(sums, 0, size_t(2 * room) * sizeof(acc));
      if (route == GradientRoute::direct)
        direct_moments<in_t>(f, units.direct, u, b0, b1, sums, sums + room);
      else
        for (int64_t b = b0; b < b1; ++b) {
          unit_gradient<in_t>(f, units, u, b, G);
          for (int64_t i = 0; i < units.size(u); i += N) add_row(G + i, sums + i, sums + room + i);
        }
      if (parts == 1) put(u, sums);
    }
    if (parts > 1) {
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < units.count; ++n) {
        acc* sums = partial + n * parts * 2 * room;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t i = 0; i < 2 * room; ++i) sums[i] += sums[part * 2 * room + i];
        put(units.at(n), sums);
      }
    }
  }
}

}  // namespace

void conv_moments_cpu(const ConvFactors& f, GradientRoute route, void* first, void* second, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    conv_moments_kernel<in_t>(f, route, static_cast<acc*>(first), static_cast<acc*>(second), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
