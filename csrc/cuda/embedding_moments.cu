// Σ_b G_b and Σ_b G_b∘G_b of an embedding table on CUDA devices, from the batch's positions sorted by table row.
//
// v1  The sort is stable, so a table row's positions come example by example. A warp takes a table row that somebody looked
//     up and 32 × 16 bytes of features, four gradients in flight: an example's sum stays in registers, is squared when
//     the example ends, and the two totals are written once. Every gradient is read once, nothing but the result is as
//     large as the table, no atomics. A row that a large part of the batch looks up is one warp's work for each 512
//     bytes: that bounds the time. Not measured yet.
#include "embedding_rows.cuh"

namespace gradclust {
namespace {

constexpr int WARPS = 8, AHEAD = 4;

// sorted, order [B · T]; first, second [V, D], of which only rows that were looked up are written.
template <typename in_t, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS)
    embedding_moments_kernel(const __grid_constant__ EmbeddingFactors f, const int64_t* __restrict__ sorted,
                             const int64_t* __restrict__ order, int64_t blocks, Divisor by_T,
                             acc_t<in_t>* __restrict__ first, acc_t<in_t>* __restrict__ second) {
  using acc = acc_t<in_t>;
  constexpr int WIDTH = LANE_FEATURES<in_t, WIDE>;
  int64_t task = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32, p = task / blocks, n = f.B * f.T;
  int64_t feature = (task % blocks * 32 + threadIdx.x % 32) * WIDTH;
  if (p >= n || feature >= f.D) return;
  int64_t row = sorted[p];
  if (row == f.padding || (p > 0 && sorted[p - 1] == row)) return;  // nobody's, or another warp's
  acc sum[WIDTH] = {};
  double total[WIDTH] = {}, squares[WIDTH] = {};  // a frequent row has as many terms as the batch has examples
  auto end_example = [&] {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      total[j] += double(sum[j]);
      squares[j] += double(sum[j]) * double(sum[j]);
      sum[j] = 0;
    }
  };
  int example = by_T.quotient(int(order[p]));
  for (bool more = true; more; p += AHEAD) {
    __align__(16) in_t values[AHEAD][WIDTH];
    int of[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      more = more && p + a < n && sorted[p + a] == row;
      of[a] = -1;
      if (!more) continue;
      int i = int(order[p + a]);
      of[a] = by_T.quotient(i);
      load_features<in_t, WIDE>(static_cast<const in_t*>(f.grad) + of[a] * f.grad_stride_b +
                                    (i - of[a] * f.T) * f.grad_stride_t + feature,
                                values[a]);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (of[a] < 0) continue;
      if (of[a] != example) end_example();
      example = of[a];
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) sum[j] += load(values[a][j]);
    }
  }
  end_example();
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    first[row * f.D + feature + j] = acc(total[j]);
    second[row * f.D + feature + j] = acc(squares[j]);
  }
}

}  // namespace

const char* embedding_moments_cuda(const EmbeddingFactors& f, const int64_t* sorted, const int64_t* order, void* first,
                                   void* second, void* stream) {
  char sizes[96];
  describe(f, sizes);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    bool wide = is_wide(f, sizeof(in_t));
    int64_t features = 32 * (wide ? LANE_FEATURES<in_t, true> : 1), blocks = (f.D + features - 1) / features;
    auto kernel = wide ? embedding_moments_kernel<in_t, true> : embedding_moments_kernel<in_t, false>;
    error = launch("embedding_moments_kernel", sizes, kernel, unsigned((f.B * f.T * blocks + WARPS - 1) / WARPS),
                   32 * WARPS, 0, stream, f, sorted, order, blocks, Divisor(f.T), static_cast<acc*>(first),
                   static_cast<acc*>(second));
  });
  return error;
}

}  // namespace gradclust
