// Tuples of integers, as Python passes them, to the structs of types.h and of the ops.
#pragma once
#include <array>
#include <cstdint>

#include "cluster.h"
#include "embedding.h"
#include "norm_grads.h"
#include "sign_product.h"
#include "types.h"

namespace gradclust {

template <typename T = void> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// (act, grad, dtype, B, T, I, O, act_stride_b, act_stride_t, grad_stride_b, grad_stride_t, bias)
using LinearTuple = std::array<int64_t, 12>;

inline LinearFactors linear(const LinearTuple& t) {
  return {pointer(uintptr_t(t[0])), pointer(uintptr_t(t[1])), DType(t[2]), t[3], t[4], t[5], t[6], t[7], t[8], t[9],
          t[10], t[11] != 0};
}

// (act, grad, dtype, B, C, O, groups, bias, size, out, kernel, stride, pad, dilation: 3 each, act and grad strides: 5)
using ConvTuple = std::array<int64_t, 36>;

inline ConvFactors conv(const ConvTuple& t) {
  ConvFactors f{pointer(uintptr_t(t[0])), pointer(uintptr_t(t[1])), DType(t[2]), t[3], t[4], t[5], t[6], t[7] != 0,
                {}, {}, {}, {}, {}, {}, {}, {}};
  int64_t* const triples[] = {f.size, f.out, f.kernel, f.stride, f.pad, f.dilation};
  const int64_t* next = t.data() + 8;
  for (int64_t* triple : triples)
    for (int i = 0; i < 3; ++i) triple[i] = *next++;
  for (int64_t* strides : {f.act_stride, f.grad_stride})
    for (int i = 0; i < 5; ++i) strides[i] = *next++;
  return f;
}

// (data, dtype, N, R, stride)
using RowsTuple = std::array<int64_t, 5>;

inline Rows rows(const RowsTuple& t) { return {pointer(uintptr_t(t[0])), DType(t[1]), t[2], t[3], t[4]}; }

// (index, grad, dtype, B, T, D, V, padding, index_stride_b, index_stride_t, grad_stride_b, grad_stride_t)
using EmbeddingTuple = std::array<int64_t, 12>;

inline EmbeddingFactors embedding(const EmbeddingTuple& t) {
  return {pointer<int64_t>(uintptr_t(t[0])), pointer(uintptr_t(t[1])), DType(t[2]), t[3], t[4], t[5], t[6], t[7], t[8],
          t[9], t[10], t[11]};
}

// (input, grad, dtype, B, T, D, groups, input_stride_b, input_stride_t, grad_stride_b, grad_stride_t)
using NormTuple = std::array<int64_t, 11>;

inline NormFactors norm(const NormTuple& t) {
  return {pointer(uintptr_t(t[0])), pointer(uintptr_t(t[1])), DType(t[2]), t[3], t[4], t[5], t[6], t[7], t[8], t[9],
          t[10]};
}

// (vectors, dtype, B, D, stride, R, key, key, transposed)
using SignTuple = std::array<int64_t, 9>;

inline SignFactors signs(const SignTuple& t, double scale) {
  return {pointer(uintptr_t(t[0])), DType(t[1]), t[2], t[3], t[4], t[5], uint32_t(t[6]), uint32_t(t[7]),
          t[8] != 0, scale};
}

}  // namespace gradclust
