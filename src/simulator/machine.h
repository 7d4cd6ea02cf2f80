/* The simulator's machine: memory that knows who wrote it, and what a task sees of it.
 *
 * Memory is the arena of activations, then the KV pages, in granules of 8 bytes: no two tasks of a sound plan share
 * one. A granule's version is 1 + step * task_count + task of its last write, negative while that task is under way, 0
 * before any. The run in the order of stages records the granules that every task reads and writes, and the versions it
 * finds; runs in other orders must find the same ones, when a task starts and when it ends. */
#ifndef PERK_SRC_SIMULATOR_MACHINE_H
#define PERK_SRC_SIMULATOR_MACHINE_H

#include "float.h"
#include "ops/op.h"
#include "simulator/simulator.h"

enum { PERK_SIM_GRANULE = 4 };
enum { PERK_SIM_OWN_SLOTS = 32 };          /* of a token that tasks may pick by themselves */
#define PERK_SIM_LOWEST (-0x1.fffffep127f) /* where a search for the largest logit begins */

typedef struct perk_sim_memory {
    uint8_t *bytes;
    int32_t *versions;
} perk_sim_memory;

/* Granules of one tensor that a task reads or writes. */
typedef struct perk_sim_span {
    uint32_t begin, count;
    uint32_t expected; /* reads: in trace.versions */
    int32_t tensor;
} perk_sim_span;

typedef struct perk_sim_spans {
    perk_sim_span *items;
    size_t count, capacity;
} perk_sim_spans;

/* What the tasks of all steps did in the order of stages. */
typedef struct perk_sim_trace {
    perk_sim_spans reads, writes;
    int32_t *versions;
    size_t version_count, version_capacity;
    struct perk_sim_task_trace {
        uint32_t read_begin, read_end, write_begin, write_end;
    } * tasks; /* [steps][task_count] */
    size_t task_capacity;
} perk_sim_trace;

/* What a task has computed and not yet made visible. */
typedef struct perk_sim_piece {
    uint64_t place; /* in memory.bytes */
    size_t at, bytes;
} perk_sim_piece;

typedef struct perk_sim_pending {
    perk_sim_piece *pieces;
    size_t piece_count, piece_capacity;
    uint8_t *bytes;
    size_t byte_count, byte_capacity;
} perk_sim_pending;

/* A matrix as the stream holds it: bf16 numbers, columns padded with zeros to whole blocks. */
typedef struct perk_sim_matrix {
    float *values; /* [rows][cols], of experts: one after the other */
    size_t cols;
} perk_sim_matrix;

typedef struct perk_simulator {
    perk_executor base;
    const perk_graph *graph;
    perk_config config;
    perk_simulator_order order;
    perk_plan *owned_plan;
    perk_sim_matrix *matrices; /* [graph tensors] weights; vectors have one row */

    /* of the plan */
    const perk_plan *plan;
    perk_batch_layout layout;
    uint8_t *constants;
    uint64_t constants_key;                     /* of the layout that `constants` holds */
    int *by_stage;                              /* [task_count] tasks in the order of stages */
    int *kv_tensors;                            /* [KV layers] plan tensors */
    uint64_t activation_bytes, bytes, granules; /* of memory */
    perk_sim_memory truth, before, run;         /* before: of the last perk_simulator_begin */
    int32_t *read_mark, *write_mark;            /* [granules] the last task that read, or wrote, while recording */
    int32_t mark;
    int32_t *slot_rows; /* [pages * page_size] the row of the token that a KV cell was written for */
    int64_t *counters;
    int32_t *done; /* [workers] tasks that are done, of all steps */
    bool *started;
    int *choices, *ranking; /* [workers] */
    int pending_count;
    perk_sim_pending *pendings; /* [workers] */

    /* of the steps that are run together */
    int steps, step_capacity, steps_before;
    int32_t *words;    /* [steps][layout.words] */
    uint8_t **results; /* [steps] what the step's tasks wrote to activations, [activation_bytes] */
    perk_sim_trace trace;
    perk_error undeclared;
    float *scratch;
    size_t scratch_capacity;
    /* what the last step returned */
    int32_t *argmax;
    float *logits;
} perk_simulator;

/* A task that is being computed. The first failure is kept; accesses give NULL from then on. */
typedef struct perk_sim_task {
    perk_simulator *sim;
    int step, index; /* of the steps that are run together; in plan->tasks */
    const perk_task *task;
    const perk_stage *stage;
    const perk_op *op;
    const int32_t *words; /* the step's batch */
    const perk_sim_memory *memory;
    perk_sim_pending *pending;
    bool records; /* also checks accesses, and keeps them in the trace */
    perk_status status;
    perk_error *err;
} perk_sim_task;

/* ---- what the families of tasks use: src/simulator/access.c ---- */

/* Elements [col, col + count) of a row of operand `role`, which is of `dtype`: in memory, or where to leave what
 * becomes visible when the task ends (valid until the next call). NULL on failure. */
const void *perk_sim_read(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col, int64_t count);
/* The same; the task may write to the very same place afterwards. */
const void *perk_sim_read_in_place(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col,
                                   int64_t count);
void *perk_sim_write(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col, int64_t count);
/* Keeps the first failure of the task. */
void perk_sim_fail(perk_sim_task *t, const char *format, ...) PERK_PRINTF(2, 3);

/* bf16 vectors of `count` positions from `position` on of a request, in one page: its keys or its values. */
enum { PERK_SIM_KEYS, PERK_SIM_VALUES };
const uint16_t *perk_sim_read_kv(perk_sim_task *t, int which, int head, int request, int position, int count);
uint16_t *perk_sim_write_kv(perk_sim_task *t, int which, int head, int request, int position, int token);

/* Row tile `tile` of the packed weights is streamed. */
void perk_sim_stream(perk_sim_task *t, int tile);

/* Scratch of `count` floats until the next call; NULL on failure. */
float *perk_sim_scratch(perk_sim_task *t, size_t count);

static inline int perk_sim_unit(const perk_sim_task *t, int i) { return t->task->first + i * t->task->stride; }
/* Tokens or rows of logits of the step. */
static inline int perk_sim_rows(const perk_sim_task *t, perk_rows rows) {
    return t->words[rows == PERK_ROWS_LOGITS ? PERK_BATCH_NUM_LOGIT_ROWS : PERK_BATCH_NUM_TOKENS];
}
static inline int perk_sim_page_of(const perk_sim_task *t, int request, int position) {
    const perk_config *config = &t->sim->config;
    int entry = request * perk_plan_pages_per_request(config) + position / config->page_size;
    return t->words[t->sim->layout.page_table + entry];
}

/* ---- the families: what the functions of kernels_src/ do ---- */

void perk_sim_gather(perk_sim_task *t);
void perk_sim_rmsnorm(perk_sim_task *t);
void perk_sim_gate_mul(perk_sim_task *t);
void perk_sim_argmax(perk_sim_task *t);
void perk_sim_linear(perk_sim_task *t);
void perk_sim_arrange(perk_sim_task *t);
void perk_sim_append(perk_sim_task *t);
void perk_sim_partial(perk_sim_task *t);
void perk_sim_merge(perk_sim_task *t);
/* What tasks over experts pick by themselves in steps of one token: the routing (kernels_src/abi.h), of so many slots.
 */
void perk_sim_route_alone(const perk_op *route, const float *logits, int32_t *routing);
void perk_sim_moe_route(perk_sim_task *t);
void perk_sim_moe_linear(perk_sim_task *t);
void perk_sim_moe_sum(perk_sim_task *t);

/* ---- plans: src/simulator/bind.c, weights.c ---- */

perk_status perk_sim_load_weights(perk_simulator *sim, const perk_checkpoint *checkpoint, perk_error *err);
/* Constants as sim->plan lays them out; nothing to do when they lie so already. */
perk_status perk_sim_load_constants(perk_simulator *sim, perk_error *err);
perk_status perk_sim_set_plan(perk_simulator *sim, const perk_plan *plan, perk_error *err);
void perk_sim_drop_plan(perk_simulator *sim);

/* ---- running: src/simulator/task.c, order.c ---- */

/* Computes a task on `memory`, into `pending`. */
perk_status perk_sim_compute_task(perk_simulator *sim, int step, int index, bool records, const perk_sim_memory *memory,
                                  perk_sim_pending *pending, perk_error *err);
/* What a task's computation leaves becomes visible, there and in the step's result. */
void perk_sim_commit(perk_simulator *sim, int step, const perk_sim_memory *memory, const perk_sim_pending *pending);
/* NaN where the task is going to write. */
void perk_sim_spoil(const perk_sim_memory *memory, const perk_sim_pending *pending);
/* Runs the steps in an order on sim->run, which holds what was there before them. */
perk_status perk_sim_run_order(perk_simulator *sim, const perk_simulator_order *order, bool computes, perk_error *err);

/* "layers.3.x[2, 16]": where a granule lies in a tensor. */
typedef struct perk_sim_text {
    char text[160];
} perk_sim_text;
perk_sim_text perk_sim_place_text(const perk_simulator *sim, int tensor, uint64_t place);

#endif
