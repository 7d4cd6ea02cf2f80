/* As kernels_src/linear.cuh. */
#include "reference_math.h"
#include "simulator/machine.h"

#include <math.h>

/* Operands of the stage; batched linears that make or take a norm have SQUARES for CANDIDATES. */
enum { IN, OUT, RESIDUAL, NORM_WEIGHT, BIAS, CANDIDATES, NEXT, SQUARES = CANDIDATES };

typedef struct linear_run {
    perk_sim_task *t;
    const perk_sim_matrix *weight;
    const perk_op *norm; /* folded into the input, or NULL */
    const perk_op *gate; /* folded into the output: tiles hold 8 rows of the upper half of the weight, then 8 of the
                            lower; or NULL */
    int first_row, rows; /* of the task, and where they end */
    int64_t width;       /* of the output */
    float *x, *scales, *sums; /* [rows][weight->cols], [rows], [rows][PERK_TILE_ROWS] */
    const uint16_t *bias;     /* NULL: none */
    const uint16_t *gain;     /* of the norm that is made of the output; NULL: none */
} linear_run;

/* The input as it is staged: with the gain of a folded norm, rounded; the norm's scale is kept for the end. */
static bool stage_input(linear_run *run) {
    perk_sim_task *t = run->t;
    size_t cols = run->weight->cols;
    const uint16_t *gain = run->norm ? perk_sim_read(t, NORM_WEIGHT, PERK_BF16, 0, 0, (int64_t)cols) : NULL;
    if (run->norm && !gain) return false;
    for (int row = run->first_row; row < run->rows; row++) {
        float *x = run->x + (size_t)row * cols;
        const uint16_t *in = perk_sim_read(t, IN, PERK_BF16, row, 0, (int64_t)cols);
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

/* The scales of a norm that another linear has made: from a sum of squares of each of its tiles. */
static bool take_scales(linear_run *run) {
    int64_t width = run->t->op->inputs[PERK_IN_WEIGHT]->cols;
    int64_t tiles = (int64_t)perk_ceil_div((uint64_t)width, PERK_TILE_ROWS);
    float eps = run->t->op->inputs[PERK_IN_X]->producer->eps;
    for (int row = run->first_row; row < run->rows; row++) {
        const float *squares = perk_sim_read(run->t, SQUARES, PERK_F32, row, 0, tiles);
        if (!squares) return false;
        float total = 0;
        for (int64_t i = 0; i < tiles; i++) total += squares[i];
        run->scales[row] = 1 / sqrtf(total / (float)width + eps);
    }
    return true;
}

/* `count` rows of the weight from `first` on, into the sums from `place` on. */
static void multiply(const linear_run *run, int64_t first, int64_t count, int place) {
    size_t before = (size_t)run->first_row, cols = run->weight->cols;
    perk_math_dots(run->sums + before * PERK_TILE_ROWS + place, PERK_TILE_ROWS,
                   run->weight->values + (size_t)first * cols, (size_t)count, run->x + before * cols,
                   (size_t)run->rows - before, cols);
}

static float bias_at(const linear_run *run, int64_t output) {
    return run->bias ? perk_bf16_to_f32(run->bias[output]) : 0;
}

static void finish_gated(const linear_run *run, int row, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    float scale = run->scales[row];
    uint16_t *out = perk_sim_write(run->t, OUT, PERK_BF16, row, first, count);
    for (int64_t c = 0; out && c < count; c++) {
        float gate = sums[c] * scale + bias_at(run, first + c);
        float up = sums[PERK_TILE_ROWS / 2 + c] * scale + bias_at(run, run->width + first + c);
        out[c] = perk_f32_to_bf16(perk_activate(run->gate->activation, perk_round_bf16(gate)) * perk_round_bf16(up));
    }
}

/* The norm of what is stored, but for its scale, and the sum of squares from which others make that. */
static void make_norm(const linear_run *run, int row, int64_t first, int64_t count, const uint16_t *stored) {
    float square = 0;
    uint16_t *next = perk_sim_write(run->t, NEXT, PERK_BF16, row, first, count);
    for (int64_t c = 0; next && c < count; c++) {
        float value = perk_bf16_to_f32(stored[c]);
        square += value * value;
        next[c] = perk_f32_to_bf16(value * perk_bf16_to_f32(run->gain[first + c]));
    }
    float *out = next ? perk_sim_write(run->t, SQUARES, PERK_F32, row, first / PERK_TILE_ROWS, 1) : NULL;
    if (out) *out = square;
}

static void finish_store(const linear_run *run, int row, int64_t first, int64_t count) {
    const float *sums = run->sums + (size_t)row * PERK_TILE_ROWS;
    const uint16_t *residual = NULL;
    if (run->t->stage->operands[RESIDUAL] >= 0) {
        residual = perk_sim_read_in_place(run->t, RESIDUAL, PERK_BF16, row, first, count);
        if (!residual) return;
    }
    uint16_t stored[PERK_TILE_ROWS];
    for (int64_t c = 0; c < count; c++) {
        float add = residual ? perk_bf16_to_f32(residual[c]) : 0;
        stored[c] = perk_f32_to_bf16(sums[c] * run->scales[row] + bias_at(run, first + c) + add);
    }
    uint16_t *out = perk_sim_write(run->t, OUT, PERK_BF16, row, first, count);
    if (!out) return;
    memcpy(out, stored, (size_t)count * sizeof *out);
    if (run->gain) make_norm(run, row, first, count, stored);
}

/* fp32, and the best of the tile as a candidate for argmax. */
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
    uint32_t *candidate = perk_sim_write(run->t, CANDIDATES, PERK_F32, row, 2 * tile, 2);
    if (!candidate) return;
    candidate[0] = perk_f32_bits(best);
    candidate[1] = index;
}

static void run_tile(const linear_run *run, int tile) {
    int tile_width = run->gate ? PERK_TILE_ROWS / 2 : PERK_TILE_ROWS;
    int64_t first = (int64_t)tile * tile_width, count = PERK_MIN((int64_t)tile_width, run->width - first);
    perk_sim_stream(run->t, tile);
    if (count <= 0) return;
    multiply(run, first, count, 0);
    if (run->gate) multiply(run, run->width + first, count, PERK_TILE_ROWS / 2);
    for (int row = run->first_row; row < run->rows && !run->t->status; row++) {
        if (run->gate)
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
    int share = t->task->first / stream->tile_count, rows = t->sim->plan->wide_tokens / stream->shares;
    run->first_row = PERK_MIN(share * rows, run->rows);
    run->rows = PERK_MIN(run->first_row + rows, run->rows);
    return t->task->first % stream->tile_count;
}

void perk_sim_linear(perk_sim_task *t) {
    const perk_tensor *weight = t->op->inputs[PERK_IN_WEIGHT];
    linear_run run = {.t = t, .weight = &t->sim->matrices[weight->index], .width = weight->rows};
    run.gate = folded_gate(t);
    if (run.gate) run.width /= 2;
    bool makes_norm = t->stage->operands[NEXT] >= 0;
    bool is_scaled = !makes_norm && t->stage->operands[SQUARES] >= 0 && t->op->output->dtype != PERK_F32;
    if (t->stage->operands[NORM_WEIGHT] >= 0 && !makes_norm) run.norm = t->op->inputs[PERK_IN_X]->producer;
    int first_tile = choose_share(&run);
    size_t rows = (size_t)run.rows;
    run.x = perk_sim_scratch(t, rows * (run.weight->cols + 1 + PERK_TILE_ROWS));
    if (!run.x) return;
    run.scales = run.x + rows * run.weight->cols;
    run.sums = run.scales + rows;
    if (t->stage->operands[BIAS] >= 0) {
        run.bias = perk_sim_read(t, BIAS, PERK_BF16, 0, 0, weight->rows);
        if (!run.bias) return;
    }
    if (makes_norm) {
        run.gain = perk_sim_read(t, NORM_WEIGHT, PERK_BF16, 0, 0, weight->rows);
        if (!run.gain) return;
    }
    if (!stage_input(&run) || (is_scaled && !take_scales(&run))) return;
    for (int i = 0; i < t->task->count && !t->status; i++) run_tile(&run, first_tile + i * t->task->stride);
}
