// The tensor maps of bulk copies (sm_90 and later), made on the host: 16-bit numbers, five dimensions, the first dense.
//
// The driver's function that encodes one is looked up at run time, so nothing is linked against the driver and a machine
// without it imports the module all the same. A map goes to the kernel as part of a __grid_constant__ parameter: a
// captured graph keeps its own copy.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gradclust {

// Dimension i of a tensor: its extent, elements from one to the next, and how many a box takes, `step` apart.
struct BoxDimension { int64_t extent, stride, count, step; };

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or nullptr where it has none.
inline EncodeTensorMap tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  if (error != cudaSuccess) cudaGetLastError();  // a missing function is no error of the kernels launched next
  bool good = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
  return good ? reinterpret_cast<EncodeTensorMap>(found) : nullptr;
}

// Whether the current device has bulk tensor copies.
inline bool device_copies_in_bulk() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// A map whose boxes are lines of `line_bytes` (16, 32, 64 or 128) of the first dimension, with the units of 16 bytes
// swizzled over the line. False where the tensor breaks one of the driver's rules, or the driver has no maps.
inline bool make_tensor_map(CUtensorMap& map, const void* data, int line_bytes, const BoxDimension (&dimension)[5]) {
  static const EncodeTensorMap encode = tensor_map_encoder();
  if (!encode) return false;
  cuuint64_t extent[5], stride[4];
  cuuint32_t box[5], step[5];
  for (int i = 0; i < 5; ++i) {
    const BoxDimension& d = dimension[i];
    if (d.count * d.step > 256 || d.step > 8 || d.extent >= int64_t(1) << 31) return false;
    extent[i] = cuuint64_t(d.extent), box[i] = cuuint32_t(d.count * d.step), step[i] = cuuint32_t(d.step);
    if (i == 0) continue;
    // One element is never stepped over, whatever its stride; an expanded dimension (stride 0) has no place in a map.
    int64_t bytes = d.extent > 1 ? d.stride * 2 : i > 1 ? int64_t(stride[i - 2]) : (dimension[0].extent * 2 + 15) / 16 * 16;
    if (bytes <= 0 || bytes % 16 || bytes >= int64_t(1) << 40) return false;
    stride[i - 1] = cuuint64_t(bytes);
  }
  CUtensorMapSwizzle swizzle = line_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                               : line_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                               : line_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                  : CU_TENSOR_MAP_SWIZZLE_NONE;
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(data), extent, stride, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace gradclust
