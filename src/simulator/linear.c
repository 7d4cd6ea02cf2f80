/* As kernels_src/linear.cuh, and ExpertLinear in kernels_src/moe.cuh. */
#include "reference_math.h"
#include "simulator/machine.h"

#include <math.h>

/* Operands of the stage. */
enum { IN, OUT, RESIDUAL, NORM_WEIGHT, BIAS, CANDIDATES };
enum { ROUTING = 2, SUM_RESIDUAL = 4 }; /* of one over experts */

typedef struct linear_run {
    perk_sim_task *t;
    const perk_sim_matrix *weight;
    const float *values; /* of the weight, or of that of one expert */
    const perk_op *norm; /* folded into the input, or NULL */
    const perk_op *gate; /* folded into the output: tiles hold 8 rows of the upper half of the weight, then 8 of the
                            lower; or NULL */
    int first_row, rows; /* of the task, and where they end */
    int64_t width;       /* of the output */
    float *x, *scales, *sums; /* [rows][weight->cols], [rows], [rows][PERK_TILE_ROWS] */
    const uint16_t *bias;     /* NULL: none */
    const int32_t *pairs;     /* experts: the pair that each row is; else NULL */
    int shared_by;            /* experts: pairs that share a row of the input */
    int slots;                /* experts: pairs of a token */
    const float *shares;      /* experts that are summed up: of the pairs; else NULL */
    float *totals;            /* with them: [tokens][PERK_TILE_ROWS] */
} linear_run;

static int in_row(const linear_run *run, int row) { return run->pairs ? run->pairs[row] / run->shared_by : row; }
static int out_row(const linear_run *run, int row) { return run->pairs ? run->pairs[row] : row; }

/* The input as it is staged: with the gain of a folded norm, rounded; the norm's scale is kept for the end. */
static bool stage_input(linear_run *run) {
    perk_sim_task *t = run->t;
    size_t cols = run->weight->cols;
    const uint16_t *gain = run->norm ? perk_sim_read(t, NORM_WEIGHT, PERK_BF16, 0, 0, (int64_t)cols) : NULL;
    if (run->norm && !gain) return false;
    for (int row = run->first_row; row < run->rows; row++) {
        float *x = run->x + (size_t)row * cols;
        const uint16_t *in = perk_sim_read(t, IN, PERK_BF16, in_row(run, row), 0, (int64_t)cols);
        if (!in) return false;
        perk_math_widen_bf16(x, in, cols);
        run->scales[row] = 1;
        if (!gain) continue;
        float mean = perk_math_dot(x, x, cols) / (float)t->op->inputs[PERK_IN_WEIGHT]->cols;
        run->scales[row] = 1 / sqrtf(mean + run->norm->eps);
        for (size_t c = 0; c < cols; c++) x[c] = perk_round_bf16(x[c] * perk_bf16_to_f32(gain[c]));
    }
    return true;
}

/* `count` rows of the weight from `first` on, into the sums from `place` on. */
static void multiply(const linear_run *run, int64_t first, int64_t count, int place) {
    size_t before = (size_t)run->first_row, cols = run->weight->cols;
    perk_math_dots(run->sums + before * PERK_TILE_ROWS + place, PERK_TILE_ROWS, run->values + (size_t)first * cols,
                   (size_t)count, run->x + before * cols, (size_t)run->rows - before, cols);
}

static float bias_at(const linear_run *run, int64_t output) {
    return run->bias ? perk_bf16_to_f32(run->bias[output]) : 0;
}

static void finish_gated(const linear_run *run, int row, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    float scale = run->scales[row];
    uint16_t *out = perk_sim_write(run->t, OUT, PERK_BF16, out_row(run, row), first, count);
    for (int64_t c = 0; out && c < count; c++) {
        float gate = sums[c] * scale + bias_at(run, first + c);
        float up = sums[PERK_TILE_ROWS / 2 + c] * scale + bias_at(run, run->width + first + c);
        out[c] = perk_f32_to_bf16(perk_activate(run->gate->activation, perk_round_bf16(gate)) * perk_round_bf16(up));
    }
}

static void finish_store(const linear_run *run, int row, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    const uint16_t *residual = NULL;
    if (!run->pairs && run->t->stage->operands[RESIDUAL] >= 0) {
        residual = perk_sim_read_in_place(run->t, RESIDUAL, PERK_BF16, row, first, count);
        if (!residual) return;
    }
    uint16_t stored[PERK_TILE_ROWS];
    for (int64_t c = 0; c < count; c++) {
        float add = residual ? perk_bf16_to_f32(residual[c]) : 0;
        stored[c] = perk_f32_to_bf16(sums[c] * run->scales[row] + bias_at(run, first + c) + add);
    }
    uint16_t *out = perk_sim_write(run->t, OUT, PERK_BF16, out_row(run, row), first, count);
    if (out) memcpy(out, stored, (size_t)count * sizeof *out);
}

/* The pair's share of what its token becomes. */
static void finish_share(const linear_run *run, int row, int64_t count) {
    float *total = run->totals + (size_t)(run->pairs[row] / run->slots) * PERK_TILE_ROWS;
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    for (int64_t c = 0; c < count; c++) total[c] += run->shares[row] * perk_round_bf16(sums[c] * run->scales[row]);
}

/* fp32, and the best of the tile as a candidate, where argmax follows. */
static void finish_logits(const linear_run *run, int row, int64_t tile, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    float values[PERK_TILE_ROWS], best = PERK_SIM_LOWEST;
    uint32_t index = UINT32_MAX;
    for (int64_t c = 0; c < count; c++) {
        values[c] = sums[c] * run->scales[row] + bias_at(run, first + c);
        if (values[c] > best) {
            best = values[c];
            index = (uint32_t)(first + c);
        }
    }
    float *out = perk_sim_write(run->t, OUT, PERK_F32, row, first, count);
    if (!out) return;
    memcpy(out, values, (size_t)count * sizeof *out);
    if (run->t->stage->operands[CANDIDATES] < 0) return;
    uint32_t *candidate = perk_sim_write(run->t, CANDIDATES, PERK_F32, row, 2 * tile, 2);
    if (!candidate) return;
    candidate[0] = perk_f32_bits(best);
    candidate[1] = index;
}

/* Row tile `tile` of the weight, which is the `streamed`-th of the stream. */
static void run_tile(const linear_run *run, int tile, int streamed) {
    int tile_width = run->gate ? PERK_TILE_ROWS / 2 : PERK_TILE_ROWS;
    int64_t first = (int64_t)tile * tile_width, count = PERK_MIN((int64_t)tile_width, run->width - first);
    perk_sim_stream(run->t, streamed);
    if (count <= 0) return;
    multiply(run, first, count, 0);
    if (run->gate) multiply(run, run->width + first, count, PERK_TILE_ROWS / 2);
    for (int row = run->first_row; row < run->rows && !run->t->status; row++) {
        if (run->shares)
            finish_share(run, row, count);
        else if (run->gate)
            finish_gated(run, row, first, count);
        else if (run->t->op->output->dtype == PERK_F32)
            finish_logits(run, row, tile, first, count);
        else
            finish_store(run, row, first, count);
    }
}

static const perk_op *folded_gate(const perk_sim_task *t) {
    const perk_graph *graph = t->sim->graph;
    int stream = t->stage->stream.tensor;
    if (stream < 0 || t->sim->plan->tensors[stream].layout != PERK_LAYOUT_PAIRED_TILES) return NULL;
    for (int i = t->op->index + 1; i < graph->op_count; i++)
        if (graph->ops[i]->type == &perk_op_gate_mul && graph->ops[i]->inputs[PERK_IN_X] == t->op->output)
            return graph->ops[i];
    return NULL;
}

/* The rows of the task, and its first tile: units of a stage that is cut in shares are tiles of one share, then those
 * of the next. */
static int choose_share(linear_run *run) {
    const perk_sim_task *t = run->t;
    const perk_stream *stream = &t->stage->stream;
    run->rows = perk_sim_rows(t, t->op->output->row_kind);
    if (stream->shares < 2) return t->task->first;
    int share = t->task->first / stream->tile_count, rows = stream->share_tokens;
    run->first_row = PERK_MIN(share * rows, run->rows);
    run->rows = PERK_MIN(run->first_row + rows, run->rows);
    return t->task->first % stream->tile_count;
}

static linear_run begin_run(perk_sim_task *t) {
    const perk_tensor *weight = t->op->inputs[PERK_IN_WEIGHT];
    linear_run run = {.t = t, .weight = &t->sim->matrices[weight->index], .width = weight->rows};
    run.values = run.weight->values;
    run.gate = folded_gate(t);
    if (run.gate) run.width /= 2;
    if (t->stage->operands[NORM_WEIGHT] >= 0) run.norm = t->op->inputs[PERK_IN_X]->producer;
    return run;
}

/* Scratch for `rows` rows, and `more` words beside it. */
static float *take_scratch(linear_run *run, size_t rows, size_t more) {
    run->x = perk_sim_scratch(run->t, rows * (run->weight->cols + 1 + PERK_TILE_ROWS) + more);
    if (!run->x) return NULL;
    run->scales = run->x + rows * run->weight->cols;
    run->sums = run->scales + rows;
    return run->sums + rows * PERK_TILE_ROWS;
}

void perk_sim_linear(perk_sim_task *t) {
    const perk_tensor *weight = t->op->inputs[PERK_IN_WEIGHT];
    linear_run run = begin_run(t);
    int first_tile = choose_share(&run);
    if (!take_scratch(&run, (size_t)run.rows, 0)) return;
    if (t->stage->operands[BIAS] >= 0) {
        run.bias = perk_sim_read(t, BIAS, PERK_BF16, 0, 0, weight->rows);
        if (!run.bias) return;
    }
    if (!stage_input(&run)) return;
    for (int i = 0; i < t->task->count && !t->status; i++) {
        int tile = first_tile + i * t->task->stride;
        run_tile(&run, tile, tile);
    }
}

/* ---- experts ---- */

/* A step's routing, and rows of one expert. */
typedef struct experts_run {
    linear_run linear;
    int most_hits, tokens;
    int32_t *pairs;                                                          /* [tokens] */
    float *shares;                                                           /* [tokens] */
    int32_t own[PERK_ROUTING_WORDS(PERK_SIM_OWN_SLOTS, PERK_SIM_OWN_SLOTS)]; /* what the task has picked by itself */
} experts_run;

/* One word of the routing; -1 when it cannot be read. */
static int32_t routing_word(const experts_run *e, int64_t word) {
    perk_sim_task *t = e->linear.t;
    if (t->stage->stream.own_slots) return e->own[word];
    const int32_t *value = perk_sim_read(t, ROUTING, PERK_I32, 0, word, 1);
    return value ? *value : -1;
}

static bool route_alone(experts_run *e) {
    perk_sim_task *t = e->linear.t;
    const perk_op *route = t->op->inputs[PERK_IN_EXPERTS]->producer;
    const float *logits = perk_sim_read(t, ROUTING, PERK_F32, 0, 0, route->inputs[PERK_IN_X]->cols);
    if (logits) perk_sim_route_alone(route, logits, e->own);
    return logits != NULL;
}

/* Rows [begin, end) of the routing's order. */
static void find_rows(experts_run *e, int32_t begin, int32_t end) {
    perk_sim_task *t = e->linear.t;
    int32_t most_pairs = e->tokens * e->linear.slots;
    int64_t order = PERK_ROUTING_HEADER + 2 * (int64_t)e->most_hits + 1;
    e->linear.rows = end - begin;
    for (int i = 0; i < end - begin; i++) {
        e->pairs[i] = routing_word(e, order + begin + i);
        e->shares[i] = perk_f32_from_bits((uint32_t)routing_word(e, order + most_pairs + begin + i));
        if (e->pairs[i] < 0 || e->pairs[i] >= most_pairs) perk_sim_fail(t, "finds pair %d", e->pairs[i]);
    }
}

/* One tile of a hit expert, for all of its pairs. */
static void run_unit(experts_run *e, int hit, int tile) {
    linear_run *run = &e->linear;
    perk_sim_task *t = run->t;
    const perk_tensor *weight = t->op->inputs[PERK_IN_WEIGHT];
    int32_t expert = routing_word(e, PERK_ROUTING_HEADER + hit);
    int32_t begin = routing_word(e, PERK_ROUTING_HEADER + e->most_hits + hit);
    int32_t end = routing_word(e, PERK_ROUTING_HEADER + e->most_hits + hit + 1);
    if (t->status || expert < 0 || expert >= weight->experts || begin < 0 || end <= begin || end - begin > e->tokens) {
        perk_sim_fail(t, "finds no routing: expert %d, pairs %d to %d", expert, begin, end);
        return;
    }
    find_rows(e, begin, end);
    run->values = run->weight->values + (size_t)(expert * weight->rows) * run->weight->cols;
    if (t->status || !stage_input(run)) return;
    run_tile(run, tile, expert * t->stage->stream.tile_count + tile);
}

/* A tile of the output: what all hit experts make of it, by their shares, and the residual. */
static void run_sum(experts_run *e, int hits, int tile) {
    linear_run *run = &e->linear;
    perk_sim_task *t = run->t;
    int64_t first = (int64_t)tile * PERK_TILE_ROWS, count = PERK_MIN((int64_t)PERK_TILE_ROWS, run->width - first);
    memset(run->totals, 0, (size_t)e->tokens * PERK_TILE_ROWS * sizeof *run->totals);
    for (int hit = 0; hit < hits && !t->status; hit++) run_unit(e, hit, tile);
    for (int row = 0; row < perk_sim_rows(t, PERK_ROWS_TOKENS) && !t->status; row++) {
        const float *total = run->totals + (size_t)row * PERK_TILE_ROWS;
        const uint16_t *residual = perk_sim_read_in_place(t, SUM_RESIDUAL, PERK_BF16, row, first, count);
        uint16_t *out = residual ? perk_sim_write(t, OUT, PERK_BF16, row, first, count) : NULL;
        for (int64_t c = 0; out && c < count; c++) out[c] = perk_f32_to_bf16(total[c] + perk_bf16_to_f32(residual[c]));
    }
}

void perk_sim_moe_linear(perk_sim_task *t) {
    const perk_tensor *x = t->op->inputs[PERK_IN_X], *experts = t->op->inputs[PERK_IN_EXPERTS];
    const perk_stream *stream = &t->stage->stream;
    experts_run e = {.linear = begin_run(t), .tokens = t->sim->config.max_num_batched_tokens};
    size_t tokens = (size_t)e.tokens;
    bool sums = stream->deal == PERK_DEAL_TILES;
    e.most_hits = (int)PERK_MIN(t->op->inputs[PERK_IN_WEIGHT]->experts, e.tokens * experts->cols);
    e.linear.slots = (int)experts->cols;
    e.linear.shared_by = x->row_kind == PERK_ROWS_PAIRS ? 1 : e.linear.slots;
    e.shares = take_scratch(&e.linear, tokens, tokens * (2 + PERK_TILE_ROWS));
    if (!e.shares) return;
    e.linear.totals = e.shares + tokens;
    e.linear.pairs = e.pairs = (int32_t *)(void *)(e.linear.totals + tokens * PERK_TILE_ROWS);
    if (sums) e.linear.shares = e.shares;
    if (stream->own_slots && !route_alone(&e)) return;
    int hits = PERK_MAX(0, PERK_MIN(routing_word(&e, PERK_ROUTING_HITS), e.most_hits));
    for (int i = 0; i < t->task->count && !t->status; i++) {
        int unit = perk_sim_unit(t, i);
        if (sums)
            run_sum(&e, hits, unit);
        else if (unit < hits * stream->tile_count)
            run_unit(&e, unit / stream->tile_count, unit % stream->tile_count);
    }
}
