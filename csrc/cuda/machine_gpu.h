// The machine as a GPU. The functions for clusters and for the copy engine are instructions of sm_90 and newer; a
// kernel that uses them is empty for older targets, and its launcher refuses such a device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/number.h"

#define FASTSEQ_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FASTSEQ_PARAMETER __grid_constant__
#define FASTSEQ_DEVICE __device__ __forceinline__
#define FASTSEQ_UNROLLED _Pragma("unroll")
#define FASTSEQ_ROLLED _Pragma("unroll 1")

namespace fastseq::cuda::machine {

using Words4 = uint4;
using Floats4 = float4;
using Floats2 = float2;

FASTSEQ_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FASTSEQ_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FASTSEQ_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
FASTSEQ_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }

FASTSEQ_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

FASTSEQ_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// e^x and 1 / x by the special function unit: their error meets values that are at most 1 in what is made of them.
FASTSEQ_DEVICE float exponential(float x) { return __expf(x); }
FASTSEQ_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }

FASTSEQ_DEVICE void block_barrier() { __syncthreads(); }
// Two warps that share a barrier of the block; barrier 0 is the whole block's.
FASTSEQ_DEVICE void pair_barrier(int pair) {
  asm volatile("bar.sync %0, %1;" ::"r"(pair + 1), "n"(kParts * kLanes) : "memory");
}

// Brings the lanes of a warp together again, which the instructions marked "aligned" below take for granted.
FASTSEQ_DEVICE void warp_barrier() { __syncwarp(); }

FASTSEQ_DEVICE std::uint32_t shuffle(std::uint32_t word, int lane) { return __shfl_sync(0xffffffffu, word, lane); }
FASTSEQ_DEVICE std::uint32_t shuffle_xor(std::uint32_t word, int mask) {
  return __shfl_xor_sync(0xffffffffu, word, mask);
}

// sums += left * right, one product of 16 x 8 x 16; the fragments are placed as layout.h says.
template <typename Number>
FASTSEQ_DEVICE void multiply(float (&sums)[4], const Words4& left, std::uint32_t right0, std::uint32_t right1);
template <>
FASTSEQ_DEVICE void multiply<Bfloat16>(float (&d)[4], const Words4& a, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
template <>
FASTSEQ_DEVICE void multiply<Float16>(float (&d)[4], const Words4& a, std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of half type from shared memory; each lane names one row of 16 bytes.
FASTSEQ_DEVICE Words4 load_matrices(const void* row) {
  Words4 m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
               : "r"(shared_address(row))
               : "memory");
  return m;
}

// A load that no other thread's store of this launch can follow: input of the kernel, possibly cached for good.
template <typename T>
FASTSEQ_DEVICE T load_constant(const T* p) {
  return __ldg(p);
}

FASTSEQ_DEVICE int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// The barrier of all threads of the cluster in two halves. What a thread stored before it arrived, to any block's
// shared memory, is seen by every thread that has waited.
FASTSEQ_DEVICE void cluster_arrive() {
  warp_barrier();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
FASTSEQ_DEVICE void cluster_wait() {
  warp_barrier();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

FASTSEQ_DEVICE std::uint32_t remote_address(const void* mine, int rank) {
  std::uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(rank));
  return address;
}

// Stores to where `mine` is in the shared memory of another block of the cluster.
FASTSEQ_DEVICE void store_remote(void* mine, int rank, const Words4& v) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(remote_address(mine, rank)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
FASTSEQ_DEVICE void store_remote(void* mine, int rank, const Floats2& v) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote_address(mine, rank)), "f"(v.x), "f"(v.y)
               : "memory");
}

// A barrier in shared memory that the copy engine completes: one arrival, which tells how many bytes will come.
FASTSEQ_DEVICE void copy_barrier_init(std::uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Makes the barriers known to the copy engine; a barrier of the block must follow.
FASTSEQ_DEVICE void copy_barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTSEQ_DEVICE void copy_barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
FASTSEQ_DEVICE void copy_barrier_wait(std::uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// The copy engine: addresses and bytes are multiples of 16.
FASTSEQ_DEVICE void bulk_copy(void* to, const void* from, std::uint32_t bytes, std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Global memory that blocks of one launch write for each other, by ordinary loads and stores: who has seen a signal, or
// meets who has at a barrier of the block, sees what was stored before it was raised. No load may be `__ldg` or
// `__ldcg`, which the compiler takes to depend on the address alone.
FASTSEQ_DEVICE Words4 load_published(const Words4* p) { return *p; }
template <typename Bits>
FASTSEQ_DEVICE void store_published(Bits* p, Bits value) {
  *p = value;
}
// Raises a signal: who has seen it sees what the threads of this block stored before the barrier of the block that has
// to come before.
FASTSEQ_DEVICE void publish(std::uint32_t* signal, std::uint32_t value) {
  __threadfence();
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(signal)), "r"(value) : "memory");
}
FASTSEQ_DEVICE void await(const std::uint32_t* signal, std::uint32_t value) {
  std::uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(found)
                 : "l"(__cvta_generic_to_global(signal))
                 : "memory");
  } while (found < value);
}

}  // namespace fastseq::cuda::machine
