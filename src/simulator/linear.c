/* As kernels_src/linear.cuh, and ExpertLinear in kernels_src/moe.cuh. */
#include "reference_math.h"
#include "simulator/machine.h"

#include <math.h>

enum { IN, OUT, RESIDUAL, NORM_WEIGHT, BIAS, CANDIDATES }; /* operands of the stage */
enum { ROUTING = 2 };                                      /* of one over experts */

typedef struct linear_run {
    perk_sim_task *t;
    const perk_sim_matrix *weight;
    const float *values; /* of the weight, or of that of one expert */
    const perk_op *norm; /* folded into the input, or NULL */
    bool is_silu;        /* tiles hold 8 rows of the upper half of the weight, then 8 of the lower */
    int rows;
    int64_t width;            /* of the output */
    float *x, *scales, *sums; /* [rows][weight->cols], [rows], [rows][PERK_TILE_ROWS] */
    const uint16_t *bias;     /* NULL: none */
    const int32_t *pairs;     /* experts: the pair that each row is; else NULL */
    int shared_by;            /* experts: pairs that share a row of the input */
} linear_run;

static int in_row(const linear_run *run, int row) { return run->pairs ? run->pairs[row] / run->shared_by : row; }
static int out_row(const linear_run *run, int row) { return run->pairs ? run->pairs[row] : row; }

/* The input as it is staged: with the gain of a folded norm, rounded; the norm's scale is kept for the end. */
static bool stage_input(linear_run *run) {
    perk_sim_task *t = run->t;
    size_t cols = run->weight->cols;
    const uint16_t *gain = run->norm ? perk_sim_read(t, NORM_WEIGHT, PERK_BF16, 0, 0, (int64_t)cols) : NULL;
    if (run->norm && !gain) return false;
    for (int row = 0; row < run->rows; row++) {
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
    perk_math_dots(run->sums + place, PERK_TILE_ROWS, run->values + (size_t)first * run->weight->cols, (size_t)count,
                   run->x, (size_t)run->rows, run->weight->cols);
}

static float bias_at(const linear_run *run, int64_t output) {
    return run->bias ? perk_bf16_to_f32(run->bias[output]) : 0;
}

static void finish_silu(const linear_run *run, int row, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    float scale = run->scales[row];
    uint16_t *out = perk_sim_write(run->t, OUT, PERK_BF16, out_row(run, row), first, count);
    for (int64_t c = 0; out && c < count; c++) {
        float gate = sums[c] * scale + bias_at(run, first + c);
        float up = sums[PERK_TILE_ROWS / 2 + c] * scale + bias_at(run, run->width + first + c);
        out[c] = perk_f32_to_bf16(perk_sim_silu(perk_round_bf16(gate)) * perk_round_bf16(up));
    }
}

static void finish_store(const linear_run *run, int row, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    const uint16_t *residual = NULL;
    if (!run->pairs && run->t->stage->operands[RESIDUAL] >= 0) {
        residual = perk_sim_read_in_place(run->t, RESIDUAL, PERK_BF16, row, first, count);
        if (!residual) return;
    }
    uint16_t *out = perk_sim_write(run->t, OUT, PERK_BF16, out_row(run, row), first, count);
    for (int64_t c = 0; out && c < count; c++) {
        float add = residual ? perk_bf16_to_f32(residual[c]) : 0;
        out[c] = perk_f32_to_bf16(sums[c] * run->scales[row] + bias_at(run, first + c) + add);
    }
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
    int tile_width = run->is_silu ? PERK_TILE_ROWS / 2 : PERK_TILE_ROWS;
    int64_t first = (int64_t)tile * tile_width, count = PERK_MIN((int64_t)tile_width, run->width - first);
    perk_sim_stream(run->t, streamed);
    if (count <= 0) return;
    multiply(run, first, count, 0);
    if (run->is_silu) multiply(run, run->width + first, count, PERK_TILE_ROWS / 2);
    for (int row = 0; row < run->rows && !run->t->status; row++) {
        if (run->is_silu)
            finish_silu(run, row, first, count);
        else if (run->t->op->output->dtype == PERK_F32)
            finish_logits(run, row, tile, first, count);
        else
            finish_store(run, row, first, count);
    }
}

static linear_run begin_run(perk_sim_task *t) {
    const perk_tensor *weight = t->op->inputs[PERK_IN_WEIGHT];
    linear_run run = {.t = t, .weight = &t->sim->matrices[weight->index], .width = weight->rows};
    int stream = t->stage->stream.tensor;
    run.values = run.weight->values;
    run.is_silu = stream >= 0 && t->sim->plan->tensors[stream].layout == PERK_LAYOUT_PAIRED_TILES;
    if (run.is_silu) run.width /= 2;
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
    run.rows = perk_sim_rows(t, t->op->output->row_kind);
    if (!take_scratch(&run, (size_t)run.rows, 0)) return;
    if (t->stage->operands[BIAS] >= 0) {
        run.bias = perk_sim_read(t, BIAS, PERK_BF16, 0, 0, weight->rows);
        if (!run.bias) return;
    }
    if (!stage_input(&run)) return;
    for (int i = 0; i < t->task->count && !t->status; i++) {
        int tile = perk_sim_unit(t, i);
        run_tile(&run, tile, tile);
    }
}

/* ---- experts ---- */

/* One word of the routing; -1 when it cannot be read. */
static int32_t routing_word(perk_sim_task *t, int64_t word) {
    const int32_t *value = perk_sim_read(t, ROUTING, PERK_I32, 0, word, 1);
    return value ? *value : -1;
}

/* Unit `unit` of the step's: a tile of one expert, for all of its pairs, which `pairs` has room for. */
static void run_unit(linear_run *run, int unit, int most_hits, int32_t most_pairs, int32_t *pairs) {
    perk_sim_task *t = run->t;
    const perk_tensor *weight = t->op->inputs[PERK_IN_WEIGHT];
    int tiles = t->stage->stream.tile_count, hit = unit / tiles;
    int32_t expert = routing_word(t, PERK_ROUTING_HEADER + hit);
    int64_t begins = PERK_ROUTING_HEADER + most_hits + hit, order = PERK_ROUTING_HEADER + 2 * (int64_t)most_hits + 1;
    int32_t begin = routing_word(t, begins), end = routing_word(t, begins + 1);
    if (t->status || expert < 0 || expert >= weight->experts || begin < 0 || end <= begin || end - begin > most_pairs) {
        perk_sim_fail(t, "finds no routing: expert %d, pairs %d to %d", expert, begin, end);
        return;
    }
    run->rows = end - begin;
    for (int i = 0; i < run->rows; i++) pairs[i] = routing_word(t, order + begin + i);
    run->values = run->weight->values + (size_t)(expert * weight->rows) * run->weight->cols;
    if (t->status || !stage_input(run)) return;
    run_tile(run, unit % tiles, expert * tiles + unit % tiles);
}

void perk_sim_moe_linear(perk_sim_task *t) {
    const perk_tensor *x = t->op->inputs[PERK_IN_X], *experts = t->op->inputs[PERK_IN_EXPERTS];
    linear_run run = begin_run(t);
    int32_t tokens = t->sim->config.max_num_batched_tokens;
    int most_hits = (int)PERK_MIN(t->op->inputs[PERK_IN_WEIGHT]->experts, tokens * experts->cols);
    run.shared_by = x->row_kind == PERK_ROWS_PAIRS ? 1 : (int)experts->cols;
    int32_t *pairs = (int32_t *)(void *)take_scratch(&run, (size_t)tokens, (size_t)tokens);
    if (!pairs) return;
    run.pairs = pairs;
    int64_t units = (int64_t)PERK_MIN(routing_word(t, PERK_ROUTING_HITS), most_hits) * t->stage->stream.tile_count;
    for (int i = 0; i < t->task->count && perk_sim_unit(t, i) < units && !t->status; i++)
        run_unit(&run, perk_sim_unit(t, i), most_hits, tokens, pairs);
}
