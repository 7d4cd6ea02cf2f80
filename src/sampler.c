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

/* Leaves what top-p and min-p leave. */
static void cut_tail(candidate_ranking *ranking, const perk_sampling *sampling, double sum) {
    bool nucleus = sampling->top_p > 0 && sampling->top_p < 1;
    if (!nucleus && !(sampling->min_p > 0)) return;
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
}

static int compare_ids(const void *a, const void *b) {
    int32_t first = ((const candidate *)a)->id, second = ((const candidate *)b)->id;
    return (first > second) - (first < second);
}

/* The candidate in whose share of all weights `uniform` falls. */
static int32_t draw(candidate_ranking *ranking, double uniform) {
    candidate *candidates = ranking->items;
    int32_t count = ranking->count;
    if (ranking->popped) qsort(candidates, (size_t)count, sizeof *candidates, compare_ids); /* else they still are */
    double sum = 0;
    for (int32_t i = 0; i < count; i++) sum += (double)candidates[i].weight;
    double target = uniform * sum;
    int32_t last = candidates[count - 1].id; /* where rounding lets the walk run past the end */
    for (int32_t i = 0; i < count; i++) {
        if (candidates[i].weight > 0) last = candidates[i].id;
        target -= (double)candidates[i].weight;
        if (target < 0) return candidates[i].id;
    }
    return last;
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

static int32_t sample(perk_sampler *sampler, const float *logits, float largest, const perk_sampling *sampling,
                      uint64_t place) {
    candidate_ranking ranking = collect(sampler, logits, sampling->top_k);
    double sum = weigh(&ranking, largest, sampling->temperature);
    cut_tail(&ranking, sampling, sum);
    return draw(&ranking, perk_uniform(sampling->seed, place));
}

/* ---- bias and penalties ---- */

/* Applies the penalties to the tokens that were counted, each once, and clears their counts. */
static void penalize(perk_sampler *sampler, const perk_sampling *sampling, const int32_t *tokens, int32_t count) {
    float repetition = sampling->repetition_penalty > 0 ? sampling->repetition_penalty : 1;
    for (int32_t i = 0; i < count; i++) {
        int32_t token = tokens[i];
        if (token < 0 || token >= sampler->vocab_size || !sampler->seen[token]) continue;
        int32_t times = sampler->seen[token] - 1;
        float logit = sampler->adjusted[token];
        logit = logit > 0 ? logit / repetition : logit * repetition;
        logit -= sampling->frequency_penalty * (float)times;
        if (times) logit -= sampling->presence_penalty;
        sampler->adjusted[token] = logit;
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
                           const perk_history *history) {
    memcpy(sampler->adjusted, logits, (size_t)sampler->vocab_size * sizeof *logits);
    for (int32_t i = 0; i < sampling->bias_count; i++)
        sampler->adjusted[sampling->bias[i].token] += sampling->bias[i].bias;
    bool repetition = sampling->repetition_penalty > 0 && sampling->repetition_penalty != 1;
    if (!repetition && sampling->presence_penalty == 0 && sampling->frequency_penalty == 0) return sampler->adjusted;
    count_tokens(sampler, history);
    penalize(sampler, sampling, history->prompt, history->prompt_length);
    penalize(sampler, sampling, history->answer, history->answer_length);
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

/* logit - log(sum of exp(logits)), the chosen token first. Places past the vocabulary get token -1 and -inf. */
static void fill_logprobs(const perk_sampler *sampler, const float *logits, float largest, int32_t chosen, int32_t top,
                          perk_logprob *logprobs) {
    double sum = 0;
    for (int32_t i = 0; i < sampler->vocab_size; i++)
        if (logits[i] > -INFINITY) sum += (double)expf(logits[i] - largest);
    double normalizer = (double)largest + log(sum);
    logprobs[0] = (perk_logprob){chosen, logits[chosen]};
    int32_t found = 1 + find_top(logits, sampler->vocab_size, top, logprobs + 1);
    for (int32_t i = 0; i < found; i++) logprobs[i].logprob = (float)((double)logprobs[i].logprob - normalizer);
    for (int32_t i = found; i <= top; i++) logprobs[i] = (perk_logprob){-1, -INFINITY};
}

perk_status perk_sampler_pick(perk_sampler *sampler, const float *logits, const perk_sampling *sampling,
                              const perk_history *history, int32_t *token, perk_logprob *logprobs, perk_error *err) {
    int32_t best = find_best(logits, sampler->vocab_size);
    if (best < 0 || isinf(logits[best]))
        return perk_fail(err, PERK_INTERNAL,
                         "the logits of a token are not finite numbers: the weights are damaged, or a computation "
                         "overflowed; compare with perk run --backend reference");
    const float *adjusted = logits;
    int32_t likeliest = best;
    if (perk_sampling_adjusts(sampling)) {
        adjusted = adjust(sampler, logits, sampling, history);
        likeliest = find_best(adjusted, sampler->vocab_size);
        if (likeliest < 0) likeliest = best; /* penalties on logits near the largest of fp32 */
    }
    *token = likeliest;
    if (sampling->temperature > 0 && isfinite(adjusted[likeliest]))
        *token = sample(sampler, adjusted, adjusted[likeliest], sampling, (uint64_t)history->answer_length);
    if (logprobs && sampling->logprobs)
        fill_logprobs(sampler, logits, logits[best], *token, sampling->top_logprobs, logprobs);
    return PERK_OK;
}
