// Inner products of a block of rows with all centres, the shared core of assign_points and exact_moves.
//
// v1  Centres are packed once into panels of two vectors' width, lanes = centres; a tile of 6 (12 with AVX-512) rows by one
//     panel stays in registers, a panel in L1 while the block's rows pass. Every product is one chain of multiply-adds
//     over R, in order, whatever the tile: |error| ≤ R·u·‖x‖‖c‖ with u the unit round-off.
#pragma once
#include "isa.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

template <typename T> constexpr int PANEL = 2 * LANES<T>;
constexpr int TILE_ROWS = GRADCLUST_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int64_t DEPTH = 256;  // a panel's slice of this many features is at most 32 KB

// Cuts one caller-owned buffer into aligned arrays; over a null buffer it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T> T* take(int64_t n) {
    T* begin = reinterpret_cast<T*>(base + used);
    used += round_up(n * int64_t(sizeof(T)), 64);
    return begin;
  }
};

// out[m, 0:PANEL) (+)= x[m, 0:depth) · panel[0:depth, 0:PANEL) for TILE_ROWS rows. Not inlined: among a caller's variables
// the rows' addresses were spilled and read again in every step, a third slower.
template <typename T>
__attribute__((noinline)) void dots_tile(const T* x, int64_t stride_x, const T* panel, int64_t depth, T* out, int64_t stride_out,
                                bool add) {
  constexpr int L = LANES<T>;
  vec_t<T> acc[TILE_ROWS][2] = {};
  if (add) {
#pragma GCC unroll 12
    for (int m = 0; m < TILE_ROWS; ++m) {
      acc[m][0] = load_vec(out + m * stride_out);
      acc[m][1] = load_vec(out + m * stride_out + L);
    }
  }
  for (int64_t r = 0; r < depth; ++r) {
    vec_t<T> c0 = load_vec(panel + r * 2 * L), c1 = load_vec(panel + r * 2 * L + L);
#pragma GCC unroll 12
    for (int m = 0; m < TILE_ROWS; ++m) {
      T value = x[m * stride_x + r];
      acc[m][0] += value * c0;
      acc[m][1] += value * c1;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < TILE_ROWS; ++m) {
    store_vec(out + m * stride_out, acc[m][0]);
    store_vec(out + m * stride_out + L, acc[m][1]);
  }
}

// rows × panels → out; rows is a multiple of TILE_ROWS, out has stride_out ≥ the panels' total width. between() is called
// before every tile: room to fetch what comes next while this computes.
template <typename T, typename Between>
void center_dots(const T* x, int64_t stride_x, int64_t rows, const T* panels, int64_t num_panels, int64_t R, T* out,
                 int64_t stride_out, Between&& between) {
  int64_t begin = 0;
  do {  // also for R = 0, which writes zeros
    int64_t depth = R - begin < DEPTH + DEPTH / 2 ? R - begin : DEPTH;
    for (int64_t j = 0; j < num_panels; ++j)
      for (int64_t p = 0; p < rows; p += TILE_ROWS) {
        between();
        dots_tile(x + p * stride_x + begin, stride_x, panels + (j * R + begin) * PANEL<T>, depth,
                  out + p * stride_out + j * PANEL<T>, stride_out, begin > 0);
      }
    begin += depth;
  } while (begin < R);
}

// Bit l is set where lane l of the comparison's result is true.
template <typename T, typename mask_t> GRADCLUST_INLINE uint32_t lane_bits(mask_t mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)mask);
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__) && GRADCLUST_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return uint32_t(_mm256_movemask_ps((__m256)mask));
  return uint32_t(_mm256_movemask_pd((__m256d)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES<T>; ++lane) bits |= (mask[lane] ? 1u : 0u) << lane;
  return bits;
#endif
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
