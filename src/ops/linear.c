/* linear: out = x W^T + bias + residual; also the vocabulary projection, whose output stays fp32. */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_math.h"
#include "reference_state.h"

static perk_tensor *add_linear(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight,
                               perk_tensor *bias, perk_tensor *residual, perk_dtype dtype) {
    if (!perk_graph_owns(graph, name, (perk_tensor *[]){x, weight}, 2)) return NULL;
    if (bias && !perk_graph_owns(graph, name, &bias, 1)) return NULL;
    if (residual && !perk_graph_owns(graph, name, &residual, 1)) return NULL;
    if (perk_tensor_is_weight(x) || !perk_tensor_is_weight(weight) || weight->is_vector || weight->experts ||
        weight->cols != x->cols) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT,
                        "linear %s: the weight %s [%lld, %lld] does not take rows of %lld", name, weight->name,
                        (long long)weight->rows, (long long)weight->cols, (long long)x->cols);
        return NULL;
    }
    if (bias && (!bias->is_vector || bias->cols != weight->rows)) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "linear %s: the bias %s must be a vector of %lld", name,
                        bias->name, (long long)weight->rows);
        return NULL;
    }
    if (residual &&
        (perk_tensor_is_weight(residual) || residual->cols != weight->rows || residual->row_kind != x->row_kind ||
         residual->slots != x->slots || residual->dtype != PERK_BF16)) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "linear %s: the residual %s must be an activation of width %lld",
                        name, residual->name, (long long)weight->rows);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {
        [PERK_IN_X] = x, [PERK_IN_WEIGHT] = weight, [PERK_IN_BIAS] = bias, [PERK_IN_RESIDUAL] = residual};
    perk_op *op = perk_graph_add_op(graph, &perk_op_linear, inputs, name, dtype, x->row_kind, weight->rows);
    return op ? op->output : NULL;
}

perk_tensor *perk_linear(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight, perk_tensor *bias) {
    return add_linear(graph, name, x, weight, bias, NULL, PERK_BF16);
}

perk_tensor *perk_linear_residual(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight,
                                  perk_tensor *bias, perk_tensor *residual) {
    if (!residual) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "linear %s: the residual is missing", name);
        return NULL;
    }
    return add_linear(graph, name, x, weight, bias, residual, PERK_BF16);
}

perk_tensor *perk_logits(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight) {
    return add_linear(graph, name, x, weight, NULL, NULL, PERK_F32);
}

typedef struct linear_job {
    const perk_reference *reference;
    const perk_op *op;
    size_t tokens;
    bool rounds;
} linear_job;

/* Columns [first, first + count) of all rows of the output: the sums are there, the rest of the formula is not. */
static void finish_columns(const linear_job *job, size_t first, size_t count) {
    const perk_op *op = job->op;
    const perk_tensor *residual = op->inputs[PERK_IN_RESIDUAL];
    const float *bias = perk_reference_vector(job->reference, op->inputs[PERK_IN_BIAS]);
    for (size_t t = 0; t < job->tokens; t++) {
        size_t at = t * (size_t)op->output->cols + first;
        float *out = perk_reference_values(job->reference, op->output) + at;
        const float *add = residual ? perk_reference_values(job->reference, residual) + at : NULL;
        for (size_t i = 0; i < count; i++) {
            float value = out[i];
            if (bias) value += bias[first + i];
            if (add) value += add[i];
            out[i] = job->rounds ? perk_round_bf16(value) : value;
        }
    }
}

static void linear_rows(void *context, size_t begin, size_t end, int thread) {
    const linear_job *job = context;
    const perk_tensor *weight = job->op->inputs[PERK_IN_WEIGHT];
    const float *x = perk_reference_values(job->reference, job->op->inputs[PERK_IN_X]);
    float *out = perk_reference_values(job->reference, job->op->output), *w = job->reference->scratch[thread];
    size_t cols = (size_t)weight->cols;
    for (size_t row = begin; row < end;) {
        size_t rows = PERK_MIN(end - row, (size_t)PERK_MATH_ROWS);
        for (size_t i = 0; i < rows; i++)
            perk_reference_load_row(job->reference, weight, 0, (int64_t)(row + i), w + i * cols);
        perk_math_dots(out + row, (size_t)weight->rows, w, rows, x, job->tokens, cols);
        finish_columns(job, row, rows);
        row += rows;
    }
}

static perk_status linear_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT];
    linear_job job = {reference, op, perk_reference_rows(reference, op->output),
                      reference->rounds && op->output->dtype != PERK_F32};
    (void)err;
    if (job.tokens == 0) return PERK_OK;
    size_t row_work = (size_t)weight->cols * job.tokens;
    perk_threads_run(reference->threads, (size_t)weight->rows, perk_ceil_div(PERK_REFERENCE_MIN_WORK, row_work),
                     linear_rows, &job);
    return PERK_OK;
}

/* ---- lowering: row tiles, dealt to the workers in turn; device code in kernels_src/linear.cuh ---- */

/* Operands of the stage. */
enum { IN, OUT, RESIDUAL, NORM_WEIGHT, BIAS, CANDIDATES };

static bool has_argmax(const perk_graph *graph, const perk_tensor *logits) {
    for (int i = 0; i < graph->op_count; i++)
        if (graph->ops[i]->type == &perk_op_argmax && graph->ops[i]->inputs[PERK_IN_X] == logits) return true;
    return false;
}

perk_linear_form perk_linear_form_of(const perk_lowering *l, const perk_op *op) {
    perk_linear_form form = {
        .x = op->inputs[PERK_IN_X], .out = op->output, .epilogue = "store", .tile_width = PERK_TILE_ROWS};
    if (form.x->producer && form.x->producer->type == &perk_op_rmsnorm && perk_lower_is_folded(l, form.x->producer)) {
        form.norm = form.x->producer;
        form.x = form.norm->inputs[PERK_IN_X];
    }
    for (int i = op->index + 1; i < l->graph->op_count; i++) {
        if (l->fold_into[i] != op) continue;
        if (l->graph->ops[i]->type == &perk_op_gate_mul) form.gate = l->graph->ops[i];
        if (l->graph->ops[i]->type == &perk_op_moe_sum) form.sum = l->graph->ops[i];
    }
    if (form.sum) {
        form.out = form.sum->output;
        form.epilogue = "sum";
    } else if (form.gate) {
        form.out = form.gate->output;
        form.activation = form.gate->activation;
        form.epilogue = "gated";
        form.tile_width = PERK_TILE_ROWS / 2;
    } else if (op->output->dtype == PERK_F32) {
        form.epilogue = has_argmax(l->graph, op->output) ? "logits" : "scores";
    } else if (op->inputs[PERK_IN_RESIDUAL]) {
        form.epilogue = "residual";
    }
    return form;
}

static perk_region rows_of(perk_region region, const perk_tile_run *run) {
    region.row_begin = run->row_begin;
    region.row_end = run->row_end;
    return region;
}

void perk_lower_tiles(perk_lowering *l, int tensor, int width, const perk_tile_run *run,
                      void (*add)(perk_lowering *, perk_region)) {
    int last = run->first + (run->count - 1) * run->stride, cols = l->plan->tensors[tensor].cols;
    bool is_cut = (last + 1) * width > cols;
    int whole = run->count - is_cut;
    perk_region regions[] = {perk_lower_columns(l, tensor, run->first * width, width, run->stride * width, whole),
                             perk_lower_columns(l, tensor, last * width, cols - last * width, width, 1)};
    for (int i = whole > 0 ? 0 : 1; i < 1 + is_cut; i++) add(l, rows_of(regions[i], run));
}

/* `share` of the stage's shares of the rows; most stages have one. */
static void add_tiles(perk_lowering *l, const perk_stage *stage, int worker, int first, int stride, int share,
                      int tile_width) {
    int tiles = stage->stream.tile_count, rows = l->plan->tensors[stage->operands[IN]].rows;
    int share_rows = stage->stream.shares > 1 ? stage->stream.share_tokens : rows;
    perk_tile_run task = {.first = first,
                          .stride = stride,
                          .count = (tiles - first + stride - 1) / stride,
                          .row_begin = share * share_rows,
                          .row_end = PERK_MIN((share + 1) * share_rows, rows)};
    perk_lower_task(l, worker, share * tiles + first, stride, task.count);
    if (l->error.status != PERK_OK) return;
    perk_lower_read(l, rows_of(perk_lower_whole(l, stage->operands[IN]), &task));
    perk_lower_read(l, perk_lower_whole(l, stage->stream.tensor));
    if (stage->operands[NORM_WEIGHT] >= 0) perk_lower_read(l, perk_lower_whole(l, stage->operands[NORM_WEIGHT]));
    if (stage->operands[BIAS] >= 0) perk_lower_read(l, perk_lower_whole(l, stage->operands[BIAS]));
    if (stage->operands[RESIDUAL] >= 0)
        perk_lower_tiles(l, stage->operands[RESIDUAL], tile_width, &task, perk_lower_read);
    perk_lower_tiles(l, stage->operands[OUT], tile_width, &task, perk_lower_write);
    if (stage->operands[CANDIDATES] >= 0) perk_lower_tiles(l, stage->operands[CANDIDATES], 2, &task, perk_lower_write);
}

static void choose_operands(perk_lowering *l, const perk_op *op, const perk_linear_form *form, perk_stage *stage) {
    bool is_wide = perk_lower_is_wide(l, op);
    stage->operands[IN] = is_wide ? perk_lower_wide_input(l, form->x) : perk_lower_tensor(l, form->x, PERK_LAYOUT_ROWS);
    stage->operands[OUT] =
        is_wide ? perk_lower_output(l, form->out) : perk_lower_tensor(l, form->out, PERK_LAYOUT_ROWS);
    stage->operands[RESIDUAL] = perk_lower_tensor(l, op->inputs[PERK_IN_RESIDUAL], PERK_LAYOUT_ROWS);
    stage->operands[BIAS] = perk_lower_tensor(l, op->inputs[PERK_IN_BIAS], PERK_LAYOUT_ROWS);
    if (form->norm)
        stage->operands[NORM_WEIGHT] = perk_lower_tensor(l, form->norm->inputs[PERK_IN_WEIGHT], PERK_LAYOUT_ROWS);
    stage->is_vocabulary = !strcmp(form->epilogue, "logits");
    if (stage->is_vocabulary) stage->operands[CANDIDATES] = perk_lower_candidates(l, form->out);
    stage->stream.tensor =
        perk_lower_tensor(l, op->inputs[PERK_IN_WEIGHT], form->gate ? PERK_LAYOUT_PAIRED_TILES : PERK_LAYOUT_TILES);
    if (stage->stream.tensor < 0) return;
    stage->stream.tile_count = l->plan->tensors[stage->stream.tensor].rows / PERK_TILE_ROWS;
    stage->stream.blocks_per_tile = l->plan->tensors[stage->stream.tensor].cols / PERK_BLOCK_COLS;
}

static perk_stage *begin_narrow(perk_lowering *l, const perk_op *op, const perk_linear_form *form) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT];
    bool of_tokens = op->output->row_kind == PERK_ROWS_TOKENS;
    return perk_lower_begin(
        l, op, "",
        "chunk = Linear<Rows::%s, %d, %d, %d, %s, Epilogue::%s, Activation::%s, %s>::run(worker, task, chunk, %.9ef);",
        of_tokens ? "tokens" : "logits", perk_lower_rows(l, op->output), (int)weight->cols, (int)weight->rows,
        form->norm ? "true" : "false", form->epilogue, perk_activation_name(form->activation),
        op->inputs[PERK_IN_BIAS] ? "true" : "false", form->norm ? (double)form->norm->eps : 0.0);
}

/* A stage that brings rows into the form that wide linears take, where whoever wrote them could not. */
static void arrange_input(perk_lowering *l, const perk_op *op, const perk_tensor *x) {
    if (perk_lower_has_wide_input(l, x)) return;
    perk_stage *stage =
        perk_lower_begin(l, op, ".arrange", "arrange_input<Rows::%s, %d>(worker, task);",
                         x->row_kind == PERK_ROWS_TOKENS ? "tokens" : "logits", (int)PERK_ROW_STRIDE(x->cols));
    if (!stage) return;
    stage->work = PERK_WORK_ARRANGE;
    stage->operands[0] = perk_lower_tensor(l, x, PERK_LAYOUT_ROWS);
    stage->operands[1] = perk_lower_wide_input(l, x);
    if (l->error.status == PERK_OK)
        perk_lower_runs(l, (int)perk_ceil_div((uint64_t)x->cols, 8), perk_lower_copy, stage);
    perk_lower_end(l);
}

/* How a wide linear is dealt: the tokens in shares, each to as many workers, in tiles. */
typedef struct wide_deal {
    int shares, share_tokens, together;
    int64_t bytes; /* of weights and of x, that a worker gets for 64 columns */
} wide_deal;

static wide_deal deal_of(const perk_plan *plan, int tiles, int share_tokens) {
    int shares = (int)perk_ceil_div((uint64_t)plan->config.max_num_batched_tokens, (uint64_t)share_tokens);
    int each = (int)perk_ceil_div((uint64_t)tiles, (uint64_t)(plan->device.worker_count / shares));
    wide_deal deal = {.shares = shares, .share_tokens = share_tokens, .together = PERK_WIDE_TILES};
    if (share_tokens == plan->wide_tokens && each <= PERK_WIDE_TILES / 2) deal.together = PERK_WIDE_TILES / 2;
    int64_t passes = (each + deal.together - 1) / deal.together;
    deal.bytes =
        (int64_t)each * PERK_SLICE_BLOCKS * PERK_WEIGHT_BLOCK_BYTES + passes * share_tokens * PERK_SLICE_ROW_BYTES;
    return deal;
}

static int tile_count(const perk_op *op, const perk_linear_form *form) {
    int64_t outputs = op->inputs[PERK_IN_WEIGHT]->rows / (form->gate ? 2 : 1);
    return (int)perk_ceil_div((uint64_t)outputs, (uint64_t)form->tile_width);
}

/* Shares of as many tokens as a slot of x holds, or of half of them: the one that brings less from L2, which is what
 * wide linears wait for. */
static wide_deal choose_deal(const perk_lowering *l, const perk_op *op, const perk_linear_form *form) {
    const perk_plan *plan = l->plan;
    int tiles = tile_count(op, form), half = plan->wide_tokens / 2;
    wide_deal whole = deal_of(plan, tiles, plan->wide_tokens);
    uint64_t halves_count = perk_ceil_div((uint64_t)plan->config.max_num_batched_tokens, (uint64_t)half);
    if (halves_count == 1 || halves_count > (uint64_t)plan->device.worker_count) return whole;
    wide_deal halves = deal_of(plan, tiles, half);
    return halves.bytes < whole.bytes ? halves : whole;
}

/* As many tiles as registers hold the sums of; passes of nearly equal length. */
static int batched_together(const perk_plan *plan, int tiles) {
    int each = (int)perk_ceil_div((uint64_t)tiles, (uint64_t)plan->device.worker_count);
    int most = plan->wide_tokens <= 16 ? 8 : plan->wide_tokens <= 32 ? 6 : 3, passes = (each + most - 1) / most;
    return (each + passes - 1) / passes;
}

static perk_stage *begin_batched(perk_lowering *l, const perk_op *op, const perk_linear_form *form) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT];
    int together = batched_together(l->plan, tile_count(op, form));
    arrange_input(l, op, form->x);
    if (l->error.status != PERK_OK) return NULL;
    perk_stage *stage = perk_lower_begin(
        l, op, "",
        "chunk = BatchedLinear<Rows::%s, %d, %d, %d, Epilogue::%s, Activation::%s, %s, %s>::run(worker, task, chunk);",
        op->output->row_kind == PERK_ROWS_TOKENS ? "tokens" : "logits", (int)weight->cols, (int)weight->rows, together,
        form->epilogue, perk_activation_name(form->activation), op->inputs[PERK_IN_BIAS] ? "true" : "false",
        perk_lower_writes_input(l, form->out) ? "true" : "false");
    if (!stage) return NULL;
    stage->stream.together = together;
    stage->stream.shares = 1;
    stage->stream.share_tokens = l->plan->wide_tokens;
    return stage;
}

static perk_stage *begin_wide(perk_lowering *l, const perk_op *op, const perk_linear_form *form) {
    const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT];
    if (perk_plan_is_batched(l->plan)) return begin_batched(l, op, form);
    wide_deal deal = choose_deal(l, op, form);
    arrange_input(l, op, form->x);
    if (l->error.status != PERK_OK) return NULL;
    perk_stage *stage = perk_lower_begin(
        l, op, "",
        "chunk = WideLinear<%d, %d, %d, %d, Epilogue::%s, Activation::%s, %s, %s>::run(worker, task, chunk);",
        (int)weight->cols, (int)weight->rows, deal.together, deal.share_tokens, form->epilogue,
        perk_activation_name(form->activation), op->inputs[PERK_IN_BIAS] ? "true" : "false",
        perk_lower_writes_input(l, form->out) ? "true" : "false");
    if (!stage) return NULL;
    stage->stream.together = deal.together;
    stage->stream.shares = deal.shares;
    stage->stream.share_tokens = deal.share_tokens;
    return stage;
}

static perk_status linear_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    perk_linear_form form = perk_linear_form_of(l, op);
    perk_stage *stage = perk_lower_is_wide(l, op) ? begin_wide(l, op, &form) : begin_narrow(l, op, &form);
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_LINEAR;
    choose_operands(l, op, &form, stage);
    if (l->error.status != PERK_OK) return l->error.status;
    int workers = l->plan->device.worker_count, shares = PERK_MAX(1, stage->stream.shares);
    int stride = workers / shares, tasks = PERK_MIN(stride, stage->stream.tile_count);
    for (int share = 0; share < shares; share++)
        for (int i = 0; i < tasks; i++)
            add_tiles(l, stage, (l->rotation + share * tasks + i) % workers, i, stride, share, form.tile_width);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_linear = {"linear", linear_reference, linear_lower, NULL};
