/* Sampling: the distribution is the one asked for, filters keep exactly what they say, draws depend on seed and place
 * alone. */
#include "sampler.h"
#include "test.h"

#include <math.h>

static perk_error err;

static int32_t pick(perk_sampler *sampler, const float *logits, perk_sampling sampling, uint64_t place) {
    int32_t token = -1;
    perk_history history = {.answer_length = (int32_t)place};
    CHECK_OK(perk_sampling_check(&sampling, INT32_MAX, &err));
    CHECK_OK(perk_sampler_pick(sampler, logits, &sampling, &history, &token, NULL, &err));
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

static void test_weights(void) {
    CHECK(perk_weight(3, 3, 1) == UINT64_C(1) << PERK_WEIGHT_ONE_SHIFT);
    CHECK(perk_weight(-INFINITY, 3, 1) == 0 && perk_weight(NAN, 3, 1) == 0 && perk_weight(-3e38f, 3e38f, 1e38f) == 0);
    uint64_t before = UINT64_MAX;
    for (int i = 0; i < 200000; i++) {
        float logit = (float)-i * 2e-4f;
        double wanted = exp((double)logit * 0.7) * 0x1p40, got = (double)perk_weight(logit, 0, 0.7f * PERK_LOG2_E);
        CHECK(fabs(got - wanted) <= 3e-6 * wanted + 1, "weight of %g: %g, wanted %g", (double)logit, got, wanted);
        CHECK(perk_weight(logit, 0, PERK_LOG2_E) <= before);
        before = perk_weight(logit, 0, PERK_LOG2_E);
    }
    for (uint64_t i = 0; i < 1000; i++) {
        uint64_t a = perk_random_bits(1, i), b = perk_random_bits(2, i);
        CHECK(perk_high_product(a, b) == (uint64_t)((unsigned __int128)a * b >> 64));
    }
    static const float rising[] = {-INFINITY, -1e30f, -1, -1e-40f, 0, 1e-40f, 1, 1e30f, INFINITY};
    for (size_t i = 0; i + 1 < PERK_COUNT(rising); i++) {
        CHECK(perk_rank(rising[i]) < perk_rank(rising[i + 1]));
        if (i) CHECK(perk_rank_logit(perk_rank(rising[i])) == rising[i]);
    }
    CHECK(perk_rank(NAN) == PERK_RANK_NONE && perk_rank(-NAN) == PERK_RANK_NONE && perk_rank(-0.0f) == perk_rank(0));
    CHECK(perk_rank(-INFINITY) == PERK_RANK_NONE && perk_rank(INFINITY) == PERK_RANK_INFINITE);
}

/* ---- a distribution against its definition ---- */

enum { VOCAB = 12, DRAWS = 100000 };

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

/* Of what was drawn DRAWS times; tokens that are expected fewer than 5 times are left out. */
static double chi_squared(const int *counts, const double *shares, int *degrees) {
    double chi = 0;
    *degrees = -1;
    for (int i = 0; i < VOCAB; i++) {
        double expected = shares[i] * DRAWS;
        if (expected == 0) CHECK(counts[i] == 0, "token %d was picked and must not be", i);
        if (expected < 5) continue;
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        ++*degrees;
    }
    return chi;
}

static void check_distribution(perk_sampler *sampler, const float *logits, perk_sampling sampling) {
    double shares[VOCAB];
    int counts[VOCAB] = {0}, degrees;
    expected_shares(logits, &sampling, shares);
    for (uint64_t place = 0; place < DRAWS; place++) counts[pick(sampler, logits, sampling, place)]++;
    double chi = chi_squared(counts, shares, &degrees);
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
        {.temperature = 1, .top_k = 6, .min_p = 0.5f},
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
    perk_history none = {0};
    logits[0] = INFINITY;
    CHECK_FAILS(perk_sampler_pick(sampler, logits, &sampling, &none, &token, NULL, &err), PERK_INTERNAL, "not finite");
    for (int i = 0; i < VOCAB; i++) logits[i] = NAN;
    CHECK_FAILS(perk_sampler_pick(sampler, logits, &sampling, &none, &token, NULL, &err), PERK_INTERNAL, "not finite");
}

static void check_refused(perk_sampling sampling, const char *field) {
    CHECK_FAILS(perk_sampling_check(&sampling, VOCAB, &err), PERK_INVALID_ARGUMENT, field);
}

static void test_bad_sampling(void) {
    static const perk_logit_bias outside = {VOCAB, 1}, heavy = {0, 101}, not_a_number = {0, NAN},
                                 fine = {VOCAB - 1, -100};
    static const int32_t negative = -1, last = VOCAB - 1;
    static const char *const none[] = {NULL}, *const empty[] = {"a", ""}, *const broken[] = {"\xe4"};
    static const char *const words[] = {"stop", "\n\n"};
    char long_text[PERK_MAX_STOP_STRING + 2];
    const char *const too_long[] = {long_text};
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = '\0';
    const struct {
        perk_sampling sampling;
        const char *field;
    } cases[] = {
        {{.temperature = -1}, "temperature -1"},
        {{.temperature = NAN}, "temperature"},
        {{.temperature = INFINITY}, "temperature inf"},
        {{.top_k = -1}, "top_k -1"},
        {{.top_p = 1.5f}, "top_p 1.5"},
        {{.top_p = NAN}, "top_p"},
        {{.min_p = -0.1f}, "min_p -0.1"},
        {{.max_tokens = -1}, "max_tokens -1"},
        {{.repetition_penalty = -1}, "repetition_penalty -1"},
        {{.repetition_penalty = 101}, "repetition_penalty 101"},
        {{.repetition_penalty = NAN}, "repetition_penalty"},
        {{.presence_penalty = 2.5f}, "presence_penalty 2.5"},
        {{.presence_penalty = -INFINITY}, "presence_penalty"},
        {{.frequency_penalty = -2.5f}, "frequency_penalty -2.5"},
        {{.bias_count = -1}, "bias_count -1"},
        {{.bias_count = 1}, "bias_count 1"},
        {{.bias_count = PERK_MAX_LOGIT_BIAS + 1, .bias = &fine}, "bias_count 4097"},
        {{.bias_count = 1, .bias = &outside}, "bias 0 is id 12"},
        {{.bias_count = 1, .bias = &heavy}, "bias 101"},
        {{.bias_count = 1, .bias = &not_a_number}, "bias"},
        {{.stop_token_count = 17, .stop_tokens = &last}, "stop_token_count 17"},
        {{.stop_token_count = 1}, "stop_token_count 1"},
        {{.stop_token_count = 1, .stop_tokens = &negative}, "stop_tokens 0 is id -1"},
        {{.logprobs = 1, .top_logprobs = 21}, "top_logprobs 21"},
        {{.logprobs = 1, .top_logprobs = -1}, "top_logprobs -1"},
        {{.top_logprobs = 3}, "without logprobs"},
        {{.stop_string_count = -1}, "stop_string_count -1"},
        {{.stop_string_count = 1}, "stop_string_count 1"},
        {{.stop_string_count = 9, .stop_strings = words}, "stop_string_count 9"},
        {{.stop_string_count = 1, .stop_strings = none}, "stop_strings 0"},
        {{.stop_string_count = 2, .stop_strings = empty}, "stop_strings 1"},
        {{.stop_string_count = 1, .stop_strings = broken}, "stop_strings 0: must be UTF-8"},
        {{.stop_string_count = 1, .stop_strings = too_long}, "of 1 to 256 bytes"},
    };
    for (size_t i = 0; i < PERK_COUNT(cases); i++) check_refused(cases[i].sampling, cases[i].field);
    perk_sampling good = {.repetition_penalty = 1.2f,
                          .bias = &fine,
                          .bias_count = 1,
                          .stop_tokens = &last,
                          .stop_token_count = 1,
                          .logprobs = 1,
                          .top_logprobs = 20,
                          .stop_strings = words,
                          .stop_string_count = 2};
    CHECK_OK(perk_sampling_check(&good, VOCAB, &err));
    CHECK(perk_sampling_stops(&good, last) && !perk_sampling_stops(&good, 0));
    CHECK(perk_sampling_logprob_count(&good) == 21 && perk_sampling_needs_logits(&good));
    CHECK(!perk_sampling_needs_logits(&(perk_sampling){.repetition_penalty = 1, .stop_tokens = &last}));
    perk_sampling copy;
    CHECK_OK(perk_sampling_copy(&copy, &good, &err));
    CHECK(copy.bias != good.bias && copy.bias->token == fine.token && copy.stop_tokens[0] == last);
    for (int i = 0; i < 2; i++) CHECK(copy.stop_strings[i] != words[i] && strcmp(copy.stop_strings[i], words[i]) == 0);
    perk_sampling_free(&copy);
}

/* ---- bias and penalties: hand-computed ---- */

/* Greedy picks with a bias of its own find out what a logit has become: the smallest that makes the token win. */
static float adjusted_logit(perk_sampler *sampler, const float *logits, perk_sampling sampling,
                            const perk_history *history, int32_t token) {
    float raised[VOCAB + 1]; /* the last one is a token that no penalty changes */
    memcpy(raised, logits, VOCAB * sizeof *raised);
    float low = -200, high = 200;
    for (int i = 0; i < 60; i++) {
        raised[VOCAB] = (low + high) / 2;
        perk_logit_bias others[VOCAB];
        int32_t count = 0, picked;
        for (int32_t k = 0; k < VOCAB; k++)
            if (k != token) others[count++] = (perk_logit_bias){k, -100};
        sampling.bias = others;
        sampling.bias_count = count;
        CHECK_OK(perk_sampler_pick(sampler, raised, &sampling, history, &picked, NULL, &err));
        CHECK(picked == token || picked == VOCAB, "token %d", picked);
        *(picked == token ? &low : &high) = raised[VOCAB];
    }
    return low;
}

static void test_penalties(void) {
    static const float logits[VOCAB] = {1, 2, -3, 4, 0, -1, 3, 0.5f, -0.5f, 2, 2, 2};
    static const int32_t tokens[] = {1, 2, 2, 500, -7, 2, 3, 5, 3, 3, 9999}; /* 5 of the prompt, then the answer */
    const perk_history history = {tokens, tokens + 5, 5, 6};
    static const struct {
        perk_sampling sampling;
        float wanted[7]; /* of tokens 0 to 6 */
    } cases[] = {
        {{0}, {1, 2, -3, 4, 0, -1, 3}},
        {{.repetition_penalty = 1}, {1, 2, -3, 4, 0, -1, 3}},
        {{.repetition_penalty = 2}, {1, 1, -6, 2, 0, -2, 3}},
        {{.repetition_penalty = 0.5f}, {1, 4, -1.5f, 8, 0, -0.5f, 3}},
        {{.presence_penalty = 1.5f}, {1, 2, -4.5f, 2.5f, 0, -2.5f, 3}},
        {{.presence_penalty = -1}, {1, 2, -2, 5, 0, 0, 3}},
        {{.frequency_penalty = 0.5f}, {1, 2, -3.5f, 2.5f, 0, -1.5f, 3}},
        {{.repetition_penalty = 2, .presence_penalty = 1, .frequency_penalty = 0.5f},
         {1, 1, -7.5f, -0.5f, 0, -3.5f, 3}},
    };
    perk_sampler *sampler;
    CHECK_OK(perk_sampler_create(&sampler, VOCAB + 1, &err));
    for (size_t i = 0; i < PERK_COUNT(cases); i++)
        for (int32_t token = 0; token < 7; token++) {
            float got = adjusted_logit(sampler, logits, cases[i].sampling, &history, token);
            CHECK(fabsf(got - cases[i].wanted[token]) < 1e-4f, "case %zu: token %d has %g, wanted %g", i, token,
                  (double)got, (double)cases[i].wanted[token]);
        }
    perk_sampler_free(sampler);
}

static void test_bias(perk_sampler *sampler) {
    static const float logits[VOCAB] = {0, 1, 2};
    static const perk_logit_bias bias[] = {{1, 3}, {2, -100}, {7, 2}, {7, 2.5f}};
    perk_sampling sampling = {.bias = bias, .bias_count = 1};
    CHECK(pick(sampler, logits, sampling, 0) == 1);
    sampling.bias_count = 4; /* the biases of 7 add up */
    CHECK(pick(sampler, logits, sampling, 0) == 7);
    sampling.temperature = 1;
    for (uint64_t place = 0; place < 1000; place++) CHECK(pick(sampler, logits, sampling, place) != 2, "banned");
    CHECK(pick(sampler, logits, (perk_sampling){0}, 0) == 2, "nothing stays behind");
}

/* What is drawn under penalties and bias follows the distribution of the changed logits. */
static void test_adjusted_distribution(perk_sampler *sampler) {
    static const float logits[VOCAB] = {1, 2, -1, 1.5f, 0, -1, 2.5f, 0.5f, -0.5f, 2, 2, 2};
    static const int32_t tokens[] = {1, 2, 3, 3, 6}; /* 2 of the prompt, then the answer */
    static const perk_logit_bias bias[] = {{11, -1}, {0, 0.5f}};
    const perk_sampling sampling = {.temperature = 0.8f,
                                    .top_k = 9,
                                    .top_p = 0.95f,
                                    .repetition_penalty = 1.5f,
                                    .presence_penalty = 0.25f,
                                    .frequency_penalty = 0.5f,
                                    .bias = bias,
                                    .bias_count = 2};
    float changed[VOCAB];
    memcpy(changed, logits, sizeof changed);
    changed[11] -= 1;
    changed[0] += 0.5f;
    changed[1] /= 1.5f;
    changed[2] *= 1.5f;
    changed[3] = changed[3] / 1.5f - 1.0f - 0.25f;
    changed[6] = changed[6] / 1.5f - 0.5f - 0.25f;
    double shares[VOCAB];
    int counts[VOCAB] = {0}, degrees;
    expected_shares(changed, &sampling, shares);
    for (uint64_t seed = 0; seed < DRAWS; seed++) {
        perk_sampling seeded = sampling;
        perk_history history = {tokens, tokens + 2, 2, 3};
        int32_t token;
        seeded.seed = seed;
        CHECK_OK(perk_sampler_pick(sampler, logits, &seeded, &history, &token, NULL, &err));
        counts[token]++;
    }
    double chi = chi_squared(counts, shares, &degrees);
    CHECK(degrees > 3 && chi < degrees + 5 * sqrt(2.0 * degrees), "chi-squared %g, %d degrees", chi, degrees);
}

/* The draw itself: the tokens share [0, sum) in the order of their ids, whatever filters ran. */
static void test_draw_order(perk_sampler *sampler) {
    static const float logits[VOCAB] = {1.0f, -2.0f, 3.0f, 0.5f, 2.9f, -8.0f, 2.0f, 1.1f, -0.3f, 2.95f, 0.0f, -30.0f};
    const perk_sampling cases[] = {{.temperature = 1},
                                   {.temperature = 1, .top_k = 4},
                                   {.temperature = 2, .top_p = 0.7f},
                                   {.temperature = 2, .min_p = 0.3f},
                                   {.temperature = 1, .top_k = 8, .top_p = 0.9f}};
    for (size_t c = 0; c < PERK_COUNT(cases); c++) {
        double shares[VOCAB];
        expected_shares(logits, &cases[c], shares);
        for (uint64_t place = 0; place < 5000; place++) {
            double left = perk_uniform(cases[c].seed, place);
            int32_t token = 0;
            for (; token < VOCAB - 1 && left >= shares[token]; token++) left -= shares[token];
            if (left < 1e-6 || left > shares[token] - 1e-6) continue; /* too close to a border to say */
            CHECK(pick(sampler, logits, cases[c], place) == token, "case %zu, place %d", c, (int)place);
        }
    }
}

/* ---- log probabilities ---- */

static void test_logprobs(void) {
    static const float logits[VOCAB] = {1, -2, 3, NAN, 2.9f, -INFINITY, 3, 1.1f, -0.3f, 2.95f, 0, -30};
    static const int32_t order[] = {2, 6, 9, 4, 7, 0, 10, 8, 1, 11}; /* of equal ones the lower id first */
    static const perk_logit_bias bias = {10, 50};
    const perk_sampling sampling = {
        .temperature = 1, .bias = &bias, .bias_count = 1, .logprobs = 1, .top_logprobs = 11};
    const perk_history none = {0};
    perk_logprob got[12];
    perk_sampler *sampler;
    int32_t token;
    CHECK_OK(perk_sampler_create(&sampler, VOCAB, &err));
    CHECK_OK(perk_sampler_pick(sampler, logits, &sampling, &none, &token, got, &err));
    double sum = 0, total = 0;
    for (int i = 0; i < VOCAB; i++) sum += logits[i] > -INFINITY ? exp((double)logits[i]) : 0;
    CHECK(token == 10 && got[0].token == 10, "the bias made %d win", token);
    CHECK(fabs((double)got[0].logprob - ((double)logits[10] - log(sum))) < 1e-5, "of the model, not of the bias");
    for (int i = 0; i < 10; i++) {
        CHECK(got[i + 1].token == order[i], "place %d has token %d", i, got[i + 1].token);
        CHECK(fabs((double)got[i + 1].logprob - ((double)logits[order[i]] - log(sum))) < 1e-5);
        total += exp((double)got[i + 1].logprob);
    }
    CHECK(fabs(total - 1) < 1e-5, "they add up to %g", total);
    CHECK(got[11].token == -1 && isinf(got[11].logprob), "there are only ten");
    perk_sampler_free(sampler);
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
    test_weights();
    test_distributions();
    CHECK_OK(perk_sampler_create(&sampler, VOCAB, &err));
    test_greedy_and_ties(sampler);
    test_odd_numbers(sampler);
    test_bias(sampler);
    test_adjusted_distribution(sampler);
    test_draw_order(sampler);
    perk_sampler_free(sampler);
    test_bad_sampling();
    test_penalties();
    test_logprobs();
    test_large_vocabulary();
    CHECK_FAILS(perk_sampler_create(&sampler, 0, &err), PERK_INVALID_ARGUMENT, "vocabulary");
    return 0;
}
