// ⟨G_b, G_c⟩ of a convolution with few positions: Σ_δ Σ_{s,t} (D_b[s]·D_c[t]) (X_b[s+δ]·X_c[t+δ]), from products of
// positions; about (T²O + N²C)·B² FLOP for N pixels instead of 2·T·I·O·B + I·O·B².
//
// v1  Lanes are examples c: for one example b all products of positions with a panel of examples are two small matrices of
//     vectors, and the sum over δ, s and t is one multiply-add a vector whatever the geometry. Pixels are sorted by the
//     phase of the stride; a kernel element meets one phase only, so pixels of two phases are never multiplied.
// v2  Near-constant images cancel. Where a channel mean μ carries most of an example's image it is taken out and comes
//     back as one more pixel, which every element δ meets once, at the position s_δ = Σ_{t: t+δ inside} D[t].
#pragma once
#include "conv.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch stored_scratch, panel_scratch;

constexpr int64_t STRIP_BYTES = 128 << 10;  // products of some examples with a panel: they stay in the L2 cache

struct PairPlan {
  int64_t C, O, T, N, kernel, phases;  // C, O: channels of a group; N: pixels that some output sees
  int64_t* phase_begin;                // [phases + 1] pixels of each phase
  int64_t *pixel, *position;           // [N], [T] offsets in act and in grad
  int64_t* element_begin;              // [kernel + 1]
  int64_t *from, *to;                  // position and pixel of each of an element's pairs
  Workspace tables;
};

inline void plan_pairs(const ConvFactors& f, PairPlan& p) {
  p.C = f.C / f.groups, p.O = f.O / f.groups, p.T = f.out[0] * f.out[1] * f.out[2];
  p.kernel = f.kernel[0] * f.kernel[1] * f.kernel[2];
  const int64_t pixels = f.size[0] * f.size[1] * f.size[2], steps = f.stride[0] * f.stride[1] * f.stride[2];
  p.tables.reserve(2 * Workspace::bytes<int64_t>(pixels) + Workspace::bytes<int64_t>(steps + 1) +
                   Workspace::bytes<int64_t>(p.T) + Workspace::bytes<int64_t>(p.kernel + 1) +
                   2 * Workspace::bytes<int64_t>(p.kernel * p.T));
  p.phase_begin = p.tables.take<int64_t>(steps + 1);
  p.pixel = p.tables.take<int64_t>(pixels);
  int64_t* index = p.tables.take<int64_t>(pixels);  // pixel of the image → its number here
  p.position = p.tables.take<int64_t>(p.T);
  p.element_begin = p.tables.take<int64_t>(p.kernel + 1);
  p.from = p.tables.take<int64_t>(p.kernel * p.T), p.to = p.tables.take<int64_t>(p.kernel * p.T);
  p.N = p.phases = 0;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t phase[3] = {step / f.stride[2] / f.stride[1], step / f.stride[2] % f.stride[1], step % f.stride[2]};
    p.phase_begin[p.phases] = p.N;
    for (int64_t n = 0; n < pixels; ++n) {
      const int64_t at[3] = {n / f.size[2] / f.size[1], n / f.size[2] % f.size[1], n % f.size[2]};
      bool mine = true;
      for (int d = 0; d < 3; ++d) mine = mine && (at[d] + f.pad[d]) % f.stride[d] == phase[d] && is_met(f, d, at[d]);
      if (!mine) continue;
      index[n] = p.N;
      p.pixel[p.N++] = at[0] * f.act_stride[2] + at[1] * f.act_stride[3] + at[2] * f.act_stride[4];
    }
    if (p.N > p.phase_begin[p.phases]) ++p.phases;
  }
  p.phase_begin[p.phases] = p.N;
  int64_t pairs = 0;
  for (int64_t e = 0; e < p.kernel; ++e) {
    const int64_t element[3] = {e / f.kernel[2] / f.kernel[1], e / f.kernel[2] % f.kernel[1], e % f.kernel[2]};
    p.element_begin[e] = pairs;
    for (int64_t t = 0; t < p.T; ++t) {
      const int64_t out[3] = {t / f.out[2] / f.out[1], t / f.out[2] % f.out[1], t % f.out[2]};
      p.position[t] = out[0] * f.grad_stride[2] + out[1] * f.grad_stride[3] + out[2] * f.grad_stride[4];
      int64_t n = 0;
      bool inside = true;
      for (int d = 0; d < 3; ++d) {
        int64_t at = out[d] * f.stride[d] + axis_origin(f, d, element[d]);
        inside = inside && at >= 0 && at < f.size[d];
        n = n * f.size[d] + at;
      }
      if (inside) p.from[pairs] = t, p.to[pairs++] = index[n];
    }
  }
  p.element_begin[p.kernel] = pairs;
}

// One example's rows of one group: act [N + 1, C], the last the mean that was taken out, or 0; grad [T + 1 + kernel, O],
// the last Σ_t D[t] and every element's s_δ. Returns whether a mean was taken out.
template <typename in_t>
bool pack_pairs(const ConvFactors& f, const PairPlan& p, int64_t b, int64_t g, acc_t<in_t>* act, acc_t<in_t>* grad) {
  using acc = acc_t<in_t>;
  const in_t* image = static_cast<const in_t*>(f.act) + b * f.act_stride[0] + g * p.C * f.act_stride[1];
  const in_t* grads = static_cast<const in_t*>(f.grad) + b * f.grad_stride[0] + g * p.O * f.grad_stride[1];
  acc* mean = act + p.N * p.C;
  acc squares = 0, mean_sqnorm = 0;
  for (int64_t c = 0; c < p.C; ++c) {
    acc sum = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      acc x = load(image[c * f.act_stride[1] + p.pixel[n]]);
      act[n * p.C + c] = x;
      sum += x, squares += x * x;
    }
    mean[c] = p.N ? sum / acc(p.N) : acc(0);
    mean_sqnorm += mean[c] * mean[c];
  }
  // Below nine tenths the products lose at most a digit, one position cancels nothing; a NaN compares false.
  const bool centred = p.T > 1 && mean_sqnorm * acc(p.N) > acc(0.9) * squares;
  for (int64_t c = 0; c < p.C; ++c) {
    if (!centred) mean[c] = 0;
    if (centred)
      for (int64_t n = 0; n < p.N; ++n) act[n * p.C + c] -= mean[c];
  }
  for (int64_t o = 0; o < p.O; ++o)
    for (int64_t t = 0; t < p.T; ++t) grad[t * p.O + o] = load(grads[o * f.grad_stride[1] + p.position[t]]);
  memset(grad + p.T * p.O, 0, size_t((1 + p.kernel) * p.O) * sizeof(acc));
  auto add = [&](int64_t row, int64_t t) {
    for (int64_t o = 0; o < p.O; ++o) grad[row * p.O + o] += grad[t * p.O + o];
  };
  for (int64_t t = 0; t < p.T; ++t) add(p.T, t);
  for (int64_t e = 0; e < p.kernel; ++e)
    for (int64_t i = p.element_begin[e]; i < p.element_begin[e + 1]; ++i) add(p.T + 1 + e, p.from[i]);
  return centred;
}

// Row numbers: begin … begin + count, then `last` unless it is −1.
struct Numbers {
  int64_t begin, count, last;
  int64_t size() const { return count + (last >= 0); }
  int64_t operator[](int64_t i) const { return i < count ? begin + i : last; }
};

// strip[e][u][v] = rows u of some examples times rows v of a panel of examples, both of `numbers`; strip is
// [examples, numbers', numbers', width], rows [examples][stride], the panel [numbers'][depth][width].
template <typename acc>
void pair_products(const acc* rows, int64_t stride, int64_t examples, const Numbers& numbers, const acc* panel,
                   int64_t width, int64_t depth, int64_t all, acc* strip) {
  const int64_t count = numbers.size(), total = examples * count;
  acc tile[MR<acc> * NR<acc>];
  for (int64_t j = 0; j < count; ++j) {
    const int64_t v = numbers[j];
    for (int64_t r = 0; r < total; r += MR<acc>) {
      for (int64_t k = 0; k < depth; k += DEPTH) {
        RowPointers<acc> a;
        for (int64_t i = 0; i < MR<acc>; ++i) {
          int64_t row = min_of(r + i, total - 1);
          a.p[i] = rows + row / count * stride + numbers[row % count] * depth + k;
        }
        tile_product<acc>(width, min_of(DEPTH, depth - k), a, panel + (v * depth + k) * width, width, tile, width, k > 0);
      }
      for (int64_t i = 0; i < min_of(MR<acc>, total - r); ++i) {
        int64_t row = r + i;
        memcpy(strip + ((row / count * all + numbers[row % count]) * all + v) * width, tile + i * width,
               size_t(width) * sizeof(acc));
      }
    }
  }
}

// out [B, B], lower triangle.
template <typename in_t> void gram_by_positions(const ConvFactors& f, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t L = LANES<acc>, W = NR<acc>;
  PairPlan p;
  plan_pairs(f, p);
  const int64_t B = f.B, pixels = p.N + 1, positions = p.T + 1 + p.kernel;
  const int64_t act_size = pixels * p.C, grad_size = positions * p.O;
  const int64_t most = max_of(1, min_of(8, STRIP_BYTES / int64_t(sizeof(acc)) / W / (pixels * pixels + p.T * p.T)));
  const int64_t row_parts = ceil_div(B, W), panels = ceil_div(B, W);
  acc* acts = stored_scratch.get<acc>(B * (act_size + grad_size + 1));
  acc *grads = acts + B * act_size, *centred = grads + B * grad_size;
#pragma omp parallel num_threads(threads)
  for (int64_t g = 0; g < f.groups; ++g) {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b)
      centred[b] = pack_pairs<in_t>(f, p, b, g, acts + b * act_size, grads + b * grad_size);
    bool any = false;
    for (int64_t b = 0; b < B; ++b) any = any || centred[b] != 0;
    const int64_t mean = any ? p.N : -1;
    const int64_t used = any ? positions : p.T + 1;  // rows of grad that are multiplied
    acc* act_panel = panel_scratch.get<acc>(W * (act_size + grad_size) + most * W * (pixels * pixels + used * used));
    acc *grad_panel = act_panel + W * act_size, *act_strip = grad_panel + W * grad_size;
    acc* grad_strip = act_strip + most * W * pixels * pixels;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < panels * row_parts; ++task) {
      const int64_t c0 = task / row_parts * W, valid = min_of(W, B - c0), width = round_up(valid, L);
      const int64_t b_first = task % row_parts * W, b_end = min_of(B, b_first + W);
      if (b_first < c0) continue;
      for (int64_t n = 0; n < p.N + any; ++n)
        pack_rows(act_panel + n * p.C * width, width, acts + c0 * act_size + n * p.C, act_size, p.C, valid);
      for (int64_t t = 0; t < used; ++t)
        pack_rows(grad_panel + t * p.O * width, width, grads + c0 * grad_size + t * p.O, grad_size, p.O, valid);
      for (int64_t b = b_first; b < b_end; b += most) {
        const int64_t count = min_of(most, b_end - b);
        for (int64_t phase = 0; phase < p.phases; ++phase) {
          Numbers numbers{p.phase_begin[phase], p.phase_begin[phase + 1] - p.phase_begin[phase], mean};
          pair_products(acts + b * act_size, act_size, count, numbers, act_panel, width, p.C, pixels, act_strip);
        }
        pair_products(grads + b * grad_size, grad_size, count, Numbers{0, used, -1}, grad_panel, width, p.O, used,
                      grad_strip);
        for (int64_t e = 0; e < count; ++e) {
          const acc *X = act_strip + e * pixels * pixels * width, *D = grad_strip + e * used * used * width;
          for (int64_t lane = 0; lane < width; lane += L) {
            auto X_at = [&](int64_t u, int64_t v) { return load_vec(X + (u * pixels + v) * width + lane); };
            auto D_at = [&](int64_t s, int64_t t) { return load_vec(D + (s * used + t) * width + lane); };
            vec_t<acc> sum = {};
            if (f.bias) sum = D_at(p.T, p.T);
            for (int64_t k = 0; k < p.kernel; ++k) {
              const int64_t begin = p.element_begin[k], end = p.element_begin[k + 1], s_k = p.T + 1 + k;
              for (int64_t i = begin; i < end; ++i) {
                const int64_t s = p.from[i], u = p.to[i];
                vec_t<acc> part = {};  // short chains of additions lose less
                for (int64_t j = begin; j < end; ++j) part += D_at(s, p.from[j]) * X_at(u, p.to[j]);
                if (any) part += D_at(s, s_k) * X_at(u, mean) + D_at(s_k, s) * X_at(mean, u);
                sum += part;
              }
              if (any && end > begin) sum += D_at(s_k, s_k) * X_at(mean, mean);
            }
            acc* to = out + (b + e) * B + c0 + lane;
            for (int64_t j = 0; j < min_of(L, valid - lane) && c0 + lane + j <= b + e; ++j)
              to[j] = g > 0 ? to[j] + sum[j] : sum[j];
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
