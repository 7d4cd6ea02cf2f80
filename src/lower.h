/* Lowering: what an op's `lower` function may do to the plan that is being made.
 *
 * A stage is opened, gets one task a worker at most with the regions that it reads and writes, and is closed. Which
 * counters its tasks wait for follows from the regions: closing finds the stages that write what this one reads, and
 * drops those that others imply.
 */
#ifndef PERK_SRC_LOWER_H
#define PERK_SRC_LOWER_H

#include "plan.h"

typedef struct perk_lowering perk_lowering;

struct perk_lowering {
    perk_plan *plan;
    const perk_graph *graph;
    perk_error error;          /* the first failure; later calls do nothing */
    int *plan_tensor;          /* [graph tensors]: its plan tensor, -1: none yet */
    const perk_op **fold_into; /* [graph ops]: the op whose stage does this op's work, NULL: it has its own */
    int staging_limit;         /* bytes that staged activations may take */
    int rotation;              /* the worker that gets the next stage's first unit: the one after the last that got
                                  a tile of weights, so that all stream equally much */
    struct perk_lowering_growth {
        int tensors, stages, kinds, tasks, waits, signals, regions;
    } capacity;
};

/* Rows of an activation in this configuration. */
int perk_lower_rows(const perk_lowering *lowering, const perk_tensor *tensor);

/* The plan tensor of a graph tensor: an activation in its arena, a vector or (`layout` ROWS) a table among the
 * constants, a matrix in the packed stream. Made on first use; -1 on failure. */
int perk_lower_tensor(perk_lowering *lowering, const perk_tensor *tensor, perk_layout layout);
/* A tensor of the plan's own in `space`. */
int perk_lower_scratch(perk_lowering *lowering, const char *name, perk_space space, int rows, int cols,
                       perk_dtype dtype);

/* The candidates for argmax that the linear of these logits leaves: a value and an index a row tile. -1 when `logits`
 * is not a linear's fp32 output. */
int perk_lower_candidates(perk_lowering *lowering, const perk_tensor *logits);

/* The routing (kernels_src/abi.h) that goes with `experts`, the output of a moe_route. Its experts and pairs at most.
 */
int perk_lower_routing(perk_lowering *lowering, const perk_tensor *experts);
/* True when no stage makes it: every task over experts picks those of the only token by itself. perk_lower_routing is
 * then the logits. */
bool perk_lower_routes_alone(const perk_lowering *lowering);
int perk_lower_most_hits(const perk_lowering *lowering, const perk_tensor *experts);

/* What the stage of a linear, or of a linear of experts, does besides the product: work of neighbouring ops that is
 * folded into it. */
typedef struct perk_linear_form {
    const perk_op *norm, *gate, *sum;
    const perk_tensor *x, *out;
    const char *epilogue;
    perk_activation activation;
    int tile_width; /* outputs of a tile */
} perk_linear_form;

/* What one task of a linear works on: row tiles, for some rows of x. */
typedef struct perk_tile_run {
    int first, stride, count;
    int row_begin, row_end;
} perk_tile_run;

/* Adds the columns that the tiles of `run` make, `width` outputs each; the last tile may be cut. */
void perk_lower_tiles(perk_lowering *lowering, int tensor, int width, const perk_tile_run *run,
                      void (*add)(perk_lowering *, perk_region));
perk_linear_form perk_linear_form_of(const perk_lowering *lowering, const perk_op *op);

/* True when this plan has wide linears (kernels_src/wide.cuh, batched.cuh) and `linear` is one of them. */
bool perk_lower_is_wide(const perk_lowering *lowering, const perk_op *linear);
/* The input of wide linears that holds this activation; made on first use, by whoever is to write it. -1 on failure. */
int perk_lower_wide_input(perk_lowering *lowering, const perk_tensor *tensor);
bool perk_lower_has_wide_input(const perk_lowering *lowering, const perk_tensor *tensor);
/* For ops that can write such an input themselves: whether their output is one, because nobody else reads it; and the
 * plan tensor that they write. */
bool perk_lower_writes_input(const perk_lowering *lowering, const perk_tensor *output);
int perk_lower_output(perk_lowering *lowering, const perk_tensor *output);

/* Opens a stage "<output's name><suffix>"; `statement` is the C++ that runs one of its tasks. NULL on failure. */
perk_stage *perk_lower_begin(perk_lowering *lowering, const perk_op *op, const char *suffix, const char *statement, ...)
    PERK_PRINTF(4, 5);
/* Adds the task of `worker` over the units first, first + stride, ...; regions follow with perk_lower_read and
 * perk_lower_write, until the next call. */
void perk_lower_task(perk_lowering *lowering, int worker, int first, int stride, int count);
void perk_lower_read(perk_lowering *lowering, perk_region region);
void perk_lower_write(perk_lowering *lowering, perk_region region);
/* All of a tensor. */
perk_region perk_lower_whole(const perk_lowering *lowering, int tensor);
/* All rows of `repeat` column intervals. Intervals that end beyond the tensor's width are cut by the caller. */
perk_region perk_lower_columns(const perk_lowering *lowering, int tensor, int begin, int count, int stride, int repeat);
/* Closes the stage: waits, signals, the next rotation. */
void perk_lower_end(perk_lowering *lowering);

/* Deals `units` to the workers in contiguous runs of nearly equal length and calls `add` for each non-empty run.
 * Workers that get the fewest tiles of the next stage come first: few units run beside that stage, not ahead of it. */
typedef void (*perk_lower_run)(perk_lowering *lowering, void *user, int worker, int first, int count);
void perk_lower_runs(perk_lowering *lowering, int units, perk_lower_run add, void *user);
/* The same for a stage that is lowered later: workers that got the fewest tiles of the stage before come first. */
void perk_lower_late_runs(perk_lowering *lowering, int units, perk_lower_run add, void *user);

/* The same for a stage that must be dealt alike wherever it stands. */
void perk_lower_fixed_runs(perk_lowering *lowering, int units, perk_lower_run add, void *user);

/* Such an `add`, of a stage (`user`) that copies columns from operand 0 to operand 1: units are groups of 8. */
void perk_lower_copy(perk_lowering *lowering, void *stage, int worker, int first, int count);

/* Lowers an op that copies rows of its input X by an index of the batch: `rows` "tokens" or "logits" says how many,
 * `index` is the program's constant for the place of the index in the batch. */
perk_status perk_lower_gather(perk_lowering *lowering, const perk_op *op, const char *rows, const char *index);

/* True when the op's work is done in another op's stage. */
static inline bool perk_lower_is_folded(const perk_lowering *lowering, const perk_op *op) {
    return lowering->fold_into[op->index] != NULL;
}

/* Cuts attention for this device (plan->attention_parts and what follows it), or says why this shape cannot be. */
perk_status perk_attention_plan_shape(perk_lowering *lowering, const perk_op *op, perk_error *err);

/* Shared memory in which the warps of a worker put the pieces of a row of attention together. */
int perk_attention_reduction_bytes(const perk_op *op);

/* Shared memory in which the tasks of moe_route, and of a linear of experts, work. */
int perk_moe_route_bytes(const perk_lowering *lowering, const perk_op *op);
int perk_moe_linear_bytes(const perk_lowering *lowering, const perk_op *op);

/* Shared memory of a linear op with `rows` rows of `cols` (kernels_src/linear.cuh has the same formulas). */
int perk_linear_staged_bytes(int rows, int64_t cols);
int perk_linear_reduction_bytes(int rows);

#endif
