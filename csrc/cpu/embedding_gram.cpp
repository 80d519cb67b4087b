// ⟨G_b, G_c⟩ of an embedding table for all pairs of examples on the CPU.
//
// v1  Only rows of the table that several examples look up can meet. The batch's positions are chained by row in one hash
//     table; the examples' sums of a shared row lie side by side, and a task multiplies those of 16 examples with those of
//     all earlier ones in 2 × 4 register tiles, row by row of the table. Each pair once; a task owns its rows of the
//     result: no atomics, the same bits on any number of threads (bench/kernels/bench_embedding_gram.py).
#include "embedding_rows.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch chain_scratch, entry_scratch, sums_scratch, out_scratch, alone_scratch;

constexpr int64_t EXAMPLES = 16;

// One row of the table in one example: its positions are a stretch of the row's chain.
struct Entry {
  int64_t example, start;  // first position
  int64_t group;           // the row's first entry
  int64_t sum;             // where its sum is among the shared ones; −1 where no other example has the row
};

// The sum over an entry's positions, in memory of the accumulator's type.
template <typename in_t>
void sum_entry(const EmbeddingFactors& f, const Chains& chains, const Entry& entry, acc_t<in_t>* sum) {
  int64_t i = entry.start;
  convert(grad_row<in_t>(f, i), sum, f.D);
  while ((i = chains.next[i]) >= 0 && i / f.T == entry.example) add_row(sum, grad_row<in_t>(f, i), f.D);
}

template <typename acc>
void dots_2x4(const acc* const* x, const acc* const* y, int64_t n, acc (*out)[4]) {
  constexpr int64_t L = LANES<acc>;
  vec_t<acc> sum[2][4] = {};
  int64_t d = 0;
  for (; d + L <= n; d += L) {
    vec_t<acc> x0 = load_vec(x[0] + d), x1 = load_vec(x[1] + d);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      vec_t<acc> column = load_vec(y[j] + d);
      sum[0][j] += x0 * column;
      sum[1][j] += x1 * column;
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc total = sum_lanes<acc>(sum[i][j]);
      for (int64_t k = d; k < n; ++k) total += x[i][k] * y[j][k];
      out[i][j] = total;
    }
}

// Entries [begin, end) of one row of the table against each other's and all earlier examples'; out [EXAMPLES, B] begins
// at example b0.
template <typename acc>
void add_products(const Entry* entries, int64_t begin, int64_t end, const acc* sums, int64_t D, int64_t b0, int64_t B,
                  double* out) {
  auto at = [&](int64_t e) { return sums + entries[e].sum * D; };
  for (int64_t e = begin; e < end; e += 2) {
    int64_t last = min_of(e + 1, end - 1);
    const acc* x[2] = {at(e), at(last)};
    for (int64_t g = entries[e].group; g <= last; g += 4) {
      const acc* y[4];
      acc dots[2][4];
      for (int64_t j = 0; j < 4; ++j) y[j] = at(min_of(g + j, last));
      dots_2x4(x, y, D, dots);
      for (int64_t i = 0; i <= last - e; ++i)
        for (int64_t j = 0; j < 4 && g + j <= e + i; ++j)
          out[(entries[e + i].example - b0) * B + entries[g + j].example] += double(dots[i][j]);
    }
  }
}

template <typename in_t> void embedding_gram_kernel(const EmbeddingFactors& f, acc_t<in_t>* out, int threads) {
  using acc = acc_t<in_t>;
  const int64_t B = f.B, n = f.B * f.T, blocks = (B + EXAMPLES - 1) / EXAMPLES;
  Chains chains = chains_of_batch(f, chain_scratch);
  Entry* entries = entry_scratch.get<Entry>(2 * n + blocks);
  int64_t* by_block = reinterpret_cast<int64_t*>(entries + n);  // entries, block by block, in their own order
  int64_t* block_begin = by_block + n;
  int64_t count = 0, shared = 0;
  for (int64_t k = 0; k <= blocks; ++k) block_begin[k] = 0;
  for (int64_t u = 0; u < chains.count; ++u) {
    int64_t group = count;
    for (int64_t i = chains.first[u]; i >= 0; i = chains.next[i])
      if (count == group || entries[count - 1].example != i / f.T) {
        entries[count] = {i / f.T, i, group, -1};
        ++block_begin[entries[count++].example / EXAMPLES];
      }
    for (int64_t e = group; count - group > 1 && e < count; ++e) entries[e].sum = shared++;
  }
  for (int64_t k = 0, end = 0; k <= blocks; ++k) block_begin[k] = end += block_begin[k];
  for (int64_t e = count - 1; e >= 0; --e) by_block[--block_begin[entries[e].example / EXAMPLES]] = e;
  acc* sums = sums_scratch.get<acc>(shared * f.D);

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < count; ++e)
      if (entries[e].sum >= 0) sum_entry<in_t>(f, chains, entries[e], sums + entries[e].sum * f.D);
    double* rows = out_scratch.get<double>(EXAMPLES * B);
    acc* alone = alone_scratch.get<acc>(f.D);
    // The last examples have the most earlier ones: dynamic, from the end, ends evenly.
#pragma omp for schedule(dynamic)
    for (int64_t block = blocks - 1; block >= 0; --block) {
      int64_t b0 = block * EXAMPLES, examples = min_of(EXAMPLES, B - b0);
      memset(rows, 0, size_t(examples * B) * sizeof(double));
      for (int64_t k = block_begin[block]; k < block_begin[block + 1];) {
        const Entry& entry = entries[by_block[k]];
        if (entry.sum < 0) {
          sum_entry<in_t>(f, chains, entry, alone);
          rows[(entry.example - b0) * B + entry.example] += double(row_sqnorm(alone, f.D));
          ++k;
          continue;
        }
        int64_t end = k + 1;  // the row's entries in this block are neighbours, here and among all entries
        while (end < block_begin[block + 1] && entries[by_block[end]].group == entry.group) ++end;
        add_products(entries, by_block[k], by_block[k] + (end - k), sums, f.D, b0, B, rows);
        k = end;
      }
      for (int64_t b = 0; b < examples; ++b)
        for (int64_t c = 0; c <= b0 + b; ++c) out[(b0 + b) * B + c] = acc(rows[b * B + c]);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = b + 1; c < B; ++c) out[b * B + c] = out[c * B + b];
  }
}

}  // namespace

void embedding_gram_cpu(const EmbeddingFactors& f, void* out, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    embedding_gram_kernel<in_t>(f, static_cast<acc_t<in_t>*>(out), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
