// Clustering of dense rows. Launchers; the kernels are in cpu/assign.cpp, cpu/assign_points.cpp, cpu/cluster_sums.cpp
// and cpu/exact_moves.cpp. Workspaces are the caller's: with workspace = nullptr a launcher only writes to *bytes.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

// Rows have feature stride 1; stride counts elements.
struct Rows {
  const void* data;  // [N, R]
  DType dtype;
  int64_t N, R, stride;
};

// dot [B, K] contiguous; the rest in the accumulator's dtype: center_sqnorm [K], grad_sqnorm [B], weight [K] or nullptr.
GRADCLUST_CPU_LAUNCHER(assign_cpu, const Rows& dot, const void* center_sqnorm, const void* grad_sqnorm,
                       const void* weight, int64_t* label, void* cost, int threads)

// centers [K, R] contiguous in the accumulator's dtype, weight [K] float64.
GRADCLUST_CPU_LAUNCHER(assign_points_cpu, const Rows& points, const void* centers, int64_t K, const double* weight,
                       int64_t* label, void* cost, void* workspace, int64_t* bytes, int threads)

// sums [K, R] in the accumulator's dtype, counts [K].
GRADCLUST_CPU_LAUNCHER(cluster_sums_cpu, const Rows& points, const int64_t* labels, int64_t K, void* sums,
                       int64_t* counts, void* workspace, int64_t* bytes, int threads)

// center [R] float64, order [N]; labels [N] are moved in place. J [2] is J before and after; J[0] is not finite when the
// points' squares are not, and then nothing was moved.
GRADCLUST_CPU_LAUNCHER(exact_moves_cpu, const Rows& points, const double* center, const int64_t* order, int64_t K,
                       int64_t* labels, double* J, int64_t* moved, void* workspace, int64_t* bytes, int threads)

}  // namespace gradclust
