/* The scheduler over a fake model whose next token is a hash of everything that its KV pages hold: a page that is lost,
 * shared or stale, a token in the wrong place, or a chunk out of order changes the answer. */
#include "page_secret.h"
#include "sampler.h"
#include "schedule_checks.h"
#include "scheduler.h"

enum { VOCAB = 40, EOS = 7 };

static perk_error err;

/* ---- the fake model ---- */

static uint64_t extend(uint64_t hash, int32_t token) {
    return (hash ^ (uint64_t)(token + 1)) * UINT64_C(0x100000001b3);
}

static void hash_logits(uint64_t hash, float *logits) {
    for (int i = 0; i < VOCAB; i++) logits[i] = (float)(perk_uniform(hash, (uint64_t)i) * 8 - 4);
}

static int32_t largest(const float *logits) {
    int32_t best = 0;
    for (int32_t i = 1; i < VOCAB; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

typedef struct fake_executor {
    perk_config config;
    int32_t *cells; /* [pages][page_size] the token in each position; what a real cache would hold */
    float *logits;
    int32_t *argmax;
} fake_executor;

static void fake_open(fake_executor *fake, const perk_config *config) {
    fake->config = *config;
    fake->cells = calloc((size_t)config->max_num_pages * (size_t)config->page_size, sizeof *fake->cells);
    fake->logits = calloc((size_t)config->max_num_logit_rows * VOCAB, sizeof *fake->logits);
    fake->argmax = calloc((size_t)config->max_num_logit_rows, sizeof *fake->argmax);
    CHECK(fake->cells && fake->logits && fake->argmax);
}

static void fake_close(fake_executor *fake) {
    free(fake->cells);
    free(fake->logits);
    free(fake->argmax);
}

static int32_t *cell(fake_executor *fake, const perk_batch *batch, int32_t request, int32_t position) {
    int32_t size = fake->config.page_size;
    int32_t page = batch->page_table[request * batch->pages_per_request + position / size];
    CHECK(page >= 0 && page < fake->config.max_num_pages);
    return &fake->cells[page * size + position % size];
}

static void fake_step(fake_executor *fake, const perk_batch *batch, bool want_logits, perk_step_result *result) {
    for (int32_t t = 0; t < batch->num_tokens; t++)
        *cell(fake, batch, batch->token_request[t], batch->positions[t]) = batch->token_ids[t];
    for (int32_t row = 0; row < batch->num_logit_rows; row++) {
        int32_t t = batch->logit_rows[row], request = batch->token_request[t];
        CHECK(batch->positions[t] + 1 == batch->kv_length[request]);
        uint64_t hash = 1;
        for (int32_t p = 0; p <= batch->positions[t]; p++) hash = extend(hash, *cell(fake, batch, request, p));
        hash_logits(hash, fake->logits + row * VOCAB);
        fake->argmax[row] = largest(fake->logits + row * VOCAB);
    }
    *result = (perk_step_result){.argmax = fake->argmax, .logits = want_logits ? fake->logits : NULL};
}

/* What a request must answer, computed alone. `logprobs` [answer][perk_sampling_logprob_count] */
static int32_t expected_answer(const perk_config *config, const int32_t *prompt, int32_t length,
                               const perk_sampling *sampling, int32_t *answer, perk_logprob *logprobs,
                               perk_finish *finish) {
    float logits[VOCAB];
    perk_sampler *sampler;
    int32_t count = 0, room = config->max_seq_length - length;
    if (sampling->max_tokens && sampling->max_tokens < room) room = sampling->max_tokens;
    uint64_t hash = 1;
    CHECK_OK(perk_sampler_create(&sampler, VOCAB, &err));
    for (int32_t i = 0; i < length; i++) hash = extend(hash, prompt[i]);
    *finish = PERK_FINISH_LENGTH;
    while (count < room) {
        hash_logits(hash, logits);
        perk_history history = {prompt, answer, length, count};
        CHECK_OK(perk_sampler_pick(sampler, logits, sampling, &history, &answer[count],
                                   logprobs + count * perk_sampling_logprob_count(sampling), &err));
        hash = extend(hash, answer[count++]);
        bool eos = answer[count - 1] == EOS && !sampling->ignore_eos;
        if (!eos && !perk_sampling_stops(sampling, answer[count - 1])) continue;
        *finish = PERK_FINISH_STOP;
        break;
    }
    perk_sampler_free(sampler);
    return count;
}

/* ---- one run: random arrivals, cancellations, a checked step, until all is done ---- */

typedef struct test_job {
    perk_request *request;
    int32_t prompt[64], prompt_length;
    perk_sampling sampling;
    bool cancelled, checked;
} test_job;

static void submit(perk_scheduler *scheduler, const perk_config *config, random_draws *dice, test_job *job) {
    job->prompt_length = roll(dice, 1, PERK_MIN(60, config->max_seq_length - 1));
    for (int32_t i = 0; i < job->prompt_length; i++) job->prompt[i] = roll(dice, 0, VOCAB - 1);
    job->sampling.max_tokens = roll(dice, 0, 1) ? roll(dice, 1, 30) : 0;
    job->sampling.ignore_eos = roll(dice, 0, 1);
    if (roll(dice, 0, 2) == 0) {
        job->sampling.temperature = 0.8f;
        job->sampling.top_k = roll(dice, 0, 10);
        job->sampling.seed = (uint64_t)roll(dice, 0, 5);
    }
    static const perk_logit_bias bias[] = {{3, 2.5f}, {VOCAB - 1, -50}};
    static const int32_t stop_tokens[] = {2, VOCAB - 2};
    job->sampling.bias = bias;
    job->sampling.bias_count = roll(dice, 0, 4) ? 0 : 2;
    job->sampling.stop_tokens = stop_tokens;
    job->sampling.stop_token_count = roll(dice, 0, 3) ? 0 : 2;
    job->sampling.repetition_penalty = roll(dice, 0, 4) ? 0 : 1.3f;
    job->sampling.frequency_penalty = roll(dice, 0, 4) ? 0 : 0.4f;
    job->sampling.logprobs = roll(dice, 0, 2) == 0;
    job->sampling.top_logprobs = job->sampling.logprobs ? roll(dice, 0, 3) : 0;
    CHECK_OK(
        perk_scheduler_submit(scheduler, job->prompt, (size_t)job->prompt_length, &job->sampling, &job->request, &err));
}

static void check_logprobs(const test_job *job, size_t count, const perk_logprob *expected) {
    size_t each = (size_t)perk_sampling_logprob_count(&job->sampling), got = 0;
    for (size_t i = 0; i < count; i++) {
        const perk_logprob *logprobs = perk_request_logprobs(job->request, i, &got);
        CHECK(got == each && (each ? memcmp(logprobs, expected + i * each, each * sizeof *logprobs) == 0 : !logprobs),
              "place %zu", i);
    }
    CHECK(!perk_request_logprobs(job->request, count, &got) && got == 0, "a place without a token");
}

static void check_answer(const perk_config *config, test_job *job) {
    static perk_logprob logprobs[512 * 4];
    int32_t answer[512];
    perk_finish finish;
    size_t count;
    const int32_t *tokens = perk_request_tokens(job->request, &count);
    int32_t expected =
        expected_answer(config, job->prompt, job->prompt_length, &job->sampling, answer, logprobs, &finish);
    if (job->cancelled)
        CHECK(perk_request_finish(job->request) == PERK_FINISH_CANCELLED && (int32_t)count <= expected);
    else
        CHECK(perk_request_finish(job->request) == finish && (int32_t)count == expected, "%d tokens, finish %d",
              (int)count, (int)perk_request_finish(job->request));
    CHECK(memcmp(tokens, answer, count * sizeof *tokens) == 0, "wrong tokens");
    check_logprobs(job, count, logprobs);
    job->checked = true;
}

static void one_step(perk_scheduler *scheduler, fake_executor *fake) {
    const perk_batch *batch;
    bool want_logits;
    perk_step_result result;
    CHECK_OK(perk_scheduler_fill(scheduler, &batch, &want_logits, &err));
    CHECK(batch->num_tokens > 0 || perk_scheduler_unfinished(scheduler) == 0);
    check_schedule(perk_scheduler_schedule(scheduler), 0);
    if (batch->num_tokens == 0) return;
    fake_step(fake, batch, want_logits, &result);
    CHECK_OK(perk_scheduler_commit(scheduler, &result, &err));
    check_schedule(perk_scheduler_schedule(scheduler), 0);
}

static void run_random(uint64_t seed) {
    enum { JOBS = 24, EOS_COUNT = 1 };
    random_draws dice = {.seed = seed};
    int32_t eos = EOS;
    perk_config config = {.page_size = 16};
    config.max_num_batched_tokens = roll(&dice, 1, 20);
    config.max_num_batched_requests = roll(&dice, 1, PERK_MIN(6, config.max_num_batched_tokens));
    config.max_num_logit_rows = roll(&dice, 1, config.max_num_batched_requests);
    config.max_seq_length = roll(&dice, 2, 120);
    int32_t each = (config.max_seq_length + 15) / 16;
    config.max_num_pages = each + roll(&dice, 0, each * 3);

    perk_scheduler *scheduler;
    fake_executor fake;
    fake_open(&fake, &config);
    CHECK_OK(perk_scheduler_create(&scheduler, &config, VOCAB, &eos, EOS_COUNT, seed % 2, &err));
    test_job jobs[JOBS] = {{0}};
    int submitted = 0, steps = 0;
    while (submitted < JOBS || perk_scheduler_unfinished(scheduler) > 0) {
        while (submitted < JOBS && roll(&dice, 0, 3) == 0) submit(scheduler, &config, &dice, &jobs[submitted++]);
        test_job *victim = submitted ? &jobs[roll(&dice, 0, submitted - 1)] : NULL;
        if (victim && !victim->checked && roll(&dice, 0, 60) == 0) {
            victim->cancelled = perk_request_finish(victim->request) == PERK_FINISH_NONE;
            perk_request_cancel(victim->request);
        }
        if (roll(&dice, 0, 40) == 0) { /* somebody borrows pages for a moment */
            int32_t pages[512], count = roll(&dice, 0, config.max_num_pages);
            CHECK(perk_scheduler_borrow(scheduler, count, pages));
            perk_scheduler_return(scheduler, pages, count);
        }
        one_step(scheduler, &fake);
        CHECK(++steps < 100000, "no end");
        for (int i = 0; i < submitted; i++) {
            if (jobs[i].checked || perk_request_finish(jobs[i].request) == PERK_FINISH_NONE) continue;
            check_answer(&config, &jobs[i]);
            if (roll(&dice, 0, 1)) perk_request_free(jobs[i].request); /* the others go with the scheduler */
        }
    }
    CHECK(perk_scheduler_schedule(scheduler)->pool.state->unused == config.max_num_pages);
    perk_scheduler_free(scheduler);
    fake_close(&fake);
}

/* ---- particular cases ---- */

static void test_bad_requests(perk_scheduler *scheduler) {
    perk_request *request;
    int32_t prompt[70] = {0};
    CHECK_FAILS(perk_scheduler_submit(scheduler, prompt, 0, NULL, &request, &err), PERK_INVALID_ARGUMENT, "empty");
    CHECK_FAILS(perk_scheduler_submit(scheduler, NULL, 3, NULL, &request, &err), PERK_INVALID_ARGUMENT, "empty");
    CHECK_FAILS(perk_scheduler_submit(scheduler, prompt, 65, NULL, &request, &err), PERK_LIMIT, "65");
    CHECK_FAILS(perk_scheduler_submit(scheduler, prompt, 64, NULL, &request, &err), PERK_LIMIT, "max_seq_length 64");
    prompt[3] = VOCAB;
    CHECK_FAILS(perk_scheduler_submit(scheduler, prompt, 9, NULL, &request, &err), PERK_INVALID_ARGUMENT, "token 3");
    prompt[3] = -1;
    CHECK_FAILS(perk_scheduler_submit(scheduler, prompt, 9, NULL, &request, &err), PERK_INVALID_ARGUMENT, "id -1");
    perk_sampling bad = {.top_p = 2};
    CHECK_FAILS(perk_scheduler_submit(scheduler, prompt, 2, &bad, &request, &err), PERK_INVALID_ARGUMENT, "top_p");
    CHECK(request == NULL && perk_scheduler_unfinished(scheduler) == 0);
}

/* Two requests that fit together only while they are short: the newer one is set back, and nobody notices. */
static void test_set_back(void) {
    perk_config config = {.max_num_batched_tokens = 8,
                          .max_num_batched_requests = 2,
                          .max_num_logit_rows = 2,
                          .page_size = 16,
                          .max_num_pages = 4,
                          .max_seq_length = 64};
    perk_scheduler *scheduler;
    perk_request *older, *newer;
    fake_executor fake;
    fake_open(&fake, &config);
    CHECK_OK(perk_scheduler_create(&scheduler, &config, VOCAB, NULL, 0, true, &err));
    test_bad_requests(scheduler);
    int32_t prompt[5] = {1, 2, 3, 4, 5};
    CHECK_OK(perk_scheduler_submit(scheduler, prompt, 5, NULL, &older, &err));
    CHECK_OK(perk_scheduler_submit(scheduler, prompt, 4, NULL, &newer, &err));
    bool was_set_back = false;
    while (perk_scheduler_unfinished(scheduler) > 0) {
        one_step(scheduler, &fake);
        was_set_back = perk_scheduler_schedule(scheduler)->state->set_backs > 0;
    }
    CHECK(was_set_back, "the pool was too large for this test");
    test_job jobs[2] = {{.request = older, .prompt_length = 5}, {.request = newer, .prompt_length = 4}};
    for (int i = 0; i < 2; i++) {
        memcpy(jobs[i].prompt, prompt, sizeof prompt);
        jobs[i].sampling.ignore_eos = 1; /* this scheduler knows no end token */
        check_answer(&config, &jobs[i]);
    }
    perk_scheduler_free(scheduler);
    fake_close(&fake);
}

/* What an executor must not give: the scheduler refuses it. */
static void test_bad_results(void) {
    perk_config config = {.max_num_batched_tokens = 4,
                          .max_num_batched_requests = 1,
                          .max_num_logit_rows = 1,
                          .page_size = 16,
                          .max_num_pages = 1,
                          .max_seq_length = 16};
    perk_scheduler *scheduler;
    perk_request *request;
    const perk_batch *batch;
    int32_t prompt[] = {1}, argmax = VOCAB;
    bool want_logits;
    CHECK_OK(perk_scheduler_create(&scheduler, &config, VOCAB, NULL, 0, true, &err));
    CHECK_OK(perk_scheduler_submit(scheduler, prompt, 1, NULL, &request, &err));
    CHECK_OK(perk_scheduler_fill(scheduler, &batch, &want_logits, &err));
    CHECK_FAILS(perk_scheduler_commit(scheduler, &(perk_step_result){.argmax = &argmax}, &err), PERK_INTERNAL,
                "outside");
    CHECK_FAILS(perk_scheduler_commit(scheduler, &(perk_step_result){0}, &err), PERK_INTERNAL, "no logits");
    perk_scheduler_free(scheduler);
}

/* Of pages: SipHash-2-4 with 128 bits, as `openssl mac -macopt size:16 SIPHASH` computes it over 0, 1, 2, ... under the
 * key 0, 1, 2, ... */
static void test_hashes(void) {
    const perk_page_secret secret = {{0x0706050403020100, 0x0f0e0d0c0b0a0908}};
    const perk_page_hash before = {0x0706050403020100, 0x0f0e0d0c0b0a0908};
    unsigned char bytes[64];
    int32_t tokens[16];
    for (int i = 0; i < 64; i++) bytes[i] = (unsigned char)(16 + i);
    memcpy(tokens, bytes, sizeof tokens);
    perk_page_hash one = perk_hash_page(&secret, tokens, 1, before), all = perk_hash_page(&secret, tokens, 16, before);
    CHECK(one.low == 0x7390223f83fc259e && one.high == 0xeb3938e8a544933e);
    CHECK(all.low == 0xf870437ae16ac7d2 && all.high == 0x22f80d5a79a4fb58);
    /* Page by page, and from any page on. */
    perk_page_hash hashes[4], more[4];
    CHECK(perk_hash_pages(&secret, tokens, 4, hashes, 0, 4) == 4 &&
          perk_hash_pages(&secret, tokens, 4, more, 0, 1) == 1);
    CHECK(perk_hash_pages(&secret, tokens, 4, more, 1, 4) == 4 && memcmp(hashes, more, sizeof hashes) == 0);
    CHECK(perk_page_hash_equal(hashes[0], perk_hash_page(&secret, tokens, 4, (perk_page_hash){0, 0})));
    CHECK(perk_page_hash_equal(hashes[3], perk_hash_page(&secret, tokens + 12, 4, hashes[2])));
    CHECK(!perk_page_hash_equal(hashes[3], perk_hash_page(&secret, tokens + 12, 4, hashes[1])));
    perk_page_secret drawn[2];
    for (int i = 0; i < 2; i++) CHECK_OK(perk_page_secret_draw(&drawn[i], &err));
    one = perk_hash_page(&drawn[0], tokens, 16, before);
    all = perk_hash_page(&drawn[1], tokens, 16, before);
    CHECK(one.low != all.low && one.high != all.high, "two engines hash alike");
}

int main(void) {
    test_hashes();
    test_set_back();
    test_bad_results();
    const char *runs = getenv("PERK_TEST_RUNS");
    uint64_t count = runs ? strtoull(runs, NULL, 10) : 300;
    for (uint64_t seed = 0; seed < count; seed++) run_random(seed);
    return 0;
}
