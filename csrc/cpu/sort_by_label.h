// A stable counting sort: which rows belong to each cluster.
#pragma once
#include "isa.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// rows[begin[k] : begin[k + 1]) are the rows with label k, ascending. begin has K + 1 entries.
void sort_by_label(const int64_t* labels, int64_t N, int64_t K, int64_t* begin, int64_t* rows) {
  for (int64_t k = 0; k <= K; ++k) begin[k] = 0;
  for (int64_t i = 0; i < N; ++i) ++begin[labels[i]];
  int64_t end = 0;
  for (int64_t k = 0; k <= K; ++k) begin[k] = end += begin[k];
  for (int64_t i = N - 1; i >= 0; --i) rows[--begin[labels[i]]] = i;
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
