// A block of factor rows times projections and centres side by side, and what is made of two such strips of products:
// shared by grad_quantities.cpp and embedding_products.cpp.
#pragma once
#include "sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t MOST_ROWS = 64;
constexpr int64_t BLOCK_DEPTH = 256;
constexpr int64_t STRIP_BYTES = 256 << 10;  // both strips of a block: half an L2 cache

// One factor and the columns it meets: [projection | centres, rank by rank], packed over the F features.
template <typename in_t> struct Side {
  using acc = acc_t<in_t>;
  const in_t* rows;
  int64_t stride_b, stride_t, F;
  const acc* projection;  // [F', S], or null
  const acc* centers;     // [K, rank, F'], or null
  int64_t S, K, rank;     // S is 0 without a projection
  bool constant;          // F' = F + 1: one more feature that is always 1
  bool identity;          // the rows themselves are asked, too
  acc* packed;            // [padded columns, F], then the columns' constants

  int64_t columns() const { return S + K * rank; }
  int64_t identity_begin() const { return round_up(columns(), LANES<acc>); }
  int64_t strip_width() const { return identity_begin() + (identity ? round_up(F + constant, LANES<acc>) : 0); }
  int64_t sketch_begin() const { return identity ? identity_begin() : 0; }
  int64_t packed_size() const { return identity_begin() * (F + 1); }
  acc* constants() const { return packed + identity_begin() * F; }
};

// The panel that begins at column `begin`.
template <typename in_t> void pack_panel(const Side<in_t>& side, int64_t begin) {
  using acc = acc_t<in_t>;
  const int64_t S = side.S, K = side.K, F = side.F, wide = F + side.constant;
  int64_t width = Panels<acc>{side.columns()}.width(begin), end = begin + width;
  acc *panel = side.packed + begin * F, *constants = side.constants();
  for (int64_t c = begin; c < end;) {
    acc* to = panel + (c - begin);
    if (c < S) {
      int64_t n = min_of(end, S) - c;
      for (int64_t k = 0; k < F; ++k) memcpy(to + k * width, side.projection + k * S + c, size_t(n) * sizeof(acc));
      for (int64_t j = 0; j < n; ++j) constants[c + j] = side.constant ? side.projection[F * S + c + j] : acc(0);
      c += n;
    } else if (c < side.columns()) {
      int64_t r = (c - S) / K, k = (c - S) % K;
      int64_t n = min_of(min_of(4, K - k), end - c);
      const acc* center = side.centers + (k * side.rank + r) * wide;
      pack_four_rows<acc>(to, width, center, side.rank * wide, F, n, nullptr);
      for (int64_t j = 0; j < n; ++j) constants[c + j] = side.constant ? center[j * side.rank * wide + F] : acc(0);
      c += n;
    } else {
      for (int64_t k = 0; k < F; ++k) to[k * width] = 0;
      constants[c++] = 0;
    }
  }
}

// Positions first, first + 1, … of the flattened [B, T], `count` of them.
struct Rows { int64_t first, count, T; };

// strip [count, strip_width] = rows · columns + constants, and sqnorm[r] = ‖row r‖² unless null. converted holds
// count × BLOCK_DEPTH elements where the factors are of a half type.
template <typename in_t>
void project(const Side<in_t>& side, const Rows& block, acc_t<in_t>* strip, double* sqnorm,
             acc_t<in_t>* converted) {
  using acc = acc_t<in_t>;
  constexpr int64_t M = MR<acc>;
  const int64_t F = side.F, ld = side.strip_width(), columns = side.columns();
  const in_t* row[MOST_ROWS];  // repeated past the last one
  for (int64_t r = 0; r < round_up(block.count, M); ++r) {
    int64_t position = block.first + min_of(r, block.count - 1);
    row[r] = side.rows + position / block.T * side.stride_b + position % block.T * side.stride_t;
  }
  for (int64_t r = 0; r < round_up(block.count, M); ++r)
    memcpy(strip + r * ld, side.constants(), size_t(side.identity_begin()) * sizeof(acc));
  if (sqnorm)
    for (int64_t r = 0; r < block.count; ++r) sqnorm[r] = 0;
  for (int64_t k0 = 0; k0 < F; k0 += BLOCK_DEPTH) {
    int64_t n = min_of(BLOCK_DEPTH, F - k0);
    bool ready = as_accumulator(side.rows) != nullptr;
    if (!ready && columns)
      for (int64_t r = 0; r < block.count; ++r) convert(row[r] + k0, converted + r * BLOCK_DEPTH, n);
    if (sqnorm)
      for (int64_t r = 0; r < block.count; ++r)
        sqnorm[r] += ready || !columns ? row_sqnorm(row[r] + k0, n) : row_sqnorm(converted + r * BLOCK_DEPTH, n);
    for (int64_t begin = 0; begin < columns; begin += NR<acc>) {
      int64_t width = Panels<acc>{columns}.width(begin);
      const acc* panel = side.packed + begin * F + k0 * width;
      for (int64_t r = 0; r < block.count; r += M) {
        RowPointers<acc> a;
        for (int64_t i = 0; i < M; ++i)
          a.p[i] = ready ? as_accumulator(row[r + i]) + k0 : converted + min_of(r + i, block.count - 1) * BLOCK_DEPTH;
        if (ready && begin == 0 && k0 + n < F)  // the same rows' next block comes from memory meanwhile
          for (int64_t i = 0; i < M; ++i)
            for (int64_t k = 0; k < BLOCK_DEPTH; k += 64 / int64_t(sizeof(acc))) __builtin_prefetch(a.p[i] + n + k);
        tile_product<acc>(width, n, a, panel, width, strip + r * ld + begin, ld, true);
      }
    }
  }
  if (side.identity)
    for (int64_t r = 0; r < block.count; ++r) {
      acc* to = strip + r * ld + side.identity_begin();
      convert(row[r], to, F);
      if (side.constant) to[F] = 1;
    }
}

// out[k] (+)= Σ_t Σ_rank left[t, k] right[t, k] over T rows of the strips, from the centres' columns.
template <typename acc>
void dot_rows(const acc* left, int64_t left_ld, const acc* right, int64_t right_ld, int64_t T, int64_t K, int64_t rank,
              acc* out, bool accumulate) {
  constexpr int64_t L = LANES<acc>;
  for (int64_t k = 0; k < K; k += L) {
    vec_t<acc> sum = {};
    for (int64_t t = 0; t < T; ++t)
      for (int64_t r = 0; r < rank; ++r)
        sum += load_vec(left + t * left_ld + r * K + k) * load_vec(right + t * right_ld + r * K + k);
    for (int64_t j = 0; j < min_of(L, K - k); ++j) out[k + j] = accumulate ? out[k + j] + sum[j] : sum[j];
  }
}

// out [P, Q] (+)= Σ_t left[t, p] right[t, q]. Tiles may read columns that belong to somebody else; those are dropped.
template <typename acc>
void sketch_rows(const acc* left, int64_t left_ld, const acc* right, int64_t right_ld, int64_t T, int64_t P, int64_t Q,
                 acc* out, bool accumulate) {
  constexpr int64_t N = NR<acc>, M = MR<acc>;
  acc tile[M * N];
  for (int64_t p = 0; p < P; p += M)
    for (int64_t q = 0; q < Q; q += N) {
      int64_t width = min_of(N, round_up(Q - q, LANES<acc>));
      tile_product<acc>(width, T, PackedRows<acc>{left + p, left_ld}, right + q, right_ld, tile, N, false);
      for (int64_t i = 0; i < min_of(M, P - p); ++i) {
        acc* to = out + (p + i) * Q + q;
        int64_t n = min_of(N, Q - q);
        if (accumulate)
          for (int64_t j = 0; j < n; ++j) to[j] += tile[i * N + j];
        else
          memcpy(to, tile + i * N, size_t(n) * sizeof(acc));
      }
    }
}

// How many rows a block has whose two strips are this wide together, a multiple of a register tile's.
template <typename acc> int64_t rows_of_block(int64_t width) {
  int64_t rows = STRIP_BYTES / int64_t(sizeof(acc)) / max_of(1, width) / MR<acc> * MR<acc>;
  return max_of(2 * MR<acc>, min_of(MOST_ROWS, rows));
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
