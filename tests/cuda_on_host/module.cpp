// The CUDA kernels' bindings over the emulator, and a kernel with mistakes that the emulator must notice.
#include "bindings_cuda.cpp"  // in one translation unit: pybind11's headers take longer to compile than all kernels
#include "common.cuh"
#include "grid.cuh"
#include "ptx.h"
#include "tensor_map.cuh"

namespace {

enum Fault { none, no_barrier, no_wait, overrun, split_warp, lone_barrier, early_exit };

// out[i] = in[n − 1 − i] through shared memory, by 16-byte asynchronous copies.
void reverse_kernel(const float* in, float* out, int fault) {
  GRADCLUST_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  int i = int(threadIdx.x), n = int(blockDim.x);
  if (fault == early_exit && i == 5) return;
  if (4 * i < n) gradclust::copy_16(values + 4 * i, in + 4 * i, 16);
  gradclust::commit_copies();
  if (fault != no_wait) gradclust::wait_for_copies<0>();
  if (fault == overrun && i == 0) values[n] = 1;
  if (fault == split_warp && i % 2) __shfl_xor_sync(~0u, i, 1);
  if (fault == lone_barrier && i < 32) __syncthreads();
  if (fault != no_barrier) __syncthreads();
  out[i] = values[n - 1 - i];
}

// out[i] = in[i − 1], where in[i] comes from the block before: blocks wait for each other.
void neighbours_kernel(const float* in, float* between, float* out, int fault) {
  if (fault == early_exit && blockIdx.x == 1) return;
  between[blockIdx.x * blockDim.x + threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (fault != no_barrier) gradclust::wait_for_grid(nullptr);
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  out[i] = between[(i + n - 1) % n];
}

enum BulkFault {
  right, unwaited, same_parity, other_parity, too_few_bytes, too_many_bytes, unfenced, unopened, opened_twice,
  written_over, misaligned, past_the_end, overlapping, unread, closed_early, arrives_twice
};
using Corner = std::array<int, 5>;

// Two boxes after each other through the same memory: out [2, box].
void boxes_kernel(const CUtensorMap map, std::array<Corner, 2> corner, int bytes, int fault, uint16_t* out) {
  using namespace gradclust;
  GRADCLUST_SHARED(memory);
  auto* barrier = reinterpret_cast<uint64_t*>(memory + bytes);
  bool first = threadIdx.x == 0;
  if (first && fault != unopened) open_barrier(barrier);
  if (first && fault == opened_twice) open_barrier(barrier);
  __syncthreads();
  if (first && fault == written_over) *barrier = 0;
  for (int i = 0; i < 2; ++i) {
    if (first) {
      if (fault != unfenced) fence_bulk_copies();
      expect_bytes(barrier, unsigned(bytes + (fault == too_many_bytes) * 16 - (fault == too_few_bytes) * 16));
      if (fault == arrives_twice) expect_bytes(barrier, 0);
      int at[5];
      for (int j = 0; j < 5; ++j) at[j] = corner[size_t(i)][size_t(j)];
      unsigned char* target = memory + (fault == misaligned) * 16 + (fault == past_the_end) * 1024;
      copy_box(target, map, at, barrier);
      if (fault == overlapping) copy_box(target, map, at, barrier);
      if (fault == closed_early) close_barrier(barrier);
    }
    if (fault != unwaited && !(fault == unread && i == 1))
      wait_for_phase(barrier, unsigned(fault == same_parity ? 0 : fault == other_parity ? 1 - i : i));
    for (int j = int(threadIdx.x); j < bytes / 2; j += int(blockDim.x))
      out[i * bytes / 2 + j] = reinterpret_cast<const uint16_t*>(memory)[j];
    if (fault != overlapping) __syncthreads();
  }
  if (first && fault != unwaited && fault != unread) close_barrier(barrier);
}

}  // namespace

PYBIND11_MODULE(_cuda_on_host, m) {
  bind_cuda(m);
  m.def("set_order", &emulator::set_order);
  m.def("reverse", [](uintptr_t in, uintptr_t out, unsigned n, int fault) {
    const char* error =
        gradclust::launch("reverse_kernel", "test", reverse_kernel, 1, n, 4 * n, nullptr,
                          reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), fault);
    if (error) throw std::runtime_error(error);
  });
  m.def("set_device", &emulator::set_device);
  using Extents = std::array<int64_t, 5>;
  m.def("boxes", [](uintptr_t in, Extents extent, Extents stride, Extents count, Extents step, int line,
                    std::array<Corner, 2> corner, uintptr_t out, int fault) {
    CUtensorMap map{};
    gradclust::BoxDimension dimension[5];
    for (size_t i = 0; i < 5; ++i) dimension[i] = {extent[i], stride[i], count[i], step[i]};
    if (!gradclust::make_tensor_map(map, reinterpret_cast<const void*>(in), line, dimension)) return false;
    int bytes = int(emulator::box_bytes(map));
    const char* error = gradclust::launch("boxes_kernel", "test", boxes_kernel, 1, 64, size_t(bytes) + 8, nullptr, map,
                                          corner, bytes, fault, reinterpret_cast<uint16_t*>(out));
    if (error) throw std::runtime_error(error);
    return true;
  });
  m.def("neighbours", [](uintptr_t in, uintptr_t between, uintptr_t out, unsigned blocks, int fault) {
    const char* error = gradclust::launch_cooperative(
        "neighbours_kernel", "test", neighbours_kernel, blocks, 32, 0, nullptr, reinterpret_cast<const float*>(in),
        reinterpret_cast<float*>(between), reinterpret_cast<float*>(out), fault);
    if (error) throw std::runtime_error(error);
  });
}
