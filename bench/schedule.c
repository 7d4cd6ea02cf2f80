/* What happens between two steps, timed: bench/schedule [seconds a line]
 * Nanoseconds of commit and fill, and with them the cut of attention for 132 warps a KV head, for as many decoding
 * requests, each 1,000 to 2,000 positions long, as the line says; and of the step in which a lone request ends. */
#include "kernels_src/schedule.h"
#include "src/base.h"

#include <stdio.h>

enum { POSITIONS = 4096, PROMPT = 1000, ANSWER = 1000, PAGE_SIZE = 64, TOKENS = 4096, WARPS = 132 };

typedef struct schedule_bench {
    perk_schedule s;
    uint64_t *block;
    perk_attention_cut cut;
    int32_t *picks;
} schedule_bench;

static bool open_bench(schedule_bench *b, int32_t requests) {
    perk_schedule_limits limits = {.slots = requests,
                                   .tokens = TOKENS,
                                   .requests = requests,
                                   .logit_rows = requests,
                                   .positions = POSITIONS,
                                   .page_size = PAGE_SIZE,
                                   .page_count = requests * (POSITIONS / PAGE_SIZE)};
    *b = (schedule_bench){.cut = {.tokens_per_tile = 2, .max_positions = POSITIONS}};
    b->cut.max_items = PERK_MAX(WARPS, 2 * requests);
    b->block = perk_calloc(perk_schedule_lay_out(&limits).words, sizeof *b->block);
    b->cut.tiles = perk_calloc((size_t)limits.tokens, sizeof *b->cut.tiles);
    b->cut.items = perk_calloc((size_t)b->cut.max_items, sizeof *b->cut.items);
    b->cut.token_query_tile = perk_calloc((size_t)limits.tokens, sizeof(int32_t));
    b->picks = perk_calloc((size_t)requests, sizeof(int32_t));
    if (!b->block || !b->cut.tiles || !b->cut.items || !b->cut.token_query_tile || !b->picks) return false;
    perk_schedule_bind(&b->s, &limits, b->block);
    perk_schedule_begin(&b->s);
    return true;
}

static void close_bench(schedule_bench *b) {
    free(b->block);
    free(b->cut.tiles);
    free(b->cut.items);
    free(b->cut.token_query_tile);
    free(b->picks);
}

/* A request whose prompt no other has. */
static void arrive(schedule_bench *b, int32_t number, int32_t answer) {
    int32_t slot = perk_schedule_open(&b->s);
    perk_slot *r = &b->s.slots[slot];
    r->prompt_length = PROMPT;
    r->limit = PROMPT + answer;
    r->shares = 1;
    r->hash_count = PROMPT / PAGE_SIZE;
    r->stop_ids[r->stop_count++] = 1;
    r->stop_ids[r->stop_count++] = 2;
    for (int32_t i = 0; i < r->hash_count; i++)
        perk_slot_hashes(&b->s, slot)[i] =
            (perk_page_hash){((uint64_t)number * 64 + (uint64_t)i + 1) * UINT64_C(0x9e3779b97f4a7c15), 0};
    perk_schedule_arrive(&b->s, slot);
}

static void step(schedule_bench *b) {
    perk_schedule_commit(&b->s, b->picks);
    perk_schedule_fill(&b->s);
}

/* Seconds of `steps` steps in which everyone decodes and nobody is near the end. */
static double time_decode(schedule_bench *b, int32_t requests, int32_t steps, bool with_cut) {
    for (int32_t i = 0; i < requests; i++) arrive(b, i, ANSWER);
    perk_schedule_fill(&b->s);
    while (b->s.batch.num_logit_rows < requests) step(b);
    double start = perk_now();
    for (int32_t i = 0; i < steps; i++) {
        step(b);
        if (with_cut) perk_cut_attention(&b->s.batch, &b->cut);
    }
    double seconds = perk_now() - start;
    while (b->s.state->unfinished) step(b);
    for (int32_t slot = 0; slot < requests; slot++) perk_schedule_close(&b->s, slot);
    return seconds;
}

/* Seconds of `count` steps in which the only request ends. */
static double time_ends(schedule_bench *b, int32_t count) {
    double seconds = 0;
    for (int32_t i = 0; i < count; i++) {
        arrive(b, 1000 + i, 1);
        perk_schedule_fill(&b->s);
        while (b->s.batch.num_logit_rows == 0) step(b);
        int32_t slot = b->s.order[0];
        double start = perk_now();
        step(b);
        seconds += perk_now() - start;
        perk_schedule_close(&b->s, slot);
    }
    return seconds;
}

int main(int argc, char **argv) {
    static const int32_t counts[] = {1, 8, 64, 256};
    double limit = argc > 1 ? atof(argv[1]) : 0.5;
    printf("%8s %12s %12s %12s %12s\n", "requests", "ns a step", "ns a request", "with the cut", "at an end");
    for (size_t k = 0; k < PERK_COUNT(counts); k++) {
        enum { STEPS = 800, ENDS = 300 };
        schedule_bench b;
        double seconds = 0, cut_seconds = 0;
        int64_t steps = 0;
        if (!open_bench(&b, counts[k])) return 1;
        for (; seconds < limit; steps += STEPS) {
            seconds += time_decode(&b, counts[k], STEPS, false);
            cut_seconds += time_decode(&b, counts[k], STEPS, true);
        }
        double ns = seconds * 1e9 / (double)steps;
        printf("%8d %12.0f %12.1f %12.0f %12.0f\n", counts[k], ns, ns / counts[k], cut_seconds * 1e9 / (double)steps,
               time_ends(&b, ENDS) * 1e9 / ENDS);
        close_bench(&b);
    }
    return 0;
}
