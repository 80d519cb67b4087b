// One sweep of exact moves; the definition, the tie rule and the proof that sweeps end are in
// gradclust_fast/reference/exact_moves.py.
//
// v2  A block of rows meets all clusters' sums in one float32 product; its proven rounding error gives every cost an
//     interval, and only clusters whose interval reaches below every other's end (plus the row's own, before a move) are
//     decided in float64. Most rows stay without any. A move corrects the products of the block's later rows, so the
//     outcome is that of one row after the other, whatever the block length and the number of threads. Blocks shrink
//     as more rows move: corrections cost (rows left in the block) per move, a short block a repacking per move.
//     Where few rows move, the workers screen the rows of their chunk: late sweeps lose the serial pass over all costs.
//     Where most move, the leader works alone if that is faster (team.h).
//     Rows are met in random order: they are fetched while the rows before them are multiplied.
#include "cluster_statistics.h"
#include "team.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

constexpr int64_t LONGEST = 192, SHORTEST = 48, FEW = 12;
constexpr int L32 = LANES<float>;
constexpr float INFINITE = __builtin_inff();

struct ExactMoves : ClusterStatistics {
  const int64_t* order;
  int64_t num_panels, width;
  // float32 side, everything times a power of two so that the longest row has length at most 1:
  float *center_f32, *panels, *x, *dots, *x_sqnorm;
  float *low_n, *low_q, *high_n, *high_q;  // cost of cluster k for x lies in [low, high]: n·‖x‖² + q − 2·dot
  double *gross_n, *gross_q;               // N_k and Q_k as if rows that left since the block began still counted
  int64_t* changed;                        // clusters whose panel column is out of date
  unsigned char* is_changed;
  unsigned char* screened;  // of the block's rows: whether one may have moved when the block began
  int64_t num_changed = 0;
  double scale = 1, error = 0, tie = 0;
  bool narrow = true;  // the shifted points and their scale are well inside float32's range
  Team team;

  ExactMoves(const Rows& points, const double* center, const int64_t* order, int64_t K, int64_t* labels, int threads,
             Arena& arena)
      : ClusterStatistics(points, center, K, labels, threads, arena), order(order) {
    num_panels = (K + PANEL<float> - 1) / PANEL<float>;
    width = num_panels * PANEL<float>;
    center_f32 = arena.take<float>(R);
    panels = arena.take<float>(width * R);
    x = arena.take<float>(LONGEST * padded_R);
    dots = arena.take<float>(LONGEST * width);
    x_sqnorm = arena.take<float>(LONGEST);
    low_n = arena.take<float>(width);
    low_q = arena.take<float>(width);
    high_n = arena.take<float>(width);
    high_q = arena.take<float>(width);
    gross_n = arena.take<double>(K);
    gross_q = arena.take<double>(K);
    changed = arena.take<int64_t>(K);
    is_changed = arena.take<unsigned char>(K);
    screened = arena.take<unsigned char>(LONGEST);
    tie = double(R + 8) * 0x1p-52;
    // The product sums R terms and each of a block's corrections R more and one rounding; the rest is a few additions.
    // Far above the float64 side's error, so a cluster left out here cannot tie there.
    error = double(R + LONGEST + 40) * 0x1p-24;
  }

  // Row i, shifted and scaled. center has values of the points' own type: where nothing overflows a float32 difference is
  // the float64 one rounded.
  void load_row_f32(int64_t i, float* out) const {
    dispatch(points.dtype, [&](auto zero) {
      using in_t = decltype(zero);
      const in_t* row = static_cast<const in_t*>(points.data) + i * points.stride;
      if (sizeof(in_t) < 8 && narrow) {
        for (int64_t r = 0; r < R; ++r) out[r] = (float(load(row[r])) - center_f32[r]) * float(scale);
      } else {
        for (int64_t r = 0; r < R; ++r) out[r] = float((double(load(row[r])) - center[r]) * scale);
      }
    });
    for (int64_t r = R; r < padded_R; ++r) out[r] = 0;
  }
  // Scale of the float32 side; false if a squared norm is not finite.
  bool choose_scale() {
    double largest = 0;
    for (int64_t i = 0; i < N; ++i) {
      if (!(sqnorm[i] < __builtin_inf())) return false;
      largest = sqnorm[i] > largest ? sqnorm[i] : largest;
    }
    if (largest > 0) {
      int exponent = __builtin_ilogb(largest) / 2 + 1;
      narrow = exponent > -100 && exponent < 100;
      scale = __builtin_ldexp(1.0, -exponent);
    }
    for (int64_t r = 0; r < R; ++r) center_f32[r] = float(center[r]);
    return true;
  }

  void pack_column(int64_t k) {
    float* column = panels + k / PANEL<float> * R * PANEL<float> + k % PANEL<float>;
    const double* s = sum + k * padded_R;
    for (int64_t r = 0; r < R; ++r) column[r * PANEL<float>] = float(s[r] * scale);
    gross_n[k] = double(count[k]);
    gross_q[k] = square[k].high;
    is_changed[k] = 0;
    set_interval(k);
  }

  void set_interval(int64_t k) {
    double n = double(count[k]), q = square[k].high * scale * scale;
    double error_n = error * gross_n[k], error_q = error * gross_q[k] * scale * scale + (double(N) + double(R)) * 0x1p-120;
    low_n[k] = float(n - error_n), high_n[k] = float(n + error_n);
    low_q[k] = float(q - error_q), high_q[k] = float(q + error_q);
  }

  // float32 rows of the block and their products with all sums.
  void multiply_block(int64_t first, int64_t length) {
    constexpr int64_t CHUNK = 4 * TILE_ROWS;
    auto pack = [&](int64_t c) { pack_column(changed[c]); };
    if (num_changed > 8) {
      team.run(num_changed, pack);
    } else {
      for (int64_t c = 0; c < num_changed; ++c) pack(c);
    }
    num_changed = 0;
    int64_t lines = row_lines();
    team.run((length + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
      int64_t p = chunk * CHUNK, end = p + CHUNK < length ? p + CHUNK : length, padded = round_up(end - p, TILE_ROWS);
      for (int64_t i = p; i < end; ++i) {
        load_row_f32(order[first + i], x + i * padded_R);
        x_sqnorm[i] = float(sqnorm[order[first + i]] * scale * scale);
      }
      memset(x + end * padded_R, 0, (p + padded - end) * padded_R * sizeof(float));
      // the chunk that this thread is likely to get next, a few cache lines per tile
      int64_t next = first + p + threads * CHUNK, next_end = next + CHUNK < N ? next + CHUNK : N, line = 0;
      int64_t step = lines * CHUNK / (num_panels * (padded / TILE_ROWS)) + 1;
      center_dots(x + p * padded_R, padded_R, padded, panels, num_panels, R, dots + p * width, width, [&] {
        for (int64_t s = 0; s < step && next < next_end; ++s) {
          if (line == 0) __builtin_prefetch(sqnorm + order[next]), __builtin_prefetch(labels + order[next]);
          __builtin_prefetch(address(order[next]) + 64 * line);
          if (++line == lines) line = 0, ++next;
        }
      });
      for (int64_t i = p; i < end; ++i) screened[i] = may_move(dots + i * width, x_sqnorm[i], labels[order[first + i]]);
    });
  }

  // The same question after moves in the row's block, if the answer was no before them: only costs of clusters that changed
  // since, and the bound if its own did, are others now.
  bool still_may_not(const float* dot, float x2, int64_t own) const {
    if (is_changed[own]) return false;
    float bound = high_n[own] * x2 + high_q[own] - 2 * dot[own];
    for (int64_t c = 0; c < num_changed; ++c) {
      int64_t k = changed[c];
      if (low_n[k] * x2 + low_q[k] - 2 * dot[k] <= bound) return false;
    }
    return true;
  }

  // Is any cluster's cost possibly as small as the largest that the own one's can be?
  bool may_move(const float* dot, float x2, int64_t own) const {
    float bound = high_n[own] * x2 + high_q[own] - 2 * dot[own];
    typedef int32_t ints __attribute__((vector_size(GRADCLUST_VECTOR_BYTES)));
    ints hits = {};
    for (int64_t k = 0; k < width; k += L32)
      hits -= load_vec(low_n + k) * x2 + load_vec(low_q + k) - 2 * load_vec(dot + k) <= bound;
    int total = 0;
    for (int lane = 0; lane < L32; ++lane) total += hits[lane];
    return total > 1;  // its own is one
  }

  struct Choice { int64_t cluster; double change; };

  // The rule of gradclust_fast/reference/exact_moves.py:destination over the clusters that the intervals leave.
  Choice choose(int64_t i, const float* dots, float x2, int64_t own, double* row, int64_t* candidates, double* cost,
                double* magnitude) const {
    vec_t<float> smallest = INFINITE - vec_t<float>{};
    for (int64_t k = 0; k < width; k += L32) {
      vec_t<float> high = load_vec(high_n + k) * x2 + load_vec(high_q + k) - 2 * load_vec(dots + k);
      smallest = high < smallest ? high : smallest;
    }
    float bound = smallest[0];
    for (int lane = 1; lane < L32; ++lane) bound = smallest[lane] < bound ? smallest[lane] : bound;
    int64_t n = 0, at_own = -1;
    bool empty_seen = false;  // empty clusters all cost 0: the first stands for all
    for (int64_t k = 0; k < width; k += L32) {
      vec_t<float> low = load_vec(low_n + k) * x2 + load_vec(low_q + k) - 2 * load_vec(dots + k);
      for (uint32_t bits = lane_bits<float>(low <= bound); bits; bits &= bits - 1) {
        int64_t c = k + __builtin_ctz(bits);
        if (count[c] == 0 && empty_seen) continue;
        empty_seen |= count[c] == 0;
        if (c == own) at_own = n;
        candidates[n++] = c;
      }
    }
    if (n == 1 && at_own == 0) return {own, 0};
    if (at_own < 0) candidates[at_own = n++] = own;
    load_row(i, row);
    int64_t cheapest = 0;
    for (int64_t j = 0; j < n; ++j) {
      int64_t c = candidates[j];
      magnitude[j] = count[c] ? double(count[c]) * sqnorm[i] + square[c].high : 0;
      cost[j] = count[c] ? magnitude[j] - 2 * dot(sum + c * padded_R, row, padded_R) : 0;
      bool less = cost[j] < cost[cheapest] || (cost[j] == cost[cheapest] && c < candidates[cheapest]);
      if (less) cheapest = j;
    }
    int64_t largest = cheapest;
    bool own_ties = false;
    for (int64_t j = 0; j < n; ++j) {
      if (cost[j] - cost[cheapest] > tie * (magnitude[j] + magnitude[cheapest])) continue;
      own_ties |= j == at_own;
      int64_t more = count[candidates[j]] - count[candidates[largest]];
      if (more > 0 || (more == 0 && candidates[j] < candidates[largest])) largest = j;
    }
    bool falls = cost[at_own] - cost[largest] > tie * (magnitude[at_own] + magnitude[largest]);
    int64_t to = own_ties || falls ? largest : cheapest;
    return {candidates[to], own_ties ? 0 : cost[to] - cost[at_own]};
  }

  void update_cluster(int64_t k, int64_t i, const double* row, int sign) {
    count[k] += sign;
    if (count[k]) {
      add(sum + k * padded_R, sum_low + k * padded_R, row, sign, padded_R);
      add(square[k], sign * sqnorm[i]);
    } else {  // exactly nothing, not what rounding left
      memset(sum + k * padded_R, 0, padded_R * sizeof(double));
      memset(sum_low + k * padded_R, 0, padded_R * sizeof(double));
      square[k] = {};
    }
    gross_n[k] += 1;
    gross_q[k] += sqnorm[i];
    set_interval(k);
    if (!is_changed[k]) is_changed[k] = 1, changed[num_changed++] = k;
  }

  // The products of the block's rows after p, as if the move had come before the block.
  void correct_later(int64_t p, int64_t length, int64_t from, int64_t to) {
    const float* moved = x + p * padded_R;
    for (int64_t later = p + 1; later < length; ++later) {
      float product = dot(moved, x + later * padded_R, padded_R);
      dots[later * width + from] -= product;
      dots[later * width + to] += product;
    }
  }

  void sweep(double* J, int64_t* moved, int64_t* candidates, double* cost, double* magnitude) {
    *moved = 0;
    build_statistics();
    J[0] = J[1] = choose_scale() ? objective_now(-1) : __builtin_nan("");
    if (!(J[0] < __builtin_inf())) return;
    for (int64_t k = K; k < width; ++k) low_n[k] = high_n[k] = 0, low_q[k] = high_q[k] = INFINITE;
    memset(panels, 0, width * R * sizeof(float));
    for (int64_t k = 0; k < K; ++k) changed[k] = k;
    num_changed = K;
    double change = 0;
#pragma omp parallel num_threads(threads)
    {
      if (thread() == 0) {
        move_rows(&change, moved, candidates, cost, magnitude);
        team.finish();
      } else {
        team.help();
      }
    }
    if (*moved == 0) return;
    // No move raised J, so a sum that comes out higher does so by its own rounding.
    double running = J[0] + change, now = objective_now(running > 0 ? running : 0);
    J[1] = now < J[0] ? now : J[0];
  }

  void move_rows(double* change, int64_t* moved, int64_t* candidates, double* cost, double* magnitude) {
    double* row = own_scratch();
    double rate = 1;
    Pace pace;
    for (int64_t first = 0, length; first < N; first += length) {
      length = block_length(rate);
      const bool many_move = length == SHORTEST;
      length = length < N - first ? length : N - first;
      team.alone = many_move && pace.alone();
      pace.begin();
      multiply_block(first, length);
      int64_t moved_before = *moved;
      for (int64_t p = 0; p < length; ++p) {
        int64_t i = order[first + p], own = labels[i];
        const float* products = dots + p * width;
        if (!screened[p] && num_changed <= FEW && still_may_not(products, x_sqnorm[p], own)) continue;
        if (num_changed && !may_move(products, x_sqnorm[p], own)) continue;
        Choice choice = choose(i, products, x_sqnorm[p], own, row, candidates, cost, magnitude);
        if (choice.cluster == own) continue;
        update_cluster(own, i, row, -1);
        update_cluster(choice.cluster, i, row, 1);
        correct_later(p, length, own, choice.cluster);
        labels[i] = choice.cluster;
        *change += choice.change;
        ++*moved;
      }
      rate = double(*moved - moved_before) / double(length);
      if (many_move) pace.end();
    }
  }

  // About 26/√rate balances corrections against packing and forking; between the bounds, whole chunks.
  int64_t block_length(double rate) const {
    int64_t length = LONGEST;
    while (length > SHORTEST && double(length) * double(length) * rate > 700) length -= SHORTEST;
    return length;
  }
};

}  // namespace

void exact_moves_cpu(const Rows& points, const double* center, const int64_t* order, int64_t K, int64_t* labels, double* J,
                     int64_t* moved, void* workspace, int64_t* bytes, int threads) {
  Arena arena = {static_cast<char*>(workspace)};
  ExactMoves problem(points, center, order, K, labels, threads, arena);
  int64_t* candidates = arena.take<int64_t>(K + 1);
  double* cost = arena.take<double>(K + 1);
  double* magnitude = arena.take<double>(K + 1);
  *bytes = arena.used;
  if (workspace) problem.sweep(J, moved, candidates, cost, magnitude);
}

}  // namespace gradclust::GRADCLUST_ISA
