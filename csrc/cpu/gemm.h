// A small packed matrix product for kernels that fuse something into it: tiles stay in registers, panels in cache.
//
// How to use it. C [M, N] = Aᵀ-or-A times B over a depth, in three steps:
//  1. Pack B's N columns into panels (`pack_columns` from [depth, N] memory, `pack_rows` from [N, depth] memory; the
//     latter transposes). `Panels` says how N is cut: panels of NV·LANES columns, the last one narrower, widths
//     multiples of LANES, zero-filled. A panel that begins at column j begins at `packed + j * depth`, and its row k at
//     `+ k * width`.
//  2. Give A as an accessor of MR rows: `PackedRows{panel + i, width}` reads a packed panel (so one packed copy serves
//     both sides of a symmetric product: MR divides LANES), `RowPointers` reads MR rows of row-major memory as they
//     are, without packing (float32 and float64 only; half types convert first, `convert`).
//  3. `tile_product<acc>(width, depth, a, b, b_stride, c, c_stride, accumulate)` computes MR × width entries of C,
//     c[i * c_stride + j] (+)= Σ_k a(i, k) · b[k * b_stride + j], and stores whole tiles: give it padded scratch. Cut a
//     long depth into blocks of DEPTH and accumulate, so that a block of B stays in the L1 cache.
// Half types become float32 when packed or converted; bf16 may instead stay as it is, two neighbours of a row in one
// element (`bf16_pair`), which processors with AVX-512 BF16 multiply in one instruction. Scratch memory is one growing
// buffer per thread (`Scratch`).
//
// v1  MR × 3 vectors (8 × 48 AVX-512, 4 × 24 AVX2 in float32): twelve or more accumulators hide the FMA latency, and MR
//     divides the panel width, so Gram matrices pack once.
// v2  Packing keeps its piece of a panel in the L1 cache; panels one vector wide take eight rows at a time. With the sums
//     of sqnorm.h in long pieces of rows: 10 to 25 % off grad_sqnorm (bench/kernels/bench_grad_sqnorm.py).
#pragma once
#include <cstdio>
#include <cstdlib>

#include "isa.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

GRADCLUST_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
GRADCLUST_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a register tile, and the most vectors in one of its rows.
#if GRADCLUST_VECTOR_BYTES == 64
template <typename acc> constexpr int MR = 8;
constexpr int NV = 3;
#elif GRADCLUST_VECTOR_BYTES == 32
template <typename acc> constexpr int MR = 4;
constexpr int NV = 3;
#else
template <typename acc> constexpr int MR = LANES<acc>;  // 16 registers, and a product needs one of its own
constexpr int NV = 2;
#endif
template <typename acc> constexpr int NR = NV * LANES<acc>;
constexpr int64_t DEPTH = 256;  // a panel's block takes 24 KB

// One buffer per thread, kept between calls: fresh pages cost more than most kernels.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
  // Room for n elements; what an earlier call left there is lost.
  template <typename T> T* get(int64_t n) {
    size_t bytes = (size_t(n > 0 ? n : 1) * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size) {
      free(memory);
      size = bytes + bytes / 4 / 4096 * 4096;
      memory = aligned_alloc(4096, size);
      if (!memory) {
        fprintf(stderr, "gradclust_fast: out of memory for %zu bytes of scratch\n", size);
        abort();  // inside a parallel region nothing can be thrown
      }
    }
    return static_cast<T*>(memory);
  }
};

// How N columns are cut into panels.
template <typename acc> struct Panels {
  int64_t columns;
  int64_t padded() const { return round_up(columns, LANES<acc>); }
  int64_t width(int64_t begin) const { return min_of(NR<acc>, padded() - begin); }  // of the panel at `begin`
};

// --- conversion to the accumulator's type

template <typename in_t> GRADCLUST_INLINE void convert(const in_t* src, acc_t<in_t>* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = load(src[i]);
}
#if defined(__F16C__)
template <> inline __attribute__((always_inline)) void convert<f16_t>(const f16_t* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
  for (; i < n; ++i) dst[i] = load(src[i]);
}
#endif

// One vector of accumulators from memory of the factors' type.
template <typename in_t> GRADCLUST_INLINE vec_t<acc_t<in_t>> load_converted(const in_t* p) {
  acc_t<in_t> buffer[LANES<acc_t<in_t>>];
  convert(p, buffer, LANES<acc_t<in_t>>);
  return load_vec(buffer);
}
template <> inline __attribute__((always_inline)) vec_t<float> load_converted<float>(const float* p) {
  return load_vec(p);
}
template <> inline __attribute__((always_inline)) vec_t<double> load_converted<double>(const double* p) {
  return load_vec(p);
}

// --- packing

// One panel from [depth, columns] memory: dst[k * width + j] = src[k * stride + j] − shift[j], zero from `columns` on;
// shift may be null.
template <typename in_t>
void pack_columns(acc_t<in_t>* dst, int64_t width, const in_t* src, int64_t stride, int64_t depth, int64_t columns,
                  const acc_t<in_t>* shift = nullptr) {
  using acc = acc_t<in_t>;
  if (columns == NR<acc>) {  // most panels: whole vectors, the shift in registers
    vec_t<acc> off[NV];
    for (int v = 0; v < NV; ++v) off[v] = shift ? load_vec(shift + v * LANES<acc>) : vec_t<acc>{};
    for (int64_t k = 0; k < depth; ++k, dst += NR<acc>, src += stride)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        store_vec(dst + v * LANES<acc>, load_converted(src + v * LANES<acc>) - off[v]);
    return;
  }
  for (int64_t k = 0; k < depth; ++k, dst += width, src += stride) {
    convert(src, dst, columns);
    if (shift)
      for (int64_t j = 0; j < columns; ++j) dst[j] -= shift[j];
    for (int64_t j = columns; j < width; ++j) dst[j] = 0;
  }
}

// 4 × 4 elements of [rows, depth] memory turned, shift[0..3] taken off each row; 128-bit shuffles exist everywhere.
template <bool SHIFT>
GRADCLUST_INLINE void transpose_4x4(float* dst, int64_t width, const float* src, int64_t stride, const float* shift) {
  typedef float vec __attribute__((vector_size(16)));
  typedef float loose __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int mask __attribute__((vector_size(16)));
  vec a = *(const loose*)(src), b = *(const loose*)(src + stride), c = *(const loose*)(src + 2 * stride),
      d = *(const loose*)(src + 3 * stride);
  if (SHIFT) {
    vec off = *(const loose*)shift;
    a -= off, b -= off, c -= off, d -= off;
  }
  vec ab_low = __builtin_shuffle(a, b, mask{0, 4, 1, 5}), ab_high = __builtin_shuffle(a, b, mask{2, 6, 3, 7});
  vec cd_low = __builtin_shuffle(c, d, mask{0, 4, 1, 5}), cd_high = __builtin_shuffle(c, d, mask{2, 6, 3, 7});
  *(loose*)(dst) = __builtin_shuffle(ab_low, cd_low, mask{0, 1, 4, 5});
  *(loose*)(dst + width) = __builtin_shuffle(ab_low, cd_low, mask{2, 3, 6, 7});
  *(loose*)(dst + 2 * width) = __builtin_shuffle(ab_high, cd_high, mask{0, 1, 4, 5});
  *(loose*)(dst + 3 * width) = __builtin_shuffle(ab_high, cd_high, mask{2, 3, 6, 7});
}
template <bool SHIFT>
GRADCLUST_INLINE void transpose_4x4(double* dst, int64_t width, const double* src, int64_t stride,
                                    const double* shift) {
  for (int j = 0; j < 4; ++j)
    for (int k = 0; k < 4; ++k) dst[k * width + j] = src[j * stride + k] - (SHIFT ? shift[k] : 0);
}

// Up to four rows of one panel, from memory of the accumulator's type.
template <typename acc>
void pack_four_rows(acc* dst, int64_t width, const acc* src, int64_t stride, int64_t depth, int64_t rows,
                    const acc* shift) {
  int64_t k = 0;
  if (rows == 4 && shift)
    for (; k + 4 <= depth; k += 4) transpose_4x4<true>(dst + k * width, width, src + k, stride, shift + k);
  else if (rows == 4)
    for (; k + 4 <= depth; k += 4) transpose_4x4<false>(dst + k * width, width, src + k, stride, shift);
  for (; k < depth; ++k)
    for (int64_t i = 0; i < rows; ++i) dst[k * width + i] = src[i * stride + k] - (shift ? shift[k] : 0);
}
GRADCLUST_INLINE const float* as_accumulator(const float* p) { return p; }
GRADCLUST_INLINE const double* as_accumulator(const double* p) { return p; }
template <typename in_t> GRADCLUST_INLINE const acc_t<in_t>* as_accumulator(const in_t*) { return nullptr; }

// One panel from [rows, depth] memory: dst[k * width + j] = src[j * stride + k] − shift[k], zero from `rows` on; shift
// may be null. Half types convert on the way, in a buffer of four rows.
template <typename in_t>
void pack_rows(acc_t<in_t>* dst, int64_t width, const in_t* src, int64_t stride, int64_t depth, int64_t rows,
               const acc_t<in_t>* shift = nullptr) {
  using acc = acc_t<in_t>;
  if (rows < width)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = rows; j < width; ++j) dst[k * width + j] = 0;
  constexpr int64_t CHUNK = 256;  // so much of a panel stays in the L1 cache while four rows after four rows go into it
  acc buffer[4 * CHUNK];
  for (int64_t k = 0; k < depth; k += CHUNK) {
    const int64_t n = min_of(CHUNK, depth - k);
    for (int64_t j = 0; j < rows; j += 4) {
      const int64_t four = min_of(4, rows - j);
      const acc* from = as_accumulator(src + j * stride + k);
      int64_t step = stride;
      if (!from) {
        for (int64_t i = 0; i < four; ++i) convert(src + (j + i) * stride + k, buffer + i * CHUNK, n);
        from = buffer, step = CHUNK;
      }
      pack_four_rows(dst + k * width + j, width, from, step, n, four, shift ? shift + k : nullptr);
    }
  }
}

// The same for bf16 left as it is: element k of a packed row holds numbers 2k and 2k + 1; an odd depth ends with a zero.
inline void pack_rows(bf16_pair* dst, int64_t width, const bf16_t* src, int64_t stride, int64_t depth, int64_t rows) {
  float* to = reinterpret_cast<float*>(dst);  // only moved
  const int64_t pairs = depth / 2;
  constexpr int64_t CHUNK = 256;
  float buffer[4 * CHUNK];
  if (rows < width) memset(static_cast<void*>(dst), 0, size_t((pairs + depth % 2) * width) * sizeof(bf16_pair));
  for (int64_t k = 0; k < pairs; k += CHUNK) {
    const int64_t n = min_of(CHUNK, pairs - k);
    for (int64_t j = 0; j < rows; j += 4) {
      const int64_t four = min_of(4, rows - j);
      for (int64_t i = 0; i < four; ++i)
        memcpy(buffer + i * CHUNK, src + (j + i) * stride + 2 * k, size_t(n) * sizeof(bf16_pair));
      pack_four_rows<float>(to + k * width + j, width, buffer, CHUNK, n, four, nullptr);
    }
  }
  if (depth % 2)
    for (int64_t j = 0; j < rows; ++j) dst[pairs * width + j].bits = src[j * stride + depth - 1].bits;
}

// --- the product

// How a tile multiplies an element of A with a vector of B, in STEPS passes over the tile.
struct ByFma {
  static constexpr int STEPS = 1;
  template <typename V> GRADCLUST_INLINE_MEMBER V column(V b, int) { return b; }
  template <typename T> GRADCLUST_INLINE_MEMBER T row(T a, int) { return a; }
  template <typename V, typename T> GRADCLUST_INLINE_MEMBER void add(V& sum, V b, T a) { sum += b * a; }
};
// Pairs without an instruction for them: all low halves, then all high halves.
struct ByHalves {
  static constexpr int STEPS = 2;
  GRADCLUST_INLINE_MEMBER vec_t<float> column(vec_t<bf16_pair> b, int half) {
    return (vec_t<float>)(half ? b & 0xffff0000u : b << 16);
  }
  GRADCLUST_INLINE_MEMBER vec_t<float> row(bf16_pair a, int half) { return column(vec_t<bf16_pair>{} + a.bits, half); }
  GRADCLUST_INLINE_MEMBER void add(vec_t<float>& sum, vec_t<float> b, vec_t<float> a) { sum += b * a; }
};
#if defined(GRADCLUST_ASSEMBLES_BF16) && defined(__AVX512F__)
struct ByDots {
  static constexpr int STEPS = 1;
  GRADCLUST_INLINE_MEMBER vec_t<bf16_pair> column(vec_t<bf16_pair> b, int) { return b; }
  GRADCLUST_INLINE_MEMBER vec_t<bf16_pair> row(bf16_pair a, int) { return vec_t<bf16_pair>{} + a.bits; }
  GRADCLUST_INLINE_MEMBER void add(vec_t<float>& sum, vec_t<bf16_pair> b, vec_t<bf16_pair> a) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));  // the rest of this file needs no AVX-512 BF16
  }
};
inline bool bf16_dots() { return __builtin_cpu_supports("avx512bf16"); }
#else
using ByDots = ByHalves;
constexpr bool bf16_dots() { return false; }
#endif

// MR neighbouring rows inside a packed panel: p = panel + first row, stride = the panel's width.
template <typename acc> struct PackedRows {
  const acc* p;
  int64_t stride;
  __attribute__((always_inline)) acc operator()(int i, int64_t k) const { return p[k * stride + i]; }
};

// MR rows of row-major memory; repeat a pointer where rows run out.
template <typename acc> struct RowPointers {
  const acc* p[MR<acc>];
  __attribute__((always_inline)) acc operator()(int i, int64_t k) const { return p[i][k]; }
};

template <typename How, int V, int M, typename T, typename A>
__attribute__((noinline)) void tile_product_kernel(int64_t depth, A a, const T* b, int64_t b_stride, acc_t<T>* c,
                                                   int64_t c_stride, bool accumulate) {
  using acc = acc_t<T>;
  constexpr int L = LANES<acc>;
  vec_t<acc> sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[i][v] = accumulate ? load_vec(c + i * c_stride + v * L) : vec_t<acc>{};
  for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 2
    for (int step = 0; step < How::STEPS; ++step) {
      decltype(How::column(vec_t<T>{}, step)) column[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) column[v] = How::column(load_vec(b + k * b_stride + v * L), step);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        auto x = How::row(a(i, k), step);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) How::add(sum[i][v], column[v], x);
      }
    }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store_vec(c + i * c_stride + v * L, sum[i][v]);
}

// The kernel for this element type and this processor.
template <int V, int M, typename T, typename A>
GRADCLUST_INLINE void tile_product_of(int64_t depth, const A& a, const T* b, int64_t b_stride, acc_t<T>* c,
                                      int64_t c_stride, bool accumulate) {
  if constexpr (Same<T, bf16_pair>) {
    if (bf16_dots()) return tile_product_kernel<ByDots, V, M>(depth, a, b, b_stride, c, c_stride, accumulate);
    tile_product_kernel<ByHalves, V, M>(depth, a, b, b_stride, c, c_stride, accumulate);
  } else {
    tile_product_kernel<ByFma, V, M>(depth, a, b, b_stride, c, c_stride, accumulate);
  }
}

// c[i, j] (+)= Σ_k a(i, k) b[k, j] for MR rows and `width` columns, a multiple of LANES and at most NR.
template <typename T, typename A>
GRADCLUST_INLINE void tile_product(int64_t width, int64_t depth, const A& a, const T* b, int64_t b_stride, acc_t<T>* c,
                                   int64_t c_stride, bool accumulate) {
  constexpr int L = LANES<T>, M = MR<T>;
  if (NV >= 3 && width == 3 * L)
    tile_product_of<NV, M>(depth, a, b, b_stride, c, c_stride, accumulate);
  else if (width == 2 * L)
    tile_product_of<2, M>(depth, a, b, b_stride, c, c_stride, accumulate);
  else
    tile_product_of<1, M>(depth, a, b, b_stride, c, c_stride, accumulate);
}

// A packed matrix [columns, depth]: panels one after the other, as `pack_rows` and `pack_columns` write them.
template <typename T> struct Packed {
  const T* data;
  int64_t columns, depth;
  int64_t padded() const { return round_up(columns, LANES<T>); }
  int64_t width(int64_t begin) const { return Panels<T>{columns}.width(begin); }
  // MR rows of the transposed matrix from depth k0 on; row is a multiple of MR.
  PackedRows<T> rows(int64_t row, int64_t k0) const {
    int64_t begin = row / NR<T> * NR<T>, stride = width(begin);
    return {data + begin * depth + k0 * stride + (row - begin), stride};
  }
};

// All panels of src [rows, depth] (row-major) or, for columns, [depth, columns].
template <typename in_t>
Packed<acc_t<in_t>> pack_all_rows(acc_t<in_t>* dst, const in_t* src, int64_t stride, int64_t depth, int64_t rows,
                                  const acc_t<in_t>* shift = nullptr) {
  Packed<acc_t<in_t>> packed{dst, rows, depth};
  for (int64_t j = 0; j < rows; j += NR<acc_t<in_t>>) {
    int64_t width = packed.width(j);
    pack_rows(dst + j * depth, width, src + j * stride, stride, depth, min_of(width, rows - j), shift);
  }
  return packed;
}
inline Packed<bf16_pair> pack_all_rows(bf16_pair* dst, const bf16_t* src, int64_t stride, int64_t depth, int64_t rows) {
  Packed<bf16_pair> packed{dst, rows, (depth + 1) / 2};
  for (int64_t j = 0; j < rows; j += NR<bf16_pair>) {
    int64_t width = packed.width(j);
    pack_rows(dst + j * packed.depth, width, src + j * stride, stride, depth, min_of(width, rows - j));
  }
  return packed;
}
template <typename in_t>
Packed<acc_t<in_t>> pack_all_columns(acc_t<in_t>* dst, const in_t* src, int64_t stride, int64_t depth, int64_t columns,
                                     const acc_t<in_t>* shift = nullptr) {
  Packed<acc_t<in_t>> packed{dst, columns, depth};
  for (int64_t j = 0; j < columns; j += NR<acc_t<in_t>>) {
    int64_t width = packed.width(j);
    pack_columns(dst + j * depth, width, src + j, stride, depth, min_of(width, columns - j), shift ? shift + j : nullptr);
  }
  return packed;
}

// c [row_end − row_begin, width] = rows row_begin.. of `a` times the panel of `b` that begins at column `begin`, over
// their common depth. row_begin is a multiple of MR; row_end is rounded up to one, so c must have room. With LOWER, for
// the triangle of a product of a matrix with itself from the diagonal down (row_begin = begin), entries right of the
// diagonal may be left unwritten. With accumulate, the product is added to c.
template <bool LOWER = false, typename T>
void strip_product(const Packed<T>& a, int64_t row_begin, int64_t row_end, const Packed<T>& b, int64_t begin,
                   acc_t<T>* c, bool accumulate = false) {
  int64_t width = b.width(begin), k0 = 0;
  do {
    int64_t n = min_of(DEPTH, b.depth - k0);
    const T* panel = b.data + begin * b.depth + k0 * width;
    constexpr int64_t M = MR<T>, L = LANES<T>;
    for (int64_t row = row_begin; row < row_end; row += M) {
      auto reach = [&](int64_t rows) { return LOWER ? min_of(width, round_up(row - row_begin + rows, L)) : width; };
      acc_t<T>* to = c + (row - row_begin) * width;
      const int64_t begins = row / NR<T> * NR<T>;  // the panel that the rows are in
      if (M == 4 && reach(8) == L && row + 8 <= row_end && row + 8 <= begins + a.width(begins)) {
        // One vector a row: four rows would wait for their additions.
        tile_product_of<1, 8>(n, a.rows(row, k0), panel, width, to, width, accumulate || k0 > 0);
        row += M;
      } else {
        tile_product<T>(reach(M), n, a.rows(row, k0), panel, width, to, width, accumulate || k0 > 0);
      }
    }
    k0 += DEPTH;
  } while (k0 < b.depth);
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
