// ‖G_b‖² of a convolution, structured Gram route: ‖G‖² = Σ_{s,t} (DDᵀ)[s,t] · Σ_δ (XXᵀ)[s+δ, t+δ].
//
// v1  Only channel Grams of image and grad, lower triangles, one example at a time: about T²(C + O) FLOP instead of
//     2·T·I·O. Stride σ splits the image into up to σ³ phases (kernel elements of one phase meet one another only), each
//     with a Gram of its own, so strides and dilations cost no more than what they touch.
// v2  The image's Gram is stored on a grid with a halo of zeros, so that s+δ, t+δ is one pointer displacement and a row
//     of Σ_δ is a sum of unbroken rows.
// v3  Near-constant images cancel (the Gram sum of a constant is a constant times ‖Σ_t D_t‖²): where the channel means
//     carry most of the image, they are taken out and put back exactly: G_δ = G̃_δ + s_δ μᵀ, s_δ = Σ_{t: t+δ inside} D_t.
#pragma once
#include "conv.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t GRAM_ROWS = 4 * TILE_ROWS;    // rows of a Gram computed together
constexpr int64_t GRAM_CHANNELS = 128;   // channels between two visits of a tile: TILE_WIDTH × 128 numbers stay in L1

// Positions of an image, of which a Gram is taken: where they come from and where they go.
struct Positions {
  int64_t count;
  int64_t* source;   // [count] offset in the strided tensor, −1: nothing ever meets this position
  int64_t* grid;     // [count] place on the grid, increasing
  int64_t* run_end;  // [count] end of the run of consecutive places that a position is in
};

inline void find_runs(const Positions& at) {
  for (int64_t i = at.count - 1; i >= 0; --i)
    at.run_end[i] = i + 1 < at.count && at.grid[i + 1] == at.grid[i] + 1 ? at.run_end[i + 1] : i + 1;
}

// Kernel elements that meet one phase of the image.
struct Phase {
  Positions positions;
  int64_t elements;
  int64_t* shift;    // [elements] grid displacement from an output position to the image position
  int64_t* row;      // [grid] grid place → position, or −1 outside the image
  int64_t gram;      // offset of this phase's Gram among all of them
};

struct GramPlan {
  int64_t C, O, T, kernel;
  int64_t pitch;            // numbers in a row of a stored Gram: the grid and some room for whole vectors
  int64_t phases, longest;  // longest: most positions of any phase, or T
  Phase* phase;
  Positions out;
  Workspace tables;
  int64_t grams;            // numbers of all stored Grams
  size_t bytes;
};

template <typename T> void plan_gram(const ConvFactors& f, GramPlan& p) {
  p.C = f.C / f.groups, p.O = f.O / f.groups, p.T = f.out[0] * f.out[1] * f.out[2];
  p.kernel = f.kernel[0] * f.kernel[1] * f.kernel[2];
  Workspace scratch;
  scratch.reserve(Workspace::bytes<Axis>(f.kernel[0]) + Workspace::bytes<Axis>(f.kernel[1]) +
                  Workspace::bytes<Axis>(f.kernel[2]));
  Axis* axes[3];
  int64_t count[3], grid[3];
  for (int d = 0; d < 3; ++d) {
    axes[d] = scratch.take<Axis>(f.kernel[d]);
    count[d] = plan_axis(f, d, axes[d]);
    int64_t span = 0;
    for (int64_t a = 0; a < count[d]; ++a) span = max_of(span, axes[d][a].high - axes[d][a].low);
    grid[d] = f.out[d] + span;
  }
  int64_t places = grid[0] * grid[1] * grid[2];
  p.phases = count[0] * count[1] * count[2];
  p.pitch = round_up(places + 2 * TILE_WIDTH<T>, 16) | 16;  // never a power of two: rows would share cache sets
  p.tables.reserve(Workspace::bytes<Phase>(p.phases) + 3 * Workspace::bytes<int64_t>(p.T) +
                   size_t(p.phases) * (4 * Workspace::bytes<int64_t>(places) + Workspace::bytes<int64_t>(p.kernel)));
  p.phase = p.tables.take<Phase>(p.phases);
  p.out = {p.T, p.tables.take<int64_t>(p.T), p.tables.take<int64_t>(p.T), p.tables.take<int64_t>(p.T)};
  for (int64_t t = 0; t < p.T; ++t) {
    int64_t x = t % f.out[2], y = t / f.out[2] % f.out[1], z = t / f.out[2] / f.out[1];
    p.out.source[t] = z * f.grad_stride[2] + y * f.grad_stride[3] + x * f.grad_stride[4];
    p.out.grid[t] = (z * grid[1] + y) * grid[2] + x;
  }
  find_runs(p.out);
  p.grams = 0, p.longest = p.T;
  for (int64_t n = 0; n < p.phases; ++n) {
    const Axis axis[3] = {axes[0][n / count[2] / count[1]], axes[1][n / count[2] % count[1]], axes[2][n % count[2]]};
    Phase& phase = p.phase[n];
    phase = {{0, p.tables.take<int64_t>(places), p.tables.take<int64_t>(places), p.tables.take<int64_t>(places)},
             0, p.tables.take<int64_t>(p.kernel), p.tables.take<int64_t>(places), p.grams};
    for (int64_t e = 0; e < p.kernel; ++e) {
      const int64_t index[3] = {e / f.kernel[2] / f.kernel[1], e / f.kernel[2] % f.kernel[1], e % f.kernel[2]};
      int64_t shift = 0;
      bool mine = true;
      for (int d = 0; d < 3; ++d) {
        int64_t reach = floor_div(axis_origin(f, d, index[d]), f.stride[d]);
        mine = mine && axis_origin(f, d, index[d]) - reach * f.stride[d] == axis[d].phase;
        shift = shift * grid[d] + reach - axis[d].low;
      }
      if (mine) phase.shift[phase.elements++] = shift;
    }
    Positions& in = phase.positions;
    for (int64_t place = 0; place < places; ++place) {
      const int64_t index[3] = {place / grid[2] / grid[1], place / grid[2] % grid[1], place % grid[2]};
      int64_t source = 0;
      bool inside = true, met = true;
      for (int d = 0; d < 3; ++d) {
        int64_t image = (index[d] + axis[d].low) * f.stride[d] + axis[d].phase;
        inside = inside && image >= 0 && image < f.size[d];
        source += image * f.act_stride[2 + d];
        met = met && is_met(f, d, image);
      }
      phase.row[place] = inside ? in.count : -1;
      if (!inside) continue;
      in.source[in.count] = met ? source : -1;
      in.grid[in.count++] = place;
    }
    find_runs(in);
    p.grams += in.count * p.pitch;
    p.longest = max_of(p.longest, in.count);
  }
  int64_t rows = round_up(p.longest, TILE_WIDTH<T>);
  p.bytes = Workspace::bytes<T>(round_up(p.T, TILE_WIDTH<T>) * p.O) + Workspace::bytes<T>(rows * p.C) +
            Workspace::bytes<T>(GRAM_ROWS * (rows + TILE_WIDTH<T>)) + Workspace::bytes<T>(p.grams) +
            Workspace::bytes<T>(p.pitch) + 2 * Workspace::bytes<T>(rows) + Workspace::bytes<T>(p.C * LANES<T>) + Workspace::bytes<const T*>(p.kernel);
}

// Channels c0 … c0 + C at the given positions as panels [⌈count/TILE_WIDTH⌉][C][TILE_WIDTH]; spare lanes are zero.
template <typename in_t> void pack_panels(const in_t* image, int64_t step_c, int64_t C, const Positions& at,
                                          acc_t<in_t>* __restrict panels) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  for (int64_t begin = 0; begin < at.count; begin += N, panels += C * N) {
    const int64_t* source = at.source + begin;
    int64_t n = min_of(N, at.count - begin);
    bool unbroken = n == N && source[0] >= 0;
    for (int64_t j = 1; j < n; ++j) unbroken = unbroken && source[j] == source[0] + j;
    if (unbroken) {
      for (int64_t c = 0; c < C; ++c) {
        const in_t* run = image + c * step_c + source[0];
        __builtin_prefetch(run + 3 * N);  // a stride of a whole channel is more than the hardware foresees
        for (int64_t j = 0; j < N; ++j) panels[c * N + j] = load(run[j]);
      }
      continue;
    }
    for (int64_t j = 0; j < N; ++j)
      if (j < n && source[j] >= 0)
        for (int64_t c = 0; c < C; ++c) panels[c * N + j] = load(image[c * step_c + source[j]]);
      else
        for (int64_t c = 0; c < C; ++c) panels[c * N + j] = acc(0);
  }
}

// Lower triangle of the Gram matrix of packed positions, GRAM_ROWS rows at a time; emit(position, row) gets each row,
// right up to its diagonal entry.
template <typename T, typename Emit>
GRADCLUST_INLINE void gram_rows(const T* panels, int64_t count, int64_t C, T* block, Emit&& emit) {
  constexpr int64_t N = TILE_WIDTH<T>;
  const int64_t none = 0, width = round_up(count, N) + N;
  for (int64_t begin = 0; begin < count; begin += GRAM_ROWS) {
    int64_t rows = min_of(GRAM_ROWS, count - begin);
    for (int64_t c = 0; c < C; c += GRAM_CHANNELS) {
      int64_t channels = min_of(GRAM_CHANNELS, C - c);
      for (int64_t column = 0; column < begin + rows; column += N)
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
          if (column >= begin + r + TILE_ROWS) continue;
          const T* a[TILE_ROWS];
          for (int i = 0; i < TILE_ROWS; ++i) {
            int64_t position = min_of(begin + r + i, count - 1);
            a[i] = panels + (position / N * C + c) * N + position % N;
          }
          multiply<T>(block + r * width + column, width, c > 0, a, &none, 1, channels, N, panels + column * C + c * N);
        }
    }
    for (int64_t r = 0; r < rows; ++r) emit(begin + r, block + r * width);
  }
}

// Spreads a row of a Gram over the grid, zeros in between and for one vector after its diagonal entry.
template <typename T> GRADCLUST_INLINE void spread(const T* row, int64_t position, const Positions& at, T* out) {
  const int L = LANES<T>;
  const vec_t<T> zero = {};
  int64_t place = 0;
  for (int64_t from = 0; from <= position;) {
    int64_t to = min_of(at.run_end[from], position + 1), next = at.grid[from];
    for (; place < next; place += L) store_vec(out + place, zero);
    for (int64_t i = from; i < to; i += L) store_vec(out + next + i - from, load_vec(row + i));
    place = next + to - from;
    from = to;
  }
  store_vec(out + place, zero);
}

// Takes the channel means out of packed positions where they carry most of the image. Returns ‖mean‖², or 0 where not.
// mean: [C, LANES], of which the first C are the means afterwards.
template <typename T> T centre(T* panels, int64_t count, int64_t C, T* mean) {
  constexpr int64_t N = TILE_WIDTH<T>;
  const int L = LANES<T>;
  vec_t<T> square[TILE_VECTORS] = {};
  for (int64_t c = 0; c < C * L; ++c) mean[c] = 0;
  for (int64_t q = 0; q < count; q += N)
    for (int64_t c = 0; c < C; ++c) {
      vec_t<T> sum = load_vec(mean + c * L);
      for (int v = 0; v < TILE_VECTORS; ++v) {
        vec_t<T> x = load_vec(panels + q * C + c * N + v * L);
        sum += x, square[v] += x * x;
      }
      store_vec(mean + c * L, sum);
    }
  T mean_sqnorm = 0;
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = sum_lanes<T>(load_vec(mean + c * L)) / T(count);
    mean_sqnorm += mean[c] * mean[c];
  }
  // Below one half the Gram sum loses at most a bit; a NaN compares false and stays where it is.
  if (!(mean_sqnorm * T(count) > T(0.5) * sum_lanes<T>(square[0] + square[1]))) return 0;
  for (int64_t q = 0; q < count; q += N)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t j = 0; j < min_of(N, count - q); ++j) panels[q * C + c * N + j] -= mean[c];
  return mean_sqnorm;
}

// What centring took away, Σ_δ 2⟨G̃_δ, s_δ μᵀ⟩ + ‖s_δ‖²‖μ‖², from the centred image and the packed grad.
template <typename T> double restore(const GramPlan& p, const Phase& phase, const T* image, const T* mean, T mean_sqnorm,
                                const T* grad, T* inside, T* level) {
  constexpr int64_t N = TILE_WIDTH<T>;
  double total = 0;
  for (int64_t e = 0; e < phase.elements; ++e) {
    for (int64_t t = 0; t < round_up(p.T, N); ++t) {  // spare lanes of grad are zero, but must not meet garbage
      int64_t position = t < p.T ? phase.row[p.out.grid[t] + phase.shift[e]] : -1;
      inside[t] = position >= 0;
      T sum = 0;
      if (position >= 0)
        for (int64_t c = 0; c < p.C; ++c) sum += image[(position / N * p.C + c) * N + position % N] * mean[c];
      level[t] = sum;
    }
    for (int64_t o = 0; o < p.O; ++o) {
      T lane_sum[N] = {}, lane_level[N] = {};
      for (int64_t t = 0; t < p.T; t += N) {
        const T* d = grad + t * p.O + o * N;
        for (int64_t j = 0; j < N; ++j) lane_sum[j] += d[j] * inside[t + j], lane_level[j] += d[j] * level[t + j];
      }
      T sum = 0, dot = 0;
      for (int64_t j = 0; j < N; ++j) sum += lane_sum[j], dot += lane_level[j];
      total += 2 * sum * dot + sum * sum * mean_sqnorm;
    }
  }
  return total;
}

// Σ_t drow[t] Σ_j image[j][t] over t < n, whole vectors: drow is zero beyond n and image finite.
template <typename T>
GRADCLUST_INLINE vec_t<T> shifted_dot(const T* drow, const T* const* image, int64_t images, int64_t n) {
  const int L = LANES<T>;
  vec_t<T> total[4] = {};
  int64_t t = 0;
  for (; t + 3 * L < n; t += 4 * L) {
    vec_t<T> sum[4] = {};
    for (int64_t j = 0; j < images; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] += load_vec(image[j] + t + v * L);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total[v] += sum[v] * load_vec(drow + t + v * L);
  }
  for (; t < n; t += L) {
    vec_t<T> sum = {};
    for (int64_t j = 0; j < images; ++j) sum += load_vec(image[j] + t);
    total[0] += sum * load_vec(drow + t);
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <typename in_t> acc_t<in_t> gram_sqnorm(const ConvFactors& f, const GramPlan& p, int64_t b) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  Workspace& work = thread_workspace();
  work.reserve(p.bytes);
  int64_t rows = round_up(p.longest, N);
  acc* grad = work.take<acc>(round_up(p.T, N) * p.O);
  acc* image = work.take<acc>(rows * p.C);
  acc* block = work.take<acc>(GRAM_ROWS * (rows + N));
  acc* grams = work.take<acc>(p.grams);
  acc* drow = work.take<acc>(p.pitch);
  acc* inside = work.take<acc>(rows);
  acc* level = work.take<acc>(rows);
  acc* mean = work.take<acc>(p.C * LANES<acc>);
  const acc** shifted = work.take<const acc*>(p.kernel);
  double total = 0;
  for (int64_t g = 0; g < f.groups; ++g) {
    pack_panels<in_t>(static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + g * p.O * f.grad_stride[1],
                      f.grad_stride[1], p.O, p.out, grad);
    for (int64_t n = 0; n < p.phases; ++n) {
      const Phase& phase = p.phase[n];
      if (phase.positions.count == 0) continue;
      pack_panels<in_t>(static_cast<const in_t*>(f.act) + b * f.act_stride[0] + g * p.C * f.act_stride[1],
                        f.act_stride[1], p.C, phase.positions, image);
      acc mean_sqnorm = centre<acc>(image, phase.positions.count, p.C, mean);
      if (mean_sqnorm > 0) total += restore<acc>(p, phase, image, mean, mean_sqnorm, grad, inside, level);
      gram_rows<acc>(image, phase.positions.count, p.C, block, [&](int64_t position, const acc* row) {
        spread<acc>(row, position, phase.positions, grams + phase.gram + position * p.pitch);
      });
    }
    vec_t<acc> twice = {};  // half of Σ_{s,t}: below the diagonal once, on it one half
    gram_rows<acc>(grad, p.T, p.O, block, [&](int64_t s, const acc* row) {
      spread<acc>(row, s, p.out, drow);
      drow[p.out.grid[s]] *= acc(0.5);
      int64_t images = 0;
      for (int64_t n = 0; n < p.phases; ++n) {
        const Phase& phase = p.phase[n];
        for (int64_t e = 0; e < phase.elements; ++e) {
          int64_t position = phase.row[p.out.grid[s] + phase.shift[e]];
          if (position >= 0) shifted[images++] = grams + phase.gram + position * p.pitch + phase.shift[e];
        }
      }
      twice += shifted_dot<acc>(drow, shifted, images, p.out.grid[s] + 1);
    });
    total += 2 * sum_lanes<acc>(twice);
    if (f.bias)
      for (int64_t o = 0; o < p.O; ++o) {
        acc sum = 0;
        for (int64_t t = 0; t < p.T; ++t) sum += grad[(t / N * p.O + o) * N + t % N];
        total += sum * sum;
      }
  }
  return acc(total);
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
