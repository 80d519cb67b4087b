// Products with a random matrix of signs that is made where it is used and never stored: out = scale · vectors Sᵀ with
// S [R, D], or scale · vectors S with S [D, R], entries being the signs of gradclust_fast/reference/sign_product.py:sign_matrix. Launchers; the kernels are in
// cpu/sign_product.cpp and cuda/sign_product.cu. Results are float64 for float64 vectors, else float32.
#pragma once
#include "launch.h"
#include "types.h"

namespace gradclust {

struct SignFactors {
  const void* vectors;  // [B, D], the last stride 1; stride counts elements
  DType dtype;
  int64_t B, D, stride;
  int64_t R;
  uint32_t key0, key1;
  bool transposed;  // S is [D, R]; its rows are fewer than 2³² either way
  double scale;
};

// out [B, R] contiguous.
GRADCLUST_CPU_LAUNCHER(sign_product_cpu, const SignFactors& f, void* out, int threads)

// pieces: how many bfloat16 numbers stand for a float32 on the tensor cores; three are exact. Nothing may be empty but D.
// Returns an error text, or nullptr.
const char* sign_product_cuda(const SignFactors& f, int pieces, void* out, void* stream);

}  // namespace gradclust
