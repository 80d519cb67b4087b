// ‖G_b‖² of an embedding table on CUDA devices, from every example's positions sorted by table row.
//
// v1  A block takes an example and 32 × 16 bytes of features; its warps take runs of sorted positions and read each
//     gradient once, four 16-byte loads in flight. Sums of a table row stay in registers and are squared when the row
//     ends; where it goes on into the next warp's positions the two sums are left in shared memory and put together there,
//     in order. No atomics; nothing depends on the size of the table. Not measured yet.
#include "embedding_rows.cuh"
#include "sum_rows.cuh"

namespace gradclust {
namespace {

constexpr int WARPS = 16, AHEAD = 4;

template <typename acc, int WIDTH> __device__ acc squares(const acc (&x)[WIDTH]) {
  acc sum = 0;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) sum += x[j] * x[j];
  return sum;
}

// sorted, order [B, T]; partial [B, gridDim.x / B]: one number a block.
template <typename in_t, bool WIDE>
__global__ void __launch_bounds__(32 * WARPS)
    embedding_sqnorm_kernel(const __grid_constant__ EmbeddingFactors f, const int64_t* __restrict__ sorted,
                            const int64_t* __restrict__ order, int blocks, acc_t<in_t>* __restrict__ partial) {
  using acc = acc_t<in_t>;
  constexpr int WIDTH = LANE_FEATURES<in_t, WIDE>;
  GRADCLUST_SHARED(memory);
  int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t b = blockIdx.x / blocks, feature = (int64_t(blockIdx.x % blocks) * 32 + lane) * WIDTH;
  int64_t length = (f.T + warps - 1) / warps, first = min(warp * length, f.T), last = min(first + length, f.T);
  const int64_t *row = sorted + b * f.T, *position = order + b * f.T;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b + feature;
  bool there = feature < f.D;
  acc* ends = reinterpret_cast<acc*>(memory);  // [warps, 2, 32, WIDTH]: the first table row's sum, and the last one's
  auto end = [&](int w, int which) { return ends + ((w * 2 + which) * 32 + lane) * WIDTH; };
  acc total = 0, sum[WIDTH] = {};
  bool is_first = true;  // the table row that this warp began with is still being added up
  for (int64_t p = first; p < last; p += AHEAD) {
    __align__(16) in_t values[AHEAD][WIDTH];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (p + a >= last || row[p + a] == f.padding || !there) continue;
      load_features<in_t, WIDE>(grad + position[p + a] * f.grad_stride_t, values[a]);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (p + a >= last) continue;
      if (p + a > first && row[p + a] != row[p + a - 1]) {
        if (is_first) {
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) end(warp, 0)[j] = sum[j];
        } else {
          total += squares(sum);
        }
        is_first = false;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum[j] = 0;
      }
      if (row[p + a] == f.padding || !there) continue;  // whatever it holds is nobody's gradient
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) sum[j] += load(values[a][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) end(warp, is_first ? 0 : 1)[j] = sum[j];
  __syncthreads();
  if (warp == 0) {
    acc open[WIDTH] = {};  // of the table row that the warps so far ended with
    for (int w = 0; w < warps; ++w) {
      int64_t begin = min(w * length, f.T), after = min(begin + length, f.T);
      if (begin >= after) break;
      if (w > 0 && row[begin] != row[begin - 1]) {
        total += squares(open);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) open[j] = 0;
      }
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) open[j] += end(w, 0)[j];
      if (row[begin] == row[after - 1]) continue;
      total += squares(open);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) open[j] = end(w, 1)[j];
    }
    total += squares(open);
  }
  __syncthreads();
  leave_block_sum(total, warps, memory, partial + blockIdx.x);
}

template <typename in_t, bool WIDE>
const char* run(const EmbeddingFactors& f, const char* sizes, const int64_t* sorted, const int64_t* order,
                int blocks, acc_t<in_t>* partial, acc_t<in_t>* out, void* stream) {
  int warps = int(f.T >= 8 * WARPS ? WARPS : (f.T + 7) / 8);
  size_t bytes = size_t(warps) * 64 * LANE_FEATURES<in_t, WIDE> * sizeof(acc_t<in_t>);
  const char* error = launch("embedding_sqnorm_kernel", sizes, embedding_sqnorm_kernel<in_t, WIDE>,
                             unsigned(f.B * blocks), unsigned(32 * warps), bytes, stream, f, sorted, order, blocks,
                             blocks > 1 ? partial : out);
  return error || blocks == 1 ? error : sum_rows(sizes, partial, f.B, blocks, out, stream);
}

}  // namespace

int64_t embedding_sqnorm_cuda_blocks(const EmbeddingFactors& f) {
  int64_t size = f.dtype == DType::f64 ? 8 : f.dtype == DType::f32 ? 4 : 2, features = 32 * (is_wide(f, size) ? 16 / size : 1);
  return (f.D + features - 1) / features;
}

const char* embedding_sqnorm_cuda(const EmbeddingFactors& f, const int64_t* sorted, const int64_t* order, void* partial,
                                  void* out, void* stream) {
  char sizes[96];
  describe(f, sizes);
  int blocks = int(embedding_sqnorm_cuda_blocks(f));
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    auto launcher = is_wide(f, sizeof(in_t)) ? run<in_t, true> : run<in_t, false>;
    error = launcher(f, sizes, sorted, order, blocks, static_cast<acc*>(partial), static_cast<acc*>(out), stream);
  });
  return error;
}

}  // namespace gradclust
