// scale · vectors Sᵀ, or scale · vectors S, with a random matrix of signs that is never stored, on CUDA devices.
//
// v1  A block multiplies 128 rows (32 where there are few tiles) with 64 outputs. Each of its threads makes the 128 bits
//     of one Philox counter, 512 columns of signs for the block in all, which wait in shared memory as bits; a lane spreads
//     what its fragment of ±1 needs, exact in bfloat16, just before the tensor cores take it. A float32 number is cut into
//     three bfloat16 numbers whose sum it is, so that every product is exact; sums over 128 columns in the tensor cores are
//     added up by ordinary additions. float64 takes the float64 tensor cores. Counted: about 2 instructions of the
//     generator a warp for every 24 tensor products of 128 rows. An output's order of additions depends on nothing but D:
//     the same bits in any batch. No atomics. Not measured yet.
// v1  With S [D, R] a thread's counter is a column of 128 outputs, of which the block has 64: tiles of 32 rows alone.
#include "sign_product.h"

#include <algorithm>

#include "common.cuh"
#include "philox.cuh"
#include "ptx.h"

namespace gradclust {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, OUTPUTS = 64, DEPTH = 32;
// Columns whose signs are made at a time, a counter a thread.
template <bool TRANSPOSED> constexpr int SEGMENT = TRANSPOSED ? THREADS : THREADS / OUTPUTS * 128;
constexpr int WORD_PITCH = SEGMENT<false> / 32 + 1;  // odd: lanes that read eight outputs' words meet eight banks
constexpr int WORDS = OUTPUTS * WORD_PITCH;          // room for either order
static_assert(WORDS >= 2 * SEGMENT<true>);
constexpr int LANES = DEPTH / 4;                  // threads side by side on a row
constexpr int FULL = 132;                         // blocks that fill a large device

// A tile of rows in shared memory: bfloat16 pieces or float64, rows that lanes of a fragment read without bank conflicts.
template <typename acc, int PIECES, int ROWS> struct Tile;
template <int PIECES, int ROWS> struct Tile<float, PIECES, ROWS> {
  static constexpr int PITCH = DEPTH + 8, BYTES = PIECES * ROWS * PITCH * 2;
  // The parts are cut off, not rounded, so that none overflows; only where fewer than three are asked the last is rounded.
  // A NaN that comes from the product with scale is a quiet one: its upper bits tell it from infinity.
  static __device__ void put(unsigned char* tile, int row, int column, const float (&value)[4]) {
    uint32_t part[PIECES][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float rest = value[j];
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        uint32_t bits = __float_as_uint(rest);
        bool finite = (bits & 0x7f800000u) != 0x7f800000u;
        if (p == PIECES - 1 && finite) bits += 0x7fffu + (bits >> 16 & 1);
        part[p][j] = bits >> 16;
        rest = finite ? rest - __uint_as_float(bits & 0xffff0000u) : 0.0f;
      }
    }
#pragma unroll
    for (int p = 0; p < PIECES; ++p)
      reinterpret_cast<uint2*>(tile)[((p * ROWS + row) * PITCH + column) / 4] =
          uint2{part[p][0] | part[p][1] << 16, part[p][2] | part[p][3] << 16};
  }
};
template <int PIECES, int ROWS> struct Tile<double, PIECES, ROWS> {
  static constexpr int PITCH = DEPTH + 4, BYTES = ROWS * PITCH * 8;
  static __device__ void put(unsigned char* tile, int row, int column, const double (&value)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) reinterpret_cast<double*>(tile)[row * PITCH + column + j] = value[j];
  }
};

// A lane's bits: of output 8 · n and column k on, or in S [D, R], where a column has two words, of its one output.
template <bool TRANSPOSED> struct Signs;
template <> struct Signs<false> {
  const uint32_t* words;  // from this lane's output of n = 0 and the depth's first column on
  __device__ Signs(const uint32_t* memory, int output, int column) : words(memory + output * WORD_PITCH + column / 32) {}
  __device__ uint32_t two(int n, int k) const { return words[8 * n * WORD_PITCH] >> k; }
};
template <> struct Signs<true> {
  const uint32_t* words;
  int bit;
  __device__ Signs(const uint32_t* memory, int output, int column)
      : words(memory + 2 * column + output / 32), bit(output % 32) {}
  __device__ uint32_t two(int, int k) const { return (words[2 * k] >> bit & 1) | (words[2 * k + 2] >> bit & 1) << 1; }
};

// Two signs as bfloat16 ±1 from the two lowest bits.
__device__ __forceinline__ unsigned pair_of_signs(uint32_t bits) {
  return 0x3f803f80u | (bits & 1) << 15 | (bits & 2) << 30;
}

// What a lane holds of its warp's 32 rows × 8 · BLOCKS outputs: rows 8 · e + lane / 4 for e < 4, outputs
// 8 · n + 2 · (lane % 4) and the next.
template <typename acc, int BLOCKS> struct Sums;
template <int BLOCKS> struct Sums<float, BLOCKS> {
  float part[2][BLOCKS][4];
  __device__ float at(int e, int n, int i) const { return part[e / 2][n][e % 2 * 2 + i]; }

  // += DEPTH columns of the warp's rows times the signs.
  template <int PIECES, int ROWS, bool TRANSPOSED>
  __device__ __forceinline__ void multiply(const unsigned char* tile, int row, const Signs<TRANSPOSED>& signs) {
    constexpr int PITCH = Tile<float, PIECES, ROWS>::PITCH;
    int lane = threadIdx.x % 32;
#pragma unroll 1  // both halves at once take more registers than two blocks leave
    for (int k = 0; k < DEPTH; k += 16) {
      unsigned b[BLOCKS][2];
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) {
        b[n][0] = pair_of_signs(signs.two(n, k + lane % 4 * 2));
        b[n][1] = pair_of_signs(signs.two(n, k + lane % 4 * 2 + 8));
      }
#pragma unroll
      for (int p = 0; p < PIECES; ++p)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const unsigned* x = reinterpret_cast<const unsigned*>(tile) +
                              ((p * ROWS + row + 16 * m + lane / 4) * PITCH + k) / 2 + lane % 4;
          unsigned a[4] = {x[0], x[4 * PITCH], x[4], x[4 * PITCH + 4]};
#pragma unroll
          for (int n = 0; n < BLOCKS; ++n) multiply_add(part[m][n], a, b[n][0], b[n][1], __nv_bfloat16{});
        }
    }
  }
};
template <int BLOCKS> struct Sums<double, BLOCKS> {
  double part[4][BLOCKS][2];
  __device__ double at(int e, int n, int i) const { return part[e][n][i]; }

  template <int PIECES, int ROWS, bool TRANSPOSED>
  __device__ __forceinline__ void multiply(const unsigned char* tile, int row, const Signs<TRANSPOSED>& signs) {
    constexpr int PITCH = Tile<double, PIECES, ROWS>::PITCH;
    int lane = threadIdx.x % 32;
    const double* x = reinterpret_cast<const double*>(tile) + (row + lane / 4) * PITCH + lane % 4;
#pragma unroll 2
    for (int k = 0; k < DEPTH; k += 4) {
      double b[BLOCKS];
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n) b[n] = signs.two(n, k + lane % 4) & 1 ? -1.0 : 1.0;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        double a = x[8 * m * PITCH + k];
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n) multiply_add(part[m][n], a, b[n]);
      }
    }
  }
};

// Four neighbouring columns a thread and quad, times scale; zeros outside of `rows` and `columns`. x: the thread's first.
template <typename in_t, int QUADS>
__device__ __forceinline__ void fetch(const in_t* __restrict__ x, int64_t stride, int rows, int columns, bool wide,
                                      acc_t<in_t> scale, acc_t<in_t> (&value)[QUADS][4]) {
  struct alignas(sizeof(in_t) < 4 ? 8 : 16) Four { in_t x[4]; };
  int row = threadIdx.x / LANES, column = threadIdx.x % LANES * 4;
#pragma unroll
  for (int q = 0; q < QUADS; ++q, row += THREADS / LANES, x += THREADS / LANES * stride) {
    Four four;
    bool whole = wide && row < rows && column + 4 <= columns;
    if (whole) four = *reinterpret_cast<const Four*>(x);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      value[q][j] = whole ? load(four.x[j]) * scale : row < rows && column + j < columns ? load(x[j]) * scale : acc_t<in_t>(0);
  }
}

// words [output, WORD_PITCH], or in S [D, R] [column, 2]: a thread a counter.
template <bool TRANSPOSED>
__device__ __forceinline__ void make_words(const SignFactors& f, int64_t output0, int64_t column0, uint32_t* words) {
  if constexpr (TRANSPOSED) {
    uint32_t column = uint32_t(column0) + threadIdx.x;  // past D nothing reads the words
    uint4 bits = philox4x32(uint4{uint32_t(output0 / 128), column, 0, 0}, f.key0, f.key1);
    bool late = output0 % 128;
    words[2 * threadIdx.x] = late ? bits.z : bits.x, words[2 * threadIdx.x + 1] = late ? bits.w : bits.y;
    return;
  }
  int output = threadIdx.x % OUTPUTS, place = threadIdx.x / OUTPUTS;
  if (column0 + 128 * place >= f.D) return;
  uint4 counter{uint32_t(column0 / 128 + place), uint32_t(output0 + output), 0, 0};
  uint4 bits = philox4x32(counter, f.key0, f.key1);
  uint32_t* to = words + output * WORD_PITCH + 4 * place;
  to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
}

// A block: 32 · ROW_WARPS rows and OUTPUTS outputs; blocks that share rows are neighbours. out [B, R].
template <typename in_t, int PIECES, int ROW_WARPS, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, sizeof(in_t) == 8 ? 1 : 2)
    sign_product_kernel(const __grid_constant__ SignFactors f, int64_t output_tiles, bool wide,
                        acc_t<in_t>* __restrict__ out) {
  using acc = acc_t<in_t>;
  constexpr int BLOCKS = OUTPUTS / 8 * ROW_WARPS / WARPS, ROWS = 32 * ROW_WARPS, QUADS = ROWS * DEPTH / 4 / THREADS;
  GRADCLUST_SHARED(memory);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
  unsigned char* tile = memory + WORDS * 4;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp % ROW_WARPS * 32, output = warp / ROW_WARPS * 8 * BLOCKS;
  int64_t row0 = blockIdx.x / output_tiles * ROWS, output0 = blockIdx.x % output_tiles * OUTPUTS;
  
  acc value[QUADS][4], total[4][BLOCKS][2] = {};
  Sums<acc, BLOCKS> sums = {};
  auto add_up = [&] {
#pragma unroll
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) total[e][n][i] += sums.at(e, n, i);
    sums = {};
  };
  int rows = int(min(f.B - row0, int64_t(ROWS)));
  bool live = row < rows;  // whether the warp has any
  const in_t* x = static_cast<const in_t*>(f.vectors) + (row0 + threadIdx.x / LANES) * f.stride + threadIdx.x % LANES * 4;
  auto next = [&](int64_t column) {
    fetch(x + column, f.stride, rows, int(min(f.D - column, int64_t(DEPTH))), wide, acc(f.scale), value);
  };
  next(0);
  for (int64_t column = 0; column < f.D; column += DEPTH) {
    __syncthreads();  // the product before has read the tile and the words
    if (column % SEGMENT<TRANSPOSED> == 0) make_words<TRANSPOSED>(f, output0, column, words);
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
      Tile<acc, PIECES, ROWS>::put(tile, (q * THREADS + int(threadIdx.x)) / LANES, threadIdx.x % LANES * 4, value[q]);
    __syncthreads();
    if (column + DEPTH < f.D) next(column + DEPTH);
    if (!live) continue;
    Signs<TRANSPOSED> signs(words, output + lane / 4, int(column % SEGMENT<TRANSPOSED>));
    sums.template multiply<PIECES, ROWS>(tile, row, signs);
    if (sizeof(acc) == 4 && column % 128 == 128 - DEPTH) add_up();
  }
  if (!live) return;
  add_up();
#pragma unroll
  for (int e = 0; e < 4; ++e)
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int64_t b = row0 + row + 8 * e + lane / 4, r = output0 + output + 8 * n + lane % 4 * 2 + i;
        if (b < f.B && r < f.R) out[b * f.R + r] = total[e][n][i];
      }
}

template <typename in_t, int PIECES, int ROW_WARPS, bool TRANSPOSED>
const char* run(const SignFactors& f, const char* sizes, acc_t<in_t>* out, void* stream) {
  constexpr int ROWS = 32 * ROW_WARPS;
  int64_t row_tiles = (f.B + ROWS - 1) / ROWS, output_tiles = (f.R + OUTPUTS - 1) / OUTPUTS;
  constexpr int ALIGNMENT = sizeof(in_t) < 4 ? 8 : 16;
  bool wide = reinterpret_cast<uintptr_t>(f.vectors) % ALIGNMENT == 0 && f.stride * sizeof(in_t) % ALIGNMENT == 0;
  return launch("sign_product_kernel", sizes, sign_product_kernel<in_t, PIECES, ROW_WARPS, TRANSPOSED>,
                unsigned(row_tiles * output_tiles), THREADS,
                WORDS * 4 + Tile<acc_t<in_t>, PIECES, ROWS>::BYTES, stream, f, output_tiles, wide, out);
}

template <typename in_t, int PIECES>
const char* run(const SignFactors& f, const char* sizes, acc_t<in_t>* out, void* stream) {
  bool many = f.B > 64 && (f.B + 127) / 128 * ((f.R + OUTPUTS - 1) / OUTPUTS) >= FULL;
  if (f.transposed) return run<in_t, PIECES, 1, true>(f, sizes, out, stream);
  return many ? run<in_t, PIECES, 4, false>(f, sizes, out, stream) : run<in_t, PIECES, 1, false>(f, sizes, out, stream);
}

}  // namespace

const char* sign_product_cuda(const SignFactors& f, int pieces, void* out, void* stream) {
  char sizes[96];
  snprintf(sizes, sizeof sizes, "B=%lld, D=%lld, R=%lld", (long long)f.B, (long long)f.D, (long long)f.R);
  const char* error = nullptr;
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    auto* to = static_cast<acc_t<in_t>*>(out);
    if constexpr (sizeof(in_t) == 4)
      error = pieces == 1   ? run<in_t, 1>(f, sizes, to, stream)
              : pieces == 2 ? run<in_t, 2>(f, sizes, to, stream)
                            : run<in_t, 3>(f, sizes, to, stream);
    else
      error = run<in_t, 3>(f, sizes, to, stream);
  });
  return error;
}

}  // namespace gradclust
