// The primitives of a GPU that the row kernels use, other than arithmetic: memory, synchronisation,
// clusters. Tests replace this file by tests/cuda_on_cpu/cuda_on_cpu.h, which defines the same
// names, and run the kernels on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "launching.h"

namespace fused_kd {

struct alignas(16) Bits16 {
  uint32_t x, y, z, w;
};
struct alignas(8) Bits8 {
  uint32_t x, y;
};

// ------------------------------------------------------------------------------ memory, numbers

__device__ __forceinline__ Bits16 load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}

// The same if the caller uses only a part: in place, other threads may be writing the rest.
__device__ __forceinline__ Bits16 load16_in_part(const void* p) { return load16(p); }

// Streaming store: a gradient is not read again and must not evict rows from L2.
__device__ __forceinline__ void store16(void* p, Bits16 v) {
  __stcs(static_cast<uint4*>(p), make_uint4(v.x, v.y, v.z, v.w));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float from_bf16(uint32_t low16) { return __uint_as_float(low16 << 16); }

__device__ __forceinline__ float from_f16(uint32_t low16) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(static_cast<uint16_t>(low16)));
  return y;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#else
  auto round = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
#endif
}

__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint16_t l, h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
  return l | static_cast<uint32_t>(h) << 16;
}

// ---------------------------------------------------------------------------------- one block

__device__ __forceinline__ float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

__device__ __forceinline__ uint32_t shuffle(uint32_t v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

__device__ __forceinline__ bool warp_any(bool v) { return __any_sync(0xffffffffu, v); }

// Returns the maximum over a warp, in every lane; no value may be NaN.
__device__ __forceinline__ float warp_max(float v) {
#if __CUDA_ARCH__ >= 800
  // as integers, which have the same order
  const int bits = __float_as_int(v), ordered = bits ^ (bits >> 31 & 0x7fffffff);
  const int most = __reduce_max_sync(0xffffffffu, ordered);
  return __int_as_float(most ^ (most >> 31 & 0x7fffffff));
#else
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
#endif
}

__device__ __forceinline__ void block_sync() { __syncthreads(); }

// Sets bits of a word in shared memory; several threads may do so at once.
__device__ __forceinline__ void set_bits(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }

// Returns the dynamic shared memory of this block; the kernels use no other.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
}

// ------------------------------------------------------------------------ blocks of one launch

__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
  return atomicAdd(counter, 1u);
}

// Release: writes made before this call, by this thread or by threads that it has synchronised
// with, are visible to any thread that has waited for the counter.
__device__ __forceinline__ void arrive(uint32_t* counter) {
  __threadfence();
  atomicAdd(counter, 1u);
}

__device__ __forceinline__ void wait_until(const uint32_t* counter, uint32_t target) {
  while (*static_cast<const volatile uint32_t*>(counter) < target) {
#if __CUDA_ARCH__ >= 700
    __nanosleep(20);
#endif
  }
  __threadfence();
}

// ------------------------------------------------------- blocks of one cluster (sm_90 and later)

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t y;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(y));
  return y;
}

__device__ __forceinline__ uint32_t cluster_blocks() {
  uint32_t y;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(y));
  return y;
}

// Called once by every thread of a cluster. Relaxed: after the wait, only barriers that were
// initialised before it are visible, not other writes.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The only arrival of a phase, which completes when `bytes` have arrived too.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Bulk copy; both addresses and the size are multiples of 16 bytes. Evicted first from L2, since
// each logit is read once.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  uint64_t evict_first;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)),
      "l"(evict_first)
      : "memory");
}

__device__ __forceinline__ uint32_t peer_address(const void* shared, uint32_t rank) {
  uint32_t y;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(y)
               : "r"(shared_address(shared)), "r"(rank));
  return y;
}

// Stores to the same address in block `rank` of this cluster, whose barrier counts the bytes. The
// barrier must be initialised, and the block must wait for it.
__device__ __forceinline__ void push(void* shared, Bits16 v, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
      " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(peer_address(shared, rank)),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(peer_address(barrier, rank))
      : "memory");
}

__device__ __forceinline__ void push(void* shared, Bits8 v, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32"
      " [%0], {%1, %2}, [%3];" ::"r"(peer_address(shared, rank)),
      "r"(v.x), "r"(v.y), "r"(peer_address(barrier, rank))
      : "memory");
}

// Waits until a phase is complete: its bytes are copied, or stored by other blocks.
#define FUSED_KD_BARRIER_WAIT(SCOPE)       \
  asm volatile(                            \
      "{\n"                                \
      ".reg .pred done;\n"                 \
      "again:\n"                           \
      "mbarrier.try_wait.parity" SCOPE     \
      ".shared::cta.b64 done, [%0], %1;\n" \
      "@done bra finished;\n"              \
      "bra again;\n"                       \
      "finished:\n"                        \
      "}" ::"r"(shared_address(barrier)),  \
      "r"(parity)                          \
      : "memory")

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  FUSED_KD_BARRIER_WAIT("");
}

__device__ __forceinline__ void barrier_wait_for_peers(uint64_t* barrier, uint32_t parity) {
  FUSED_KD_BARRIER_WAIT(".acquire.cluster");
}

#endif

}  // namespace fused_kd
