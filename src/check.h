/* The plan checker's parts: src/check.c proves that the plan's arrays are sound, src/check_order.c runs the plan and
 * derives who is certainly done when, src/check_memory.c holds every access against that. docs/checker.md tells why it
 * is a proof. */
#ifndef PERK_SRC_CHECK_H
#define PERK_SRC_CHECK_H

#include "plan.h"

enum {
    PERK_CHECK_MAX_WORKERS = 4096,
    PERK_CHECK_MAX_PIECES = 1 << 24, /* uses of waits, signals and regions; intervals; cells */
};

/* A piece of a message, by value. */
typedef struct perk_check_text {
    char text[256];
} perk_check_text;

/* "layers.3.o (worker 7, position 12)" */
perk_check_text perk_check_task_text(const perk_plan *plan, int task);
/* "counter 5 (layers.3.qkv)" */
perk_check_text perk_check_counter_text(const perk_plan *plan, int counter);
/* "layers.3.x[0:4, 16:32]" */
perk_check_text perk_check_region_text(const perk_plan *plan, const perk_region *region);

/* Time of a worker: 1 + how many tasks it has begun before, over all steps; 0 is before everything. A clock holds one
 * time per worker: "of worker w, everything up to clock[w] is certainly complete". */
static inline int perk_check_task_at(const perk_plan *plan, int worker, int32_t time) {
    int begin = plan->worker_begin[worker], count = plan->worker_begin[worker + 1] - begin;
    return begin + (time - 1) % count;
}
static inline int perk_check_step_at(const perk_plan *plan, int worker, int32_t time) {
    return (time - 1) / (plan->worker_begin[worker + 1] - plan->worker_begin[worker]);
}

/* Clocks are padded with zeros to a multiple of so many entries, for the compiler's vector instructions. */
enum { PERK_CHECK_LANES = 16 };

static inline int perk_check_clock_size(const perk_plan *plan) {
    return (int)perk_round_up((uint64_t)plan->device.worker_count, PERK_CHECK_LANES);
}

static inline void perk_check_join(int32_t *restrict into, const int32_t *restrict from, int size) {
    for (int i = 0; i < size; i += PERK_CHECK_LANES)
        for (int j = i; j < i + PERK_CHECK_LANES; j++) into[j] = into[j] > from[j] ? into[j] : from[j];
}

static inline bool perk_check_covers(const int32_t *clock, const int32_t *needed, int size) {
    int32_t missing = 0;
    for (int i = 0; i < size; i += PERK_CHECK_LANES)
        for (int j = i; j < i + PERK_CHECK_LANES; j++) missing |= needed[j] > clock[j] ? -1 : 0;
    return !missing;
}

/* Indices, ranges, sums, sizes: all that the other two parts rely on. Trusts the lengths of arrays, nothing in them. */
perk_status perk_check_structure(const perk_plan *plan, perk_error *err);

/* What every piece of memory has gone through so far. */
typedef struct perk_check_memory perk_check_memory;
perk_status perk_check_memory_create(perk_check_memory **out, const perk_plan *plan, perk_error *err);
void perk_check_memory_free(perk_check_memory *memory);
/* Back to before the first step. */
void perk_check_memory_forget(perk_check_memory *memory);
/* Activations hold nothing at the begin of a step. */
void perk_check_memory_begin_step(perk_check_memory *memory);
/* Records the accesses of `task`, the `time`-th of its worker, and fails when an earlier conflicting access is not in
 * `clock`, or when the content is not what the order of stages says. */
perk_status perk_check_memory_task(perk_check_memory *memory, int task, int32_t time, const int32_t *clock,
                                   perk_error *err);

/* Runs two steps of the plan and gives every task with its clock to `memory`. */
perk_status perk_check_order(const perk_plan *plan, perk_check_memory *memory, perk_error *err);

#endif
