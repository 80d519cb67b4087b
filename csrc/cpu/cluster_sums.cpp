// Sum and size of every cluster.
//
// v1  A stable counting sort lists each cluster's rows; one task sums one cluster's rows over one block of features in
//     float64, in ascending order. No two tasks share an output: no atomics, the same bits on any number of threads.
#include "center_dots.h"
#include "cluster.h"
#include "sort_by_label.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t FEATURES = 64;  // float64 sums of a task: 512 bytes, in L1

template <typename in_t>
void sum_cluster(const Rows& points, const int64_t* rows, int64_t count, int64_t feature, acc_t<in_t>* out) {
  double sum[FEATURES] = {};
  int64_t n = points.R - feature < FEATURES ? points.R - feature : FEATURES;
  for (int64_t m = 0; m < count; ++m) {
    const in_t* row = static_cast<const in_t*>(points.data) + rows[m] * points.stride + feature;
    for (int64_t r = 0; r < n; ++r) sum[r] += double(load(row[r]));
  }
  for (int64_t r = 0; r < n; ++r) out[r] = acc_t<in_t>(sum[r]);
}

}  // namespace

void cluster_sums_cpu(const Rows& points, const int64_t* labels, int64_t K, void* sums, int64_t* counts, void* workspace,
                      int64_t* bytes, int threads) {
  Arena arena = {static_cast<char*>(workspace)};
  int64_t* begin = arena.take<int64_t>(K + 1);
  int64_t* rows = arena.take<int64_t>(points.N);
  *bytes = arena.used;
  if (!workspace) return;
  sort_by_label(labels, points.N, K, begin, rows);
  int64_t blocks = (points.R + FEATURES - 1) / FEATURES;
  dispatch(points.dtype, [&](auto zero) {
    using in_t = decltype(zero);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < K * blocks; ++task) {
      int64_t k = task / blocks, feature = task % blocks * FEATURES;
      sum_cluster<in_t>(points, rows + begin[k], begin[k + 1] - begin[k], feature,
                        static_cast<acc_t<in_t>*>(sums) + k * points.R + feature);
    }
  });
  for (int64_t k = 0; k < K; ++k) counts[k] = begin[k + 1] - begin[k];
}

}  // namespace gradclust::GRADCLUST_ISA
