#include "sampler.h"

#include <math.h>

typedef struct candidate {
    float logit;
    float weight; /* exp((logit - largest logit) / temperature): the largest is 1 */
    int32_t id;
} candidate;

struct perk_sampler {
    int32_t vocab_size;
    candidate *candidates; /* [vocab_size] */
};

perk_status perk_sampler_create(perk_sampler **out, int32_t vocab_size, perk_error *err) {
    *out = NULL;
    if (vocab_size < 1) return perk_fail(err, PERK_INVALID_ARGUMENT, "sampler: a vocabulary of %d", vocab_size);
    perk_sampler *sampler = perk_calloc(1, sizeof *sampler);
    if (!sampler) return perk_fail_memory(err, "the sampler");
    sampler->vocab_size = vocab_size;
    sampler->candidates = perk_calloc((size_t)vocab_size, sizeof *sampler->candidates);
    if (!sampler->candidates) {
        free(sampler);
        return perk_fail_memory(err, "the sampler");
    }
    *out = sampler;
    return PERK_OK;
}

void perk_sampler_free(perk_sampler *sampler) {
    if (!sampler) return;
    free(sampler->candidates);
    free(sampler);
}

perk_status perk_sampling_check(const perk_sampling *sampling, perk_error *err) {
    if (!(sampling->temperature >= 0) || !isfinite(sampling->temperature))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "temperature %g: must be 0 (greedy) or a positive number",
                         (double)sampling->temperature);
    if (sampling->top_k < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "top_k %d: must be 0 (all) or positive", sampling->top_k);
    if (!(sampling->top_p >= 0 && sampling->top_p <= 1))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "top_p %g: must be between 0 and 1", (double)sampling->top_p);
    if (!(sampling->min_p >= 0 && sampling->min_p <= 1))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "min_p %g: must be between 0 and 1", (double)sampling->min_p);
    if (sampling->max_tokens < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "max_tokens %d: must be 0 (as many as fit) or positive",
                         sampling->max_tokens);
    return PERK_OK;
}

/* A bijection of 64-bit numbers in which every input bit reaches every output bit (the finaliser of splitmix64). */
static uint64_t scramble(uint64_t x) {
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

double perk_uniform(uint64_t seed, uint64_t place) {
    const uint64_t golden = UINT64_C(0x9e3779b97f4a7c15); /* 2^64 / golden ratio */
    uint64_t bits = scramble(scramble(seed + golden) + golden * (place + 1));
    return (double)(bits >> 11) * 0x1p-53;
}

/* ---- ranking: a heap that is popped only as far as somebody looks ---- */

typedef struct candidate_ranking {
    candidate *items;      /* [count]: a heap with the best at its root, then the popped ones, the best last */
    int32_t count, popped; /* popped 0: not a heap yet */
} candidate_ranking;

static bool better(const candidate *a, const candidate *b) {
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static void sift_down(candidate *heap, int32_t size, int32_t at) {
    candidate moving = heap[at];
    for (int32_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && better(&heap[child + 1], &heap[child])) child++;
        if (!better(&heap[child], &moving)) break;
        heap[at] = heap[child];
    }
    heap[at] = moving;
}

static void pop_best(candidate_ranking *ranking) {
    int32_t size = ranking->count - ranking->popped;
    if (ranking->popped == 0)
        for (int32_t i = size / 2 - 1; i >= 0; i--) sift_down(ranking->items, size, i);
    candidate best = ranking->items[0];
    ranking->items[0] = ranking->items[size - 1];
    sift_down(ranking->items, size - 1, 0);
    ranking->items[size - 1] = best;
    ranking->popped++;
}

/* The best for place 0, and so on. */
static const candidate *ranked(candidate_ranking *ranking, int32_t place) {
    while (ranking->popped <= place) pop_best(ranking);
    return &ranking->items[ranking->count - 1 - place];
}

/* Forgets all but the best `count`. */
static void keep_best(candidate_ranking *ranking, int32_t count) {
    if (count >= ranking->count) return;
    if (count > 0) ranked(ranking, count - 1);
    ranking->items += ranking->count - count;
    ranking->count = ranking->popped = count;
}

/* ---- picking ---- */

/* A logit that at least `count` logits reach: the smallest of the maxima of `count` stretches of the vocabulary. */
static float floor_of_best(const float *logits, int32_t vocab_size, int32_t count) {
    float floor = INFINITY;
    for (int32_t i = 0; i < count; i++) {
        int32_t begin = (int32_t)((int64_t)vocab_size * i / count);
        int32_t end = (int32_t)((int64_t)vocab_size * (i + 1) / count);
        float largest = -INFINITY;
        for (int32_t k = begin; k < end; k++) largest = logits[k] > largest ? logits[k] : largest;
        floor = PERK_MIN(floor, largest);
    }
    return floor;
}

/* What can be picked at all; with top_k, little more than the best top_k. */
static candidate_ranking collect(perk_sampler *sampler, const float *logits, int32_t top_k) {
    candidate_ranking found = {.items = sampler->candidates};
    bool few = top_k > 0 && top_k < sampler->vocab_size;
    float floor = few ? floor_of_best(logits, sampler->vocab_size, top_k) : -INFINITY;
    for (int32_t i = 0; i < sampler->vocab_size; i++)
        if (logits[i] > -INFINITY && logits[i] >= floor)
            found.items[found.count++] = (candidate){.logit = logits[i], .id = i};
    if (few) keep_best(&found, top_k);
    return found;
}

/* Fills the weights in; returns their sum. */
static double weigh(const candidate_ranking *ranking, float largest, float temperature) {
    double sum = 0;
    for (int32_t i = 0; i < ranking->count; i++) {
        ranking->items[i].weight = expf((ranking->items[i].logit - largest) / temperature);
        sum += (double)ranking->items[i].weight;
    }
    return sum;
}

/* Forgets what is lighter than `weight`, unless it is ranked already. */
static void drop_light(candidate_ranking *ranking, double weight) {
    if (ranking->popped) return;
    int32_t kept = 0;
    for (int32_t i = 0; i < ranking->count; i++)
        if ((double)ranking->items[i].weight >= weight) ranking->items[kept++] = ranking->items[i];
    ranking->count = kept;
}

/* Leaves what top-p and min-p leave; returns the sum of their weights. */
static double cut_tail(candidate_ranking *ranking, const perk_sampling *sampling, double sum) {
    bool nucleus = sampling->top_p > 0 && sampling->top_p < 1;
    if (!nucleus && !(sampling->min_p > 0)) return sum;
    /* All that are lighter than the tail's mean weight together weigh less than the tail: they are part of it. */
    double tail = nucleus ? (1 - (double)sampling->top_p) * sum / ranking->count : 0;
    drop_light(ranking, PERK_MAX(tail, (double)sampling->min_p)); /* the largest weight is 1 */
    double enough = nucleus ? (double)sampling->top_p * sum : INFINITY, kept_sum = 0;
    int32_t kept = 0;
    for (; kept < ranking->count && kept_sum < enough; kept++) {
        float weight = ranked(ranking, kept)->weight;
        if (weight < sampling->min_p) break;
        kept_sum += (double)weight;
    }
    keep_best(ranking, kept);
    return kept_sum;
}

/* The candidate in whose share of [0, sum) `target` falls. */
static int32_t find_share(const candidate *candidates, int32_t count, double target) {
    int32_t last = candidates[count - 1].id; /* where rounding lets the walk run past the end */
    for (int32_t i = 0; i < count; i++) {
        if (candidates[i].weight > 0) last = candidates[i].id;
        target -= (double)candidates[i].weight;
        if (target < 0) return candidates[i].id;
    }
    return last;
}

perk_status perk_sampler_pick(perk_sampler *sampler, const float *logits, const perk_sampling *sampling, uint64_t place,
                              int32_t *token, perk_error *err) {
    int32_t best = -1;
    for (int32_t i = 0; i < sampler->vocab_size; i++)
        if (logits[i] > (best < 0 ? -INFINITY : logits[best])) best = i;
    if (best < 0 || isinf(logits[best]))
        return perk_fail(err, PERK_INTERNAL,
                         "the logits of a token are not finite numbers: the weights are damaged, or a computation "
                         "overflowed; compare with perk run --backend reference");
    *token = best;
    if (!(sampling->temperature > 0)) return PERK_OK;

    candidate_ranking ranking = collect(sampler, logits, sampling->top_k);
    double sum = weigh(&ranking, logits[best], sampling->temperature);
    sum = cut_tail(&ranking, sampling, sum);
    *token = find_share(ranking.items, ranking.count, perk_uniform(sampling->seed, place) * sum);
    return PERK_OK;
}
