// ⟨G_b, G_c⟩ of an embedding table on CUDA devices, from every example's positions sorted by table row.
//
// v1  A block a pair of examples, b ≥ c: a lane takes a table row that b looked up and searches it in c's sorted rows; for
//     each found, the warp adds up both examples' gradients of that row feature by feature, in registers, and multiplies
//     the two sums. Examples without a common row cost T/4 searches a warp and read no gradient; nothing depends on the
//     size of the table and nothing is stored but the result, where one example against all in PyTorch takes a table of
//     the rows used and waits for the device B times. No atomics: sums in a fixed order, mirrored. Not measured yet.
#include "embedding_rows.cuh"
#include "sum_rows.cuh"

namespace gradclust {
namespace {

constexpr int WARPS = 4;

// The first of the T sorted rows that is at least `row`.
__device__ int64_t find_row(const int64_t* __restrict__ sorted, int64_t T, int64_t row) {
  int64_t low = 0, high = T;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (sorted[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Feature d of G_b[row]: the gradients of the positions from p on that look it up.
template <typename in_t>
__device__ acc_t<in_t> sum_positions(const EmbeddingFactors& f, int64_t b, const int64_t* __restrict__ sorted,
                                     const int64_t* __restrict__ order, int64_t p, int64_t d) {
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + d;
  int64_t row = sorted[p];
  acc_t<in_t> sum = 0;
  do sum += load(grad[order[p] * f.grad_stride_t]);
  while (++p < f.T && sorted[p] == row);
  return sum;
}

// sorted, order [B, T]; out [B, B].
template <typename in_t>
__global__ void __launch_bounds__(32 * WARPS, 8)
    embedding_gram_kernel(const __grid_constant__ EmbeddingFactors f, const int64_t* __restrict__ sorted,
                          const int64_t* __restrict__ order, acc_t<in_t>* __restrict__ out) {
  GRADCLUST_SHARED(memory);
  int64_t b = f.B - 1 - blockIdx.y, c = blockIdx.x;  // rows B − 1 − y and y of the triangle have B + 1 pairs together
  if (c > b) {
    if (b == blockIdx.y) return;  // the middle row is its own partner
    c -= b + 1, b = blockIdx.y;
  }
  const int64_t *rows_b = sorted + b * f.T, *rows_c = sorted + c * f.T, *order_b = order + b * f.T, *order_c = order + c * f.T;
  int lane = threadIdx.x % 32;
  double total = 0;  // of terms of either sign
  for (int64_t begin = threadIdx.x / 32 * 32; begin < f.T; begin += 32 * WARPS) {
    int64_t p = begin + lane, q = -1;
    if (p < f.T && rows_b[p] != f.padding && (p == 0 || rows_b[p - 1] != rows_b[p])) {
      q = find_row(rows_c, f.T, rows_b[p]);
      if (q == f.T || rows_c[q] != rows_b[p]) q = -1;
    }
    for (unsigned common = __ballot_sync(0xffffffffu, q >= 0); common; common &= common - 1) {
      int from = __ffs(int(common)) - 1;
      int64_t at_b = begin + from, at_c = __shfl_sync(0xffffffffu, q, from);
      for (int64_t d = lane; d < f.D; d += 32)
        total += double(sum_positions<in_t>(f, b, rows_b, order_b, at_b, d)) *
                 double(sum_positions<in_t>(f, c, rows_c, order_c, at_c, d));
    }
  }
  double* sum = reinterpret_cast<double*>(memory) + WARPS;
  leave_block_sum(total, WARPS, memory, sum);
  if (threadIdx.x == 0) out[b * f.B + c] = out[c * f.B + b] = acc_t<in_t>(*sum);
}

}  // namespace

const char* embedding_gram_cuda(const EmbeddingFactors& f, const int64_t* sorted, const int64_t* order, void* out,
                                void* stream) {
  char sizes[96];
  describe(f, sizes);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    error = launch("embedding_gram_kernel", sizes, embedding_gram_kernel<in_t>, dim3(unsigned(f.B + 1), unsigned((f.B + 1) / 2)),
                   32 * WARPS, (WARPS + 1) * sizeof(double), stream, f, sorted, order, static_cast<acc_t<in_t>*>(out));
  });
  return error;
}

}  // namespace gradclust
