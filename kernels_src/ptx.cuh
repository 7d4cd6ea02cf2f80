// PTX, wrapped once. Names follow the instructions. Everything here exists from sm_80 on unless it says otherwise.
#pragma once

#ifdef __CUDA_ARCH__
#define PERK_ARCH __CUDA_ARCH__
#else
#define PERK_ARCH 0
#endif

namespace ptx {

// ---- addresses and coordinates ----

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void *shared_pointer(uint32_t address) { return __cvta_shared_to_generic(address); }
// Of the block's dynamic shared memory.
__device__ __forceinline__ uint32_t dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    return shared_address(shared_memory);
}
// The number of the thread in its block, read anew.
__device__ __forceinline__ uint32_t thread_number() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// The compiler knows nothing of the value any more.
__device__ __forceinline__ void forget(uint32_t &value) { asm volatile("" : "+r"(value)); }

// ---- memory ----

struct alignas(16) Vec16 {
    uint32_t x, y, z, w;
};
// A word that is there when all of them are.
template <uint32_t kCount>
__device__ __forceinline__ uint32_t word_of(const Vec16 (&values)[kCount]) {
    uint32_t word = 0;
#pragma unroll
    for (uint32_t i = 0; i < kCount; i++) word |= values[i].w;
    return word;
}

__device__ __forceinline__ uint2 load_shared8(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ void store_shared8(uint32_t address, uint2 value) {
    asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}
__device__ __forceinline__ Vec16 load_shared16(uint32_t address) {
    Vec16 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
// Four matrices of 8 rows of 16 bytes: lane i has the address of row i % 8 of matrix i / 8, and gets of row i / 4 of
// each the word i % 4.
__device__ __forceinline__ Vec16 load_matrices(uint32_t address) {
    Vec16 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
__device__ __forceinline__ void store_shared4(uint32_t address, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared16(uint32_t address, Vec16 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
// Sets bits, whoever else sets some in the same word.
__device__ __forceinline__ void or_shared4(uint32_t address, uint32_t bits) {
    asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
}

// Adds, whoever else adds to the same word; returns what was there.
__device__ __forceinline__ uint32_t add_shared4(uint32_t address, uint32_t amount) {
    uint32_t v;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(v) : "r"(address), "r"(amount) : "memory");
    return v;
}

// Data that another SM writes in this launch: served by L2, never by a stale line of L1.
__device__ __forceinline__ Vec16 load_coherent16(const void *pointer) {
    Vec16 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(pointer)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_coherent8(const void *pointer) {
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(pointer) : "memory");
    return v;
}
__device__ __forceinline__ uint32_t load_coherent4(const void *pointer) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
    return v;
}
__device__ __forceinline__ uint16_t load_coherent2(const void *pointer) {
    uint16_t v;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(pointer) : "memory");
    return v;
}

// Values that others may look at before a fence has ordered them: eager ones (abi.h).
__device__ __forceinline__ void store_eager2(void *pointer, uint16_t v) {
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(pointer), "h"(v) : "memory");
}
__device__ __forceinline__ void store_eager4(void *pointer, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}
// The larger of each two halves.
__device__ __forceinline__ uint32_t max_halves(uint32_t a, uint32_t b) {
#if PERK_ARCH >= 900
    uint32_t v;
    asm("max.u16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
#else
    return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16;
#endif
}

// The same data where it is read more than once: through L1. Right only after an acquire that follows the write.
__device__ __forceinline__ Vec16 load_cached16(const void *pointer) {
    Vec16 v;
    asm volatile("ld.global.ca.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(pointer)
                 : "memory");
    return v;
}

// Data that no one writes during the launch.
__device__ __forceinline__ Vec16 load_constant16(const void *pointer) {
    Vec16 v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
    return v;
}

// ---- counters in global memory ----

__device__ __forceinline__ uint32_t load_acquire_gpu(const uint32_t *pointer) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
    return v;
}
__device__ __forceinline__ void add_release_gpu(uint32_t *pointer, uint32_t amount) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(pointer), "r"(amount) : "memory");
}

// The same of sums that a counter makes visible.
__device__ __forceinline__ void add_gpu4(uint32_t *pointer, uint32_t amount) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(pointer), "r"(amount) : "memory");
}
__device__ __forceinline__ void add_gpu8(uint64_t *pointer, uint64_t amount) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(pointer), "l"(amount) : "memory");
}

__device__ __forceinline__ void store_release_gpu(uint32_t *pointer, uint32_t v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}

// ---- host memory, while the host works on it, too ----

__device__ __forceinline__ uint32_t load_host4(const void *pointer) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(pointer) : "memory");
    return v;
}
// Each word for itself: the four may be of different times.
__device__ __forceinline__ Vec16 load_host16(const void *pointer) {
    Vec16 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(pointer)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_release_system(uint32_t *pointer, uint32_t v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(pointer), "r"(v) : "memory");
}
// What came before is seen before what comes after: by the block, by all devices and the host.
__device__ __forceinline__ void fence_block() { asm volatile("fence.acq_rel.cta;" ::: "memory"); }
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Tells the compiler what it cannot know.
__device__ __forceinline__ void assume(bool is_so) { __builtin_assume(is_so); }

// About so long, at most twice that.
__device__ __forceinline__ void pause(uint32_t nanoseconds) {
    asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory");
}

// ---- barriers ----

// All `threads` of the named barrier; one warp role uses its own barrier so that the others may run ahead.
__device__ __forceinline__ void named_barrier(uint32_t name, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Registers of the calling warpgroup's threads from here on; `take` waits until others have given as many. sm_90a on.
template <uint32_t kRegisters>
__device__ __forceinline__ void take_registers() {
#if !PERK_PORTABLE
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <uint32_t kRegisters>
__device__ __forceinline__ void give_registers() {
#if !PERK_PORTABLE
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

__device__ __forceinline__ void exit_thread() { asm volatile("exit;"); }

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// A warp arrives, not before `loaded` is there: a word made of all that it has loaded from what it gives back. The
// address depends on it, because the order of instructions is not enough: a load that was only issued can find what the
// copy engine put there after the arrival (measured: 16 tokens a step of a 14B shape got wrong sums). Nor is the last
// of the loads enough: the compiler changes their order. Behind a __syncwarp a lane arrives for all.
// compute-sanitizer's racecheck takes that for a race of the other lanes (docs/testing.md), so in programs for it each
// of them arrives.
#if PERK_FOR_RACECHECK
constexpr bool kForRacecheck = true;
constexpr uint32_t kWarpArrivals = 32;
__device__ __forceinline__ void mbarrier_arrive_after(uint32_t barrier, uint32_t lane, uint32_t loaded) {
    asm volatile("{ .reg .b32 address; .reg .b64 state; shr.u32 address, %1, 5; and.b32 address, address, %2; "
                 "add.u32 address, address, %0; mbarrier.arrive.shared.b64 state, [address]; }" ::"r"(barrier),
                 "r"(lane), "r"(loaded)
                 : "memory");
}
#else
constexpr bool kForRacecheck = false;
constexpr uint32_t kWarpArrivals = 1;
__device__ __forceinline__ void mbarrier_arrive_after(uint32_t barrier, uint32_t lane, uint32_t loaded) {
    asm volatile("{ .reg .pred first; .reg .b32 address; .reg .b64 state; setp.eq.u32 first, %1, 0; "
                 "and.b32 address, %1, %2; add.u32 address, address, %0; " // lane 0: `barrier`
                 "@first mbarrier.arrive.shared.b64 state, [address]; }" ::"r"(barrier),
                 "r"(lane), "r"(loaded)
                 : "memory");
}
#endif
// The same at `count` barriers (at most 8): that of lane i is the i-th.
__device__ __forceinline__ void mbarrier_arrive_lanes_after(uint32_t barrier, uint32_t lane, uint32_t count,
                                                            uint32_t loaded) {
#if PERK_FOR_RACECHECK
    for (uint32_t i = 0; i < count; i++) mbarrier_arrive_after(__shfl_sync(0xffffffffu, barrier, i), lane, loaded);
#else
    asm volatile("{ .reg .pred arrives; .reg .b32 address; .reg .b64 state; setp.lt.u32 arrives, %1, %2; "
                 "shr.u32 address, %1, 3; and.b32 address, address, %3; add.u32 address, address, %0; " // `barrier`
                 "@arrives mbarrier.arrive.shared.b64 state, [address]; }" ::"r"(barrier),
                 "r"(lane), "r"(count), "r"(loaded)
                 : "memory");
#endif
}
// True when the phase of that parity has completed.
__device__ __forceinline__ bool mbarrier_peek(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
// The same for a wait: sm_90 sleeps a little in hardware.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
#if PERK_PORTABLE
    return mbarrier_peek(barrier, parity); // all that sm_80 has
#else
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
#endif
}

// ---- a warp ----

// The largest and the smallest of all lanes' values, in every lane.
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
    uint32_t best;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(best) : "r"(value));
    return best;
}
__device__ __forceinline__ uint32_t warp_min(uint32_t value) {
    uint32_t best;
    asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(best) : "r"(value));
    return best;
}
// The lowest lane where `holds`; some lane must say so.
__device__ __forceinline__ uint32_t first_lane(bool holds) { return __ffs(__ballot_sync(0xffffffffu, holds)) - 1; }

// ---- copies into shared memory ----

__device__ __forceinline__ void copy_async4(uint32_t shared, const void *global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
// Until all earlier copy_async of this thread have landed.
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void copy_async16(uint32_t shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// Earlier copies of this thread that belong to no group yet are one; and until all but the last kPending have landed.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <uint32_t kPending>
__device__ __forceinline__ void copy_async_wait_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if PERK_PORTABLE
// The barrier gets one arrival of this thread once all its earlier copy_async16 have landed.
__device__ __forceinline__ void copy_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
#else
// sm_90: the bulk copy engine moves `bytes` (a multiple of 16) and completes them on the barrier.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void *global, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}
// The same of what nobody reads again soon: it leaves L2 first.
__device__ __forceinline__ void copy_bulk_once(uint32_t shared, const void *global, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "{\n\t.reg .b64 policy;\n\t"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "policy;\n\t}" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}
// Brings `bytes` (of 16) from memory to L2.
__device__ __forceinline__ void bring_to_l2(const void *global, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
// What others wrote, and this thread has acquired, is there for its copies from here on.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }
// What this thread has stored in shared memory, or its copy_async has, is there for wgmma, and before copies to come.
__device__ __forceinline__ void fence_shared_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
// Makes mbarrier initialisation visible to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
#if PERK_PORTABLE
    __threadfence_block();
#else
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// ---- tensor cores ----

// c[16x8] += a[16x16] b[16x8], bf16 in, fp32 out.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- tensor cores, a warpgroup at a time: sm_90a ----
// Products run on while the warps go on. Until a wait says that they are done, sums and left operands belong to them.

// The right operand in shared memory: rows of 128 bytes in the 128-byte swizzle, groups of 8 of them one after the
// other; aligned to 1,024 bytes. `+ 2` is the next 16 columns.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address) {
    constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kGroupBytes = uint64_t(1024 >> 4) << 32, kUnused = 1 << 16;
    return kSwizzle128 | kGroupBytes | kUnused | (address & 0x3ffff) >> 4;
}
// Before products take registers that this thread has written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than the last kPending commits are under way.
template <uint32_t kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Behind a wait for all: from here on the sums are there to be read.
template <uint32_t kSums>
__device__ __forceinline__ void wgmma_keep(float (&sums)[kSums]) {
#pragma unroll
    for (uint32_t i = 0; i < kSums; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums[64 x kColumns] += a[64 x 16] b[16 x kColumns], bf16 in, fp32 out; `a` holds a warp's 16 rows as for mma, sums
// hold 4 words for every 8 columns, as mma's.
template <uint32_t kColumns>
__device__ __forceinline__ void wgmma(float (&sums)[kColumns / 2], const Vec16 &a, uint64_t b);

#define PERK_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PERK_REGISTERS_16 PERK_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PERK_REGISTERS_24 PERK_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PERK_REGISTERS_32 PERK_REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PERK_REGISTERS_64                                                                                              \
    PERK_REGISTERS_32 ", "                                                                                             \
                      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
                      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PERK_SUMS_8(i)                                                                                                 \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]),      \
        "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define PERK_SUMS_16(i) PERK_SUMS_8(i), PERK_SUMS_8(i + 8)
#define PERK_SUMS_24(i) PERK_SUMS_16(i), PERK_SUMS_8(i + 16)
#define PERK_SUMS_32(i) PERK_SUMS_24(i), PERK_SUMS_8(i + 24)
#define PERK_SUMS_64(i) PERK_SUMS_32(i), PERK_SUMS_32(i + 32)
// Behind the sums: the left operand, the right one.
#define PERK_WGMMA(columns, count, a0, a1, a2, a3, b)                                                                  \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma<columns>(float(&sums)[count], const Vec16 &a, uint64_t operand) {            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" PERK_REGISTERS_##count         \
                     "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", 1, 1, 1, 0;"                                         \
                     : PERK_SUMS_##count(0)                                                                            \
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(operand)                                            \
                     : "memory");                                                                                      \
    }
PERK_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12")
PERK_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20")
PERK_WGMMA(48, 24, "%24", "%25", "%26", "%27", "%28")
PERK_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36")
PERK_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68")

// ---- numbers ----

// Two floats to a bf16 pair, round to nearest even; `low` ends in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
__device__ __forceinline__ uint16_t to_bf16(float value) { return static_cast<uint16_t>(pack_bf16(value, 0.0f)); }
__device__ __forceinline__ float round_bf16(float value) { return low_bf16(pack_bf16(value, 0.0f)); }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float from_f16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ float exp2_approx(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
__device__ __forceinline__ uint64_t global_timer() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
__device__ __forceinline__ uint32_t clock_cycles() {
    uint32_t cycles;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(cycles));
    return cycles;
}

} // namespace ptx
