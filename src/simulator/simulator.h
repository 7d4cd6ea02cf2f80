/* The simulator: an executor on the CPU that runs the tasks of a plan, not the ops of a graph. A task does what the
 * device code of its stage does for the units that it has, at the places that operands, offsets and strides give, and
 * rounds where the device rounds. Tasks run in any order that the workers' lists and counters allow, steps with nothing
 * between them. It is the second oracle for plans, beside the checker, and the one for what the lowering declares:
 *
 *   stuck        nobody can go on                                               PERK_HANG
 *   race         two tasks in conflict are under way at once                    PERK_UNSAFE_PLAN
 *   wrong read   a task finds what another task wrote than in the order of
 *                stages, or what none of this step has                          PERK_UNSAFE_PLAN
 *   outside      an access lies outside the tensor                              PERK_UNSAFE_PLAN
 *   undeclared   an access lies outside the task's regions                      perk_simulator_undeclared
 *
 * Activations are NaN until they are written, and while somebody writes them. One thread at a time. */
#ifndef PERK_SRC_SIMULATOR_SIMULATOR_H
#define PERK_SRC_SIMULATOR_SIMULATOR_H

#include "checkpoint.h"
#include "executor.h"
#include "plan.h"

typedef enum perk_simulator_hold { PERK_HOLD_NOTHING, PERK_HOLD_START, PERK_HOLD_END } perk_simulator_hold;

/* Which of the possible orders: a draw by `seed`, in which the start or the end of one task may be held back as long as
 * anything else can go on. */
typedef struct perk_simulator_order {
    uint64_t seed;
    bool skewed; /* the worker that comes first in a drawn ranking runs as far as it can, not any that can go on */
    perk_simulator_hold hold;
    int32_t step, task; /* what is held: of the steps of perk_simulator_begin, of plan->tasks */
} perk_simulator_order;

typedef struct perk_simulator_options {
    perk_device_desc device;    /* what the graph is lowered for; without `plan` */
    const perk_plan *plan;      /* borrowed: of the same graph, its structure sound (perk_check_structure); or NULL */
    perk_simulator_order order; /* of single steps; the seed grows by one a step */
} perk_simulator_options;

/* `graph` and `plan` are borrowed and must outlive the executor; the checkpoint is needed during the call only. A step
 * of this executor is a run of one step: perk_simulator_begin, what is undeclared, perk_simulator_compute. */
perk_status perk_simulator_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                                  const perk_config *config, const perk_simulator_options *options, perk_error *err);

/* The plan that runs; for tests. */
const perk_plan *perk_simulator_plan(const perk_executor *executor);
/* Another plan of the same graph and configuration, with fresh memory and the same weights. Borrowed until the next
 * call of this function, or the executor's end. After a failure there is no plan. */
perk_status perk_simulator_set_plan(perk_executor *executor, const perk_plan *plan, perk_error *err);

/* Runs steps in the order of stages, which says what is right. All of them follow those of earlier calls. */
perk_status perk_simulator_begin(perk_executor *executor, const perk_batch *const *batches, int count, perk_error *err);
/* The same steps in another order, from the same memory. `try` follows accesses alone, `compute` the values as well:
 * results are then those of this order. */
perk_status perk_simulator_try(perk_executor *executor, const perk_simulator_order *order, perk_error *err);
perk_status perk_simulator_compute(perk_executor *executor, const perk_simulator_order *order, perk_error *err);

/* The first access of the last perk_simulator_begin that the task's regions do not declare; NULL when there is none. */
const perk_error *perk_simulator_undeclared(const perk_executor *executor);

/* An activation as step `step` of the last perk_simulator_begin or perk_simulator_compute left it, [rows][cols].
 * Fails for tensors that the plan folds away. */
perk_status perk_simulator_read(const perk_executor *executor, int step, const perk_tensor *tensor, float *values,
                                int64_t rows, perk_error *err);
/* A digest of the whole KV cache after it. */
uint64_t perk_simulator_kv_digest(const perk_executor *executor);

#endif
