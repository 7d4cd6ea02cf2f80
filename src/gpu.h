/* The GPU executor: plan, check, emit, compile or cache, load, launch. */
#ifndef PERK_SRC_GPU_H
#define PERK_SRC_GPU_H

#include "checkpoint.h"
#include "executor.h"
#include "perk/engine.h"
#include "plan_times.h"

enum { PERK_GPU_WAIT_LIMIT_MS = 10000 };

typedef void (*perk_gpu_alter_plan)(perk_plan *plan, void *user);

typedef struct perk_gpu_options {
    int device;
    bool portable, unchecked, no_cache;
    bool timing;               /* measure the device time of every step */
    bool profile;              /* the program stamps every task: see perk_gpu_task_times */
    bool many_steps;           /* a launch may run many of them: src/gpu_many.h */
    bool unlimited_waits;      /* waits in the kernel never give up: to measure what their limit costs */
    bool for_racecheck;        /* all lanes arrive: compute-sanitizer's racecheck does not see more */
    int32_t wait_limit_ms;     /* of one wait in the kernel; 0: PERK_GPU_WAIT_LIMIT_MS */
    perk_gpu_alter_plan alter; /* for tests: changes the plan behind the checker's back */
    void *alter_user;
    const char *cache_folder;
    int threads; /* of the weight loader; 0: all cores */
    /* Programs for smaller steps, beside that of the configuration: tokens a step, each less than
     * max_num_batched_tokens and more than the one before; at most PERK_MAX_PROGRAMS - 1. */
    int32_t smaller_programs[PERK_MAX_PROGRAMS];
    int smaller_program_count;
    bool smaller_are_optional; /* one that is not in the cache and cannot be compiled is left out */
    perk_log log;
    perk_progress progress;
} perk_gpu_options;

/* `graph` and `checkpoint` are borrowed; the checkpoint is needed during the call only. Fills the phases of `report`
 * that belong to it. */
perk_status perk_gpu_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                            const perk_config *config, const perk_gpu_options *options, perk_start_report *report,
                            perk_error *err);

/* Keeps steps to the program of the configuration, also those that a smaller one would do, until told otherwise. */
void perk_gpu_keep_to_largest(perk_executor *executor, bool kept);
/* Steps that each program has completed, and its launches, by rising tokens: as many as report->program_count. */
void perk_gpu_program_counts(const perk_executor *executor, uint64_t steps[PERK_MAX_PROGRAMS],
                             uint64_t launches[PERK_MAX_PROGRAMS]);

/* What follows is about the program of the configuration.
 *
 * For tests: fills every activation with NaN (integers with -1) and, `with_cache`, the KV cache as well. The host's
 * inputs, and what lies between a row's width and its stride, stay as they are. */
perk_status perk_gpu_poison(perk_executor *executor, bool with_cache, perk_error *err);

/* For measurements. The plan is the executor's own. Milliseconds of the last step on the device, from just before the
 * launch to its end (0 without `timing`). */
const perk_plan *perk_gpu_plan(const perk_executor *executor);
perk_status perk_gpu_step_ms(perk_executor *executor, double *milliseconds, perk_error *err);
/* Packed weights that the last step read: of experts, those that were hit. */
perk_status perk_gpu_streamed_bytes(perk_executor *executor, uint64_t *bytes, perk_error *err);
/* Copies what `count` KV pages from `from` on hold, of all layers and heads, to the pages from `to` on. */
perk_status perk_gpu_copy_pages(perk_executor *executor, int32_t from, int32_t to, int32_t count, perk_error *err);
/* The read bandwidth of this device, in bytes a second: all SMs read the packed weights once, through the copy engine
 * where there is one, and do nothing with them. Median of `runs`. */
perk_status perk_gpu_read_ceiling(perk_executor *executor, int runs, double *bytes_per_second, perk_error *err);
/* When the tasks of the last step ran, by the GPU's clock; for executors with `profile`. `times` has an element for
 * each task of perk_gpu_plan. */
perk_status perk_gpu_task_times(perk_executor *executor, perk_task_time *times, perk_error *err);

/* What one sync over all workers takes: microseconds of `runs` launches, each the mean over PERK_GPU_SYNCS of them. A
 * launch is a list of tasks that do nothing, in the loop and with the waits of any program; PERK_HANG when a wait
 * exceeds its limit, PERK_INTERNAL when the counters do not end where they must. */
enum { PERK_GPU_SYNCS = 256 };
perk_status perk_gpu_sync_times(perk_executor *executor, int runs, double *microseconds, perk_error *err);

/* Bytes a second that the bus carries from pinned memory to the device. */
perk_status perk_gpu_bus_speed(perk_executor *executor, double *bytes_per_second, perk_error *err);

#endif
