// Sums and sizes of clusters on CUDA devices, from row numbers sorted by cluster.
//
// v1  A block adds up to CLUSTER_PIECE rows of one cluster: 16-byte loads, several rows side by side, float64 sums. A second
//     kernel adds a cluster's pieces in ascending order, so there is no atomic and the bits never change; a cluster that
//     holds all rows fills the device like many small ones. Reads every row once. Not measured yet.
#include "cluster.h"
#include "cluster_pieces.cuh"

namespace gradclust {
namespace {

constexpr int THREADS = 256;

// begin [K + 1], counts [K].
__global__ void cluster_sums_segments_kernel(const int32_t* __restrict__ sorted, int64_t N, int64_t K,
                                             int64_t* __restrict__ begin, int64_t* __restrict__ counts) {
  int64_t k = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (k > K) return;
  begin[k] = lower_bound(sorted, N, k);
  if (k < K) counts[k] = lower_bound(sorted, N, k + 1) - begin[k];
}

// One piece's sums → partial [slots, R]. `columns` threads lie side by side along a row, the others take further rows.
template <typename in_t, int WIDTH>
__global__ void __launch_bounds__(THREADS, 4)
    cluster_sums_pieces_kernel(Rows points, const int64_t* __restrict__ order, const int64_t* __restrict__ begin,
                               int64_t K, int columns, double* __restrict__ partial) {
  int64_t slot = blockIdx.x;
  Piece piece = piece_at(begin, K, slot);
  if (piece.first >= piece.last) return;  // a spare slot
  int lanes = THREADS / columns, lane = threadIdx.x / columns;
  int64_t column = (int64_t(blockIdx.y) * columns + threadIdx.x % columns) * WIDTH;
  double sum[WIDTH] = {};
  if (column < points.R) {
    const in_t* data = static_cast<const in_t*>(points.data) + column;
#pragma unroll 4
    for (int64_t m = piece.first + lane; m < piece.last; m += lanes) {
      const in_t* x = data + order[m] * points.stride;
      if constexpr (WIDTH > 1) {
        uint4 bits = __ldg(reinterpret_cast<const uint4*>(x));
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum[j] += double(load(reinterpret_cast<const in_t*>(&bits)[j]));
      } else {
        sum[0] += double(load(*x));
      }
    }
  }
  GRADCLUST_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);  // [THREADS, WIDTH]
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) sums[threadIdx.x * WIDTH + j] = sum[j];
  __syncthreads();
  if (lane > 0 || column >= points.R) return;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    double total = 0;
    for (int other = 0; other < lanes; ++other) total += sums[(other * columns + threadIdx.x) * WIDTH + j];
    partial[slot * points.R + column + j] = total;
  }
}

template <typename acc>
__global__ void __launch_bounds__(THREADS)
    cluster_sums_total_kernel(const double* __restrict__ partial, const int64_t* __restrict__ begin, int64_t K, int64_t R,
                              acc* __restrict__ sums) {
  int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= K * R) return;
  int64_t k = i / R, r = i % R, slot = first_slot(begin, k), pieces = num_pieces(begin, k);
  double total = 0;
#pragma unroll 4
  for (int64_t p = 0; p < pieces; ++p) total += partial[(slot + p) * R + r];
  sums[i] = acc(total);
}

}  // namespace

const char* cluster_sums_cuda(const Rows& points, const int32_t* sorted, const int64_t* order, int64_t K, int64_t* begin,
                              int64_t* counts, double* partial, void* sums, void* stream) {
  int64_t N = points.N, R = points.R;
  char sizes[96];
  snprintf(sizes, sizeof sizes, "N=%lld, R=%lld, K=%lld", (long long)N, (long long)R, (long long)K);
  const char* error = launch("cluster_sums_segments_kernel", sizes, cluster_sums_segments_kernel,
                             unsigned(ceil_div(K + 1, THREADS)), THREADS, 0, stream, sorted, N, K, begin, counts);
  if (error || R == 0) return error;
  dispatch(points.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    constexpr int WIDTH = 16 / sizeof(in_t);
    bool wide = R % WIDTH == 0 && reinterpret_cast<uintptr_t>(points.data) % 16 == 0 && points.stride % WIDTH == 0;
    int64_t across = wide ? R / WIDTH : R;
    int columns = 1;
    while (columns < across && columns < THREADS) columns *= 2;
    dim3 grid(unsigned(N / CLUSTER_PIECE + K), unsigned(ceil_div(across, columns)));
    error = wide ? launch("cluster_sums_pieces_kernel", sizes, cluster_sums_pieces_kernel<in_t, WIDTH>, grid, THREADS,
                          THREADS * WIDTH * sizeof(double), stream, points, order, begin, K, columns, partial)
                 : launch("cluster_sums_pieces_kernel", sizes, cluster_sums_pieces_kernel<in_t, 1>, grid, THREADS,
                          THREADS * sizeof(double), stream, points, order, begin, K, columns, partial);
    if (error) return;
    error = launch("cluster_sums_total_kernel", sizes, cluster_sums_total_kernel<acc_t<in_t>>,
                   unsigned(ceil_div(K * R, THREADS)), THREADS, 0, stream, partial, begin, K, R,
                   static_cast<acc_t<in_t>*>(sums));
  });
  return error;
}

}  // namespace gradclust
