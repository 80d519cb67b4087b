// Per-example gradients of a normalisation layer's weight and bias on the CPU.
//
// v1  Mean and variance are taken again from the input, a row or a group at a time, and the products are added up while it
//     is still in cache: input and grad are read once, and neither x̂ nor grad∘x̂ is ever in memory, where torch makes both
//     (bench/kernels/bench_norm_grads.py).
#include "norm_grads.h"

#include "gemm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch sums_scratch;

constexpr int64_t CHUNK = 1024;  // elements whose sums are taken in the accumulator's type before they join a double
constexpr int64_t ROWS = 64;     // and rows, where sums run over rows

// Σ fn(i) over n elements: vector(i) for LANES of them, scalar(i) for the rest.
template <typename acc, typename V, typename S> double sum_of(int64_t n, V&& vector, S&& scalar) {
  constexpr int64_t L = LANES<acc>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += CHUNK) {
    int64_t end = min_of(n, begin + CHUNK), i = begin;
    vec_t<acc> even = {}, odd = {};
    for (; i + 2 * L <= end; i += 2 * L) {
      even += vector(i);
      odd += vector(i + L);
    }
    acc sum = sum_lanes<acc>(even + odd);
    for (; i < end; ++i) sum += scalar(i);
    total += double(sum);
  }
  return total;
}

template <typename acc> struct Moments { acc mean, rstd; };

// Of n elements in `rows` rows.
template <typename in_t>
Moments<acc_t<in_t>> moments_of(const in_t* x, int64_t stride, int64_t rows, int64_t D, double eps, bool rms) {
  using acc = acc_t<in_t>;
  double sum = 0, squares = 0, n = double(rows * D);
  for (int64_t r = 0; !rms && r < rows; ++r) {
    const in_t* row = x + r * stride;
    sum += sum_of<acc>(D, [&](int64_t i) { return load_converted(row + i); }, [&](int64_t i) { return load(row[i]); });
  }
  acc mean = acc(sum / n);
  for (int64_t r = 0; r < rows; ++r) {
    const in_t* row = x + r * stride;
    auto vector = [&](int64_t i) { vec_t<acc> d = load_converted(row + i) - mean; return d * d; };
    auto scalar = [&](int64_t i) { acc d = load(row[i]) - mean; return d * d; };
    squares += sum_of<acc>(D, vector, scalar);
  }
  return {mean, acc(1 / __builtin_sqrt(squares / n + eps))};
}

template <typename in_t>
void norm_grads_rows_kernel(const NormFactors& f, double eps, bool rms, acc_t<in_t>* weight, acc_t<in_t>* bias,
                            int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t L = LANES<acc>;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < f.B; ++b) {
    acc *weight_b = weight + b * f.D, *bias_b = bias + b * f.D;
    acc *products = sums_scratch.get<acc>(2 * f.D), *sums = products + f.D;
    memset(weight_b, 0, size_t(f.D) * sizeof(acc));
    memset(bias_b, 0, size_t(f.D) * sizeof(acc));
    for (int64_t t0 = 0; t0 < f.T; t0 += ROWS) {
      memset(products, 0, size_t(2 * f.D) * sizeof(acc));
      for (int64_t t = t0; t < min_of(f.T, t0 + ROWS); ++t) {
        const in_t* x = static_cast<const in_t*>(f.input) + b * f.input_stride_b + t * f.input_stride_t;
        const in_t* g = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + t * f.grad_stride_t;
        auto m = moments_of(x, 0, 1, f.D, eps, rms);
        int64_t d = 0;
        for (; d + L <= f.D; d += L) {
          vec_t<acc> grad = load_converted(g + d);
          store_vec(products + d, load_vec(products + d) + grad * ((load_converted(x + d) - m.mean) * m.rstd));
          store_vec(sums + d, load_vec(sums + d) + grad);
        }
        for (; d < f.D; ++d) {
          acc grad = load(g[d]);
          products[d] += grad * ((load(x[d]) - m.mean) * m.rstd);
          sums[d] += grad;
        }
      }
      for (int64_t d = 0; d < f.D; ++d) {
        weight_b[d] += products[d];
        bias_b[d] += sums[d];
      }
    }
  }
}

template <typename in_t>
void norm_grads_groups_kernel(const NormFactors& f, double eps, acc_t<in_t>* weight, acc_t<in_t>* bias, int threads) {
  using acc = acc_t<in_t>;
  const int64_t channels = f.T / f.groups;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < f.B * f.groups; ++task) {
    int64_t b = task / f.groups, first = task % f.groups * channels;
    const in_t* x0 = static_cast<const in_t*>(f.input) + b * f.input_stride_b + first * f.input_stride_t;
    const in_t* g0 = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + first * f.grad_stride_t;
    auto m = moments_of(x0, f.input_stride_t, channels, f.D, eps, false);
    for (int64_t c = 0; c < channels; ++c) {
      const in_t *x = x0 + c * f.input_stride_t, *g = g0 + c * f.grad_stride_t;
      double product = sum_of<acc>(
          f.D, [&](int64_t i) { return load_converted(g + i) * (load_converted(x + i) - m.mean); },
          [&](int64_t i) { return load(g[i]) * (load(x[i]) - m.mean); });
      double sum = sum_of<acc>(f.D, [&](int64_t i) { return load_converted(g + i); },
                               [&](int64_t i) { return load(g[i]); });
      weight[b * f.T + first + c] = acc(product * double(m.rstd));
      bias[b * f.T + first + c] = acc(sum);
    }
  }
}

}  // namespace

void norm_grads_cpu(const NormFactors& f, double eps, bool rms, void* weight, void* bias, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    if (f.groups)
      norm_grads_groups_kernel<in_t>(f, eps, static_cast<acc*>(weight), static_cast<acc*>(bias), threads);
    else
      norm_grads_rows_kernel<in_t>(f, eps, rms, static_cast<acc*>(weight), static_cast<acc*>(bias), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
