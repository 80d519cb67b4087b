// leftᵀ G_b, G_b right, ⟨G_b, C_k⟩ and G_b itself of a convolution on CUDA devices.
//
// v1  A block sums a tile of G_b over all of an example's positions in registers (conv_tiles.cuh) and multiplies it there:
//     a thread holds 8 rows × 12 columns of it and takes 20 numbers of the sides for 104 multiply-adds. Neither C_k nor
//     G_b is stored: a number a centre, or a row or column of the tile a column of the side, leaves the block, and the
//     other side is a product in torch. 2·T·I·O FLOP on tensor cores (bf16, fp16, tf32; float32 and float64 without)
//     and 2·I·O a column or centre without, where filtering the image takes 2·T·I a column in float32. Sums over lanes
//     and warps in a fixed order, no atomics. Not measured yet.
// v1  Few channels a group: conv_correlate.cuh, the block's 32 channels × 9 kernel elements multiplied in shared memory.
//     Not measured yet.
#include "conv_products.h"

#include "conv_correlate.cuh"
#include "conv_tiles.cuh"

namespace gradclust {
namespace {

template <typename acc> struct Asked {
  ConvProduct what;
  const acc *rows, *columns;
  int64_t count, rank, row_step, column_step;  // steps from one row of `rows` and `columns` to the next
  int64_t row_pitch, column_pitch, parts, I;
  acc* out;
};

// How many tiles share an example's row tile: what `right` adds up. The others' share is what `left` adds up.
__host__ __device__ inline int64_t column_tiles(const ConvTiles& p) {
  return int64_t(p.channel_tiles) * p.tap_tiles * p.f.kernel[0] * p.f.kernel[1];
}
__host__ __device__ inline int64_t column_tiles(const CorrelateTiles& p) { return int64_t(p.C) * p.tap_tiles; }

template <typename Plan> int64_t parts_of(const Plan& p, ConvProduct what) {
  switch (what) {
    case ConvProduct::dot: return p.tiles;
    case ConvProduct::right: return column_tiles(p);
    case ConvProduct::left: return p.tiles / column_tiles(p);
    default: return 1;
  }
}

// v[0 … N) summed over the lanes that differ in STEPS bits from bit STEP on. Half of the numbers change lanes at a time,
// so that each lane ends with kept(N, STEPS) of the sums in v[0 …]; returns which one is the first. An odd number of
// them is summed in both lanes.
__host__ __device__ constexpr int kept(int n, int steps) { return steps == 0 || n % 2 ? n : kept(n / 2, steps - 1); }
__host__ __device__ constexpr int copies(int n, int step, int steps) {  // bits of the lanes that end with the same sums
  return steps == 0 ? 0 : n % 2 ? step | copies(n, 2 * step, steps - 1) : copies(n / 2, 2 * step, steps - 1);
}
template <int N, int STEP, int STEPS, int SIZE, typename acc> __device__ __forceinline__ int spread_sums(acc (&v)[SIZE]) {
  if constexpr (STEPS == 0) {
    return 0;
  } else if constexpr (N % 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], STEP);
    return spread_sums<N, 2 * STEP, STEPS - 1>(v);
  } else {
    bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      acc stays = upper ? v[i + N / 2] : v[i], leaves = upper ? v[i] : v[i + N / 2];
      v[i] = stays + __shfl_xor_sync(0xffffffffu, leaves, STEP);
    }
    return (upper ? N / 2 : 0) + spread_sums<N / 2, 2 * STEP, STEPS - 1>(v);
  }
}

// A thread's share of a tile as ROWS × COLUMNS numbers; each run of VECTOR columns is side by side in `columns`.
// OF_ROW: bits of the lanes that hold other columns of the same rows; OF_COLUMN: other rows of the same columns.
struct Lanes { int step, steps; bool warps; };  // warps: warps hold parts of one sum too

template <typename in_t, int BLOCKS> struct TensorShare {
  using acc = float;
  static constexpr int ROWS = 2 * BLOCKS, COLUMNS = 4 * PAIRS, VECTOR = 2, LINES = 64 * PAIRS;
  static constexpr Lanes OF_ROW{1, 2, true}, OF_COLUMN{4, 3, false};
  TensorTile<in_t, BLOCKS> tile;
  TensorSums<BLOCKS> sums = {};

  __device__ explicit TensorShare(const TileOrigin& t) : tile(t) {}
  __device__ acc& at(int r, int c) { return sums[r / 2][c / 4][c / 2 % 2][r % 2 * 2 + c % 2]; }
  __device__ int row(int r) const { return tile.row(r / 2, r % 2 * 2); }
  __device__ int octet(int c) const { return tile.octet(c / 4, c / 2 % 2); }
  __device__ int column(int c) const { return tile.column(c); }  // in the octet
};

template <typename acc_t> struct ScalarShare {
  using acc = acc_t;
  static constexpr int ROWS = SCALAR_ROWS, VECTOR = gradclust::VECTOR<acc>, COLUMNS = PAIRS * VECTOR, LINES = 16 * COLUMNS;
  static constexpr Lanes OF_ROW{1, 4, false}, OF_COLUMN{16, 1, true};
  ScalarTile<acc, ROWS> tile;
  ScalarSums<acc, ROWS> sums = {};

  __device__ explicit ScalarShare(const TileOrigin&) {}
  __device__ acc& at(int r, int c) { return sums[r][c / VECTOR][c % VECTOR]; }
  __device__ int row(int r) const { return tile.row(r); }
  __device__ int octet(int c) const { return tile.octet(c / VECTOR); }
  __device__ int column(int c) const { return tile.column(c / VECTOR, c % VECTOR); }
};

constexpr int AT_ONCE = 8;                                       // columns, rows or centres between two barriers
constexpr size_t SUMS_BYTES = TILE_WARPS * AT_ONCE * 64 * PAIRS * 4;  // of the largest sums below

// For n < count: make(n, v) gives N numbers a thread; their sums over the lanes and warps that hold parts of one are put
// as put(n, line, sum), where line(i) < LINES says which line number i is.
template <int N, int STEP, int STEPS, bool WARPS, int LINES, typename acc, typename Make, typename Line, typename Put>
__device__ __forceinline__ void add_up(int64_t count, unsigned char* memory, Make&& make, Line&& line, Put&& put) {
  acc* sums = reinterpret_cast<acc*>(memory);  // [WARPS ? TILE_WARPS : 1, AT_ONCE, LINES]
  int part = WARPS ? threadIdx.x / 32 * AT_ONCE * LINES : 0;
  for (int64_t first = 0; first < count; first += AT_ONCE) {
    int now = int(min(int64_t(AT_ONCE), count - first));
#pragma unroll 1
    for (int n = 0; n < now; ++n) {
      acc v[N] = {};
      make(first + n, v);
      int start = spread_sums<N, STEP, STEPS>(v);
      if (threadIdx.x & copies(N, STEP, STEPS)) continue;
#pragma unroll
      for (int i = 0; i < kept(N, STEPS); ++i) sums[part + n * LINES + line(start + i)] = v[i];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < now * LINES; i += TILE_THREADS) {
      acc total = sums[i];
      if constexpr (WARPS)
        for (int w = 1; w < TILE_WARPS; ++w) total += sums[w * AT_ONCE * LINES + i];
      put(first + i / LINES, i % LINES, total);
    }
    __syncthreads();  // the next sums are written where these were read
  }
}

// Multiplies a finished tile and leaves the partial result of its example.
template <typename Share>
__device__ __forceinline__ void leave_products(const ConvTiles& p, const TileOrigin& t, Share& share, unsigned char* memory,
                                               const Asked<typename Share::acc>& q, int64_t tile) {
  using acc = typename Share::acc;
  constexpr int ROWS = Share::ROWS, COLUMNS = Share::COLUMNS, WIDTH = Share::VECTOR;
  struct alignas(WIDTH * sizeof(acc)) Vector { acc value[WIDTH]; };
  const int64_t *kernel = p.f.kernel;
  int tap = int((t.kz * kernel[1] + t.ky) * kernel[2]) + t.kx0;
  if (q.what == ConvProduct::whole) {
    acc* row = q.out + (t.b * p.f.O + int64_t(t.group) * p.O + t.o0) * q.I;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      int64_t column = weight_column(p, t, share.octet(c), share.column(c));
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (column >= 0 && share.row(r) < t.O) row[share.row(r) * q.I + column] = share.at(r, c);
    }
    return;
  }
  const acc* columns = q.columns + int64_t(tap) * q.column_pitch + t.c0;
  int start[COLUMNS / WIDTH];
#pragma unroll
  for (int c = 0; c < COLUMNS; c += WIDTH) {
    int octet = share.octet(c), of_tap = octet / t.octets;
    bool there = octet < t.columns;
    start[c / WIDTH] = there ? int(of_tap * q.column_pitch) + (octet - of_tap * t.octets) * 8 + share.column(c) : 0;
#pragma unroll
    for (int i = c; i < c + WIDTH; ++i)
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (!there) share.at(r, i) = 0;
  }
  const acc* rows = q.rows + int64_t(t.group) * q.row_pitch + t.o0 + share.row(0);
  auto times_columns = [&](int64_t n, acc (&v)[ROWS]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c += WIDTH) {
      Vector right = *reinterpret_cast<const Vector*>(columns + n * q.column_step + start[c / WIDTH]);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) v[r] += share.at(r, c + i) * right.value[i];
    }
  };
  if (q.what == ConvProduct::dot) {
    add_up<1, 1, 5, true, 1, acc>(
        q.count, memory,
        [&](int64_t k, acc (&v)[1]) {
#pragma unroll 1
          for (int64_t n = k * q.rank; n < (k + 1) * q.rank; ++n) {
            acc row[ROWS] = {};
            times_columns(n, row);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) v[0] += row[r] * rows[n * q.row_step + share.row(r) - share.row(0)];
          }
        },
        [](int) { return 0; }, [&](int64_t k, int, acc sum) { q.out[(t.b * q.parts + tile) * q.count + k] = sum; });
  } else if (q.what == ConvProduct::right) {
    constexpr Lanes OVER = Share::OF_ROW;
    int64_t part = tile % column_tiles(p), o0 = int64_t(t.group) * p.O + t.o0;
    add_up<ROWS, OVER.step, OVER.steps, OVER.warps, 8 * ROWS, acc>(
        q.count, memory, times_columns, [&](int r) { return share.row(r); },
        [&](int64_t n, int row, acc sum) {
          if (row < t.O) q.out[((t.b * q.parts + part) * q.count + n) * p.f.O + o0 + row] = sum;
        });
  } else {
    constexpr Lanes OVER = Share::OF_COLUMN;
    int64_t part = tile / column_tiles(p);
    add_up<COLUMNS, OVER.step, OVER.steps, OVER.warps, Share::LINES, acc>(
        q.count, memory,
        [&](int64_t n, acc (&v)[COLUMNS]) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            acc left = rows[n * q.row_step + share.row(r) - share.row(0)];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) v[c] += left * share.at(r, c);
          }
        },
        [&](int c) { return share.octet(c) * 8 + share.column(c); },
        [&](int64_t n, int line, acc sum) {
          int octet = line / 8, of_tap = octet / t.octets, c = (octet - of_tap * t.octets) * 8 + line % 8;
          if (octet < t.columns && c < t.C)
            q.out[((t.b * q.parts + part) * q.count + n) * q.I + int64_t(tap + of_tap) * p.C + t.c0 + c] = sum;
        });
  }
}

template <typename in_t, typename Share>
__device__ __forceinline__ void multiply_tile(const ConvTiles& p, int64_t first, const Asked<typename Share::acc>& q) {
  GRADCLUST_SHARED(memory);
  auto origin = [&](int64_t index) { return tile_origin(p, index / p.tiles, int(index % p.tiles)); };
  TileOrigin t = origin(first + blockIdx.x);
  Share share(t);
  share.tile.multiply(p, t, memory, share.sums);
  // Again, rather than kept in registers beside the sums.
  leave_products(p, origin(first + blockIdx.x), share, memory, q, (first + blockIdx.x) % p.tiles);
}

template <typename in_t, int BLOCKS>
__global__ void __launch_bounds__(TILE_THREADS, BLOCKS == 2 ? 4 : 3)
    conv_products_tensor_kernel(const __grid_constant__ ConvTiles p, int64_t first, const __grid_constant__ Asked<float> q) {
  multiply_tile<in_t, TensorShare<in_t, BLOCKS>>(p, first, q);
}

template <typename acc>
__global__ void __launch_bounds__(TILE_THREADS, 3)
    conv_products_scalar_kernel(const __grid_constant__ ConvTiles p, int64_t first, const __grid_constant__ Asked<acc> q) {
  multiply_tile<acc, ScalarShare<acc>>(p, first, q);
}

struct CorrelateOrigin {
  int64_t b, o;
  int tile, c, tap;
  __device__ CorrelateOrigin(const CorrelateTiles& p, int64_t index) {
    b = index / p.tiles, tile = int(index % p.tiles);
    int rest = tile / p.tap_tiles;
    tap = tile % p.tap_tiles * CORRELATE_TAPS, c = rest % p.C, o = int64_t(rest / p.C) * 32 + threadIdx.x % 32;
  }
};

template <typename in_t>
__global__ void __launch_bounds__(32 * CORRELATE_WARPS, 2)
    conv_products_correlate_kernel(const __grid_constant__ CorrelateTiles p, int64_t first,
                                   const __grid_constant__ Asked<acc_t<in_t>> q) {
  using acc = acc_t<in_t>;
  GRADCLUST_SHARED(memory);
  acc* sums = reinterpret_cast<acc*>(memory);                      // [warps, taps, 32]
  acc* gradient = sums + CORRELATE_WARPS * CORRELATE_TAPS * 32;    // [taps, 32]
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  {
    CorrelateOrigin t(p, first + blockIdx.x);
    correlate_block<in_t>(p, t.b, t.o, t.c, t.tap, sums,
                          [&](int i, acc total) { gradient[(warp + i * CORRELATE_WARPS) * 32 + lane] = total; });
  }
  __syncthreads();
  CorrelateOrigin t(p, first + blockIdx.x);  // again, rather than kept in registers
  int taps = min(CORRELATE_TAPS, p.taps - t.tap);
  bool live = t.o < p.f.O;
  const acc *mine = gradient + lane, *columns = q.columns + int64_t(t.tap) * q.column_pitch + t.c;
  auto times_columns = [&](int64_t n) {
    acc sum = 0;
#pragma unroll
    for (int j = 0; j < CORRELATE_TAPS; ++j)
      if (j < taps) sum += mine[j * 32] * columns[n * q.column_step + j * q.column_pitch];
    return sum;
  };
  auto row = [&](int64_t n) { return live ? q.rows[n * q.row_step + t.o] : acc(0); };
  if (q.what == ConvProduct::whole) {
    for (int j = warp; j < taps && live; j += CORRELATE_WARPS)
      q.out[(t.b * p.f.O + t.o) * q.I + int64_t(t.c) * p.taps + t.tap + j] = mine[j * 32];
    return;
  }
#pragma unroll 1
  for (int64_t n = warp; n < q.count; n += CORRELATE_WARPS) {
    if (q.what == ConvProduct::dot) {
      acc sum = 0;
#pragma unroll 1
      for (int64_t r = n * q.rank; r < (n + 1) * q.rank; ++r) sum += row(r) * times_columns(r);
      sum = warp_sum(sum);
      if (lane == 0) q.out[(t.b * q.parts + t.tile) * q.count + n] = sum;
    } else if (q.what == ConvProduct::right) {
      acc sum = times_columns(n);
      if (live) q.out[((t.b * q.parts + t.tile % column_tiles(p)) * q.count + n) * p.f.O + t.o] = sum;
    } else {
      acc left = row(n);
      acc* out = q.out + ((t.b * q.parts + t.tile / column_tiles(p)) * q.count + n) * q.I + int64_t(t.tap) * p.C + t.c;
#pragma unroll 1
      for (int j = 0; j < taps; ++j) {
        acc sum = warp_sum(left * mine[j * 32]);
        if (lane == 0) out[int64_t(j) * p.C] = sum;
      }
    }
  }
}

template <typename Plan, typename acc>
const char* launch_products(const char* name, const char* sizes, void (*kernel)(Plan, int64_t, Asked<acc>),
                            const Plan& plan, unsigned threads, size_t bytes, Asked<acc> asked, void* stream) {
  asked.parts = parts_of(plan, asked.what);
  return in_grids(plan.f.B * plan.tiles, [&](int64_t first, unsigned blocks) {
    return launch(name, sizes, kernel, blocks, threads, bytes, stream, plan, first, asked);
  });
}

}  // namespace

ConvPitches conv_products_cuda_pitches(ConvCudaRoute route) {
  return route == ConvCudaRoute::correlate ? ConvPitches{1, 1} : ConvPitches{64, 8};
}

int64_t conv_products_cuda_parts(const ConvFactors& f, ConvCudaRoute route, ConvProduct what) {
  int64_t parts = 0;
  dispatch(f.dtype, [&](auto zero) {
    parts = route == ConvCudaRoute::correlate ? parts_of(plan_correlate(f), what)
                                              : parts_of(plan_large_tiles<decltype(zero)>(f, route, false), what);
  });
  return parts;
}

const char* conv_products_cuda(const ConvFactors& f, ConvCudaRoute route, ConvProduct what, const ConvSides& sides,
                               void* out, void* stream) {
  char sizes[192];
  describe(f, sizes);
  const char* error = nullptr;
  int64_t taps = f.kernel[0] * f.kernel[1] * f.kernel[2], I = f.C / f.groups * taps;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    Asked<acc> asked{what, static_cast<const acc*>(sides.rows), static_cast<const acc*>(sides.columns), sides.count,
                     sides.rank, f.groups * sides.row_pitch, taps * sides.column_pitch, sides.row_pitch,
                     sides.column_pitch, 0, I, static_cast<acc*>(out)};
    if (route == ConvCudaRoute::correlate) {
      error = launch_products("conv_products_correlate_kernel", sizes, conv_products_correlate_kernel<in_t>,
                              plan_correlate(f), 32 * CORRELATE_WARPS,
                              32 * (CORRELATE_WARPS + 1) * CORRELATE_TAPS * sizeof(acc), asked, stream);
      return;
    }
    ConvTiles plan = plan_large_tiles<in_t>(f, route);
    size_t bytes = std::max(size_t(plan.stages * plan.stage_bytes), SUMS_BYTES);
    if constexpr (sizeof(in_t) <= 4) {
      auto kernel = plan.tile_rows == 32 ? conv_products_tensor_kernel<in_t, 2> : conv_products_tensor_kernel<in_t, 4>;
      if (on_tensor_cores(f, route))
        error = launch_products("conv_products_tensor_kernel", sizes, kernel, plan, TILE_THREADS, bytes, asked, stream);
    }
    if constexpr (sizeof(in_t) >= 4) {
      if (!on_tensor_cores(f, route))
        error = launch_products("conv_products_scalar_kernel", sizes, conv_products_scalar_kernel<in_t>, plan,
                                TILE_THREADS, bytes, asked, stream);
    }
  });
  return error;
}

}  // namespace gradclust
