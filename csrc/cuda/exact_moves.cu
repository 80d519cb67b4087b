// One sweep of exact moves on CUDA devices, many rows at a time.
//
// v1  One cooperative launch a sweep, where gradclust_fast/triton_kernels/exact_moves.py makes four for each of some 64
//     blocks of rows: the rule is that file's, word for word, and so are the rows met together, so labels agree; its
//     header says why J never rises and sweeps end. Clusters' sums, sizes and the costs of the rows at hand stay in the
//     L2 cache. Costs are float64 products on tensor cores, 64 rows × 64 clusters a block through shared memory; a warp
//     chooses for a row; a cluster that nobody wants to enter or leave costs one test, so late sweeps are little more
//     than the products. Atomics are on integers, sums are added in visiting order: the same bits every time.
//     2·N·K·R float64 FLOP a sweep, points read once a block of clusters. Not measured yet.
#include "cluster_objective.cuh"
#include "grid.cuh"
#include "philox.cuh"

namespace gradclust {
namespace {

constexpr int TILE = 64, DEPTH = 16, PITCH = DEPTH + 4;  // 4 doubles beyond a multiple of 16: fragments meet all banks
constexpr int TILE_BYTES = 2 * 2 * TILE * PITCH * int(sizeof(double));  // rows and sums, two stages

constexpr int64_t BATCHES = 64, LEAST_ROWS = 16;  // as in the Triton kernel: BLOCKS, LEAST_ROWS, MOST_COSTS
constexpr int64_t MOST_COSTS = int64_t(1) << 22;

// How many of the rows at hand want into a cluster and out of it, how many of the admitted touch it, and the first of the
// others that does: [K] each.
struct State { int *entering, *leaving, *moving, *first; };

struct Moves {
  Rows points;
  SortedRows at;
  const double* center;  // [R]
  const int64_t* order;  // [N]
  int64_t* labels;       // [N]
  int64_t K, length;     // length: rows at hand
  double tie;
  double* sqnorm;                         // [N] ‖x − center‖²
  double *part, *part_low;                // [slots, R + 1]
  double *sum, *sum_low;                  // [K, R + 1] Σ (x − center), last Σ ‖x − center‖²; with what rounding lost
  double *square, *scatter;               // [K] Q_k, and Q_k − ‖s_k‖²/N_k
  int64_t* count;                         // [K]
  double* cost;                           // [length, K]
  double *slack, *reach, *own_reach;      // [length]
  int *source, *target, *admitted;        // [length]
  State state[2];                         // take turns
  uint64_t* arrived;

  __host__ __device__ int64_t width() const { return points.R + 1; }
};

// (high + low) + x, normalised (Knuth's two-sum).
struct Exact {
  double high = 0, low = 0;
  __device__ void add(double x) {
    double total = high + x, part = total - high, rest = low + ((high - (total - part)) + (x - part));
    high = total + rest;
    low = rest - (high - total);
  }
};

// Feature `f` of a row less the centre; feature R is its squared norm.
template <typename in_t> __device__ double wide_entry(const Moves& m, int64_t row, int64_t f) {
  return f < m.points.R ? entry<in_t>(m.points, row, f) - m.center[f] : m.sqnorm[row];
}

template <typename in_t> __device__ void find_sqnorms(const Moves& m) {
  int64_t warps = int64_t(gridDim.x) * MOVE_WARPS;
  for (int64_t row = int64_t(blockIdx.x) * MOVE_WARPS + threadIdx.x / 32; row < m.points.N; row += warps) {
    double total = 0;
    for (int64_t r = threadIdx.x % 32; r < m.points.R; r += 32) {
      double x = entry<in_t>(m.points, row, r) - m.center[r];
      total += x * x;
    }
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) m.sqnorm[row] = total;
  }
}

template <typename in_t> __device__ void sum_pieces(const Moves& m) {
  int64_t W = m.width(), slots = m.points.N / CLUSTER_PIECE + m.K;
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    Piece piece = piece_at(m.at.begin, m.K, slot);
    if (piece.first >= piece.last) continue;
    for (int64_t f = threadIdx.x; f < W; f += MOVE_THREADS) {
      Exact total;
#pragma unroll 4
      for (int64_t i = piece.first; i < piece.last; ++i) total.add(wide_entry<in_t>(m, m.at.rows[i], f));
      m.part[slot * W + f] = total.high;
      m.part_low[slot * W + f] = total.low;
    }
  }
}

// What follows from a cluster's sums: each thread brings squares of its own; `square` is Q_k in the one thread that has it.
__device__ void leave_sizes(const Moves& m, int64_t k, int64_t count, double squares, double square, double* sums) {
  squares = block_sum(squares, sums);
  square = block_sum(square, sums);
  if (threadIdx.x > 0) return;
  m.count[k] = count;
  m.square[k] = square;  // side by side: a column of `sum` would be a cache line a cluster
  m.scatter[k] = square - squares / double(max(count, int64_t(1)));
}

__device__ void sum_clusters(const Moves& m, double* sums) {
  int64_t W = m.width();
  for (int64_t k = blockIdx.x; k < m.K; k += gridDim.x) {
    int64_t slot = first_slot(m.at.begin, k), pieces = num_pieces(m.at.begin, k);
    double squares = 0, square = 0;
    for (int64_t f = threadIdx.x; f < W; f += MOVE_THREADS) {
      Exact total;
      for (int64_t p = 0; p < pieces; ++p) {
        total.add(m.part[(slot + p) * W + f]);
        total.add(m.part_low[(slot + p) * W + f]);
      }
      m.sum[k * W + f] = total.high;
      m.sum_low[k * W + f] = total.low;
      (f < m.points.R ? squares : square) += f < m.points.R ? total.high * total.high : total.high;
    }
    leave_sizes(m, k, m.at.begin[k + 1] - m.at.begin[k], squares, square, sums);
  }
}

__device__ void clear(const State& state, int64_t k) {
  state.entering[k] = state.leaving[k] = state.moving[k] = 0;
  state.first[k] = 0x7fffffff;
}

// cost [n, K]: N_k‖x‖² + Q_k − 2 s_k·x, which is Σ_{j in k} ‖x − x_j‖². A warp holds 16 rows × 32 clusters of a tile.
template <typename in_t> __device__ void find_costs(const Moves& m, int64_t begin, int64_t n, double* memory) {
  int64_t R = m.points.R, W = m.width(), across = (m.K + TILE - 1) / TILE, tiles = (n + TILE - 1) / TILE * across;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at_row = warp % 4 * 16, at_cluster = warp / 4 * 32;
  int mine = threadIdx.x / 4, depth = threadIdx.x % 4 * 4;  // what this thread fetches of either operand
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int64_t p0 = tile / across * TILE, k0 = tile % across * TILE;
    bool live = p0 + mine < n, there = k0 + mine < m.K;
    int64_t row = live ? m.order[begin + p0 + mine] : 0;
    const double* sums = m.sum + (there ? k0 + mine : 0) * W;
    double x[4], s[4];
    auto fetch = [&](int64_t from) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int64_t r = from + depth + j;
        x[j] = live && r < R ? entry<in_t>(m.points, row, r) - m.center[r] : 0;
        s[j] = there && r < R ? sums[r] : 0;
      }
    };
    double dot[2][4][2] = {};
    bool busy = p0 + at_row < n && k0 + at_cluster < m.K;  // the same for the whole warp
    fetch(0);
    for (int64_t from = 0, stage = 0; from < R; from += DEPTH, stage ^= 1) {
      double *rows = memory + stage * 2 * TILE * PITCH, *clusters = rows + TILE * PITCH;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rows[mine * PITCH + depth + j] = x[j];
        clusters[mine * PITCH + depth + j] = s[j];
      }
      __syncthreads();  // the other stage may be written from here on: its products were before this barrier
      if (from + DEPTH < R) fetch(from + DEPTH);
      if (!busy) continue;
#pragma unroll
      for (int d = 0; d < DEPTH; d += 4) {
        double a[2], b[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) a[i] = rows[(at_row + 8 * i + lane / 4) * PITCH + d + lane % 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = clusters[(at_cluster + 8 * j + lane / 4) * PITCH + d + lane % 4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply_add(dot[i][j], a[i], b[j]);
      }
    }
    __syncthreads();  // the next tile begins with stage 0
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int64_t p = p0 + at_row + 8 * i + lane / 4;
      if (p >= n) continue;
      double sqnorm = m.sqnorm[m.order[begin + p]];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          int64_t k = k0 + at_cluster + 8 * j + lane % 4 * 2 + c;
          if (k >= m.K) continue;
          int64_t count = m.count[k];
          double cost = (double(count) * sqnorm + m.square[k]) - 2 * dot[i][j][c];
          m.cost[p * m.K + k] = count > 0 ? cost : 0;
        }
    }
  }
}

// Where every row wants to be, and what it knows about the moves that may go with it. A warp a row.
__device__ void choose(const Moves& m, const State& now, int64_t begin, int64_t n) {
  int64_t warps = int64_t(gridDim.x) * MOVE_WARPS;
  int lane = threadIdx.x % 32;
  for (int64_t p = int64_t(blockIdx.x) * MOVE_WARPS + threadIdx.x / 32; p < n; p += warps) {
    const double* cost = m.cost + p * m.K;
    int64_t row = m.order[begin + p], own = m.labels[row], cheapest = 0;
    double sqnorm = m.sqnorm[row], lowest = INFINITY;
    auto magnitude = [&](int64_t k) { return double(m.count[k]) * sqnorm + m.square[k]; };
    for (int64_t k = lane; k < m.K; k += 32)
      if (cost[k] < lowest) lowest = cost[k], cheapest = k;
#pragma unroll
    for (int step = 16; step; step /= 2) {
      double other = __shfl_xor_sync(0xffffffffu, lowest, step);
      int64_t other_at = __shfl_xor_sync(0xffffffffu, cheapest, step);
      if (other < lowest || (other == lowest && other_at < cheapest)) lowest = other, cheapest = other_at;
    }
    double lowest_magnitude = magnitude(cheapest);
    int64_t most = -1, largest = cheapest;  // of the clusters that tie for cheapest the largest, then the lowest index
    for (int64_t k = lane; k < m.K; k += 32)
      if (m.count[k] > most && cost[k] - lowest <= m.tie * (magnitude(k) + lowest_magnitude)) most = m.count[k], largest = k;
#pragma unroll
    for (int step = 16; step; step /= 2) {
      int64_t other = __shfl_xor_sync(0xffffffffu, most, step), other_at = __shfl_xor_sync(0xffffffffu, largest, step);
      if (other > most || (other == most && other_at < largest)) most = other, largest = other_at;
    }
    if (lane > 0) continue;
    double own_cost = cost[own], own_magnitude = magnitude(own);
    bool own_ties = own_cost - lowest <= m.tie * (own_magnitude + lowest_magnitude);
    bool falls = own_cost - cost[largest] > m.tie * (own_magnitude + magnitude(largest));
    int64_t target = own_ties || falls ? largest : cheapest;
    bool wants = target != own;
    m.source[p] = int(own);
    m.target[p] = wants ? int(target) : -1;
    if (!wants) continue;
    double rounding = m.tie * magnitude(target), own_rounding = m.tie * own_magnitude;
    double around = cost[target] - m.scatter[target];  // N_l‖x − c_l‖²
    double own_around = own_cost - m.scatter[own], count = double(m.count[target]);
    bool at_both_means = own_ties && around <= 4 * rounding && own_around <= 4 * own_rounding;
    m.slack[p] = at_both_means ? INFINITY : own_ties ? 0 : own_cost - cost[target] - rounding - own_rounding;
    // nothing is known about the mean of an empty cluster
    m.reach[p] = count > 0 ? (fmax(around, 0.0) + rounding) / count : INFINITY;
    m.own_reach[p] = (fmax(own_around, 0.0) + own_rounding) / double(m.count[own]);
    atomicAdd(now.entering + target, 1);
    atomicAdd(now.leaving + own, 1);
  }
}

// Which rows may move together, and who is the first of those that wait.
__device__ void admit(const Moves& m, const State& now, int64_t n) {
  for (int64_t p = int64_t(blockIdx.x) * MOVE_THREADS + threadIdx.x; p < n; p += int64_t(gridDim.x) * MOVE_THREADS) {
    int target = m.target[p], source = m.source[p];
    if (target < 0) continue;
    int entering = now.entering[target], leaving = now.leaving[source];
    double extra = entering > 1 ? entering * m.reach[p] : 0;
    extra += leaving > 1 ? leaving * m.own_reach[p] : 0;
    bool admitted = extra < m.slack[p];
    m.admitted[p] = admitted;
    if (admitted) {
      atomicAdd(now.moving + source, 1);
      atomicAdd(now.moving + target, 1);
    } else {
      atomicMin(now.first + source, int(p));
      atomicMin(now.first + target, int(p));
    }
  }
}

// +1 where row p enters cluster k, −1 where it leaves it; 0 where it does not move or not here.
__device__ int sign_of_move(const Moves& m, const State& now, int64_t p, int64_t k) {
  int target = m.target[p], source = m.source[p];
  if (target < 0 || (target != k && source != k)) return 0;
  bool goes = m.admitted[p] || (now.moving[source] == 0 && now.moving[target] == 0 && now.first[source] == p &&
                                now.first[target] == p);
  return goes ? (target == k ? 1 : -1) : 0;
}

// Adds the listed rows, those with a minus sign subtracted, to the sums of cluster k. An entry is 2·(p − begin), + 1 for −.
template <typename in_t>
__device__ void add_listed(const Moves& m, int64_t k, int64_t begin, int64_t from, const int* list, int listed) {
  int64_t W = m.width();
  for (int64_t f = threadIdx.x; f < W; f += MOVE_THREADS) {
    Exact total{m.sum[k * W + f], m.sum_low[k * W + f]};
#pragma unroll 4
    for (int i = 0; i < listed; ++i) {
      double x = wide_entry<in_t>(m, m.order[begin + from + list[i] / 2], f);
      total.add(list[i] % 2 ? -x : x);
    }
    m.sum[k * W + f] = total.high;
    m.sum_low[k * W + f] = total.low;
  }
}

// Sizes, sums in visiting order, labels of the rows that leave. A block a cluster.
template <typename in_t>
__device__ void apply(const Moves& m, const State& now, const State& later, int64_t begin, int64_t n, double* sums,
                      int* list) {
  int64_t W = m.width();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* totals = list + MOVE_THREADS;  // [MOVE_WARPS] movers of a warp's rows
  for (int64_t k = blockIdx.x; k < m.K; k += gridDim.x) {
    if (threadIdx.x == 0) clear(later, k);
    if (now.entering[k] == 0 && now.leaving[k] == 0) continue;
    double gain = 0;
    bool touched = false;
    for (int64_t from = 0; from < n; from += MOVE_THREADS) {
      int64_t p = from + threadIdx.x;
      int sign = p < n ? sign_of_move(m, now, p, k) : 0;
      unsigned movers = __ballot_sync(0xffffffffu, sign != 0);
      if (lane == 0) totals[warp] = __popc(movers);
      __syncthreads();
      int place = __popc(movers & ((1u << lane) - 1)), found = 0;
      for (int w = 0; w < MOVE_WARPS; ++w) place += w < warp ? totals[w] : 0, found += totals[w];
      if (sign != 0) list[place] = 2 * int(threadIdx.x) + (sign < 0);
      if (sign < 0) m.labels[m.order[begin + p]] = m.target[p];
      gain += sign;
      __syncthreads();
      if (found == 0) continue;
      touched = true;
      add_listed<in_t>(m, k, begin, from, list, found);
    }
    if (!touched) continue;
    int64_t count = m.count[k] + int64_t(block_sum(gain, sums));
    double squares = 0, square = 0;
    for (int64_t f = threadIdx.x; f < W; f += MOVE_THREADS) {
      if (count == 0) m.sum[k * W + f] = m.sum_low[k * W + f] = 0;  // exactly nothing, not what rounding left
      double high = m.sum[k * W + f];
      (f < m.points.R ? squares : square) += f < m.points.R ? high * high : high;
    }
    leave_sizes(m, k, count, squares, square, sums);
  }
}

template <typename in_t>
__global__ void __launch_bounds__(MOVE_THREADS, 2) exact_moves_sweep_kernel(const __grid_constant__ Moves m) {
  GRADCLUST_SHARED(memory);
  double *tiles = reinterpret_cast<double*>(memory), *sums = tiles;
  int* list = reinterpret_cast<int*>(memory + MOVE_WARPS * sizeof(double));
  find_sqnorms<in_t>(m);
  for (int64_t k = int64_t(blockIdx.x) * MOVE_THREADS + threadIdx.x; k < m.K; k += int64_t(gridDim.x) * MOVE_THREADS)
    clear(m.state[0], k);
  wait_for_grid(m.arrived);
  sum_pieces<in_t>(m);
  wait_for_grid(m.arrived);
  sum_clusters(m, sums);
  wait_for_grid(m.arrived);
  int turn = 0;
  for (int64_t begin = 0; begin < m.points.N; begin += m.length, turn ^= 1) {
    int64_t n = min(m.length, m.points.N - begin);
    State now = m.state[turn], later = m.state[1 - turn];
    find_costs<in_t>(m, begin, n, tiles);
    wait_for_grid(m.arrived);
    choose(m, now, begin, n);
    wait_for_grid(m.arrived);
    admit(m, now, n);
    wait_for_grid(m.arrived);
    apply<in_t>(m, now, later, begin, n, sums, list);
    wait_for_grid(m.arrived);
  }
}

__global__ void __launch_bounds__(256) visiting_keys_kernel(int64_t* __restrict__ key, int64_t N, uint32_t low, uint32_t high) {
  int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= N) return;
  uint4 bits = philox4x32(uint4{uint32_t(i), 0, 0, 0}, low, high);
  key[i] = int64_t(bits.x & 0x7fffffff) << 31 | int64_t(bits.y & 0x7fffffff);
}

int64_t rows_at_hand(int64_t N, int64_t K) {
  return std::min(std::max(LEAST_ROWS, ceil_div(N, BATCHES)), std::max(LEAST_ROWS, MOST_COSTS / K));
}

// Lays the workspace out from `at` on; returns its size in doubles.
int64_t lay_out(Moves& m, double* at) {
  double* start = at;
  int64_t N = m.points.N, K = m.K, W = m.width(), slots = N / CLUSTER_PIECE + K, n = m.length;
  auto take = [&](int64_t size) {
    double* taken = at;
    at += size;
    return taken;
  };
  m.sqnorm = take(N);
  m.part = take(slots * W), m.part_low = take(slots * W);
  m.sum = take(K * W), m.sum_low = take(K * W);
  m.square = take(K), m.scatter = take(K), m.count = reinterpret_cast<int64_t*>(take(K));
  m.cost = take(n * K);
  m.slack = take(n), m.reach = take(n), m.own_reach = take(n);
  int* integers = reinterpret_cast<int*>(take((3 * n + 8 * K + 1) / 2));
  for (int** each : {&m.source, &m.target, &m.admitted}) *each = integers, integers += n;
  for (State& state : m.state)
    for (int** each : {&state.entering, &state.leaving, &state.moving, &state.first}) *each = integers, integers += K;
  return at - start;
}

void describe(const Rows& points, int64_t K, char (&text)[96]) {
  snprintf(text, sizeof text, "N=%lld, R=%lld, K=%lld", (long long)points.N, (long long)points.R, (long long)K);
}

}  // namespace

int64_t exact_moves_cuda_workspace(int64_t N, int64_t R, int64_t K) {
  Moves m{};
  m.points.N = N, m.points.R = R, m.K = K, m.length = rows_at_hand(N, K);
  return lay_out(m, nullptr);
}

const char* cluster_objective_cuda(const Rows& points, const SortedRows& at, int64_t K, double* workspace,
                                   uint64_t* arrived, double* J, void* stream) {
  char sizes[96];
  describe(points, K, sizes);
  int64_t slots = points.N / CLUSTER_PIECE + K;
  double *mean = workspace + slots * points.R, *within = mean + K * points.R;
  const char* error = nullptr;
  dispatch(points.dtype, [&](auto zero) {
    error = launch_cooperative("cluster_objective_kernel", sizes, cluster_objective_kernel<decltype(zero)>, slots,
                               MOVE_THREADS, MOVE_WARPS * sizeof(double), stream, points, at, K, workspace, mean, within,
                               J, arrived);
  });
  return error;
}

const char* exact_moves_cuda(const Rows& points, const SortedRows& at, int64_t K, const double* center,
                             const int64_t* order, double tie, double* workspace, uint64_t* arrived, int64_t* labels,
                             void* stream) {
  char sizes[96];
  describe(points, K, sizes);
  Moves m{};
  m.points = points, m.at = at, m.center = center, m.order = order, m.labels = labels, m.K = K, m.tie = tie;
  m.length = rows_at_hand(points.N, K), m.arrived = arrived;
  lay_out(m, workspace);
  int64_t useful = std::max({ceil_div(m.length, TILE) * ceil_div(K, TILE), ceil_div(m.length, MOVE_WARPS), std::min(K, m.length)});
  const char* error = nullptr;
  dispatch(points.dtype, [&](auto zero) {
    error = launch_cooperative("exact_moves_sweep_kernel", sizes, exact_moves_sweep_kernel<decltype(zero)>, useful,
                               MOVE_THREADS, TILE_BYTES, stream, m);
  });
  return error;
}

const char* visiting_keys_cuda(int64_t* key, int64_t N, int64_t seed, void* stream) {
  char sizes[96];
  snprintf(sizes, sizeof sizes, "N=%lld", (long long)N);
  uint64_t bits = uint64_t(seed) & ((uint64_t(1) << 62) - 1);  // what the Triton kernel takes of it
  return launch("visiting_keys_kernel", sizes, visiting_keys_kernel, unsigned(ceil_div(N, 256)), 256, 0, stream, key, N,
                uint32_t(bits), uint32_t(bits >> 32));
}

}  // namespace gradclust
