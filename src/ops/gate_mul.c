/* gate_mul: out[i] = activation(x[i]) * x[width / 2 + i] (Shazeer 2020): silu_mul, gelu_mul. */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

#include <stdio.h>

static perk_tensor *add_gate_mul(perk_graph *graph, const char *call, const char *name, perk_tensor *x,
                                 perk_activation activation) {
    if (!perk_graph_owns(graph, name, &x, 1)) return NULL;
    if (perk_tensor_is_weight(x) || x->cols % 2 != 0) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "%s %s: needs an activation of even width, found %lld", call,
                        name, (long long)x->cols);
        return NULL;
    }
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = x};
    perk_op *op = perk_graph_add_op(graph, &perk_op_gate_mul, inputs, name, PERK_BF16, x->row_kind, x->cols / 2);
    if (!op) return NULL;
    op->activation = activation;
    return op->output;
}

perk_tensor *perk_silu_mul(perk_graph *graph, const char *name, perk_tensor *x) {
    return add_gate_mul(graph, "silu_mul", name, x, PERK_ACTIVATION_SILU);
}

perk_tensor *perk_gelu_mul(perk_graph *graph, const char *name, perk_tensor *x) {
    return add_gate_mul(graph, "gelu_mul", name, x, PERK_ACTIVATION_GELU_TANH);
}

typedef struct gate_mul_job {
    const perk_reference *reference;
    const perk_op *op;
} gate_mul_job;

static void gate_mul_columns(void *context, size_t begin, size_t end, int thread) {
    const gate_mul_job *job = context;
    size_t n = (size_t)job->op->output->cols, rows = perk_reference_rows(job->reference, job->op->output);
    (void)thread;
    for (size_t row = 0; row < rows; row++) {
        const float *gate = perk_reference_values(job->reference, job->op->inputs[PERK_IN_X]) + row * 2 * n;
        const float *up = gate + n;
        float *out = perk_reference_values(job->reference, job->op->output) + row * n;
        for (size_t i = begin; i < end; i++)
            out[i] = perk_reference_round(job->reference, perk_activate(job->op->activation, gate[i]) * up[i]);
    }
}

static perk_status gate_mul_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    gate_mul_job job = {reference, op};
    size_t rows = perk_reference_rows(reference, op->output);
    (void)err;
    if (rows == 0) return PERK_OK;
    perk_threads_run(reference->threads, (size_t)op->output->cols, perk_ceil_div(PERK_REFERENCE_MIN_WORK / 8, rows),
                     gate_mul_columns, &job);
    return PERK_OK;
}

/* ---- lowering: column groups of 8 elements, dealt in runs; nothing when folded into the linear before it ---- */

static void add_columns(perk_lowering *l, void *user, int worker, int first, int count) {
    const perk_stage *stage = user;
    const int *operands = stage->operands;
    int width = l->plan->tensors[operands[1]].cols, begin = first * 8, part = PERK_MIN(count * 8, width - begin);
    perk_lower_task(l, worker, first, 1, count);
    bool of_experts = l->graph->tensors[l->plan->tensors[operands[0]].graph_tensor]->row_kind == PERK_ROWS_PAIRS;
    perk_lower_read(l, of_experts ? perk_lower_whole(l, operands[0])
                                  : perk_lower_columns(l, operands[0], begin, part, width, 2));
    perk_lower_write(l, perk_lower_columns(l, operands[1], begin, part, width, 1));
}

static perk_status gate_mul_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    (void)err;
    if (perk_lower_is_folded(l, op)) return PERK_OK;
    const perk_tensor *x = op->inputs[PERK_IN_X];
    int width = (int)op->output->cols;
    char slots[16] = "";
    if (x->row_kind == PERK_ROWS_PAIRS) snprintf(slots, sizeof slots, ", %d", x->slots);
    perk_stage *stage =
        perk_lower_begin(l, op, "", "gate_mul<Rows::%s, %d, %d, %d, Activation::%s%s>(worker, task);",
                         x->row_kind == PERK_ROWS_LOGITS ? "logits" : "tokens", width, (int)PERK_ROW_STRIDE(x->cols),
                         PERK_ROW_STRIDE(width), perk_activation_name(op->activation), slots);
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_GATE_MUL;
    stage->operands[0] = perk_lower_tensor(l, x, PERK_LAYOUT_ROWS);
    stage->operands[1] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    if (l->error.status == PERK_OK) perk_lower_runs(l, (int)perk_ceil_div((uint64_t)width, 8), add_columns, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_gate_mul = {"gate_mul", gate_mul_reference, gate_mul_lower, NULL};
