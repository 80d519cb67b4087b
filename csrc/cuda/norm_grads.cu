// Σ_t grad∘x̂ and Σ_t grad of a normalisation layer on CUDA devices.
//
// v1  A warp a row (or group) finds its mean and deviation; then threads that own 16 bytes of features add up positions,
//     several rows side by side and several slices of an example, put together in a fixed order; with groups a warp adds
//     up a channel. 16-byte loads; the input is read three times, twice from cache where a row fits. No atomics. Not
//     measured yet.
#include "norm_grads.h"

#include "common.cuh"

namespace gradclust {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// fn(j, x[j]) for j = lane, lane + 32, … of a row, 16 bytes at a time where `wide` says that it is aligned.
template <typename in_t, typename Fn>
__device__ __forceinline__ void for_row(const in_t* __restrict__ x, int64_t n, int lane, bool wide, Fn&& fn) {
  constexpr int WIDTH = 16 / sizeof(in_t);
  if (wide) {
    for (int64_t i = lane; i < n / WIDTH; i += 32) {
      uint4 bits = __ldg(reinterpret_cast<const uint4*>(x) + i);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) fn(i * WIDTH + j, acc_t<in_t>(load(reinterpret_cast<const in_t*>(&bits)[j])));
    }
  } else {
    for (int64_t i = lane; i < n; i += 32) fn(i, acc_t<in_t>(load(x[i])));
  }
}

// stats [units, 2]: mean and 1/deviation of a unit, which is `inner` rows of D numbers.
template <typename in_t>
__global__ void __launch_bounds__(THREADS, 4)
    norm_grads_stats_kernel(const __grid_constant__ NormFactors f, int64_t units, int64_t inner, acc_t<in_t> eps, bool rms,
                            bool wide, acc_t<in_t>* __restrict__ stats) {
  using acc = acc_t<in_t>;
  int64_t unit = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, per_example = f.T / inner;
  if (unit >= units) return;
  int lane = threadIdx.x % 32;
  const in_t* x = static_cast<const in_t*>(f.input) + unit / per_example * f.input_stride_b +
                  unit % per_example * inner * f.input_stride_t;
  acc count = acc(inner) * acc(f.D), sum = 0, square = 0;
  if (!rms)
    for (int64_t r = 0; r < inner; ++r)
      for_row(x + r * f.input_stride_t, f.D, lane, wide, [&](int64_t, acc value) { sum += value; });
  acc mean = warp_sum(sum) / count;
  for (int64_t r = 0; r < inner; ++r)
    for_row(x + r * f.input_stride_t, f.D, lane, wide,
            [&](int64_t, acc value) { square += (value - mean) * (value - mean); });
  square = warp_sum(square) / count;
  if (lane == 0) stats[2 * unit] = mean, stats[2 * unit + 1] = 1 / sqrt(square + eps);
}

// partial [slices, 2, B, D]: a block adds up a slice of an example's rows for `columns` · WIDTH features.
template <typename in_t, int WIDTH>
__global__ void __launch_bounds__(THREADS)
    norm_grads_rows_kernel(const __grid_constant__ NormFactors f, const acc_t<in_t>* __restrict__ stats, int columns,
                           int slices, acc_t<in_t>* __restrict__ partial) {
  using acc = acc_t<in_t>;
  GRADCLUST_SHARED(memory);
  int64_t b = blockIdx.x / slices, slice = blockIdx.x % slices;
  int64_t end = f.T * (slice + 1) / slices;
  int lanes = THREADS / columns, lane = threadIdx.x / columns;
  int64_t column = (int64_t(blockIdx.y) * columns + threadIdx.x % columns) * WIDTH;
  acc weight[WIDTH] = {}, bias[WIDTH] = {};
  if (column < f.D) {
    const in_t* input = static_cast<const in_t*>(f.input) + b * f.input_stride_b + column;
    const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + column;
#pragma unroll 2
    for (int64_t t = f.T * slice / slices + lane; t < end; t += lanes) {
      acc mean = stats[2 * (b * f.T + t)], factor = stats[2 * (b * f.T + t) + 1];
      __align__(16) in_t x[WIDTH], d[WIDTH];
      if constexpr (WIDTH > 1) {
        *reinterpret_cast<uint4*>(x) = __ldg(reinterpret_cast<const uint4*>(input + t * f.input_stride_t));
        *reinterpret_cast<uint4*>(d) = __ldg(reinterpret_cast<const uint4*>(grad + t * f.grad_stride_t));
      } else {
        x[0] = input[t * f.input_stride_t], d[0] = grad[t * f.grad_stride_t];
      }
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        weight[j] += acc(load(d[j])) * ((acc(load(x[j])) - mean) * factor);
        bias[j] += acc(load(d[j]));
      }
    }
  }
  acc* sums = reinterpret_cast<acc*>(memory);  // [2, THREADS, WIDTH]
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    sums[threadIdx.x * WIDTH + j] = weight[j];
    sums[(THREADS + threadIdx.x) * WIDTH + j] = bias[j];
  }
  __syncthreads();
  if (lane > 0 || column >= f.D) return;
#pragma unroll
  for (int j = 0; j < 2 * WIDTH; ++j) {
    acc total = 0;
    for (int other = 0; other < lanes; ++other)
      total += sums[(j / WIDTH * THREADS + other * columns + threadIdx.x) * WIDTH + j % WIDTH];
    partial[((slice * 2 + j / WIDTH) * f.B + b) * f.D + column + j % WIDTH] = total;
  }
}

template <typename acc>
__global__ void __launch_bounds__(THREADS)
    norm_grads_total_kernel(const acc* __restrict__ partial, int64_t size, int slices, acc* __restrict__ weight,
                            acc* __restrict__ bias) {
  int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= 2 * size) return;
  acc total = 0;
  for (int slice = 0; slice < slices; ++slice) total += partial[slice * 2 * size + i];
  (i < size ? weight[i] : bias[i - size]) = total;
}

// weight, bias [B, C]: a warp a channel.
template <typename in_t>
__global__ void __launch_bounds__(THREADS, 4)
    norm_grads_channels_kernel(const __grid_constant__ NormFactors f, const acc_t<in_t>* __restrict__ stats, bool wide,
                               acc_t<in_t>* __restrict__ weight, acc_t<in_t>* __restrict__ bias) {
  using acc = acc_t<in_t>;
  int64_t channel = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (channel >= f.B * f.T) return;
  int lane = threadIdx.x % 32;
  int64_t b = channel / f.T, c = channel % f.T, unit = b * f.groups + c / (f.T / f.groups);
  const in_t* input = static_cast<const in_t*>(f.input) + b * f.input_stride_b + c * f.input_stride_t;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + c * f.grad_stride_t;
  acc mean = stats[2 * unit], factor = stats[2 * unit + 1], product = 0, sum = 0;
  for_row(input, f.D, lane, wide, [&](int64_t i, acc x) {
    acc d = acc(load(grad[i]));
    product += d * ((x - mean) * factor);
    sum += d;
  });
  product = warp_sum(product), sum = warp_sum(sum);
  if (lane == 0) weight[channel] = product, bias[channel] = sum;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename in_t>
const char* run(const NormFactors& f, const char* sizes, acc_t<in_t> eps, bool rms, int slices, acc_t<in_t>* stats,
                acc_t<in_t>* partial, acc_t<in_t>* weight, acc_t<in_t>* bias, void* stream) {
  constexpr int WIDTH = 16 / sizeof(in_t);
  auto aligned = [&](const void* data, int64_t stride_b, int64_t stride_t) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_b % WIDTH == 0 && stride_t % WIDTH == 0 &&
           f.D % WIDTH == 0;
  };
  bool wide = aligned(f.input, f.input_stride_b, f.input_stride_t);
  int64_t inner = f.groups ? f.T / f.groups : 1, units = f.B * (f.T / inner);
  const char* error = launch("norm_grads_stats_kernel", sizes, norm_grads_stats_kernel<in_t>,
                             unsigned(ceil_div(units, WARPS)), THREADS, 0, stream, f, units, inner, eps, rms, wide, stats);
  if (error) return error;
  if (f.groups)
    return launch("norm_grads_channels_kernel", sizes, norm_grads_channels_kernel<in_t>,
                  unsigned(ceil_div(f.B * f.T, WARPS)), THREADS, 0, stream, f, stats, wide, weight, bias);
  wide = wide && aligned(f.grad, f.grad_stride_b, f.grad_stride_t);
  int64_t across = wide ? f.D / WIDTH : f.D;
  int columns = 1;
  while (columns < across && columns < THREADS) columns *= 2;
  dim3 grid(unsigned(f.B * slices), unsigned(ceil_div(across, columns)));
  error = wide ? launch("norm_grads_rows_kernel", sizes, norm_grads_rows_kernel<in_t, WIDTH>, grid, THREADS,
                        2 * THREADS * WIDTH * sizeof(acc_t<in_t>), stream, f, stats, columns, slices, partial)
               : launch("norm_grads_rows_kernel", sizes, norm_grads_rows_kernel<in_t, 1>, grid, THREADS,
                        2 * THREADS * sizeof(acc_t<in_t>), stream, f, stats, columns, slices, partial);
  if (error) return error;
  return launch("norm_grads_total_kernel", sizes, norm_grads_total_kernel<acc_t<in_t>>,
                unsigned(ceil_div(2 * f.B * f.D, THREADS)), THREADS, 0, stream, partial, f.B * f.D, slices, weight, bias);
}

}  // namespace

const char* norm_grads_cuda(const NormFactors& f, double eps, bool rms, int slices, void* stats, void* partial,
                            void* weight, void* bias, void* stream) {
  char sizes[128];
  snprintf(sizes, sizeof sizes, "B=%lld, T=%lld, D=%lld, groups=%lld", (long long)f.B, (long long)f.T, (long long)f.D,
           (long long)f.groups);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    error = run<in_t>(f, sizes, acc(eps), rms, slices, static_cast<acc*>(stats), static_cast<acc*>(partial),
                      static_cast<acc*>(weight), static_cast<acc*>(bias), stream);
  });
  return error;
}

}  // namespace gradclust
