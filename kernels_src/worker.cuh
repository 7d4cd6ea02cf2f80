// The worker: one thread block that stays on its SM and walks its static list of tasks. Warps 0 ... 7 (the consumers)
// compute; warp 8 (the producer) streams what the whole list reads, packed weights and the KV cache of earlier steps,
// through a ring in shared memory, across task boundaries. The one dependency of a step that it ever looks at is the
// routing of experts. Every wait has a limit by the global timer.
#pragma once

namespace perk {

using namespace ptx;

#if PERK_STREAMS_KV
constexpr bool kStreamsKv = true; // what attention reads of the KV cache comes through the ring (kv_stream.cuh)
#else
constexpr bool kStreamsKv = false;
#endif
constexpr uint32_t kConsumerBarrier = 1;    // named barrier of the 8 consumer warps; 0 is __syncthreads
constexpr uint32_t kPollsPerClockRead = 64; // reading the global timer costs more than a poll
constexpr uint32_t kEnded = 2;              // in place of "given up": there are no more steps

// ---- shared memory: ring slots | slices of wide linears' inputs | staging of activations | reduction scratch | the
// step's batch | task records | found chunks | barriers ----
struct SharedMap {
    static constexpr uint32_t ring = 0;
    static constexpr uint32_t inputs = program::ring_slots * PERK_CHUNK_BYTES;
#if PERK_WIDE
    static constexpr uint32_t slice_bytes = program::wide_tokens * PERK_SLICE_ROW_BYTES; // a slot
    static constexpr uint32_t staging = inputs + program::input_slots * slice_bytes;
#else
    static constexpr uint32_t staging = inputs;
#endif
    static constexpr uint32_t reduction = staging + program::staging_bytes;
    static constexpr uint32_t batch = reduction + program::reduction_bytes;
    static constexpr uint32_t tasks = batch + program::batch_shared_bytes;
    static constexpr uint32_t given_up = tasks + 2 * sizeof(perk_task_record); // a word: a wait exceeded its limit
    static constexpr uint32_t step = given_up + 4;                             // and five of many_steps.cuh
    static constexpr uint32_t told = step + 4, served = told + 4, wait_limit = served + 4, next = wait_limit + 8,
                              begun = next + 4;
    static constexpr uint32_t found = tasks + PERK_TASK_SLOTS_BYTES; // look_ahead: chunks, and where the search goes on
    static constexpr uint32_t found_end = found + PERK_FOUND_CHUNKS * 4;
    static constexpr uint32_t laps =
        found_end + 8; // of the list, that the producer has streamed of many steps; and kHasBegun
    static constexpr uint32_t last_brought = laps + 4; // when a chunk was copied or brought the last time, in cycles
    static constexpr uint32_t barriers = found + PERK_FOUND_BYTES;
#if PERK_WIDE
    static constexpr uint32_t input_barriers = barriers + 2 * 8 * program::ring_slots;
    static constexpr uint32_t bytes = input_barriers + 2 * 8 * program::input_slots;
#else
    static constexpr uint32_t bytes = barriers + 2 * 8 * program::ring_slots;
#endif
};
#if PERK_WIDE
constexpr bool kIsBatched = program::wide_tokens <= PERK_BATCHED_TOKENS; // wide linears are those of batched.cuh
static_assert(!kIsBatched || program::input_slots % PERK_CONSUMER_WARPS == 0, "a slot is always the same warp's");
#else
constexpr bool kIsBatched = false;
#endif
constexpr bool kReadsOnce = program::max_tokens <= PERK_BATCHED_TOKENS; // a step reads no weight twice
static_assert(SharedMap::bytes <= program::shared_bytes, "the plan and the kernel disagree about shared memory");

// How far the producer has gone ahead of its ring (look_ahead).
struct Lookahead {
    uint32_t brought; // chunks that are in L2, or on their way there, and not copied yet
    uint32_t left;    // of those that were found: not brought
};

struct Worker {
    const perk_kernel_args &args;
    uint32_t warp, lane, thread;
    uint32_t shared;   // address of dynamic shared memory
    uint32_t position; // of the running task in the worker's list
    Lookahead ahead;   // the producer's
#if PERK_WIDE
    uint32_t slices = 0; // of inputs of wide linears, that this role has come by: slots of them
#endif

    __device__ __forceinline__ uint32_t index() const { return blockIdx.x; } // of this worker
    // Steps that were completed before this one.
    __device__ __forceinline__ uint32_t step() const {
        if constexpr (program::many_steps)
            return load_shared4(shared + SharedMap::step);
        else
            return args.step;
    }

    // Forgets what the compiler knows of the thread's coordinates. Without it, addresses of every kind of task are
    // computed ahead of the task loop, kept through all tasks, and spilled by those that need the registers.
    __device__ __forceinline__ void forget_coordinates() {
        thread = thread_number();
        forget(shared);
        warp = thread / 32;
        lane = thread % 32;
    }

    __device__ __forceinline__ uint32_t ring_slot(uint32_t chunk) const {
        return slot_address(chunk % program::ring_slots);
    }
    __device__ __forceinline__ uint32_t slot_address(uint32_t slot) const {
        return shared + SharedMap::ring + slot * PERK_CHUNK_BYTES;
    }
    __device__ __forceinline__ uint32_t slot_full_barrier(uint32_t slot) const {
        return shared + SharedMap::barriers + slot * 8;
    }
    __device__ __forceinline__ uint32_t slot_empty_barrier(uint32_t slot) const {
        return slot_full_barrier(slot) + program::ring_slots * 8;
    }
    __device__ __forceinline__ uint32_t full_barrier(uint32_t chunk) const {
        return slot_full_barrier(chunk % program::ring_slots);
    }
    __device__ __forceinline__ uint32_t empty_barrier(uint32_t chunk) const {
        return slot_empty_barrier(chunk % program::ring_slots);
    }
#if PERK_WIDE
    // The same of a slice of an input.
    __device__ __forceinline__ uint32_t input_slot(uint32_t slice) const {
        return shared + SharedMap::inputs + slice % program::input_slots * SharedMap::slice_bytes;
    }
    __device__ __forceinline__ uint32_t input_full(uint32_t slice) const {
        return shared + SharedMap::input_barriers + slice % program::input_slots * 8;
    }
    __device__ __forceinline__ uint32_t input_empty(uint32_t slice) const {
        return input_full(slice) + program::input_slots * 8;
    }
#endif
    __device__ __forceinline__ uint32_t staging() const { return shared + SharedMap::staging; }
    __device__ __forceinline__ uint32_t reduction() const { return shared + SharedMap::reduction; }
    // A word of the step's batch. It lies in shared memory unless it is too large: tokens, positions, pages and items
    // stand at the head of chains of loads, and every one of them would be a trip to L2.
    __device__ __forceinline__ uint32_t batch_word(uint32_t index) const {
        return batch_word<(program::batch_shared_bytes > 0)>(index);
    }
    // The same of its page table, which comes last and may be left out there.
    __device__ __forceinline__ uint32_t page_word(uint32_t entry) const {
        constexpr bool kIsShared = program::batch_shared_bytes > program::batch_page_table * 4;
        return batch_word<kIsShared>(program::batch_page_table + entry);
    }
    template <bool kIsShared>
    __device__ __forceinline__ uint32_t batch_word(uint32_t index) const {
        if constexpr (kIsShared)
            return load_shared4(shared + SharedMap::batch + index * 4);
        else if constexpr (program::many_steps)
            return load_coherent4(args.batch + index);
        else
            return __ldg(args.batch + index);
    }
    __device__ __forceinline__ uint32_t num_tokens() const { return batch_word(PERK_BATCH_NUM_TOKENS); }
    __device__ __forceinline__ uint32_t num_logit_rows() const { return batch_word(PERK_BATCH_NUM_LOGIT_ROWS); }
    __device__ __forceinline__ uint32_t num_attention_items() const {
        return batch_word(PERK_BATCH_NUM_ATTENTION_ITEMS);
    }
};

// ---- waits with a limit ----
// Whoever waits past the limit reports it, and from then on nobody waits for long any more: every worker that would
// runs its list to the end on whatever is in memory, without signalling, so that the counters still tell how far the
// step has come. The launch ends like any other, the host throws the step away, and the context survives. Who waits for
// weights that never come works on with what the slot holds; a producer that waits for a slot in vain ends.

// Writes who waited for what, for the host; the first one only.
__device__ __forceinline__ void report_hang(const Worker &w, uint32_t role, uint32_t counter, uint32_t seen,
                                            uint32_t wanted) {
    if (atomicCAS(w.args.hang_claim, 0u, 1u) != 0u) return;
    volatile perk_hang_report *report = w.args.hang;
    report->worker = w.index();
    report->position = w.position;
    report->role = role;
    report->counter = counter;
    report->seen = seen;
    report->wanted = wanted;
    report->step = w.step();
    report->complete = 1; // the host reads it when the launch is over: no fence
}

// How long a wait has lasted. Waits look at it between polls, and only there, so that a wait that finds what it wants
// at once costs one test and one branch.
struct Patience {
    uint32_t polls = 0;
    uint64_t start = 0;

    // True when the limit has passed, here or elsewhere.
    __device__ __forceinline__ bool is_over(const perk_kernel_args &args) {
        if (!program::waits_are_limited || ++polls % kPollsPerClockRead != 0) return false;
        const uint64_t now = global_timer();
        if (start == 0) start = now;
#if PERK_WIDE // from shared memory: the argument would be loaded ahead of the wait, and its register spilled
        const uint32_t limit = dynamic_shared() + SharedMap::wait_limit;
        const uint64_t most = load_shared4(limit) | uint64_t(load_shared4(limit + 4)) << 32;
        return now - start > most || load_coherent4(args.hang_claim) != 0;
#else
        return now - start > args.wait_limit_ns || load_coherent4(args.hang_claim) != 0;
#endif
    }
};

// One thread waits for a counter; the caller spreads the news with a barrier.
// This loop and the next are left at one place only, in the way of those whose wait succeeds: giving up changes what is
// waited for. A second exit costs a few percent of a step, since lanes have to be brought together behind it.
__device__ __forceinline__ void wait_counter(const Worker &w, uint32_t counter, uint32_t target,
                                             uint32_t role = PERK_ROLE_COUNTER) {
    Patience patience;
    uint32_t seen;
    while (static_cast<int32_t>((seen = load_acquire_gpu(w.args.counters + counter)) - target) < 0)
        if (patience.is_over(w.args)) {
            report_hang(w, role, counter, seen, target);
            store_shared4(w.shared + SharedMap::given_up, 1);
            target = seen;
        }
}

// Lets racecheck see that all lanes know what each of them has waited for (ptx.cuh, mbarrier_arrive_after).
__device__ __forceinline__ void see_slots(uint32_t barrier, uint32_t parity, bool is_over) {
    const uint32_t awaited = __ballot_sync(0xffffffffu, !is_over);
    for (uint32_t lane = 0; lane < 32; lane++) {
        const uint32_t its_barrier = __shfl_sync(0xffffffffu, barrier, lane),
                       its_parity = __shfl_sync(0xffffffffu, parity, lane);
        if (awaited >> lane & 1)
            while (!mbarrier_test(its_barrier, its_parity)) continue; // at once: the phase has completed
    }
}

// A whole warp waits for the barrier of a slot, each lane for its own; `is_over`: not this one.
template <bool kEndsLate> // or takes the slot as it is
__device__ __forceinline__ void wait_slot(const Worker &w, uint32_t barrier, uint32_t parity, uint32_t role,
                                          uint32_t chunk, bool is_over = false) {
    Patience patience;
    while (!is_over && !mbarrier_test(barrier, parity))
        if (patience.is_over(w.args)) {
            report_hang(w, role, chunk, 0, 1);
            if (kEndsLate) exit_thread();
            store_shared4(w.shared + SharedMap::given_up, 1);
            parity ^= 1; // of the phase before, which has completed
        }
    __syncwarp(); // what follows works with all lanes
    if (kForRacecheck) see_slots(barrier, parity, is_over);
}

// ---- eager values (abi.h) ----

constexpr bool kIsEager = program::eager_bytes > 0;
constexpr bool kLooks = kIsEager || program::eager_pieces;
constexpr uint32_t kMostLooks = 1u << 16; // values follow their signal within about a microsecond

// Places are numbered by 256 bytes.
__device__ __forceinline__ bool is_eager(uint32_t place) { return kIsEager && place >= program::eager_place; }
__device__ __forceinline__ uint8_t *at_place(const Worker &w, uint32_t place) {
    return w.args.activations + uint64_t(place) * 256;
}
// Where an activation is in this step.
__device__ __forceinline__ uint8_t *activation_at(const Worker &w, uint32_t place) {
    if (is_eager(place) && w.step() % 2 != 0) place += program::eager_bytes / 256;
    return at_place(w, place);
}

// Looks at values that a warp has just loaded: whether one of them is vacant. Where they need not be looked at, or have
// been too often, they are taken as they are; then the worker has given up, and does not signal what it makes of them.
struct EagerLook {
    bool is_eager;
    uint32_t most = 0, looks = 0;

    __device__ __forceinline__ void see(uint32_t pair) {
        if (kIsEager) most = max_halves(most, pair);
    }
    __device__ __forceinline__ void see(uint2 values) {
        see(values.x);
        see(values.y);
    }
    __device__ __forceinline__ void see(const Vec16 &values) {
        see(values.x);
        see(values.y);
        see(values.z);
        see(values.w);
    }
    // By all lanes. True when the warp has to load once more.
    __device__ __forceinline__ bool again(const Worker &w) {
        if (!kIsEager || !is_eager) return false;
        return is_missing(w, most % 65536 == PERK_VACANT || most / 65536 == PERK_VACANT);
    }
    // The same of fp32.
    __device__ __forceinline__ void see_word(float value) {
        if (kLooks) most = max(most, __float_as_uint(value));
    }
    __device__ __forceinline__ bool again_words(const Worker &w) {
        return kLooks && is_eager && is_missing(w, most == PERK_VACANT_WORD);
    }

    __device__ __forceinline__ bool is_missing(const Worker &w, bool is_vacant) {
        if (!__any_sync(0xffffffffu, is_vacant)) return false;
        most = 0;
        if (++looks < kMostLooks && !load_shared4(w.shared + SharedMap::given_up)) return true;
        store_shared4(w.shared + SharedMap::given_up, 1);
        return false;
    }
};

// Makes this task's share of the other step's copy vacant. A task of the vocabulary projection, once it has its inputs:
// nobody is in the step before any more.
__device__ __forceinline__ void clear_eager(const Worker &w, uint32_t share, uint32_t shares) {
    constexpr uint32_t kVacant = PERK_VACANT << 16 | PERK_VACANT;
    if constexpr (kIsEager) {
        const uint32_t place = program::eager_place + (w.step() % 2 == 0 ? program::eager_bytes / 256 : 0);
        Vec16 *copy = reinterpret_cast<Vec16 *>(at_place(w, place));
        uint64_t end = program::eager_bytes / 16;
        for (uint64_t i = share * PERK_CONSUMER_THREADS + w.thread; i < end; i += shares * PERK_CONSUMER_THREADS)
            copy[i] = {kVacant, kVacant, kVacant, kVacant};
    }
}

// ---- the stream ----

__device__ __forceinline__ const perk_task_record *record_at(const Worker &w, uint32_t position) {
    return w.args.tasks + uint64_t(w.index()) * program::tasks_per_worker + position;
}

// What the producer needs of a record.
struct StreamTask {
    uint32_t kind;
    uint32_t lane_in_round, workers, rounds;
    uint32_t base, tiles, blocks; // packed weights of the stage; tiles 0: it has none
#if PERK_WIDE
    uint32_t together; // tiles side by side, of a wide linear
    uint32_t share_tokens;
#endif
};
__device__ __forceinline__ StreamTask load_stream_task(const Worker &w, uint32_t position) {
    const perk_task_record *record = record_at(w, position);
    StreamTask task{__ldg(&record->kind),         __ldg(&record->first),       __ldg(&record->stride),
                    __ldg(&record->count),        __ldg(&record->stream_base), __ldg(&record->stream_tiles),
                    __ldg(&record->stream_blocks)};
#if PERK_WIDE
    task.together = __ldg(&record->stream_together);
    task.share_tokens = __ldg(&record->share_tokens);
#endif
    return task;
}

#if PERK_WIDE
// Where chunks of a wide linear's tile lie: those that all workers stream in its round are side by side in memory.
struct TilePlace {
    uint32_t base, width, lane_in_round; // in blocks, of the round's first chunk; tiles of the round; which one this is
    __device__ __forceinline__ TilePlace(const StreamTask &task, uint32_t i) { // the worker's i-th
        const uint32_t tile = (task.lane_in_round + i * task.workers) % task.tiles, round = tile / gridDim.x;
        lane_in_round = tile % gridDim.x;
        width = min(gridDim.x, task.tiles - round * gridDim.x);
        base = task.base + round * gridDim.x * task.blocks;
    }
    // Of block `begin` of the tile, in blocks.
    __device__ __forceinline__ uint32_t of(const StreamTask &task, uint32_t begin) const {
        const uint32_t in_chunk = begin % PERK_CHUNK_BLOCKS, chunk_begin = begin - in_chunk;
        const uint32_t chunk_blocks = min(uint32_t(PERK_CHUNK_BLOCKS), task.blocks - chunk_begin);
        return base + width * chunk_begin + lane_in_round * chunk_blocks + in_chunk;
    }
};
#endif

// Where a chunk of the worker's tiles of one stage is: number `n` of the task, in the order in which they are streamed.
// Of a linear of few tokens, tiles come one by one, and the chunk lies beside the same chunk of the other workers'
// tiles of that round; of a batched one, `together` tiles come side by side.
struct ChunkSource {
    uint32_t packed; // its first block of memory (28 bits are 256 GB), and how many it has, less one

    static __device__ __forceinline__ uint32_t tile_chunks(const StreamTask &task) {
        return (task.blocks + PERK_CHUNK_BLOCKS - 1) / PERK_CHUNK_BLOCKS;
    }
    static __device__ __forceinline__ uint32_t count(const StreamTask &task) { return task.rounds * tile_chunks(task); }

    __device__ __forceinline__ explicit ChunkSource(uint32_t packed) : packed(packed) {}
    __device__ __forceinline__ ChunkSource(const StreamTask &task, uint32_t n) {
        const uint32_t in_tile = tile_chunks(task);
#if PERK_WIDE
        if (task.together != 0) {
            const uint32_t first = n / (task.together * in_tile) * task.together, in_group = n - first * in_tile;
            const uint32_t tiles = min(task.together, task.rounds - first),
                           begin = in_group / tiles * PERK_CHUNK_BLOCKS;
            pack(TilePlace(task, first + in_group % tiles).of(task, begin), task.blocks - begin);
            return;
        }
#endif
        const uint32_t before = n / in_tile * task.workers, begin = n % in_tile * PERK_CHUNK_BLOCKS;
        const uint32_t blocks = min(uint32_t(PERK_CHUNK_BLOCKS), task.blocks - begin);
        pack(task.base + before * task.blocks + min(task.workers, task.tiles - before) * begin +
                 task.lane_in_round * blocks,
             blocks);
    }
    // `rest`: blocks of the tile from this one on.
    __device__ __forceinline__ void pack(uint32_t block, uint32_t rest) {
        packed = block * PERK_CHUNK_BLOCKS + min(uint32_t(PERK_CHUNK_BLOCKS), rest) - 1;
    }
    __device__ __forceinline__ const uint8_t *at(const Worker &w) const {
        return w.args.weights + uint64_t(packed / PERK_CHUNK_BLOCKS) * PERK_WEIGHT_BLOCK_BYTES;
    }
    __device__ __forceinline__ uint32_t bytes() const {
        return (packed % PERK_CHUNK_BLOCKS + 1) * PERK_WEIGHT_BLOCK_BYTES;
    }
};

// ---- looking ahead ----
// A ring holds about 8 us of the stream. Where a chain of stages takes longer than that, the ring is full and memory
// would stand; so the producer brings what comes behind the ring to L2 meanwhile, at the pace at which memory gives it,
// and goes on with that for as long as it copies such chunks from there.

constexpr bool kLooksAhead = program::chunks_ahead > 0 && !PERK_PORTABLE;

// Where the stream goes on behind the chunk that is copied now: a task, and which of its chunks.
struct StreamPlace {
    uint32_t position, chunk;
};

// Of those that were found, the one with so many left, itself included: as ChunkSource packs it.
__device__ __forceinline__ uint32_t found_chunk(const Worker &w, uint32_t left) {
    return w.shared + SharedMap::found + (PERK_FOUND_CHUNKS - left) * 4;
}

// Finds out where the next chunks of a task are, a lane each: from `next` on, unless some are in L2 already, and the
// search goes on behind them. False at the end of the list, where the next search goes on with the next step of many.
__device__ __forceinline__ bool find_chunks(Worker &w, StreamPlace next) {
    if (w.ahead.brought > 0) {
        const uint2 end = load_shared8(w.shared + SharedMap::found_end);
        next = {end.x, end.y};
    }
    for (;; next = {next.position + 1, 0}) {
        const StreamTask task = load_stream_task(w, next.position);
        if (task.kind == PERK_TASK_END) {
            if (program::many_steps) next = {0, 0};
            break;
        }
        const uint32_t count = task.blocks == PERK_STREAM_KV || task.tiles == 0 ? 0 : ChunkSource::count(task);
        if (next.chunk >= count) continue;
        w.ahead.left = min(count - next.chunk, uint32_t(PERK_FOUND_CHUNKS));
        const ChunkSource mine(task, min(next.chunk + w.lane, count - 1));
        if (w.lane < w.ahead.left) store_shared4(found_chunk(w, w.ahead.left - w.lane), mine.packed);
        next.chunk += w.ahead.left;
        break;
    }
    __syncwarp(); // all have read where it went on
    if (w.lane == 0) store_shared8(w.shared + SharedMap::found_end, {next.position, next.chunk});
    __syncwarp();
    return w.ahead.left > 0;
}

// Memory has another chunk to give about so many cycles after the one before. In shared memory, since the producer has
// few registers.
__device__ __forceinline__ void note_time(const Worker &w) {
    if (w.lane == 0) store_shared4(w.shared + SharedMap::last_brought, clock_cycles());
    __syncwarp();
}
__device__ __forceinline__ bool is_time_to_bring(const Worker &w) {
    const uint32_t since = load_shared4(w.shared + SharedMap::last_brought);
    return __any_sync(0xffffffffu, clock_cycles() - since >= program::cycles_per_chunk);
}

// Brings one more, if it is time for it. `next` is behind the chunk that is to be copied now. False when there is
// nothing more to bring.
__device__ __forceinline__ bool look_ahead(Worker &w, StreamPlace next) {
#if !PERK_PORTABLE
    Lookahead &ahead = w.ahead;
    if (ahead.brought + 1 > program::chunks_ahead) return false; // no ">=": the compiler warns where that is 0
    if (!is_time_to_bring(w)) return true;
    if (ahead.left == 0 && !find_chunks(w, next)) return false;
    if (w.lane == 0) {
        const ChunkSource source(load_shared4(found_chunk(w, ahead.left)));
        bring_to_l2(source.at(w), source.bytes());
    }
    ahead.left--;
    ahead.brought++;
    note_time(w);
#endif
    return true;
}

// What is copied comes from memory, unless it is ahead of what was brought.
__device__ __forceinline__ void stay(Worker &w) {
    if (!kLooksAhead || w.ahead.brought > 0) return;
    w.ahead.left = 0;
    note_time(w);
}

// Before a chunk of weights is copied: one that was brought comes from L2, and memory has time meanwhile.
__device__ __forceinline__ void leave_behind(Worker &w, StreamPlace next) {
    if (!kLooksAhead || w.ahead.brought == 0) return stay(w);
    w.ahead.brought--;
    look_ahead(w, next);
}

// ---- the weight ring ----
// Chunk number c (counted over the whole launch) lives in slot c % ring_slots. A slot's full barrier completes when its
// bytes have landed, its empty barrier when all consumer warps have read it.

template <bool kEndsLate = false>
__device__ __forceinline__ void wait_full(const Worker &w, uint32_t chunk) {
    wait_slot<kEndsLate>(w, w.full_barrier(chunk), chunk / program::ring_slots & 1, PERK_ROLE_RING_FULL, chunk);
}

// Where a chunk is: for who goes through the ring chunk by chunk, and has better things to do than divisions.
struct RingPlace {
    uint32_t slot, parity;

    static __device__ __forceinline__ RingPlace of(uint32_t chunk) {
        return {chunk % program::ring_slots, chunk / program::ring_slots & 1};
    }
    __device__ __forceinline__ RingPlace next() const {
        const bool is_last = slot + 1 == program::ring_slots;
        return {is_last ? 0 : slot + 1, is_last ? parity ^ 1 : parity};
    }
    // As wait_full and release_chunk.
    __device__ __forceinline__ void await(const Worker &w, uint32_t chunk) const {
        wait_slot<false>(w, w.slot_full_barrier(slot), parity, PERK_ROLE_RING_FULL, chunk);
    }
    __device__ __forceinline__ void release(const Worker &w, uint32_t loaded) const {
        __syncwarp();
        mbarrier_arrive_after(w.slot_empty_barrier(slot), w.lane, loaded);
    }
};
// By every lane of a consumer warp once it has read the chunk; `loaded` is a word of all that it read.
__device__ __forceinline__ void release_chunk(const Worker &w, uint32_t chunk, uint32_t loaded) {
    __syncwarp();
    mbarrier_arrive_after(w.empty_barrier(chunk), w.lane, loaded);
}

#if PERK_WIDE
// Warps that read a slice of an input: of batched linears one, whose slots have nobody else's slices.
constexpr uint32_t kInputReaders = kIsBatched ? 1 : PERK_CONSUMER_WARPS;
#endif

__device__ __forceinline__ void init_ring(const Worker &w) {
    if (w.thread == 0) {
        for (uint32_t slot = 0; slot < program::ring_slots; slot++) {
            mbarrier_init(w.full_barrier(slot), PERK_PORTABLE ? 32 : 1);
            mbarrier_init(w.empty_barrier(slot), PERK_CONSUMER_WARPS * kWarpArrivals);
        }
#if PERK_WIDE
        for (uint32_t slot = 0; slot < program::input_slots; slot++) {
            mbarrier_init(w.input_full(slot), 1);
            mbarrier_init(w.input_empty(slot), kInputReaders * kWarpArrivals);
        }
#endif
        fence_mbarrier_init();
        store_shared4(w.shared + SharedMap::given_up, 0);
#if PERK_WIDE
        store_shared4(w.shared + SharedMap::wait_limit, uint32_t(w.args.wait_limit_ns));
        store_shared4(w.shared + SharedMap::wait_limit + 4, uint32_t(w.args.wait_limit_ns >> 32));
#endif
    }
    __syncthreads();
}

constexpr uint32_t kStepPauseNs = 100; // between looks at whether a step has begun

// Whether the worker has no step to do any more: what a producer that has run ahead asks.
__device__ __forceinline__ bool has_ended(const Worker &w) {
    return __any_sync(0xffffffffu, load_shared4(w.shared + SharedMap::given_up) == kEnded);
}
// Nothing may be under way to the memory of a block that is gone.
__device__ __forceinline__ void land_chunks(const Worker &w, uint32_t end) {
    forget(end); // or the producer, who has few registers, would keep more about every chunk: it may be the last
    for (uint32_t chunk = end - min(end, program::ring_slots); chunk != end; chunk++) wait_full<true>(w, chunk);
}
// In the word of laps: the step that the producer is at has begun. Every layer asks; the fences come once a step.
constexpr uint32_t kHasBegun = 1u << 31;

// Until the consumers have begun the step that the producer is at, with its batch in place: before, there is nothing of
// it to read.
__device__ __forceinline__ void await_begin(const Worker &w, uint32_t chunk) {
    if constexpr (program::many_steps) {
        const uint32_t laps = load_shared4(w.shared + SharedMap::laps), wanted = w.args.step + laps;
        if (laps >= kHasBegun) return;
        while (__any_sync(0xffffffffu, static_cast<int32_t>(load_shared4(w.shared + SharedMap::begun) - wanted) < 0)) {
            if (has_ended(w)) {
                land_chunks(w, chunk);
                exit_thread();
            }
            pause(kStepPauseNs);
        }
        fence_block(); // what the consumers saw when they passed the gate
#if PERK_STREAMS_KV
        fence_copies(); // what earlier steps have appended to the cache
#endif
        if (w.lane == 0) store_shared4(w.shared + SharedMap::laps, laps | kHasBegun);
        __syncwarp();
    }
}

// How many copies may be under way: few, since more would only queue up in front of the few loads that are on the
// critical path (counters, activations); but more for a worker whose consumers have read nearly all that it has, so
// that those who are behind get more of the bandwidth, and all reach the end of a stage together. docs/performance.md
// has the measurements.
__device__ __forceinline__ void await_flight(const Worker &w, uint32_t chunk) {
    if (chunk < program::chunks_in_flight_behind) return;
    const uint32_t old = chunk - program::chunks_in_flight_behind;
    // One for all lanes: they find chunks, copy, and share what they know together.
    const bool is_behind = __any_sync(0xffffffffu, mbarrier_peek(w.empty_barrier(old), old / program::ring_slots & 1));
    if (!is_behind) wait_full<true>(w, chunk - program::chunks_in_flight);
}

// Until the chunk's slot is free; `next` is behind it. In a launch of many steps there is no limit, since consumers may
// idle, and whoever is stuck says so himself; where the launch has ended meanwhile, so does the producer.
__device__ __forceinline__ void await_slot(Worker &w, uint32_t chunk, StreamPlace next) {
    if (chunk < program::ring_slots) return;
    const uint32_t empty = w.empty_barrier(chunk), parity = (chunk / program::ring_slots - 1) & 1;
    // A poll that may last would keep it from looking ahead. What there is to bring takes some microseconds at most.
    if constexpr (kLooksAhead)
        while (!__all_sync(0xffffffffu, mbarrier_peek(empty, parity)) && look_ahead(w, next)) continue;
    if constexpr (program::many_steps) {
        bool is_over = false; // a lane by itself finds out; one that sleeps would see the launch's end too late
        while (!is_over && !mbarrier_peek(empty, parity))
            is_over = load_shared4(w.shared + SharedMap::given_up) == kEnded;
        if (__any_sync(0xffffffffu, is_over)) {
            land_chunks(w, chunk);
            exit_thread();
        }
    } else {
        wait_slot<true>(w, empty, parity, PERK_ROLE_RING_EMPTY, chunk);
    }
}
// And may be filled.
__device__ __forceinline__ void await_room(Worker &w, uint32_t chunk, StreamPlace next) {
    await_slot(w, chunk, next);
    await_flight(w, chunk);
}

// Starts the copy of one chunk. Where a step reads every weight once, weights leave L2 first: what is small and read in
// every layer or step stays there (records, gains, rotations, code).
__device__ __forceinline__ void push_chunk(Worker &w, uint32_t chunk, const uint8_t *source, uint32_t bytes,
                                           StreamPlace next = {}) {
    await_room(w, chunk, next);
#if PERK_PORTABLE
    const uint32_t slot = w.ring_slot(chunk);
    for (uint32_t offset = w.lane * 16; offset < bytes; offset += 32 * 16) copy_async16(slot + offset, source + offset);
    copy_async_arrive(w.full_barrier(chunk));
#else
    if (w.lane == 0) {
        mbarrier_arrive_expect(w.full_barrier(chunk), bytes);
        if constexpr (kReadsOnce)
            copy_bulk_once(w.ring_slot(chunk), source, bytes, w.full_barrier(chunk));
        else
            copy_bulk(w.ring_slot(chunk), source, bytes, w.full_barrier(chunk));
    }
    __syncwarp();
#endif
}

// ---- task records ----

// The record of the consumers' running task, in shared memory: a slot for it, and one for the next.
struct TaskView {
    uint32_t address;

    __device__ __forceinline__ TaskView(const Worker &w, uint32_t position)
        : address(w.shared + SharedMap::tasks + position % 2 * sizeof(perk_task_record)) {}
    __device__ __forceinline__ uint32_t get(uint32_t index) const { return load_shared4(address + index * 4); }
    __device__ __forceinline__ uint32_t kind() const { return get(0); }
    __device__ __forceinline__ uint32_t first() const { return get(2); }
    __device__ __forceinline__ uint32_t stride() const { return get(3); }
    __device__ __forceinline__ uint32_t count() const { return get(4); }
    __device__ __forceinline__ uint32_t wait_counter(uint32_t i) const { return get(5 + i); }
    __device__ __forceinline__ uint32_t wait_per_step(uint32_t i) const { return get(9 + i); }
    __device__ __forceinline__ uint32_t wait_needed(uint32_t i) const { return get(13 + i); }
    __device__ __forceinline__ uint32_t signal_counter() const { return get(17) % 65536; }
    __device__ __forceinline__ bool signals_eagerly() const { return get(17) / 65536 != 0; }
    __device__ __forceinline__ uint32_t place(uint32_t i) const { return get(18 + i); } // of an operand, 256 bytes each
    __device__ __forceinline__ uint64_t operand(uint32_t i) const { return uint64_t(place(i)) * 256; }
    __device__ __forceinline__ uint32_t scalar() const { return get(24); }
};
static_assert(sizeof(perk_task_record) == 128, "a record is one word a lane of a warp");

// Warp 0 starts fetching a record into its slot, a word a lane. It is there for all after await_record and a barrier.
__device__ __forceinline__ void fetch_record(const Worker &w, uint32_t position) {
    if (w.warp != 0) return;
    copy_async4(TaskView(w, position).address + w.lane * 4,
                reinterpret_cast<const uint32_t *>(record_at(w, position)) + w.lane);
}
__device__ __forceinline__ void await_record() { copy_async_wait(); }

// ---- the two roles ----

// Streams this worker's chunks of one stage.
__device__ __forceinline__ uint32_t stream_task(Worker &w, const StreamTask &task, uint32_t chunk) {
    const uint32_t count = ChunkSource::count(task);
    uint32_t mine = 0; // of each 32 chunks a lane finds one
    for (uint32_t n = 0; n < count; n++, chunk++) {
        if (n % 32 == 0) {
            uint32_t position = w.position;
            forget(position); // the task, anew: registers are few
            mine = ChunkSource(load_stream_task(w, position), min(n + w.lane, count - 1)).packed;
        }
        const ChunkSource source(__shfl_sync(0xffffffffu, mine, n % 32));
        const StreamPlace next{w.position, n + 1};
        leave_behind(w, next);
        push_chunk(w, chunk, source.at(w), source.bytes(), next);
    }
    return chunk;
}

// Starts the copies of one tile of one expert: `tile` is its number among all experts' tiles.
__device__ __forceinline__ uint32_t push_tile(Worker &w, const StreamTask &task, uint32_t tile, uint32_t chunk) {
    const uint8_t *source = w.args.weights + (task.base + uint64_t(tile) * task.blocks) * PERK_WEIGHT_BLOCK_BYTES;
    for (uint32_t block = 0; block < task.blocks; block += PERK_CHUNK_BLOCKS, chunk++)
        push_chunk(w, chunk, source + block * PERK_WEIGHT_BLOCK_BYTES,
                   min(uint32_t(PERK_CHUNK_BLOCKS), task.blocks - block) * PERK_WEIGHT_BLOCK_BYTES);
    return chunk;
}

// While nobody knows yet which experts come next, memory has nothing to bring. So the first chunks of the linear after
// them, as many as the ring has slots, come to L2 meanwhile; not before the consumers are half a ring behind, which is
// in the output projection: attention's loads have the bandwidth before. A lane a chunk.
__device__ __forceinline__ void bring_next_linear(Worker &w, uint32_t chunk) {
#if !PERK_PORTABLE
    constexpr uint32_t kChunks = program::ring_slots < 32 ? program::ring_slots : 32, kBehind = program::ring_slots / 2;
    if (chunk >= kBehind) {
        const uint32_t old = chunk - kBehind;
        wait_slot<true>(w, w.empty_barrier(old), old / program::ring_slots & 1, PERK_ROLE_RING_EMPTY, old);
    }
    for (uint32_t position = w.position + 1; __ldg(&record_at(w, position)->kind) != PERK_TASK_END; position++) {
        const StreamTask task = load_stream_task(w, position);
        if (task.tiles == 0 || __ldg(&record_at(w, position)->routing_experts) != 0) continue;
        if (w.lane < min(kChunks, ChunkSource::count(task))) {
            const ChunkSource source(task, w.lane);
            bring_to_l2(source.at(w), source.bytes());
        }
        break;
    }
    __syncwarp();
#endif
}

// What the producer needs of the record of a stage over experts, beside that.
struct RoutedTask {
    uint32_t first, stride, tiles;
    uint32_t hits;  // of the step's routing
    uint32_t count; // tiles that this worker streams
    bool of_tiles;
};

// Waits for the step's routing. What a wait that was given up leaves there stays within bounds.
__device__ __forceinline__ RoutedTask await_routing(const Worker &w, const StreamTask &task) {
    const perk_task_record *record = record_at(w, w.position);
    const uint32_t most = __ldg(&record->routing_most_hits), signals = __ldg(&record->routing_signals);
    const uint8_t *routing = w.args.activations + uint64_t(__ldg(&record->routing)) * 256;
    const bool of_tiles = (__ldg(&record->routing_experts) & PERK_ROUTING_OF_TILES) != 0;
    if (w.lane == 0) wait_counter(w, __ldg(&record->routing_counter), w.step() * signals + signals);
    __syncwarp();
    RoutedTask r{task.lane_in_round, task.workers, task.tiles, 0, 0, of_tiles};
    r.hits = min(load_coherent4(routing + PERK_ROUTING_HITS * 4), most);
    const uint32_t units = r.hits * r.tiles;
    if (r.of_tiles)
        r.count = r.hits * task.rounds;
    else if (r.first < units)
        r.count = (units - r.first - 1) / r.stride + 1;
    return r;
}

// Which of all experts' tiles is the i-th that this worker streams.
__device__ __forceinline__ uint32_t find_tile(const Worker &w, const RoutedTask &r, uint32_t i) {
    const perk_task_record *record = record_at(w, w.position);
    const uint8_t *routing = w.args.activations + uint64_t(__ldg(&record->routing)) * 256;
    const uint32_t experts = __ldg(&record->routing_experts) & ~PERK_ROUTING_OF_TILES;
    const uint32_t unit = r.first + i * r.stride;
    const uint32_t hit = r.of_tiles ? i % r.hits : unit / r.tiles;
    const uint32_t tile = r.of_tiles ? r.first + i / r.hits * r.stride : unit % r.tiles;
    const uint32_t expert = load_coherent4(routing + (PERK_ROUTING_HEADER + hit) * 4);
    return min(expert, experts - 1) * r.tiles + tile;
}

// Streams this worker's chunks of a stage over experts, as the step's routing deals them. A task without any gets 16
// bytes: its end then says that the producer has read the routing.
__device__ __forceinline__ uint32_t stream_experts(Worker &w, const StreamTask &task, uint32_t chunk) {
    await_begin(w, chunk);
    if ((__ldg(&record_at(w, w.position)->routing_experts) & PERK_ROUTING_OF_TILES) == 0) bring_next_linear(w, chunk);
    const RoutedTask r = await_routing(w, task);
    uint32_t mine = 0;
    for (uint32_t i = 0; i < r.count; i++) {
        if (i % 32 == 0) { // a lane a tile: one trip to L2 for 32 of them
            if (i + w.lane < r.count) mine = find_tile(w, r, i + w.lane);
            __syncwarp();
        }
        chunk = push_tile(w, task, __shfl_sync(0xffffffffu, mine, i % 32), chunk);
    }
    if (r.count == 0) push_chunk(w, chunk++, w.args.weights + uint64_t(task.base) * PERK_WEIGHT_BLOCK_BYTES, 16);
    return chunk;
}

// Of programs without experts of their own: nobody picks any there, but the code must make sense.
constexpr uint32_t kOwnExperts = program::own_slots > 0 ? program::own_experts : 1;
constexpr uint32_t kOwnSlots = program::own_slots > 0 ? program::own_slots : 1;

// The experts of a step of one token, as this worker has picked them: lane h has that of hit h.
struct OwnExperts {
    uint32_t picked_for = 0xffffffffu; // which step's logits: a layer's stages ask for the same
    uint32_t expert = 0;
};

__device__ __forceinline__ void pick_experts(const Worker &w, OwnExperts &own) {
    using Top = TopExperts<kOwnExperts, kOwnSlots>;
    const perk_task_record *record = record_at(w, w.position);
    const uint32_t counter = __ldg(&record->routing_counter), signals = __ldg(&record->routing_signals);
    const uint32_t logits = __ldg(&record->routing), wanted = (w.step() << 16) + counter;
    if (own.picked_for == wanted) return;
    own.picked_for = wanted;
    if (w.lane == 0) wait_counter(w, counter, w.step() * signals + signals);
    __syncwarp();
    Top top;
    EagerLook look{is_eager(logits)};
    do {
        top.load(w.lane, activation_at(w, logits));
        top.see(look);
    } while (look.again_words(w));
    own.expert = top.pick(w.lane).expert;
    own.expert = __shfl_sync(0xffffffffu, own.expert, Top::slot_of_hit(w.lane, own.expert));
}

// The same as stream_experts for a step of one token.
__device__ __forceinline__ uint32_t stream_own_experts(Worker &w, const StreamTask &task, bool of_tiles, uint32_t chunk,
                                                       OwnExperts &own) {
    await_begin(w, chunk);
    if (!of_tiles) bring_next_linear(w, chunk);
    pick_experts(w, own);
    const uint32_t count = of_tiles ? task.rounds * kOwnSlots : task.rounds;
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t unit = task.lane_in_round + (of_tiles ? i / kOwnSlots : i) * task.workers;
        const uint32_t hit = of_tiles ? i % kOwnSlots : unit / task.tiles;
        const uint32_t tile = of_tiles ? unit : unit % task.tiles;
        chunk = push_tile(w, task, __shfl_sync(0xffffffffu, own.expert, hit) * task.tiles + tile, chunk);
    }
    return chunk;
}

#if PERK_WIDE
// A wide linear's task works on a share of the program's tokens. Where a step is so short that it has none of them, all
// roles pass the task over; the first share is always worked on.
__device__ __forceinline__ bool has_share(uint32_t first_token, uint32_t rows) {
    return first_token == 0 || first_token < rows;
}

// For roles that do not pass the gate of a step of many: the batch that shared memory has may be the one before.
__device__ __forceinline__ uint32_t rows_of_batch(const Worker &w, uint32_t word) {
    return program::many_steps ? load_coherent4(w.args.batch + word) : w.batch_word(word);
}

// Nor is a linear over rows of logits worked on in a step that wants none.
__device__ __forceinline__ bool has_rows(const Worker &w, const perk_task_record *record, uint32_t chunk) {
    if (__ldg(&record->rows_word) != PERK_BATCH_NUM_LOGIT_ROWS) return true;
    await_begin(w, chunk);
    return rows_of_batch(w, PERK_BATCH_NUM_LOGIT_ROWS) != 0;
}

// Streams up to `together` tiles of one stage side by side, and then the next so many: a lane copies for a tile.
__device__ __forceinline__ uint32_t stream_wide_task(Worker &w, const StreamTask &task, uint32_t chunk) {
    const uint32_t first_token = task.lane_in_round / task.tiles * task.share_tokens;
    if (first_token > 0) {
        await_begin(w, chunk); // how many tokens it has
        if (!has_share(first_token, rows_of_batch(w, PERK_BATCH_NUM_TOKENS))) return chunk;
    }
    for (uint32_t first = 0; first < task.rounds; first += task.together) {
        const uint32_t tiles = min(task.together, task.rounds - first), slot_blocks = PERK_WIDE_SLOT_BLOCKS(tiles);
        const TilePlace place(task, first + min(w.lane, tiles - 1)); // the lane's
        for (uint32_t block = 0; block < task.blocks; block += slot_blocks, chunk++) {
            const uint32_t bytes = min(slot_blocks, task.blocks - block) * PERK_WEIGHT_BLOCK_BYTES;
            await_room(w, chunk, {});
            if (w.lane == 0) mbarrier_arrive_expect(w.full_barrier(chunk), bytes * tiles);
            __syncwarp();
            if (w.lane < tiles)
                copy_bulk(w.ring_slot(chunk) + w.lane * slot_blocks * PERK_WEIGHT_BLOCK_BYTES,
                          w.args.weights + uint64_t(place.of(task, block)) * PERK_WEIGHT_BLOCK_BYTES, bytes,
                          w.full_barrier(chunk));
            __syncwarp();
        }
    }
    return chunk;
}

#endif

#if PERK_STREAMS_KV
__device__ __forceinline__ uint32_t stream_kv(Worker &w, const StreamTask &task, uint32_t chunk);
#endif

// Streams what the whole list reads, from chunk number `chunk` on; returns the next one's.
#if PERK_WIDE
__device__ __forceinline__ uint32_t produce(Worker &w, uint32_t chunk) {
    for (w.position = 0;; w.position++) {
        const StreamTask task = load_stream_task(w, w.position); // not ahead: registers are few
        if (task.kind == PERK_TASK_END) break;
#if PERK_STREAMS_KV
        if (task.blocks == PERK_STREAM_KV) {
            chunk = stream_kv(w, task, chunk);
            continue;
        }
#endif
        if (!has_rows(w, record_at(w, w.position), chunk)) continue;
        if (task.together != 0 && !kIsBatched)
            chunk = stream_wide_task(w, task, chunk);
        else if (task.tiles != 0)
            chunk = stream_task(w, task, chunk);
    }
    return chunk;
}
#else
__device__ __forceinline__ uint32_t produce(Worker &w, uint32_t chunk) {
    OwnExperts own;
    uint32_t kind = __ldg(&record_at(w, 0)->kind);
    for (w.position = 0; kind != PERK_TASK_END; w.position++) {
        const StreamTask task = load_stream_task(w, w.position);
        kind = __ldg(&record_at(w, w.position + 1)->kind); // which brings all of that record near
#if PERK_STREAMS_KV
        if (task.blocks == PERK_STREAM_KV) {
            chunk = stream_kv(w, task, chunk);
            continue;
        }
#endif
        if (task.tiles == 0) continue;
        const uint32_t routing = program::has_experts ? __ldg(&record_at(w, w.position)->routing_experts) : 0;
        if (routing == 0)
            chunk = stream_task(w, task, chunk);
        else if constexpr (program::own_slots > 0)
            chunk = stream_own_experts(w, task, (routing & PERK_ROUTING_OF_TILES) != 0, chunk, own);
        else if constexpr (program::has_experts)
            chunk = stream_experts(w, task, chunk);
    }
    return chunk;
}
#endif

#if PERK_WIDE
// Brings the slices of a wide linear's input, as often as it goes over them: once for all tiles that it works on
// together. `rows` are those that the step has. Of batched linears a lane feeds a warp, and a warp whose slice is none
// gets nothing in its slot, so that it always has the same ones.
constexpr uint32_t kFedTogether = kIsBatched ? PERK_CONSUMER_WARPS : 1;
__device__ __forceinline__ void feed_task(Worker &w, const perk_task_record *record, uint32_t rows) {
    const uint8_t *input = w.args.activations + uint64_t(__ldg(&record->operand[0])) * 256;
    const uint32_t slices = (__ldg(&record->stream_blocks) + PERK_SLICE_BLOCKS - 1) / PERK_SLICE_BLOCKS;
    const uint32_t share_tokens = __ldg(&record->share_tokens);
    const uint32_t first_token = __ldg(&record->first) / __ldg(&record->stream_tiles) * share_tokens;
    if (!has_share(first_token, rows)) return;
    const uint32_t bytes = min(rows - first_token, share_tokens) * PERK_SLICE_ROW_BYTES; // of no rows: 0
    input += first_token * PERK_SLICE_ROW_BYTES;
    for (uint32_t first = 0; first < __ldg(&record->count); first += __ldg(&record->stream_together))
        for (uint32_t s = 0; s < slices; s += kFedTogether, w.slices += kFedTogether) {
            const uint32_t slice = s + w.lane, number = w.slices + w.lane, turn = number / program::input_slots;
            const bool feeds = w.lane < kFedTogether, has_bytes = slice < slices && bytes > 0;
            wait_slot<true>(w, w.input_empty(number), (turn - 1) & 1, PERK_ROLE_INPUT_EMPTY, number,
                            !feeds || turn == 0);
            if (feeds) mbarrier_arrive_expect(w.input_full(number), has_bytes ? bytes : 0);
            if (feeds && has_bytes)
                copy_bulk(w.input_slot(number), input + uint64_t(slice) * program::max_tokens * PERK_SLICE_ROW_BYTES,
                          bytes, w.input_full(number));
            __syncwarp();
        }
}

// A task may have all the slots for itself: they go through the consumers' hands as slices do, with nothing in them.
__device__ __forceinline__ void lend_inputs(Worker &w) {
#pragma unroll 1
    for (uint32_t i = 0; i < program::input_slots; i++, w.slices++) {
        const uint32_t turn = w.slices / program::input_slots;
        if (turn > 0) wait_slot<true>(w, w.input_empty(w.slices), (turn - 1) & 1, PERK_ROLE_INPUT_EMPTY, w.slices);
        if (w.lane == 0) mbarrier_arrive_expect(w.input_full(w.slices), 0);
        __syncwarp();
    }
}
__device__ __forceinline__ void take_inputs(const Worker &w) {
#pragma unroll 1
    for (uint32_t i = 0; i < program::input_slots; i++) {
        const uint32_t number = w.slices + i;
        wait_slot<false>(w, w.input_full(number), number / program::input_slots & 1, PERK_ROLE_INPUT_FULL, number);
    }
}
__device__ __forceinline__ void give_inputs(Worker &w) {
    fence_shared_stores();
    __syncwarp();
#pragma unroll 1
    for (uint32_t i = 0; i < program::input_slots; i++, w.slices++)
        mbarrier_arrive_after(w.input_empty(w.slices), w.lane, 0);
}

// The third role, of wide programs: it waits for the counters of every wide linear by itself, ahead of the consumers.
__device__ __forceinline__ void feed(Worker &w) {
    for (w.position = 0;; w.position++) {
        const perk_task_record *record = record_at(w, w.position);
        if (__ldg(&record->kind) == PERK_TASK_END) break;
        if (program::prompt_tokens > 0 && __ldg(&record->takes_inputs) != 0) lend_inputs(w);
        if (__ldg(&record->stream_together) == 0) continue;
        if (w.lane < PERK_RECORD_WAITS && __ldg(&record->wait_per_step[w.lane]) != 0)
            wait_counter(w, __ldg(&record->wait_counter[w.lane]),
                         w.step() * __ldg(&record->wait_per_step[w.lane]) + __ldg(&record->wait_needed[w.lane]));
        __syncwarp();
        fence_copies();
        const uint32_t rows = rows_of_batch(w, __ldg(&record->rows_word));
        if (rows != 0) feed_task(w, record, rows);
    }
}
#endif

// A profiled program's time stamps; any other program has no trace of them.
__device__ __forceinline__ void stamp(const Worker &w, uint32_t which) {
#if PERK_PROFILE
    const uint64_t task = uint64_t(w.index()) * program::tasks_per_worker + w.position;
    if (w.thread == 0) w.args.stamps[task * PERK_STAMPS + which] = global_timer();
#endif
}

// Waits for what the task needs, on behalf of the block: a lane of warp 0 a counter. Every task calls it once, before
// it reads what others wrote; what does not depend on others (addresses, constants) comes before it, off the path.
__device__ __forceinline__ void await_inputs(Worker &w, const TaskView &task) {
    if (w.warp == 0) {
        const uint32_t i = w.lane % PERK_RECORD_WAITS;
        const uint32_t counter = task.wait_counter(i), per_step = task.wait_per_step(i);
        const uint32_t target = w.step() * per_step + task.wait_needed(i);
        if (w.lane < PERK_RECORD_WAITS && per_step != 0) wait_counter(w, counter, target);
        __syncwarp();
    }
    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    stamp(w, PERK_STAMP_READY);
}

// The barrier collects the block's writes, the release makes them visible to whoever sees the counter; eager values
// need none.
__device__ __forceinline__ void signal_outputs(const Worker &w, const TaskView &task) {
    const uint32_t counter = task.signal_counter(), given_up = load_shared4(w.shared + SharedMap::given_up);
    const bool is_eager = kLooks && task.signals_eagerly();
    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    if (w.thread != 0 || given_up) return;
    if (is_eager)
        add_gpu4(w.args.counters + counter, 1);
    else
        add_release_gpu(w.args.counters + counter, 1);
}

// `run_task(worker, task, chunk)` is the program's switch over its kinds; it awaits the task's inputs and returns the
// next chunk number, and so does this. The first record is in its slot.
template <class RunTask>
__device__ __forceinline__ uint32_t consume(Worker &w, RunTask run_task, uint32_t chunk) {
    for (w.position = 0;; w.position++) {
        w.forget_coordinates();
        const TaskView task(w, w.position);
        if (task.kind() == PERK_TASK_END) break;
        fetch_record(w, w.position + 1); // under way while this task runs
        stamp(w, PERK_STAMP_REACHED);
        chunk = run_task(w, task, chunk);
        await_record();
        signal_outputs(w, task); // with a barrier
        stamp(w, PERK_STAMP_DONE);
    }
    return chunk;
}

// Brings the step's batch into shared memory, where it has room there.
template <uint32_t kBytes>
__device__ __forceinline__ void copy_batch(const Worker &w) {
    const uint8_t *batch = reinterpret_cast<const uint8_t *>(w.args.batch);
    if constexpr (kBytes > 0)
        for (uint32_t offset = w.thread * 16; offset < kBytes; offset += PERK_BLOCK_THREADS * 16)
            store_shared16(w.shared + SharedMap::batch + offset, load_constant16(batch + offset));
}

template <class RunTask>
__device__ __forceinline__ void worker_main(const perk_kernel_args &args, RunTask run_task) {
    Worker w{args, threadIdx.x / 32, threadIdx.x % 32, threadIdx.x, dynamic_shared(), 0};
    copy_batch<program::batch_shared_bytes>(w);
    fetch_record(w, 0);
    await_record();
    init_ring(w); // with a barrier of the whole block
    if (w.warp < PERK_CONSUMER_WARPS) {
        take_registers<PERK_CONSUMER_REGISTERS>();
        consume(w, run_task, 0);
    } else {
        give_registers<PERK_PRODUCER_REGISTERS>();
        w.ahead = {0, 0};
        if (w.warp == PERK_CONSUMER_WARPS) produce(w, 0);
#if PERK_WIDE
        if (w.warp == PERK_CONSUMER_WARPS + 1) feed(w);
#endif
    }
}

} // namespace perk
