// Which positions look up the same row of an embedding table, and their gradients added up.
#pragma once
#include "embedding.h"
#include "sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// Positions 0 … n−1 of equal key, chained in ascending order. Open addressing at a load of at most a half: two touches a
// position where a sort would make log n; the table's size follows n, not the number of keys there could be.
struct Chains {
  int64_t count = 0;          // of different keys
  int64_t *first, *next;      // first[u]: first position of the u-th key met; next[i]: the following one, or −1
  int64_t *keys, *tail, *table;
  int64_t mask;

  static int64_t slots(int64_t n) {
    int64_t size = 16;
    while (size < 2 * n) size *= 2;
    return size;
  }
  static int64_t memory(int64_t n) { return 4 * n + slots(n); }  // in int64

  Chains(int64_t* memory, int64_t n)
      : first(memory), next(first + n), keys(next + n), tail(keys + n), table(tail + n), mask(slots(n) - 1) {
    memset(table, 0xff, size_t(mask + 1) * sizeof(int64_t));
  }

  void add(int64_t i, int64_t key) {
    keys[i] = key;
    next[i] = -1;
    uint64_t spread = uint64_t(key) * 0x9E3779B97F4A7C15u;  // neighbouring rows end far apart
    int64_t slot = int64_t(spread >> 32) & mask;
    for (; table[slot] >= 0; slot = (slot + 1) & mask)
      if (keys[table[slot]] == key) {
        int64_t head = table[slot];
        next[tail[head]] = i;
        tail[head] = i;
        return;
      }
    table[slot] = tail[i] = i;
    first[count++] = i;
  }
};

// The gradient of position i of the flattened [B, T].
template <typename in_t> GRADCLUST_INLINE const in_t* grad_row(const EmbeddingFactors& f, int64_t i) {
  return static_cast<const in_t*>(f.grad) + i / f.T * f.grad_stride_b + i % f.T * f.grad_stride_t;
}

// The positions of all examples, by row of the table. The padding row has none.
inline Chains chains_of_batch(const EmbeddingFactors& f, Scratch& scratch) {
  const int64_t n = f.B * f.T;
  Chains chains(scratch.get<int64_t>(Chains::memory(n)), n);
  for (int64_t b = 0; b < f.B; ++b)
    for (int64_t t = 0; t < f.T; ++t) {
      int64_t row = f.index[b * f.index_stride_b + t * f.index_stride_t];
      if (row != f.padding) chains.add(b * f.T + t, row);
    }
  return chains;
}

// sum (+)= row
template <typename in_t> void add_row(acc_t<in_t>* sum, const in_t* row, int64_t n) {
  using acc = acc_t<in_t>;
  int64_t d = 0;
  for (; d + LANES<acc> <= n; d += LANES<acc>) store_vec(sum + d, load_vec(sum + d) + load_converted(row + d));
  for (; d < n; ++d) sum[d] += load(row[d]);
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
