/* moe_route: the experts of each token, and their shares: the largest of a softmax over the router's logits. */
#include "lower.h"
#include "ops/op.h"
#include "reference_state.h"

#include <math.h>
#include <stdio.h>

static bool check_route(perk_graph *graph, const char *name, const perk_tensor *logits, int32_t top_k) {
    if (perk_tensor_is_weight(logits) || logits->row_kind != PERK_ROWS_TOKENS || logits->dtype == PERK_I32) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "moe_route %s: needs logits with a row for each token", name);
        return false;
    }
    if (top_k < 1 || top_k > logits->cols) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "moe_route %s: cannot pick %d of %lld experts", name, top_k,
                        (long long)logits->cols);
        return false;
    }
    return true;
}

perk_routing perk_moe_route(perk_graph *graph, const char *name, perk_tensor *logits, int32_t top_k,
                            int32_t normalises) {
    char experts[128], shares[128];
    if (!perk_graph_owns(graph, name, &logits, 1) || !check_route(graph, name, logits, top_k))
        return (perk_routing){NULL, NULL};
    snprintf(experts, sizeof experts, "%s.experts", name ? name : "");
    snprintf(shares, sizeof shares, "%s.shares", name ? name : "");
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {[PERK_IN_X] = logits};
    perk_op *op = perk_graph_add_op(graph, &perk_op_moe_route, inputs, experts, PERK_I32, PERK_ROWS_TOKENS, top_k);
    if (!op || !perk_graph_add_second(graph, op, shares, PERK_F32, top_k)) return (perk_routing){NULL, NULL};
    op->normalises = normalises != 0;
    return (perk_routing){op->output, op->second};
}

/* The expert that follows `last` (-1: none) in the order of falling logits, rising numbers among equals. `otherwise`
 * where there is none: logits that are no numbers have no order. */
static int32_t next_expert(const float *logits, int32_t count, int32_t last, int32_t otherwise) {
    int32_t best = -1;
    for (int32_t i = 0; i < count; i++) {
        bool follows = last < 0 || logits[i] < logits[last] || (logits[i] == logits[last] && i > last);
        if (follows && (best < 0 ? logits[i] == logits[i] : logits[i] > logits[best])) best = i;
    }
    return best < 0 ? otherwise : best;
}

static void route_row(const perk_op *op, const float *logits, int32_t *experts, float *shares) {
    int32_t count = (int32_t)op->inputs[PERK_IN_X]->cols, slots = (int32_t)op->output->cols, last = -1;
    float all = 0, picked = 0;
    for (int32_t s = 0; s < slots; s++) experts[s] = last = next_expert(logits, count, last, s);
    for (int32_t i = 0; i < count; i++) all += expf(logits[i] - logits[experts[0]]);
    for (int32_t s = 0; s < slots; s++) {
        shares[s] = expf(logits[experts[s]] - logits[experts[0]]) / all;
        picked += shares[s];
    }
    for (int32_t s = 0; op->normalises && s < slots; s++) shares[s] /= picked;
}

static perk_status moe_route_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_tensor *logits = op->inputs[PERK_IN_X];
    int32_t *experts = (int32_t *)perk_reference_values(reference, op->output);
    float *shares = perk_reference_values(reference, op->second);
    size_t slots = (size_t)op->output->cols;
    (void)err;
    for (size_t t = 0; t < perk_reference_rows(reference, logits); t++)
        route_row(op, perk_reference_values(reference, logits) + t * (size_t)logits->cols, experts + t * slots,
                  shares + t * slots);
    return PERK_OK;
}

/* ---- lowering: one task, or none where those who ask pick by themselves; device code in kernels_src/moe.cuh ---- */

enum { LOGITS, EXPERTS, SHARES, ROUTING };          /* operands of the stage */
enum { MAX_DEVICE_EXPERTS = 1024, MAX_SLOTS = 32 }; /* of a token: a lane keeps 32 logits, and one slot */

int perk_moe_route_bytes(const perk_lowering *l, const perk_op *op) {
    int experts = (int)op->inputs[PERK_IN_X]->cols, tokens = perk_lower_rows(l, op->output);
    int words = experts * ((tokens + 31) / 32 + 1) + 2 * tokens * (int)op->output->cols;
    return (int)perk_round_up((uint64_t)words * 4, 32);
}

static void add_all(perk_lowering *l, void *user, int worker, int first, int count) {
    const int *operands = ((const perk_stage *)user)->operands;
    perk_lower_task(l, worker, first, 1, count);
    perk_lower_read(l, perk_lower_whole(l, operands[LOGITS]));
    for (int role = EXPERTS; role <= ROUTING; role++) perk_lower_write(l, perk_lower_whole(l, operands[role]));
}

static perk_status moe_route_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    const perk_tensor *logits = op->inputs[PERK_IN_X];
    if (logits->dtype != PERK_F32 || logits->cols > MAX_DEVICE_EXPERTS || op->output->cols > MAX_SLOTS)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "%s: the GPU picks up to %d of up to %d experts by the fp32 logits of perk_logits, not %lld "
                         "of %lld",
                         op->output->name, MAX_SLOTS, MAX_DEVICE_EXPERTS, (long long)op->output->cols,
                         (long long)logits->cols);
    if (perk_lower_routes_alone(l)) return PERK_OK;
    perk_stage *stage =
        perk_lower_begin(l, op, "", "MoeRoute<Routing<%d, %d, %d>, %s>::run(worker, task);", (int)logits->cols,
                         (int)op->output->cols, perk_lower_rows(l, op->output), op->normalises ? "true" : "false");
    if (!stage) return l->error.status;
    stage->work = PERK_WORK_MOE_ROUTE;
    stage->operands[LOGITS] = perk_lower_tensor(l, logits, PERK_LAYOUT_ROWS);
    stage->operands[EXPERTS] = perk_lower_tensor(l, op->output, PERK_LAYOUT_ROWS);
    stage->operands[SHARES] = perk_lower_tensor(l, op->second, PERK_LAYOUT_ROWS);
    stage->operands[ROUTING] = perk_lower_routing(l, op->output);
    if (l->error.status == PERK_OK) perk_lower_runs(l, 1, add_all, stage);
    perk_lower_end(l);
    return l->error.status;
}

const perk_op_type perk_op_moe_route = {"moe_route", moe_route_reference, moe_route_lower, NULL};
