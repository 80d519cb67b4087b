// J of a clustering, in float64, by one cooperative launch.
#pragma once
#include "cluster_pieces.cuh"
#include "ptx.h"

namespace gradclust {

constexpr int MOVE_THREADS = 256, MOVE_WARPS = MOVE_THREADS / 32;

// The sum over the block, in every thread, added in a fixed order. `sums` [MOVE_WARPS] lies in shared memory.
__device__ inline double block_sum(double mine, double* sums) {
  mine = warp_sum(mine);
  __syncthreads();  // the last sum's readers are done
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = mine;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < MOVE_WARPS; ++w) total += sums[w];
  return total;
}

template <typename in_t> __device__ double entry(const Rows& points, int64_t row, int64_t feature) {
  return double(load(static_cast<const in_t*>(points.data)[row * points.stride + feature]));
}

// Deviations are taken from a cluster's first row before its mean: a cluster of equal rows costs exactly 0. Plain sums
// do: an error of the mean shows in J by its square.
template <typename in_t>
__global__ void __launch_bounds__(MOVE_THREADS, 2)
    cluster_objective_kernel(const __grid_constant__ Rows points, const __grid_constant__ SortedRows at, int64_t K,
                             double* partial, double* mean, double* within, double* J, uint64_t* arrived) {
  GRADCLUST_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  int64_t N = points.N, R = points.R, slots = N / CLUSTER_PIECE + K, thread = threadIdx.x;
  for (int64_t k = int64_t(blockIdx.x) * MOVE_THREADS + thread; k <= K; k += int64_t(gridDim.x) * MOVE_THREADS)
    at.begin[k] = lower_bound(at.labels, N, k);
  wait_for_grid(arrived);
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    Piece piece = piece_at(at.begin, K, slot);
    if (piece.first >= piece.last) continue;
    for (int64_t r = thread; r < R; r += MOVE_THREADS) {
      double shift = entry<in_t>(points, at.rows[at.begin[piece.k]], r), total = 0;
#pragma unroll 4
      for (int64_t m = piece.first; m < piece.last; ++m) total += entry<in_t>(points, at.rows[m], r) - shift;
      partial[slot * R + r] = total;
    }
  }
  wait_for_grid(arrived);
  for (int64_t i = int64_t(blockIdx.x) * MOVE_THREADS + thread; i < K * R; i += int64_t(gridDim.x) * MOVE_THREADS) {
    int64_t k = i / R, r = i % R, slot = first_slot(at.begin, k), pieces = num_pieces(at.begin, k);
    double total = 0;
    for (int64_t p = 0; p < pieces; ++p) total += partial[(slot + p) * R + r];
    mean[i] = pieces ? total / double(at.begin[k + 1] - at.begin[k]) : 0;
  }
  wait_for_grid(arrived);
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    Piece piece = piece_at(at.begin, K, slot);
    double total = 0;
    if (piece.first < piece.last) {
      int64_t member = at.rows[at.begin[piece.k]];
      for (int64_t m = piece.first + thread / 32; m < piece.last; m += MOVE_WARPS)
        for (int64_t r = thread % 32; r < R; r += 32) {
          double shift = entry<in_t>(points, member, r);
          double deviation = entry<in_t>(points, at.rows[m], r) - shift - mean[piece.k * R + r];
          total += deviation * deviation;
        }
      total *= double(at.begin[piece.k + 1] - at.begin[piece.k]);
    }
    total = block_sum(total, sums);
    if (thread == 0) within[slot] = total;
  }
  wait_for_grid(arrived);
  if (blockIdx.x > 0) return;
  double total = 0;
  for (int64_t slot = thread; slot < slots; slot += MOVE_THREADS) total += within[slot];
  total = block_sum(total, sums);
  if (thread == 0) *J = total;
}

}  // namespace gradclust
