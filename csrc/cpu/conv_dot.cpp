// ⟨G_b, C_k⟩ of a convolution on the CPU, C_k = Σ_r grad[k, r] ⊗ act[k, r].
//
// v1  filters: the centres' act filter the image, their grad mixes grad's channels, both in panels that are multiplied and
//     summed over positions while in cache: 2·T·K·r·(I + O) FLOP.
//     Through G, where there are many centres: a unit of every example's G_b and of every C_k is stored and multiplied:
//     2·T·I·O + 2·K·I·O FLOP an example (bench/kernels/bench_conv_dot.py).
#include "conv_dot.h"

#include "conv_filters.h"
#include "conv_products.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch shared_scratch, example_scratch;

constexpr int64_t STORED_BYTES = 8 << 20;

// Columns of the banks: all centres' first rank, all centres' second, …
template <typename in_t> void dot_by_filters(const ConvFactors& f, const Centers& centers, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = TILE_WIDTH<acc>;
  const int64_t K = centers.K, rank = centers.rank, n = K * rank;
  DirectPlan plan;
  plan_direct<acc>(f, plan, true);
  Examples<acc> examples;
  examples.plan(f, plan);
  const acc *grad_of = static_cast<const acc*>(centers.grad), *act_of = static_cast<const acc*>(centers.act);
  const int64_t wide = plan.I + f.bias, T = plan.T, most = examples.most;
  const int64_t act_size = bank_size<acc>(n, plan.C, plan.kernel, f.bias);
  acc* memory = shared_scratch.get<acc>(act_size + bank_size<acc>(n, f.O, 1, false));
  auto row = [&](int64_t j) { return j % K * rank + j / K; };
  const Bank<acc> filters = pack_bank(memory, n, plan.C, plan.kernel, f.bias, 1, threads,
                                      [&](int64_t j) { return act_of + row(j) * wide; });
  const Bank<acc> mixers = pack_bank(memory + act_size, n, f.O, 1, false, 1, threads,
                                     [&](int64_t j) { return grad_of + row(j) * f.O; });
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t part = 0; part < ceil_div(f.B, most); ++part) {
    const int64_t b0 = part * most, count = min_of(most, f.B - b0), room = (most * T + TILE_ROWS) * N;
    const int64_t columns = filters.panels() * N;
    acc* planes = example_scratch.get<acc>(most * (examples.image_size + examples.grad_size + columns) + 2 * room);
    acc *grads = planes + most * examples.image_size, *sums = grads + most * examples.grad_size;
    acc *filtered = sums + most * columns, *mixed = filtered + room;
    memset(sums, 0, size_t(count * columns) * sizeof(acc));
    View image = examples.image, grad = examples.grad;
    image.count = grad.count = count * T;
    for (int64_t g = 0; g < f.groups; ++g) {
      for (int64_t e = 0; e < count; ++e) {
        pack_planes<in_t>(f, plan, b0 + e, g * plan.C, plan.C, planes + e * examples.image_size);
        pack_grad<in_t>(f, b0 + e, g * plan.O, plan.O, examples.grad_pitch, grads + e * examples.grad_size);
      }
      for (int64_t j = 0; j < filters.panels(); ++j) {
        project_panel(planes, image, filters, j, 0, plan.C, filtered);
        project_panel(grads, grad, mixers, j, g * plan.O, plan.O, mixed);
        for (int64_t e = 0; e < count; ++e)
          for (int64_t lane = 0; lane < N; lane += LANES<acc>) {
            acc* to = sums + e * columns + j * N + lane;
            vec_t<acc> sum = load_vec(to);
            const acc *x = filtered + e * T * N + lane, *y = mixed + e * T * N + lane;
            for (int64_t t = 0; t < T; ++t) sum += load_vec(x + t * N) * load_vec(y + t * N);
            store_vec(to, sum);
          }
      }
    }
    for (int64_t e = 0; e < count; ++e)
      for (int64_t k = 0; k < K; ++k) {
        acc sum = 0;
        for (int64_t r = 0; r < rank; ++r) sum += sums[e * columns + r * K + k];
        out[(b0 + e) * K + k] = sum;
      }
  }
}

// A unit of C_k, laid out like a unit of G_b.
template <typename acc>
void center_unit(const ConvFactors& f, const Units<acc>& units, const Unit& u, const Centers& centers, int64_t k, acc* out) {
  constexpr int64_t N = TILE_WIDTH<acc>;
  const int64_t wide = units.C * units.kernel + f.bias;
  memset(out, 0, size_t(units.size(u)) * sizeof(acc));
  for (int64_t r = 0; r < centers.rank; ++r) {
    const acc* grad = static_cast<const acc*>(centers.grad) + (k * centers.rank + r) * f.O + u.row0;
    const acc* act = static_cast<const acc*>(centers.act) + (k * centers.rank + r) * wide;
    for (int64_t o = 0; o < u.rows; o += N) {
      acc lanes[N];
      for (int64_t lane = 0; lane < N; ++lane) lanes[lane] = o + lane < u.rows ? grad[o + lane] : acc(0);
      acc* to = out + o * u.columns;
      for (int64_t j = 0; j < u.columns; ++j, to += N) {
        acc a = act[units.column(u, j)];
        for (int64_t lane = 0; lane < N; ++lane) to[lane] += a * lanes[lane];
      }
    }
  }
}

template <typename in_t>
void dot_by_gradient(const ConvFactors& f, const Centers& centers, GradientRoute route, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
  const int64_t B = f.B, K = centers.K;
  Units<acc> units;
  units.plan(f, route, STORED_BYTES / int64_t(sizeof(acc)) / (B + K));
  const int64_t stride = round_up(units.room(), 16) | 16;
  Products<acc> products{B, K, nullptr};
  acc* stored = shared_scratch.get<acc>((B + K) * stride + products.size());
  products.sums = stored + (B + K) * stride;
  memset(products.sums, 0, size_t(products.size()) * sizeof(acc));
#pragma omp parallel num_threads(threads)
  {
    for (int64_t n = 0; n < units.count; ++n) {
      const Unit unit = units.at(n);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < B + K; ++i) {
        if (i < B)
          unit_gradient<in_t>(f, units, unit, i, stored + i * stride);
        else
          center_unit(f, units, unit, centers, i - B, stored + i * stride);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < products.tasks(); ++task)
        products.template add<false>(task, stored, stride, stored + B * stride, stride, units.size(unit));
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t k = 0; k < K; ++k) out[b * K + k] = products.at(b, k);
  }
}

}  // namespace

void conv_dot_cpu(const ConvFactors& f, const Centers& centers, bool filters, GradientRoute route, void* out,
                  int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    acc_t<in_t>* dot = static_cast<acc_t<in_t>*>(out);
    if (filters)
      dot_by_filters<in_t>(f, centers, dot, threads);
    else
      dot_by_gradient<in_t>(f, centers, route, dot, threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
