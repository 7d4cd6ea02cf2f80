/* As kernels_src/moe.cuh: MoeRoute, moe_sum. ExpertLinear is with the linears. */
#include "simulator/machine.h"

#include <math.h>

/* ---- routing ---- */

enum { LOGITS, EXPERTS, SHARES, ROUTING }; /* operands of the stage */

/* Logits that are no numbers come last; among equals the lower number is first. */
static bool is_before(const float *logits, int32_t a, int32_t b) {
    bool a_is_number = logits[a] == logits[a], b_is_number = logits[b] == logits[b];
    if (a_is_number != b_is_number) return a_is_number;
    if (a_is_number && logits[a] != logits[b]) return logits[a] > logits[b];
    return a < b;
}

/* The expert that follows `last` in that order; -1: the first. */
static int32_t next_expert(const float *logits, int32_t count, int32_t last) {
    int32_t best = -1;
    for (int32_t i = 0; i < count; i++)
        if ((last < 0 || is_before(logits, last, i)) && (best < 0 || is_before(logits, i, best))) best = i;
    return best;
}

static void pick(const perk_op *route, const float *logits, int32_t *picks, float *shares) {
    int32_t count = (int32_t)route->inputs[PERK_IN_X]->cols, slots = (int32_t)route->output->cols, last = -1;
    for (int32_t s = 0; s < slots; s++) picks[s] = last = next_expert(logits, count, last);
    float all = 0, largest = logits[picks[0]];
    for (int32_t i = 0; i < (route->normalises ? slots : count); i++)
        all += expf(logits[route->normalises ? picks[i] : i] - largest);
    for (int32_t s = 0; s < slots; s++) shares[s] = expf(logits[picks[s]] - largest) / all;
}

static void route_token(perk_sim_task *t, int token, int32_t *picks, float *picked_shares) {
    int32_t count = (int32_t)t->op->inputs[PERK_IN_X]->cols, slots = (int32_t)t->op->output->cols;
    const float *logits = perk_sim_read(t, LOGITS, PERK_F32, token, 0, count);
    if (!logits) return;
    pick(t->op, logits, picks, picked_shares);
    int32_t *experts = perk_sim_write(t, EXPERTS, PERK_I32, token, 0, slots);
    if (experts) memcpy(experts, picks, (size_t)slots * sizeof *experts);
    float *shares = perk_sim_write(t, SHARES, PERK_F32, token, 0, slots);
    if (shares) memcpy(shares, picked_shares, (size_t)slots * sizeof *shares);
}

/* As kernels_src/abi.h says, with room for so many hits and pairs. */
static void fill_routing(const perk_op *route, const int32_t *picks, const float *shares, int32_t pairs,
                         int32_t most_hits, int32_t most_pairs, int32_t *routing) {
    int32_t *hit = routing + PERK_ROUTING_HEADER, *begin = hit + most_hits, *order = begin + most_hits + 1;
    int32_t hits = 0, placed = 0;
    memset(routing, 0, (size_t)PERK_ROUTING_WORDS(most_hits, most_pairs) * sizeof *routing);
    for (int32_t expert = 0; expert < route->inputs[PERK_IN_X]->cols; expert++) {
        int32_t first = placed;
        for (int32_t pair = 0; pair < pairs; pair++) {
            if (picks[pair] != expert) continue;
            memcpy(order + most_pairs + placed, shares + pair, sizeof *shares);
            order[placed++] = pair;
        }
        if (placed == first) continue;
        hit[hits] = expert;
        begin[hits++] = first;
    }
    begin[hits] = placed;
    routing[PERK_ROUTING_HITS] = hits;
}

void perk_sim_route_alone(const perk_op *route, const float *logits, int32_t *routing) {
    int32_t slots = (int32_t)route->output->cols, picks[PERK_SIM_OWN_SLOTS];
    float shares[PERK_SIM_OWN_SLOTS];
    pick(route, logits, picks, shares);
    fill_routing(route, picks, shares, slots, slots, slots, routing);
}

void perk_sim_moe_route(perk_sim_task *t) {
    int32_t tokens = perk_sim_rows(t, PERK_ROWS_TOKENS), slots = (int32_t)t->op->output->cols;
    int32_t most_pairs = t->sim->config.max_num_batched_tokens * slots;
    float *shares = perk_sim_scratch(t, 2 * (size_t)(tokens * slots));
    if (!shares) return;
    int32_t *picks = (int32_t *)(void *)(shares + tokens * slots);
    for (int32_t token = 0; token < tokens && !t->status; token++)
        route_token(t, token, picks + token * slots, shares + token * slots);
    if (t->status) return;
    int32_t most_hits = (int32_t)PERK_MIN(t->op->inputs[PERK_IN_X]->cols, most_pairs);
    int32_t *routing = perk_sim_write(t, ROUTING, PERK_I32, 0, 0, PERK_ROUTING_WORDS(most_hits, most_pairs));
    if (routing) fill_routing(t->op, picks, shares, tokens * slots, most_hits, most_pairs, routing);
}

/* ---- the sum ---- */

void perk_sim_moe_sum(perk_sim_task *t) {
    enum { X, SUM_SHARES, RESIDUAL, OUT };
    int64_t begin = (int64_t)t->task->first * 8;
    int64_t count = PERK_MIN((int64_t)t->task->count * 8, t->op->output->cols - begin);
    int slots = t->op->inputs[PERK_IN_X]->slots, rows = count > 0 ? perk_sim_rows(t, PERK_ROWS_TOKENS) : 0;
    float *sums = perk_sim_scratch(t, (size_t)PERK_MAX(count, (int64_t)1));
    for (int row = 0; sums && row < rows; row++) {
        const float *shares = perk_sim_read(t, SUM_SHARES, PERK_F32, row, 0, slots);
        if (!shares) return;
        memset(sums, 0, (size_t)count * sizeof *sums);
        for (int slot = 0; slot < slots; slot++) {
            const uint16_t *x = perk_sim_read(t, X, PERK_BF16, (int64_t)row * slots + slot, begin, count);
            for (int64_t c = 0; x && c < count; c++) sums[c] += shares[slot] * perk_bf16_to_f32(x[c]);
        }
        const uint16_t *residual = perk_sim_read_in_place(t, RESIDUAL, PERK_BF16, row, begin, count);
        uint16_t *out = residual ? perk_sim_write(t, OUT, PERK_BF16, row, begin, count) : NULL;
        if (!out) return;
        for (int64_t c = 0; c < count; c++) out[c] = perk_f32_to_bf16(sums[c] + perk_bf16_to_f32(residual[c]));
    }
}
