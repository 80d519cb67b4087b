// Nearest centre of every dense row, N×K never stored.
//
// v1  Strips of 48 rows, shifted by the mean of the centres, meet the packed centres; the strip's products stay in L1/L2.
//     They give every distance an interval (the products' proven rounding error); only centres whose interval reaches
//     below every other's end are measured again by differences in float64, and these decide. Usually that is one centre,
//     so the answer is float64's, equal rows are at distance 0 and equal centres tie, for the price of the float32 product.
#include "center_dots.h"
#include "cluster.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t STRIP = 48;

template <typename T> struct Limits;
template <> struct Limits<float> {
  static constexpr float unit = 0x1p-24f, tiny = 0x1p-120f, safe = 0x1p120f, infinity = __builtin_inff();
};
template <> struct Limits<double> {
  static constexpr double unit = 0x1p-53, tiny = 0x1p-1000, safe = 0x1p1000, infinity = __builtin_inf();
};

template <typename T> T sum_of_squares(const T* x, int64_t n) {
  vec_t<T> sum = {};
  int64_t i = 0;
  for (; i + LANES<T> <= n; i += LANES<T>) {
    vec_t<T> v = load_vec(x + i);
    sum += v * v;
  }
  T total = sum_lanes<T>(sum);
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

// ‖x − c‖² in float64, lanes in a fixed order.
template <typename in_t, typename T> double distance(const in_t* x, const T* c, int64_t R) {
  constexpr int L = 8;
  double sum[L] = {};
  int64_t r = 0;
  for (; r + L <= R; r += L)
    for (int lane = 0; lane < L; ++lane) {
      double d = double(load(x[r + lane])) - double(c[r + lane]);
      sum[lane] += d * d;
    }
  for (int lane = 0; r < R; ++r, ++lane) {
    double d = double(load(x[r])) - double(c[r]);
    sum[lane] += d * d;
  }
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

template <typename in_t> struct AssignPoints {
  using T = acc_t<in_t>;
  const Rows& points;
  const T* centers;
  int64_t K, R, num_panels, width;
  const double* weight;
  T *shift, *panels, *low, *high, *scan_weight;  // low, high: ‖c_k‖² less and plus what rounding can do
  T slack;
  bool safe = true;

  AssignPoints(const Rows& points, const T* centers, int64_t K, const double* weight, Arena& arena)
      : points(points), centers(centers), K(K), R(points.R), weight(weight) {
    num_panels = (K + PANEL<T> - 1) / PANEL<T>;
    width = num_panels * PANEL<T>;
    shift = arena.take<T>(R);
    panels = arena.take<T>(width * R);
    low = arena.take<T>(width);
    high = arena.take<T>(width);
    scan_weight = arena.take<T>(width);
    // x − mean and c − mean are rounded once each (4), the product and both norms sum R terms (2R), then a few additions
    slack = T(2 * R + 24) * Limits<T>::unit;
  }
  static int64_t strip_bytes(int64_t R, int64_t width) {
    return round_up(STRIP * R * sizeof(T), 64) + round_up(STRIP * width * sizeof(T), 64);
  }

  void pack() {
    double finite_rows = 0;
    for (int64_t r = 0; r < R; ++r) shift[r] = 0;
    for (int64_t k = 0; k < K; ++k) {
      T sqnorm = sum_of_squares(centers + k * R, R);
      safe &= sqnorm < Limits<T>::safe;  // false for NaN, too
      if (!(sqnorm < Limits<T>::safe)) continue;
      finite_rows += 1;  // a running mean cannot overflow
      for (int64_t r = 0; r < R; ++r) shift[r] += (centers[k * R + r] - shift[r]) / T(finite_rows);
    }
    for (int64_t k = 0; k < width; ++k) {
      T* column = panels + k / PANEL<T> * R * PANEL<T> + k % PANEL<T>;
      T sqnorm = 0;
      for (int64_t r = 0; r < R; ++r) {
        T value = k < K ? centers[k * R + r] - shift[r] : 0;
        column[r * PANEL<T>] = value;
        sqnorm += value * value;
      }
      scan_weight[k] = k < K ? T(weight[k]) : 1;
      safe &= scan_weight[k] < Limits<T>::safe;
      T error = slack * sqnorm + T(R + 1) * Limits<T>::tiny;
      low[k] = k < K ? sqnorm - error : Limits<T>::infinity;
      high[k] = k < K ? sqnorm + error : Limits<T>::infinity;
    }
  }

  void strip(int64_t begin, T* x, T* dots, int64_t* label, T* cost) const {
    const in_t* rows = static_cast<const in_t*>(points.data) + begin * points.stride;
    int64_t count = points.N - begin < STRIP ? points.N - begin : STRIP;
    int64_t padded = round_up(count, TILE_ROWS);
    for (int64_t p = 0; p < count; ++p) {
      const in_t* row = rows + p * points.stride;
      for (int64_t r = 0; r < R; ++r) x[p * R + r] = load(row[r]) - shift[r];
    }
    for (int64_t i = count * R; i < padded * R; ++i) x[i] = 0;
    center_dots(x, R, padded, panels, num_panels, R, dots, width, [] {});
    for (int64_t p = 0; p < count; ++p) {
      T sqnorm = sum_of_squares(x + p * R, R);
      decide(rows + p * points.stride, dots + p * width, sqnorm, label + begin + p, cost + begin + p);
    }
  }

  // The end of the intervals of centres k, k + 1, …: (‖c‖² ∓ error + ‖x‖² ∓ error − 2 x·c) · weight.
  vec_t<T> scaled(const T* end, T row_end, const T* dots, int64_t k) const {
    return ((load_vec(end + k) + row_end) - 2 * load_vec(dots + k)) * load_vec(scan_weight + k);
  }

  void decide(const in_t* row, const T* dots, T sqnorm, int64_t* label, T* cost) const {
    constexpr int L = LANES<T>;
    static_assert(PANEL<T> == 2 * L, "width is a multiple of two vectors");
    T limit = Limits<T>::infinity;  // stays there where float32 is out of its depth: then every centre is measured
    T error = slack * sqnorm;
    if (safe && sqnorm < Limits<T>::safe) {
      vec_t<T> smallest[2] = {limit - vec_t<T>{}, limit - vec_t<T>{}};  // two chains: a panel's vectors
      for (int64_t k = 0; k < width; k += 2 * L)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          vec_t<T> value = scaled(high, sqnorm + error, dots, k + v * L);
          smallest[v] = value < smallest[v] ? value : smallest[v];
        }
      for (int v = 0; v < 2; ++v)
        for (int lane = 0; lane < L; ++lane) limit = smallest[v][lane] < limit ? smallest[v][lane] : limit;
    }
    double best = __builtin_inf();
    *label = 0;
    for (int64_t k = 0; k < width; k += 2 * L) {
      uint32_t bits = ~0u >> (32 - 2 * L);
      if (limit < Limits<T>::infinity)
        bits = lane_bits<T>(scaled(low, sqnorm - error, dots, k) <= limit) |
               lane_bits<T>(scaled(low, sqnorm - error, dots, k + L) <= limit) << L;
      for (; bits; bits &= bits - 1) {
        int64_t c = k + __builtin_ctz(bits);
        if (c >= K) break;
        double candidate = weight[c] * distance(row, centers + c * R, R);
        if (candidate != candidate) {
          *label = c, *cost = T(candidate);
          return;
        }
        if (candidate < best) *label = c, best = candidate;
      }
    }
    *cost = T(best);
  }
};

}  // namespace

void assign_points_cpu(const Rows& points, const void* centers, int64_t K, const double* weight, int64_t* label,
                       void* cost, void* workspace, int64_t* bytes, int threads) {
  dispatch(points.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using T = acc_t<in_t>;
    Arena arena = {static_cast<char*>(workspace)};
    AssignPoints<in_t> problem(points, static_cast<const T*>(centers), K, weight, arena);
    char* strips = arena.take<char>(threads * problem.strip_bytes(points.R, problem.width));
    *bytes = arena.used;
    if (!workspace) return;
    problem.pack();
    int64_t num_strips = (points.N + STRIP - 1) / STRIP;
#pragma omp parallel num_threads(threads)
    {
#ifdef _OPENMP
      int thread = omp_get_thread_num();
#else
      int thread = 0;
#endif
      Arena own = {strips + thread * problem.strip_bytes(points.R, problem.width)};
      T* x = own.take<T>(STRIP * points.R);
      T* dots = own.take<T>(STRIP * problem.width);
#pragma omp for schedule(dynamic, 4)
      for (int64_t s = 0; s < num_strips; ++s) problem.strip(s * STRIP, x, dots, label, static_cast<T*>(cost));
    }
  });
}

}  // namespace gradclust::GRADCLUST_ISA
