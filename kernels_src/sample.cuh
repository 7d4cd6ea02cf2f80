// Sampling: from a row of logits to a token, as src/sampler.h defines it, by the consumers of a group of workers.
// draw.h has the arithmetic; since weights are integers, everything here may add in the order that suits it.
//
// All workers of the group take the same path over the same numbers; each looks at its own slice of the vocabulary, and
// what is known of all slices is put together in the row's room, in device memory, at which they meet. A histogram of
// ranks says where the ranking is cut; the few tokens there are listed, one a thread, and each counts what comes before
// it. Whatever is left to be done with the list alone is done by the group's first worker; the others leave.
#pragma once

#include "draw.h"

namespace perk {

__device__ __forceinline__ uint64_t join_words(uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; }
__device__ __forceinline__ uint64_t shuffle8(uint64_t value, uint32_t lane) {
    return join_words(__shfl_sync(0xffffffffu, uint32_t(value), lane),
                      __shfl_sync(0xffffffffu, uint32_t(value >> 32), lane));
}

// As wait_counter, for words that are not a plan's.
__device__ __forceinline__ void await_word(const Worker &w, const uint32_t *word, uint32_t target, uint32_t role,
                                           uint32_t name) {
    Patience patience;
    uint32_t seen;
    while (static_cast<int32_t>((seen = load_acquire_gpu(word)) - target) < 0)
        if (patience.is_over(w.args)) {
            report_hang(w, role, name, seen, target);
            store_shared4(w.shared + SharedMap::given_up, 1);
            target = seen;
        }
}

// Who draws a row: `count` workers from `first` on.
struct DrawGroup {
    uint32_t first, count;
};

// What a token is drawn from. An `Input` finds all of it anew whenever it is asked, so that no addresses are kept in
// registers through the passes:
//   uint32_t row()                    for reports
//   const float *logits()             [vocabulary] the model's own
//   const perk_draw_rule *rule()
//   const int32_t *tokens()           [length()] prompt, of prompt_length(), and answer
//   const perk_draw_bias *biases()    [rule bias_count]
//   float *adjusted()                 [vocabulary, and up to 3 more] room for the row
//   uint32_t *seen()                  [vocabulary] zeros, before and after
//   perk_draw_room *room()            zeros, before and after
//   perk_draw_record *record()        filled in where the rule wants log probabilities
template <uint32_t kVocabulary, class Input>
struct Draw {
    static constexpr uint32_t kBins = PERK_DRAW_BINS; // of a histogram, and the tokens of a list: one a thread
    static constexpr uint32_t kLoads = 6;             // of 16 bytes in flight for a thread
    static constexpr float kOctaves = 48.0f;          // of weight: how far the first histogram reaches
    static constexpr uint32_t kLowest = 0x00800000u;  // rank of the lowest finite number
    static constexpr uint32_t kHighest = 0xffffffffu;
    static constexpr uint32_t kMinusInfinity = 0xff800000u;
    static constexpr uint64_t kAll = uint64_t(1) << 32; // key of the last token that there can be
    static constexpr uint32_t bits_of(uint32_t number) { return number == 0 ? 0 : 1 + bits_of(number / 2); }
    static constexpr uint32_t kIdBits = bits_of(kVocabulary);
    static_assert(kBins == PERK_CONSUMER_THREADS, "a bin a thread");

    // What is done to a row, in this order. Each is a turn of one loop, so that the machine code is there once.
    enum Stage : uint32_t { kLikeliest, kRecord, kTopK, kTopP, kToken };

    struct Measure {
        uint32_t count;
        uint64_t weight;
        __device__ __forceinline__ uint64_t of(bool by_weight) const { return by_weight ? weight : count; }
    };
    // Where something begins that is looked for: a bin, a slice or a token, and what comes before it.
    struct Found {
        uint64_t what;
        Measure before, has;
    };

    const Worker &w;
    const Input &in;
    const DrawGroup group;
    const float *logits; // those of the input, or the adjusted ones
    float largest, scale;

    uint32_t meetings = 0, passes = 0, lists = 0, all_listed = 0;
    bool is_closed = false;   // by the last meeting
    Measure newer{}, older{}; // the thread's bin of the room's two histograms, which only ever grow
    Measure first{};          // the thread's bin of the row's first histogram,
    bool has_first = false;   // if there was one

    uint64_t kept = kAll; // the key of the last token that is kept: of the ranking, those up to it
    uint64_t kept_weight = 0;
    uint32_t kept_count = 0;

    uint64_t key = 0, weight = 0;    // the thread's token of the list
    uint32_t listed = 0;             // how many tokens that has,
    uint32_t listed_from = kHighest; // and a rank: all that are there and above are among them

    __device__ __forceinline__ Draw(const Worker &worker, const Input &input, DrawGroup of)
        : w(worker), in(input), group(of), logits(input.logits()) {}

    static __device__ __forceinline__ float load_float(const float *pointer) {
        return __uint_as_float(load_coherent4(pointer));
    }

    // A token's place in the ranking: the larger key comes first.
    static __device__ __forceinline__ uint64_t key_of(uint32_t rank, uint32_t id) { return join_words(~id, rank); }
    static __device__ __forceinline__ uint32_t rank_of(uint64_t key) { return uint32_t(key >> 32); }
    static __device__ __forceinline__ uint32_t id_of(uint64_t key) { return ~uint32_t(key); }

    // Of PERK_RANK_NONE, whose logit is not a number, 0; no branch, so that four are computed side by side.
    __device__ __forceinline__ uint64_t weight_of(uint32_t rank) const {
        return perk_weight(perk_rank_logit(rank), largest, scale);
    }

    // ---- the group ----

    __device__ __forceinline__ bool is_leader() const { return w.index() == group.first; }
    __device__ __forceinline__ bool has_left() const { return is_closed && !is_leader(); }
    // What every worker of the group wrote before is there for all of them. From the last meeting on only the leader
    // looks at anything; the others leave.
    __device__ __forceinline__ void meet(bool is_last = false) {
        barrier();
        meetings++;
        is_closed = is_last;
        if (w.thread == 0 && group.count > 1) {
            add_release_gpu(&in.room()->arrived, 1);
            if (!has_left()) await_word(w, &in.room()->arrived, meetings * group.count, PERK_ROLE_DRAW, in.row());
        }
        barrier();
    }
    // A number of every worker, of which thread t gets that of member t.
    __device__ __forceinline__ uint64_t exchange(uint64_t number, bool is_last) {
        uint64_t *const numbers = in.room()->numbers[meetings % 2];
        if (w.thread == 0) numbers[w.index() - group.first] = number;
        meet(is_last);
        if (has_left() || w.thread >= group.count) return 0;
        const uint2 other = load_coherent8(numbers + w.thread);
        return join_words(other.x, other.y);
    }
    // The worker's slice is [slice_begin(), slice_end()).
    __device__ __forceinline__ uint32_t slice() const {
        return ((kVocabulary + group.count - 1) / group.count + 127) / 128 * 128;
    }
    __device__ __forceinline__ uint32_t slice_begin() const {
        return min(kVocabulary, (w.index() - group.first) * slice());
    }
    __device__ __forceinline__ uint32_t slice_end() const { return min(kVocabulary, slice_begin() + slice()); }

    // ---- the block ----

    __device__ __forceinline__ void barrier() const { named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); }

    // The scratch: the list, 16 bytes a token, in the place of which bins are filled and tokens collected; what warps
    // have; what was found; a counter; the rule.
    static constexpr uint32_t kWarps = kBins * 16, kFound = kWarps + PERK_CONSUMER_WARPS * 16, kCounter = kFound + 32,
                              kRule = kCounter + 16;
    static_assert(kRule + sizeof(perk_draw_rule) <= program::reduction_bytes, "sampling needs more scratch");
    __device__ __forceinline__ uint32_t scratch(uint32_t offset) const { return w.reduction() + offset; }

    // The rule, in shared memory: by the way of L1 it might be an older one.
    __device__ __forceinline__ void fetch_rule() const {
        const uint32_t offset = w.thread * 4;
        if (offset < sizeof(perk_draw_rule))
            store_shared4(scratch(kRule + offset),
                          load_coherent4(reinterpret_cast<const uint8_t *>(in.rule()) + offset));
        if (w.thread < 8) store_shared4(scratch(kFound) + w.thread * 4, 0); // no garbage where nothing is found
        barrier();
    }
    __device__ __forceinline__ const perk_draw_rule &rule() const {
        return *static_cast<const perk_draw_rule *>(shared_pointer(scratch(kRule)));
    }

    // What the threads before this one have; returns what all have. What is found is told before the next one.
    __device__ __forceinline__ Measure scan(const Measure &mine, Measure &before) const {
        Measure sum = mine;
        for (uint32_t offset = 1; offset < 32; offset *= 2) {
            const uint32_t lane = w.lane - offset, count = __shfl_sync(0xffffffffu, sum.count, lane);
            const uint64_t weight = shuffle8(sum.weight, lane);
            if (w.lane >= offset) sum.count += count, sum.weight += weight;
        }
        if (w.lane == 31)
            store_shared16(scratch(kWarps) + w.warp * 16,
                           {sum.count, 0, uint32_t(sum.weight), uint32_t(sum.weight >> 32)});
        barrier();
        before = {sum.count - mine.count, sum.weight - mine.weight};
        Measure all{};
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) {
            if (warp == w.warp) before.count += all.count, before.weight += all.weight;
            const Vec16 other = load_shared16(scratch(kWarps) + warp * 16);
            all.count += other.x, all.weight += join_words(other.z, other.w);
        }
        return all;
    }
    // The largest number of all threads.
    __device__ __forceinline__ uint64_t most(uint64_t number) const {
        for (uint32_t offset = 16; offset > 0; offset /= 2) {
            const uint64_t other = shuffle8(number, w.lane ^ offset);
            number = other > number ? other : number;
        }
        if (w.lane == 0)
            store_shared16(scratch(kWarps) + w.warp * 16, {uint32_t(number), uint32_t(number >> 32), 0, 0});
        barrier();
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) {
            const Vec16 other = load_shared16(scratch(kWarps) + warp * 16);
            const uint64_t theirs = join_words(other.x, other.y);
            number = theirs > number ? theirs : number;
        }
        barrier();
        return number;
    }
    // One thread at most has what is looked for: `has` of it, behind `before`. All learn of it.
    __device__ __forceinline__ Found tell(uint64_t wanted, bool by_weight, Measure before, Measure has, uint64_t what) {
        const uint64_t from = before.of(by_weight);
        if (from < wanted && wanted - from <= has.of(by_weight)) {
            store_shared16(scratch(kFound), {uint32_t(what), uint32_t(what >> 32), before.count, has.count});
            store_shared16(scratch(kFound) + 16, {uint32_t(before.weight), uint32_t(before.weight >> 32),
                                                  uint32_t(has.weight), uint32_t(has.weight >> 32)});
        }
        barrier();
        const Vec16 a = load_shared16(scratch(kFound)), b = load_shared16(scratch(kFound) + 16);
        return {join_words(a.x, a.y), {a.z, join_words(b.x, b.y)}, {a.w, join_words(b.z, b.w)}};
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
    // Visits the logits of the warp's part: the ranks of four at a time, so that they do not wait for each other, of
    // ids from one on; PERK_RANK_NONE where there are no more. `begin` is a multiple of 128.
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
            for (uint32_t i = 0; i < kLoads && at + i * 128 < stop; i++) {
                const uint32_t bits[4] = {values[0].x, values[0].y, values[0].z, values[0].w}, id = at + i * 128;
                uint32_t ranks[4];
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    const bool is_there = kVocabulary % 4 == 0 || id + j < stop;
                    ranks[j] = is_there ? perk_rank(__uint_as_float(bits[j])) : uint32_t(PERK_RANK_NONE);
                }
                take(ranks, id);
#pragma unroll
                for (uint32_t j = 0; j + 1 < kLoads; j++) values[j] = values[j + 1];
            }
        }
    }

    // How ranks from `low` to `high` go into bins, the highest into the first: by the distance of logits, with all that
    // is far away in the last bin; or, `shift` of at most 24, by that of ranks.
    static constexpr uint32_t kByLogit = 32;
    struct Bins {
        uint32_t low, high, shift;
        float top, width; // bins a logit
        __device__ __forceinline__ uint32_t of(uint32_t rank) const {
            const float at = perk_product(perk_sum(top, -perk_rank_logit(rank)), width);
            const uint32_t by_logit = uint32_t(fminf(fmaxf(at, 0.0f), float(kBins - 1)));
            return shift == kByLogit ? by_logit : (high - rank) >> (shift & 31);
        }
    };
    // Colder than temperature 1, tokens that have no weight any more must be told apart, too, for top-k.
    __device__ __forceinline__ Bins first_bins() const {
        const float width = fminf(scale, PERK_LOG2_E) * ((kBins - 1) / kOctaves);
        return {kLowest, perk_rank(largest), kByLogit, largest, width};
    }
    // The lowest rank in `bin` or one before it. Where bins are of logits, a lane a guess, by all lanes of a warp.
    __device__ __forceinline__ uint32_t lowest_of(const Bins &bins, uint32_t bin) const {
        uint32_t rank = bins.low;
        const uint64_t reach = (uint64_t(bin + 1) << (bins.shift & 31)) - 1;
        if (bins.shift != kByLogit) return reach < bins.high - bins.low ? bins.high - uint32_t(reach) : bins.low;
#pragma unroll 1
        for (int32_t shift = 27; shift >= 0; shift = shift == 2 ? 0 : shift - 5) {
            const uint64_t last = rank + (uint64_t(w.lane + 1) << shift) - 1;
            const bool is_below = last < bins.high && bins.of(uint32_t(last)) > bin;
            rank += uint32_t(__popc(__ballot_sync(0xffffffffu, is_below))) << shift;
        }
        return rank;
    }
    // The same of what is in a bin.
    __device__ __forceinline__ Bins bins_in(const Bins &bins, uint32_t lowest, uint32_t bin) const {
        Bins next = bins;
        next.low = lowest;
        if (bin > 0) next.high = lowest_of(bins, bin - 1) - 1;
        const uint32_t bits = 32 - __clz(next.high - next.low);
        next.shift = bits > 8 ? bits - 8 : 0;
        return next;
    }

    // The histogram, of which a thread gets its bin.
    __device__ __forceinline__ Measure measure(const Bins &bins, bool weighs) {
        const uint32_t count_at = scratch(w.thread * 4), low_at = count_at + kBins * 4, high_at = low_at + kBins * 4;
        store_shared4(count_at, 0);
        store_shared4(low_at, 0);
        store_shared4(high_at, 0);
        barrier();
        visit(slice_begin(), slice_end(), [&](const uint32_t(&ranks)[4], uint32_t) {
            uint32_t bin[4];
            uint64_t mine[4];
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const bool is_in = ranks[j] - bins.low <= bins.high - bins.low;
                const uint32_t its = bins.of(ranks[j]);
                const uint64_t weight = weight_of(ranks[j]);
                bin[j] = is_in ? its : kBins;
                mine[j] = is_in && weighs ? weight : 0;
            }
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const uint32_t at = scratch(bin[j] * 4), low = uint32_t(mine[j]);
                if (bin[j] < kBins) add_shared4(at, 1);
                if (mine[j] == 0) continue;
                const uint32_t carry = add_shared4(at + kBins * 4, low) + low < low;
                add_shared4(at + kBins * 8, uint32_t(mine[j] >> 32) + carry);
            }
        });
        barrier();
        perk_draw_room *room = in.room();
        uint32_t *const counts = &room->counts[passes % 2][w.thread];
        uint64_t *const weights = &room->weights[passes % 2][w.thread];
        passes++;
        const uint32_t mine = load_shared4(count_at);
        if (mine != 0) {
            add_gpu4(counts, mine);
            add_gpu8(weights, join_words(load_shared4(low_at), load_shared4(high_at)));
        }
        meet();
        const uint2 all_weight = load_coherent8(weights);
        const Measure all{load_coherent4(counts), join_words(all_weight.x, all_weight.y)};
        const Measure now{all.count - older.count, all.weight - older.weight};
        older = newer;
        newer = all;
        return now;
    }

    // What is looked for: the token that makes what comes before it, and itself, reach `wanted`; of a token to be
    // drawn, that is 2^-64 of all there is, and one.
    struct Search {
        uint64_t wanted;
        bool by_weight, by_id, draws;
        bool is_listed;      // it is among tokens that are listed, or will be: those with keys from `last` to
        uint64_t last, from; // `from`, `count` of them,
        uint32_t count;      // 0: they are there already
        Measure above;       // and behind so much
        uint32_t tie;        // else it has this rank, as too many others; but where a token is drawn, any
    };

    // Brings tokens to the threads, at most kBins.
    __device__ __forceinline__ void list(uint64_t last, uint64_t from, uint32_t count, bool is_last) {
        if (w.thread == 0) store_shared4(scratch(kCounter), 0);
        barrier();
        visit(slice_begin(), slice_end(), [&](const uint32_t(&ranks)[4], uint32_t id) {
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                const uint64_t at = key_of(ranks[j], id + j);
                if (at < last || at > from) continue;
                const uint32_t place = add_shared4(scratch(kCounter), 1);
                if (place >= kBins) continue;
                store_shared4(scratch(place * 8), uint32_t(at));
                store_shared4(scratch(place * 8 + 4), ranks[j]);
            }
        });
        barrier();
        perk_draw_room *room = in.room();
        uint64_t *const keys = room->keys[lists++ % 2];
        if (w.thread < load_shared4(scratch(kCounter))) {
            const uint32_t place = atomicAdd(&room->listed, 1u) - all_listed;
            if (place < kBins)
                keys[place] = join_words(load_shared4(scratch(w.thread * 8)), load_shared4(scratch(w.thread * 8 + 4)));
        }
        all_listed += count;
        meet(is_last);
        if (has_left()) return;
        listed = min(count, kBins);
        key = weight = 0;
        if (w.thread < listed) {
            const uint2 token = load_coherent8(keys + w.thread);
            key = join_words(token.x, token.y);
            weight = weight_of(token.y);
        }
        list_weights();
    }
    __device__ __forceinline__ void list_weights() const {
        store_shared16(scratch(w.thread * 16),
                       {uint32_t(key), uint32_t(key >> 32), uint32_t(weight), uint32_t(weight >> 32)});
    }

    // Among the listed tokens, by their ids or by the ranking.
    __device__ __forceinline__ Found find_listed(const Search &s) {
        const uint64_t mine = s.by_id ? key << 32 : key;
        Measure before = s.above;
        uint64_t all = 0;
        barrier(); // weights are there, and what was found last has been read
#pragma unroll 4
        for (uint32_t i = 0; i < listed && w.warp * 32 < listed; i++) {
            const Vec16 other = load_shared16(scratch(i * 16));
            const uint64_t theirs = s.by_id ? join_words(0, other.x) : join_words(other.x, other.y);
            const uint64_t their_weight = join_words(other.z, other.w);
            all += their_weight;
            if (theirs <= mine) continue;
            before.count++;
            before.weight += their_weight;
        }
        const bool is_there = w.thread < listed;
        const uint64_t wanted = s.draws ? perk_high_product(s.wanted, all) + 1 : s.wanted;
        return tell(wanted, s.by_weight, before, {is_there, is_there ? weight : 0}, key);
    }

    // ---- where the ranking is cut ----

    // To the first `goal` tokens, or (kTopP) to the first that weigh goal / 2^64 of all that is kept. By histograms,
    // until all that it can be are few enough to be listed, or share a rank; five of them are enough. kLikeliest fills
    // in the sum of all weights as well.
    __device__ __forceinline__ void seek(Search &s, Stage stage, uint64_t goal) {
        Bins bins = first_bins();
        const bool weighs = stage == kLikeliest || rule().top_p != 0;
#pragma unroll 1
        for (uint32_t pass = 0; pass < 8; pass++) {
            Measure mine = first, before;
            if (pass > 0 || !has_first) mine = measure(bins, weighs);
            const Measure all = scan(mine, before);
            if (pass == 0) {
                first = mine;
                has_first = true;
                if (kept == kAll) kept_weight = all.weight;
                if (stage == kLikeliest && is_leader() && w.thread == 0) in.record()->sum = all.weight;
                s.wanted = s.by_weight ? perk_nucleus(goal, kept_weight) : min(uint32_t(goal), all.count);
                if (goal == 0) return barrier(); // the next scan may be near
            }
            before.count += s.above.count;
            before.weight += s.above.weight;
            const Found bin = tell(s.wanted, s.by_weight, before, mine, w.thread);
            const bool is_whole = bin.before.count + bin.has.count <= kBins; // those before it are listed, too
            s.above = bin.before;
            s.count = bin.has.count;
            s.is_listed = s.count <= kBins;
            s.tie = lowest_of(bins, uint32_t(bin.what) % kBins);
            s.last = key_of(s.tie, kHighest);
            s.from = ~uint64_t(0);
            listed_from = is_whole ? s.tie : kHighest;
            if (is_whole) {
                s.count += s.above.count;
                s.above = {};
                return;
            }
            bins = bins_in(bins, s.tie, uint32_t(bin.what) % kBins);
            s.from = key_of(bins.high, 0);
            if (s.is_listed || bins.low >= bins.high) return;
        }
    }

    // Makes the place among those at the tie: so many of them measure enough. A division, of which the machine has
    // none.
    __device__ __forceinline__ void count_ties(Search &s) {
        const uint64_t each = s.by_weight ? weight_of(s.tie) : 1, rest = s.wanted - s.above.of(s.by_weight);
        uint64_t fewer = 0;
#pragma unroll 1
        for (uint32_t bit = kIdBits; bit-- > 0;) {
            const uint64_t next = fewer | 1u << bit;
            if (next * each < rest) fewer = next;
        }
        s.wanted = fewer + 1;
    }

    // ---- a place in the order of ids ----

    __device__ __forceinline__ uint64_t drawable(uint64_t key, uint64_t weight) const {
        return key < kept || weight < rule().min_weight ? 0 : weight;
    }

    // Tokens lie side by side in the order of their ids, as wide as their weights where one is drawn, else those at the
    // tie 1: the one with which the width reaches what is wanted. First the slice is found, then a part of it, and then
    // the token.
    __device__ __forceinline__ uint32_t find_id(const Search &s) {
        enum : uint32_t { kSlice, kSlices, kPart, kTokens }; // what is looked at: the worker's own, those of all, ...
        const auto width = [&](uint32_t rank, uint32_t id) {
            return s.draws ? drawable(key_of(rank, id), weight_of(rank)) : uint64_t(rank == s.tie);
        };
        uint64_t wanted = s.wanted;
        uint32_t begin = slice_begin(), end = slice_end(), looks = group.count > 1 ? kSlice : kPart;
        bool is_open = s.draws; // how wide all is
        Measure mine{}, before;
#pragma unroll 1
        for (;;) {
            uint32_t part = slice(), unit = w.thread;
            if (looks == kPart && end - begin <= kBins) looks = kTokens;
            if (looks == kTokens) {
                const uint32_t id = begin + unit;
                part = 1;
                mine.weight = id < end ? width(perk_rank(load_float(logits + id)), id) : 0;
            } else if (looks != kSlices) {
                part = part_of(begin, end), unit = w.warp;
                mine.weight = 0;
                visit(begin, end, [&](const uint32_t(&ranks)[4], uint32_t id) {
#pragma unroll
                    for (uint32_t j = 0; j < 4; j++) mine.weight += width(ranks[j], id + j);
                });
                for (uint32_t offset = 16; offset > 0; offset /= 2)
                    mine.weight += shuffle8(mine.weight, w.lane ^ offset);
                if (w.lane != 0) mine.weight = 0; // the warp's is its first lane's
            }
            const Measure all = scan(mine, before);
            if (looks == kSlice) {
                mine.weight = exchange(all.weight, s.draws);
                if (has_left()) return 0;
                begin = 0, end = kVocabulary, looks = kSlices;
                continue;
            }
            if (is_open) wanted = perk_high_product(wanted, all.weight) + 1;
            is_open = false;
            const Found found = tell(wanted, true, before, mine, unit);
            begin = min(end, begin + uint32_t(found.what) * part);
            end = min(end, begin + part);
            wanted -= found.before.weight;
            if (looks == kTokens) return begin;
            looks = kPart;
        }
    }

    // ---- log probabilities: of the model's own logits ----

    // The kept tokens are the likeliest, and listed.
    __device__ __forceinline__ void record_likeliest(bool wants) {
        if (!is_leader()) return;
        perk_draw_record *record = in.record();
        if (w.thread == 0) {
            record->largest = largest;
            record->count = wants ? int32_t(kept_count) : 0;
        }
        if (!wants || w.thread >= listed || key < kept) return;
        const uint32_t place = atomicAdd(&in.room()->recorded, 1u);
        if (place >= PERK_DRAW_TOP) return;
        record->top[place].token = int32_t(id_of(key));
        record->top[place].logit = perk_rank_logit(rank_of(key));
    }

    // ---- bias and penalties: into a copy of the row, every worker in its slice ----

    __device__ __forceinline__ void copy_slice() {
        float *adjusted = in.adjusted();
#pragma unroll 4
        for (uint32_t at = slice_begin() + w.thread * 4; at < slice_end(); at += PERK_CONSUMER_THREADS * 4)
            *reinterpret_cast<Vec16 *>(adjusted + at) = load_coherent16(logits + at);
        logits = adjusted;
        barrier();
    }
    __device__ __forceinline__ void add_biases() const {
        float *adjusted = in.adjusted();
        for (uint32_t i = w.thread; i < uint32_t(rule().bias_count); i += PERK_CONSUMER_THREADS) {
            const uint2 bias = load_coherent8(in.biases() + i);
            if (bias.x - slice_begin() >= slice_end() - slice_begin()) continue;
            adjusted[bias.x] = perk_sum(load_float(adjusted + bias.x), __uint_as_float(bias.y));
        }
        barrier();
    }
    // How often each token is in the answer, and a bit for those that are in the prompt; then whoever takes the number
    // away applies it.
    __device__ __forceinline__ void penalize() const {
        constexpr uint32_t kInPrompt = 1u << 31;
        float *adjusted = in.adjusted();
        const uint32_t length = in.length(), prompt_length = in.prompt_length(), begin = slice_begin();
#pragma unroll 1
        for (uint32_t turn = 0; turn < 2; turn++) {
#pragma unroll 1
            for (uint32_t first = w.thread; first < length; first += kLoads * PERK_CONSUMER_THREADS) {
                uint32_t ids[kLoads];
#pragma unroll
                for (uint32_t j = 0; j < kLoads; j++) {
                    const uint32_t i = first + j * PERK_CONSUMER_THREADS;
                    ids[j] = i < length ? load_coherent4(in.tokens() + i) : kHighest;
                }
#pragma unroll 1
                for (uint32_t round = 0; round < kLoads; round++) {
                    const uint32_t i = first + round * PERK_CONSUMER_THREADS, id = ids[0];
#pragma unroll
                    for (uint32_t j = 0; j + 1 < kLoads; j++) ids[j] = ids[j + 1];
                    if (id - begin >= slice_end() - begin) continue;
                    uint32_t *const seen = in.seen() + id;
                    if (turn == 0 && i < prompt_length) {
                        atomicOr(seen, kInPrompt);
                    } else if (turn == 0) {
                        atomicAdd(seen, 1u);
                    } else if (const uint32_t times = atomicExch(seen, 0u)) {
                        const float logit = load_float(adjusted + id);
                        adjusted[id] = perk_penalize(logit, &rule(), int32_t(times & ~kInPrompt));
                    }
                }
            }
            barrier();
        }
    }

    // From the model's logits to those that are drawn from. False: `token` is not drawn, but the best of them.
    __device__ __forceinline__ bool prepare(uint32_t &token) {
        uint32_t rank = perk_rank(largest);
        if (rule().bias_count || rule().has_penalties) {
            copy_slice();
            add_biases();
            if (rule().has_penalties) penalize();
            uint64_t best = 0;
            visit(slice_begin(), slice_end(), [&](const uint32_t(&ranks)[4], uint32_t id) {
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    const uint64_t other = key_of(ranks[j], id + j);
                    best = other > best ? other : best;
                }
            });
#pragma unroll 1
            for (uint32_t turn = 0; turn < 2; turn++) {
                best = most(best);
                if (turn == 0) best = exchange(best, rule().scale == 0.0f);
            }
            rank = rank_of(best);
            if (rank != PERK_RANK_NONE) token = id_of(best);
            largest = perk_rank_logit(rank);
        }
        kept = kAll;
        listed_from = kHighest;
        has_first = false;
        scale = rule().scale;
        return scale > 0.0f && rank != PERK_RANK_NONE && rank != PERK_RANK_INFINITE;
    }

    // ---- all of it ----

    // What a stage looks for, and where.
    __device__ __forceinline__ Search search(Stage stage, uint64_t goal) {
        Search s{};
        s.by_weight = stage == kTopP || stage == kToken;
        s.by_id = s.draws = stage == kToken;
        s.is_listed = listed_from <= rank_of(kept);
        if (stage == kRecord && !s.is_listed) {
            s.is_listed = goal != 0;
            s.last = kept, s.from = ~uint64_t(0), s.count = kept_count;
        } else if (stage == kToken) {
            s.wanted = perk_random_bits(rule().seed, in.length() - in.prompt_length());
        } else if (s.is_listed) { // only top-p finds all that is kept listed
            s.wanted = perk_nucleus(goal, kept_weight);
        } else if (stage != kRecord) {
            seek(s, stage, goal);
        }
        return s;
    }

    // A stage, which wants something; for kLikeliest and kRecord goal 0 is the sum of weights alone.
    __device__ __forceinline__ void take_stage(Stage stage, uint64_t goal, uint32_t &token) {
        Search s = search(stage, goal);
        if (stage <= kRecord && goal == 0) {
            if (stage == kRecord) record_likeliest(false);
            return;
        }
        if (s.is_listed && s.count > 0) list(s.last, s.from, s.count, stage > kRecord && listed_from != kHighest);
        if (has_left()) return;
        if (stage == kRecord) return record_likeliest(true);
        Found found;
        if (s.is_listed) {
            if (stage == kToken) weight = drawable(key, weight), list_weights();
            found = find_listed(s);
        } else {
            const uint64_t each = s.draws ? 0 : weight_of(s.tie);
            if (!s.draws) count_ties(s);
            const uint32_t id = find_id(s);
            found = {key_of(s.tie, id), s.above, {uint32_t(s.wanted), s.wanted * each}};
        }
        if (stage == kToken) {
            token = id_of(found.what);
            return;
        }
        kept = found.what;
        kept_count = found.before.count + found.has.count;
        kept_weight = found.before.weight + found.has.weight;
    }

    // The room as it was. False: for the leader to do.
    __device__ __forceinline__ bool leave() {
        if (meetings > 0 && !is_closed) meet(true);
        if (!is_leader()) return false;
        perk_draw_room *room = in.room();
        for (uint32_t i = 0; i < 2; i++) room->counts[i][w.thread] = 0, room->weights[i][w.thread] = 0;
        if (w.thread == 0) room->arrived = room->listed = room->recorded = 0;
        return true;
    }

    // `token`: argmax of the logits; in all threads of the leader it becomes the token that is drawn, an id outside the
    // vocabulary when the logits are not finite numbers. False: of the others.
    __device__ __forceinline__ bool run(uint32_t &token) {
        largest = load_float(logits + token);
        fetch_rule();
        scale = PERK_LOG2_E;
        if (perk_rank(largest) == PERK_RANK_INFINITE) {
            token = kHighest;
            return is_leader();
        }
#pragma unroll 1
        for (uint32_t stage = rule().logprobs ? kLikeliest : kTopK; stage <= kToken && !has_left(); stage++) {
            if (stage == kTopK && !prepare(token)) break;
            uint64_t goal = stage == kToken;
            if (stage <= kRecord) goal = rule().logprobs - 1;
            if (stage == kTopK && uint32_t(rule().top_k) < kVocabulary) goal = rule().top_k;
            if (stage == kTopP) goal = rule().top_p;
            if (goal != 0 || stage <= kRecord) take_stage(Stage(stage), goal, token);
        }
        if (rule().logprobs && is_leader() && w.thread == 0) in.record()->chosen = load_float(in.logits() + token);
        const bool stays = leave();
        barrier(); // the scratch is free again
        return stays;
    }
};

} // namespace perk
