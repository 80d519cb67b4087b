// Tiles of a convolution's per-example gradients: up to 64 output channels × 24 octets of columns, summed over all
// positions by implicit im2col. An octet is 8 channels at one kernel element; nothing is unfolded in memory.
//
// A chunk is a run of output positions: its gradients [positions, channels] and, for each output row, the segment of the
// image row that one row of kernel elements meets [pixels, channels] lie in shared memory, and kernel elements of the
// same row share the segment. A pixel's channels are contiguous there, so a position's patch is just an address, and
// stride, dilation and padding cost nothing in the product. Two chunks take turns: one is fetched during the other's
// product.
#pragma once
#include <algorithm>
#include <cstring>

#include "common.cuh"
#include "ptx.h"

namespace gradclust {

constexpr int TILE_THREADS = 128, TILE_WARPS = TILE_THREADS / 32;

struct ConvTiles {
  ConvFactors f;
  int C, O;                              // channels of one group
  int octets, channels, taps;            // of a tile: octets a kernel element, channels (8 · octets), elements of a kernel row
  int tile_rows;                         // output channels of a tile
  int channel_tiles, row_tiles, tap_tiles, tiles;  // tiles: of one example
  int rows, width, pieces, chunks;       // output rows of a chunk, positions taken of each, pieces a row, chunks in all
  int pixels, pixel_step;                // of a segment; image columns from one pixel to the next
  int position_step, tap_step;           // pixels from one position, or kernel element, to the next
  int capacity, pitch_x, pitch_d;        // positions in shared memory; elements from one pixel, or position, to the next
  int stages;
  int64_t stage_bytes;
  bool wide_x, wide_d;                   // 16-byte copies: channels are contiguous and aligned
  Divisor by_width, by_out_y, by_pixels, by_capacity, by_segments, by_x_vectors, by_d_vectors;
};

// What a block knows about its tile.
struct TileOrigin {
  int64_t b;
  int group, o0, c0, kz, ky, kx0;
  int O, C, taps, octets, columns;  // how much of the tile is there; columns counts octets
};

__device__ inline TileOrigin tile_origin(const ConvTiles& p, int64_t b, int tile) {
  TileOrigin t;
  t.b = b;
  int rest = tile;
  t.kx0 = rest % p.tap_tiles * p.taps, rest /= p.tap_tiles;
  t.ky = rest % int(p.f.kernel[1]), rest /= int(p.f.kernel[1]);
  t.kz = rest % int(p.f.kernel[0]), rest /= int(p.f.kernel[0]);
  t.c0 = rest % p.channel_tiles * p.channels, rest /= p.channel_tiles;
  t.o0 = rest % p.row_tiles * p.tile_rows;
  t.group = rest / p.row_tiles;
  t.O = min(p.tile_rows, p.O - t.o0);
  t.C = min(p.channels, p.C - t.c0);
  t.taps = min(p.taps, int(p.f.kernel[2]) - t.kx0);
  t.octets = (t.C + 7) / 8;
  t.columns = t.taps * t.octets;
  return t;
}

// A chunk: output rows q0 … of the example, from column x0 on.
struct Chunk { int q0, x0, rows, width; };

__device__ inline Chunk chunk_at(const ConvTiles& p, int index) {
  Chunk c;
  c.q0 = p.pieces > 1 ? index / p.pieces : index * p.rows;
  c.x0 = p.pieces > 1 ? index % p.pieces * p.width : 0;
  c.rows = min(p.rows, int(p.f.out[0] * p.f.out[1]) - c.q0);
  c.width = min(p.width, int(p.f.out[2]) - c.x0);
  return c;
}

template <typename in_t> __device__ in_t zero_of() {
  if constexpr (sizeof(in_t) == 2) {
    uint16_t bits = 0;
    in_t x;
    memcpy(&x, &bits, 2);
    return x;
  } else {
    return in_t(0);
  }
}

// The address of channel `channel` of grad at position k of the chunk, or nullptr past the chunk's end.
template <typename in_t>
__device__ const in_t* grad_at(const ConvTiles& p, const TileOrigin& t, const Chunk& c, int k) {
  int r = p.by_width.quotient(k), x = k - r * p.width;
  if (r >= c.rows || x >= c.width) return nullptr;
  int q = c.q0 + r, z = p.by_out_y.quotient(q), y = q - z * int(p.f.out[1]);
  return static_cast<const in_t*>(p.f.grad) + t.b * p.f.grad_stride[0] +
         (int64_t(t.group) * p.O + t.o0) * p.f.grad_stride[1] + z * p.f.grad_stride[2] + y * p.f.grad_stride[3] +
         (c.x0 + x) * p.f.grad_stride[4];
}

// The address of the image at pixel i of the chunk's segments, or nullptr outside of the image.
template <typename in_t>
__device__ const in_t* act_at(const ConvTiles& p, const TileOrigin& t, const Chunk& c, int i) {
  int r = p.by_pixels.quotient(i), u = i - r * p.pixels;
  if (r >= c.rows) return nullptr;
  int q = c.q0 + r, z = p.by_out_y.quotient(q), y = q - z * int(p.f.out[1]);
  int64_t iz = z * p.f.stride[0] + t.kz * p.f.dilation[0] - p.f.pad[0];
  int64_t iy = y * p.f.stride[1] + t.ky * p.f.dilation[1] - p.f.pad[1];
  int64_t ix = c.x0 * p.f.stride[2] + t.kx0 * p.f.dilation[2] - p.f.pad[2] + int64_t(u) * p.pixel_step;
  if (iz < 0 || iz >= p.f.size[0] || iy < 0 || iy >= p.f.size[1] || ix < 0 || ix >= p.f.size[2]) return nullptr;
  return static_cast<const in_t*>(p.f.act) + t.b * p.f.act_stride[0] +
         (int64_t(t.group) * p.C + t.c0) * p.f.act_stride[1] + iz * p.f.act_stride[2] + iy * p.f.act_stride[3] +
         ix * p.f.act_stride[4];
}

// Fetches one chunk; output channels past t.O are zeros.
template <typename in_t>
__device__ void fetch_chunk(const ConvTiles& p, const TileOrigin& t, const Chunk& c, in_t* stage) {
  constexpr int WIDTH = 16 / sizeof(in_t);
  in_t *d = stage, *x = stage + p.capacity * p.pitch_d;
  int segments = p.rows * p.pixels;
  if (p.wide_d) {
    int vectors = p.tile_rows / WIDTH;
    for (int i = threadIdx.x; i < p.capacity * vectors; i += TILE_THREADS) {
      int k = p.by_d_vectors.quotient(i), v = i - k * vectors;
      const in_t* from = grad_at<in_t>(p, t, c, k);
      int there = from ? max(0, min(WIDTH, t.O - v * WIDTH)) : 0;
      copy_16(d + k * p.pitch_d + v * WIDTH, there ? from + v * WIDTH : p.f.grad, there * int(sizeof(in_t)));
    }
  } else {
    for (int i = threadIdx.x; i < p.capacity * p.tile_rows; i += TILE_THREADS) {
      int o = p.by_capacity.quotient(i), k = i - o * p.capacity;
      const in_t* from = o < t.O ? grad_at<in_t>(p, t, c, k) : nullptr;
      d[k * p.pitch_d + o] = from ? from[o * p.f.grad_stride[1]] : zero_of<in_t>();
    }
  }
  if (p.wide_x) {
    int vectors = p.channels / WIDTH;
    for (int i = threadIdx.x; i < segments * vectors; i += TILE_THREADS) {
      int u = p.by_x_vectors.quotient(i), v = i - u * vectors;
      const in_t* from = act_at<in_t>(p, t, c, u);
      int there = from ? max(0, min(WIDTH, t.C - v * WIDTH)) : 0;
      copy_16(x + u * p.pitch_x + v * WIDTH, there ? from + v * WIDTH : p.f.act, there * int(sizeof(in_t)));
    }
  } else {
    for (int i = threadIdx.x; i < segments * p.channels; i += TILE_THREADS) {
      int channel = p.by_segments.quotient(i), u = i - channel * segments;
      const in_t* from = channel < t.C ? act_at<in_t>(p, t, c, u) : nullptr;
      x[u * p.pitch_x + channel] = from ? from[channel * p.f.act_stride[1]] : zero_of<in_t>();
    }
  }
  commit_copies();
}

// Columns as a warp holds them: pairs of octets warp, warp + 4, … of the tile.
constexpr int PAIRS = 3;
template <int BLOCKS> using TensorSums = float[BLOCKS][PAIRS][2][4];

// The pixel of position k, relative to kernel element 0. Positions past the end meet zeros of grad; they read pixel 0,
// which a position of the chunk meets, so that nothing unwritten is multiplied.
__device__ inline int pixel_of(const ConvTiles& p, int k, int positions) {
  if (k >= positions) return 0;
  int r = p.by_width.quotient(k);
  return r * p.pixels + (k - r * p.width) * p.position_step;
}

__device__ inline int column_offset(const ConvTiles& p, const TileOrigin& t, int octet) {
  int tap = octet / t.octets;
  return tap * p.tap_step * p.pitch_x + (octet - tap * t.octets) * 8;
}

// sums += gradᵀ · patches over one chunk; 16 · BLOCKS output channels. 16-bit factors.
template <typename in_t, int BLOCKS>
__device__ __forceinline__ void multiply_chunk(const ConvTiles& p, const Chunk& c, const in_t* stage, int pairs, const int (&offset)[PAIRS],
                               TensorSums<BLOCKS>& sums) {
  const in_t *d = stage, *x = stage + p.capacity * p.pitch_d;
  int lane = threadIdx.x % 32, positions = c.rows * c.width;
  for (int k0 = 0; k0 < positions; k0 += 16) {
    const in_t* pixel = x + pixel_of(p, k0 + lane % 16, positions) * p.pitch_x;
    const in_t* row = d + (k0 + lane / 16 * 8 + lane % 8) * p.pitch_d + lane / 8 % 2 * 8;
    unsigned a[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) load_transposed(a[m], row + 16 * m);
#pragma unroll
    for (int s = 0; s < PAIRS; ++s) {
      if (s >= pairs) break;
      unsigned b[4];
      load_transposed(b, pixel + offset[s]);
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
        multiply_add(sums[m][s][0], a[m], b[0], b[1], in_t{});
        multiply_add(sums[m][s][1], a[m], b[2], b[3], in_t{});
      }
    }
  }
}

// The same for float32 factors rounded to tf32.
template <int BLOCKS>
__device__ __forceinline__ void multiply_chunk(const ConvTiles& p, const Chunk& c, const float* stage, int pairs,
                               const int (&offset)[PAIRS][2], TensorSums<BLOCKS>& sums) {
  const float *d = stage, *x = stage + p.capacity * p.pitch_d;
  int lane = threadIdx.x % 32, positions = c.rows * c.width;
  for (int k0 = 0; k0 < positions; k0 += 8) {
    int k = k0 + lane % 4;
    const float* early = x + pixel_of(p, k, positions) * p.pitch_x + lane / 4;
    const float* late = x + pixel_of(p, k + 4, positions) * p.pitch_x + lane / 4;
    const float* row = d + k * p.pitch_d + lane / 4;
    unsigned a[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = round_to_tf32(row[i / 2 * 4 * p.pitch_d + 16 * m + i % 2 * 8]);
#pragma unroll
    for (int s = 0; s < PAIRS; ++s) {
      if (s >= pairs) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        unsigned b0 = round_to_tf32(early[offset[s][h]]), b1 = round_to_tf32(late[offset[s][h]]);
#pragma unroll
        for (int m = 0; m < BLOCKS; ++m) multiply_add(sums[m][s][h], a[m], b0, b1, float{});
      }
    }
  }
}

// Columns as a thread holds them without tensor cores: ROWS output channels × 3 vectors of 16 bytes.
template <typename acc> constexpr int VECTOR = 16 / int(sizeof(acc));
template <typename acc, int ROWS> using ScalarSums = acc[ROWS][PAIRS][VECTOR<acc>];

template <typename acc, int ROWS>
__device__ __forceinline__ void multiply_chunk(const ConvTiles& p, const Chunk& c, const acc* stage, const int (&offset)[PAIRS],
                               ScalarSums<acc, ROWS>& sums) {
  struct alignas(16) Vector { acc value[VECTOR<acc>]; };
  const acc *d = stage + threadIdx.x / 16 * ROWS, *x = stage + p.capacity * p.pitch_d;
  for (int r = 0; r < c.rows; ++r) {
    const acc *row = d + r * p.width * p.pitch_d, *pixel = x + r * p.pixels * p.pitch_x;
    for (int k = 0; k < c.width; ++k, row += p.pitch_d, pixel += p.position_step * p.pitch_x) {
      Vector left[ROWS / VECTOR<acc>];
#pragma unroll
      for (int v = 0; v < ROWS / VECTOR<acc>; ++v) left[v] = reinterpret_cast<const Vector*>(row)[v];
#pragma unroll
      for (int s = 0; s < PAIRS; ++s) {
        Vector right = *reinterpret_cast<const Vector*>(pixel + offset[s]);
#pragma unroll
        for (int m = 0; m < ROWS; ++m)
#pragma unroll
          for (int v = 0; v < VECTOR<acc>; ++v)
            sums[m][s][v] += left[m / VECTOR<acc>].value[m % VECTOR<acc>] * right.value[v];
      }
    }
  }
}

// Calls multiply(chunk, stage) for every chunk, the next one's copies under way.
template <typename in_t, typename Fn>
__device__ __forceinline__ void for_each_chunk(const ConvTiles& p, const TileOrigin& t, unsigned char* memory, Fn&& multiply) {
  auto stage = [&](int i) { return reinterpret_cast<in_t*>(memory + i % p.stages * p.stage_bytes); };
  fetch_chunk<in_t>(p, t, chunk_at(p, 0), stage(0));
  for (int i = 0; i < p.chunks; ++i) {
    if (i + 1 < p.chunks) {
      fetch_chunk<in_t>(p, t, chunk_at(p, i + 1), stage(i + 1));
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    multiply(chunk_at(p, i), stage(i));
    __syncthreads();  // the next fetch writes where this product has read
  }
}

// A block's tile of one example's gradient on tensor cores: which columns the thread holds, and their sums.
template <typename in_t, int BLOCKS> struct TensorTile {
  int warp, lane, pairs;

  __device__ explicit TensorTile(const TileOrigin& t) : warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    pairs = ((t.columns + 1) / 2 - warp + TILE_WARPS - 1) / TILE_WARPS;
  }
  __device__ int octet(int s, int half) const { return 2 * (warp + TILE_WARPS * s) + half; }
  __device__ int row(int m, int i) const { return 16 * m + lane / 4 + i / 2 * 8; }
  __device__ int column(int i) const { return lane % 4 * 2 + i % 2; }  // in the octet

  __device__ __forceinline__ void multiply(const ConvTiles& p, const TileOrigin& t, unsigned char* memory,
                                           TensorSums<BLOCKS>& sums) const {
    // The last pair of an odd number multiplies an octet twice; whoever reads the sums leaves the copy out.
    auto start = [&](int s, int half) { return column_offset(p, t, min(octet(s, half), t.columns - 1)); };
    if constexpr (sizeof(in_t) == 2) {
      int offset[PAIRS];
#pragma unroll
      for (int s = 0; s < PAIRS; ++s) offset[s] = start(s, lane / 16);
      for_each_chunk<in_t>(p, t, memory, [&](const Chunk& c, const in_t* stage) {
        multiply_chunk<in_t, BLOCKS>(p, c, stage, pairs, offset, sums);
      });
    } else {
      int offset[PAIRS][2];
#pragma unroll
      for (int s = 0; s < PAIRS; ++s)
#pragma unroll
        for (int h = 0; h < 2; ++h) offset[s][h] = start(s, h);
      for_each_chunk<in_t>(p, t, memory, [&](const Chunk& c, const in_t* stage) {
        multiply_chunk<BLOCKS>(p, c, stage, pairs, offset, sums);
      });
    }
  }
};

// The same without tensor cores; 8 · ROWS output channels.
template <typename acc, int ROWS> struct ScalarTile {
  static constexpr int PARTS = 8 / VECTOR<acc>;  // vectors of an octet

  __device__ int vector(int s) const { return int(threadIdx.x) % 16 + 16 * s; }
  __device__ int octet(int s) const { return vector(s) / PARTS; }
  __device__ int row(int m) const { return int(threadIdx.x) / 16 * ROWS + m; }
  __device__ int column(int s, int v) const { return vector(s) % PARTS * VECTOR<acc> + v; }  // in the octet

  __device__ __forceinline__ void multiply(const ConvTiles& p, const TileOrigin& t, unsigned char* memory,
                                           ScalarSums<acc, ROWS>& sums) const {
    int offset[PAIRS];
#pragma unroll
    for (int s = 0; s < PAIRS; ++s) {
      int v = min(vector(s), t.columns * PARTS - 1);
      offset[s] = column_offset(p, t, v / PARTS) + v % PARTS * VECTOR<acc>;
    }
    for_each_chunk<acc>(p, t, memory, [&](const Chunk& c, const acc* stage) {
      multiply_chunk<acc, ROWS>(p, c, stage, offset, sums);
    });
  }
};

// Chooses the tiles of a launch on factors of `size` bytes, `rows` output channels each (a multiple of 16). Chunks hold up to 256 / size positions, fewer where two of them would leave room for one block only.
inline ConvTiles plan_tiles(const ConvFactors& f, bool tensor, int size, int rows) {
  ConvTiles p{};
  p.f = f;
  p.C = int(f.C / f.groups), p.O = int(f.O / f.groups);
  auto ceil_div = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
  auto gcd = [](int64_t a, int64_t b) {
    while (b) a %= b, std::swap(a, b);
    return a;
  };
  int most = size == 8 ? 12 : 24, kernel = int(f.kernel[2]), all = ceil_div(p.C, 8);
  p.octets = std::min(all, std::max(1, most / kernel));
  p.channel_tiles = ceil_div(all, p.octets), p.octets = ceil_div(all, p.channel_tiles);
  p.channels = 8 * p.octets;
  p.taps = std::min(kernel, most / p.octets);
  p.tap_tiles = ceil_div(kernel, p.taps), p.taps = ceil_div(kernel, p.tap_tiles);
  p.tile_rows = rows, p.row_tiles = ceil_div(p.O, rows);
  // Rows whose pitch in 16-byte units is odd meet all banks in ldmatrix; 8 words beyond a multiple of 32 do for tf32.
  auto pitch = [&](int channels) {
    return size == 2 ? channels + (channels / 8 % 2 ? 0 : 8) : size == 4 ? channels + (40 - channels % 32) % 32 : channels;
  };
  p.pitch_x = pitch(p.channels), p.pitch_d = pitch(rows);
  int multiple = !tensor ? 1 : size == 2 ? 16 : 8, out = int(f.out[2]), all_rows = int(f.out[0] * f.out[1]);
  for (int positions = 256 / size;; positions /= 2) {
    if (positions < 16) {  // a wide stride or dilation: kernel elements no longer share segments
      p.taps = 1, p.tap_tiles = kernel;
      positions = 256 / size;
    }
    int64_t tap_step = p.taps > 1 ? f.dilation[2] : 0;
    p.pixel_step = int(gcd(f.stride[2], tap_step));
    p.position_step = int(f.stride[2] / p.pixel_step), p.tap_step = int(tap_step / p.pixel_step);
    p.pieces = ceil_div(out, positions), p.width = ceil_div(out, p.pieces);
    p.rows = p.pieces > 1 ? 1 : std::min(all_rows, positions / out);
    p.chunks = p.pieces > 1 ? all_rows * p.pieces : ceil_div(all_rows, p.rows);
    p.capacity = ceil_div(p.rows * p.width, multiple) * multiple;
    int64_t pixels = int64_t(p.width - 1) * p.position_step + int64_t(p.taps - 1) * p.tap_step + 1;
    p.stage_bytes = (int64_t(p.capacity) * p.pitch_d + p.rows * pixels * p.pitch_x) * size;
    p.stage_bytes = (p.stage_bytes + 15) / 16 * 16;
    p.pixels = int(pixels);
    if (p.stage_bytes <= 37 * 1024 || (p.taps == 1 && positions < 32)) break;
  }
  p.stages = std::min(2, p.chunks);
  p.tiles = int(f.groups) * p.row_tiles * p.channel_tiles * int(f.kernel[0] * f.kernel[1]) * p.tap_tiles;
  auto aligned = [&](const void* data, const int64_t* stride, int64_t channels) {
    bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[1] == 1;
    for (int i : {0, 2, 3, 4}) fits = fits && stride[i] * size % 16 == 0;
    return fits && (f.groups == 1 || channels * size % 16 == 0);
  };
  p.wide_x = aligned(f.act, f.act_stride, p.C), p.wide_d = aligned(f.grad, f.grad_stride, p.O);
  p.by_width = Divisor(p.width), p.by_out_y = Divisor(f.out[1]), p.by_pixels = Divisor(p.pixels);
  p.by_capacity = Divisor(p.capacity), p.by_segments = Divisor(int64_t(p.rows) * p.pixels);
  p.by_x_vectors = Divisor(p.channels * size / 16), p.by_d_vectors = Divisor(rows * size / 16);
  return p;
}

}  // namespace gradclust
