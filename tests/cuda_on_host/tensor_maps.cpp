// The tensor maps of tensor_maps.h.
#include "tensor_maps.h"

#include <cstring>

namespace {

// What a map holds here; the driver's own is opaque too.
struct Map {
  const unsigned char* data;
  int64_t extent[5], stride[4];
  uint8_t box_less_one[5], step[5], swizzle, magic;  // a box may have 256 elements a dimension
  int64_t box(int i) const { return box_less_one[i] + 1; }
  int64_t count(int i) const { return i == 0 ? box(0) : (box(i) + step[i] - 1) / step[i]; }
};
constexpr uint8_t MAGIC = 0x5a;
static_assert(sizeof(Map) <= sizeof(CUtensorMap), "");

Map read(const CUtensorMap& map) {
  Map m;
  memcpy(&m, &map, sizeof m);
  return m;
}

int capability = 9;
bool encodes = true;

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool good = encodes && type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && rank == 5 &&
              reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  Map m{static_cast<const unsigned char*>(address), {}, {}, {}, {}, uint8_t(swizzle), MAGIC};
  for (int i = 0; i < 5 && good; ++i) {
    good = extents[i] > 0 && extents[i] <= uint64_t(1) << 32 && box[i] > 0 && box[i] <= 256 && steps[i] > 0 && steps[i] <= 8;
    m.extent[i] = int64_t(extents[i]), m.box_less_one[i] = uint8_t(box[i] - 1), m.step[i] = uint8_t(steps[i]);
    if (i == 4) break;
    good = good && strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
    m.stride[i] = int64_t(strides[i]);
  }
  unsigned line = box[0] * 2;
  // A line shorter than the swizzle's span is legal, but where its rows would lie is not told.
  good = good && line % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || line == 16u << swizzle);
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map, &m, sizeof m);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = capability;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  bool found = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *status = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

namespace emulator {

void set_device(int major, bool with_maps) { capability = major, encodes = with_maps; }

size_t box_bytes(const CUtensorMap& map) {
  Map m = read(map);
  int64_t bytes = 2;
  for (int i = 0; i < 5; ++i) bytes *= m.count(i);
  return size_t(bytes);
}

const char* box_fault(const CUtensorMap& map, const void* target) {
  if (read(map).magic != MAGIC) return "a bulk copy by a tensor map that was never made";
  if (reinterpret_cast<uintptr_t>(&map) % 64) return "a bulk copy by a tensor map that is not 64-byte aligned";
  if (reinterpret_cast<uintptr_t>(target) % 128) return "a bulk copy to an address that is not 128-byte aligned";
  return nullptr;
}

void read_box(const CUtensorMap& map, const int (&at)[5], unsigned char* target) {
  Map m = read(map);
  uintptr_t swizzle = m.swizzle ? (uintptr_t(16) << m.swizzle) - 16 : 0;
  size_t units = box_bytes(map) / 16, line_units = size_t(m.box(0)) / 8;
  for (size_t unit = 0; unit < units; ++unit) {
    // Eight elements of a line; a dimension's k-th is at the coordinate at + k · step.
    int64_t rest = int64_t(unit / line_units), from = 0;
    bool inside = true;
    for (int i = 1; i < 5; ++i) {
      int64_t coordinate = at[i] + rest % m.count(i) * m.step[i];
      rest /= m.count(i);
      inside = inside && coordinate >= 0 && coordinate < m.extent[i];
      from += coordinate * m.stride[i - 1];
    }
    uintptr_t address = reinterpret_cast<uintptr_t>(target) + unit * 16;
    auto* to = reinterpret_cast<uint16_t*>(address ^ (address >> 3 & swizzle));
    for (int64_t j = 0; j < 8; ++j) {
      int64_t first = at[0] + int64_t(unit % line_units) * 8 + j;
      to[j] = 0;
      if (inside && first >= 0 && first < m.extent[0]) memcpy(&to[j], m.data + from + first * 2, 2);
    }
  }
}

}  // namespace emulator
