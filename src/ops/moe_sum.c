/* moe_sum: what a token's experts made, by their shares, added to the residual. */
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

perk_tensor *perk_moe_sum(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *shares,
                          perk_tensor *residual) {
    if (!perk_graph_owns(graph, name, (perk_tensor *[]){x, shares, residual}, 3)) return NULL;
    if (x->row_kind != PERK_ROWS_PAIRS || perk_tensor_is_weight(x) || shares->row_kind != PERK_ROWS_TOKENS ||
        perk_tensor_is_weight(shares) || shares->dtype != PERK_F32 || shares->cols != x->slots) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT,
                        "moe_sum %s: needs pairs of tokens and slots, and the shares of perk_moe_route for as many "
                        "slots: %s has %d, %s %lld",
                        name, x->name, x->slots, shares->name, (long long)shares->cols);
        return NULL;
    }
    if (perk_tensor_is_weight(residual) || residual->row_kind != PERK_ROWS_TOKENS || residual->cols != x->cols ||
        residual->dtype != PERK_BF16) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "moe_sum %s: the residual %s must be an activation of width %lld",
                        name, residual->name, (long long)x->cols);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {
        [PERK_IN_X] = x, [PERK_IN_SHARES] = shares, [PERK_IN_RESIDUAL] = residual};
    perk_op *op = perk_graph_add_op(graph, &perk_op_moe_sum, inputs, name, PERK_BF16, PERK_ROWS_TOKENS, x->cols);
    return op ? op->output : NULL;
}

static perk_status moe_sum_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *x = op->inputs[PERK_IN_X];
    size_t cols = (size_t)x->cols, slots = (size_t)x->slots;
    (void)err;
    for (size_t t = 0; t < perk_reference_rows(reference, op->output); t++) {
        const float *pairs = perk_reference_values(reference, x) + t * slots * cols;
        const float *shares = perk_reference_values(reference, op->inputs[PERK_IN_SHARES]) + t * slots;
        const float *residual = perk_reference_values(reference, op->inputs[PERK_IN_RESIDUAL]) + t * cols;
        float *out = perk_reference_values(reference, op->output) + t * cols;
        for (size_t i = 0; i < cols; i++) {
            float sum = 0;
            for (size_t s = 0; s < slots; s++) sum += shares[s] * pairs[s * cols + i];
            out[i] = perk_reference_round(reference, sum + residual[i]);
        }
    }
    return PERK_OK;
}

/* ---- lowering: column groups of 8 elements, dealt in runs; nothing when folded into the linear before it; device
 * code in kernels_src/moe.cuh ---- */

enum { X, SHARES, RESIDUAL, OUT }; /* operands of the stage */

static void add_columns(perk_lowering *l, void *user, int worker, int first, int count) {
    const int *operands = ((const perk_stage *)user)->operands;
    int begin = first * 8, part = PERK_MIN(count * 8, l->plan->tensors[operands[OUT]].cols - begin);
    perk_lower_task(l, worker, first, 1, count);
    perk_lower_read(l, perk_lower_whole(l, operands[X]));
    perk_lower_read(l, perk_lower_whole(l, operands[SHARES]));
    perk_lower_read(l, perk_lower_columns(l, operands[RESIDUAL], begin, part, part, 1));
    perk_lower_write(l, perk_lower_columns(l, operands[OUT], begin, part, part, 1));
}

static perk_status moe_sum_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    const perk_tensor *x = op->inputs[PERK_IN_X];
    (void)err;
    if (perk_lower_is_folded(l, op)) return PERK_OK;
    perk_stage *stage = perk_lower_begin(l, op, "", "moe_sum<%d, %d>(worker, task);", x->slots, (int)op->output->cols);
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_MOE_SUM;
    stage->operands[X] = perk_lower_tensor(l, x, PERK_LAYOUT_ROWS);
    stage->operands[SHARES] = perk_lower_tensor(l, op->inputs[PERK_IN_SHARES], PERK_LAYOUT_ROWS);
    stage->operands[RESIDUAL] = perk_lower_tensor(l, op->inputs[PERK_IN_RESIDUAL], PERK_LAYOUT_ROWS);
    stage->operands[OUT] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    if (l->error.status == PERK_OK)
        perk_lower_runs(l, (int)perk_ceil_div((uint64_t)op->output->cols, 8), add_columns, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_moe_sum = {"moe_sum", moe_sum_reference, moe_sum_lower, NULL};
