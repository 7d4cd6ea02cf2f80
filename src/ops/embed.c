/* embed: rows of a table, by token id. */
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

perk_tensor *perk_embed(perk_graph *graph, const char *name, perk_tensor *table) {
    if (!perk_graph_owns(graph, name, &table, 1)) return NULL;
    if (!perk_tensor_is_weight(table) || table->is_vector || table->experts) {
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
        perk_reference_load_row(reference, table, 0, id, row);
        for (size_t i = 0; i < cols; i++) row[i] = perk_reference_round(reference, row[i]);
    }
    return PERK_OK;
}

static perk_status embed_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    return perk_lower_gather(l, op, "tokens", "batch_token_ids");
}

const perk_op_type perk_op_embed = {"embed", embed_reference, embed_lower, NULL};
