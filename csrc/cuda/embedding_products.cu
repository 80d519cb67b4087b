// Sketches of an embedding table's per-example gradients, and their inner products with centres, on CUDA devices.
//
// v1  A block takes 64 positions of an example at a time: their products with 64 columns of `right` (or 64 centres) stay in
//     registers, are multiplied by the rows of `left` (or the centres' numbers) that the indices look up, and are summed
//     over the example's positions without leaving the multiprocessor. Neither [B, T, Q] nor [B, T, P] is stored, as
//     it is by a gather and two library products, and nothing depends on the size of the table. Long examples are cut
//     where there are few blocks; the cuts are added in a fixed order. No atomics. Ordinary float32 products: for few
//     columns (a sketch's 32) one read of grad is the floor, not they. Not measured yet.
#include "embedding_rows.cuh"
#include "sum_rows.cuh"

#include <algorithm>

namespace gradclust {
namespace {

constexpr int THREADS = 256, TILE = 64, DEPTH = 16, PITCH = TILE + 4, FULL = 264;

// What is asked: leftᵀ G_b right, or ⟨G_b, Σ_r center_index[k, r] ⊗ center_grad[k, r]⟩.
template <typename acc> struct Asked {
  const acc *left, *right;                 // [V, P], [D, Q]; right is null for the identity
  const acc *center_index, *center_grad;   // [K, rank, V], [K, rank, D]
  int64_t P, Q, K, rank;
  int splits;                              // of an example's positions
};

template <typename acc> using Square = acc[4][4];

// sum[i][j] += Σ_d a[d][4·ty + i] · b[d][4·tx + j] over `depth` rows of two strips.
template <typename acc> __device__ void multiply(const acc* a, const acc* b, int depth, Square<acc>& sum) {
  int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  for (int d = 0; d < depth; ++d) {
    acc left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = a[d * PITCH + 4 * ty + i], right[i] = b[d * PITCH + 4 * tx + i];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
  }
}

// blockIdx.x: example and split; y: tile of columns; z: tile of rows of the result. partial [B, P · Q or K, splits].
template <typename in_t, bool DOT>
__global__ void __launch_bounds__(THREADS, sizeof(in_t) == 8 ? 1 : 2)
    embedding_products_kernel(const __grid_constant__ EmbeddingFactors f, const __grid_constant__ Asked<acc_t<in_t>> q,
                              acc_t<in_t>* __restrict__ partial) {
  using acc = acc_t<in_t>;
  GRADCLUST_SHARED(memory);
  acc *gradients = reinterpret_cast<acc*>(memory), *columns = gradients + DEPTH * PITCH;  // [DEPTH, PITCH] both
  acc *products = columns + DEPTH * PITCH, *rows = products + TILE * PITCH;               // [TILE, PITCH] both
  int64_t b = blockIdx.x / q.splits, split = blockIdx.x % q.splits, width = DOT ? q.K : q.Q;
  int64_t column0 = int64_t(blockIdx.y) * TILE, row0 = int64_t(blockIdx.z) * TILE;
  int64_t chunks = (f.T + TILE - 1) / TILE, first = chunks * split / q.splits, last = chunks * (split + 1) / q.splits;
  const int64_t* index = f.index + b * f.index_stride_b;
  const in_t* grad = static_cast<const in_t*>(f.grad) + b * f.grad_stride_b;
  int tid = threadIdx.x, ty = tid / 16, tx = tid % 16;
  Square<acc> result = {};  // of a sketch; of inner products the first row
  for (int64_t chunk = first; chunk < last; ++chunk) {
    int64_t t0 = chunk * TILE;
    auto row_at = [&](int position) {  // of the table, or −1 where there is none
      int64_t t = t0 + position, row = t < f.T ? index[t * f.index_stride_t] : -1;
      return row == f.padding ? -1 : row;
    };
    for (int64_t r = 0; r < (DOT ? q.rank : 1); ++r) {
      Square<acc> product = {};
      bool identity = !DOT && !q.right;
      for (int64_t d0 = 0; d0 < f.D && !identity; d0 += DEPTH) {
        int position = tid / 4, depth = tid % 4 * 4;
        bool live = row_at(position) >= 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          int64_t d = d0 + depth + j;
          bool there = live && d < f.D;
          gradients[(depth + j) * PITCH + position] = there ? acc(load(grad[(t0 + position) * f.grad_stride_t + d])) : acc(0);
          if constexpr (DOT) {  // neighbouring threads read along D
            int64_t k = column0 + position;
            columns[(depth + j) * PITCH + position] =
                k < width && d < f.D ? q.center_grad[(k * q.rank + r) * f.D + d] : acc(0);
          } else {  // along Q
            int64_t column = column0 + tid % TILE, of = d0 + tid / TILE * 4 + j;
            columns[(tid / TILE * 4 + j) * PITCH + tid % TILE] =
                column < width && of < f.D ? q.right[of * q.Q + column] : acc(0);
          }
        }
        __syncthreads();
        multiply(gradients, columns, DEPTH, product);
        __syncthreads();
      }
      if constexpr (DOT) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int64_t row = row_at(4 * ty + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            int64_t k = column0 + 4 * tx + j;
            if (row >= 0 && k < width) result[0][j] += product[i][j] * q.center_index[(k * q.rank + r) * f.V + row];
          }
        }
      } else {
        for (int i = tid; i < TILE * TILE; i += THREADS) {
          int position = i / TILE, at = i % TILE;
          int64_t row = row_at(position), p = row0 + at, column = column0 + at;
          rows[position * PITCH + at] = row >= 0 && p < q.P ? q.left[row * q.P + p] : acc(0);
          if (identity)
            products[position * PITCH + at] =
                row >= 0 && column < width ? acc(load(grad[(t0 + position) * f.grad_stride_t + column])) : acc(0);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (!identity) products[(4 * ty + i) * PITCH + 4 * tx + j] = product[i][j];
        __syncthreads();
        multiply(rows, products, TILE, result);
        __syncthreads();
      }
    }
  }
  if constexpr (DOT) {
#pragma unroll
    for (int j = 0; j < 4; ++j) products[ty * PITCH + 4 * tx + j] = result[0][j];
    __syncthreads();
    if (tid >= TILE || column0 + tid >= width) return;
    acc total = 0;
    for (int i = 0; i < THREADS / 16; ++i) total += products[i * PITCH + tid];
    partial[(b * width + column0 + tid) * q.splits + split] = total;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int64_t p = row0 + 4 * ty + i, column = column0 + 4 * tx + j;
        if (p < q.P && column < width) partial[((b * q.P + p) * q.Q + column) * q.splits + split] = result[i][j];
      }
  }
}

int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }

template <bool DOT, typename Fill>
const char* run(const EmbeddingFactors& f, int64_t P, int64_t width, void* partial, void* out, void* stream, Fill&& fill) {
  char sizes[96];
  describe(f, sizes);
  const char* error = nullptr;
  int splits = embedding_products_cuda_splits(f, P, width);
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    Asked<acc> q{};
    fill(q);
    q.splits = splits;
    dim3 grid(unsigned(f.B * splits), unsigned(tiles(width)), unsigned(tiles(P)));
    error = launch("embedding_products_kernel", sizes, embedding_products_kernel<in_t, DOT>, grid, THREADS,
                   2 * (DEPTH + TILE) * PITCH * sizeof(acc), stream, f, q, static_cast<acc*>(splits > 1 ? partial : out));
    if (!error && splits > 1)
      error = sum_rows(sizes, static_cast<const acc*>(partial), f.B * P * width, splits, static_cast<acc*>(out), stream);
  });
  return error;
}

}  // namespace

int embedding_products_cuda_splits(const EmbeddingFactors& f, int64_t P, int64_t width) {
  int64_t blocks = f.B * tiles(P) * tiles(width);
  return int(std::min(tiles(f.T), (FULL + blocks - 1) / blocks));
}

const char* embedding_sketch_cuda(const EmbeddingFactors& f, const void* left, const void* right, int64_t P, int64_t Q,
                                  void* partial, void* out, void* stream) {
  return run<false>(f, P, Q, partial, out, stream, [&](auto& q) {
    using pointer = decltype(q.left);
    q.left = static_cast<pointer>(left), q.right = static_cast<pointer>(right), q.P = P, q.Q = Q;
  });
}

const char* embedding_dot_cuda(const EmbeddingFactors& f, const void* center_index, const void* center_grad, int64_t K,
                               int64_t rank, void* partial, void* out, void* stream) {
  return run<true>(f, 1, K, partial, out, stream, [&](auto& q) {
    using pointer = decltype(q.left);
    q.center_index = static_cast<pointer>(center_index), q.center_grad = static_cast<pointer>(center_grad);
    q.K = K, q.rank = rank;
  });
}

}  // namespace gradclust
