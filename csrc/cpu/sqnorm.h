// ‖G_b‖² of one example of a linear layer: shared by grad_sqnorm.cpp and grad_quantities.cpp.
#pragma once
#include "gemm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// Independent vector accumulators hide the FMA latency.
template <typename in_t> acc_t<in_t> row_sqnorm(const in_t* row, int64_t n) {
  using acc = acc_t<in_t>;
  constexpr int L = LANES<acc>, WAYS = 8;
  vec_t<acc> sum[WAYS] = {};
  int64_t i = 0;
  for (; i + WAYS * L <= n; i += WAYS * L)
#pragma GCC unroll 8
    for (int j = 0; j < WAYS; ++j) {
      vec_t<acc> x = load_converted(row + i + j * L);
      sum[j] += x * x;
    }
  for (; i + L <= n; i += L) {
    vec_t<acc> x = load_converted(row + i);
    sum[0] += x * x;
  }
  for (int step = WAYS / 2; step; step /= 2)
    for (int j = 0; j < step; ++j) sum[j] += sum[j + step];
  acc total = sum_lanes<acc>(sum[0]);
  for (; i < n; ++i) total += load(row[i]) * load(row[i]);
  return total;
}

// sum[f] = Σ_t rows[t, f]
template <typename in_t>
void column_sums(const in_t* rows, int64_t stride, int64_t T, int64_t F, acc_t<in_t>* sum) {
  using acc = acc_t<in_t>;
  constexpr int L = LANES<acc>, WAYS = 4;
  int64_t f = 0;
  for (; f + WAYS * L <= F; f += WAYS * L) {
    vec_t<acc> total[WAYS] = {};
    for (int64_t t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int j = 0; j < WAYS; ++j) total[j] += load_converted(rows + t * stride + f + j * L);
    for (int j = 0; j < WAYS; ++j) store_vec(sum + f + j * L, total[j]);
  }
  for (; f < F; ++f) {
    acc total = 0;
    for (int64_t t = 0; t < T; ++t) total += load(rows[t * stride + f]);
    sum[f] = total;
  }
}

// Σ_k v[k] · packed[position, k] of the positions of one panel of V vectors: lanes are positions.
template <typename acc, int V> void panel_times_vector(const acc* panel, int64_t depth, const acc* v, acc* out) {
  constexpr int L = LANES<acc>;
  vec_t<acc> even[V] = {}, odd[V] = {};
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, panel += 2 * V * L)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      even[j] += load_vec(panel + j * L) * v[k];
      odd[j] += load_vec(panel + (V + j) * L) * v[k + 1];
    }
  for (int j = 0; j < V; ++j) {
    if (k < depth) even[j] += load_vec(panel + j * L) * v[k];
    store_vec(out + j * L, even[j] + odd[j]);
  }
}
template <typename acc>
void panel_times_vector(const Packed<acc>& packed, int64_t begin, const acc* v, acc* out) {
  const acc* panel = packed.data + begin * packed.depth;
  switch (packed.width(begin) / LANES<acc>) {
    case 1: return panel_times_vector<acc, 1>(panel, packed.depth, v, out);
    case 2: return panel_times_vector<acc, 2>(panel, packed.depth, v, out);
    default: return panel_times_vector<acc, NV>(panel, packed.depth, v, out);
  }
}

template <typename acc> acc dot(const acc* x, const acc* y, int64_t n) {
  vec_t<acc> even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * LANES<acc> <= n; i += 2 * LANES<acc>) {
    even += load_vec(x + i) * load_vec(y + i);
    odd += load_vec(x + i + LANES<acc>) * load_vec(y + i + LANES<acc>);
  }
  acc total = sum_lanes<acc>(even + odd);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

// With Ã = A − 1āᵀ and s = Σ_t D[t]: ‖G‖² = Σ ÃÃᵀ∘DDᵀ + 2 (D s)·(Ã ā) + ‖s‖²‖ā‖². The lower triangle is computed,
// one column panel at a time; T × T never exists.
template <typename in_t>
double sqnorm_gram(const in_t* act, int64_t act_stride, const in_t* grad, int64_t grad_stride, int64_t T, int64_t I,
                   int64_t O, bool bias, Scratch& scratch) {
  using acc = acc_t<in_t>;
  constexpr int64_t L = LANES<acc>, N = NR<acc>, M = MR<acc>;
  int64_t padded = round_up(T, L);
  acc* memory = scratch.get<acc>(padded * (I + O) + I + O + 2 * padded * N + 2 * N);
  acc *mean = memory + padded * (I + O), *total = mean + I, *act_strip = total + O;
  acc *grad_strip = act_strip + padded * N, *act_mean = grad_strip + padded * N, *grad_total = act_mean + N;
  column_sums(act, act_stride, T, I, mean);
  for (int64_t i = 0; i < I; ++i) mean[i] /= acc(T);
  column_sums(grad, grad_stride, T, O, total);
  Packed<acc> A = pack_all_rows(memory, act, act_stride, I, T, mean);
  Packed<acc> D = pack_all_rows(memory + padded * I, grad, grad_stride, O, T);
  double sqnorm = double(dot(total, total, O)) * (double(dot(mean, mean, I)) + bias);
  for (int64_t begin = 0; begin < T; begin += N) {
    int64_t width = A.width(begin);
    panel_times_vector(A, begin, mean, act_mean);
    panel_times_vector(D, begin, total, grad_total);
    double cross = dot(act_mean, grad_total, min_of(width, T - begin));
    strip_product<true>(A, begin, padded, A, begin, act_strip);
    strip_product<true>(D, begin, padded, D, begin, grad_strip);
    double twice = 0, once = 0;
    int64_t diagonal = min_of(width, T - begin);
    for (int64_t i = 0; i < diagonal; ++i) {  // the block on the diagonal: below it twice, on it once
      const acc *a = act_strip + i * width, *d = grad_strip + i * width;
      twice += dot(a, d, i);
      once += a[i] * d[i];
    }
    // Below the diagonal block the strips are whole; padding positions are zero.
    if (T - begin > diagonal)
      twice += dot(act_strip + diagonal * width, grad_strip + diagonal * width, (T - begin - diagonal) * width);
    sqnorm += 2 * (twice + cross) + once;
  }
  static_assert(L % M == 0, "a row tile must not straddle two panels");
  return sqnorm;
}

// G in tiles of one column panel at a time, squared and summed; I × O never exists.
template <typename in_t>
double sqnorm_direct(const in_t* act, int64_t act_stride, const in_t* grad, int64_t grad_stride, int64_t T, int64_t I,
                     int64_t O, bool bias, Scratch& scratch) {
  using acc = acc_t<in_t>;
  int64_t I_padded = round_up(I, LANES<acc>), O_padded = round_up(O, LANES<acc>);
  acc* memory = scratch.get<acc>(T * (I_padded + O_padded) + O + O_padded * NR<acc>);
  acc *total = memory + T * (I_padded + O_padded), *strip = total + O;
  Packed<acc> A = pack_all_columns(memory, act, act_stride, T, I);
  Packed<acc> D = pack_all_columns(memory + T * I_padded, grad, grad_stride, T, O);
  double sqnorm = 0;
  for (int64_t begin = 0; begin < I; begin += NR<acc>) {
    int64_t width = A.width(begin);
    strip_product(D, 0, O_padded, A, begin, strip);
    sqnorm += row_sqnorm(strip, O * width);
  }
  if (bias) {
    column_sums(grad, grad_stride, T, O, total);
    sqnorm += dot(total, total, O);
  }
  return sqnorm;
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
