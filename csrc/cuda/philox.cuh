// The counter-based generator of random matrices and visiting orders.
#pragma once
#include "common.cuh"

namespace gradclust {

// Philox4x32-10 (Salmon et al. 2011), Random123's constants.
__device__ inline uint4 philox4x32(uint4 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int turn = 0; turn < 10; ++turn) {
    uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = uint4{high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace gradclust
