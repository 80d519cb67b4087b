// Squared norm, sketch and inner products of per-example gradients on the CPU.
//
// v1  A block of rows (positions of one or of several examples) meets all columns at once, projections and centres side
//     by side, so act and grad are read once; the two strips of products stay in the L2 cache, where they are multiplied
//     and summed over T. Rows are read where they lie, only the columns are packed (bench/kernels/bench_grad_dot.py,
//     bench_grad_quantities.py).
#include "grad_quantities.h"

#include "sqnorm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch columns_scratch, rows_scratch, example_scratch;

constexpr int64_t MOST_ROWS = 64;
constexpr int64_t BLOCK_DEPTH = 128;
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
void project(const Side<in_t>& side, const Rows& block, acc_t<in_t>* strip, acc_t<in_t>* sqnorm,
             acc_t<in_t>* converted) {
  using acc = acc_t<in_t>;
  constexpr int64_t M = MR<acc>;
  const int64_t F = side.F, ld = side.strip_width(), columns = side.columns();
  auto row = [&](int64_t r) {
    int64_t position = block.first + min_of(r, block.count - 1);
    return side.rows + position / block.T * side.stride_b + position % block.T * side.stride_t;
  };
  for (int64_t r = 0; r < round_up(block.count, M); ++r)
    memcpy(strip + r * ld, side.constants(), size_t(side.identity_begin()) * sizeof(acc));
  if (sqnorm)
    for (int64_t r = 0; r < block.count; ++r) sqnorm[r] = 0;
  for (int64_t k0 = 0; k0 < F; k0 += BLOCK_DEPTH) {
    int64_t n = min_of(BLOCK_DEPTH, F - k0);
    bool ready = as_accumulator(side.rows) != nullptr;
    if (!ready && columns)
      for (int64_t r = 0; r < block.count; ++r) convert(row(r) + k0, converted + r * BLOCK_DEPTH, n);
    if (sqnorm)
      for (int64_t r = 0; r < block.count; ++r)
        sqnorm[r] += ready || !columns ? row_sqnorm(row(r) + k0, n) : row_sqnorm(converted + r * BLOCK_DEPTH, n);
    for (int64_t begin = 0; begin < columns; begin += NR<acc>) {
      int64_t width = Panels<acc>{columns}.width(begin);
      const acc* panel = side.packed + begin * F + k0 * width;
      for (int64_t r = 0; r < block.count; r += M) {
        RowPointers<acc> a;
        for (int64_t i = 0; i < M; ++i)
          a.p[i] = ready ? as_accumulator(row(r + i)) + k0 : converted + min_of(r + i, block.count - 1) * BLOCK_DEPTH;
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
      convert(row(r), to, F);
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

template <typename in_t> void grad_quantities_kernel(const LinearFactors& f, const Questions& q, int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t M = MR<acc>;
  const bool dots = q.dot && q.K, products = dots || q.sketch;
  auto side_of = [&](const void* rows, int64_t stride_b, int64_t stride_t, int64_t F, const void* projection, int64_t S,
                     const void* centers, bool constant) {
    const acc* used = q.sketch ? static_cast<const acc*>(projection) : nullptr;
    return Side<in_t>{static_cast<const in_t*>(rows), stride_b, stride_t, F, used, static_cast<const acc*>(centers),
                      used ? S : 0, dots ? q.K : 0, dots ? q.rank : 0, constant, q.sketch && !used, nullptr};
  };
  auto A = side_of(f.act, f.act_stride_b, f.act_stride_t, f.I, q.right, q.Q, q.center_act, f.bias);
  auto D = side_of(f.grad, f.grad_stride_b, f.grad_stride_t, f.O, q.left, q.P, q.center_grad, false);
  A.packed = columns_scratch.get<acc>(A.packed_size() + D.packed_size());
  D.packed = A.packed + A.packed_size();

  const int64_t T = f.T, A_ld = A.strip_width(), D_ld = D.strip_width();
  int64_t most = STRIP_BYTES / int64_t(sizeof(acc)) / max_of(1, A_ld + D_ld) / M * M;
  most = max_of(2 * M, min_of(MOST_ROWS, most));
  const int64_t examples = max_of(1, most / T), groups = (f.B + examples - 1) / examples;

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t c = 0; c < (A.columns() + D.columns() + 2 * NR<acc>) / NR<acc>; ++c) {
      int64_t A_panels = (A.columns() + NR<acc> - 1) / NR<acc>;
      if (c < A_panels)
        pack_panel(A, c * NR<acc>);
      else if ((c - A_panels) * NR<acc> < D.columns())
        pack_panel(D, (c - A_panels) * NR<acc>);
    }
    // Tiles read up to NR columns past a strip's last row.
    acc* A_strip = rows_scratch.get<acc>((A_ld + D_ld) * most + 2 * NR<acc> + 2 * most + most * BLOCK_DEPTH);
    acc *D_strip = A_strip + A_ld * most + NR<acc>, *A_sqnorm = D_strip + D_ld * most + NR<acc>;
    acc *D_sqnorm = A_sqnorm + most, *converted = D_sqnorm + most;
#pragma omp for schedule(dynamic)
    for (int64_t group = 0; group < groups; ++group) {
      int64_t b0 = group * examples, b_end = min_of(b0 + examples, f.B);
      bool rank1 = q.sqnorm && T == 1;
      // All rows of several short examples, or one long example, a block of rows at a time.
      for (int64_t t0 = 0; (products || rank1) && t0 < T; t0 += examples > 1 ? T : most) {
        Rows block{b0 * T + t0, examples > 1 ? (b_end - b0) * T : min_of(most, T - t0), T};
        project(A, block, A_strip, rank1 ? A_sqnorm : nullptr, converted);
        project(D, block, D_strip, rank1 ? D_sqnorm : nullptr, converted);
        for (int64_t b = b0; b < b_end; ++b) {
          int64_t row = (b - b0) * T, count = examples > 1 ? T : block.count;
          const acc *a = A_strip + row * A_ld, *d = D_strip + row * D_ld;
          if (rank1) static_cast<acc*>(q.sqnorm)[b] = (A_sqnorm[row] + (f.bias ? 1 : 0)) * D_sqnorm[row];
          if (dots)
            dot_rows(d + D.S, D_ld, a + A.S, A_ld, count, q.K, q.rank, static_cast<acc*>(q.dot) + b * q.K, t0 > 0);
          if (q.sketch)
            sketch_rows(d + D.sketch_begin(), D_ld, a + A.sketch_begin(), A_ld, count, q.P, q.Q,
                        static_cast<acc*>(q.sketch) + b * q.P * q.Q, t0 > 0);
        }
      }
      if (q.sqnorm && T > 1)
        for (int64_t b = b0; b < b_end; ++b) {
          auto sqnorm = q.gram ? &sqnorm_gram<in_t> : &sqnorm_direct<in_t>;
          static_cast<acc*>(q.sqnorm)[b] =
              sqnorm(static_cast<const in_t*>(f.act) + b * f.act_stride_b, f.act_stride_t,
                     static_cast<const in_t*>(f.grad) + b * f.grad_stride_b, f.grad_stride_t, T, f.I, f.O, f.bias,
                     example_scratch);
        }
    }
  }
}

}  // namespace

void grad_quantities_cpu(const LinearFactors& f, const Questions& q, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    // Without features everything is 0, and a matrix without rows has no address to tell it from the identity.
    if (f.T > 0 && f.B > 0 && f.O > 0 && f.I + f.bias > 0) return grad_quantities_kernel<in_t>(f, q, threads);
    if (q.sqnorm) memset(q.sqnorm, 0, size_t(f.B) * sizeof(acc));
    if (q.sketch) memset(q.sketch, 0, size_t(f.B * q.P * q.Q) * sizeof(acc));
    if (q.dot) memset(q.dot, 0, size_t(f.B * q.K) * sizeof(acc));
  });
}

}  // namespace gradclust::GRADCLUST_ISA
