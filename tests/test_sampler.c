/* Sampling: the distribution is the one asked for, filters keep exactly what they say, draws depend on seed and place
 * alone. */
#include "sampler.h"
#include "test.h"

#include <math.h>

static perk_error err;

static int32_t pick(perk_sampler *sampler, const float *logits, perk_sampling sampling, uint64_t place) {
    int32_t token = -1;
    CHECK_OK(perk_sampling_check(&sampling, &err));
    CHECK_OK(perk_sampler_pick(sampler, logits, &sampling, place, &token, &err));
    return token;
}

/* ---- the numbers themselves ---- */

static void test_uniform(void) {
    enum { BINS = 64, DRAWS = 64000 };
    int bins[BINS] = {0};
    double sum = 0;
    for (uint64_t place = 0; place < DRAWS; place++) {
        double u = perk_uniform(7, place);
        CHECK(u >= 0 && u < 1);
        CHECK(u == perk_uniform(7, place));
        bins[(int)(u * BINS)]++;
        sum += u;
    }
    double chi = 0;
    for (int i = 0; i < BINS; i++) chi += (bins[i] - DRAWS / BINS) * (double)(bins[i] - DRAWS / BINS) / (DRAWS / BINS);
    CHECK(chi < 120, "chi-squared %g with 63 degrees of freedom", chi);
    CHECK(fabs(sum / DRAWS - 0.5) < 0.01);
    /* Neighbouring seeds and places share nothing. */
    for (uint64_t seed = 0; seed < 100; seed++)
        for (uint64_t place = 0; place < 100; place++) {
            CHECK(perk_uniform(seed, place + 1) != perk_uniform(seed + 1, place));
            CHECK(perk_uniform(seed, place) != perk_uniform(seed, place + 1));
        }
}

/* ---- a distribution against its definition ---- */

enum { VOCAB = 12, DRAWS = 20000 };

/* Probabilities straight from the definitions, by sorting. */
static void expected_shares(const float *logits, const perk_sampling *sampling, double *shares) {
    int order[VOCAB];
    double weights[VOCAB], sum = 0, kept = 0;
    for (int i = 0; i < VOCAB; i++) order[i] = i;
    for (int i = 1; i < VOCAB; i++)
        for (int j = i; j > 0 && logits[order[j]] > logits[order[j - 1]]; j--) {
            int swap = order[j];
            order[j] = order[j - 1];
            order[j - 1] = swap;
        }
    int count = sampling->top_k ? PERK_MIN(sampling->top_k, VOCAB) : VOCAB;
    for (int i = 0; i < VOCAB; i++) {
        weights[i] = i < count ? exp((double)(logits[order[i]] - logits[order[0]]) / (double)sampling->temperature) : 0;
        sum += weights[i];
        shares[i] = 0;
    }
    double before = 0, top_p = sampling->top_p > 0 && sampling->top_p < 1 ? (double)sampling->top_p : 2;
    for (int i = 0; i < VOCAB; i++) {
        double weight = weights[i];
        if (before >= top_p * sum || weight < (double)sampling->min_p) weights[i] = 0;
        before += weight;
        kept += weights[i];
    }
    for (int i = 0; i < VOCAB; i++) shares[order[i]] = weights[i] / kept;
}

static void check_distribution(perk_sampler *sampler, const float *logits, perk_sampling sampling) {
    double shares[VOCAB], chi = 0;
    int counts[VOCAB] = {0}, degrees = -1;
    expected_shares(logits, &sampling, shares);
    for (uint64_t place = 0; place < DRAWS; place++) counts[pick(sampler, logits, sampling, place)]++;
    for (int i = 0; i < VOCAB; i++) {
        double expected = shares[i] * DRAWS;
        if (expected == 0) CHECK(counts[i] == 0, "token %d was picked and must not be", i);
        if (expected < 5) continue;
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        degrees++;
    }
    CHECK(degrees <= 0 || chi < degrees + 5 * sqrt(2.0 * degrees), "chi-squared %g, %d degrees (T %g k %d p %g m %g)",
          chi, degrees, (double)sampling.temperature, sampling.top_k, (double)sampling.top_p, (double)sampling.min_p);
}

static void test_distributions(void) {
    static const float logits[VOCAB] = {1.0f, -2.0f, 3.0f, 0.5f, 2.9f, -8.0f, 2.0f, 1.1f, -0.3f, 2.95f, 0.0f, -30.0f};
    static const perk_sampling cases[] = {
        {.temperature = 1},
        {.temperature = 0.3f},
        {.temperature = 5},
        {.temperature = 1, .top_k = 1},
        {.temperature = 1, .top_k = 3},
        {.temperature = 1, .top_k = VOCAB + 5},
        {.temperature = 1, .top_p = 0.5f},
        {.temperature = 2, .top_p = 0.9f},
        {.temperature = 1, .top_p = 1e-6f},
        {.temperature = 1, .min_p = 0.2f},
        {.temperature = 1, .min_p = 1},
        {.temperature = 1.5f, .top_k = 6, .top_p = 0.8f},
        {.temperature = 1.5f, .top_k = 8, .top_p = 0.95f, .min_p = 0.15f, .seed = 99},
    };
    perk_sampler *sampler;
    CHECK_OK(perk_sampler_create(&sampler, VOCAB, &err));
    for (size_t i = 0; i < PERK_COUNT(cases); i++) check_distribution(sampler, logits, cases[i]);
    perk_sampler_free(sampler);
}

/* ---- particular cases ---- */

static void test_greedy_and_ties(perk_sampler *sampler) {
    float logits[VOCAB] = {0, 5, 5, 1};
    CHECK(pick(sampler, logits, (perk_sampling){0}, 0) == 1, "the lowest index among equals");
    for (uint64_t place = 0; place < 200; place++) {
        CHECK(pick(sampler, logits, (perk_sampling){.temperature = 1, .top_k = 1}, place) == 1);
        CHECK(pick(sampler, logits, (perk_sampling){.temperature = 1e-30f}, place) <= 2);
        int32_t token = pick(sampler, logits, (perk_sampling){.temperature = 1, .top_k = 2}, place);
        CHECK(token == 1 || token == 2);
    }
}

static void test_odd_numbers(perk_sampler *sampler) {
    float logits[VOCAB];
    for (int i = 0; i < VOCAB; i++) logits[i] = -INFINITY;
    logits[3] = NAN;
    logits[4] = -1e30f;
    logits[7] = 1;
    for (uint64_t place = 0; place < 100; place++) {
        CHECK(pick(sampler, logits, (perk_sampling){.temperature = 3}, place) == 7);
        CHECK(pick(sampler, logits, (perk_sampling){.temperature = 3, .top_p = 0.99f, .top_k = 9}, place) == 7);
    }
    CHECK(pick(sampler, logits, (perk_sampling){0}, 0) == 7);
    int32_t token;
    perk_sampling sampling = {.temperature = 1};
    logits[0] = INFINITY;
    CHECK_FAILS(perk_sampler_pick(sampler, logits, &sampling, 0, &token, &err), PERK_INTERNAL, "not finite");
    for (int i = 0; i < VOCAB; i++) logits[i] = NAN;
    CHECK_FAILS(perk_sampler_pick(sampler, logits, &sampling, 0, &token, &err), PERK_INTERNAL, "not finite");
}

static void test_bad_sampling(void) {
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.temperature = -1}, &err), PERK_INVALID_ARGUMENT, "temperature");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.temperature = NAN}, &err), PERK_INVALID_ARGUMENT, "temperature");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.temperature = INFINITY}, &err), PERK_INVALID_ARGUMENT,
                "temperat");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.top_k = -1}, &err), PERK_INVALID_ARGUMENT, "top_k");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.top_p = 1.5f}, &err), PERK_INVALID_ARGUMENT, "top_p");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.top_p = NAN}, &err), PERK_INVALID_ARGUMENT, "top_p");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.min_p = -0.1f}, &err), PERK_INVALID_ARGUMENT, "min_p");
    CHECK_FAILS(perk_sampling_check(&(perk_sampling){.max_tokens = -1}, &err), PERK_INVALID_ARGUMENT, "max_tokens");
}

/* A real vocabulary: the heap keeps what a full sort would keep. */
static void test_large_vocabulary(void) {
    enum { LARGE = 151936, KEEP = 50 };
    perk_sampler *sampler;
    float *logits = malloc(LARGE * sizeof *logits);
    CHECK(logits);
    CHECK_OK(perk_sampler_create(&sampler, LARGE, &err));
    for (int i = 0; i < LARGE; i++) logits[i] = (float)(perk_uniform(1, (uint64_t)i) * 20 - 10);
    for (uint64_t place = 0; place < 20; place++) {
        perk_sampling sampling = {.temperature = 2, .top_k = KEEP, .seed = place};
        int32_t token = pick(sampler, logits, sampling, place), better = 0;
        CHECK(token == pick(sampler, logits, sampling, place), "same seed, same token");
        for (int i = 0; i < LARGE; i++) better += logits[i] > logits[token];
        CHECK(better < KEEP, "%d tokens are better than one of the best %d", better, KEEP);

        sampling = (perk_sampling){.temperature = 1.5f, .top_p = 0.6f, .min_p = 0.01f, .seed = place};
        token = pick(sampler, logits, sampling, place);
        double sum = 0, before = 0, largest = 0;
        for (int i = 0; i < LARGE; i++) {
            double weight = exp((double)logits[i] / 1.5);
            sum += weight;
            before += logits[i] > logits[token] ? weight : 0;
            largest = fmax(largest, weight);
        }
        CHECK(before < 0.6 * sum * (1 + 1e-5), "%g of the weight is better than a token of the nucleus", before / sum);
        CHECK(exp((double)logits[token] / 1.5) >= 0.00999 * largest, "lighter than min_p");
    }
    perk_sampler_free(sampler);
    free(logits);
}

int main(void) {
    perk_sampler *sampler;
    test_uniform();
    test_distributions();
    CHECK_OK(perk_sampler_create(&sampler, VOCAB, &err));
    test_greedy_and_ties(sampler);
    test_odd_numbers(sampler);
    perk_sampler_free(sampler);
    test_bad_sampling();
    test_large_vocabulary();
    CHECK_FAILS(perk_sampler_create(&sampler, 0, &err), PERK_INVALID_ARGUMENT, "vocabulary");
    return 0;
}
