/* From graph to plan: folding, stages, waits, memory. */
#include "lower.h"
#include "plan_eager.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include "kernels_src/abi.h"
#include "ops/op.h"

/* The ring keeps at least this many slots, if shared memory allows: 8 x 16 KB is about 6 us of stream on an H100. */
enum { RING_SLOTS_WANTED = 8, RING_SLOTS_MIN = 3, RING_SLOTS_MAX = 12, SLOT_BYTES = PERK_CHUNK_BYTES + 16 };
enum { MAX_ROWS = 64 };         /* rows of x that one pass over the weights serves with mma */
enum { MIN_WIDE_TOKENS = 9 };   /* from so many on wide linears are worth it; */
enum { MAX_WIDE_TOKENS = 256 }; /* wgmma serves so many at once, and a step may have */
enum { MAX_STEP_TOKENS = 1024 };
enum { INPUT_BYTES = 96 << 10 }; /* slices of inputs of wide linears: three of 256 tokens, */
enum { BATCHED_COLUMNS = 16 };   /* and of batched ones, for multiples of so many tokens: what the ring leaves, */
enum { BATCHED_WARP_SLOTS = 2 }; /* of a warp for those: one more is in its registers */
enum { MAX_OWN_EXPERTS = 256 };  /* eight logits a lane */
enum { SPACE_ALIGNMENT = 256 };  /* operands are addressed in units of 256 bytes */

int perk_linear_staged_bytes(int rows, int64_t cols) {
    return (int)perk_round_up((uint64_t)cols, PERK_BLOCK_COLS * PERK_CONSUMER_WARPS) * 2 * rows;
}

int perk_linear_reduction_bytes(int rows) {
    int column_tiles = (rows + 7) / 8, buffers = column_tiles <= 2 ? 2 : 1;
    return buffers * column_tiles * PERK_CONSUMER_WARPS * 512 + PERK_CONSUMER_WARPS * rows * 4;
}

static bool is_linear(const perk_op *op) {
    return op && (op->type == &perk_op_linear || op->type == &perk_op_moe_linear);
}

static void fail_memory(perk_lowering *l) {
    if (l->error.status == PERK_OK) perk_fail_memory(&l->error, "the plan");
}

static bool grow(perk_lowering *l, void *list, int *capacity, int count, size_t size) {
    if (l->error.status != PERK_OK) return false;
    if (count < *capacity) return true;
    int wanted = PERK_MAX(256, *capacity * 2);
    void *bigger = perk_realloc_array(*(void **)list, (size_t)wanted, size);
    if (!bigger) {
        fail_memory(l);
        return false;
    }
    *(void **)list = bigger;
    *capacity = wanted;
    return true;
}

/* ---- tensors ---- */

int perk_lower_rows(const perk_lowering *l, const perk_tensor *tensor) {
    const perk_config *config = &l->plan->config;
    return (int)perk_tensor_rows(tensor, config->max_num_batched_tokens, config->max_num_logit_rows);
}

static int add_tensor(perk_lowering *l, perk_plan_tensor tensor) {
    perk_plan *plan = l->plan;
    if (!grow(l, &plan->tensors, &l->capacity.tensors, plan->tensor_count, sizeof *plan->tensors)) return -1;
    tensor.bytes = perk_round_up(tensor.bytes, SPACE_ALIGNMENT);
    if (tensor.space != PERK_SPACE_ACTIVATIONS) { /* activations get their places last, when all lifetimes are known */
        tensor.offset = plan->space_bytes[tensor.space];
        plan->space_bytes[tensor.space] += perk_round_up(tensor.bytes, PERK_WEIGHT_BLOCK_BYTES);
    }
    plan->tensors[plan->tensor_count] = tensor;
    return plan->tensor_count++;
}

static perk_plan_tensor describe_matrix(const perk_tensor *tensor, perk_layout layout) {
    uint64_t tiles = perk_ceil_div((uint64_t)tensor->rows, PERK_TILE_ROWS);
    if (layout == PERK_LAYOUT_PAIRED_TILES) tiles = perk_ceil_div((uint64_t)tensor->rows / 2, PERK_TILE_ROWS / 2);
    uint64_t blocks = perk_ceil_div((uint64_t)tensor->cols, PERK_BLOCK_COLS);
    tiles *= (uint64_t)PERK_MAX((int64_t)1, tensor->experts);
    return (perk_plan_tensor){.space = PERK_SPACE_WEIGHTS,
                              .rows = (int32_t)(tiles * PERK_TILE_ROWS),
                              .cols = (int32_t)(blocks * PERK_BLOCK_COLS),
                              .row_stride = (int32_t)(blocks * PERK_BLOCK_COLS),
                              .dtype = PERK_BF16,
                              .bytes = tiles * blocks * PERK_WEIGHT_BLOCK_BYTES};
}

static perk_plan_tensor describe_rows(perk_space space, int64_t rows, int64_t cols, perk_dtype dtype) {
    uint64_t stride = PERK_ROW_STRIDE((uint64_t)cols);
    return (perk_plan_tensor){.space = space,
                              .rows = (int32_t)rows,
                              .cols = (int32_t)cols,
                              .row_stride = (int32_t)stride,
                              .dtype = dtype,
                              .bytes = (uint64_t)rows * stride * perk_dtype_size(dtype)};
}

int perk_lower_tensor(perk_lowering *l, const perk_tensor *tensor, perk_layout layout) {
    if (l->error.status != PERK_OK || !tensor) return -1;
    /* A table and a matrix may be the same weight (tied embeddings): each layout is a tensor of its own. */
    int known = l->plan_tensor[tensor->index];
    for (int i = known; i >= 0 && i < l->plan->tensor_count; i++)
        if (l->plan->tensors[i].graph_tensor == tensor->index && l->plan->tensors[i].layout == layout) return i;

    perk_plan_tensor described;
    if (!perk_tensor_is_weight(tensor)) {
        described = describe_rows(PERK_SPACE_ACTIVATIONS, perk_lower_rows(l, tensor), tensor->cols, tensor->dtype);
        described.external_input = tensor->kind == PERK_TENSOR_INPUT;
    } else if (layout == PERK_LAYOUT_ROWS) {
        described = describe_rows(PERK_SPACE_CONSTANTS, tensor->rows, tensor->cols, PERK_BF16);
    } else {
        described = describe_matrix(tensor, layout);
    }
    described.graph_tensor = tensor->index;
    described.layout = layout;
    snprintf(described.name, sizeof described.name, "%s", tensor->name);
    int index = add_tensor(l, described);
    if (known < 0) l->plan_tensor[tensor->index] = index;
    return index;
}

int perk_lower_scratch(perk_lowering *l, const char *name, perk_space space, int rows, int cols, perk_dtype dtype) {
    perk_plan_tensor described = describe_rows(space, rows, cols, dtype);
    described.row_stride = cols; /* scratch is dense */
    described.bytes = (uint64_t)rows * (uint64_t)cols * perk_dtype_size(dtype);
    described.graph_tensor = -1;
    snprintf(described.name, sizeof described.name, "%s", name);
    return add_tensor(l, described);
}

/* The plan's own tensor of that name; -1: there is none yet. */
static int find_scratch(const perk_lowering *l, const char *name) {
    for (int i = 0; i < l->plan->tensor_count; i++)
        if (l->plan->tensors[i].graph_tensor < 0 && !strcmp(l->plan->tensors[i].name, name)) return i;
    return -1;
}

int perk_lower_candidates(perk_lowering *l, const perk_tensor *logits) {
    if (!logits->producer || logits->producer->type != &perk_op_linear || logits->dtype != PERK_F32) return -1;
    char name[128];
    snprintf(name, sizeof name, "%.78s.candidates", logits->name);
    int known = find_scratch(l, name);
    if (known >= 0) return known;
    int tiles = (int)perk_ceil_div((uint64_t)logits->cols, PERK_TILE_ROWS);
    return perk_lower_scratch(l, name, PERK_SPACE_ACTIVATIONS, perk_lower_rows(l, logits), 2 * tiles, PERK_F32);
}

int perk_lower_most_hits(const perk_lowering *l, const perk_tensor *experts) {
    int64_t all = experts->producer->inputs[PERK_IN_X]->cols;
    return (int)PERK_MIN(all, perk_lower_rows(l, experts) * experts->cols);
}

/* Whether only linears of experts, and sums that are folded into them, ask for what the op picks. */
static bool is_routing_alone(const perk_lowering *l, const perk_op *route) {
    if (route->output->kept || route->second->kept) return false;
    for (int i = 0; i < l->graph->op_count; i++) {
        const perk_op *op = l->graph->ops[i];
        for (int j = 0; j < PERK_OP_INPUTS_MAX; j++) {
            if (op->inputs[j] == route->output && op->type != &perk_op_moe_linear) return false;
            if (op->inputs[j] == route->second && !perk_lower_is_folded(l, op)) return false;
        }
    }
    return true;
}

/* For all of them or for none: a program's producers know one way, and one number of experts and of slots. They keep
 * few logits in their registers. */
bool perk_lower_routes_alone(const perk_lowering *l) {
    const perk_op *first = NULL;
    if (l->plan->config.max_num_batched_tokens != 1) return false;
    for (int i = 0; i < l->graph->op_count; i++) {
        const perk_op *route = l->graph->ops[i];
        if (route->type != &perk_op_moe_route) continue;
        const perk_tensor *logits = route->inputs[PERK_IN_X];
        if (!first) first = route;
        if (logits->cols != first->inputs[PERK_IN_X]->cols || route->output->cols != first->output->cols ||
            logits->cols > MAX_OWN_EXPERTS || !logits->producer || logits->producer->type != &perk_op_linear ||
            !is_routing_alone(l, route))
            return false;
    }
    return true;
}

int perk_lower_routing(perk_lowering *l, const perk_tensor *experts) {
    char name[128];
    if (perk_lower_routes_alone(l)) return perk_lower_tensor(l, experts->producer->inputs[PERK_IN_X], PERK_LAYOUT_ROWS);
    snprintf(name, sizeof name, "%.78s.routing", experts->name);
    int known = find_scratch(l, name), pairs = perk_lower_rows(l, experts) * (int)experts->cols;
    if (known >= 0) return known;
    return perk_lower_scratch(l, name, PERK_SPACE_ACTIVATIONS, 1,
                              PERK_ROUTING_WORDS(perk_lower_most_hits(l, experts), pairs), PERK_I32);
}

/* ---- inputs of wide linears ---- */

bool perk_lower_is_wide(const perk_lowering *l, const perk_op *linear) {
    if (l->plan->wide_tokens == 0 || linear->type != &perk_op_linear) return false;
    return perk_plan_is_batched(l->plan) ||
           (linear->output->row_kind == PERK_ROWS_TOKENS && linear->output->dtype == PERK_BF16);
}

static int find_wide_input(const perk_lowering *l, const perk_tensor *tensor, char name[96]) {
    snprintf(name, 96, "%.80s.slices", tensor->name);
    for (int i = 0; i < l->plan->tensor_count; i++)
        if (l->plan->tensors[i].layout == PERK_LAYOUT_WIDE_INPUT && !strcmp(l->plan->tensors[i].name, name)) return i;
    return -1;
}

bool perk_lower_has_wide_input(const perk_lowering *l, const perk_tensor *tensor) {
    char name[96];
    return find_wide_input(l, tensor, name) >= 0;
}

int perk_lower_wide_input(perk_lowering *l, const perk_tensor *tensor) {
    char name[96];
    int index = find_wide_input(l, tensor, name);
    if (index >= 0 || l->error.status != PERK_OK) return index;
    perk_plan_tensor described =
        describe_rows(PERK_SPACE_ACTIVATIONS, l->plan->config.max_num_batched_tokens, tensor->cols, PERK_BF16);
    described.rows = perk_lower_rows(l, tensor); /* a slice has room for all tokens */
    described.graph_tensor = -1;
    described.layout = PERK_LAYOUT_WIDE_INPUT;
    snprintf(described.name, sizeof described.name, "%s", name);
    return add_tensor(l, described);
}

/* Whether only wide linears read the tensor, as what they multiply. */
static bool only_wide_linears_read(const perk_lowering *l, const perk_tensor *tensor) {
    int readers = 0;
    for (int i = 0; i < l->graph->op_count; i++)
        for (int j = 0; j < PERK_OP_INPUTS_MAX; j++) {
            if (l->graph->ops[i]->inputs[j] != tensor) continue;
            if (j != PERK_IN_X || !perk_lower_is_wide(l, l->graph->ops[i])) return false;
            readers++;
        }
    return readers > 0;
}

bool perk_lower_writes_input(const perk_lowering *l, const perk_tensor *output) {
    return l->plan->wide_tokens > 0 && !output->kept && only_wide_linears_read(l, output);
}

int perk_lower_output(perk_lowering *l, const perk_tensor *output) {
    return perk_lower_writes_input(l, output) ? perk_lower_wide_input(l, output)
                                              : perk_lower_tensor(l, output, PERK_LAYOUT_ROWS);
}

/* ---- stages and tasks ---- */

static int intern_kind(perk_lowering *l, char *statement) {
    perk_plan *plan = l->plan;
    for (int i = 0; i < plan->kind_count; i++)
        if (!strcmp(plan->kinds[i], statement)) {
            free(statement);
            return i;
        }
    if (!grow(l, &plan->kinds, &l->capacity.kinds, plan->kind_count, sizeof *plan->kinds)) {
        free(statement);
        return -1;
    }
    plan->kinds[plan->kind_count] = statement;
    return plan->kind_count++;
}

perk_stage *perk_lower_begin(perk_lowering *l, const perk_op *op, const char *suffix, const char *statement, ...) {
    perk_plan *plan = l->plan;
    if (!grow(l, &plan->stages, &l->capacity.stages, plan->stage_count, sizeof *plan->stages)) return NULL;
    char text[1024];
    va_list args;
    va_start(args, statement);
    int length = vsnprintf(text, sizeof text, statement, args);
    va_end(args);
    char *copy = length > 0 && (size_t)length < sizeof text ? perk_strdup(text) : NULL;
    if (!copy) {
        fail_memory(l);
        return NULL;
    }
    int kind = intern_kind(l, copy);
    if (kind < 0) return NULL;
    perk_stage *stage = &plan->stages[plan->stage_count];
    *stage = (perk_stage){.op = op->index, .kind = kind, .counter = plan->stage_count, .stream = {.tensor = -1}};
    for (int i = 0; i < PERK_RECORD_OPERANDS; i++) stage->operands[i] = -1;
    snprintf(stage->name, sizeof stage->name, "%.78s%s", op->output->name, suffix);
    plan->stage_count++;
    return stage;
}

void perk_lower_task(perk_lowering *l, int worker, int first, int stride, int count) {
    perk_plan *plan = l->plan;
    if (!grow(l, &plan->tasks, &l->capacity.tasks, plan->task_count, sizeof *plan->tasks)) return;
    perk_stage *stage = &plan->stages[plan->stage_count - 1];
    plan->tasks[plan->task_count++] = (perk_task){
        .stage = plan->stage_count - 1,
        .worker = worker,
        .first = first,
        .stride = stride,
        .count = count,
        .read_begin = plan->region_count,
        .read_end = plan->region_count,
        .write_begin = plan->region_count,
        .write_end = plan->region_count,
        .stream_bytes = (uint64_t)count * (uint64_t)stage->stream.blocks_per_tile * PERK_WEIGHT_BLOCK_BYTES *
                        (uint64_t)(stage->stream.deal == PERK_DEAL_TILES ? stage->stream.most_hits : 1)};
    stage->task_count++;
    stage->unit_count += count;
}

static bool add_region(perk_lowering *l, perk_region region) {
    perk_plan *plan = l->plan;
    if (!grow(l, &plan->regions, &l->capacity.regions, plan->region_count, sizeof *plan->regions)) return false;
    plan->regions[plan->region_count++] = region;
    return true;
}

/* Reads of a task come before its writes in plan->regions: all reads are added first. */
void perk_lower_read(perk_lowering *l, perk_region region) {
    if (!add_region(l, region)) return;
    perk_task *task = &l->plan->tasks[l->plan->task_count - 1];
    task->read_end = task->write_begin = task->write_end = l->plan->region_count;
}

void perk_lower_write(perk_lowering *l, perk_region region) {
    if (!add_region(l, region)) return;
    l->plan->tasks[l->plan->task_count - 1].write_end = l->plan->region_count;
}

perk_region perk_lower_whole(const perk_lowering *l, int tensor) {
    if (tensor < 0) return (perk_region){.tensor = -1};
    const perk_plan_tensor *t = &l->plan->tensors[tensor];
    return (perk_region){
        .tensor = tensor, .row_end = t->rows, .col_count = t->cols, .col_stride = t->cols, .repeat = 1};
}

perk_region perk_lower_columns(const perk_lowering *l, int tensor, int begin, int count, int stride, int repeat) {
    if (tensor < 0) return (perk_region){.tensor = -1};
    return (perk_region){.tensor = tensor,
                         .row_end = l->plan->tensors[tensor].rows,
                         .col_begin = begin,
                         .col_count = count,
                         .col_stride = stride,
                         .repeat = repeat};
}

void perk_lower_end(perk_lowering *l) {
    if (l->error.status != PERK_OK) return;
    perk_stage *stage = &l->plan->stages[l->plan->stage_count - 1];
    if (stage->stream.tensor >= 0) l->rotation = (l->rotation + stage->unit_count) % l->plan->device.worker_count;
}

/* Task i is that of worker `start` + i * `step`. */
static void deal_runs(perk_lowering *l, int units, perk_lower_run add, void *user, int start, int step) {
    int workers = l->plan->device.worker_count, tasks = PERK_MIN(units, workers);
    for (int i = 0; i < tasks && l->error.status == PERK_OK; i++) {
        int first = (int)((int64_t)units * i / tasks), end = (int)((int64_t)units * (i + 1) / tasks);
        add(l, user, (start + workers + i * step) % workers, first, end - first);
    }
}

void perk_lower_runs(perk_lowering *l, int units, perk_lower_run add, void *user) {
    deal_runs(l, units, add, user, l->rotation - 1, -1);
}

void perk_lower_late_runs(perk_lowering *l, int units, perk_lower_run add, void *user) {
    deal_runs(l, units, add, user, l->rotation, 1);
}

void perk_lower_fixed_runs(perk_lowering *l, int units, perk_lower_run add, void *user) {
    deal_runs(l, units, add, user, -1, -1);
}

/* Column groups of 8 elements, dealt in runs: from operand 0 to operand 1. */
void perk_lower_copy(perk_lowering *l, void *user, int worker, int first, int count) {
    const perk_stage *stage = user;
    const int *operands = stage->operands;
    int begin = first * 8, width = PERK_MIN((first + count) * 8, l->plan->tensors[operands[1]].cols) - begin;
    perk_lower_task(l, worker, first, 1, count);
    perk_lower_read(l, perk_lower_columns(l, operands[0], begin, width, width, 1));
    perk_lower_write(l, perk_lower_columns(l, operands[1], begin, width, width, 1));
}

perk_status perk_lower_gather(perk_lowering *l, const perk_op *op, const char *rows, const char *index) {
    const perk_tensor *source = op->inputs[PERK_IN_X];
    int stride = (int)PERK_ROW_STRIDE(source->cols);
    perk_stage *stage = perk_lower_begin(l, op, "", "gather_rows<Rows::%s, program::%s, %d, %d, %s>(worker, task);",
                                         rows, index, stride, stride, perk_tensor_is_weight(source) ? "true" : "false");
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_GATHER;
    stage->operands[0] = perk_lower_tensor(l, source, PERK_LAYOUT_ROWS);
    stage->operands[1] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    if (l->error.status == PERK_OK)
        perk_lower_runs(l, (int)perk_ceil_div((uint64_t)source->cols, 8), perk_lower_copy, stage);
    perk_lower_end(l);
    return l->error.status;
}

/* ---- folding ---- */

static int reader_count(const perk_graph *graph, const perk_tensor *tensor, const perk_op **only) {
    int readers = 0;
    for (int i = 0; i < graph->op_count; i++)
        for (int j = 0; j < PERK_OP_INPUTS_MAX; j++)
            if (graph->ops[i]->inputs[j] == tensor) {
                readers++;
                if (only) *only = graph->ops[i];
            }
    return readers;
}

/* A norm is folded when every reader takes it as the input of a linear whose staging holds all rows: the gain goes into
 * the staged input, the scale into the finished sums. */
static bool norm_is_foldable(const perk_lowering *l, const perk_op *norm) {
    const perk_tensor *out = norm->output;
    int rows = perk_lower_rows(l, out), readers = 0;
    if (out->kept || perk_linear_staged_bytes(rows, out->cols) > l->staging_limit) return false;
    for (int i = 0; i < l->graph->op_count; i++) {
        const perk_op *op = l->graph->ops[i];
        for (int j = 0; j < PERK_OP_INPUTS_MAX; j++) {
            if (op->inputs[j] != out) continue;
            if (!is_linear(op) || j != PERK_IN_X || perk_lower_is_wide(l, op)) return false; /* those stage nothing */
            readers++;
        }
    }
    return readers > 0;
}

/* gate_mul is folded into the linear that makes its input, when nothing else reads that. */
static const perk_op *gate_host(const perk_lowering *l, const perk_op *gate) {
    const perk_tensor *x = gate->inputs[PERK_IN_X];
    const perk_op *host = x->producer;
    bool fits = is_linear(host) && !x->kept && !host->inputs[PERK_IN_RESIDUAL] && x->dtype == PERK_BF16 &&
                reader_count(l->graph, x, NULL) == 1;
    return fits ? host : NULL;
}

/* moe_sum is folded into the linear of experts that makes its input, when nothing else reads that, the shares are of
 * the same routing, and the residual is there by then. */
static const perk_op *sum_host(const perk_lowering *l, const perk_op *sum) {
    const perk_tensor *x = sum->inputs[PERK_IN_X], *residual = sum->inputs[PERK_IN_RESIDUAL];
    const perk_op *host = x->producer;
    bool fits = host && host->type == &perk_op_moe_linear && !x->kept && reader_count(l->graph, x, NULL) == 1 &&
                sum->inputs[PERK_IN_SHARES] == host->inputs[PERK_IN_EXPERTS]->producer->second &&
                (!residual->producer || residual->producer->index < host->index);
    return fits ? host : NULL;
}

static void choose_folds(perk_lowering *l) {
    for (int i = 0; i < l->graph->op_count; i++) {
        const perk_op *op = l->graph->ops[i];
        if (op->type == &perk_op_gate_mul) l->fold_into[i] = gate_host(l, op);
        if (op->type == &perk_op_moe_sum) l->fold_into[i] = sum_host(l, op);
        if (op->type == &perk_op_rmsnorm && norm_is_foldable(l, op))
            reader_count(l->graph, op->output, &l->fold_into[i]);
    }
}

/* ---- the step's batch ---- */

int perk_plan_pages_per_request(const perk_config *config) {
    return (int)perk_ceil_div((uint64_t)config->max_seq_length, (uint64_t)config->page_size);
}

int perk_plan_attention_items(const perk_plan *plan) {
    int most = plan->config.max_num_batched_tokens; /* that a request with items adds in a step */
    if (plan->prompt_slice > 0) most = PERK_MIN(most, PERK_PROMPT_TOKENS - 1);
    int fresh = plan->max_query_tiles * (int)perk_ceil_div((uint64_t)most, PERK_KV_UNIT);
    return PERK_MAX(plan->attention_parts * PERK_CONSUMER_WARPS, plan->max_query_tiles) + fresh;
}

perk_batch_layout perk_plan_batch_layout(const perk_plan *plan) {
    const perk_config *c = &plan->config;
    perk_batch_layout layout = {0};
    int32_t next = sizeof(perk_batch_header) / 4;
    struct {
        int32_t *place;
        int64_t words;
    } arrays[] = {
        {&layout.token_ids, c->max_num_batched_tokens},
        {&layout.positions, c->max_num_batched_tokens},
        {&layout.token_request, c->max_num_batched_tokens},
        {&layout.token_query_tile, c->max_num_batched_tokens},
        {&layout.logit_rows, c->max_num_logit_rows},
        {&layout.query_tiles, (int64_t)plan->max_query_tiles * (int64_t)(sizeof(perk_query_tile) / 4)},
        {&layout.attention_items, (int64_t)plan->max_attention_items * (int64_t)(sizeof(perk_attention_item) / 4)},
        {&layout.page_table, (int64_t)c->max_num_batched_requests * perk_plan_pages_per_request(c)}, /* may be long */
    };
    for (size_t i = 0; i < PERK_COUNT(arrays); i++) {
        *arrays[i].place = next;
        next += (int32_t)perk_round_up((uint64_t)arrays[i].words, 4);
    }
    layout.words = next;
    return layout;
}

int perk_plan_batch_shared_bytes(const perk_plan *plan) {
    perk_batch_layout layout = perk_plan_batch_layout(plan);
    if (layout.words * 4 <= PERK_BATCH_SHARED_MAX) return layout.words * 4;
    /* Without the page table. Where slices of inputs are, too, it would take the place of weights. */
    return plan->wide_tokens == 0 && layout.page_table * 4 <= PERK_BATCH_SHARED_MAX ? layout.page_table * 4 : 0;
}

/* ---- shared memory ---- */

static bool has_wgmma(const perk_device_desc *device) { return !device->portable && !strcmp(device->arch, "sm_90a"); }

static bool has_experts(const perk_graph *graph) {
    for (int i = 0; i < graph->op_count; i++)
        if (graph->ops[i]->type == &perk_op_moe_linear) return true;
    return false;
}

/* Many tokens a step. Batched linears need no wgmma, but were tuned for GPUs that have it. */
static void plan_wide(perk_plan *plan) {
    int tokens = plan->config.max_num_batched_tokens;
    if (tokens < MIN_WIDE_TOKENS || !has_wgmma(&plan->device) || has_experts(plan->graph)) return;
    if (tokens <= PERK_BATCHED_TOKENS) {
        plan->wide_tokens = (int)perk_round_up((uint64_t)tokens, BATCHED_COLUMNS);
        return; /* input_slots follow when the ring has its own */
    }
    plan->wide_tokens = tokens <= MAX_WIDE_TOKENS / 2 ? MAX_WIDE_TOKENS / 2 : MAX_WIDE_TOKENS;
    plan->input_slots = INPUT_BYTES / (plan->wide_tokens * PERK_SLICE_ROW_BYTES);
}

static int input_slot_bytes(const perk_plan *plan) { return plan->wide_tokens * PERK_SLICE_ROW_BYTES + 16; }

/* Batched linears: what all warps have of 16 outputs of some groups of 8 tokens. */
static int batched_reduction_bytes(const perk_plan *plan) {
    int groups = plan->wide_tokens / 8, at_once = groups % 4 == 0 ? 4 : 2;
    return perk_plan_is_batched(plan) ? at_once * PERK_CONSUMER_WARPS * 512 : 0;
}

static int reduction_bytes_of(const perk_lowering *l, const perk_op *op) {
    if (op->type == &perk_op_linear && !perk_lower_is_wide(l, op))
        return perk_linear_reduction_bytes(perk_lower_rows(l, op->output));
    if (op->type == &perk_op_attention) return perk_attention_reduction_bytes(op);
    if (op->type == &perk_op_moe_route) return perk_moe_route_bytes(l, op);
    return op->type == &perk_op_moe_linear ? perk_moe_linear_bytes(l, op) : 0;
}

/* False when the ring would be too short. */
static bool divide_shared_memory(perk_lowering *l) {
    perk_plan *plan = l->plan;
    int reduction = PERK_MAX(256, batched_reduction_bytes(plan));
    for (int i = 0; i < l->graph->op_count; i++)
        reduction = PERK_MAX(reduction, reduction_bytes_of(l, l->graph->ops[i]));
    int batch = perk_plan_batch_shared_bytes(plan);
    int fixed = reduction + batch + PERK_TASK_SLOTS_BYTES + PERK_FOUND_BYTES, room = plan->device.shared_memory - fixed;
    if (perk_plan_is_batched(plan)) {
        int each = PERK_CONSUMER_WARPS * input_slot_bytes(plan),
            room_for = (room - RING_SLOTS_WANTED * SLOT_BYTES) / each;
        plan->input_slots = PERK_CONSUMER_WARPS * PERK_MAX(1, PERK_MIN(room_for, BATCHED_WARP_SLOTS));
    }
    fixed += plan->input_slots * input_slot_bytes(plan);
    room = plan->device.shared_memory - fixed;
    int slots_wanted = PERK_MIN(RING_SLOTS_WANTED, PERK_MAX(RING_SLOTS_MIN, room * 3 / 4 / SLOT_BYTES));
    l->staging_limit = PERK_MAX(0, (room - slots_wanted * SLOT_BYTES) / 128 * 128);
    int staging = 0, small = l->staging_limit;
    for (int i = 0; i < l->graph->op_count; i++) {
        const perk_op *op = l->graph->ops[i];
        if (!is_linear(op) || perk_lower_is_wide(l, op)) continue;
        int all = perk_linear_staged_bytes(perk_lower_rows(l, op->inputs[PERK_IN_X]), op->inputs[PERK_IN_X]->cols);
        if (all <= l->staging_limit)
            staging = PERK_MAX(staging, all);
        else
            staging = PERK_MAX(staging, PERK_MIN(small, perk_linear_staged_bytes(1, op->inputs[PERK_IN_X]->cols)));
    }
    plan->staging_bytes = staging;
    plan->reduction_bytes = reduction;
    plan->ring_slots = PERK_MIN(RING_SLOTS_MAX, (room - plan->staging_bytes) / SLOT_BYTES);
    plan->shared_bytes = plan->ring_slots * SLOT_BYTES + plan->staging_bytes + fixed;
    return plan->ring_slots >= RING_SLOTS_MIN;
}

static int kv_unit_bytes(const perk_plan *plan) { return 2 * PERK_KV_UNIT * plan->kv_head_dim * 2; }

/* Whether attention's reads of the cache go through the ring (kernels_src/kv_stream.cuh), which needs bulk copies and
 * room for a unit of every consumer warp. Tiles of prompts read the cache by themselves, and once for many queries. */
static bool can_stream_kv(const perk_plan *plan) {
    int unit = kv_unit_bytes(plan);
    if (plan->attention_parts == 0 || plan->device.portable || plan->prompt_slice > 0 || unit > PERK_CHUNK_BYTES)
        return false;
    if (!strncmp(plan->device.arch, "sm_12", 5)) return false; /* spilled there: the compiler makes less of it */
    if (plan->config.max_seq_length > UINT16_MAX * PERK_KV_UNIT) return false; /* the producer counts in 16 bits */
    int units = PERK_CHUNK_BYTES / unit;                                       /* of a chunk */
    return (PERK_CONSUMER_WARPS + units - 1) / units <= plan->ring_slots;
}

/* Pieces have a cost when they are put together, and warps wait for each other in every round: so, where the cache
 * comes through the ring, no more warps get one than keep up with the stream, with two chunks a round. */
static void plan_kv_stream(perk_plan *plan) {
    int warps = PERK_CONSUMER_WARPS;
    plan->streams_kv = can_stream_kv(plan);
    if (plan->streams_kv) warps = PERK_MIN(warps, 2 * PERK_CHUNK_BYTES / kv_unit_bytes(plan));
    plan->attention_pieces = plan->attention_parts * warps;
}

static perk_status plan_shared_memory(perk_lowering *l) {
    perk_plan *plan = l->plan;
    if (divide_shared_memory(l)) return PERK_OK;
    if (perk_plan_is_batched(plan)) { /* linears as for fewer tokens need less */
        plan->wide_tokens = plan->input_slots = 0;
        if (divide_shared_memory(l)) return PERK_OK;
    }
    return perk_fail(&l->error, PERK_UNSUPPORTED,
                     "%s: %d bytes of shared memory a block are too few for a step of %d tokens; lower "
                     "max_num_batched_tokens",
                     plan->device.arch, plan->device.shared_memory, plan->config.max_num_batched_tokens);
}

/* ---- waits ---- */

/* ancestors[s] is the set of stages all of whose tasks are done before any task of stage s begins, as bits. */
typedef struct ancestry {
    uint64_t *bits;
    int words;
} ancestry;

static bool is_ancestor(const ancestry *a, int stage, int of) {
    return a->bits[(size_t)of * (size_t)a->words + (size_t)stage / 64] >> (stage % 64) & 1;
}

static void add_ancestor(ancestry *a, int stage, int of) {
    uint64_t *to = a->bits + (size_t)of * (size_t)a->words, *from = a->bits + (size_t)stage * (size_t)a->words;
    for (int i = 0; i < a->words; i++) to[i] |= from[i];
    to[stage / 64] |= UINT64_C(1) << (stage % 64);
}

/* Who touched what last, while the stages are walked in order; -1: nobody yet. */
typedef struct last_uses {
    int *writer;   /* [plan tensors] */
    int *reader;   /* [plan tensors] of the KV cache: its readers see the steps before */
    int unawaited; /* a stage that only appends to the KV cache, as long as no other waits for it */
} last_uses;

/* Whether tasks of this step read what the stage writes. */
static bool appends_only(const perk_plan *plan, int task_begin, int task_end) {
    for (int t = task_begin; t < task_end; t++)
        for (int r = plan->tasks[t].write_begin; r < plan->tasks[t].write_end; r++)
            if (plan->tensors[plan->regions[r].tensor].space != PERK_SPACE_KV) return false;
    return true;
}

/* needs[t]: the stage reads what stage t writes, or appends to the KV cache that t reads. What nobody in the step
 * needs, an append, is needed by the stage after the next: it is over by then, and memory that it reads can be used
 * again. */
static void find_needs(const perk_plan *plan, int stage, int task_begin, int task_end, const last_uses *last,
                       bool *needs) {
    memset(needs, 0, (size_t)plan->stage_count);
    for (int t = task_begin; t < task_end; t++) {
        for (int r = plan->tasks[t].read_begin; r < plan->tasks[t].read_end; r++) {
            int writer = last->writer[plan->regions[r].tensor];
            if (writer >= 0 && writer != stage) needs[writer] = true;
        }
        for (int r = plan->tasks[t].write_begin; r < plan->tasks[t].write_end; r++) {
            int reader = last->reader[plan->regions[r].tensor];
            if (reader >= 0 && reader != stage) needs[reader] = true;
        }
    }
    if (last->unawaited >= 0 && last->unawaited + 2 <= stage) needs[last->unawaited] = true;
}

static void note_uses(const perk_plan *plan, int stage, int task_begin, int task_end, last_uses *last) {
    for (int t = task_begin; t < task_end; t++) {
        for (int r = plan->tasks[t].read_begin; r < plan->tasks[t].read_end; r++) {
            int tensor = plan->regions[r].tensor;
            if (plan->tensors[tensor].space == PERK_SPACE_KV) last->reader[tensor] = stage;
        }
        for (int r = plan->tasks[t].write_begin; r < plan->tasks[t].write_end; r++)
            last->writer[plan->regions[r].tensor] = stage;
    }
    if (last->unawaited >= 0 && last->unawaited + 2 <= stage) last->unawaited = -1;
    if (appends_only(plan, task_begin, task_end)) last->unawaited = stage;
}

static bool add_wait(perk_lowering *l, perk_wait wait) {
    perk_plan *plan = l->plan;
    if (!grow(l, &plan->waits, &l->capacity.waits, plan->wait_count, sizeof *plan->waits)) return false;
    plan->waits[plan->wait_count++] = wait;
    return true;
}

/* Waits of one stage for the stages in `needs`, later ones first, without those that are implied. */
static int add_stage_waits(perk_lowering *l, int stage, const bool *needs, ancestry *a) {
    int begin = l->plan->wait_count;
    for (int other = stage - 1; other >= 0; other--) {
        if (!needs[other] || is_ancestor(a, other, stage)) continue;
        add_wait(l, (perk_wait){.counter = other, .needed = l->plan->stages[other].task_count});
        add_ancestor(a, other, stage);
    }
    return begin;
}

/* The first stages of a step wait for the last ones of the step before, so that steps may follow each other in one
 * launch. */
static void add_step_waits(perk_lowering *l, const bool *is_sink) {
    for (int s = 0; s < l->plan->stage_count; s++)
        if (is_sink[s]) add_wait(l, (perk_wait){.counter = s, .needed = 0});
}

static perk_status plan_waits(perk_lowering *l, ancestry *a) {
    perk_plan *plan = l->plan;
    int stages = plan->stage_count;
    last_uses last = {.writer = perk_calloc((size_t)plan->tensor_count, sizeof *last.writer),
                      .reader = perk_calloc((size_t)plan->tensor_count, sizeof *last.reader),
                      .unawaited = -1};
    int *wait_begin = perk_calloc((size_t)stages + 1, sizeof *wait_begin);
    bool *needs = perk_calloc((size_t)stages, sizeof *needs), *is_sink = perk_calloc((size_t)stages, sizeof *is_sink);
    if (!last.writer || !last.reader || !wait_begin || !needs || !is_sink) {
        fail_memory(l);
        goto out;
    }
    for (int i = 0; i < plan->tensor_count; i++) last.writer[i] = last.reader[i] = -1;
    for (int s = 0; s < stages; s++) is_sink[s] = true;
    for (int s = 0, task = 0; s < stages; s++) {
        int task_end = task + plan->stages[s].task_count;
        find_needs(plan, s, task, task_end, &last, needs);
        wait_begin[s] = add_stage_waits(l, s, needs, a);
        for (int other = 0; other < s; other++)
            if (needs[other]) is_sink[other] = false;
        note_uses(plan, s, task, task_end, &last);
        task = task_end;
    }
    wait_begin[stages] = plan->wait_count;
    int step_begin = plan->wait_count;
    add_step_waits(l, is_sink);
    int step_end = plan->wait_count;
    if (step_end - step_begin > PERK_RECORD_WAITS)
        perk_fail(&l->error, PERK_UNSUPPORTED, "the graph has %d results; a program has at most %d",
                  step_end - step_begin, (int)PERK_RECORD_WAITS);
    for (int i = 0; i < plan->task_count; i++) {
        perk_task *task = &plan->tasks[i];
        bool is_root = wait_begin[task->stage] == wait_begin[task->stage + 1];
        task->wait_begin = is_root ? step_begin : wait_begin[task->stage];
        task->wait_end = is_root ? step_end : wait_begin[task->stage + 1];
        if (task->wait_end - task->wait_begin > PERK_RECORD_WAITS)
            perk_fail(&l->error, PERK_UNSUPPORTED, "%s needs more than %d waits", plan->stages[task->stage].name,
                      (int)PERK_RECORD_WAITS);
    }
out:
    free(last.writer);
    free(last.reader);
    free(wait_begin);
    free(needs);
    free(is_sink);
    return l->error.status;
}

static perk_status plan_signals(perk_lowering *l) {
    perk_plan *plan = l->plan;
    plan->counter_count = plan->stage_count;
    plan->counter_per_step = perk_calloc((size_t)plan->counter_count, sizeof *plan->counter_per_step);
    if (!plan->counter_per_step) fail_memory(l);
    for (int i = 0; i < plan->task_count; i++) {
        if (!grow(l, &plan->signals, &l->capacity.signals, plan->signal_count, sizeof *plan->signals)) break;
        perk_task *task = &plan->tasks[i];
        task->signal_begin = plan->signal_count;
        plan->signals[plan->signal_count++] = (perk_signal){.counter = task->stage, .amount = 1};
        task->signal_end = plan->signal_count;
        plan->counter_per_step[task->stage]++;
    }
    return l->error.status;
}

/* ---- memory of activations: a tensor may take the place of one whose last reader is certainly done ---- */

typedef struct place {
    uint64_t offset, bytes;
    int tensor; /* who has it now */
} place;

static void mark_accesses(const perk_plan *plan, bool *accesses) { /* [tensors][stages] */
    for (int t = 0; t < plan->task_count; t++)
        for (int r = plan->tasks[t].read_begin; r < plan->tasks[t].write_end; r++)
            accesses[(size_t)plan->regions[r].tensor * (size_t)plan->stage_count + (size_t)plan->tasks[t].stage] = true;
}

/* Only tensors of one shape share a place: the columns between width and stride are zero from the start and never
 * written (readers of whole blocks count on it), and another width would put its data there. */
static bool is_free_for(const perk_plan *plan, const place *p, const perk_plan_tensor *tensor, int stage,
                        const bool *accesses, const ancestry *a) {
    const perk_plan_tensor *holder = &plan->tensors[p->tensor];
    if (holder->rows != tensor->rows || holder->cols != tensor->cols || holder->dtype != tensor->dtype ||
        holder->layout != tensor->layout)
        return false;
    bool kept =
        holder->external_input || (holder->graph_tensor >= 0 && plan->graph->tensors[holder->graph_tensor]->kept) ||
        holder->dtype != PERK_BF16; /* logits, tokens and partials are read back or large: they keep their place */
    if (kept) return false;
    const bool *stages = accesses + (size_t)p->tensor * (size_t)plan->stage_count;
    for (int s = 0; s < plan->stage_count; s++)
        if (stages[s] && !is_ancestor(a, s, stage)) return false;
    return true;
}

/* Behind all others, twice. */
static void place_eager_tensors(perk_plan *plan) {
    uint64_t *bytes = &plan->space_bytes[PERK_SPACE_ACTIVATIONS];
    plan->eager_begin = *bytes;
    for (int t = 0; t < plan->tensor_count; t++) {
        if (!plan->tensors[t].eager) continue;
        plan->tensors[t].offset = *bytes;
        *bytes += plan->tensors[t].bytes;
    }
    *bytes += plan->eager_bytes;
}

static perk_status plan_activations(perk_lowering *l, const ancestry *a) {
    perk_plan *plan = l->plan;
    size_t stages = (size_t)plan->stage_count;
    bool *accesses = perk_calloc((size_t)plan->tensor_count * stages, sizeof *accesses);
    place *places = perk_calloc((size_t)plan->tensor_count, sizeof *places);
    int place_count = 0;
    if (!accesses || !places) {
        fail_memory(l);
        goto out;
    }
    mark_accesses(plan, accesses);
    for (int t = 0; t < plan->tensor_count; t++) {
        perk_plan_tensor *tensor = &plan->tensors[t];
        if (tensor->space != PERK_SPACE_ACTIVATIONS || tensor->eager) continue;
        int first = 0;
        while (first < plan->stage_count && !accesses[(size_t)t * stages + (size_t)first]) first++;
        place *best = NULL;
        for (int p = 0; p < place_count && first < plan->stage_count && !tensor->external_input; p++)
            if (is_free_for(plan, &places[p], tensor, first, accesses, a)) best = &places[p];
        if (!best) {
            best = &places[place_count++];
            *best = (place){.offset = plan->space_bytes[PERK_SPACE_ACTIVATIONS], .bytes = tensor->bytes};
            plan->space_bytes[PERK_SPACE_ACTIVATIONS] += tensor->bytes;
        }
        best->tensor = t;
        tensor->offset = best->offset;
    }
    place_eager_tensors(plan);
out:
    free(accesses);
    free(places);
    return l->error.status;
}

/* ---- the lists of the workers ---- */

static perk_status sort_by_worker(perk_lowering *l) {
    perk_plan *plan = l->plan;
    int workers = plan->device.worker_count;
    perk_task *sorted = perk_calloc((size_t)plan->task_count, sizeof *sorted);
    int *next = perk_calloc((size_t)workers + 1, sizeof *next);
    plan->worker_begin = perk_calloc((size_t)workers + 1, sizeof *plan->worker_begin);
    if (!sorted || !next || !plan->worker_begin) {
        free(sorted);
        free(next);
        return perk_fail_memory(&l->error, "the plan");
    }
    for (int i = 0; i < plan->task_count; i++) plan->worker_begin[plan->tasks[i].worker + 1]++;
    for (int w = 0; w < workers; w++) plan->worker_begin[w + 1] += plan->worker_begin[w];
    memcpy(next, plan->worker_begin, (size_t)workers * sizeof *next);
    for (int i = 0; i < plan->task_count; i++) sorted[next[plan->tasks[i].worker]++] = plan->tasks[i];
    free(plan->tasks);
    free(next);
    plan->tasks = sorted;
    return PERK_OK;
}

/* ---- the whole ---- */

static perk_status check_limits(perk_lowering *l) {
    const perk_config *config = &l->plan->config;
    bool experts = has_experts(l->graph), is_wide = has_wgmma(&l->plan->device) && !experts;
    int most = is_wide ? MAX_STEP_TOKENS : MAX_ROWS;
    if (config->max_num_batched_tokens > most || config->max_num_logit_rows > MAX_ROWS)
        return perk_fail(
            &l->error, PERK_UNSUPPORTED,
            "max_num_batched_tokens %d, max_num_logit_rows %d: a step of %s%s takes at most %d rows%s, and "
            "logits of at most %d; longer prompts enter in chunks",
            config->max_num_batched_tokens, config->max_num_logit_rows, l->plan->device.arch,
            l->plan->device.portable ? ", portable," : "", most,
            experts   ? " with experts"
            : is_wide ? ""
                      : " (sm_90a, not portable: 1024)",
            (int)MAX_ROWS);
    if (l->plan->device.worker_count < 1 || l->graph->op_count < 1)
        return perk_fail(&l->error, PERK_INVALID_ARGUMENT, "a plan needs at least one worker and one op");
    return PERK_OK;
}

/* The batch's size depends on how attention is cut, and so do the sizes of shared memory: attention is judged first. */
static perk_status plan_attention(perk_lowering *l) {
    for (int i = 0; i < l->graph->op_count && l->error.status == PERK_OK; i++)
        if (l->graph->ops[i]->type == &perk_op_attention) perk_attention_plan_shape(l, l->graph->ops[i], &l->error);
    return l->error.status;
}

/* Gains of norms have their places before all else: which stage comes to one first depends on what is folded into what,
 * and the programs of a model share their memory. */
static void place_gains(perk_lowering *l) {
    for (int i = 0; i < l->graph->op_count; i++)
        if (l->graph->ops[i]->type == &perk_op_rmsnorm)
            perk_lower_tensor(l, l->graph->ops[i]->inputs[PERK_IN_WEIGHT], PERK_LAYOUT_ROWS);
}

static void lower_by(perk_lowering *l, const perk_op *op,
                     perk_status (*lower)(perk_lowering *, const perk_op *, perk_error *)) {
    perk_error failure = {0};
    if (l->error.status != PERK_OK) return;
    if (lower(l, op, &failure) != PERK_OK && l->error.status == PERK_OK) l->error = failure;
}

/* Ops in their order. What nobody in the step waits for comes ahead of the second linear behind its op: workers do it
 * while they would wait for the end of the first, or for a norm between the two. */
static perk_status lower_ops(perk_lowering *l) {
    const perk_op *late = NULL;
    int linears = 0; /* since then */
    for (int i = 0; i < l->graph->op_count; i++) {
        const perk_op *op = l->graph->ops[i];
        linears += is_linear(op);
        if (late && (linears == 2 || op->type->lower_later)) {
            lower_by(l, late, late->type->lower_later);
            late = NULL;
        }
        lower_by(l, op, op->type->lower);
        if (!op->type->lower_later) continue;
        late = op;
        linears = 0;
    }
    if (late) lower_by(l, late, late->type->lower_later);
    return l->error.status;
}

static perk_status lower_graph(perk_lowering *l) {
    perk_plan *plan = l->plan;
    ancestry a = {0};
    if (check_limits(l) != PERK_OK) return l->error.status;
    plan_wide(plan);
    if (plan_attention(l) != PERK_OK || plan_shared_memory(l) != PERK_OK) return l->error.status;
    plan_kv_stream(l->plan);
    choose_folds(l);
    place_gains(l);
    if (lower_ops(l) != PERK_OK) return l->error.status;
    a.words = (plan->stage_count + 63) / 64;
    a.bits = perk_calloc((size_t)a.words * (size_t)plan->stage_count, sizeof *a.bits);
    if (!a.bits) return perk_fail_memory(&l->error, "the plan");
    if (plan_waits(l, &a) == PERK_OK && plan_signals(l) == PERK_OK &&
        perk_plan_choose_eager(plan, &l->error) == PERK_OK && plan_activations(l, &a) == PERK_OK)
        sort_by_worker(l);
    free(a.bits);
    return l->error.status;
}

perk_status perk_plan_create(perk_plan **out, const perk_graph *graph, const perk_device_desc *device,
                             const perk_config *config, perk_error *err) {
    *out = NULL;
    perk_lowering l = {.graph = graph};
    perk_status status = perk_graph_check(graph, err);
    if (status != PERK_OK) return status;
    l.plan = perk_calloc(1, sizeof *l.plan);
    l.plan_tensor = perk_calloc((size_t)graph->tensor_count, sizeof *l.plan_tensor);
    l.fold_into = perk_calloc((size_t)graph->op_count, sizeof *l.fold_into);
    if (!l.plan || !l.plan_tensor || !l.fold_into) {
        status = perk_fail_memory(err, "the plan");
        goto out;
    }
    for (int i = 0; i < graph->tensor_count; i++) l.plan_tensor[i] = -1;
    l.plan->graph = graph;
    l.plan->device = *device;
    l.plan->config = *config;
    status = lower_graph(&l);
    if (status != PERK_OK) {
        if (err) *err = l.error;
        goto out;
    }
    *out = l.plan;
    l.plan = NULL;
out:
    perk_plan_free(l.plan);
    free(l.plan_tensor);
    free(l.fold_into);
    return status;
}

void perk_plan_free(perk_plan *plan) {
    if (!plan) return;
    for (int i = 0; i < plan->kind_count; i++) free(plan->kinds[i]);
    free(plan->kinds);
    free(plan->tensors);
    free(plan->stages);
    free(plan->counter_per_step);
    free(plan->tasks);
    free(plan->worker_begin);
    free(plan->waits);
    free(plan->signals);
    free(plan->regions);
    free(plan);
}
