// Races in shared memory: two accesses of one word, one of them a store, of which nothing says which comes first. They
// are found by what happened before, not by the order that this run happened to take. A warp's clock counts how often
// it has told others how far it is (an arrival at a barrier), and a warp that waits for a barrier learns the clocks of
// those who have arrived. Lanes of a warp are ordered by __syncwarp and barriers alone: shuffles and votes order no
// memory. What the copy engine stores counts as stored by who starts the copy, and is known to those who wait for the
// barrier that it completes; what tensor cores read through
// descriptors, and what goes through a pointer into shared memory, is not looked at, nor are words that are polled.
#pragma once

constexpr uint32_t kMaxWarps = 12; // of blocks that are looked at
enum class Access { load, store, atomic };

struct Clock {
    uint32_t of[kMaxWarps] = {};
    void join(const Clock &other) {
        for (uint32_t i = 0; i < kMaxWarps; i++)
            if (other.of[i] > of[i]) of[i] = other.of[i];
    }
};

// The last accesses of a word. All zero: there were none.
struct Word {
    struct Seen {
        uint32_t lanes, clock, syncs; // clock: of the warp, syncs: of these lanes
    };
    Seen loads[kMaxWarps];
    Seen store;
    uint32_t store_warp;
    bool is_atomic;
};
