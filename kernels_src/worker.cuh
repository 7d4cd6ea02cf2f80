// The worker: one thread block that stays on its SM and walks its static list of tasks. Warps 0 ... 7 (the consumers)
// compute; warp 8 (the producer) streams the packed weights of the whole list through a ring in shared memory, across
// task boundaries, and never looks at a dependency. Every wait has a limit by the global timer.
#pragma once

namespace perk {

using namespace ptx;

constexpr uint32_t kConsumerBarrier = 1;    // named barrier of the 8 consumer warps; 0 is __syncthreads
constexpr uint32_t kPollsPerClockRead = 64; // reading the global timer costs more than a poll

// ---- shared memory: ring slots | staging of activations | reduction scratch | the step's batch | barriers ----
struct SharedMap {
    static constexpr uint32_t ring = 0;
    static constexpr uint32_t staging = program::ring_slots * PERK_CHUNK_BYTES;
    static constexpr uint32_t reduction = staging + program::staging_bytes;
    static constexpr uint32_t batch = reduction + program::reduction_bytes;
    static constexpr uint32_t barriers = batch + program::batch_shared_bytes;
    static constexpr uint32_t bytes = barriers + 2 * 8 * program::ring_slots;
};
static_assert(SharedMap::bytes <= program::shared_bytes, "the plan and the kernel disagree about shared memory");

struct Worker {
    const perk_kernel_args &args;
    uint32_t index; // of this worker
    uint32_t warp, lane, thread;
    uint32_t shared;   // address of dynamic shared memory
    uint32_t task;     // the running task's index in the plan, for reports
    bool has_given_up; // a wait for a counter exceeded its limit; known to thread 0

    // Forgets what the compiler knows of the thread's coordinates. Without it, addresses of every kind of task are
    // computed ahead of the task loop, kept through all tasks, and spilled by those that need the registers.
    __device__ __forceinline__ void forget_coordinates() {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        asm volatile("" : "+r"(shared));
        warp = thread / 32;
        lane = thread % 32;
    }

    __device__ __forceinline__ uint32_t ring_slot(uint32_t chunk) const {
        return shared + SharedMap::ring + chunk % program::ring_slots * PERK_CHUNK_BYTES;
    }
    __device__ __forceinline__ uint32_t full_barrier(uint32_t chunk) const {
        return shared + SharedMap::barriers + chunk % program::ring_slots * 8;
    }
    __device__ __forceinline__ uint32_t empty_barrier(uint32_t chunk) const {
        return full_barrier(chunk) + program::ring_slots * 8;
    }
    __device__ __forceinline__ uint32_t staging() const { return shared + SharedMap::staging; }
    __device__ __forceinline__ uint32_t reduction() const { return shared + SharedMap::reduction; }
    // A word of the step's batch. It lies in shared memory unless it is too large: tokens, positions, pages and items
    // stand at the head of chains of loads, and every one of them would be a trip to L2.
    __device__ __forceinline__ uint32_t batch_word(uint32_t index) const {
        if constexpr (program::batch_shared_bytes > 0)
            return load_shared4(shared + SharedMap::batch + index * 4);
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
// Whoever waits past the limit reports it, and from then on nobody waits for counters any more: every worker that would
// runs its list to the end on whatever is in memory, without signalling, so that the counters still tell how far the
// step has come. The launch ends like any other, the host throws the step away, and the context survives. Weights that
// never come end the warps that need them, which are all consumer warps of the worker.

// Writes who waited for what, for the host; the first one only.
__device__ __forceinline__ void report_hang(const perk_kernel_args &args, uint32_t worker, uint32_t task, uint32_t role,
                                            uint32_t counter, uint32_t seen, uint32_t wanted) {
    if (atomicCAS(args.hang_claim, 0u, 1u) != 0u) return;
    volatile perk_hang_report *report = args.hang;
    report->worker = worker;
    report->task = task;
    report->role = role;
    report->counter = counter;
    report->seen = seen;
    report->wanted = wanted;
    report->step = args.step;
    __threadfence_system();
    report->complete = 1;
}

// Calls `satisfied` until it holds. False: the limit has passed, here or elsewhere. The last look comes after the
// clock, so that the lanes of a warp that waits for one barrier agree.
template <class Satisfied>
__device__ __forceinline__ bool wait_until(const perk_kernel_args &args, Satisfied satisfied) {
    uint64_t start = 0;
    while (true) {
#pragma unroll 1
        for (uint32_t polls = 0; polls < kPollsPerClockRead; polls++)
            if (satisfied()) return true;
        if constexpr (!program::waits_are_limited) continue;
        const uint64_t now = global_timer();
        if (start == 0) start = now;
        if (now - start > args.wait_limit_ns || load_coherent4(args.hang_claim) != 0) return satisfied();
    }
}

// One thread waits for a counter; the caller spreads the news with a barrier.
__device__ __forceinline__ bool wait_counter(const Worker &w, uint32_t counter, uint32_t target) {
    uint32_t seen = 0;
    const uint32_t *address = w.args.counters + counter;
    if (wait_until(w.args, [&] { return static_cast<int32_t>((seen = load_acquire_gpu(address)) - target) >= 0; }))
        return true;
    report_hang(w.args, w.index, w.task, PERK_ROLE_COUNTER, counter, seen, target);
    return false;
}

// A whole warp waits for the barrier of a chunk's slot, or ends.
__device__ __forceinline__ void wait_slot(const Worker &w, uint32_t barrier, uint32_t parity, uint32_t role,
                                          uint32_t chunk) {
    if (wait_until(w.args, [&] { return mbarrier_test(barrier, parity); })) {
        __syncwarp(); // what follows multiplies with all lanes
        return;
    }
    report_hang(w.args, w.index, w.task, role, chunk, 0, 1);
    exit_thread();
}

// ---- the weight ring ----
// Chunk number c (counted over the whole launch) lives in slot c % ring_slots. A slot's full barrier completes when its
// bytes have landed, its empty barrier when all consumer warps have read it.

__device__ __forceinline__ void wait_full(const Worker &w, uint32_t chunk) {
    wait_slot(w, w.full_barrier(chunk), chunk / program::ring_slots & 1, PERK_ROLE_RING_FULL, chunk);
}
// By every lane of a consumer warp once it has read the chunk.
__device__ __forceinline__ void release_chunk(const Worker &w, uint32_t chunk) {
    __syncwarp();
    if (w.lane == 0) mbarrier_arrive(w.empty_barrier(chunk));
}

__device__ __forceinline__ void init_ring(const Worker &w) {
    if (w.thread == 0) {
        for (uint32_t slot = 0; slot < program::ring_slots; slot++) {
            mbarrier_init(w.full_barrier(slot), PERK_PORTABLE ? 32 : 1);
            mbarrier_init(w.empty_barrier(slot), PERK_CONSUMER_WARPS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
}

// Starts the copy of one chunk. At most `chunks_in_flight` copies are under way: more would only queue up in front of
// the few loads that are on the critical path (counters, activations). docs/performance.md has the measurements.
__device__ __forceinline__ void push_chunk(const Worker &w, uint32_t chunk, const uint8_t *source, uint32_t bytes) {
    const uint32_t round = chunk / program::ring_slots;
    if (round > 0) wait_slot(w, w.empty_barrier(chunk), (round - 1) & 1, PERK_ROLE_RING_EMPTY, chunk);
    if (chunk >= program::chunks_in_flight) wait_full(w, chunk - program::chunks_in_flight);
#if PERK_PORTABLE
    const uint32_t slot = w.ring_slot(chunk);
    for (uint32_t offset = w.lane * 16; offset < bytes; offset += 32 * 16) copy_async16(slot + offset, source + offset);
    copy_async_arrive(w.full_barrier(chunk));
#else
    if (w.lane == 0) {
        mbarrier_arrive_expect(w.full_barrier(chunk), bytes);
        copy_bulk(w.ring_slot(chunk), source, bytes, w.full_barrier(chunk));
    }
    __syncwarp();
#endif
}

// ---- task records ----

// A record lies across a warp, a word a lane; fields are read by shuffle.
struct TaskView {
    uint32_t word;

    __device__ __forceinline__ uint32_t get(uint32_t index) const { return __shfl_sync(0xffffffffu, word, index); }
    __device__ __forceinline__ uint32_t kind() const { return get(0); }
    __device__ __forceinline__ uint32_t task() const { return get(1); }
    __device__ __forceinline__ uint32_t first() const { return get(2); }
    __device__ __forceinline__ uint32_t stride() const { return get(3); }
    __device__ __forceinline__ uint32_t count() const { return get(4); }
    __device__ __forceinline__ uint32_t wait_counter(uint32_t i) const { return get(5 + i); }
    __device__ __forceinline__ uint32_t wait_per_step(uint32_t i) const { return get(9 + i); }
    __device__ __forceinline__ uint32_t wait_needed(uint32_t i) const { return get(13 + i); }
    __device__ __forceinline__ uint32_t signal_counter() const { return get(17); }
    __device__ __forceinline__ uint64_t operand(uint32_t i) const { return uint64_t(get(18 + i)) * 256; }
    __device__ __forceinline__ uint32_t scalar() const { return get(24); }
    __device__ __forceinline__ uint64_t stream_base() const { return uint64_t(get(25)) * PERK_WEIGHT_BLOCK_BYTES; }
    __device__ __forceinline__ uint32_t stream_tiles() const { return get(26); }
    __device__ __forceinline__ uint32_t stream_blocks() const { return get(27); }
};
static_assert(sizeof(perk_task_record) == 128, "a record is one word a lane");

__device__ __forceinline__ TaskView load_task(const Worker &w, uint32_t position) {
    const perk_task_record *list = w.args.tasks + uint64_t(w.index) * program::tasks_per_worker;
    return {__ldg(reinterpret_cast<const uint32_t *>(list + position) + w.lane)};
}

// ---- the two roles ----

// Streams this worker's chunks of one stage: its tiles round by round, the workers' chunks side by side in memory.
__device__ __forceinline__ uint32_t stream_task(const Worker &w, const TaskView &task, uint32_t chunk) {
    const uint32_t tiles = task.stream_tiles(), blocks = task.stream_blocks(), count = task.count();
    const uint32_t lane_in_round = task.first(), workers = task.stride();
    const uint8_t *round_base = w.args.weights + task.stream_base();
    for (uint32_t round = 0; round < count; round++) {
        const uint32_t width = min(workers, tiles - round * workers);
        for (uint32_t block = 0; block < blocks; block += PERK_CHUNK_BLOCKS, chunk++) {
            const uint32_t bytes = min(uint32_t(PERK_CHUNK_BLOCKS), blocks - block) * PERK_WEIGHT_BLOCK_BYTES;
            const uint64_t offset = uint64_t(width) * block * PERK_WEIGHT_BLOCK_BYTES + uint64_t(lane_in_round) * bytes;
            push_chunk(w, chunk, round_base + offset, bytes);
        }
        round_base += uint64_t(width) * blocks * PERK_WEIGHT_BLOCK_BYTES;
    }
    return chunk;
}

__device__ __forceinline__ void produce(Worker &w) {
    uint32_t chunk = 0;
    TaskView next = load_task(w, 0);
    for (uint32_t position = 0; next.kind() != PERK_TASK_END; position++) {
        const TaskView task = next;
        next = load_task(w, position + 1);
        w.task = task.task();
        if (task.stream_tiles() != 0) chunk = stream_task(w, task, chunk);
    }
}

// Waits for what the task needs, on behalf of the block.
__device__ __forceinline__ void begin_task(Worker &w, const TaskView &task) {
    if (w.warp == 0) {
        for (uint32_t i = 0; i < PERK_RECORD_WAITS; i++) {
            const uint32_t counter = task.wait_counter(i), per_step = task.wait_per_step(i);
            const uint32_t target = w.args.step * per_step + task.wait_needed(i);
            if (per_step != 0 && w.lane == 0 && !w.has_given_up) w.has_given_up = !wait_counter(w, counter, target);
        }
    }
    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
}

// The barrier collects the block's writes, the release makes them visible to whoever sees the counter.
__device__ __forceinline__ void end_task(const Worker &w, const TaskView &task) {
    const uint32_t counter = task.signal_counter();
    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    if (w.thread == 0 && !w.has_given_up) add_release_gpu(w.args.counters + counter, 1);
}

// A profiled program's time stamps; any other program has no trace of them.
__device__ __forceinline__ void stamp(const Worker &w, uint32_t position, uint32_t which) {
#if PERK_PROFILE
    const uint64_t task = uint64_t(w.index) * program::tasks_per_worker + position;
    if (w.thread == 0) w.args.stamps[task * PERK_STAMPS + which] = global_timer();
#endif
}

// `run_task(worker, task, chunk)` is the program's switch over its kinds; it returns the next chunk number.
template <class RunTask>
__device__ __forceinline__ void consume(Worker &w, RunTask run_task) {
    uint32_t chunk = 0;
    TaskView next = load_task(w, 0);
    for (uint32_t position = 0; next.kind() != PERK_TASK_END; position++) {
        const TaskView task = next;
        next = load_task(w, position + 1); // in flight while this task runs
        w.forget_coordinates();
        w.task = task.task();
        stamp(w, position, PERK_STAMP_REACHED);
        begin_task(w, task);
        stamp(w, position, PERK_STAMP_READY);
        chunk = run_task(w, task, chunk);
        end_task(w, task);
        stamp(w, position, PERK_STAMP_DONE);
    }
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
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    Worker w{args, blockIdx.x, threadIdx.x / 32, threadIdx.x % 32, threadIdx.x, shared_address(shared_memory),
             0,    false};
    copy_batch<program::batch_shared_bytes>(w);
    init_ring(w); // with a barrier of the whole block
    if (w.warp == PERK_CONSUMER_WARPS)
        produce(w);
    else
        consume(w, run_task);
}

} // namespace perk
