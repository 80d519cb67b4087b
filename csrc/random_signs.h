// Random matrices with entries ±scale, bit for bit those of gradclust_fast/reference/sign_product.py. The kernel is in
// cuda/random_signs.cu.
#pragma once
#include "types.h"

namespace gradclust {

// out [rows, cols] contiguous, or [cols, rows] when transposed; f32 or f64. Returns an error text, or nullptr.
const char* random_signs_cuda(void* out, DType dtype, int64_t rows, int64_t cols, uint32_t key0, uint32_t key1,
                              double scale, bool transposed, void* stream);

}  // namespace gradclust
