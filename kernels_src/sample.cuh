// Sampling: from a row of logits to a token, as src/sampler.h defines it, by the consumers of one worker. draw.h has
// the arithmetic; since weights are integers, everything here may add in the order that suits it.
//
// What a request keeps of the vocabulary is always a beginning of its ranking: all tokens above some rank, and the
// first few of those that share it. That rank is searched for: passes over all logits count and weigh what lies above
// four ranks at a time, until little enough is left to be held in registers (mostly after the first), where the search
// goes on bit by bit. A place in the order of ids is found in the same way. A pass over 152k logits is 608 KB from L2.
#pragma once

#include "draw.h"

namespace perk {

__device__ __forceinline__ uint64_t shuffle_xor8(uint64_t value, int offset) {
    const uint32_t low = __shfl_xor_sync(0xffffffffu, uint32_t(value), offset);
    const uint32_t high = __shfl_xor_sync(0xffffffffu, uint32_t(value >> 32), offset);
    return uint64_t(high) << 32 | low;
}

// What a token is drawn from. An `Input` finds all of it anew whenever it is asked, so that no addresses are kept in
// registers through the passes:
//   const float *logits()             [vocabulary] the model's own
//   const perk_draw_rule *rule()
//   const int32_t *tokens()           [length()] prompt, of prompt_length(), and answer
//   const perk_draw_bias *biases()    [rule bias_count]
//   float *adjusted()                 [vocabulary, and up to 3 more] room for the row
//   uint32_t *seen()                  [vocabulary] zeros, before and after
//   uint2 *list()                     [PERK_DRAW_LISTED] room for tokens
//   perk_draw_record *record()        filled in where the rule wants log probabilities
template <uint32_t kVocabulary, class Input>
struct Draw {
    static constexpr uint32_t kHeld = 8; // tokens that a thread holds in registers
    static constexpr uint32_t kListed = kHeld * PERK_CONSUMER_THREADS;
    static constexpr uint32_t kTries = 4;   // ranks that a pass looks at
    static constexpr uint32_t kLinear = 8;  // so many passes divide the logits between two ranks, later ones the ranks
    static constexpr uint32_t kNumbers = 8; // that a block adds up at once, at most
    static constexpr uint32_t kLoads = 6;   // of 16 bytes in flight for a thread
    static constexpr uint32_t kLowest = 0x00800000u; // rank of the lowest finite number
    static constexpr uint32_t kHighest = 0xffffffffu;
    static constexpr uint32_t kMinusInfinity = 0xff800000u, kInfinity = 0x7f800000u;
    static constexpr uint32_t bits_of(uint32_t number) { return number == 0 ? 0 : 1 + bits_of(number / 2); }
    static constexpr uint32_t kIdBits = bits_of(kVocabulary - 1);
    static_assert(PERK_DRAW_LISTED == kListed, "the list's length");

    // What is done to a row, in this order. Each is a pass of one loop, so that the machine code is there once.
    enum Stage : uint32_t { kLikeliest, kTopK, kTopP, kToken };

    // Tokens in registers: all whose rank is from `low` to `high`.
    struct Held {
        uint32_t rank[kHeld], id[kHeld];
        uint32_t low, high;
        __device__ __forceinline__ bool covers(uint32_t from, uint32_t to) const { return low <= from && high >= to; }
        // With the tokens themselves, so that they take no registers while others are looked for.
        __device__ __forceinline__ void forget() {
            low = kHighest, high = 0;
#pragma unroll
            for (uint32_t i = 0; i < kHeld; i++) rank[i] = id[i] = 0;
        }
    };

    // The beginning of the ranking that is kept: all above a rank, and of those at it the first `count`, up to the id
    // `last`. Count 0: nothing was cut off yet.
    struct Kept {
        uint32_t rank, last;
        uint64_t count;
    };

    const Worker &w;
    const Input &in;
    const float *logits; // those of the input, or the adjusted ones
    float largest, scale;
    uint32_t turn = 0; // of two buffers, so that one barrier a sum is enough
    Held held;
    Kept kept;

    __device__ __forceinline__ Draw(const Worker &worker, const Input &input)
        : w(worker), in(input), logits(input.logits()) {
        forget();
    }
    __device__ __forceinline__ void forget() {
        held.forget();
        kept = {kLowest, kHighest, 0};
    }

    static __device__ __forceinline__ float load_float(const float *pointer) {
        return __uint_as_float(load_coherent4(pointer));
    }

    // ---- the block together ----

    __device__ __forceinline__ void barrier() const { named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); }

    // The scratch: two buffers of numbers, a counter, the rule.
    static constexpr uint32_t kCounter = 2 * PERK_CONSUMER_WARPS * kNumbers * 8;
    static constexpr uint32_t kRule = kCounter + 16;
    static_assert(kRule + sizeof(perk_draw_rule) <= program::reduction_bytes, "sampling needs more scratch");
    __device__ __forceinline__ uint64_t *buffer() {
        turn ^= 1;
        return static_cast<uint64_t *>(shared_pointer(w.reduction())) + turn * PERK_CONSUMER_WARPS * kNumbers;
    }
    __device__ __forceinline__ uint32_t *counter() const {
        return static_cast<uint32_t *>(shared_pointer(w.reduction() + kCounter));
    }
    // The rule, in shared memory: by the way of L1 it might be an older one.
    __device__ __forceinline__ void fetch_rule() const {
        const uint32_t offset = w.thread * 4;
        if (offset < sizeof(perk_draw_rule))
            store_shared4(w.reduction() + kRule + offset,
                          load_coherent4(reinterpret_cast<const uint8_t *>(in.rule()) + offset));
        barrier();
    }
    __device__ __forceinline__ const perk_draw_rule &rule() const {
        return *static_cast<const perk_draw_rule *>(shared_pointer(w.reduction() + kRule));
    }

    // Every number becomes its sum over all threads.
    template <uint32_t kCount>
    __device__ __forceinline__ void add_up(uint64_t (&numbers)[kCount]) {
        static_assert(kCount <= kNumbers, "too many numbers");
        uint64_t *shared = buffer();
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
            for (uint32_t i = 0; i < kCount; i++) numbers[i] += shuffle_xor8(numbers[i], offset);
        }
        if (w.lane == 0) {
#pragma unroll
            for (uint32_t i = 0; i < kCount; i++) shared[w.warp * kCount + i] = numbers[i];
        }
        barrier();
#pragma unroll
        for (uint32_t i = 0; i < kCount; i++) numbers[i] = shared[i];
        constexpr uint32_t kAtOnce = kCount == 1 ? PERK_CONSUMER_WARPS : 1; // many loads at once take many registers
#pragma unroll kAtOnce
        for (uint32_t warp = 1; warp < PERK_CONSUMER_WARPS; warp++) {
#pragma unroll
            for (uint32_t i = 0; i < kCount; i++) numbers[i] += shared[warp * kCount + i];
        }
    }
    __device__ __forceinline__ uint64_t sum(uint64_t number) {
        uint64_t numbers[1] = {number};
        add_up(numbers);
        return numbers[0];
    }
    __device__ __forceinline__ uint64_t most(uint64_t number) {
        uint64_t *shared = buffer();
        for (int offset = 16; offset > 0; offset /= 2) {
            const uint64_t other = shuffle_xor8(number, offset);
            number = other > number ? other : number;
        }
        if (w.lane == 0) shared[w.warp] = number;
        barrier();
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++)
            number = shared[warp] > number ? shared[warp] : number;
        return number;
    }

    // ---- passes ----

    // A warp's part of the ids from `begin` to `end`: the warps' parts follow each other.
    static __device__ __forceinline__ uint32_t part_of(uint32_t begin, uint32_t end) {
        return ((end - begin + PERK_CONSUMER_WARPS - 1) / PERK_CONSUMER_WARPS + 127) / 128 * 128;
    }
    __device__ __forceinline__ void load_logits(Vec16 (&values)[kLoads], uint32_t at, uint32_t stop) const {
        constexpr Vec16 kNothing{kMinusInfinity, kMinusInfinity, kMinusInfinity, kMinusInfinity};
#pragma unroll
        for (uint32_t i = 0; i < kLoads; i++)
            values[i] = at + i * 128 < stop ? load_coherent16(logits + at + i * 128) : kNothing;
    }
    // Visits the logits of the warp's part, and -inf behind its end; `begin` is a multiple of 128.
    template <class Visit>
    __device__ __forceinline__ void visit(uint32_t begin, uint32_t end, Visit take) const {
        const uint32_t part = part_of(begin, end), stop = min(end, begin + (w.warp + 1) * part);
        uint32_t at = begin + w.warp * part + w.lane * 4;
#pragma unroll 1
        for (; at < stop; at += 128 * kLoads) {
            Vec16 values[kLoads];
            load_logits(values, at, stop);
// As a loop, in which each piece takes the place of the one before: four times the passes' machine code would be in the
// way of everything else.
#pragma unroll 1
            for (uint32_t i = 0; i < kLoads; i++) {
                const uint32_t bits[4] = {values[0].x, values[0].y, values[0].z, values[0].w}, id = at + i * 128;
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    const bool is_there = kVocabulary % 4 == 0 || id + j < stop;
                    take(id + j, __uint_as_float(is_there ? bits[j] : kMinusInfinity));
                }
#pragma unroll
                for (uint32_t j = 0; j + 1 < kLoads; j++) values[j] = values[j + 1];
            }
        }
    }

    // The best token: returns its rank, PERK_RANK_NONE where there is none, and of those at it the lowest id.
    __device__ __forceinline__ uint32_t find_best(uint32_t &id) {
        uint64_t best = 0;
        visit(0, kVocabulary, [&](uint32_t at, float logit) {
            const uint64_t candidate = uint64_t(perk_rank(logit)) << 32 | uint32_t(~at);
            best = candidate > best ? candidate : best;
        });
        best = most(best);
        id = ~uint32_t(best);
        return uint32_t(best >> 32);
    }

    // Some ranks, and how many tokens are there and above, and what these weigh.
    struct Tries {
        uint32_t from[kTries], count[kTries], all;
        uint64_t weight[kTries], all_weight;
    };
    __device__ __forceinline__ void measure(Tries &t, bool weighs) {
        uint64_t weight[kTries] = {}, all_weight = 0;
        uint32_t count[kTries] = {}, all = 0;
        const uint32_t lowest = min(min(t.from[0], t.from[1]), min(t.from[2], t.from[3]));
        visit(0, kVocabulary, [&](uint32_t, float logit) {
            const uint32_t rank = perk_rank(logit);
            const uint64_t mine = weighs ? perk_weight(logit, largest, scale) : 0;
            all += rank != PERK_RANK_NONE;
            all_weight += mine;
            if (rank < lowest) return;
#pragma unroll
            for (uint32_t i = 0; i < kTries; i++)
                if (rank >= t.from[i]) {
                    count[i]++;
                    weight[i] += mine;
                }
        });
        uint64_t numbers[kNumbers] = {uint64_t(count[1]) << 32 | count[0],
                                      uint64_t(count[3]) << 32 | count[2],
                                      all,
                                      all_weight,
                                      weight[0],
                                      weight[1],
                                      weight[2],
                                      weight[3]};
        static_assert(kTries == 4 && kNumbers == 8, "eight numbers");
        add_up(numbers);
#pragma unroll
        for (uint32_t i = 0; i < kTries; i++) {
            t.count[i] = uint32_t(numbers[i / 2] >> i % 2 * 32);
            t.weight[i] = numbers[4 + i];
        }
        t.all = uint32_t(numbers[2]);
        t.all_weight = numbers[3];
    }

    // Ranks above `low`, up to `high`, to look at next. Which ones matters for speed only.
    __device__ __forceinline__ void choose(Tries &t, uint32_t low, uint32_t high, uint32_t pass) const {
        constexpr float kOctaves[kTries] = {3.0f, 8.0f, 16.0f, 30.0f}; // of weight below the largest
        const float top = perk_rank_logit(high);
        const float reach = low == kLowest ? 4.0f * (largest - top) + 1.0f : top - perk_rank_logit(low);
#pragma unroll
        for (uint32_t i = 0; i < kTries; i++) {
            const uint32_t between = low + uint32_t(uint64_t(high - low) * (i + 1) / (kTries + 1));
            const float logit = pass == 0 ? largest - kOctaves[i] / scale : top - reach * (i + 1) / (kTries + 1);
            t.from[i] = max(min(pass <= kLinear ? perk_rank(logit) : between, high), low + 1);
        }
    }

    // Brings tokens into registers, at most kListed: those whose ranks are from `low` to `high`; at `low` up to id
    // `last`.
    __device__ __forceinline__ void hold(uint32_t low, uint32_t high, uint32_t last) {
        if (w.thread == 0) *counter() = 0;
        barrier();
        visit(0, kVocabulary, [&](uint32_t at, float logit) {
            const uint32_t rank = perk_rank(logit);
            if (rank < low || rank > high || (rank == low && at > last)) return;
            const uint32_t place = atomicAdd(counter(), 1u);
            if (place < kListed) in.list()[place] = make_uint2(rank, at);
        });
        barrier();
        const uint32_t count = *counter();
#pragma unroll
        for (uint32_t i = 0; i < kHeld; i++) {
            const uint32_t place = i * PERK_CONSUMER_THREADS + w.thread;
            const uint2 token = place < count ? load_coherent8(in.list() + place) : make_uint2(PERK_RANK_NONE, 0);
            held.rank[i] = token.x;
            held.id[i] = token.y;
        }
        held.low = low;
        held.high = high;
        barrier(); // before the list and the counter are used again
    }

    // ---- where the ranking is cut ----

    __device__ __forceinline__ uint64_t weight_of(uint32_t rank) const {
        return rank == PERK_RANK_NONE ? 0 : perk_weight(perk_rank_logit(rank), largest, scale);
    }

    // Visits the thread's tokens. A loop that turns them around once, since weights are much machine code.
    template <class Visit>
    __device__ __forceinline__ void for_held(Visit take) {
#pragma unroll 1
        for (uint32_t i = 0; i < kHeld; i++) {
            const uint32_t rank = held.rank[0], id = held.id[0];
            take(rank, id);
#pragma unroll
            for (uint32_t j = 0; j + 1 < kHeld; j++) held.rank[j] = held.rank[j + 1], held.id[j] = held.id[j + 1];
            held.rank[kHeld - 1] = rank;
            held.id[kHeld - 1] = id;
        }
    }
    // Their measures, by `measure(rank, id)`; returns the sum of this thread's.
    template <class Measure>
    __device__ __forceinline__ uint64_t measure_held(uint64_t (&measures)[kHeld], Measure measure) {
        uint64_t all = 0;
        for_held([&](uint32_t rank, uint32_t id) {
            const uint64_t mine = measure(rank, id);
            all += mine;
#pragma unroll
            for (uint32_t j = 0; j + 1 < kHeld; j++) measures[j] = measures[j + 1];
            measures[kHeld - 1] = mine;
        });
        return all;
    }

    // The highest rank so that what is held from there on measures at least `wanted`; it is from `low` to `high`.
    __device__ __forceinline__ uint32_t search_rank(const uint64_t (&measures)[kHeld], uint64_t wanted, uint32_t low,
                                                    uint32_t high) {
        const uint32_t bits = 32 - __clz(low ^ high);
        uint32_t rank = bits == 32 ? 0 : low >> bits << bits; // what all have in common
#pragma unroll 1
        for (uint32_t bit = bits; bit-- > 0;) {
            const uint32_t next = rank | 1u << bit;
            uint64_t mine = 0;
#pragma unroll
            for (uint32_t i = 0; i < kHeld; i++) mine += held.rank[i] >= next ? measures[i] : 0;
            if (sum(mine) >= wanted) rank = next;
        }
        return rank;
    }

    // What is looked for: the rank so that those above it measure less than is wanted, and with those at it enough.
    struct Search {
        uint32_t low, high;     // it is one of these
        uint64_t wanted, above; // what those above `high` measure
    };

    // By passes, until all that it can be are few enough to be held, which they then are, or until it is known. False:
    // nothing is wanted.
    __device__ __forceinline__ bool search_all(Search &s, Stage stage, uint64_t goal, uint64_t at_low) {
        const bool by_weight = stage == kTopP, was_cut = kept.count != 0;
        uint32_t count_from_low = kVocabulary, count_above = 0;
        held.forget();
#pragma unroll 1
        for (uint32_t pass = 0;; pass++) {
            Tries t;
            choose(t, s.low, s.high, pass);
            if (was_cut && pass == 0) t.from[0] = s.low + 1;
            measure(t, by_weight || (stage == kLikeliest && pass == 0));
            if (pass == 0) {
                s.wanted = by_weight ? perk_nucleus(goal, was_cut ? t.weight[0] + at_low : t.all_weight)
                                     : min(uint32_t(goal), t.all);
                if (stage == kLikeliest && w.thread == 0) in.record()->sum = t.all_weight;
                if (s.wanted == 0) return false;
            }
#pragma unroll
            for (uint32_t i = 0; i < kTries; i++) {
                const uint64_t measured = by_weight ? t.weight[i] : t.count[i];
                if (measured >= s.wanted) {
                    if (t.from[i] > s.low) s.low = t.from[i], count_from_low = t.count[i];
                } else if (t.from[i] <= s.high) {
                    s.high = t.from[i] - 1, count_above = t.count[i], s.above = measured;
                }
            }
            if (s.low == s.high || count_from_low - count_above <= kListed) break;
        }
        const bool is_whole = count_from_low <= kListed; // then those above are held, too
        if (is_whole || s.low != s.high) hold(s.low, is_whole ? kHighest : s.high, kHighest);
        return true;
    }

    // Cuts what is kept down: to the first `goal` tokens, or (kTopP) to the first that weigh goal / 2^64 of all that is
    // kept. kLikeliest fills in the sum of all weights as well.
    __device__ __forceinline__ void cut(Stage stage, uint64_t goal) {
        const bool by_weight = stage == kTopP;
        Search s{kept.rank, perk_rank(largest), 0, 0};
        const uint64_t at_low = weight_of(s.low) * kept.count;
        if (held.covers(s.low, s.high)) { // only top-p finds tokens held
            const uint32_t first = s.low + (kept.count != 0);
            uint64_t mine = 0;
            for_held([&](uint32_t rank, uint32_t) { mine += rank >= first ? weight_of(rank) : 0; });
            s.wanted = perk_nucleus(goal, sum(mine) + at_low);
        } else if (!search_all(s, stage, goal, at_low)) {
            return;
        }
        if (held.covers(s.low, s.high)) {
            if (held.high == kHighest) s.above = 0;
            uint64_t measures[kHeld] = {}, mine = 0;
            measure_held(measures, [&](uint32_t rank, uint32_t) {
                return by_weight ? weight_of(rank) : uint64_t(rank != PERK_RANK_NONE);
            });
            s.low = search_rank(measures, s.wanted - s.above, s.low, s.high);
#pragma unroll
            for (uint32_t i = 0; i < kHeld; i++) mine += held.rank[i] > s.low ? measures[i] : 0;
            s.above += sum(mine);
        }
        // So many of those at the rank measure enough: a division, of which the machine has none.
        const uint64_t each = by_weight ? weight_of(s.low) : 1, rest = s.wanted - s.above;
        uint64_t fewer = 0;
#pragma unroll 1
        for (uint32_t bit = kIdBits; bit-- > 0;) {
            const uint64_t next = fewer | 1u << bit;
            if (next * each < rest) fewer = next;
        }
        kept = {s.low, kHighest, fewer + 1};
    }

    // ---- a place in the order of ids ----

    // The measure of a token where one is looked for: of the kept ones, their weight; of those at the cut, 1.
    __device__ __forceinline__ uint64_t share(Stage stage, uint32_t rank, uint32_t id) const {
        if (stage != kToken) return rank == kept.rank;
        if (rank < kept.rank || (rank == kept.rank && id > kept.last)) return 0;
        const uint64_t weight = weight_of(rank);
        return weight < rule().min_weight ? 0 : weight;
    }

    // When tokens lie side by side in the order of their ids, each as wide as its measure: the one at `place`, or, for
    // a token to be drawn, at `place` / 2^64 of the width of all. Where they are not held, passes over an eighth of
    // what the last one has looked at come first, and what was held is lost.
    __device__ __forceinline__ uint32_t find_id(Stage stage, uint64_t place) {
        bool is_place = stage != kToken;
        if (!held.covers(kept.rank, is_place ? kept.rank : perk_rank(largest))) {
            uint32_t begin = 0, end = kVocabulary;
#pragma unroll 1
            for (; end - begin > kListed; is_place = true) narrow(stage, begin, end, is_place, place);
#pragma unroll
            for (uint32_t i = 0; i < kHeld; i++) {
                const uint32_t id = held.id[i] = begin + i * PERK_CONSUMER_THREADS + w.thread;
                held.rank[i] = id < end ? perk_rank(load_float(logits + id)) : PERK_RANK_NONE;
            }
            held.low = kHighest, held.high = 0; // these are others
        }
        uint64_t measures[kHeld] = {};
        uint64_t mine = measure_held(measures, [&](uint32_t rank, uint32_t id) { return share(stage, rank, id); });
        const uint64_t all = sum(mine);
        if (!is_place) place = perk_high_product(place, all);
        if (stage != kToken && place + 1 == all) return kHighest; // all that are at the cut: none is cut off
        uint32_t id = 0;
#pragma unroll 1
        for (uint32_t bit = kIdBits; bit-- > 0;) {
            const uint32_t next = id | 1u << bit;
            mine = 0;
#pragma unroll
            for (uint32_t i = 0; i < kHeld; i++) mine += held.id[i] < next ? measures[i] : 0;
            if (sum(mine) <= place) id = next;
        }
        return id;
    }

    // One such pass: to the part of a warp in which the place lies; it is then a place there.
    __device__ __forceinline__ void narrow(Stage stage, uint32_t &begin, uint32_t &end, bool is_place,
                                           uint64_t &place) {
        uint64_t mine = 0;
        visit(begin, end, [&](uint32_t at, float logit) { mine += share(stage, perk_rank(logit), at); });
        for (int offset = 16; offset > 0; offset /= 2) mine += shuffle_xor8(mine, offset);
        uint64_t *shared = buffer(), all = 0;
        if (w.lane == 0) shared[w.warp] = mine;
        barrier();
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) all += shared[warp];
        if (!is_place) place = perk_high_product(place, all);
        const uint32_t part = part_of(begin, end);
        uint32_t warp = 0;
        for (; warp + 1 < PERK_CONSUMER_WARPS && place >= shared[warp]; warp++) place -= shared[warp];
        begin += warp * part;
        end = min(end, begin + part);
    }

    // ---- log probabilities: of the model's own logits ----

    // The kept tokens are the likeliest.
    __device__ __forceinline__ void write_record(uint32_t wanted) {
        perk_draw_record *record = in.record();
        if (wanted > 0 && !held.covers(kept.rank, kHighest)) hold(kept.rank, kHighest, kept.last);
        if (w.thread == 0) *counter() = 0;
        barrier();
#pragma unroll
        for (uint32_t i = 0; i < kHeld && wanted > 0; i++) {
            const uint32_t rank = held.rank[i], id = held.id[i];
            if (rank == PERK_RANK_NONE || rank < kept.rank || (rank == kept.rank && id > kept.last)) continue;
            const uint32_t place = atomicAdd(counter(), 1u);
            if (place >= PERK_DRAW_TOP) continue;
            record->top[place].token = int32_t(id);
            record->top[place].logit = perk_rank_logit(rank);
        }
        barrier();
        if (w.thread == 0) {
            record->largest = largest;
            record->count = int32_t(*counter());
        }
    }

    // ---- bias and penalties: into a copy of the row ----

    __device__ __forceinline__ void adjust() {
        float *adjusted = in.adjusted();
#pragma unroll 4
        for (uint32_t at = w.thread * 4; at < kVocabulary; at += PERK_CONSUMER_THREADS * 4)
            *reinterpret_cast<Vec16 *>(adjusted + at) = load_coherent16(logits + at);
        logits = adjusted;
        barrier();
        for (uint32_t i = w.thread; i < uint32_t(rule().bias_count); i += PERK_CONSUMER_THREADS) {
            const uint2 bias = load_coherent8(in.biases() + i);
            adjusted[bias.x] = perk_sum(load_float(adjusted + bias.x), __uint_as_float(bias.y));
        }
        barrier();
        if (!rule().has_penalties) return;
        const uint32_t length = in.length(), prompt_length = in.prompt_length();
        // How often each token is in the answer, and a bit for those that are in the prompt; then whoever takes the
        // number away applies it.
        constexpr uint32_t kInPrompt = 1u << 31;
        for (uint32_t i = w.thread; i < length; i += PERK_CONSUMER_THREADS) {
            const uint32_t token = load_coherent4(in.tokens() + i);
            if (token >= kVocabulary) continue;
            if (i < prompt_length)
                atomicOr(in.seen() + token, kInPrompt);
            else
                atomicAdd(in.seen() + token, 1u);
        }
        barrier();
        for (uint32_t i = w.thread; i < length; i += PERK_CONSUMER_THREADS) {
            const uint32_t token = load_coherent4(in.tokens() + i);
            const uint32_t times = token < kVocabulary ? atomicExch(in.seen() + token, 0u) : 0;
            if (times == 0) continue;
            adjusted[token] = perk_penalize(load_float(adjusted + token), &rule(), int32_t(times & ~kInPrompt));
        }
        barrier();
    }

    // From the model's logits to those that are drawn from. False: `token` is not drawn, but the best of them.
    __device__ __forceinline__ bool prepare(uint32_t &token) {
        uint32_t rank = perk_rank(largest);
        if (rule().bias_count || rule().has_penalties) {
            uint32_t id;
            adjust();
            rank = find_best(id);
            if (rank != PERK_RANK_NONE) token = id;
            largest = perk_rank_logit(rank);
        }
        forget();
        scale = rule().scale;
        return scale > 0.0f && rank != PERK_RANK_NONE && rank != PERK_RANK_INFINITE;
    }

    // ---- all of it ----

    // `token`: argmax of the logits. Returns the token that is drawn, in every thread; an id outside the vocabulary
    // when the logits are not finite numbers.
    __device__ __forceinline__ uint32_t run(uint32_t token) {
        if (token >= kVocabulary) return token;
        largest = load_float(logits + token);
        if (perk_rank(largest) == PERK_RANK_INFINITE) return kHighest;
        fetch_rule();
        scale = PERK_LOG2_E;
#pragma unroll 1
        for (uint32_t stage = rule().logprobs ? kLikeliest : kTopK; stage <= kToken; stage++) {
            if (stage == kTopK && !prepare(token)) break;
            uint64_t goal = 0;
            if (stage == kLikeliest) goal = rule().logprobs - 1;
            if (stage == kTopK && uint32_t(rule().top_k) < kVocabulary) goal = rule().top_k;
            if (stage == kTopP) goal = rule().top_p;
            if (stage == kLikeliest || (stage != kToken && goal != 0)) cut(Stage(stage), goal);
            if (stage != kToken && goal == 0) {
                if (stage == kLikeliest) write_record(0);
                continue;
            }
            uint64_t place = kept.count - 1;
            if (stage == kToken) place = perk_random_bits(rule().seed, in.length() - in.prompt_length());
            const uint32_t id = find_id(Stage(stage), place);
            if (stage == kToken)
                token = id;
            else
                kept.last = id;
            if (stage == kLikeliest) write_record(goal);
        }
        if (rule().logprobs && w.thread == 0) in.record()->chosen = load_float(in.logits() + token);
        barrier(); // the scratch is free again
        return token;
    }
};

} // namespace perk
