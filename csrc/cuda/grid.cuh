// Launches whose blocks are all resident, so that they can wait for each other (wait_for_grid in ptx.h).
#pragma once
#include <algorithm>

#include "common.cuh"
#include "ptx.h"

namespace gradclust {

// Queues a kernel with as many blocks as are useful and fit the device together. A cooperative launch: the device starts
// all blocks or none, also in a captured graph. Returns nullptr, or an error that names the kernel and its sizes.
template <typename... Parameters, typename... Arguments>
const char* launch_cooperative(const char* name, const char* sizes, void (*kernel)(Parameters...), int64_t useful,
                               unsigned threads, size_t shared_bytes, void* stream, Arguments... arguments) {
#if defined(GRADCLUST_ON_HOST)
  (void)stream;
  dim3 grid(unsigned(std::min<int64_t>(useful, emulator::RESIDENT_BLOCKS)));
  const char* error = emulator::run(grid, threads, shared_bytes, [&] { kernel(arguments...); }, true);
  return error ? named_error(name, sizes, error) : nullptr;
#else
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(threads), shared_bytes);
  if (error == cudaSuccess && blocks == 0) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) {
    cudaLaunchAttribute cooperative = {};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(std::min<int64_t>(useful, int64_t(multiprocessors) * blocks)));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cooperative;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  }
  return error == cudaSuccess ? nullptr : named_error(name, sizes, cudaGetErrorString(error));
#endif
}

}  // namespace gradclust
