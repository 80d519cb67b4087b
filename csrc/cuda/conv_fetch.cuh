// Fetching the chunks of a convolution's tiles (conv_tiles.cuh) into shared memory, one ahead of the product.
//
// v1  cp.async, 16 bytes a thread, where channels are side by side and aligned; else number by number.
// v2  Chunks of 16-bit channels-last factors by bulk tensor copies where the device has them (sm_90 and later): one thread
//     starts a copy of grad and one of the image for each 128 bytes of channels, what lies outside of the image is zeros
//     by the copy's own rule, and the other threads only wait. Not measured yet: bench_conv_sqnorm's "ours by cp.async".
//
// Both write the same layout and give the same bits, so that a kernel may use either. Which it is, is a function of shape,
// strides, dtype and device (fetch_in_bulk in conv_tiles.cuh). Left to cp.async:
//   channels apart, pixels that do not start at multiples of 16 bytes (3 channels, say), expanded dimensions, more than 256
//   pixels, or fewer than every eighth: no tensor map describes them;
//   chunks over two depths of a 3-d image, which no box covers;
//   tiles that would leave more than a quarter of a copy's bytes unused;
//   float32 and float64: their products read numbers, not matrices, and are bound by that and by rounding to tf32; a
//   swizzle to undo at every read would cost more there than the addresses of the copies do.
#pragma once
#include <cstring>

#include "common.cuh"
#include "ptx.h"

namespace gradclust {

constexpr int TILE_THREADS = 128, TILE_WARPS = TILE_THREADS / 32;

// Where the channels of positions (or pixels) lie in shared memory. Those of 16 bits: in lines of 16, 32, 64 or 128 bytes,
// one for each position in each of several panels. ldmatrix reads the same 16-byte unit of 8 neighbours; so that these
// meet all banks, a unit's place in its line changes with the number of the 128 bytes it lies in, as bulk copies swizzle.
// Those of 32 and 64 bits: in one panel, in lines of any length.
struct Lines {
  int bytes, panel, panels;  // bytes of a line, and of a panel
  int shift, swizzle;        // log2 of the units of a line; the bits of an address that change

  __device__ int start_of(int line, int unit) const {
    return (unit >> shift) * panel + line * bytes + (unit & ((1 << shift) - 1)) * 16;
  }
  __device__ int swizzled(int start) const { return start ^ (start >> 3 & swizzle); }
  __device__ int at(int line, int unit) const { return swizzled(start_of(line, unit)); }
};

struct ConvTiles {
  ConvFactors f;
  int C, O;                              // channels of one group
  int octets, channels, taps;            // of a tile: octets a kernel element, channels (8 · octets), elements of a kernel row
  int tile_rows;                         // output channels of a tile
  int channel_tiles, row_tiles, tap_tiles, tiles;  // tiles: of one example
  int rows, width, pieces, chunks;       // output rows of a chunk, positions taken of each, pieces a row, chunks in all
  int pixels, pixel_step;                // of a segment; image columns from one pixel to the next
  int position_step, tap_step;           // pixels from one position, or kernel element, to the next
  int capacity;                          // positions in shared memory
  Lines d, x;                            // of gradients and pixels, which begin x_bytes later
  int x_bytes, stages;
  int64_t stage_bytes;
  bool wide_x, wide_d;                   // 16-byte copies: channels are contiguous and aligned
  bool bulk;                             // bulk tensor copies, by these maps, of so many bytes a chunk
  unsigned bulk_bytes;
  CUtensorMap grad_map, act_map;
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
__device__ void fetch_chunk(const ConvTiles& p, const TileOrigin& t, const Chunk& c, unsigned char* stage) {
  constexpr int WIDTH = 16 / sizeof(in_t);
  unsigned char *d = stage, *x = stage + p.x_bytes;
  auto element = [](const Lines& lines, int line, int channel) {
    return lines.at(line, channel / WIDTH) + channel % WIDTH * int(sizeof(in_t));
  };
  int segments = p.rows * p.pixels;
  if (p.wide_d) {
    int vectors = p.tile_rows / WIDTH;
    for (int i = threadIdx.x; i < p.capacity * vectors; i += TILE_THREADS) {
      int k = p.by_d_vectors.quotient(i), v = i - k * vectors;
      const in_t* from = grad_at<in_t>(p, t, c, k);
      int there = from ? max(0, min(WIDTH, t.O - v * WIDTH)) : 0;
      copy_16(d + p.d.at(k, v), there ? from + v * WIDTH : p.f.grad, there * int(sizeof(in_t)));
    }
  } else {
    for (int i = threadIdx.x; i < p.capacity * p.tile_rows; i += TILE_THREADS) {
      int o = p.by_capacity.quotient(i), k = i - o * p.capacity;
      const in_t* from = o < t.O ? grad_at<in_t>(p, t, c, k) : nullptr;
      *reinterpret_cast<in_t*>(d + element(p.d, k, o)) = from ? from[o * p.f.grad_stride[1]] : zero_of<in_t>();
    }
  }
  if (p.wide_x) {
    int vectors = p.channels / WIDTH;
    for (int i = threadIdx.x; i < segments * vectors; i += TILE_THREADS) {
      int u = p.by_x_vectors.quotient(i), v = i - u * vectors;
      const in_t* from = act_at<in_t>(p, t, c, u);
      int there = from ? max(0, min(WIDTH, t.C - v * WIDTH)) : 0;
      copy_16(x + p.x.at(u, v), there ? from + v * WIDTH : p.f.act, there * int(sizeof(in_t)));
    }
  } else {
    for (int i = threadIdx.x; i < segments * p.channels; i += TILE_THREADS) {
      int channel = p.by_segments.quotient(i), u = i - channel * segments;
      const in_t* from = channel < t.C ? act_at<in_t>(p, t, c, u) : nullptr;
      *reinterpret_cast<in_t*>(x + element(p.x, u, channel)) =
          from ? from[channel * p.f.act_stride[1]] : zero_of<in_t>();
    }
  }
  commit_copies();
}

// The barrier of a stage fetched by bulk copies: its last 8 bytes.
__device__ inline uint64_t* barrier_of(const ConvTiles& p, unsigned char* stage) {
  return reinterpret_cast<uint64_t*>(stage + p.stage_bytes - sizeof(uint64_t));
}

// Before the first bulk copy. Boxes end with the last row; positions beyond it, up to a whole number of the product's
// steps, stay the zeros that they are made here.
__device__ inline void begin_bulk_copies(const ConvTiles& p, unsigned char* memory) {
  struct alignas(16) Unit { uint64_t zeros[2]; };
  int first = p.rows * p.width, units = p.d.panels << p.d.shift;
  for (int i = threadIdx.x; i < p.stages * (p.capacity - first) * units; i += TILE_THREADS) {
    int line = i / units, stage = line / (p.capacity - first);
    line += first - stage * (p.capacity - first);
    *reinterpret_cast<Unit*>(memory + stage * p.stage_bytes + p.d.at(line, i % units)) = {};
  }
  if (int(threadIdx.x) < p.stages) open_barrier(barrier_of(p, memory + threadIdx.x * p.stage_bytes));
  fence_bulk_copies();  // whatever else this memory was used for
  __syncthreads();
}

// After the last: the memory is free for other use.
__device__ inline void end_bulk_copies(const ConvTiles& p, unsigned char* memory) {
  if (int(threadIdx.x) < p.stages) close_barrier(barrier_of(p, memory + threadIdx.x * p.stage_bytes));
  __syncthreads();
}

// Like fetch_chunk. Channels past the group's may be other groups' there; they are read but not multiplied.
__device__ inline void fetch_chunk_in_bulk(const ConvTiles& p, const TileOrigin& t, const Chunk& c, unsigned char* stage) {
  if (threadIdx.x > 0) return;
  uint64_t* barrier = barrier_of(p, stage);
  fence_bulk_copies();  // the products that have read this stage
  expect_bytes(barrier, p.bulk_bytes);
  int z = p.by_out_y.quotient(c.q0), y = c.q0 - z * int(p.f.out[1]);
  int ix = int(c.x0 * p.f.stride[2] + t.kx0 * p.f.dilation[2] - p.f.pad[2]);
  int iy = int(y * p.f.stride[1] + t.ky * p.f.dilation[1] - p.f.pad[1]);
  int iz = int(z * p.f.stride[0] + t.kz * p.f.dilation[0] - p.f.pad[0]);
#pragma unroll 1  // nearly always one panel
  for (int i = 0; i < p.d.panels; ++i)
    copy_box(stage + i * p.d.panel, p.grad_map, {t.o0 + i * p.d.bytes / 2, t.group, c.x0, c.q0, int(t.b)}, barrier);
#pragma unroll 1
  for (int i = 0; i < p.x.panels; ++i)
    copy_box(stage + p.x_bytes + i * p.x.panel, p.act_map,
             {t.group * p.C + t.c0 + i * p.x.bytes / 2, ix, iy, iz, int(t.b)}, barrier);
}

// Calls multiply(chunk, stage) for every chunk, the next one's copies under way.
template <typename in_t, typename Fn>
__device__ __forceinline__ void for_each_chunk(const ConvTiles& p, const TileOrigin& t, unsigned char* memory, Fn&& multiply) {
  constexpr bool BULK = BULK_COPIES && sizeof(in_t) == 2;  // false in code for sm_80, which takes any plan all the same
  auto stage = [&](int i) { return memory + i % p.stages * p.stage_bytes; };
  auto fetch = [&](int i) {
    if constexpr (BULK) {
      if (p.bulk) return fetch_chunk_in_bulk(p, t, chunk_at(p, i), stage(i));
    }
    fetch_chunk<in_t>(p, t, chunk_at(p, i), stage(i));
  };
  auto wait = [&](int i) {
    if constexpr (BULK) {
      if (p.bulk) {
        wait_for_phase(barrier_of(p, stage(i)), i / p.stages % 2);
        return __syncwarp();  // lanes may have seen the phase end at different times
      }
    }
    i + 1 < p.chunks ? wait_for_copies<1>() : wait_for_copies<0>();
    __syncthreads();
  };
  if constexpr (BULK) {
    if (p.bulk) begin_bulk_copies(p, memory);
  }
#pragma unroll 1  // the fetch stands once in the code
  for (int i = -1; i < p.chunks; ++i) {
    if (i + 1 < p.chunks) fetch(i + 1);
    if (i < 0) continue;
    wait(i);
    multiply(chunk_at(p, i), stage(i));
    __syncthreads();  // the next fetch writes where this product has read
  }
  if constexpr (BULK) {
    if (p.bulk) end_bulk_copies(p, memory);
  }
}

}  // namespace gradclust
