// Every instruction that CUDA C++ has no name for: asynchronous copies and their barriers, matrix loads, tensor-core
// products.
// Compiled for the CPU (tests/cuda_on_host) the same functions come from ptx_on_host.h.
#pragma once
#if defined(GRADCLUST_ON_HOST)
#include "ptx_on_host.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace gradclust {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return unsigned(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, both aligned; those past the first `bytes` are zeros and not read.
__device__ __forceinline__ void copy_16(void* target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `but` of this thread's committed groups are under way.
template <int but> __device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(but) : "memory");
}

// Bulk tensor copies, from sm_90 on. One thread opens a barrier, orders what the block did before (fence_bulk_copies),
// says how many bytes will come and starts the copies; every thread that reads them waits for the barrier's phase.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool BULK_COPIES = true;
#else
constexpr bool BULK_COPIES = false;
#endif
__device__ __forceinline__ void open_barrier(uint64_t* barrier) {  // a phase is one arrival and the bytes it expects
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void close_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Shared memory, barriers included, as this thread knows it before: bulk copies started after see it so.
__device__ __forceinline__ void fence_bulk_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Returns once the phase of this parity (0 for a barrier's first, then in turn) is over.
__device__ __forceinline__ void wait_for_phase(uint64_t* barrier, unsigned parity) {
  unsigned over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}
// The map's box at these coordinates → target (128-byte aligned); what lies outside of the tensor is zeros.
__device__ __forceinline__ void copy_box(void* target, const CUtensorMap& map, const int (&at)[5], uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(shared_address(target)), "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]),
      "r"(at[3]), "r"(at[4])
      : "memory");
}

// Four 8×8 matrices of 16-bit numbers, transposed: lanes 8i … 8i+7 give the addresses of matrix i's rows.
__device__ __forceinline__ void load_transposed(unsigned (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row)));
}

// sum [16, 8] += a [16, 16] · b [16, 8] of 16-bit numbers.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum [16, 8] += a [16, 8] · b [8, 8] of numbers rounded by round_to_tf32.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// sum [8, 8] += a [8, 4] · b [4, 8]: a lane holds a[lane / 4][lane % 4], b[lane % 4][lane / 4], and of the sum row lane / 4,
// columns 2 · (lane % 4) and the next.
__device__ __forceinline__ void multiply_add(double (&sum)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sum[0]), "+d"(sum[1])
      : "d"(a), "d"(b));
}
__device__ __forceinline__ unsigned round_to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Every thread of a cooperative launch meets every other; what they wrote before is seen after. `arrived` is 0 before the
// launch and goes on counting blocks.
__device__ __forceinline__ void wait_for_grid(uint64_t* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint64_t before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;" : "=l"(before) : "l"(arrived) : "memory");
    uint64_t goal = before - before % gridDim.x + gridDim.x;
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(arrived) : "memory");
    } while (now < goal);
  }
  __syncthreads();
}

}  // namespace gradclust
#endif
