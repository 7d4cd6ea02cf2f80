/* What a program of many steps a launch (plan->many_steps) adds to a plan: the end of a step, and the limits of the
 * schedule that the kernel keeps (kernels_src/many_steps.cuh). */
#ifndef PERK_SRC_PLAN_STEPS_H
#define PERK_SRC_PLAN_STEPS_H

#include "kernels_src/mail.h"
#include "plan.h"

/* The counters whose signals are complete when a step is over: those that the first tasks of the next one wait for.
 * Returns how many, and -1 when there are more than PERK_RECORD_WAITS. The checker shows that they prove all tasks of
 * the step done. */
int perk_plan_step_end(const perk_plan *plan, int counters[PERK_RECORD_WAITS]);

/* Of the schedule that the kernel keeps: the host's (src/scheduler.h). */
perk_schedule_limits perk_plan_schedule_limits(const perk_plan *plan);
/* Records that come of one step at most. */
int32_t perk_plan_outbox_records(const perk_plan *plan);

/* The plan tensor that argmax writes, -1: the graph has none or several; the ids that it can pick. */
int perk_plan_picks(const perk_plan *plan);
int perk_plan_picked_logits(const perk_plan *plan); /* the one that it reads */
int64_t perk_plan_vocab_size(const perk_plan *plan);

/* Chunks of weights, or slices of inputs, that pass through the busiest worker's shared memory in a step. */
uint64_t perk_plan_chunks(const perk_plan *plan);

/* Whether the plan can be one of many steps: there are tokens to pick, and a KV cache. */
perk_status perk_plan_check_many_steps(const perk_plan *plan, perk_error *err);

#endif
