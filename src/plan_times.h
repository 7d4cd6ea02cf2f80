/* When the tasks of one step ran: measured by a profiled program (src/gpu.h), or expected (src/plan_model.h). */
#ifndef PERK_SRC_PLAN_TIMES_H
#define PERK_SRC_PLAN_TIMES_H

#include "plan.h"

/* By PERK_STAMP_*: when the worker reached the task, had what it waited for, and had signalled, and the parts of a
 * linear; 0 where the task has no such part. Nanoseconds, from a moment that all tasks of the step share. Lists of
 * times are in the order of plan->tasks. */
typedef struct perk_task_time {
    uint64_t ns[PERK_STAMPS];
} perk_task_time;

/* Where the step's time went, by stage, in microseconds. */
typedef struct perk_stage_time {
    double chain;      /* from the end of the stages before it to its own last task's end: its share of the step */
    double run, worst; /* of a task, from having what it waited for to having signalled: mean and longest */
    double wait;       /* of a task, for its counters: mean */
    /* Means over a linear's tasks, which add up to run; 0 where nothing was measured. Reading its input; products, with
     * the wait for weights, and all but the last tile's share and finish; having the last tile's sums of all warps;
     * adding them up, storing, and signalling. */
    double read, multiply, share, finish;
} perk_stage_time;

/* `stages` has an element for each stage of the plan. */
perk_status perk_plan_stage_times(const perk_plan *plan, const perk_task_time *tasks, perk_stage_time *stages,
                                  perk_error *err);

/* The first moment of the step, and its length: from there to its last. Both 0 for a plan without tasks. */
uint64_t perk_plan_first_ns(const perk_plan *plan, const perk_task_time *tasks);
uint64_t perk_plan_step_ns(const perk_plan *plan, const perk_task_time *tasks);

#endif
