/* moe_linear: a linear whose weight is that of the expert that each pair of token and slot goes to. Only the experts
 * that were picked are read, each once. */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_math.h"
#include "reference_state.h"

#include <stdio.h>

static bool check_routing(perk_graph *graph, const char *name, const perk_tensor *x, const perk_tensor *weight,
                          const perk_tensor *experts) {
    const perk_op *route = experts->producer;
    if (!route || route->type != &perk_op_moe_route || experts != route->output ||
        route->inputs[PERK_IN_X]->cols != weight->experts) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "moe_linear %s: %s are not numbers of the %lld experts of %s",
                        name, experts->name, (long long)weight->experts, weight->name);
        return false;
    }
    if (x->row_kind == PERK_ROWS_LOGITS || (x->row_kind == PERK_ROWS_PAIRS && x->slots != experts->cols)) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT,
                        "moe_linear %s: %s has a row neither for each token nor for each of its %lld slots", name,
                        x->name, (long long)experts->cols);
        return false;
    }
    return true;
}

perk_tensor *perk_moe_linear(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight,
                             perk_tensor *experts) {
    if (!perk_graph_owns(graph, name, (perk_tensor *[]){x, weight, experts}, 3)) return NULL;
    if (perk_tensor_is_weight(x) || !perk_tensor_is_weight(weight) || !weight->experts || weight->cols != x->cols) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT,
                        "moe_linear %s: the weight %s [%lld, %lld, %lld] does not take rows of %lld", name,
                        weight->name, (long long)weight->experts, (long long)weight->rows, (long long)weight->cols,
                        (long long)x->cols);
        return NULL;
    }
    if (!check_routing(graph, name, x, weight, experts)) return NULL;
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = x, [PERK_IN_WEIGHT] = weight, [PERK_IN_EXPERTS] = experts};
    perk_op *op = perk_graph_add_op(graph, &perk_op_moe_linear, inputs, name, PERK_BF16, PERK_ROWS_PAIRS, weight->rows);
    if (!op) return NULL;
    op->output->slots = (int32_t)experts->cols;
    return op->output;
}

/* The step's pairs in the order of their experts. */
typedef struct moe_linear_job {
    const perk_reference *reference;
    const perk_op *op;
    size_t pairs, hit_count;
    size_t *order;   /* [pairs] */
    int32_t *hits;   /* [hit_count] experts with at least one pair, rising */
    size_t *begin;   /* [hit_count + 1] its first pair in `order` */
    float *x, *sums; /* [pairs][cols], [pairs][rows], both in that order */
} moe_linear_job;

static perk_status allocate(moe_linear_job *job, const perk_tensor *weight, perk_error *err) {
    job->order = perk_calloc(job->pairs, sizeof *job->order);
    job->hits = perk_calloc(job->pairs, sizeof *job->hits);
    job->begin = perk_calloc(job->pairs + 1, sizeof *job->begin);
    job->x = perk_calloc(job->pairs, (size_t)weight->cols * sizeof *job->x);
    job->sums = perk_calloc(job->pairs, (size_t)weight->rows * sizeof *job->sums);
    bool has_all = job->order && job->hits && job->begin && job->x && job->sums;
    return has_all ? PERK_OK : perk_fail_memory(err, "the rows of experts");
}

static void sort_pairs(moe_linear_job *job) {
    const perk_tensor *weight = job->op->inputs[PERK_IN_WEIGHT];
    const int32_t *experts = (const int32_t *)perk_reference_values(job->reference, job->op->inputs[PERK_IN_EXPERTS]);
    size_t sorted = 0;
    for (int32_t expert = 0; expert < weight->experts && sorted < job->pairs; expert++) {
        size_t first = sorted;
        for (size_t pair = 0; pair < job->pairs; pair++)
            if (experts[pair] == expert) job->order[sorted++] = pair;
        if (sorted == first) continue;
        job->hits[job->hit_count] = expert;
        job->begin[job->hit_count++] = first;
    }
    job->begin[job->hit_count] = sorted;
}

static void gather(const moe_linear_job *job) {
    const perk_tensor *x = job->op->inputs[PERK_IN_X];
    size_t cols = (size_t)x->cols;
    size_t shared_by = x->row_kind == PERK_ROWS_PAIRS ? 1 : (size_t)job->op->output->slots;
    for (size_t i = 0; i < job->pairs; i++)
        memcpy(job->x + i * cols, perk_reference_values(job->reference, x) + job->order[i] / shared_by * cols,
               cols * sizeof *job->x);
}

/* Rows of weights, hit expert by hit expert. */
static void multiply_rows(void *context, size_t begin, size_t end, int thread) {
    const moe_linear_job *job = context;
    const perk_tensor *weight = job->op->inputs[PERK_IN_WEIGHT];
    size_t all_rows = (size_t)weight->rows, cols = (size_t)weight->cols;
    float *w = job->reference->scratch[thread];
    for (size_t at = begin; at < end;) {
        size_t hit = at / all_rows, row = at % all_rows, first = job->begin[hit];
        size_t rows = PERK_MIN(PERK_MIN(end - at, all_rows - row), (size_t)PERK_MATH_ROWS);
        for (size_t i = 0; i < rows; i++)
            perk_reference_load_row(job->reference, weight, job->hits[hit], (int64_t)(row + i), w + i * cols);
        perk_math_dots(job->sums + first * all_rows + row, all_rows, w, rows, job->x + first * cols,
                       job->begin[hit + 1] - first, cols);
        at += rows;
    }
}

static void scatter(const moe_linear_job *job) {
    size_t rows = (size_t)job->op->output->cols;
    float *out = perk_reference_values(job->reference, job->op->output);
    for (size_t i = 0; i < job->pairs; i++)
        for (size_t k = 0; k < rows; k++)
            out[job->order[i] * rows + k] = perk_reference_round(job->reference, job->sums[i * rows + k]);
}

static perk_status moe_linear_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT];
    moe_linear_job job = {.reference = reference, .op = op, .pairs = perk_reference_rows(reference, op->output)};
    if (job.pairs == 0) return PERK_OK;
    perk_status status = allocate(&job, weight, err);
    if (!status) {
        sort_pairs(&job);
        gather(&job);
        size_t row_work = (size_t)weight->cols * perk_ceil_div(job.pairs, job.hit_count);
        perk_threads_run(reference->threads, job.hit_count * (size_t)weight->rows,
                         perk_ceil_div(PERK_REFERENCE_MIN_WORK, row_work), multiply_rows, &job);
        scatter(&job);
    }
    free(job.order);
    free(job.hits);
    free(job.begin);
    free(job.x);
    free(job.sums);
    return status;
}

/* ---- lowering: tiles of the experts that are hit, dealt by the step's routing; device code in kernels_src/moe.cuh
 * ---- */

enum { IN, OUT, ROUTING, NORM_WEIGHT, RESIDUAL }; /* operands of the stage */

int perk_moe_linear_bytes(const perk_lowering *l, const perk_op *op) {
    const perk_tensor *experts = op->inputs[PERK_IN_EXPERTS];
    int rows = perk_lower_rows(l, experts), pairs = rows * (int)experts->cols;
    int words = PERK_ROUTING_WORDS(perk_lower_most_hits(l, experts), pairs) + rows * PERK_TILE_ROWS;
    return perk_linear_reduction_bytes(rows) + (int)perk_round_up((uint64_t)words * 4, 32);
}

/* The stage that leaves the routing, or the logits that it follows from. */
static const perk_stage *routing_source(const perk_lowering *l, const perk_tensor *experts) {
    const perk_plan *plan = l->plan;
    const perk_op *route = experts->producer;
    int op = perk_lower_routes_alone(l) ? route->inputs[PERK_IN_X]->producer->index : route->index;
    for (int s = 0; s < plan->stage_count; s++)
        if (plan->stages[s].op == op) return &plan->stages[s];
    return NULL;
}

/* "Routing<experts, slots, tokens>", or that of a program for one token. */
static void name_routing(const perk_lowering *l, const perk_tensor *experts, char *text, size_t size) {
    const perk_op *route = experts->producer;
    int count = (int)route->inputs[PERK_IN_X]->cols, slots = (int)experts->cols;
    if (perk_lower_routes_alone(l))
        snprintf(text, size, "OwnRouting<%d, %d, %s>", count, slots, route->normalises ? "true" : "false");
    else
        snprintf(text, size, "Routing<%d, %d, %d>", count, slots, perk_lower_rows(l, experts));
}

static void choose_stream(perk_lowering *l, const perk_op *op, const perk_linear_form *form, perk_stage *stage) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT], *experts = op->inputs[PERK_IN_EXPERTS];
    int tensor = perk_lower_tensor(l, weight, form->gate ? PERK_LAYOUT_PAIRED_TILES : PERK_LAYOUT_TILES);
    const perk_stage *source = routing_source(l, experts);
    if (tensor < 0 || !source) return;
    const perk_plan_tensor *packed = &l->plan->tensors[tensor];
    stage->stream = (perk_stream){.tensor = tensor,
                                  .tile_count = packed->rows / PERK_TILE_ROWS / (int)weight->experts,
                                  .blocks_per_tile = packed->cols / PERK_BLOCK_COLS,
                                  .deal = form->sum ? PERK_DEAL_TILES : PERK_DEAL_UNITS,
                                  .experts = (int)weight->experts,
                                  .most_hits = perk_lower_most_hits(l, experts),
                                  .own_slots = perk_lower_routes_alone(l) ? (int)experts->cols : 0,
                                  .routing = stage->operands[ROUTING],
                                  .routed = {source->counter, source->task_count}};
}

static void read_inputs(perk_lowering *l, const perk_stage *stage) {
    perk_lower_read(l, perk_lower_whole(l, stage->operands[IN]));
    perk_lower_read(l, perk_lower_whole(l, stage->operands[ROUTING]));
    perk_lower_read(l, perk_lower_whole(l, stage->stream.tensor));
    if (stage->operands[NORM_WEIGHT] >= 0) perk_lower_read(l, perk_lower_whole(l, stage->operands[NORM_WEIGHT]));
}

/* Units dealt to at most a task a worker and column, each with the most units that it may get, and its share of the
 * output. */
static void add_units(perk_lowering *l, const perk_stage *stage) {
    int units = stage->stream.most_hits * stage->stream.tile_count, workers = l->plan->device.worker_count;
    int cols = l->plan->tensors[stage->operands[OUT]].cols, tasks = PERK_MIN(PERK_MIN(units, workers), cols);
    for (int i = 0; i < tasks; i++) {
        int begin = (int)((int64_t)cols * i / tasks), width = (int)((int64_t)cols * (i + 1) / tasks) - begin;
        perk_lower_task(l, (l->rotation + i) % workers, i, tasks, (units - i + tasks - 1) / tasks);
        read_inputs(l, stage);
        perk_lower_write(l, perk_lower_columns(l, stage->operands[OUT], begin, width, width, 1));
    }
}

/* Tiles of the output, as of any linear. */
static void add_tiles(perk_lowering *l, const perk_stage *stage) {
    int tiles = stage->stream.tile_count, workers = l->plan->device.worker_count, tasks = PERK_MIN(tiles, workers);
    for (int i = 0; i < tasks; i++) {
        perk_lower_task(l, (l->rotation + i) % workers, i, workers, (tiles - i + workers - 1) / workers);
        if (l->error.status != PERK_OK) return;
        const perk_task *task = &l->plan->tasks[l->plan->task_count - 1];
        perk_tile_run run = {.first = task->first,
                             .stride = task->stride,
                             .count = task->count,
                             .row_end = l->plan->tensors[stage->operands[OUT]].rows};
        read_inputs(l, stage);
        perk_lower_tiles(l, stage->operands[RESIDUAL], PERK_TILE_ROWS, &run, perk_lower_read);
        perk_lower_tiles(l, stage->operands[OUT], PERK_TILE_ROWS, &run, perk_lower_write);
    }
}

static perk_status moe_linear_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT], *experts = op->inputs[PERK_IN_EXPERTS];
    perk_linear_form form = perk_linear_form_of(l, op);
    (void)err;
    char routing[64];
    name_routing(l, experts, routing, sizeof routing);
    perk_stage *stage = perk_lower_begin(
        l, op, "",
        "chunk = ExpertLinear<%s, %s, %d, %d, %s, Epilogue::%s, Activation::%s>::run(worker, task, chunk, %.9ef);",
        routing, form.x->row_kind == PERK_ROWS_PAIRS ? "true" : "false", (int)weight->cols, (int)weight->rows,
        form.norm ? "true" : "false", form.epilogue, perk_activation_name(form.activation),
        form.norm ? (double)form.norm->eps : 0.0);
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_MOE_LINEAR;
    stage->operands[IN] = perk_lower_tensor(l, form.x, PERK_LAYOUT_ROWS);
    stage->operands[OUT] = perk_lower_tensor(l, form.out, PERK_LAYOUT_ROWS);
    stage->operands[ROUTING] = perk_lower_routing(l, experts);
    if (form.norm)
        stage->operands[NORM_WEIGHT] = perk_lower_tensor(l, form.norm->inputs[PERK_IN_WEIGHT], PERK_LAYOUT_ROWS);
    if (form.sum)
        stage->operands[RESIDUAL] = perk_lower_tensor(l, form.sum->inputs[PERK_IN_RESIDUAL], PERK_LAYOUT_ROWS);
    choose_stream(l, op, &form, stage);
    if (l->error.status != PERK_OK) return l->error.status;
    if (form.sum)
        add_tiles(l, stage);
    else
        add_units(l, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_moe_linear = {"moe_linear", moe_linear_reference, moe_linear_lower, NULL};
