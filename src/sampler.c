#include "sampler.h"

#include "kernels_src/draw.h"

#include <math.h>

typedef struct candidate {
    float logit;
    int32_t id;
    uint64_t weight;
} candidate;

struct perk_sampler {
    int32_t vocab_size;
    candidate *candidates; /* [vocab_size] */
    float *adjusted;       /* [vocab_size] logits after bias and penalties */
    int32_t *seen;         /* [vocab_size] 0, or 1 + how often the answer has the token; all 0 between two calls */
};

perk_status perk_sampler_create(perk_sampler **out, int32_t vocab_size, perk_error *err) {
    *out = NULL;
    if (vocab_size < 1) return perk_fail(err, PERK_INVALID_ARGUMENT, "sampler: a vocabulary of %d", vocab_size);
    perk_sampler *sampler = perk_calloc(1, sizeof *sampler);
    if (!sampler) return perk_fail_memory(err, "the sampler");
    sampler->vocab_size = vocab_size;
    sampler->candidates = perk_calloc((size_t)vocab_size, sizeof *sampler->candidates);
    sampler->adjusted = perk_calloc((size_t)vocab_size, sizeof *sampler->adjusted);
    sampler->seen = perk_calloc((size_t)vocab_size, sizeof *sampler->seen);
    if (!sampler->candidates || !sampler->adjusted || !sampler->seen) {
        perk_sampler_free(sampler);
        return perk_fail_memory(err, "the sampler");
    }
    *out = sampler;
    return PERK_OK;
}

void perk_sampler_free(perk_sampler *sampler) {
    if (!sampler) return;
    free(sampler->candidates);
    free(sampler->adjusted);
    free(sampler->seen);
    free(sampler);
}

double perk_uniform(uint64_t seed, uint64_t place) { return (double)(perk_random_bits(seed, place) >> 11) * 0x1p-53; }

/* top_p and min_p in units of weights; both are exact. */
perk_draw_rule perk_sampling_rule(const perk_sampling *sampling) {
    bool nucleus = sampling->top_p > 0 && sampling->top_p<1, samples = sampling->temperature> 0;
    return (perk_draw_rule){
        .seed = sampling->seed,
        .top_p = nucleus ? PERK_MAX((uint64_t)((double)sampling->top_p * 0x1p64), (uint64_t)1) : 0,
        .min_weight = (uint64_t)ldexp((double)sampling->min_p, PERK_WEIGHT_ONE_SHIFT),
        .scale = samples ? fminf(PERK_LOG2_E / sampling->temperature, 0x1p127f) : 0, /* 0 * inf would be no number */
        .repetition = sampling->repetition_penalty > 0 ? sampling->repetition_penalty : 1,
        .presence = sampling->presence_penalty,
        .frequency = sampling->frequency_penalty,
        .top_k = sampling->top_k,
        .bias_count = sampling->bias_count,
        .has_penalties = perk_sampling_penalizes(sampling),
        .logprobs = perk_sampling_logprob_count(sampling),
        .samples = perk_sampling_needs_logits(sampling),
    };
}

_Static_assert(sizeof(perk_draw_bias) == sizeof(perk_logit_bias), "a bias is the same on both sides");
_Static_assert((int)PERK_DRAW_BIASES == (int)PERK_MAX_LOGIT_BIAS, "as many as a request may have");
_Static_assert((int)PERK_DRAW_TOP == (int)PERK_MAX_TOP_LOGPROBS, "as many as a request may have");

int32_t perk_sampling_slot_biases(const perk_sampling *sampling, perk_draw_bias *biases) {
    return perk_sampling_biases(sampling, (perk_logit_bias *)(void *)biases);
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
static uint64_t weigh(const candidate_ranking *ranking, float largest, float scale) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < ranking->count; i++)
        sum += ranking->items[i].weight = perk_weight(ranking->items[i].logit, largest, scale);
    return sum;
}

/* Forgets what is lighter than `weight`, before anything was ranked or when all was. */
static void drop_light(candidate_ranking *ranking, uint64_t weight) {
    int32_t kept = 0;
    for (int32_t i = 0; i < ranking->count; i++)
        if (ranking->items[i].weight >= weight) ranking->items[kept++] = ranking->items[i];
    ranking->popped = PERK_MIN(ranking->popped, kept);
    ranking->count = kept;
}

/* Leaves the shortest beginning of the ranking that weighs enough of `sum`. */
static void keep_nucleus(candidate_ranking *ranking, uint64_t top_p, uint64_t sum) {
    uint64_t enough = perk_nucleus(top_p, sum), kept_sum = 0;
    /* All that are lighter than the tail's mean weight together weigh less than the tail: they are part of it. Weights
     * fall with the ranking but for their rounding, hence a little less. */
    uint64_t mean = (sum - enough) / (uint64_t)ranking->count;
    if (ranking->popped == 0) drop_light(ranking, mean - mean / 1024);
    int32_t kept = 0;
    while (kept < ranking->count && kept_sum < enough) kept_sum += ranked(ranking, kept++)->weight;
    keep_best(ranking, kept);
}

static int compare_ids(const void *a, const void *b) {
    int32_t first = ((const candidate *)a)->id, second = ((const candidate *)b)->id;
    return (first > second) - (first < second);
}

/* The candidate in whose share of all weights `bits` / 2^64 of them falls. */
static int32_t draw(candidate_ranking *ranking, uint64_t bits) {
    candidate *candidates = ranking->items;
    int32_t count = ranking->count, at = 0;
    if (ranking->popped) qsort(candidates, (size_t)count, sizeof *candidates, compare_ids); /* else they still are */
    uint64_t sum = 0;
    for (int32_t i = 0; i < count; i++) sum += candidates[i].weight;
    for (uint64_t left = perk_high_product(bits, sum); left >= candidates[at].weight; at++)
        left -= candidates[at].weight;
    return candidates[at].id;
}

/* The largest logit, of equal ones the first; -1 when there is none but NaN and -inf. */
static int32_t find_best(const float *logits, int32_t vocab_size) {
    int32_t best = -1;
    float largest = -INFINITY;
    for (int32_t i = 0; i < vocab_size; i++) {
        if (!(logits[i] > largest)) continue;
        best = i;
        largest = logits[i];
    }
    return best;
}

static int32_t sample(perk_sampler *sampler, const float *logits, float largest, const perk_draw_rule *rule,
                      uint64_t place) {
    candidate_ranking ranking = collect(sampler, logits, rule->top_k);
    uint64_t sum = weigh(&ranking, largest, rule->scale);
    if (rule->top_p) keep_nucleus(&ranking, rule->top_p, sum);
    if (rule->min_weight) drop_light(&ranking, rule->min_weight);
    return draw(&ranking, perk_random_bits(rule->seed, place));
}

/* ---- bias and penalties ---- */

/* Applies the penalties to the tokens that were counted, each once, and clears their counts. */
static void penalize(perk_sampler *sampler, const perk_draw_rule *rule, const int32_t *tokens, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        int32_t token = tokens[i];
        if (token < 0 || token >= sampler->vocab_size || !sampler->seen[token]) continue;
        sampler->adjusted[token] = perk_penalize(sampler->adjusted[token], rule, sampler->seen[token] - 1);
        sampler->seen[token] = 0;
    }
}

static void count_tokens(perk_sampler *sampler, const perk_history *history) {
    for (int32_t i = 0; i < history->prompt_length; i++) {
        int32_t token = history->prompt[i];
        if (token >= 0 && token < sampler->vocab_size) sampler->seen[token] = 1;
    }
    for (int32_t i = 0; i < history->answer_length; i++) {
        int32_t token = history->answer[i];
        if (token >= 0 && token < sampler->vocab_size) sampler->seen[token] += sampler->seen[token] ? 1 : 2;
    }
}

static const float *adjust(perk_sampler *sampler, const float *logits, const perk_sampling *sampling,
                           const perk_draw_rule *rule, const perk_history *history) {
    memcpy(sampler->adjusted, logits, (size_t)sampler->vocab_size * sizeof *logits);
    for (int32_t i = 0; i < sampling->bias_count; i++)
        sampler->adjusted[sampling->bias[i].token] += sampling->bias[i].bias;
    if (!rule->has_penalties) return sampler->adjusted;
    count_tokens(sampler, history);
    penalize(sampler, rule, history->prompt, history->prompt_length);
    penalize(sampler, rule, history->answer, history->answer_length);
    return sampler->adjusted;
}

/* ---- log probabilities ---- */

/* The likeliest `count` tokens, in `best` with their logits; returns how many there are. */
static int32_t find_top(const float *logits, int32_t vocab_size, int32_t count, perk_logprob *best) {
    int32_t found = 0;
    for (int32_t i = 0; i < vocab_size && count; i++) {
        if (!(logits[i] > -INFINITY) || (found == count && !(logits[i] > best[count - 1].logprob))) continue;
        int32_t at = found < count ? found++ : count - 1;
        for (; at > 0 && logits[i] > best[at - 1].logprob; at--) best[at] = best[at - 1];
        best[at] = (perk_logprob){i, logits[i]};
    }
    return found;
}

double perk_log_sum(float largest, uint64_t sum) {
    return (double)largest + log(ldexp((double)sum, -PERK_WEIGHT_ONE_SHIFT));
}

static uint64_t sum_weights(const float *logits, int32_t vocab_size, float largest, float scale) {
    uint64_t sum = 0;
    for (int32_t i = 0; i < vocab_size; i++) sum += perk_weight(logits[i], largest, scale);
    return sum;
}

/* logit - log(sum of exp(logits)), the chosen token first. Places past the vocabulary get token -1 and -inf. */
static void fill_logprobs(const perk_sampler *sampler, const float *logits, float largest, int32_t chosen, int32_t top,
                          perk_logprob *logprobs) {
    double normalizer = perk_log_sum(largest, sum_weights(logits, sampler->vocab_size, largest, PERK_LOG2_E));
    logprobs[0] = (perk_logprob){chosen, logits[chosen]};
    int32_t found = 1 + find_top(logits, sampler->vocab_size, top, logprobs + 1);
    for (int32_t i = 0; i < found; i++) logprobs[i].logprob = (float)((double)logprobs[i].logprob - normalizer);
    for (int32_t i = found; i <= top; i++) logprobs[i] = (perk_logprob){-1, -INFINITY};
}

static int compare_top(const void *a, const void *b) {
    const struct perk_draw_top *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return (x->token > y->token) - (x->token < y->token);
}

void perk_sampler_logprobs(const perk_draw_record *record, int32_t token, int32_t top, perk_logprob *logprobs) {
    struct perk_draw_top best[PERK_DRAW_TOP];
    int32_t found = PERK_MIN(PERK_MIN(record->count, top), (int32_t)PERK_DRAW_TOP);
    double normalizer = perk_log_sum(record->largest, record->sum);
    memcpy(best, record->top, sizeof best);
    qsort(best, (size_t)PERK_MAX(found, 0), sizeof *best, compare_top);
    logprobs[0] = (perk_logprob){token, (float)((double)record->chosen - normalizer)};
    for (int32_t i = 0; i < top; i++)
        logprobs[1 + i] = i < found ? (perk_logprob){best[i].token, (float)((double)best[i].logit - normalizer)}
                                    : (perk_logprob){-1, -INFINITY};
}

perk_status perk_sampler_pick(perk_sampler *sampler, const float *logits, const perk_sampling *sampling,
                              const perk_history *history, int32_t *token, perk_logprob *logprobs, perk_error *err) {
    int32_t best = find_best(logits, sampler->vocab_size);
    if (best < 0 || isinf(logits[best]))
        return perk_fail(err, PERK_INTERNAL,
                         "the logits of a token are not finite numbers: the weights are damaged, or a computation "
                         "overflowed; compare with perk run --backend reference");
    const perk_draw_rule rule = perk_sampling_rule(sampling);
    const float *adjusted = logits;
    int32_t likeliest = best;
    if (perk_sampling_adjusts(sampling)) {
        adjusted = adjust(sampler, logits, sampling, &rule, history);
        likeliest = find_best(adjusted, sampler->vocab_size);
        if (likeliest < 0) likeliest = best; /* penalties on logits near the largest of fp32 */
    }
    *token = likeliest;
    if (rule.scale > 0 && isfinite(adjusted[likeliest]))
        *token = sample(sampler, adjusted, adjusted[likeliest], &rule, (uint64_t)history->answer_length);
    if (logprobs && sampling->logprobs)
        fill_logprobs(sampler, logits, logits[best], *token, sampling->top_logprobs, logprobs);
    return PERK_OK;
}
