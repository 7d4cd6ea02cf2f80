/* rmsnorm: root mean square normalisation of each row (Zhang and Sennrich 2019, eq. 4). */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_math.h"
#include "reference_state.h"

#include <math.h>

perk_tensor *perk_rmsnorm(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight, float eps) {
    if (!perk_graph_owns(graph, name, (perk_tensor *[]){x, weight}, 2)) return NULL;
    if (!weight->is_vector || weight->cols != x->cols || perk_tensor_is_weight(x) || !(eps >= 0)) {
        perk_graph_fail(
            graph, PERK_INVALID_ARGUMENT,
            "rmsnorm %s: needs an activation, a weight as long as it is wide (%lld, found %lld) and eps >= 0", name,
            (long long)x->cols, (long long)weight->cols);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = x, [PERK_IN_WEIGHT] = weight};
    perk_op *op = perk_graph_add_op(graph, &perk_op_rmsnorm, inputs, name, PERK_BF16, x->row_kind, x->cols);
    if (!op) return NULL;
    op->eps = eps;
    return op->output;
}

static perk_status rmsnorm_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *x = op->inputs[PERK_IN_X];
    const float *weight = perk_reference_vector(reference, op->inputs[PERK_IN_WEIGHT]);
    size_t rows = perk_reference_rows(reference, x), n = (size_t)x->cols;
    (void)err;
    for (size_t row = 0; row < rows; row++) {
        const float *in = perk_reference_values(reference, x) + row * n;
        float *out = perk_reference_values(reference, op->output) + row * n;
        float scale = 1 / sqrtf(perk_math_dot(in, in, n) / (float)n + op->eps);
        for (size_t i = 0; i < n; i++) out[i] = perk_reference_round(reference, in[i] * scale * weight[i]);
    }
    return PERK_OK;
}

/* ---- lowering: rows, dealt in runs; nothing when the norm is folded into the linears that read it ---- */

static void add_rows(perk_lowering *l, void *user, int worker, int first, int count) {
    const perk_stage *stage = user;
    const int *operands = stage->operands;
    perk_region x = perk_lower_whole(l, operands[0]), out = perk_lower_whole(l, operands[2]);
    x.row_begin = out.row_begin = first;
    x.row_end = out.row_end = first + count;
    perk_lower_task(l, worker, first, 1, count);
    perk_lower_read(l, x);
    perk_lower_read(l, perk_lower_whole(l, operands[1]));
    perk_lower_write(l, out);
}

static perk_status rmsnorm_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    if (perk_lower_is_folded(l, op)) return PERK_OK;
    const perk_tensor *x = op->inputs[PERK_IN_X];
    perk_stage *stage = perk_lower_begin(l, op, "", "rmsnorm<Rows::%s, %d, %d, %s>(worker, task, %.9ef);",
                                         x->row_kind == PERK_ROWS_TOKENS ? "tokens" : "logits", (int)x->cols,
                                         (int)PERK_ROW_STRIDE(x->cols),
                                         perk_lower_writes_input(l, op->output) ? "true" : "false", (double)op->eps);
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_RMSNORM;
    stage->operands[0] = perk_lower_tensor(l, x, PERK_LAYOUT_ROWS);
    stage->operands[1] = perk_lower_tensor(l, op->inputs[PERK_IN_WEIGHT], PERK_LAYOUT_ROWS);
    stage->operands[2] = perk_lower_output(l, op->output);
    if (l->error.status == PERK_OK) perk_lower_runs(l, perk_lower_rows(l, x), add_rows, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_rmsnorm = {"rmsnorm", rmsnorm_reference, rmsnorm_lower, NULL};
