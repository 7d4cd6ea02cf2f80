/* embed: rows of a table, by token id. */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

perk_tensor *perk_embed(perk_graph *graph, const char *name, perk_tensor *table) {
    if (!perk_graph_owns(graph, name, &table, 1)) return NULL;
    if (!perk_tensor_is_weight(table) || table->is_vector) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "embed %s: the table %s is not a matrix of weights", name,
                        table->name);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = table};
    perk_op *op = perk_graph_add_op(graph, &perk_op_embed, inputs, name, PERK_BF16, PERK_ROWS_TOKENS, table->cols);
    return op ? op->output : NULL;
}

static perk_status embed_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *table = op->inputs[PERK_IN_X];
    float *out = perk_reference_values(reference, op->output);
    size_t cols = (size_t)table->cols;
    for (int32_t t = 0; t < reference->batch->num_tokens; t++) {
        int32_t id = reference->batch->token_ids[t];
        if (id < 0 || id >= table->rows)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "token id %d is not in the vocabulary of %lld", id,
                             (long long)table->rows);
        float *row = out + (size_t)t * cols;
        perk_reference_load_row(reference, table, id, row);
        for (size_t i = 0; i < cols; i++) row[i] = perk_reference_round(reference, row[i]);
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

static perk_status embed_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    const perk_tensor *table = op->inputs[PERK_IN_X];
    perk_stage *stage =
        perk_lower_begin(l, op, "", "gather_rows<Rows::tokens, program::batch_token_ids, %d, %d, true>(worker, task);",
                         (int)PERK_ROW_STRIDE(table->cols), (int)PERK_ROW_STRIDE(table->cols));
    if (!stage) return l->error.status;
    stage->operands[0] = perk_lower_tensor(l, table, PERK_LAYOUT_ROWS);
    stage->operands[1] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    if (l->error.status == PERK_OK) perk_lower_runs(l, (int)perk_ceil_div((uint64_t)table->cols, 8), add_copy, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_embed = {"embed", embed_reference, embed_lower};
