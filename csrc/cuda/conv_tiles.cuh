// Tiles of a convolution's per-example gradients: up to 64 output channels × 24 octets of columns, summed over all
// positions by implicit im2col. An octet is 8 channels at one kernel element; nothing is unfolded in memory.
//
// A chunk is a run of output positions: its gradients [positions, channels] and, for each output row, the segment of the
// image row that one row of kernel elements meets [pixels, channels] lie in shared memory, and kernel elements of the
// same row share the segment. A pixel's channels are contiguous there, so a position's patch is just an address, and
// stride, dilation and padding cost nothing in the product. Two chunks take turns: one is fetched during the other's
// product (conv_fetch.cuh).
#pragma once
#include <algorithm>

#include "conv_fetch.cuh"
#include "tensor_map.cuh"

namespace gradclust {

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

// Bytes from pixel 0 of the segments to the first of an octet's channels, before swizzling.
template <typename in_t> __device__ int column_offset(const ConvTiles& p, const TileOrigin& t, int octet) {
  int tap = octet / t.octets;
  return p.x.start_of(tap * p.tap_step, (octet - tap * t.octets) * int(sizeof(in_t)) / 2);
}

// The product below for a warp of `pairs` pairs.
template <typename in_t, int BLOCKS, int pairs>
__device__ __forceinline__ void multiply_pairs(const ConvTiles& p, const Chunk& c, const unsigned char* stage,
                                               const int (&offset)[PAIRS], TensorSums<BLOCKS>& sums) {
  const unsigned char* x = stage + p.x_bytes;
  int lane = threadIdx.x % 32, positions = c.rows * c.width;
  int row[BLOCKS];  // at position 0; 16 positions later everything repeats, the swizzle too
#pragma unroll
  for (int m = 0; m < BLOCKS; ++m) row[m] = p.d.at(lane / 16 * 8 + lane % 8, 2 * m + lane / 8 % 2);
  for (int k0 = 0; k0 < positions; k0 += 16) {
    int pixel = pixel_of(p, k0 + lane % 16, positions) * p.x.bytes;
    unsigned a[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m) load_transposed(a[m], stage + k0 * p.d.bytes + row[m]);
#pragma unroll
    for (int s = 0; s < pairs; ++s) {
      unsigned b[4];
      load_transposed(b, x + p.x.swizzled(pixel + offset[s]));
#pragma unroll
      for (int m = 0; m < BLOCKS; ++m) {
        multiply_add(sums[m][s][0], a[m], b[0], b[1], in_t{});
        multiply_add(sums[m][s][1], a[m], b[2], b[3], in_t{});
      }
    }
  }
}

// sums += gradᵀ · patches over one chunk; 16 · BLOCKS output channels. 16-bit factors.
template <typename in_t, int BLOCKS>
__device__ __forceinline__ void multiply_chunk(const ConvTiles& p, const Chunk& c, const unsigned char* stage, int pairs,
                                               const int (&offset)[PAIRS], TensorSums<BLOCKS>& sums) {
  static_assert(PAIRS == 3, "");  // a loop for each number: a branch inside would keep loads behind products
  if (pairs == 3) multiply_pairs<in_t, BLOCKS, 3>(p, c, stage, offset, sums);
  if (pairs == 2) multiply_pairs<in_t, BLOCKS, 2>(p, c, stage, offset, sums);
  if (pairs == 1) multiply_pairs<in_t, BLOCKS, 1>(p, c, stage, offset, sums);
}

// The same for float32 factors rounded to tf32.
template <int BLOCKS>
__device__ __forceinline__ void multiply_chunk(const ConvTiles& p, const Chunk& c, const unsigned char* stage, int pairs,
                                               const int (&offset)[PAIRS][2], TensorSums<BLOCKS>& sums) {
  auto *d = reinterpret_cast<const float*>(stage), *x = reinterpret_cast<const float*>(stage + p.x_bytes);
  int pitch_d = p.d.bytes / int(sizeof(float)), pitch_x = p.x.bytes / int(sizeof(float));
  int lane = threadIdx.x % 32, positions = c.rows * c.width;
  for (int k0 = 0; k0 < positions; k0 += 8) {
    int k = k0 + lane % 4;
    const float* early = x + pixel_of(p, k, positions) * pitch_x + lane / 4;
    const float* late = x + pixel_of(p, k + 4, positions) * pitch_x + lane / 4;
    const float* row = d + k * pitch_d + lane / 4;
    unsigned a[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = round_to_tf32(row[i / 2 * 4 * pitch_d + 16 * m + i % 2 * 8]);
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
__device__ __forceinline__ void multiply_chunk(const ConvTiles& p, const Chunk& c, const unsigned char* stage,
                                               const int (&offset)[PAIRS], ScalarSums<acc, ROWS>& sums) {
  struct alignas(16) Vector { acc value[VECTOR<acc>]; };
  const acc* d = reinterpret_cast<const acc*>(stage) + threadIdx.x / 16 * ROWS;
  const acc* x = reinterpret_cast<const acc*>(stage + p.x_bytes);
  int pitch_d = p.d.bytes / int(sizeof(acc)), pitch_x = p.x.bytes / int(sizeof(acc));
  for (int r = 0; r < c.rows; ++r) {
    const acc *row = d + r * p.width * pitch_d, *pixel = x + r * p.pixels * pitch_x;
    for (int k = 0; k < c.width; ++k, row += pitch_d, pixel += p.position_step * pitch_x) {
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
    auto start = [&](int s, int half) { return column_offset<in_t>(p, t, min(octet(s, half), t.columns - 1)); };
    if constexpr (sizeof(in_t) == 2) {
      int offset[PAIRS];
#pragma unroll
      for (int s = 0; s < PAIRS; ++s) offset[s] = start(s, lane / 16);
      for_each_chunk<in_t>(p, t, memory, [&](const Chunk& c, const unsigned char* stage) {
        multiply_chunk<in_t, BLOCKS>(p, c, stage, pairs, offset, sums);
      });
    } else {
      int offset[PAIRS][2];
#pragma unroll
      for (int s = 0; s < PAIRS; ++s)
#pragma unroll
        for (int h = 0; h < 2; ++h) offset[s][h] = start(s, h) / int(sizeof(in_t));
      for_each_chunk<in_t>(p, t, memory, [&](const Chunk& c, const unsigned char* stage) {
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
      offset[s] = column_offset<acc>(p, t, v / PARTS) / int(sizeof(acc)) + v % PARTS * VECTOR<acc>;
    }
    for_each_chunk<acc>(p, t, memory, [&](const Chunk& c, const unsigned char* stage) {
      multiply_chunk<acc, ROWS>(p, c, stage, offset, sums);
    });
  }
};

// Column of weight.flatten(1) of a channel of an octet, or −1 past the group's channels.
__device__ inline int64_t weight_column(const ConvTiles& p, const TileOrigin& t, int octet, int column) {
  int tap = octet / t.octets, c = octet % t.octets * 8 + column;
  if (octet >= t.columns || c >= t.C) return -1;
  const int64_t* kernel = p.f.kernel;
  return (((t.c0 + c) * kernel[0] + t.kz) * kernel[1] + t.ky) * kernel[2] + t.kx0 + tap;
}

inline int64_t rounded(int64_t n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Lines of `count` positions with `channels` channels of `size` bytes.
inline Lines plan_lines(int channels, int size, int64_t count) {
  Lines lines{channels * size, 0, 1, 30, 0};
  if (size == 4) lines.bytes += (40 - channels % 32) % 32 * 4;  // 8 words beyond a multiple of 32 meet all banks
  if (size == 2) {
    lines.bytes = 16, lines.shift = 0;
    while (lines.bytes < 128 && lines.bytes < channels * size) lines.bytes *= 2, ++lines.shift;
    lines.panels = (channels * size + lines.bytes - 1) / lines.bytes;
    lines.swizzle = lines.bytes - 16;
  }
  // A swizzled panel starts where the swizzle does, which goes by addresses: it repeats after 1024 bytes at most.
  // The least is for counts that plan_tiles will not take: far too much, but an int.
  lines.panel = int(std::min<int64_t>(rounded(count * lines.bytes, size == 2 ? 1024 : 16), 1 << 28));
  return lines;
}

// Makes the tensor maps of a plan for 16-bit factors, where bulk copies can fetch its chunks (see the head of conv_fetch.cuh).
inline bool fetch_in_bulk(ConvTiles& p) {
  const ConvFactors& f = p.f;
  const int64_t *out = f.out, *d = f.grad_stride, *x = f.act_stride;
  auto used = [](const Lines& lines, int channels) { return channels * 2 * 4 >= lines.panels * lines.bytes * 3; };
  // A box is of rows of one depth z: of the image, and of grad as well unless its rows go on from depth to depth.
  bool one_depth = out[0] == 1 || (out[1] % p.rows == 0 && d[2] == out[1] * d[3]);
  if (!p.wide_x || !p.wide_d || !one_depth || !used(p.x, p.channels) || !used(p.d, p.tile_rows) ||
      !device_copies_in_bulk())
    return false;
  const BoxDimension grad[5] = {{p.O, 1, p.d.bytes / 2, 1}, {f.groups, p.O, 1, 1}, {out[2], d[4], p.width, 1},
                                {out[0] * out[1], d[3], p.rows, 1}, {f.B, d[0], 1, 1}};
  const BoxDimension act[5] = {{f.C, 1, p.x.bytes / 2, 1}, {f.size[2], x[4], p.pixels, p.pixel_step},
                               {f.size[1], x[3], p.rows, p.rows > 1 ? f.stride[1] : 1}, {f.size[0], x[2], 1, 1},
                               {f.B, x[0], 1, 1}};
  p.bulk_bytes = unsigned(p.d.panels * p.rows * p.width * p.d.bytes + p.x.panels * p.rows * p.pixels * p.x.bytes);
  return make_tensor_map(p.grad_map, f.grad, p.d.bytes, grad) && make_tensor_map(p.act_map, f.act, p.x.bytes, act);
}

// Chooses the tiles of a launch on factors of `size` bytes, `rows` output channels each (a multiple of 16), fetched by bulk
// copies where `bulk` allows it and they fit. Chunks hold up to 256 / size positions, fewer where two of them would leave
// room for one block only.
inline ConvTiles plan_tiles(const ConvFactors& f, bool tensor, int size, int rows, bool bulk = true) {
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
    p.pixels = int(pixels);
    p.d = plan_lines(rows, size, p.capacity), p.x = plan_lines(p.channels, size, p.rows * pixels);
    p.x_bytes = p.d.panels * p.d.panel;
    p.stage_bytes = p.x_bytes + int64_t(p.x.panels) * p.x.panel;
    if (size == 2) p.stage_bytes = rounded(p.stage_bytes + sizeof(uint64_t), 1024);  // and the barrier
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
  p.bulk = bulk && size == 2 && fetch_in_bulk(p);
  return p;
}

// Output channels that tensor-core tiles fetch and multiply, and those of a thread without tensor cores.
inline int tensor_rows(const ConvFactors& f) { return f.O / f.groups <= 32 ? 32 : 64; }
constexpr int SCALAR_ROWS = 8;

// The largest tiles: of kernels that keep one sum of them.
template <typename in_t> ConvTiles plan_large_tiles(const ConvFactors& f, ConvCudaRoute route, bool bulk = true) {
  bool tensor = on_tensor_cores(f, route);
  return plan_tiles(f, tensor, sizeof(in_t), tensor ? tensor_rows(f) : 8 * SCALAR_ROWS,
                    bulk && route != ConvCudaRoute::tiles_cp_async);
}

}  // namespace gradclust
