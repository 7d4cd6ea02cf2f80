// Which experts a token goes to, by its router's logits. Consumers and producers both ask: in a step of one token every
// worker picks them by itself, so that nobody waits for another to say.
#pragma once

namespace perk {

using namespace ptx;

// By a warp, of one token: the kSlots experts with the largest logits, the lowest number among equals, in falling
// order.
template <uint32_t kExperts, uint32_t kSlots>
struct TopExperts {
    static constexpr uint32_t kExpertCount = kExperts, kSlotCount = kSlots;
    static constexpr uint32_t kEach = (kExperts + 31) / 32; // lane l has logits of kEach experts from l * kEach on
    static_assert(kSlots <= 32 && kSlots <= kExperts, "a lane a slot");

    float logits[kEach];

    // A number that grows with the logit: 1 for what is no number, so that as many as wanted can always be picked.
    static __device__ __forceinline__ uint32_t rank(float logit) {
        const uint32_t bits = __float_as_uint(logit + 0.0f); // -0 is 0
        return logit != logit ? 1 : bits >> 31 ? ~bits : bits | 0x80000000u;
    }

    // `row` begins at a multiple of 256 bytes, and so many belong to it.
    __device__ __forceinline__ void load(uint32_t lane, const uint8_t *row) {
        if constexpr (kEach % 4 == 0) {
#pragma unroll
            for (uint32_t i = 0; i < kEach; i += 4) {
                const Vec16 four = load_coherent16(row + (lane * kEach + i) * 4);
                logits[i] = __uint_as_float(four.x);
                logits[i + 1] = __uint_as_float(four.y);
                logits[i + 2] = __uint_as_float(four.z);
                logits[i + 3] = __uint_as_float(four.w);
            }
        } else {
#pragma unroll
            for (uint32_t i = 0; i < kEach; i++)
                logits[i] = __uint_as_float(load_coherent4(row + min(lane * kEach + i, kExperts - 1) * 4));
        }
    }

    template <class Look>
    __device__ __forceinline__ void see(Look &look) const {
#pragma unroll
        for (uint32_t i = 0; i < kEach; i++) look.see_word(logits[i]);
    }

    struct Pick {
        uint32_t expert; // of the slot that is this lane's number
        float logit;
        float largest; // of all logits, in every lane
    };
    __device__ __forceinline__ Pick pick(uint32_t lane) const {
        uint32_t ranks[kEach]; // 0: picked, or no expert
#pragma unroll
        for (uint32_t i = 0; i < kEach; i++) ranks[i] = lane * kEach + i < kExperts ? rank(logits[i]) : 0;
        Pick mine{0, 0.0f, 0.0f};
#pragma unroll 1
        for (uint32_t slot = 0; slot < kSlots; slot++) {
            uint32_t best = 0, expert = 0;
            float logit = 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < kEach; i++)
                if (ranks[i] > best) {
                    best = ranks[i];
                    expert = lane * kEach + i;
                    logit = logits[i];
                }
            const uint32_t holder = first_lane(best == warp_max(best)); // which has the lowest numbers
            expert = __shfl_sync(0xffffffffu, expert, holder);
            logit = __shfl_sync(0xffffffffu, logit, holder);
#pragma unroll
            for (uint32_t i = 0; i < kEach; i++)
                if (lane * kEach + i == expert) ranks[i] = 0;
            if (slot == 0) mine.largest = logit;
            if (slot == lane) {
                mine.expert = expert;
                mine.logit = logit;
            }
        }
        return mine;
    }

    // Hits of a step of one token are its slots by rising experts: which slot this lane's number stands for.
    static __device__ __forceinline__ uint32_t slot_of_hit(uint32_t lane, uint32_t expert) {
        uint32_t place = 0, slot = 0;
#pragma unroll
        for (uint32_t s = 0; s < kSlots; s++) place += __shfl_sync(0xffffffffu, expert, s) < expert;
#pragma unroll
        for (uint32_t s = 0; s < kSlots; s++)
            if (__shfl_sync(0xffffffffu, place, s) == lane) slot = s;
        return slot;
    }
};

} // namespace perk
