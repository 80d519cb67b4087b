// Cheapest cluster of every example from given inner products.
//
// v1  One read of dot. The smallest cost of a row is found in vector lanes without indices, the row still in L1 is then
//     searched for it: no index arithmetic in the loop, and the first index that matches is the answer to ties.
#include "center_dots.h"
#include "cluster.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

template <typename in_t> struct CostRow {
  using acc = acc_t<in_t>;
  const in_t* dot;
  const acc *center_sqnorm, *weight;
  acc grad_sqnorm;

  // The additions in the order of the reference; 2·dot is exact, so a fused multiply-add changes no bit.
  acc at(int64_t k) const {
    acc dist = (center_sqnorm[k] - 2 * load(dot[k])) + grad_sqnorm;
    return weight ? dist * weight[k] : dist;
  }
  vec_t<acc> lanes(int64_t k) const {
    vec_t<acc> value;
    if constexpr (sizeof(in_t) == sizeof(acc)) {
      value = load_vec(dot + k);
    } else {
      for (int lane = 0; lane < LANES<acc>; ++lane) value[lane] = load(dot[k + lane]);
    }
    vec_t<acc> dist = (load_vec(center_sqnorm + k) - 2 * value) + grad_sqnorm;
    return weight ? dist * load_vec(weight + k) : dist;
  }
};

template <typename in_t> void cheapest(const CostRow<in_t>& row, int64_t K, int64_t* label, acc_t<in_t>* cost) {
  using acc = acc_t<in_t>;
  constexpr int L = LANES<acc>;
  acc best = row.at(0);
  vec_t<acc> smallest = best - vec_t<acc>{}, sum = {};  // the sum is NaN if any cost is (or if infinities cancel)
  int64_t k = 0;
  for (; k + L <= K; k += L) {
    vec_t<acc> value = row.lanes(k);
    smallest = value < smallest ? value : smallest;
    sum += value;
  }
  bool suspect = best != best;
  for (int lane = 0; lane < L; ++lane) {
    suspect |= sum[lane] != sum[lane];
    best = smallest[lane] < best ? smallest[lane] : best;
  }
  for (; k < K; ++k) {
    acc value = row.at(k);
    suspect |= value != value;
    best = value < best ? value : best;
  }
  if (suspect) {
    for (k = 0; k < K; ++k) {
      acc value = row.at(k);
      if (value != value) {
        *label = k, *cost = value;
        return;
      }
    }
  }
  for (k = 0; k + L <= K; k += L) {
    uint32_t bits = lane_bits<acc>(row.lanes(k) == best);
    if (bits) {
      *label = k + __builtin_ctz(bits), *cost = best;
      return;
    }
  }
  while (row.at(k) != best) ++k;
  *label = k, *cost = best;
}

}  // namespace

void assign_cpu(const Rows& dot, const void* center_sqnorm, const void* grad_sqnorm, const void* weight, int64_t* label,
                void* cost, int threads) {
  dispatch(dot.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < dot.N; ++b) {
      CostRow<in_t> row = {static_cast<const in_t*>(dot.data) + b * dot.stride, static_cast<const acc*>(center_sqnorm),
                           static_cast<const acc*>(weight), static_cast<const acc*>(grad_sqnorm)[b]};
      cheapest(row, dot.R, label + b, static_cast<acc*>(cost) + b);
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
