/* select_rows: the rows whose logits the step asks for. */
#include "kernels_src/abi.h"
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

/* ---- lowering: column groups of 8 elements, dealt in runs ---- */

static void add_copy(perk_lowering *l, void *user, int worker, int first, int count) {
    const perk_stage *stage = user;
    const int *operands = stage->operands;
    int begin = first * 8, width = PERK_MIN((first + count) * 8, l->plan->tensors[operands[1]].cols) - begin;
    perk_lower_task(l, worker, first, 1, count);
    perk_lower_read(l, perk_lower_columns(l, operands[0], begin, width, width, 1));
    perk_lower_write(l, perk_lower_columns(l, operands[1], begin, width, width, 1));
}

static perk_status select_rows_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    const perk_tensor *x = op->inputs[PERK_IN_X];
    perk_stage *stage = perk_lower_begin(
        l, op, "", "gather_rows<Rows::logits, program::batch_logit_rows, %d, %d, false>(worker, task);",
        (int)PERK_ROW_STRIDE(x->cols), (int)PERK_ROW_STRIDE(x->cols));
    if (!stage) return l->error.status;
    stage->operands[0] = perk_lower_tensor(l, x, PERK_LAYOUT_ROWS);
    stage->operands[1] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    if (l->error.status == PERK_OK) perk_lower_runs(l, (int)perk_ceil_div((uint64_t)x->cols, 8), add_copy, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_select_rows = {"select_rows", select_rows_reference, select_rows_lower};
