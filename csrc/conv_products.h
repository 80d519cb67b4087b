// Products of a convolution's per-example gradients with matrices on CUDA devices: what conv_sketch and conv_dot sum.
// The kernels are in cuda/conv_products.cu.
#pragma once
#include "types.h"

namespace gradclust {

// What becomes of G_b: Σ_r rows[n, r]ᵀ G_b columns[n, r]; G_b columns[n]; rows[n]ᵀ G_b; G_b itself.
// The codes of gradclust_fast/ops/_conv_cuda.py:PRODUCTS.
enum class ConvProduct : int { dot = 0, right = 1, left = 2, whole = 3 };

// rows [count · rank, groups, row_pitch] and columns [count · rank, kernel elements, column_pitch], both zero beyond the
// channels of a group, in the accumulator's dtype, aligned to 16 bytes. What a product does not take is null.
struct ConvSides {
  const void *rows, *columns;
  int64_t count, rank, row_pitch, column_pitch;
};

// Least multiples that row_pitch and column_pitch must be of.
struct ConvPitches { int64_t rows, columns; };
ConvPitches conv_products_cuda_pitches(ConvCudaRoute route);

// Partial results an example. They add up to the product; of `whole` there is one.
int64_t conv_products_cuda_parts(const ConvFactors& f, ConvCudaRoute route, ConvProduct what);

// out [B, parts, …]: dot count; right count, O; left count, kernel elements, C / groups; whole O, I. The bias has no part
// in it. Nothing may be empty. Returns an error text, or nullptr.
const char* conv_products_cuda(const ConvFactors& f, ConvCudaRoute route, ConvProduct what, const ConvSides& sides,
                               void* out, void* stream);

}  // namespace gradclust
