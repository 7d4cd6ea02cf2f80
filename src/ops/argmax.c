/* argmax: the index of the largest logit of each row, the lowest among equals. */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

perk_tensor *perk_argmax(perk_graph *graph, const char *name, perk_tensor *logits) {
    if (!perk_graph_owns(graph, name, &logits, 1)) return NULL;
    if (logits->dtype != PERK_F32 || perk_tensor_is_weight(logits)) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "argmax %s: needs fp32 logits", name);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = logits};
    perk_op *op = perk_graph_add_op(graph, &perk_op_argmax, inputs, name, PERK_I32, logits->row_kind, 1);
    return op ? op->output : NULL;
}

static perk_status argmax_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *logits = op->inputs[PERK_IN_X];
    int32_t *out = (int32_t *)perk_reference_values(reference, op->output);
    (void)err;
    for (size_t row = 0; row < perk_reference_rows(reference, logits); row++) {
        const float *values = perk_reference_values(reference, logits) + row * (size_t)logits->cols;
        int32_t best = 0;
        for (int32_t i = 1; i < logits->cols; i++)
            if (values[i] > values[best]) best = i;
        out[row] = best;
    }
    return PERK_OK;
}

/* ---- lowering: over the candidates that the row tiles of the logits linear left ---- */

static void add_rows(perk_lowering *l, void *user, int worker, int first, int count) {
    const perk_stage *stage = user;
    perk_region candidates = perk_lower_whole(l, stage->operands[0]), out = perk_lower_whole(l, stage->operands[1]);
    candidates.row_begin = out.row_begin = first;
    candidates.row_end = out.row_end = first + count;
    perk_lower_task(l, worker, first, 1, count);
    perk_lower_read(l, candidates);
    perk_lower_write(l, out);
}

static perk_status argmax_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    const perk_tensor *logits = op->inputs[PERK_IN_X];
    int candidates = perk_lower_candidates(l, logits);
    if (candidates < 0)
        return perk_fail(err, PERK_UNSUPPORTED, "argmax %s: its input must come from perk_logits over selected rows",
                         op->output->name);
    perk_stage *stage =
        perk_lower_begin(l, op, "", "argmax<%d, %d>(worker, task);", (int)logits->cols, (int)PERK_ROW_STRIDE(1));
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_ARGMAX;
    stage->operands[0] = candidates;
    stage->operands[1] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    if (l->error.status == PERK_OK) perk_lower_runs(l, perk_lower_rows(l, logits), add_rows, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_argmax = {"argmax", argmax_reference, argmax_lower, NULL};
