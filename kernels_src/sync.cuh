// What a sync over all workers takes: lists of tasks that do nothing, each waiting until every worker has signalled the
// task before it. The loop is the worker's own, so this is what a stage costs before it does any work: a record, a
// wait, two barriers, a signal. Its waits have the limit that all waits have.
#pragma once

namespace program { // what worker.cuh needs to know of a program: nothing is streamed, and there is no batch
constexpr uint32_t tasks_per_worker = 259; // with the end of the list; as SYNC_RECORDS in src/gpu_measure.c
constexpr uint32_t ring_slots = 1, chunks_in_flight = 1, chunks_in_flight_behind = 1, chunks_ahead = 0,
                   cycles_per_chunk = 0;
constexpr uint32_t staging_bytes = 0, reduction_bytes = 0, batch_shared_bytes = 0, batch_page_table = 0, max_tokens = 1;
constexpr uint32_t shared_bytes = PERK_CHUNK_BYTES + 4096;
constexpr uint32_t own_experts = 0, own_slots = 0;
constexpr uint32_t eager_place = 0;
constexpr bool eager_pieces = false;
constexpr uint64_t eager_bytes = 0;
constexpr bool waits_are_limited = true, has_experts = false, many_steps = false;
} // namespace program

#include "routing.cuh"
#include "worker.cuh"

extern "C" __global__ void __launch_bounds__(PERK_BLOCK_THREADS, 1)
    perk_sync(const __grid_constant__ perk_kernel_args args) {
    perk::worker_main(args, [](perk::Worker &worker, const perk::TaskView &task, uint32_t chunk) {
        const uint64_t index = uint64_t(blockIdx.x) * program::tasks_per_worker + task.first();
        const bool is_stamped = task.scalar() != 0 && worker.thread == 0;
        perk::await_inputs(worker, task);
        if (is_stamped) worker.args.stamps[index * PERK_STAMPS + PERK_STAMP_READY] = ptx::global_timer();
        return chunk;
    });
}
