// Enough of CUDA on a CPU to run the kernels of csrc/cuda in tests: every thread of a block is a fiber that runs until its
// next barrier, shuffle or matrix product, blocks come one after the other, and both in an order that the test picks. A
// missing barrier then reads what no thread has written yet: shared memory and the targets of asynchronous copies are
// filled with NaN first. Bulk copies arrive only when no thread can go on without them. What a warp does together must be
// done by all of its lanes, or the launch fails and says so.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "tensor_maps.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) double2 { double x, y; };
using std::max;
using std::min;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline float __half2float(__half x) {
  int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                              : std::ldexp(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
  return x.bits >> 15 ? -size : size;
}

namespace emulator {

constexpr unsigned RESIDENT_BLOCKS = 3;  // of a cooperative launch

// One launch; the blocks of a cooperative one take turns, so that they can wait for each other. Returns nullptr, or what
// the kernel did that a GPU would not forgive.
const char* run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel,
                bool cooperative = false);

// 0: threads and blocks ascending, 1: descending, else shuffled.
void set_order(unsigned seed);

unsigned char* shared_memory();
void barrier();
void grid_barrier();

// What every lane of the warp gave in one collective; valid until the next one. `kind` tells collectives apart.
struct Lanes { unsigned char bytes[32][48]; };
Lanes& meet(unsigned mask, int kind, const void* mine, size_t size);
unsigned lane();

void copy_later(void* target, const void* source, size_t bytes, size_t zeros);
void close_group();
void finish_groups(int but);

// Barriers in shared memory, of one arrival and the bytes it expects a phase, and the bulk copies that bring those.
void open_barrier(uint64_t* barrier);
void close_barrier(uint64_t* barrier);
void fence_bulk_copies();
void expect_bytes(uint64_t* barrier, unsigned bytes);
void wait_for_phase(uint64_t* barrier, unsigned parity);
void copy_box_later(void* target, const CUtensorMap& map, const int (&at)[5], uint64_t* barrier);

template <typename T> T shuffle(unsigned mask, T value, unsigned from) {
  T result;
  memcpy(&result, meet(mask, 1, &value, sizeof value).bytes[from & 31], sizeof result);
  return result;
}

}  // namespace emulator

extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::meet(mask, 0, nullptr, 0); }
inline void __threadfence() {}
template <typename T> T __shfl_sync(unsigned mask, T value, int from) { return emulator::shuffle(mask, value, unsigned(from)); }
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int step) {
  return emulator::shuffle(mask, value, emulator::lane() ^ unsigned(step));
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  emulator::Lanes& all = emulator::meet(mask, 2, &vote, sizeof vote);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) {
    int other;
    memcpy(&other, all.bytes[i], sizeof other);
    bits |= unsigned(other != 0) << i;
  }
  return bits;
}
template <typename T> T __ldg(const T* address) { return *address; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T> T atomicMin(T* address, T value) {
  T before = *address;
  *address = std::min(before, value);
  return before;
}
template <typename T> T atomicAdd(T* address, T value) {  // one fiber runs at a time
  T before = *address;
  *address = before + value;
  return before;
}
