// The float64 side of exact moves: sizes N_k, sums s_k, Q_k = Σ‖x‖² and J of labelled rows, built anew by every sweep.
// Sums carry what their rounding loses, so neither the number of rows nor the order of later moves spoils them.
#pragma once
#include "center_dots.h"
#include "cluster.h"
#include "sort_by_label.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t PIECE = 1024, GROUP = 4;
constexpr int L64 = LANES<double>;

// A sum and what its rounding lost, after every step with |low| at most half a unit of high's last place.
struct Pair { double high = 0, low = 0; };
template <typename T> GRADCLUST_INLINE void add(T& high, T& low, T x) {
  T total = high + x, part = total - high;
  T rest = low + ((high - (total - part)) + (x - part));
  high = total + rest;
  low = rest - (high - total);
}
GRADCLUST_INLINE void add(Pair& sum, double x) { add(sum.high, sum.low, x); }
GRADCLUST_INLINE void add(double* high, double* low, const double* x, double sign, int64_t n) {
  for (int64_t r = 0; r < n; r += L64) {
    vec_t<double> h = load_vec(high + r), l = load_vec(low + r);
    add(h, l, sign * load_vec(x + r));
    store_vec(high + r, h);
    store_vec(low + r, l);
  }
}

// n is a multiple of the vector length: rows are padded with zeros.
template <typename T> GRADCLUST_INLINE T dot(const T* x, const T* y, int64_t n) {
  constexpr int L = LANES<T>;
  vec_t<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int j = 0; j < 4; ++j) sum[j] += load_vec(x + i + j * L) * load_vec(y + i + j * L);
  for (; i < n; i += L) sum[0] += load_vec(x + i) * load_vec(y + i);
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

struct Piece { int64_t cluster, begin, end; };

struct ClusterStatistics {
  const Rows& points;
  const double* center;
  int64_t* labels;
  int64_t N, R, K, padded_R, max_pieces;
  int threads;

  int64_t *begin, *rows, *count;  // [K + 1], [N], [K]
  Piece* pieces;
  double *sqnorm, *sum, *sum_low, *part, *part_low, *objective, *scratch;
  Pair *square, *part_square;  // Q_k

  ClusterStatistics(const Rows& points, const double* center, int64_t K, int64_t* labels, int threads, Arena& arena)
      : points(points), center(center), labels(labels), N(points.N), R(points.R), K(K), threads(threads) {
    padded_R = round_up(R, 16);  // whole vectors of either type in every instruction set
    max_pieces = K + N / PIECE;
    begin = arena.take<int64_t>(K + 1);
    rows = arena.take<int64_t>(N);
    count = arena.take<int64_t>(K);
    pieces = arena.take<Piece>(max_pieces);
    sqnorm = arena.take<double>(N);
    sum = arena.take<double>(K * padded_R);
    sum_low = arena.take<double>(K * padded_R);
    part = arena.take<double>(max_pieces * padded_R);
    part_low = arena.take<double>(max_pieces * padded_R);
    objective = arena.take<double>(K);
    scratch = arena.take<double>(threads * 3 * padded_R);
    square = arena.take<Pair>(K);
    part_square = arena.take<Pair>(max_pieces);
  }

  int thread() const {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
  }
  double* own_scratch() const { return scratch + thread() * 3 * padded_R; }

  // Row i, shifted; padded with zeros.
  void load_row(int64_t i, double* out) const {
    dispatch(points.dtype, [&](auto zero) {
      using in_t = decltype(zero);
      const in_t* row = static_cast<const in_t*>(points.data) + i * points.stride;
      for (int64_t r = 0; r < R; ++r) out[r] = double(load(row[r])) - center[r];
    });
    for (int64_t r = R; r < padded_R; ++r) out[r] = 0;
  }
  int64_t row_lines() const {
    int64_t bytes = R * (points.dtype == DType::f64 ? 8 : points.dtype == DType::f32 ? 4 : 2);
    return bytes < 4096 ? (bytes + 63) / 64 : 64;  // further on the hardware has seen the pattern
  }
  const char* address(int64_t i) const {
    int64_t size = points.dtype == DType::f64 ? 8 : points.dtype == DType::f32 ? 4 : 2;
    return static_cast<const char*>(points.data) + i * points.stride * size;
  }

  // N_k, s_k, Q_k and all squared norms. Rows are added plainly in fours, then without loss: their number does not matter.
  void build_statistics() {
    sort_by_label(labels, N, K, begin, rows);
    int64_t num_pieces = 0;
    for (int64_t k = 0; k < K; ++k) {
      count[k] = begin[k + 1] - begin[k];
      for (int64_t m = begin[k]; m < begin[k + 1]; m += PIECE)
        pieces[num_pieces++] = {k, m, m + PIECE < begin[k + 1] ? m + PIECE : begin[k + 1]};
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t p = 0; p < num_pieces; ++p) sum_piece(pieces[p], part + p * padded_R, part_low + p * padded_R, part_square[p]);
    memset(sum, 0, K * padded_R * sizeof(double));
    memset(sum_low, 0, K * padded_R * sizeof(double));
    for (int64_t k = 0; k < K; ++k) square[k] = {};
    for (int64_t p = 0; p < num_pieces; ++p) {
      int64_t k = pieces[p].cluster;
      add(sum + k * padded_R, sum_low + k * padded_R, part + p * padded_R, 1, padded_R);
      add(sum + k * padded_R, sum_low + k * padded_R, part_low + p * padded_R, 1, padded_R);
      add(square[k], part_square[p].high);
      add(square[k], part_square[p].low);
    }
  }

  void sum_piece(const Piece& piece, double* high, double* low, Pair& squares) {
    memset(high, 0, padded_R * sizeof(double));
    memset(low, 0, padded_R * sizeof(double));
    squares = {};
    dispatch(points.dtype, [&](auto zero) {
      using in_t = decltype(zero);
      int64_t m = piece.begin;
      for (; m + GROUP <= piece.end; m += GROUP) sum_group<in_t, GROUP>(rows + m, high, low, squares);
      for (; m < piece.end; ++m) sum_group<in_t, 1>(rows + m, high, low, squares);
    });
  }

  template <typename in_t, int n> void sum_group(const int64_t* group, double* high, double* low, Pair& squares) {
    const in_t* row[n];
    vec_t<double> sum_of_squares[n] = {};
    for (int j = 0; j < n; ++j) {
      row[j] = reinterpret_cast<const in_t*>(address(group[j]));
      const int64_t* ahead = group + j + 2 * GROUP < rows + N ? group + j + 2 * GROUP : rows + N - 1;
      for (int64_t line = 0; line < row_lines(); ++line) __builtin_prefetch(address(*ahead) + 64 * line);
    }
    for (int64_t r = 0; r < padded_R; r += L64) {
      vec_t<double> value[n], of_group = {};
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) {
        value[j] = load_shifted(row[j], r);
        sum_of_squares[j] += value[j] * value[j];
        of_group = j ? of_group + value[j] : value[j];
      }
      vec_t<double> h = load_vec(high + r), l = load_vec(low + r);
      add(h, l, of_group);
      store_vec(high + r, h);
      store_vec(low + r, l);
    }
    for (int j = 0; j < n; ++j) {
      sqnorm[group[j]] = sum_lanes<double>(sum_of_squares[j]);
      add(squares, sqnorm[group[j]]);
    }
  }

  // L64 entries of a row from r on, shifted; zeros past its end.
  template <typename in_t> inline __attribute__((always_inline)) vec_t<double> load_shifted(const in_t* row, int64_t r) const {
    vec_t<double> value = {};
    if (r + L64 > R) {
      for (int lane = 0; r + lane < R; ++lane) value[lane] = double(load(row[r + lane])) - center[r + lane];
      return value;
    }
    if constexpr (sizeof(in_t) == 8) {
      value = load_vec(reinterpret_cast<const double*>(row) + r);
    } else if constexpr (sizeof(in_t) == 4) {
      typedef float half_vector __attribute__((vector_size(GRADCLUST_VECTOR_BYTES / 2), aligned(4), may_alias));
      value = __builtin_convertvector(*reinterpret_cast<const half_vector*>(row + r), vec_t<double>);
    } else {
      for (int lane = 0; lane < L64; ++lane) value[lane] = double(load(row[r + lane]));
    }
    return value - load_vec(center + r);
  }

  // J of the statistics, or of the rows themselves where N_k·Q_k − ‖s_k‖² would lose too many digits.
  double objective_now(double running) {
    double total = 0, gross = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double* s = sum + k * padded_R;
      total += double(count[k]) * square[k].high - dot(s, s, padded_R);
      gross += double(count[k]) * square[k].high;
    }
    if (running >= 0) total = running;
    if (!(total <= gross / 1024)) return total;  // NaN and infinity, too
    sort_by_label(labels, N, K, begin, rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t k = 0; k < K; ++k) objective[k] = objective_of(rows + begin[k], begin[k + 1] - begin[k]);
    total = 0;
    for (int64_t k = 0; k < K; ++k) total += objective[k];
    return total;
  }

  // Deviations are taken from a member first: a cluster of equal rows costs exactly 0, not its mean's rounding.
  double objective_of(const int64_t* members, int64_t n) {
    if (n < 2) return 0;
    double *member = own_scratch(), *row = member + padded_R, *mean = row + padded_R;
    load_row(members[0], member);
    memset(mean, 0, padded_R * sizeof(double));
    for (int64_t m = 1; m < n; ++m) {
      load_row(members[m], row);
      for (int64_t r = 0; r < padded_R; ++r) mean[r] += row[r] - member[r];
    }
    for (int64_t r = 0; r < padded_R; ++r) mean[r] /= double(n);
    double within = 0;
    for (int64_t m = 0; m < n; ++m) {
      load_row(members[m], row);
      for (int64_t r = 0; r < padded_R; ++r) row[r] = (row[r] - member[r]) - mean[r];
      within += dot(row, row, padded_R);
    }
    return double(n) * within;
  }
};

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
