// Shared by the conv kernels: workspace, the tile micro-kernel and how a stride splits an image.
#pragma once
#include <cstdlib>

#include "gemm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

// Tile of the micro-kernel: broadcast rows × vectors. 12 (AVX2: of 16 registers) or 16 (AVX-512: of 32) accumulators
// hide the FMA latency and keep loads below the load ports' rate.
constexpr int TILE_ROWS = GRADCLUST_VECTOR_BYTES == 64 ? 8 : 6;
constexpr int TILE_VECTORS = 2;
template <typename T> constexpr int TILE_WIDTH = TILE_VECTORS * LANES<T>;

GRADCLUST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block of memory handed out in 64-byte aligned pieces. Each thread keeps its own between calls: fresh pages cost
// more than the arithmetic of a small layer. Two passes: without memory, `take` only counts.
struct Workspace {
  char* data = nullptr;
  size_t capacity = 0, used = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(data); }

  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= capacity) return;
    free(data);
    capacity = size_t(round_up(int64_t(bytes), 4096));
    data = static_cast<char*>(aligned_alloc(64, capacity));
    if (!data) abort();  // inside a parallel region nothing can be thrown
  }
  template <typename T> T* take(int64_t n) {
    T* piece = reinterpret_cast<T*>(data + used);
    used += size_t(round_up(n * int64_t(sizeof(T)), 64));
    return piece;
  }
  // What take<T>(n) will use.
  template <typename T> static size_t bytes(int64_t n) { return size_t(round_up(n * int64_t(sizeof(T)), 64)); }
};

GRADCLUST_INLINE Workspace& thread_workspace() {
  static thread_local Workspace workspace;
  return workspace;
}

// out[r][0 … N) = (accumulate ? out[r] : 0) + Σ_n a[r][offset(n)] · b[n·N …], N = TILE_WIDTH: n runs over `outer` rows of
// `inner` steps, row i starting at row_offset[i] and stepping by a_step; b is packed, N numbers a step. A Gram tile (one
// row, channels as steps), a weight-gradient tile (image rows and columns) and a filtered image (kernel elements and
// channels) are all of this form, so no operand is ever unfolded.
// finish(r, v, vector) gets the sums of row r while they are in registers.
template <typename T, typename Finish>
GRADCLUST_INLINE void multiply_and(const T* out, int64_t out_step, bool accumulate, const T* const* a,
                                   const int64_t* row_offset, int64_t outer, int64_t inner, int64_t a_step, const T* b,
                                   Finish&& finish) {
  constexpr int L = LANES<T>;
  static const T zeros[TILE_WIDTH<T>] = {};  // read, because a zeroed register array would be set up in memory
  const T* start = accumulate ? out : zeros;
  const int64_t start_step = accumulate ? out_step : 0;
  const T* row[TILE_ROWS];
  vec_t<T> sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < TILE_ROWS; ++r) {
    row[r] = a[r];
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; ++v) sum[r][v] = load_vec(start + r * start_step + v * L);
  }
  for (int64_t i = 0; i < outer; ++i) {
    int64_t offset = row_offset[i];
    for (int64_t n = 0; n < inner; ++n, offset += a_step, b += TILE_WIDTH<T>) {
      vec_t<T> right[TILE_VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < TILE_VECTORS; ++v) right[v] = load_vec(b + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < TILE_ROWS; ++r) {
        T left = row[r][offset];
#pragma GCC unroll 8
        for (int v = 0; v < TILE_VECTORS; ++v) sum[r][v] += left * right[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECTORS; ++v) finish(r, v, sum[r][v]);
}

template <typename T>
GRADCLUST_INLINE void multiply(T* out, int64_t out_step, bool accumulate, const T* const* a, const int64_t* row_offset,
                               int64_t outer, int64_t inner, int64_t a_step, const T* b) {
  multiply_and<T>(out, out_step, accumulate, a, row_offset, outer, inner, a_step, b,
                  [&](int r, int v, vec_t<T> sum) __attribute__((always_inline)) {
                    store_vec(out + r * out_step + v * LANES<T>, sum);
                  });
}

GRADCLUST_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// A stride splits an image into phases. One dimension of one phase: image index u·stride + phase; element i reaches
// u = t + reach.
struct Axis {
  int64_t phase, count, low, high;  // count: kernel elements; low, high: least and greatest reach
};

GRADCLUST_INLINE int64_t axis_origin(const ConvFactors& f, int d, int64_t i) { return i * f.dilation[d] - f.pad[d]; }

inline int64_t plan_axis(const ConvFactors& f, int d, Axis* axes) {
  int64_t n = 0;
  for (int64_t i = 0; i < f.kernel[d]; ++i) {
    int64_t reach = floor_div(axis_origin(f, d, i), f.stride[d]);
    int64_t phase = axis_origin(f, d, i) - reach * f.stride[d], a = 0;
    while (a < n && axes[a].phase != phase) ++a;
    if (a == n) axes[n++] = {phase, 0, reach, reach};
    axes[a].low = min_of(axes[a].low, reach), axes[a].high = max_of(axes[a].high, reach);
    ++axes[a].count;
  }
  return n;
}

// Whether some output position meets this index of the image through some kernel element (dilation leaves holes).
inline bool is_met(const ConvFactors& f, int d, int64_t image) {
  for (int64_t i = 0; i < f.kernel[d]; ++i) {
    int64_t offset = image - axis_origin(f, d, i);
    if (offset >= 0 && offset % f.stride[d] == 0 && offset / f.stride[d] < f.out[d]) return true;
  }
  return false;
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
