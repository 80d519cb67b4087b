// ‖G_b‖² of a convolution on the CPU: one example a task, all of its operands in that core's cache.
#include "conv_sqnorm.h"

#include "conv_correlate.h"
#include "conv_direct.h"
#include "conv_sqnorm_gram.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

template <typename in_t> acc_t<in_t> direct_sqnorm(const ConvFactors& f, const DirectPlan& p, int64_t b) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  const int L = LANES<acc>;
  const bool several = p.blocks() > 1;  // with one block of positions, one tile is used again and again
  const int64_t tiles = several ? round_up(p.I, TILE_ROWS) : TILE_ROWS;
  Workspace& work = thread_workspace();
  const int64_t packed_size = planes_size(p, p.C);
  work.reserve(Workspace::bytes<acc>(packed_size) + Workspace::bytes<acc>(p.T * N) + Workspace::bytes<acc>(tiles * N));
  acc* packed = work.take<acc>(packed_size);
  acc* lanes = work.take<acc>(p.T * N);
  acc* panel = work.take<acc>(tiles * N);
  double sqnorm = 0;
  vec_t<acc> total[TILE_VECTORS] = {};  // of one panel of output channels
  auto add_squares = [&](const acc* row) {
    for (int v = 0; v < TILE_VECTORS; ++v) {
      vec_t<acc> G = load_vec(row + v * L);
      total[v] += G * G;
    }
  };
  for (int64_t g = 0; g < f.groups; ++g) {
    const acc* planes = pack_planes<in_t>(f, p, b, g * p.C, p.C, packed);
    for (int64_t o = 0; o < p.O; o += N) {
      pack_lanes<in_t>(f, b, g * p.O + o, min_of(N, p.O - o), lanes);
      if (f.bias) {
        sum_lanes_over_positions(lanes, p.T, panel);
        add_squares(panel);
      }
      for (int64_t begin = 0; begin < p.outer; begin += p.block)
        for (int64_t i = 0; i < p.I; i += TILE_ROWS) {
          const acc* a[TILE_ROWS];
          column_pointers(p, planes, i, p.I, a);
          acc* tile = several ? panel + i * N : panel;
          multiply<acc>(tile, N, begin > 0, a, p.row_offset + begin, min_of(p.block, p.outer - begin), p.inner,
                        p.step, lanes + begin * p.inner * N);
          if (begin + p.block >= p.outer)
            for (int r = 0; r < min_of(TILE_ROWS, p.I - i); ++r) add_squares(tile + r * N);
        }
      sqnorm += sum_lanes<acc>(total[0] + total[1]);
      total[0] = total[1] = vec_t<acc>{};
    }
  }
  return acc_t<in_t>(sqnorm);
}

template <typename in_t> acc_t<in_t> correlate_sqnorm(const ConvFactors& f, const CorrelatePlan& p, int64_t b) {
  double total = 0;
  for (int64_t o = 0; o < f.O; ++o)
    correlate_row<in_t>(f, p, b, o, 0, p.C, f.bias, [&](int64_t, acc_t<in_t> G) { total += G * G; });
  return acc_t<in_t>(total);
}

}  // namespace

void conv_sqnorm_cpu(const ConvFactors& f, ConvRoute route, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    acc* sqnorm = static_cast<acc*>(out);
    if (route == ConvRoute::gram) {
      GramPlan plan;
      plan_gram<acc>(f, plan);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sqnorm[b] = gram_sqnorm<in_t>(f, plan, b);
    } else if (route == ConvRoute::correlate) {
      CorrelatePlan plan;
      plan_correlate<acc>(f, plan);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sqnorm[b] = correlate_sqnorm<in_t>(f, plan, b);
    } else {
      DirectPlan plan;
      plan_direct<acc>(f, plan);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sqnorm[b] = direct_sqnorm<in_t>(f, plan, b);
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
