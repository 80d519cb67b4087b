// csrc/cuda/ptx.h on the CPU, by the fragment layouts of the PTX manual (sections "ldmatrix" and "mma.m16n8k16", "…k8").
#pragma once
#include "../emulator.h"

namespace gradclust {

inline void copy_16(void* target, const void* source, int bytes) {
  emulator::copy_later(target, source, size_t(bytes), size_t(16 - bytes));
}
inline void commit_copies() { emulator::close_group(); }
template <int but> void wait_for_copies() { emulator::finish_groups(but); }

constexpr bool BULK_COPIES = true;
using emulator::close_barrier;
using emulator::expect_bytes;
using emulator::fence_bulk_copies;
using emulator::open_barrier;
using emulator::wait_for_phase;
inline void copy_box(void* target, const CUtensorMap& map, const int (&at)[5], uint64_t* barrier) {
  emulator::copy_box_later(target, map, at, barrier);
}

inline void load_transposed(unsigned (&matrix)[4], const void* row) {
  emulator::Lanes& all = emulator::meet(~0u, 3, &row, sizeof row);
  unsigned lane = emulator::lane();
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      const uint16_t* address;
      memcpy(&address, all.bytes[8 * i + lane % 4 * 2 + j], sizeof address);
      pair[j] = address[lane / 4];
    }
    memcpy(&matrix[i], pair, 4);
  }
}

struct Fragments { unsigned a[4], b[2]; };

inline float element(unsigned word, unsigned half, __nv_bfloat16) {
  return __bfloat162float({uint16_t(word >> (16 * half))});
}
inline float element(unsigned word, unsigned half, __half) { return __half2float({uint16_t(word >> (16 * half))}); }

// Row r of a and column c of b lie in the lanes 4·(r % 8) … and 4·c …; `fragment` holds what those lanes gave.
template <typename in_t> float product(const Fragments* a, const Fragments* b, unsigned upper) {
  float sum = 0;
  for (unsigned k = 0; k < 16; ++k) {
    unsigned from = k % 8 / 2, half = k % 2, late = k / 8;
    sum += element(a[from].a[upper + 2 * late], half, in_t{}) * element(b[from].b[late], half, in_t{});
  }
  return sum;
}
template <> inline float product<float>(const Fragments* a, const Fragments* b, unsigned upper) {
  float sum = 0;
  for (unsigned k = 0; k < 8; ++k) {
    float x, y;
    memcpy(&x, &a[k % 4].a[upper + 2 * (k / 4)], 4), memcpy(&y, &b[k % 4].b[k / 4], 4);
    sum += x * y;
  }
  return sum;
}

template <typename in_t>
inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, in_t) {
  Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all[32];
  emulator::Lanes& lanes = emulator::meet(~0u, 4, &mine, sizeof mine);
  for (unsigned i = 0; i < 32; ++i) memcpy(&all[i], lanes.bytes[i], sizeof mine);
  unsigned row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) sum[i] += product<in_t>(all + 4 * row, all + 4 * (column + i % 2), i / 2);
}

inline void multiply_add(double (&sum)[2], double a, double b) {
  double mine[2] = {a, b}, all[32][2];
  emulator::Lanes& lanes = emulator::meet(~0u, 5, mine, sizeof mine);
  for (unsigned i = 0; i < 32; ++i) memcpy(all[i], lanes.bytes[i], sizeof mine);
  unsigned row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  for (unsigned i = 0; i < 2; ++i)
    for (unsigned k = 0; k < 4; ++k) sum[i] += all[4 * row + k][0] * all[4 * (column + i) + k][1];
}

inline void wait_for_grid(uint64_t*) { emulator::grid_barrier(); }

inline unsigned round_to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (std::isfinite(x)) bits += 0x1000;  // to nearest, ties away from zero
  return bits & ~0x1fffu;
}

}  // namespace gradclust
