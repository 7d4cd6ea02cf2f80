/* As kernels_src/rows.cuh: gather_rows, arrange_input, rmsnorm, gate_mul, argmax. */
#include "reference_math.h"
#include "simulator/machine.h"

#include <math.h>

void perk_sim_gather(perk_sim_task *t) {
    bool of_tokens = t->op->type == &perk_op_embed;
    const int32_t *from = t->words + (of_tokens ? t->sim->layout.token_ids : t->sim->layout.logit_rows);
    int rows = perk_sim_rows(t, t->op->output->row_kind);
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < t->task->count; i++) {
            int64_t col = (int64_t)perk_sim_unit(t, i) * 8;
            const void *in = perk_sim_read(t, 0, PERK_BF16, from[row], col, 8);
            void *out = in ? perk_sim_write(t, 1, PERK_BF16, row, col, 8) : NULL;
            if (!out) return;
            memcpy(out, in, 16);
        }
}

/* Elements have their names, whatever their places are. */
void perk_sim_arrange(perk_sim_task *t) {
    int rows = perk_sim_rows(t, t->op->output->row_kind);
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < t->task->count; i++) {
            int64_t col = (int64_t)perk_sim_unit(t, i) * 8;
            const void *in = perk_sim_read(t, 0, PERK_BF16, row, col, 8);
            void *out = in ? perk_sim_write(t, 1, PERK_BF16, row, col, 8) : NULL;
            if (!out) return;
            memcpy(out, in, 16);
        }
}

void perk_sim_rmsnorm(perk_sim_task *t) {
    size_t width = (size_t)t->op->output->cols, padded = perk_round_up(width, 8);
    int rows = perk_sim_rows(t, t->op->output->row_kind);
    float *x = perk_sim_scratch(t, 2 * padded), *gain = x + padded;
    for (int i = 0; x && i < t->task->count; i++) {
        int row = perk_sim_unit(t, i);
        if (row >= rows) return;
        const uint16_t *in = perk_sim_read(t, 0, PERK_BF16, row, 0, (int64_t)padded);
        const uint16_t *weight = in ? perk_sim_read(t, 1, PERK_BF16, 0, 0, (int64_t)padded) : NULL;
        uint16_t *out = weight ? perk_sim_write(t, 2, PERK_BF16, row, 0, (int64_t)padded) : NULL;
        if (!out) return;
        perk_math_widen_bf16(x, in, padded);
        perk_math_widen_bf16(gain, weight, padded);
        float scale = 1 / sqrtf(perk_math_dot(x, x, padded) / (float)width + t->op->eps);
        for (size_t c = 0; c < padded; c++) out[c] = perk_f32_to_bf16(x[c] * scale * gain[c]);
    }
}

void perk_sim_gate_mul(perk_sim_task *t) {
    int64_t width = t->op->output->cols, begin = (int64_t)t->task->first * 8;
    int64_t count = PERK_MIN((int64_t)t->task->count * 8, width - begin);
    const perk_tensor *x = t->op->inputs[PERK_IN_X];
    int rows = count > 0 ? perk_sim_rows(t, x->row_kind) * (x->row_kind == PERK_ROWS_PAIRS ? x->slots : 1) : 0;
    for (int row = 0; row < rows; row++) {
        const uint16_t *gate = perk_sim_read(t, 0, PERK_BF16, row, begin, count);
        const uint16_t *up = gate ? perk_sim_read(t, 0, PERK_BF16, row, width + begin, count) : NULL;
        uint16_t *out = up ? perk_sim_write(t, 1, PERK_BF16, row, begin, count) : NULL;
        if (!out) return;
        for (int64_t c = 0; c < count; c++)
            out[c] =
                perk_f32_to_bf16(perk_activate(t->op->activation, perk_bf16_to_f32(gate[c])) * perk_bf16_to_f32(up[c]));
    }
}

void perk_sim_argmax(perk_sim_task *t) {
    int64_t tiles = (int64_t)perk_ceil_div((uint64_t)t->op->inputs[PERK_IN_X]->cols, PERK_TILE_ROWS);
    int rows = perk_sim_rows(t, t->op->output->row_kind);
    for (int i = 0; i < t->task->count; i++) {
        int row = perk_sim_unit(t, i);
        if (row >= rows) return;
        const uint32_t *candidates = perk_sim_read(t, 0, PERK_F32, row, 0, 2 * tiles);
        int32_t *out = candidates ? perk_sim_write(t, 1, PERK_I32, row, 0, 1) : NULL;
        if (!out) return;
        float best = PERK_SIM_LOWEST;
        uint32_t index = UINT32_MAX;
        for (int64_t tile = 0; tile < tiles; tile++) {
            float value = perk_f32_from_bits(candidates[2 * tile]);
            uint32_t other = candidates[2 * tile + 1];
            if (value > best || (value == best && other < index)) {
                best = value;
                index = other;
            }
        }
        *out = (int32_t)index;
    }
}
