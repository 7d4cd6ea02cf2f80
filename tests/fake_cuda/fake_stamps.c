/* The time stamps of a profiled program: the fake driver runs nothing, but it walks the task lists as the workers
 * would, signals, and says when that would have been. The times are made up; order and waiting are those of the lists.
 */
#include "fake_stamps.h"

#include <stdbool.h>
#include <stdlib.h>

enum { BEGIN_NS = 400, SIGNAL_NS = 650, TASK_NS = 1800, BYTES_A_NS = 23 };

typedef struct progress {
    uint32_t next;
    uint64_t now;
} progress;

typedef struct counter {
    uint32_t value;
    uint64_t last_ns; /* of the last signal */
} counter;

static uint32_t highest_counter(const perk_task_record *records, size_t count) {
    uint32_t highest = 0;
    for (size_t i = 0; i < count; i++) {
        if (records[i].kind == PERK_TASK_END) continue;
        if (records[i].signal_counter > highest) highest = records[i].signal_counter;
        for (int k = 0; k < PERK_RECORD_WAITS; k++)
            if (records[i].wait_per_step[k] && records[i].wait_counter[k] > highest)
                highest = records[i].wait_counter[k];
    }
    return highest;
}

/* When the task has what it waits for; 0: not yet. */
static uint64_t ready_at(const perk_task_record *task, const counter *counters, uint64_t now) {
    uint64_t ready = now + BEGIN_NS;
    for (int k = 0; k < PERK_RECORD_WAITS; k++) {
        const counter *c = &counters[task->wait_counter[k]];
        if (task->wait_per_step[k] == 0 || (int32_t)task->wait_needed[k] <= 0) continue;
        if (c->value < task->wait_needed[k]) return 0;
        if (c->last_ns + SIGNAL_NS > ready) ready = c->last_ns + SIGNAL_NS;
    }
    return ready;
}

static uint64_t length_of(const perk_task_record *task) {
    uint64_t bytes = task->stream_tiles ? (uint64_t)task->count * task->stream_blocks * PERK_WEIGHT_BLOCK_BYTES : 0;
    uint64_t length = TASK_NS + bytes / BYTES_A_NS;
    return length + length * (task->task * 2654435761u >> 24) / 1500; /* up to a sixth longer */
}

void fake_stamps_fill(const perk_kernel_args *args, unsigned workers, size_t per_worker) {
    uint32_t highest = highest_counter(args->tasks, workers * per_worker);
    counter *counters = calloc(highest + 1u, sizeof *counters);
    progress *at = calloc(workers, sizeof *at);
    uint64_t begin = 1000000000u * (args->step + 1ull);
    bool moved = counters && at;
    for (unsigned w = 0; w < workers && at; w++) at[w].now = begin + w * 3;
    while (moved) {
        moved = false;
        for (unsigned w = 0; w < workers; w++) {
            size_t index = w * per_worker + at[w].next;
            const perk_task_record *task = &args->tasks[index];
            uint64_t ready = task->kind == PERK_TASK_END ? 0 : ready_at(task, counters, at[w].now);
            if (ready == 0) continue;
            uint64_t *stamps = args->stamps + index * PERK_STAMPS;
            counter *signalled = &counters[task->signal_counter];
            stamps[PERK_STAMP_REACHED] = at[w].now;
            stamps[PERK_STAMP_READY] = ready;
            stamps[PERK_STAMP_DONE] = at[w].now = ready + length_of(task);
            if (task->stream_tiles > 0)
                for (uint64_t part = 0; part < 3; part++)
                    stamps[PERK_STAMP_READ + part] = ready + length_of(task) * (part + 1) / 4;
            signalled->value++;
            if (at[w].now > signalled->last_ns) signalled->last_ns = at[w].now;
            at[w].next++;
            moved = true;
        }
    }
    for (uint32_t c = 0; c <= highest && counters; c++) args->counters[c] += counters[c].value;
    free(counters);
    free(at);
}
