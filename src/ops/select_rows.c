/* select_rows: the rows whose logits the step asks for. */
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

perk_tensor *perk_select_rows(perk_graph *graph, const char *name, perk_tensor *x) {
    if (!perk_graph_owns(graph, name, &x, 1)) return NULL;
    if (perk_tensor_is_weight(x) || x->row_kind != PERK_ROWS_TOKENS) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "select_rows %s: needs an activation with a row for each token",
                        name);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = x};
    perk_op *op = perk_graph_add_op(graph, &perk_op_select_rows, inputs, name, PERK_BF16, PERK_ROWS_LOGITS, x->cols);
    return op ? op->output : NULL;
}

static perk_status select_rows_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_batch *batch = reference->batch;
    const float *x = perk_reference_values(reference, op->inputs[PERK_IN_X]);
    float *out = perk_reference_values(reference, op->output);
    size_t cols = (size_t)op->output->cols;
    for (int32_t i = 0; i < batch->num_logit_rows; i++) {
        int32_t row = batch->logit_rows[i];
        if (row < 0 || row >= batch->num_tokens)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "the batch asks for logits of row %d of %d", row,
                             batch->num_tokens);
        memcpy(out + (size_t)i * cols, x + (size_t)row * cols, cols * sizeof *out);
    }
    return PERK_OK;
}

static perk_status select_rows_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    return perk_lower_gather(l, op, "logits", "batch_logit_rows");
}

const perk_op_type perk_op_select_rows = {"select_rows", select_rows_reference, select_rows_lower, NULL};
