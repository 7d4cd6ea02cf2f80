/* How long a step is expected to take: a model of the machine that runs a plan's own lists and counters.
 *
 * - Weights: every worker's stream gets an equal share of the read bandwidth, and runs ahead of its tasks as far as the
 *   ring has slots.
 * - A task costs a fixed time by what it does, reads its input at a fixed rate, and a linear takes a fixed time for
 * each chunk of weights once it is there.
 * - A wait ends a fixed time after the last signal that it needs.
 *
 * The constants were fitted to the stages that one H100 was measured at (bench/results/stages-h100.json); of other
 * devices the bandwidth alone is known, from their makers' data sheets. */
#ifndef PERK_SRC_PLAN_MODEL_H
#define PERK_SRC_PLAN_MODEL_H

#include "plan_times.h"

/* What the step is assumed to be. */
typedef struct perk_plan_load {
    double bandwidth; /* bytes a second that all workers read together; 0: what the device's make has */
    int32_t requests; /* 0: as many as the configuration allows */
    int32_t tokens;   /* of each request in this step; 0: one, as when text is made */
    int32_t context;  /* positions that every request has before */
} perk_plan_load;

/* The same with all defaults filled in, and no more context than the configuration has room for. */
perk_plan_load perk_plan_load_resolve(const perk_plan *plan, const perk_plan_load *load);

/* `times` has an element for each task. Counts from 0. PERK_UNSAFE_PLAN when tasks wait for what never comes. */
perk_status perk_plan_expect(const perk_plan *plan, const perk_plan_load *load, perk_task_time *times, perk_error *err);

#endif
