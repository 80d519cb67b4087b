// The CUDA kernels' bindings over the emulator, and a kernel with mistakes that the emulator must notice.
#include "bindings_cuda.cpp"  // in one translation unit: pybind11's headers take longer to compile than all kernels
#include "common.cuh"
#include "grid.cuh"
#include "ptx.h"

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
  m.def("neighbours", [](uintptr_t in, uintptr_t between, uintptr_t out, unsigned blocks, int fault) {
    const char* error = gradclust::launch_cooperative(
        "neighbours_kernel", "test", neighbours_kernel, blocks, 32, 0, nullptr, reinterpret_cast<const float*>(in),
        reinterpret_cast<float*>(between), reinterpret_cast<float*>(out), fault);
    if (error) throw std::runtime_error(error);
  });
}
