// Σ_b G_b and Σ_b G_b∘G_b on the CPU.
//
// v1  The result is cut into blocks, one thread each; a block packs its columns of act and grad, some rows at a time.
//     T = 1: two products, the second of the squares, made in the packed copy. T > 1: G_b strip by strip, added and
//     squared into the sums while both are in the L1 cache; no G_b ever exists (bench/kernels/bench_grad_moments.py).
#include "grad_moments.h"

#include "gemm.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

thread_local Scratch scratch;

constexpr int64_t BLOCK_O = 192, BLOCK_ROWS = 128;
constexpr int64_t STRIP_ROWS = 48;  // two sums and a product of STRIP_ROWS × NR stay in the L1 cache

// One block of the result: columns i0.. and rows o0.. of [O, I'].
template <typename in_t> struct Block {
  using acc = acc_t<in_t>;
  const LinearFactors& f;
  int64_t o0, O, i0, I;  // O, I: the block's own extents

  // Columns i0.. of `depth` rows of act, the constant feature included.
  Packed<acc> pack_act(acc* dst, const in_t* rows, int64_t stride, int64_t depth) const {
    Packed<acc> packed = {dst, I, depth};
    for (int64_t j = 0; j < I; j += NR<acc>) {
      int64_t width = packed.width(j), constant = f.I - i0 - j;  // where the constant feature would be
      pack_columns(dst + j * depth, width, rows + i0 + j, stride, depth, max_of(0, min_of(width, constant)));
      if (f.bias && constant >= 0 && constant < width)
        for (int64_t k = 0; k < depth; ++k) dst[j * depth + k * width + constant] = 1;
    }
    return packed;
  }
  Packed<acc> pack_grad(acc* dst, const in_t* rows, int64_t stride, int64_t depth) const {
    return pack_all_columns(dst, rows + o0, stride, depth, O);
  }
};

// sums: `first` then `second`, each panel by panel [O padded, width].
template <typename in_t>
void rank1_block(const Block<in_t>& block, acc_t<in_t>* first, acc_t<in_t>* second, acc_t<in_t>* packed) {
  using acc = acc_t<in_t>;
  const LinearFactors& f = block.f;
  const int64_t O_padded = round_up(block.O, LANES<acc>), I_padded = round_up(block.I, LANES<acc>);
  for (int64_t b = 0; b < f.B; b += BLOCK_ROWS) {
    int64_t depth = min_of(BLOCK_ROWS, f.B - b);
    const in_t *act = static_cast<const in_t*>(f.act), *grad = static_cast<const in_t*>(f.grad);
    auto A = block.pack_act(packed, act + b * f.act_stride_b, f.act_stride_b, depth);
    auto D = block.pack_grad(packed + I_padded * depth, grad + b * f.grad_stride_b, f.grad_stride_b, depth);
    for (int64_t i = 0; i < block.I; i += NR<acc>) strip_product(D, 0, O_padded, A, i, first + i * O_padded, true);
    for (int64_t k = 0; k < (I_padded + O_padded) * depth; ++k) packed[k] *= packed[k];
    for (int64_t i = 0; i < block.I; i += NR<acc>) strip_product(D, 0, O_padded, A, i, second + i * O_padded, true);
  }
}

template <typename in_t>
void sequence_block(const Block<in_t>& block, acc_t<in_t>* first, acc_t<in_t>* second, acc_t<in_t>* packed) {
  using acc = acc_t<in_t>;
  const LinearFactors& f = block.f;
  const int64_t T = f.T, O_padded = round_up(block.O, LANES<acc>), I_padded = round_up(block.I, LANES<acc>);
  const int64_t examples = max_of(1, BLOCK_ROWS / T), size = T * (I_padded + O_padded);
  acc strip[STRIP_ROWS * NR<acc>];
  for (int64_t b0 = 0; b0 < f.B; b0 += examples) {
    int64_t count = min_of(examples, f.B - b0);
    for (int64_t e = 0; e < count; ++e) {
      const in_t* act = static_cast<const in_t*>(f.act) + (b0 + e) * f.act_stride_b;
      const in_t* grad = static_cast<const in_t*>(f.grad) + (b0 + e) * f.grad_stride_b;
      block.pack_act(packed + e * size, act, f.act_stride_t, T);
      block.pack_grad(packed + e * size + T * I_padded, grad, f.grad_stride_t, T);
    }
    for (int64_t i = 0; i < block.I; i += NR<acc>)
      for (int64_t o = 0; o < O_padded; o += STRIP_ROWS) {
        int64_t rows = min_of(STRIP_ROWS, O_padded - o);
        for (int64_t e = 0; e < count; ++e) {
          Packed<acc> A{packed + e * size, block.I, T}, D{packed + e * size + T * I_padded, block.O, T};
          strip_product(D, o, o + rows, A, i, strip);
          int64_t width = A.width(i);
          acc *sum = first + i * O_padded + o * width, *squares = second + i * O_padded + o * width;
          for (int64_t k = 0; k < rows * width; k += LANES<acc>) {
            vec_t<acc> x = load_vec(strip + k);
            store_vec(sum + k, load_vec(sum + k) + x);
            store_vec(squares + k, load_vec(squares + k) + x * x);
          }
        }
      }
  }
}

template <typename in_t>
void grad_moments_kernel(const LinearFactors& f, acc_t<in_t>* first, acc_t<in_t>* second, int threads) {
  using acc = acc_t<in_t>;
  constexpr int64_t N = NR<acc>, BLOCK_I = 4 * N;
  const int64_t wide = f.I + f.bias;
  const int64_t blocks_o = (f.O + BLOCK_O - 1) / BLOCK_O, blocks_i = (wide + BLOCK_I - 1) / BLOCK_I;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < blocks_o * blocks_i; ++unit) {
    int64_t o0 = unit / blocks_i * BLOCK_O, i0 = unit % blocks_i * BLOCK_I;
    Block<in_t> block{f, o0, min_of(BLOCK_O, f.O - o0), i0, min_of(BLOCK_I, wide - i0)};
    int64_t O_padded = round_up(block.O, LANES<acc>), I_padded = round_up(block.I, LANES<acc>);
    acc* sums = scratch.get<acc>(2 * O_padded * I_padded + max_of(BLOCK_ROWS, f.T) * (O_padded + I_padded));
    acc *squares = sums + O_padded * I_padded, *packed = squares + O_padded * I_padded;
    memset(sums, 0, size_t(2 * O_padded * I_padded) * sizeof(acc));
    if (f.T == 1)
      rank1_block(block, sums, squares, packed);
    else if (f.T > 1)
      sequence_block(block, sums, squares, packed);
    for (int64_t i = 0; i < block.I; i += N) {
      int64_t width = Panels<acc>{block.I}.width(i), n = min_of(width, block.I - i);
      for (int64_t o = 0; o < block.O; ++o) {
        int64_t to = (o0 + o) * wide + i0 + i, from = i * O_padded + o * width;
        memcpy(first + to, sums + from, size_t(n) * sizeof(acc));
        memcpy(second + to, squares + from, size_t(n) * sizeof(acc));
      }
    }
  }
}

}  // namespace

void grad_moments_cpu(const LinearFactors& f, void* first, void* second, int threads) {
  dispatch(f.dtype, [&](auto zero) {
    using in_t = decltype(zero);
    using acc = acc_t<in_t>;
    grad_moments_kernel<in_t>(f, static_cast<acc*>(first), static_cast<acc*>(second), threads);
  });
}

}  // namespace gradclust::GRADCLUST_ISA
