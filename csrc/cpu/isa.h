// What every CPU kernel includes first. A kernel source is compiled once per instruction set, each time with its
// own GRADCLUST_ISA; all of its code lives in that namespace, so the linker can never hand AVX-512 code to an
// older machine. For the same reason kernel sources use no std templates (their instantiations are weak symbols
// shared between the copies); tests/test_build.py checks the object files.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "types.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// -DGRADCLUST_VECTOR_BYTES=64 compiles AVX-512's tiles for a processor without AVX-512, to test them there.
#if defined(GRADCLUST_VECTOR_BYTES)
#elif defined(__AVX512F__)
#define GRADCLUST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GRADCLUST_VECTOR_BYTES 32
#else
#define GRADCLUST_VECTOR_BYTES 16
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define GRADCLUST_INLINE static inline __attribute__((always_inline))
#define GRADCLUST_INLINE_MEMBER __attribute__((always_inline)) static

namespace gradclust::GRADCLUST_ISA {
namespace {

GRADCLUST_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct bf16_t { uint16_t bits; };
struct f16_t { uint16_t bits; };
struct __attribute__((may_alias)) bf16_pair { uint32_t bits; };  // two neighbours of a row, the first one low

GRADCLUST_INLINE float to_f32(float x) { return x; }
GRADCLUST_INLINE float to_f32(bf16_t x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
GRADCLUST_INLINE float to_f32(f16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | (mantissa << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // subnormal: mantissa · 2⁻²⁴, exact in float32
    float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
#endif
}

template <typename A, typename B> constexpr bool Same = false;
template <typename A> constexpr bool Same<A, A> = true;

// Accumulator type of an input type: float64 accumulates in float64, everything else in float32.
template <typename in_t> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename in_t> using acc_t = typename Accumulator<in_t>::type;

template <typename in_t> GRADCLUST_INLINE acc_t<in_t> load(in_t x) { return to_f32(x); }
template <> inline __attribute__((always_inline)) double load<double>(double x) { return x; }

// Vectors of the widest kind this instruction set has.
template <typename T> struct Vector;
template <> struct Vector<float> {
  typedef float type __attribute__((vector_size(GRADCLUST_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(GRADCLUST_VECTOR_BYTES), aligned(4), may_alias));
};
template <> struct Vector<double> {
  typedef double type __attribute__((vector_size(GRADCLUST_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(GRADCLUST_VECTOR_BYTES), aligned(8), may_alias));
};
template <> struct Vector<bf16_pair> {
  typedef uint32_t type __attribute__((vector_size(GRADCLUST_VECTOR_BYTES)));
  typedef uint32_t loose __attribute__((vector_size(GRADCLUST_VECTOR_BYTES), aligned(4), may_alias));
};
template <typename T> using vec_t = typename Vector<T>::type;
template <typename T> constexpr int LANES = GRADCLUST_VECTOR_BYTES / int(sizeof(T));

template <typename T> GRADCLUST_INLINE vec_t<T> load_vec(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(p);
}
template <typename T> GRADCLUST_INLINE void store_vec(T* p, vec_t<T> v) {
  *reinterpret_cast<typename Vector<T>::loose*>(p) = v;
}
// Lanes are added in a fixed order: the same bits on every run.
template <typename T> GRADCLUST_INLINE T sum_lanes(vec_t<T> v) {
  T sum = 0;
  for (int lane = 0; lane < LANES<T>; ++lane) sum += v[lane];
  return sum;
}

// Calls fn(in_t{}) with the element type of a dtype code.
template <typename Fn> GRADCLUST_INLINE void dispatch(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32: fn(float{}); break;
    case DType::f64: fn(double{}); break;
    case DType::bf16: fn(bf16_t{}); break;
    case DType::f16: fn(f16_t{}); break;
  }
}

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
