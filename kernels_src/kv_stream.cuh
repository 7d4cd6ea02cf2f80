// The KV cache through the weight ring: what a task of attention reads of the cache is part of the stream, in the place
// that the task has in the worker's list. So it is under way while the linear before is still at work, it comes at the
// rate of bulk copies, and the stream does not stop for attention.
//
// A unit is the keys and values of 16 positions of a KV head: a piece of memory of each. The consumer warps of a task
// work in rounds, a unit a round for each warp that has one left; a round's units lie side by side in as few chunks as
// can be. Producer and consumers both follow from the step's batch who has how many. A task without any unit has a
// chunk with nothing in it, whose end says that the producer has read the batch.
#pragma once

namespace perk {

// A page of one layer and one KV head holds K as [position][dimension] and V as [block of 16
// positions][dimension][position].
template <uint32_t kKvHeads, uint32_t kHeadDim>
struct KvCache {
    static constexpr uint32_t kPageElements = program::page_size * kHeadDim;  // of keys, and as many of values
    static constexpr uint32_t kUnitBytes = PERK_KV_UNIT * kHeadDim * 2;       // of keys, and as many of values
    static constexpr uint32_t kPageUnits = program::page_size / PERK_KV_UNIT; // of keys, and as many of values
    static constexpr uint32_t kChunkUnits = PERK_CHUNK_BYTES / (2 * kUnitBytes);

    static __device__ __forceinline__ uint32_t page_index(uint32_t layer, uint32_t page, uint32_t head) {
        return (layer * program::max_num_pages + page) * kKvHeads + head;
    }
    static __device__ __forceinline__ uint8_t *kv_page(const Worker &w, uint32_t layer, uint32_t page, uint32_t head) {
        return w.args.kv + uint64_t(page_index(layer, page, head)) * 2 * kPageElements * 2;
    }
    static __device__ __forceinline__ uint32_t page_of(const Worker &w, uint32_t request, uint32_t position) {
        const uint32_t entry = request * program::pages_per_request + position / program::page_size;
        return w.page_word(entry);
    }
    // In a page, in bytes: the values of the position and the next ones of its block.
    static __device__ __forceinline__ uint32_t value_offset(uint32_t position, uint32_t dimension) {
        const uint32_t in_page = position % program::page_size, block = in_page / PERK_KV_UNIT;
        return (kPageElements + (block * kHeadDim + dimension) * PERK_KV_UNIT + in_page % PERK_KV_UNIT) * 2;
    }
};

#if PERK_STREAMS_KV
using StreamedKv = KvCache<program::kv_heads, program::kv_head_dim>;
static_assert((PERK_CONSUMER_WARPS + StreamedKv::kChunkUnits - 1) / StreamedKv::kChunkUnits <= program::ring_slots,
              "a round does not fit the ring");

// Chunks of a round in which `units` units come.
__device__ __forceinline__ uint32_t round_chunks(uint32_t units) {
    return max(1u, (units + StreamedKv::kChunkUnits - 1) / StreamedKv::kChunkUnits);
}

// The items of the cache that a warp has of a task, in order: of each of the task's units (head, part) the items part,
// part + kv_parts, ... of that KV head, dealt to the warps. Lane i has those of warp i.
struct KvItems {
    uint32_t unit, end, item;

    __device__ __forceinline__ KvItems(const Worker &w, uint32_t first, uint32_t count)
        : unit(first), end(w.lane < PERK_CONSUMER_WARPS ? first + count : first) {
        item = first_item(w);
        settle(w);
    }
    __device__ __forceinline__ uint32_t first_item(const Worker &w) const {
        return unit % program::kv_parts + program::kv_parts * w.lane;
    }
    // Items of the cache are the step's first ones.
    __device__ __forceinline__ void settle(const Worker &w) {
        uint32_t place = program::batch_query_tiles + PERK_QUERY_TILE_FRESH_ITEM;
        forget(place); // or its address would be kept in registers over all tasks
        const uint32_t cached = w.batch_word(place);
        while (unit < end && item >= cached) {
            unit++;
            item = first_item(w);
        }
    }
    __device__ __forceinline__ bool has_item() const { return unit < end; }
    __device__ __forceinline__ uint32_t head() const { return unit / program::kv_parts; }
    __device__ __forceinline__ void next(const Worker &w) {
        item += program::kv_parts * PERK_CONSUMER_WARPS;
        settle(w);
    }
    // Word `field` of the item.
    __device__ __forceinline__ uint32_t word(const Worker &w, uint32_t field) const {
        return w.batch_word(program::batch_attention_items + item * (sizeof(perk_attention_item) / 4) + field);
    }
    __device__ __forceinline__ uint32_t units(const Worker &w) const {
        return (word(w, 2) - word(w, 1) + PERK_KV_UNIT - 1) / PERK_KV_UNIT;
    }
};

// ---- the producer ----

// Lane i's place in what warp i is to get.
struct KvSource {
    KvItems items;
    uint32_t units; // of the item: its next one in the low half, its end in the high one: registers are few

    __device__ __forceinline__ KvSource(const Worker &w, const StreamTask &task)
        : items(w, task.lane_in_round, task.rounds) {
        load(w);
    }
    __device__ __forceinline__ void load(const Worker &w) {
        if (!items.has_item()) return;
        units = items.word(w, 1) / PERK_KV_UNIT | (items.word(w, 2) + PERK_KV_UNIT - 1) / PERK_KV_UNIT << 16;
    }
    // The place of the unit's keys in the cache, in units of so many bytes.
    __device__ __forceinline__ uint32_t keys(const Worker &w, uint32_t layer) const {
        const uint32_t begin = units % 65536 * PERK_KV_UNIT, tile = items.word(w, 0);
        const uint32_t request = w.batch_word(program::batch_query_tiles + tile * (sizeof(perk_query_tile) / 4));
        return StreamedKv::page_index(layer, StreamedKv::page_of(w, request, begin), items.head()) * 2 *
                   StreamedKv::kPageUnits +
               begin % program::page_size / PERK_KV_UNIT;
    }
    __device__ __forceinline__ void next(const Worker &w) {
        units++;
        if (units % 65536 != units / 65536) return;
        items.next(w);
        load(w);
    }
};

// Copies of the cache that may be under way: as many as there ever are, since few others are on their way while
// attention reads it, and a round is read when all of it is there. (A chunk that is further back than the ring is long
// has no phase of its own any more that one could wait for.)
constexpr uint32_t kKvInFlight =
    program::chunks_in_flight_behind < program::ring_slots ? program::chunks_in_flight_behind : program::ring_slots;

// A round: unit i goes to place i % kChunkUnits of chunk i / kChunkUnits. `mine` is that of this lane, if there are so
// many, and its keys are at `keys`.
__device__ __forceinline__ uint32_t push_round(Worker &w, uint32_t units, uint32_t mine, uint32_t keys,
                                               uint32_t chunk) {
    do {
        stay(w);
        await_slot(w, chunk, {w.position + 1, 0}); // weights come behind the task
        if (chunk >= kKvInFlight) wait_full<true>(w, chunk - kKvInFlight);
        const uint32_t here = min(units, StreamedKv::kChunkUnits), full = w.full_barrier(chunk);
        if (w.lane == 0) mbarrier_arrive_expect(full, here * 2 * StreamedKv::kUnitBytes);
        __syncwarp();
        if (mine < here) {
            const uint32_t to = w.ring_slot(chunk) + mine * 2 * StreamedKv::kUnitBytes;
            const uint8_t *from = w.args.kv + uint64_t(keys) * StreamedKv::kUnitBytes;
            copy_bulk(to, from, StreamedKv::kUnitBytes, full);
            copy_bulk(to + StreamedKv::kUnitBytes, from + StreamedKv::kPageUnits * StreamedKv::kUnitBytes,
                      StreamedKv::kUnitBytes, full);
        }
        __syncwarp();
        chunk++;
        units -= here;
        mine -= StreamedKv::kChunkUnits;
    } while (units > 0);
    return chunk;
}

__device__ __forceinline__ uint32_t stream_kv(Worker &w, const StreamTask &task, uint32_t chunk) {
    await_begin(w, chunk); // before, there is no batch
    KvSource source(w, task);
    do {
        const bool has_unit = source.items.has_item();
        const uint32_t live = __ballot_sync(0xffffffffu, has_unit);
        const uint32_t mine = has_unit ? __popc(live & ((1u << w.lane) - 1)) : 0xffffffffu / 2;
        uint32_t position = w.position;
        forget(position); // the layer, anew: registers are few
        const uint32_t layer = __ldg(&record_at(w, position)->stream_base);
        chunk = push_round(w, __popc(live), mine, has_unit ? source.keys(w, layer) : 0, chunk);
        if (has_unit) source.next(w);
        __syncwarp();
    } while (__any_sync(0xffffffffu, source.items.has_item()));
    return chunk;
}

// ---- the consumers ----

// A warp's way through the rounds of a task. All lanes take part.
struct KvRounds {
    uint32_t chunk;     // the round's first
    uint32_t round = 0; // its number
    uint32_t units;     // of lane i: those of warp i

    __device__ __forceinline__ KvRounds(const Worker &w, const TaskView &task, uint32_t first_chunk)
        : chunk(first_chunk), units(0) {
        for (KvItems items(w, task.first(), task.count()); items.has_item(); items.next(w)) units += items.units(w);
        __syncwarp();
    }
    __device__ __forceinline__ uint32_t live() const { return __ballot_sync(0xffffffffu, units > round); }

    // Until the round is there. Returns where this warp's unit is, if it has one.
    __device__ __forceinline__ uint32_t await(const Worker &w, uint32_t live) const {
        const uint32_t mine = chunk + w.lane, unit = __popc(live & ((1u << w.warp) - 1));
        wait_slot<false>(w, w.full_barrier(mine), mine / program::ring_slots & 1, PERK_ROLE_RING_FULL, mine,
                         w.lane >= round_chunks(__popc(live)));
        return w.ring_slot(chunk + unit / StreamedKv::kChunkUnits) +
               unit % StreamedKv::kChunkUnits * 2 * StreamedKv::kUnitBytes;
    }
    // `loaded` is a word of all that the warp read.
    __device__ __forceinline__ void release(const Worker &w, uint32_t live, uint32_t loaded) {
        const uint32_t chunks = round_chunks(__popc(live));
        __syncwarp();
        mbarrier_arrive_lanes_after(w.empty_barrier(chunk + w.lane), w.lane, chunks, loaded);
        chunk += chunks;
        round++;
    }
    // The rounds in which the warp has nothing. Returns the next chunk.
    __device__ __forceinline__ uint32_t finish(const Worker &w) {
        for (uint32_t rest = live(); rest != 0 || round == 0; rest = live()) {
            await(w, rest);
            release(w, rest, 0);
        }
        return chunk;
    }
};
#endif

} // namespace perk
