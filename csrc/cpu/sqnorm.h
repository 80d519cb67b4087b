// ‖G_b‖² of one example of a linear layer: shared by grad_sqnorm.cpp and grad_quantities.cpp.
#pragma once
#include "gemm.h"
#include "grad_sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// Independent vector accumulators hide the FMA latency.
template <typename in_t> acc_t<in_t> short_row_sqnorm(const in_t* row, int64_t n) {
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

// In double from block to block: the rounding of a float32 sum over a million equal numbers is 1e-4 of it.
template <typename in_t> double row_sqnorm(const in_t* row, int64_t n) {
  constexpr int64_t BLOCK = 4096;
  double total = 0;
  for (int64_t i = 0; i < n; i += BLOCK) total += short_row_sqnorm(row + i, min_of(BLOCK, n - i));
  return total;
}

// total[f] = Σ_t rows[t, f], added in double, and mean[f] = total[f] / T. Where rows nearly cancel, the rounding of a
// float32 sum would be most of what is left.
template <typename in_t>
void exact_sums(const in_t* rows, int64_t stride, int64_t T, int64_t F, acc_t<in_t>* total, acc_t<in_t>* mean) {
  using acc = acc_t<in_t>;
  constexpr int64_t WIDTH = 512, ROWS = 4;  // long pieces of few rows: streams that the prefetcher follows
  double sum[WIDTH];
  acc converted[ROWS][WIDTH];
  for (int64_t f = 0; f < F; f += WIDTH) {
    const int64_t n = min_of(WIDTH, F - f);
    for (int64_t j = 0; j < n; ++j) sum[j] = 0;
    for (int64_t t = 0; t < T; t += ROWS) {
      const acc* row[ROWS];
      for (int64_t r = 0; r < ROWS; ++r) {
        const in_t* from = rows + min_of(t + r, T - 1) * stride + f;
        row[r] = as_accumulator(from);
        if (row[r]) continue;
        convert(from, converted[r], n);
        row[r] = converted[r];
      }
      if (t + ROWS <= T)
        for (int64_t j = 0; j < n; ++j)
          sum[j] += (double(row[0][j]) + double(row[1][j])) + (double(row[2][j]) + double(row[3][j]));
      else
        for (int64_t r = 0; t + r < T; ++r)
          for (int64_t j = 0; j < n; ++j) sum[j] += row[r][j];
    }
    for (int64_t j = 0; j < n; ++j) total[f + j] = acc(sum[j]), mean[f + j] = acc(sum[j] / double(T));
  }
}

// Squared lengths between these lost nothing to the ends of the accumulator's range.
template <typename acc> constexpr double SMALL = sizeof(acc) == 4 ? 1e-28 : 1e-280;
template <typename acc> constexpr double LARGE = sizeof(acc) == 4 ? 1e36 : 1e300;
template <typename acc> bool in_range(double sqnorm) { return sqnorm >= SMALL<acc> && sqnorm <= LARGE<acc>; }

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

// Without centring the Gram sum may cancel: near-constant activations against gradients of mean zero leave little more
// than the rounding of what cancelled. `lengths` is Σ_t ‖A[t]‖‖D[t]‖, the most that ‖G‖ could be. Rounding errors of the
// entries, independent of each other, come to about 5 · 2⁻²⁴ lengths² / √T, which must stay below 5e-5 of the sum
// (tests/test_numerics.py).
GRADCLUST_INLINE bool cancels(double sqnorm, double lengths, int64_t T) {
  return !(sqnorm * __builtin_sqrt(double(T)) >= 6e-3 * lengths * lengths);
}

// Σ AAᵀ∘DDᵀ, or with Ã = A − 1āᵀ, D̃ = D − 1d̄ᵀ and s = Σ_t D[t]: Σ ÃÃᵀ∘D̃D̃ᵀ + 2 (D̃ s)·(Ã ā) + ‖s‖²‖ā‖². The lower
// triangle is computed, one column panel at a time; T × T never exists. `doubtful`: a Gram matrix left the range, or
// without centring the sum cancelled. Element is what a factor is packed to: the accumulator's type, or pairs of bf16.
template <bool CENTRED, typename Element, typename in_t>
double sqnorm_gram(const in_t* act, int64_t act_stride, const in_t* grad, int64_t grad_stride, int64_t T, int64_t I,
                   int64_t O, bool bias, Scratch& scratch, bool& doubtful) {
  using acc = acc_t<in_t>;
  constexpr int64_t L = LANES<acc>, N = NR<acc>, M = MR<acc>;
  int64_t padded = round_up(T, L);
  acc* memory = scratch.get<acc>((padded + 2) * (I + O) + 2 * padded * N + 2 * N);
  acc *mean = memory + padded * (I + O), *total = mean + I, *act_total = total + O, *grad_mean = act_total + I;
  acc *act_strip = grad_mean + O, *grad_strip = act_strip + padded * N;
  acc *act_mean = grad_strip + padded * N, *grad_total = act_mean + N;
  if (CENTRED) exact_sums(act, act_stride, T, I, act_total, mean);
  if (CENTRED || bias) exact_sums(grad, grad_stride, T, O, total, grad_mean);
  auto pack = [&](acc* to, const in_t* rows, int64_t stride, int64_t F, const acc* shift) {
    if constexpr (Same<Element, acc>)
      return pack_all_rows(to, rows, stride, F, T, CENTRED ? shift : nullptr);
    else
      return pack_all_rows(reinterpret_cast<bf16_pair*>(to), rows, stride, F, T);
  };
  Packed<Element> A = pack(memory, act, act_stride, I, mean);
  Packed<Element> D = pack(memory + padded * I, grad, grad_stride, O, grad_mean);
  double sqnorm = bias ? double(dot(total, total, O)) : 0;
  double weight_sqnorm = CENTRED ? double(dot(total, total, O)) * double(dot(mean, mean, I)) : 0, lengths = 0;
  acc longest_act = 0, longest_grad = 0;
  for (int64_t begin = 0; begin < T; begin += N) {
    int64_t width = A.width(begin);
    double cross = 0;
    if constexpr (CENTRED) {
      panel_times_vector(A, begin, mean, act_mean);
      panel_times_vector(D, begin, total, grad_total);
      cross = dot(act_mean, grad_total, min_of(width, T - begin));
    }
    strip_product<true>(A, begin, padded, A, begin, act_strip);
    strip_product<true>(D, begin, padded, D, begin, grad_strip);
    double twice = 0, once = 0;
    int64_t diagonal = min_of(width, T - begin);
    for (int64_t i = 0; i < diagonal; ++i) {  // the block on the diagonal: below it twice, on it once
      const acc *a = act_strip + i * width, *d = grad_strip + i * width;
      twice += dot(a, d, i);
      once += a[i] * d[i];
      lengths += __builtin_sqrt(double(a[i]) * double(d[i]));
      longest_act = max_of(longest_act, a[i]);
      longest_grad = max_of(longest_grad, d[i]);
    }
    // Below the diagonal block the strips are whole; padding positions are zero.
    if (T - begin > diagonal)
      twice += dot(act_strip + diagonal * width, grad_strip + diagonal * width, (T - begin - diagonal) * width);
    weight_sqnorm += 2 * (twice + cross) + once;
  }
  doubtful = (longest_act != 0 && !in_range<acc>(longest_act)) || (longest_grad != 0 && !in_range<acc>(longest_grad));
  if (!CENTRED) doubtful |= lengths != 0 && cancels(weight_sqnorm, lengths, T);
  static_assert(L % M == 0, "a row tile must not straddle two panels");
  return sqnorm + weight_sqnorm;
}

// G = D̃ᵀÃ + s āᵀ in tiles of one column panel at a time, squared and summed; I × O never exists.
template <typename in_t>
double sqnorm_direct(const in_t* act, int64_t act_stride, const in_t* grad, int64_t grad_stride, int64_t T, int64_t I,
                     int64_t O, bool bias, Scratch& scratch) {
  using acc = acc_t<in_t>;
  int64_t I_padded = round_up(I, LANES<acc>), O_padded = round_up(O, LANES<acc>);
  acc* memory = scratch.get<acc>((T + 2) * (I_padded + O_padded) + O_padded * NR<acc>);
  acc *mean = memory + T * (I_padded + O_padded), *total = mean + I_padded, *act_total = total + O_padded;
  acc *grad_mean = act_total + I_padded, *strip = grad_mean + O_padded;
  exact_sums(act, act_stride, T, I, act_total, mean);
  exact_sums(grad, grad_stride, T, O, total, grad_mean);
  for (int64_t i = I; i < I_padded; ++i) mean[i] = 0;
  Packed<acc> A = pack_all_columns(memory, act, act_stride, T, I, mean);
  Packed<acc> D = pack_all_columns(memory + T * I_padded, grad, grad_stride, T, O, grad_mean);
  double sqnorm = bias ? double(dot(total, total, O)) : 0;
  for (int64_t begin = 0; begin < I; begin += NR<acc>) {
    int64_t width = A.width(begin);
    strip_product(D, 0, O_padded, A, begin, strip);
    for (int64_t o = 0; o < O; ++o)
      for (int64_t i = 0; i < width; ++i) strip[o * width + i] += total[o] * mean[begin + i];
    sqnorm += row_sqnorm(strip, O * width);
  }
  return sqnorm;
}

// --- where squares leave the accumulator's range although the gradient's squared norm does not

// The largest magnitude, or −1 where something is infinite or NaN.
template <typename in_t> double magnitude(const in_t* rows, int64_t stride, int64_t T, int64_t F) {
  double most = 0;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t f = 0; f < F; ++f) {
      double x = load(rows[t * stride + f]);
      x = x < 0 ? -x : x;
      if (!(x <= 1.7976931348623157e308)) return -1;
      if (x > most) most = x;
    }
  return most;
}

// rows · 2^−exponent, without gaps.
template <typename in_t>
void scale_rows(const in_t* rows, int64_t stride, int64_t T, int64_t F, int exponent, acc_t<in_t>* out) {
  for (int64_t t = 0; t < T; ++t)
    for (int64_t f = 0; f < F; ++f) out[t * F + f] = acc_t<in_t>(__builtin_ldexp(load(rows[t * stride + f]), -exponent));
}

// The same with both factors divided by a power of two near their largest magnitude; `plain` is what came without.
template <typename in_t>
double sqnorm_scaled(bool gram, const in_t* act, int64_t act_stride, const in_t* grad, int64_t grad_stride, int64_t T,
                     int64_t I, int64_t O, bool bias, Scratch& scratch, double plain) {
  using acc = acc_t<in_t>;
  double a = magnitude(act, act_stride, T, I), d = magnitude(grad, grad_stride, T, O);
  if (a < 0 || d < 0) return plain;
  if (d == 0 || (a == 0 && !bias)) return 0;
  int a_exponent = 0, d_exponent = 0;
  __builtin_frexp(a, &a_exponent);
  __builtin_frexp(d, &d_exponent);
  Scratch copies;
  acc* A = copies.get<acc>(T * (I + O) + 2 * O);
  acc *D = A + T * I, *total = D + T * O;
  scale_rows(act, act_stride, T, I, a_exponent, A);
  scale_rows(grad, grad_stride, T, O, d_exponent, D);
  bool ignored;
  double sqnorm = T == 1 ? row_sqnorm(A, I) * row_sqnorm(D, O)
                  : gram ? sqnorm_gram<true, acc>(A, I, D, O, T, I, O, false, scratch, ignored)
                         : sqnorm_direct(A, I, D, O, T, I, O, false, scratch);
  sqnorm = __builtin_ldexp(sqnorm, 2 * (a_exponent + d_exponent));
  if (!bias) return sqnorm;
  exact_sums(D, O, T, O, total, total + O);
  return sqnorm + __builtin_ldexp(double(dot(total, total, O)), 2 * d_exponent);
}

template <typename in_t>
double sqnorm_sequence(SequenceRoute route, const in_t* act, int64_t act_stride, const in_t* grad, int64_t grad_stride,
                       int64_t T, int64_t I, int64_t O, bool bias, Scratch& scratch) {
  using acc = acc_t<in_t>;
  bool doubtful = false;
  auto safe = [&](double sqnorm) { return !doubtful && in_range<acc>(sqnorm); };
  double sqnorm = 0;
  if (route == SequenceRoute::direct) {
    sqnorm = sqnorm_direct(act, act_stride, grad, grad_stride, T, I, O, bias, scratch);
  } else {
    // Centring takes up to half of a short sequence's time and is seldom needed.
    if constexpr (Same<in_t, bf16_t>) {
      if (route == SequenceRoute::gram_of_pairs)
        sqnorm = sqnorm_gram<false, bf16_pair>(act, act_stride, grad, grad_stride, T, I, O, bias, scratch, doubtful);
    }
    if (route == SequenceRoute::gram)
      sqnorm = sqnorm_gram<false, acc>(act, act_stride, grad, grad_stride, T, I, O, bias, scratch, doubtful);
    if (safe(sqnorm)) return sqnorm;
    sqnorm = sqnorm_gram<true, acc>(act, act_stride, grad, grad_stride, T, I, O, bias, scratch, doubtful);
  }
  if (safe(sqnorm)) return sqnorm;
  return sqnorm_scaled(route != SequenceRoute::direct, act, act_stride, grad, grad_stride, T, I, O, bias, scratch,
                       sqnorm);
}

// One position: from ‖act‖² and ‖grad‖², again where one of them left the range.
template <typename in_t>
double sqnorm_rank1(double act_sqnorm, double grad_sqnorm, const in_t* act, const in_t* grad, int64_t I, int64_t O,
                    bool bias, Scratch& scratch) {
  using acc = acc_t<in_t>;
  double sqnorm = (act_sqnorm + bias) * grad_sqnorm;
  if (in_range<acc>(act_sqnorm) && in_range<acc>(grad_sqnorm)) return sqnorm;
  return sqnorm_scaled(false, act, I, grad, O, 1, I, O, bias, scratch, sqnorm);
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
