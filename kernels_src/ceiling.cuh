// The read ceiling: what this device reads at best, for every measurement to stand beside. All SMs copy a range once
// through a ring in shared memory, or load it into registers where there is no bulk copy engine, and drop it.
#pragma once

namespace perk {
constexpr uint32_t kCeilingChunk = 32768; // 6 x 32 KB a block gave the best bandwidth on H100 and H200
constexpr uint32_t kCeilingSlots = 6;
} // namespace perk

// Chunk c of block b is chunk c * blocks + b of the range: neighbours in time are neighbours in memory.
extern "C" __global__ void __launch_bounds__(1024, 1)
    perk_read_ceiling(const uint8_t *source, uint64_t chunks, uint32_t *sink) {
    using namespace perk;
#if PERK_PORTABLE
    uint32_t seen = 0;
    for (uint64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x)
#pragma unroll
        for (uint32_t offset = threadIdx.x * 16; offset < kCeilingChunk; offset += 1024 * 16)
            seen |= ptx::load_constant16(source + chunk * kCeilingChunk + offset).x;
    if (seen == 0x12345678u) *sink = seen; // never, but the compiler cannot know
#else
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ __align__(8) uint64_t landed[kCeilingSlots];
    if (threadIdx.x != 0) return;
    const uint32_t barriers = ptx::shared_address(landed), data = ptx::shared_address(ring);
    for (uint32_t slot = 0; slot < kCeilingSlots; slot++) ptx::mbarrier_init(barriers + 8 * slot, 1);
    ptx::fence_mbarrier_init();
    uint32_t started = 0, finished = 0;
    for (uint64_t chunk = blockIdx.x; chunk < chunks || finished < started; chunk += gridDim.x) {
        if (started - finished == kCeilingSlots || chunk >= chunks) {
            while (!ptx::mbarrier_test(barriers + 8 * (finished % kCeilingSlots), finished / kCeilingSlots & 1)) {
            }
            finished++;
        }
        if (chunk >= chunks) continue;
        const uint32_t slot = started++ % kCeilingSlots;
        ptx::mbarrier_arrive_expect(barriers + 8 * slot, kCeilingChunk);
        ptx::copy_bulk(data + slot * kCeilingChunk, source + chunk * kCeilingChunk, kCeilingChunk, barriers + 8 * slot);
    }
    if (started == 0xffffffffu) *sink = started;
#endif
}
