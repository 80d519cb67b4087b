// leftᵀ G_b right of a convolution on the CPU.
//
// v1  filters    right's columns filter the image, left mixes grad's channels, the two panels are multiplied over positions:
//                2T(IQ + OP + PQ) FLOP. Nothing is unfolded and no G_b exists.
//     mixed      left mixes grad's channels, and leftᵀ G_b is made of the mixed channels like G_b of grad's; then right.
//     direct, correlate   G_b itself, a panel of rows at a time, then right, then left: for depthwise layers, where every
//                channel's small G_b would meet all of P × Q, and for sketches wider than the layer.
//     All panels stay in the L2 cache (bench/kernels/bench_conv_sketch.py).
#include "conv_sketch.h"

#include "conv_correlate.h"
#include "conv_filters.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch bank_scratch, example_scratch;

// out[r][0 … TILE_WIDTH) (+)= Σ_k a(r, k) · b[k][…] for `rows` rows of a, row r beginning at a + r·a_row.
template <typename T>
void small_product(const T* a, int64_t a_row, int64_t a_step, int64_t rows, const T* b, int64_t depth, T* out,
                   int64_t out_row, bool accumulate) {
  const int64_t nowhere = 0;
  for (int64_t r = 0; r < rows; r += TILE_ROWS) {
    const T* row[TILE_ROWS];
    for (int i = 0; i < TILE_ROWS; ++i) row[i] = a + min_of(r + i, rows - 1) * a_row;
    multiply<T>(out + r * out_row, out_row, accumulate, row, &nowhere, 1, depth, a_step, b);
  }
}

template <typename in_t> struct Sketch {
  using acc = acc_t<in_t>;
  static constexpr int64_t N = TILE_WIDTH<acc>;
  const ConvFactors& f;
  const Sides& sides;
  SketchRoute route;
  acc* out;
  DirectPlan plan;
  CorrelatePlan correlate;
  Examples<acc> examples;
  Bank<acc> left, right;  // left always, unless it is the identity; right as filters only
  int64_t wide;           // I, and one more with a bias

  const acc* left_matrix() const { return static_cast<const acc*>(sides.left); }
  const acc* right_matrix() const { return static_cast<const acc*>(sides.right); }
  int64_t most_rows() const { return round_up(max_of(sides.Q, wide), TILE_ROWS); }

  Sketch(const ConvFactors& f, const Sides& sides, SketchRoute route, void* out, int threads)
      : f(f), sides(sides), route(route), out(static_cast<acc*>(out)) {
    plan_direct<acc>(f, plan, route == SketchRoute::filters);
    if (route == SketchRoute::correlate) plan_correlate<acc>(f, correlate);
    examples.plan(f, plan);
    wide = plan.I + f.bias;
    const acc *L = left_matrix(), *R = right_matrix();
    const int64_t P = sides.P, Q = sides.Q;
    int64_t left_size = L ? bank_size<acc>(P, f.O, 1, false) : 0;
    int64_t right_size = route == SketchRoute::filters ? bank_size<acc>(Q, plan.C, plan.kernel, f.bias) : 0;
    acc* memory = bank_scratch.get<acc>(left_size + right_size);
    if (L) left = pack_bank(memory, P, f.O, 1, false, P, threads, [&](int64_t p) { return L + p; });
    if (right_size)
      right = pack_bank(memory + left_size, Q, plan.C, plan.kernel, f.bias, Q, threads, [&](int64_t q) { return R + q; });
  }

  // out[b][row0 + r][q] (+)= block[q][r] for r < rows
  void put(const acc* block, int64_t block_row, int64_t b, int64_t row0, int64_t rows, bool add) const {
    acc* to = out + (b * sides.P + row0) * sides.Q;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t q = 0; q < sides.Q; ++q) {
        acc value = block[q * block_row + r];
        to[r * sides.Q + q] = add ? to[r * sides.Q + q] + value : value;
      }
  }

  // Examples b0 … b0 + count by filters: one group after the other.
  void by_filters(int64_t b0, int64_t count) const {
    const int64_t T = plan.T, positions = count * T, room = (examples.most * T + TILE_ROWS) * N;
    const int64_t rows = (right.panels() * N + TILE_ROWS) * N;
    const int64_t left_panels = sides.left ? left.panels() : 1;
    acc* planes = example_scratch.get<acc>(examples.most * (examples.image_size + examples.grad_size) +
                                           (right.panels() + left_panels) * room + rows);
    acc *grads = planes + examples.most * examples.image_size, *filtered = grads + examples.most * examples.grad_size;
    acc *lanes = filtered + right.panels() * room, *block = lanes + left_panels * room;
    View image = examples.image, grad = examples.grad;
    image.count = grad.count = positions;
    for (int64_t g = 0; g < f.groups; ++g) {
      for (int64_t e = 0; e < count; ++e)
        pack_planes<in_t>(f, plan, b0 + e, g * plan.C, plan.C, planes + e * examples.image_size);
      for (int64_t j = 0; j < right.panels(); ++j)
        project_panel(planes, image, right, j, 0, plan.C, filtered + j * room);
      if (sides.left) {
        for (int64_t e = 0; e < count; ++e)
          pack_grad<in_t>(f, b0 + e, g * plan.O, plan.O, examples.grad_pitch, grads + e * examples.grad_size);
        for (int64_t j = 0; j < left_panels; ++j)
          project_panel(grads, grad, left, j, g * plan.O, plan.O, lanes + j * room);
      }
      const int64_t columns = sides.left ? sides.P : plan.O;
      for (int64_t e = 0; e < count; ++e)
        for (int64_t p = 0; p < columns; p += N) {
          const acc* panel = lanes + p / N * room + e * T * N;
          if (!sides.left) {
            pack_lanes<in_t>(f, b0 + e, g * plan.O + p, min_of(N, plan.O - p), lanes);
            panel = lanes;
          }
          for (int64_t j = 0; j < right.panels(); ++j)
            small_product(filtered + j * room + e * T * N, 1, N, min_of(N, sides.Q - j * N), panel, T, block + j * N * N,
                          N, false);
          put(block, N, b0 + e, (sides.left ? 0 : g * plan.O) + p, min_of(N, columns - p), sides.left && g > 0);
        }
    }
  }

  // `rows` rows of (leftᵀ) G_b as lanes: panel [wide, N] → times right, and into out, or through left first.
  void finish(const acc* panel, int64_t b, int64_t row0, int64_t rows, bool mix, bool add, acc* block, acc* mixed) const {
    const acc* product = panel;
    if (sides.right) {
      small_product(right_matrix(), 1, sides.Q, sides.Q, panel, wide, block, N, false);
      product = block;
    }
    if (!mix) return put(product, N, b, row0, rows, add);
    for (int64_t j = 0; j < left.panels(); ++j) {
      small_product(product, N, 1, sides.Q, left.panel(j) + row0 * N, rows, mixed, N, false);
      put(mixed, N, b, j * N, min_of(N, sides.P - j * N), add);
    }
  }

  void by_gradient(int64_t b) const {
    const bool first_left = route == SketchRoute::mixed, mix = sides.left && !first_left;
    const int64_t T = plan.T, rows = (most_rows() + TILE_ROWS) * N;
    const bool direct = route != SketchRoute::correlate;
    const int64_t image_size = direct ? planes_size(plan, plan.C) : 0, grad_size = first_left ? examples.grad_size : 0;
    acc* packed = example_scratch.get<acc>(image_size + grad_size + (T + TILE_ROWS) * N + 3 * rows);
    acc *grads = packed + image_size, *lanes = grads + grad_size;
    acc *panel = lanes + (T + TILE_ROWS) * N, *block = panel + rows, *mixed = block + rows;
    if (!direct) {
      for (int64_t o = 0; o < f.O; o += N) {
        int64_t n = min_of(N, f.O - o);
        if (n < N) memset(panel, 0, size_t(wide * N) * sizeof(acc));
        for (int64_t lane = 0; lane < n; ++lane)
          correlate_row<in_t>(f, correlate, b, o + lane, 0, plan.C, f.bias,
                              [&](int64_t i, acc entry) { panel[i * N + lane] = entry; });
        finish(panel, b, o, n, mix, mix && o > 0, block, mixed);
      }
      return;
    }
    for (int64_t g = 0; g < f.groups; ++g) {
      const acc* planes = pack_planes<in_t>(f, plan, b, g * plan.C, plan.C, packed);
      if (first_left) {
        View grad = examples.grad;
        grad.count = T;
        pack_grad<in_t>(f, b, g * plan.O, plan.O, examples.grad_pitch, grads);
        for (int64_t j = 0; j < left.panels(); ++j) {
          project_panel(grads, grad, left, j, g * plan.O, plan.O, lanes);
          direct_panel(plan, planes, lanes, plan.I, f.bias, panel);
          finish(panel, b, j * N, min_of(N, sides.P - j * N), false, g > 0, block, mixed);
        }
        continue;
      }
      for (int64_t o = 0; o < plan.O; o += N) {
        int64_t n = min_of(N, plan.O - o), row = g * plan.O + o;
        pack_lanes<in_t>(f, b, row, n, lanes);
        direct_panel(plan, planes, lanes, plan.I, f.bias, panel);
        finish(panel, b, row, n, mix, mix && row > 0, block, mixed);
      }
    }
  }
};

}  // namespace

void conv_sketch_cpu(const ConvFactors& f, const Sides& sides, SketchRoute route, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    const Sketch<in_t> sketch(f, sides, route, out, threads);
    if (route == SketchRoute::filters) {
      const int64_t most = sketch.examples.most;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t part = 0; part < ceil_div(f.B, most); ++part)
        sketch.by_filters(part * most, min_of(most, f.B - part * most));
    } else {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < f.B; ++b) sketch.by_gradient(b);
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
