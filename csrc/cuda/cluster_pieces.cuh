// Rows sorted by cluster, cut into pieces of at most CLUSTER_PIECE rows of one cluster: a long cluster fills the device like
// many short ones, and pieces are added in order. Where everything lies follows from `begin` alone.
#pragma once
#include "cluster.h"
#include "common.cuh"

namespace gradclust {

// The first position in `sorted` [n] whose label is at least k.
__device__ inline int64_t lower_bound(const int32_t* __restrict__ sorted, int64_t n, int64_t k) {
  int64_t low = 0, high = n;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (sorted[middle] < k)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Cluster k's pieces have the slots from here on: at least as many as it needs, without a scan over the clusters.
__device__ inline int64_t first_slot(const int64_t* begin, int64_t k) { return begin[k] / CLUSTER_PIECE + k; }

__device__ inline int64_t num_pieces(const int64_t* begin, int64_t k) {
  return (begin[k + 1] - begin[k] + CLUSTER_PIECE - 1) / CLUSTER_PIECE;
}

// Positions [first, last) of cluster k in the sorted order; none in a spare slot.
struct Piece { int64_t k, first, last; };

__device__ inline Piece piece_at(const int64_t* begin, int64_t K, int64_t slot) {
  int64_t low = 0, high = K;  // the last cluster whose slots begin here or before
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    if (first_slot(begin, middle) <= slot)
      low = middle;
    else
      high = middle;
  }
  int64_t first = begin[low] + (slot - first_slot(begin, low)) * CLUSTER_PIECE;
  return {low, first, min(first + CLUSTER_PIECE, begin[low + 1])};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gradclust
