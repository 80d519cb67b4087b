// Clustering of dense rows. Launchers; the kernels are in cpu/assign.cpp, cpu/assign_points.cpp, cpu/cluster_sums.cpp
// and cpu/exact_moves.cpp, in cuda/cluster_sums.cu and cuda/exact_moves.cu. Workspaces are the caller's: with workspace = nullptr a launcher only writes to *bytes.
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

// Rows of a cluster that one block adds up. The code of gradclust_fast/ops/cluster_sums.py:PIECE.
constexpr int CLUSTER_PIECE = 256;

// labels sorted [N], and the row numbers in that order [N]; workspaces begin [K + 1] and partial
// [N / CLUSTER_PIECE + K, R]. Returns an error text, or nullptr.
const char* cluster_sums_cuda(const Rows& points, const int32_t* sorted, const int64_t* order, int64_t K, int64_t* begin,
                              int64_t* counts, double* partial, void* sums, void* stream);

// center [R] float64, order [N]; labels [N] are moved in place. J [2] is J before and after; J[0] is not finite when the
// points' squares are not, and then nothing was moved.
GRADCLUST_CPU_LAUNCHER(exact_moves_cpu, const Rows& points, const double* center, const int64_t* order, int64_t K,
                       int64_t* labels, double* J, int64_t* moved, void* workspace, int64_t* bytes, int threads)

// Rows by cluster: their labels sorted [N] and their numbers in that order [N]; begin [K + 1] is filled by
// cluster_objective_cuda, and exact_moves_cuda reads it.
struct SortedRows {
  const int32_t* labels;
  const int64_t* rows;
  int64_t* begin;
};

// Doubles of workspace: enough for either of the two.
int64_t exact_moves_cuda_workspace(int64_t N, int64_t R, int64_t K);

// J [1], and arrived [1], zero on entry. One launch each. Returns an error text, or nullptr.
const char* cluster_objective_cuda(const Rows& points, const SortedRows& at, int64_t K, double* workspace,
                                   uint64_t* arrived, double* J, void* stream);

// center [R] float64, order [N], labels [N] as sorted in `at`; they are moved in place.
const char* exact_moves_cuda(const Rows& points, const SortedRows& at, int64_t K, const double* center,
                             const int64_t* order, double tie, double* workspace, uint64_t* arrived, int64_t* labels,
                             void* stream);

// key [N]: 62 random bits of (seed, i); sorted, they are the visiting order.
const char* visiting_keys_cuda(int64_t* key, int64_t N, int64_t seed, void* stream);

}  // namespace gradclust
