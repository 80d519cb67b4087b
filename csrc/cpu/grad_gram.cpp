// ⟨G_b, G_c⟩ for all pairs of examples on the CPU.
//
// v1  Both factors are packed once, a group of whole examples at a time; for every pair of groups on or below the
//     diagonal both products are made strip by strip and multiplied and summed over positions in cache. Half the FLOPs
//     of two full products, and neither [B·T, B·T] matrix exists (bench/kernels/bench_grad_gram.py).
#include "grad_gram.h"

#include "sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch packed_scratch, strip_scratch;

constexpr int64_t GROUP_POSITIONS = 96;

template <typename in_t> void grad_gram_kernel(const LinearFactors& f, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t L = LANES<acc>, N = NR<acc>, M = MR<acc>;
  const int64_t B = f.B, T = f.T, I = f.I, O = f.O, wide = I + f.bias;
  // A sequence gets its deviations from both means, and the mean of A with Σ_t D[t] as one more position: the same G,
  // and no cancellation where activations or gradients hardly vary.
  const bool centred = T > 1;
  const int64_t positions = T + centred, examples = max_of(1, GROUP_POSITIONS / positions);
  const int64_t groups = (B + examples - 1) / examples, padded = round_up(examples * positions, L);
  acc* packed = packed_scratch.get<acc>(groups * padded * (wide + O));

  auto group_of = [&](int64_t g, bool act) {
    acc* data = packed + g * padded * (wide + O) + (act ? 0 : padded * wide);
    return Packed<acc>{data, min_of(examples, B - g * examples) * positions, act ? wide : O};
  };
  // The rows of one group in row-major memory, then packed.
  auto pack_group = [&](int64_t g, bool act) {
    Packed<acc> group = group_of(g, act);
    const int64_t F = act ? I : O, depth = group.depth;
    acc* rows = strip_scratch.get<acc>((group.columns + 2) * depth);
    acc *mean = rows + group.columns * depth, *total = mean + depth;
    for (int64_t e = 0; e < group.columns / positions; ++e) {
      int64_t b = g * examples + e, stride = act ? f.act_stride_t : f.grad_stride_t;
      const in_t* from = act ? static_cast<const in_t*>(f.act) + b * f.act_stride_b
                             : static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
      acc* to = rows + e * positions * depth;
      if (centred) exact_sums(from, stride, T, F, total, mean);
      for (int64_t t = 0; t < T; ++t) {
        convert(from + t * stride, to + t * depth, F);
        if (centred)
          for (int64_t i = 0; i < F; ++i) to[t * depth + i] -= mean[i];
        if (depth > F) to[t * depth + F] = centred ? 0 : 1;
      }
      if (centred) {
        memcpy(to + T * depth, act ? mean : total, size_t(F) * sizeof(acc));
        if (depth > F) to[T * depth + F] = 1;
      }
    }
    pack_all_rows(const_cast<acc*>(group.data), rows, depth, depth, group.columns);
  };

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t g = 0; g < 2 * groups; ++g) pack_group(g / 2, g % 2);
    acc* strip = strip_scratch.get<acc>(2 * padded * N + N);
    acc *act_strip = strip, *grad_strip = act_strip + padded * N, *sums = grad_strip + padded * N;
    // The first columns have the most rows below them: dynamic, in this order, ends evenly.
#pragma omp for schedule(dynamic)
    for (int64_t column = 0; column < groups; ++column)
      for (int64_t row = column; row < groups; ++row) {
        Packed<acc> A = group_of(row, true), D = group_of(row, false);
        Packed<acc> A_columns = group_of(column, true), D_columns = group_of(column, false);
        for (int64_t begin = 0; begin < A_columns.columns; begin += N) {
          int64_t width = A_columns.width(begin), valid = min_of(width, A_columns.columns - begin);
          // In a group's product with itself the examples before this panel's first one are known by symmetry.
          int64_t first = row == column ? begin / positions : 0, first_row = first * positions / M * M;
          strip_product(A, first_row, A.columns, A_columns, begin, act_strip);
          strip_product(D, first_row, D.columns, D_columns, begin, grad_strip);
          for (int64_t e = first; e < A.columns / positions; ++e) {
            for (int64_t j = 0; j < width; j += L) {
              vec_t<acc> sum = {};
              for (int64_t t = 0; t < positions; ++t) {
                int64_t i = (e * positions + t - first_row) * width + j;
                sum += load_vec(act_strip + i) * load_vec(grad_strip + i);
              }
              store_vec(sums + j, sum);
            }
            acc* to = out + (row * examples + e) * B + column * examples;
            for (int64_t j = 0; j < valid; ++j) {
              int64_t c = (begin + j) / positions;  // its first position begins the sum
              to[c] = (begin + j) % positions ? to[c] + sums[j] : sums[j];
            }
          }
        }
      }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = b + 1; c < B; ++c) out[b * B + c] = out[c * B + b];
  }
}

}  // namespace

void grad_gram_cpu(const LinearFactors& f, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    if (f.T > 0)
      grad_gram_kernel<in_t>(f, static_cast<acc_t<in_t>*>(out), threads);
    else
      memset(out, 0, size_t(f.B * f.B) * sizeof(acc_t<in_t>));
  });
}

}  // namespace gradclust::GRADCLUST_ISA
