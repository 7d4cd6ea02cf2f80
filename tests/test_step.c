/* Steps that the caller fills (perk/step.h): greedy tokens are those of the engine's own requests, whatever the caller
 * does with chunks and pages; what cannot be run is refused with the request and the reason, and changes nothing. On
 * the reference executor, and in several programs on the emulator. */
#include "emulated.h"
#include "model_noise.h"
#include "perk/service.h"
#include "perk/step.h"
#include "src/base.h"

#define TINY PERK_SOURCE_DIR "/examples/tiny"
#define FOLDER PERK_SOURCE_DIR "/tests/fixtures/checkpoints/single" /* Qwen3, vocabulary 128, 256 positions */

enum { TEXTS = 2, POSITIONS = 64, PAGE = 16, PAGES = POSITIONS / PAGE, VOCAB = 128 };

static perk_error err;

/* ---- the same tokens ---- */

/* A request of ours. */
typedef struct text {
    int32_t ids[POSITIONS], pages[PAGES];
    int32_t prompt, length, cached, end;
} text;

/* Both begin alike, beyond a page. */
static const char *const PROMPTS[TEXTS] = {
    "Once upon a time there was a little dog who lived in a big house by the sea. One day",
    "Once upon a time there was a little dog who lived in a big house by the sea. He was"};

static perk_engine *open_engine(const char *folder, perk_backend backend, perk_mode mode, const char *cache) {
    perk_engine *engine;
    const perk_engine_options options = {.backend = backend,
                                         .mode = mode,
                                         .cache_folder = cache,
                                         .threads = 2,
                                         .precision = 1,
                                         .program_tokens = {2, 12},
                                         .config = {.max_num_batched_tokens = 12,
                                                    .max_num_batched_requests = TEXTS,
                                                    .max_num_logit_rows = 12,
                                                    .page_size = PAGE,
                                                    .max_num_pages = 3 * PAGES,
                                                    .max_seq_length = POSITIONS}};
    CHECK_OK(perk_engine_open(&engine, folder, &options, &err));
    return engine;
}

static void read_prompts(text *texts) {
    perk_tokenizer *tokenizer;
    CHECK_OK(perk_tokenizer_load(&tokenizer, TINY, &err));
    for (int i = 0; i < TEXTS; i++) {
        int32_t *ids;
        size_t count;
        CHECK_OK(perk_tokenizer_encode(tokenizer, PROMPTS[i], strlen(PROMPTS[i]), NULL, &ids, &count, &err));
        CHECK(count > PAGE && count < 32, "%zu tokens", count);
        texts[i] = (text){.prompt = (int32_t)count, .length = (int32_t)count};
        memcpy(texts[i].ids, ids, count * sizeof *ids);
        free(ids);
    }
    CHECK(memcmp(texts[0].ids, texts[1].ids, PAGE * sizeof(int32_t)) == 0, "the prompts differ too early");
    perk_tokenizer_free(tokenizer);
}

/* The engine's own answers, together. */
static void answer(perk_engine *engine, text *texts, int32_t tokens) {
    perk_request *requests[TEXTS];
    const perk_sampling sampling = {.max_tokens = tokens, .ignore_eos = 1};
    int32_t running = 1;
    for (int i = 0; i < TEXTS; i++)
        CHECK_OK(perk_engine_submit(engine, texts[i].ids, (size_t)texts[i].prompt, &sampling, &requests[i], &err));
    while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
    for (int i = 0; i < TEXTS; i++) {
        size_t count;
        const int32_t *answered = perk_request_tokens(requests[i], &count);
        CHECK((int32_t)count == tokens);
        memcpy(texts[i].ids + texts[i].prompt, answered, count * sizeof *answered);
        texts[i].end = texts[i].prompt + tokens;
        perk_request_free(requests[i]);
    }
}

/* What a text adds to the next step; nothing before the page that it shares is written. */
static bool next_of(text *t, const text *first, int32_t chunk, perk_step_request *request) {
    if (t->length == t->end || (t != first && t->pages[0] == first->pages[0] && first->cached < PAGE)) return false;
    int32_t rest = t->length - t->cached, count = PERK_MIN(rest, chunk);
    *request = (perk_step_request){.token_ids = t->ids + t->cached,
                                   .token_count = count,
                                   .position = t->cached,
                                   .pages = t->pages,
                                   .page_count = PAGES,
                                   .want_logits = count == rest ? PERK_LOGITS_LAST : PERK_LOGITS_NONE};
    return true;
}

static void check_largest(const perk_step_output *output, int32_t row, int32_t vocab) {
    const float *logits = output->logits + (size_t)row * (size_t)vocab;
    for (int32_t i = 0; i < vocab; i++) CHECK(logits[i] <= logits[output->argmax[row]]);
}

/* A loop as embedding programs have it: both texts in the same steps, their prompts in chunks of these sizes. */
static void run_texts(perk_engine *engine, text *texts, const int32_t chunk[TEXTS]) {
    int32_t vocab = perk_engine_vocab_size(engine);
    for (int step = 0;; step++) {
        perk_step_request requests[TEXTS];
        perk_step_output output;
        text *who[TEXTS];
        int32_t count = 0, row = 0;
        for (int i = 0; i < TEXTS; i++)
            if (next_of(&texts[i], texts, chunk[i], &requests[count])) who[count++] = &texts[i];
        if (count == 0) return;
        CHECK_OK(perk_step_run(engine, requests, count, step % 2, &output, &err));
        CHECK(output.argmax && !output.logits == !(step % 2));
        for (int i = 0; i < count; i++) {
            who[i]->cached += requests[i].token_count;
            if (!requests[i].want_logits) continue;
            if (output.logits) check_largest(&output, row, vocab);
            who[i]->ids[who[i]->length++] = output.argmax[row++];
        }
        CHECK(row == output.rows && step < 200);
    }
}

/* Pages in no order, or the first of them shared. */
static void give_pages(text *texts, bool shared) {
    static const int32_t pages[TEXTS][PAGES] = {{7, 2, 11, 0}, {3, 10, 1, 6}};
    for (int i = 0; i < TEXTS; i++) memcpy(texts[i].pages, pages[i], sizeof pages[i]);
    if (!shared) return;
    texts[1].pages[0] = texts[0].pages[0];
    texts[1].cached = PAGE;
}

static void check_texts(perk_engine *engine, const text *want, const int32_t chunk[TEXTS], bool shared) {
    text texts[TEXTS];
    for (int i = 0; i < TEXTS; i++) {
        texts[i] = (text){.prompt = want[i].prompt, .length = want[i].prompt, .end = want[i].end};
        memcpy(texts[i].ids, want[i].ids, (size_t)want[i].prompt * sizeof(int32_t));
    }
    give_pages(texts, shared);
    run_texts(engine, texts, chunk);
    for (int i = 0; i < TEXTS; i++)
        CHECK(memcmp(texts[i].ids, want[i].ids, (size_t)want[i].end * sizeof(int32_t)) == 0, "text %d is another", i);
}

static void test_reference(void) {
    text want[TEXTS];
    perk_engine *own = open_engine(TINY, PERK_BACKEND_REFERENCE, PERK_MODE_SINGLE, NULL);
    perk_engine *engine = open_engine(TINY, PERK_BACKEND_REFERENCE, PERK_MODE_CALLER, NULL);
    read_prompts(want);
    answer(own, want, 30);
    check_texts(engine, want, (const int32_t[]){6, 6}, false);
    check_texts(engine, want, (const int32_t[]){11, 1}, false); /* over pages that were in use before */
    check_texts(engine, want, (const int32_t[]){5, 7}, true);

    /* Logits of all rows, of two requests at once: those of the engine itself. */
    size_t vocab = (size_t)perk_engine_vocab_size(own);
    float *logits = malloc(12 * vocab * sizeof *logits);
    CHECK(logits);
    const int32_t pages[] = {9, 4};
    const perk_step_request both[] = {
        {.token_ids = want[0].ids, .token_count = 5, .pages = pages, .page_count = 1, .want_logits = PERK_LOGITS_ALL},
        {.token_ids = want[1].ids,
         .token_count = 7,
         .pages = pages + 1,
         .page_count = 1,
         .want_logits = PERK_LOGITS_ALL}};
    perk_step_output output;
    CHECK_OK(perk_step_run(engine, both, 2, 1, &output, &err));
    CHECK_OK(perk_engine_logits(own, want[0].ids, 5, logits, &err));
    CHECK_OK(perk_engine_logits(own, want[1].ids, 7, logits + 5 * vocab, &err));
    CHECK(output.rows == 12 && memcmp(output.logits, logits, 12 * vocab * sizeof *logits) == 0);
    free(logits);
    perk_engine_free(own);
    perk_engine_free(engine);
}

static void test_emulated(opened_fake *fake) {
    text want[TEXTS];
    perk_engine_stats stats;
    path_text folder = make_small_model(PERK_SOURCE_DIR), cache = path_in(scratch, "cache");
    perk_engine *own = open_engine(folder.text, PERK_BACKEND_GPU, PERK_MODE_SINGLE, cache.text);
    read_prompts(want);
    answer(own, want, 6);
    perk_engine_free(own);
    perk_engine *engine = open_engine(folder.text, PERK_BACKEND_GPU, PERK_MODE_CALLER, cache.text);
    CHECK(perk_engine_report(engine)->program_count == 2);
    check_texts(engine, want, (const int32_t[]){8, 4}, true);
    perk_engine_statistics(engine, &stats); /* the smallest that fits: a token each, or a piece of a prompt */
    CHECK(stats.program_steps[0] >= 4 && stats.program_steps[1] >= 3, "%llu and %llu",
          (unsigned long long)stats.program_steps[0], (unsigned long long)stats.program_steps[1]);
    perk_engine_free(engine);
    CHECK(!fake->driver->misuse, "%s: %s", fake->driver->misused_in, fake->driver->misuse);
}

/* ---- what is refused ---- */

static perk_engine *open_small(perk_mode mode) {
    perk_engine *engine;
    const perk_engine_options options = {
        .backend = PERK_BACKEND_REFERENCE,
        .mode = mode,
        .threads = 1,
        .random_weights = 1,
        .seed = 5,
        .config = {.max_num_batched_tokens = 24,
                   .max_num_batched_requests = 3,
                   .max_num_logit_rows = 4,
                   .page_size = PAGE,
                   .max_num_pages = 6,
                   .max_seq_length = 48},
    };
    CHECK_OK(perk_engine_open(&engine, FOLDER, &options, &err));
    return engine;
}

static perk_status run(perk_engine *engine, const perk_step_request *requests, int32_t count) {
    perk_step_output output;
    perk_status status = perk_step_run(engine, requests, count, 1, &output, &err);
    CHECK(status == PERK_OK || (output.rows == 0 && !output.argmax && !output.logits));
    return status;
}

static int32_t ids[32], bad_ids[] = {1, 2, VOCAB}, negative_ids[] = {1, -1};

/* The second of two requests is the case; the first has page 1 alone, and is right. */
static void test_fields(perk_engine *engine) {
    static const int32_t pages[] = {2, 3, 4}, outside[] = {2, 6}, negative[] = {-1}, twice[] = {2, 2};
    const struct {
        perk_step_request request;
        perk_status status;
        const char *text;
    } cases[] = {
        {{NULL, 1, 0, pages, 3, 0}, PERK_INVALID_ARGUMENT, "token_ids is NULL"},
        {{ids, 1, 0, NULL, 3, 0}, PERK_INVALID_ARGUMENT, "pages is NULL"},
        {{ids, 0, 0, pages, 3, 0}, PERK_INVALID_ARGUMENT, "0 tokens at position 0"},
        {{ids, -5, 0, pages, 3, 0}, PERK_INVALID_ARGUMENT, "-5 tokens"},
        {{ids, 1, -1, pages, 3, 0}, PERK_INVALID_ARGUMENT, "position -1"},
        {{ids, 1, 48, pages, 3, 0}, PERK_LIMIT, "max_seq_length 48"},
        {{ids, INT32_MAX, INT32_MAX, pages, 3, 0}, PERK_LIMIT, "max_seq_length 48"},
        {{bad_ids, 3, 0, pages, 3, 0}, PERK_INVALID_ARGUMENT, "token_ids[2] is 128, outside the model's vocabulary"},
        {{negative_ids, 2, 0, pages, 3, 0}, PERK_INVALID_ARGUMENT, "token id -1"},
        {{ids, 17, 0, pages, 1, 0}, PERK_INVALID_ARGUMENT, "page_count is 1: positions up to 16 need 2 pages of 16"},
        {{ids, 1, 0, pages, -1, 0}, PERK_INVALID_ARGUMENT, "page_count is -1"},
        {{ids, 17, 0, outside, 2, 0}, PERK_INVALID_ARGUMENT, "page 1 of a request is 6: the pool has pages 0 to 5"},
        {{ids, 1, 0, negative, 1, 0}, PERK_INVALID_ARGUMENT, "page 0 of a request is -1"},
        {{ids, 17, 0, twice, 2, 0}, PERK_INVALID_ARGUMENT, "pages[1] is page 2, which is in the list before"},
        {{ids, 1, 0, pages, 3, (perk_step_logits)3}, PERK_INVALID_ARGUMENT, "want_logits is 3"},
        {{ids, 24, 0, pages, 3, 0}, PERK_LIMIT, "the batch is full"},                /* 1 and 24 of 24 tokens */
        {{ids, 4, 0, pages, 3, PERK_LOGITS_ALL}, PERK_LIMIT, "1 rows of logits; 4"}, /* 1 and 4 of 4 */
        {{ids, 1, 3, pages, 3, 0}, PERK_INVALID_ARGUMENT, "position is 3, but page 2 (pages[0]) has 0 of the 3"},
    };
    const int32_t good[] = {1};
    perk_step_request requests[2] = {{ids, 1, 0, good, 1, PERK_LOGITS_LAST}};
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        requests[1] = cases[i].request;
        CHECK_FAILS(run(engine, requests, 2), cases[i].status, cases[i].text);
        CHECK(strncmp(err.message, "request 1: ", 11) == 0, "%s", err.message);
    }
    CHECK_FAILS(run(engine, requests, 0), PERK_INVALID_ARGUMENT, "a step of no requests");
    CHECK_FAILS(run(engine, requests, -1), PERK_INVALID_ARGUMENT, "a step of no requests");
    CHECK_FAILS(run(engine, NULL, 1), PERK_INVALID_ARGUMENT, "a step of no requests");
    const int32_t four[] = {0, 1, 2, 3};
    perk_step_request many[4];
    for (int i = 0; i < 4; i++) many[i] = (perk_step_request){ids, 1, 0, &four[i], 1, PERK_LOGITS_NONE};
    CHECK_FAILS(run(engine, many, 4), PERK_LIMIT, "request 3: the batch is full: it holds 3 tokens, 3 requests");
    CHECK_OK(run(engine, many, 3)); /* none of that did any harm */
}

/* Pages that two requests have: read by both is right, written by one is not. */
static void test_shared_pages(perk_engine *engine) {
    const int32_t first[] = {5, 0}, second[] = {5, 1}, third[] = {5};
    perk_step_request both[] = {{ids, 16, 0, first, 1, 0}, {ids, 4, 0, third, 1, 0}};
    CHECK_FAILS(run(engine, both, 2), PERK_INVALID_ARGUMENT,
                "request 1: pages[0] is page 5, which request 0 has in the same step, and request 1 would write");
    CHECK_OK(run(engine, both, 1));
    both[0] = (perk_step_request){ids, 2, 16, first, 2, PERK_LOGITS_LAST};
    both[1] = (perk_step_request){ids, 1, 16, second, 2, PERK_LOGITS_LAST};
    CHECK_OK(run(engine, both, 2));
    both[0].position = 18;
    both[1] = (perk_step_request){ids, 1, 15, third, 1, 0}; /* writes its last position again */
    CHECK_FAILS(run(engine, both, 2), PERK_INVALID_ARGUMENT, "request 1 would write");
    const perk_step_request reversed[] = {both[1], both[0]};
    CHECK_FAILS(run(engine, reversed, 2), PERK_INVALID_ARGUMENT,
                "request 1: pages[0] is page 5, which request 0 has in the same step, and request 0 would write");
    both[1] = (perk_step_request){ids, 1, 17, (const int32_t[]){5, 0}, 2, 0};
    CHECK_FAILS(run(engine, both, 2), PERK_INVALID_ARGUMENT, "request 1: pages[1] is page 0");
    CHECK_OK(run(engine, both, 1));
}

/* A gap, in the last page and before it; positions that are written again take those after them along. */
static void test_positions(perk_engine *engine) {
    const int32_t pages[] = {4, 2, 3};
    perk_step_request request = {ids, 20, 0, pages, 3, PERK_LOGITS_LAST};
    perk_step_output output;
    float *logits = malloc(VOCAB * sizeof *logits);
    CHECK(logits);
    CHECK_OK(run(engine, &request, 1));
    request.token_count = 1;
    request.position = 21;
    CHECK_FAILS(run(engine, &request, 1), PERK_INVALID_ARGUMENT,
                "request 0: position is 21, but page 2 (pages[1]) has 4 of the 5 positions before it");
    request.position = 20;
    CHECK_OK(perk_step_run(engine, &request, 1, 1, &output, &err));
    memcpy(logits, output.logits, VOCAB * sizeof *logits);
    request = (perk_step_request){ids + 10, 5, 10, pages, 3, PERK_LOGITS_NONE}; /* back, to go on differently */
    CHECK_OK(perk_step_run(engine, &request, 1, 1, &output, &err));
    CHECK(output.rows == 0);
    request = (perk_step_request){ids, 1, 20, pages, 3, PERK_LOGITS_LAST};
    CHECK_FAILS(run(engine, &request, 1), PERK_INVALID_ARGUMENT, "page 4 (pages[0]) has 15 of the 16");
    request = (perk_step_request){ids + 15, 5, 15, pages, 3, PERK_LOGITS_NONE};
    CHECK_OK(run(engine, &request, 1));
    request = (perk_step_request){ids, 1, 20, pages, 3, PERK_LOGITS_LAST};
    CHECK_OK(perk_step_run(engine, &request, 1, 1, &output, &err));
    CHECK(memcmp(logits, output.logits, VOCAB * sizeof *logits) == 0, "the same text, and other logits");
    free(logits);
}

static void test_mixing(perk_engine *engine) {
    const char *why = "PERK_MODE_CALLER";
    perk_request *request;
    perk_service *service;
    perk_engine *own = open_small(PERK_MODE_SINGLE);
    int32_t page = 0, running;
    float logits[VOCAB];
    const perk_step_request one = {ids, 1, 0, &page, 1, PERK_LOGITS_LAST};
    CHECK_FAILS(run(own, &one, 1), PERK_INVALID_ARGUMENT, why);
    CHECK_OK(perk_engine_logits(own, ids, 1, logits, &err));
    CHECK_FAILS(perk_engine_submit(engine, ids, 1, NULL, &request, &err), PERK_INVALID_ARGUMENT, why);
    CHECK_FAILS(perk_engine_step(engine, &running, &err), PERK_INVALID_ARGUMENT, why);
    CHECK_FAILS(perk_engine_logits(engine, ids, 1, logits, &err), PERK_INVALID_ARGUMENT, why);
    CHECK_FAILS(perk_engine_generate(engine, ids, 1, NULL, NULL, NULL, NULL, &err), PERK_INVALID_ARGUMENT, why);
    CHECK_OK(perk_engine_pause(engine, &err)); /* nothing runs by itself */
    CHECK_OK(run(engine, &one, 1));
    CHECK_FAILS(perk_service_open(&service, open_small(PERK_MODE_CALLER), NULL, &err), PERK_INVALID_ARGUMENT, why);
    CHECK(!service);
    perk_engine_free(own);
}

/* A launch that fails closes the engine. */
static void test_failed_step(opened_fake *fake) {
    path_text cache = path_in(scratch, "not emulated");
    fake->reset_driver();
    fake->reset_compiler();
    perk_engine *engine = open_engine(TINY, PERK_BACKEND_GPU, PERK_MODE_CALLER, cache.text);
    const int32_t page = 0;
    perk_step_request one = {ids, 1, 0, &page, 1, PERK_LOGITS_LAST};
    CHECK_OK(run(engine, &one, 1));
    fake->driver->hang = true;
    one.position = 1;
    CHECK_FAILS(run(engine, &one, 1), PERK_HANG, "waited more than");
    CHECK_FAILS(run(engine, &one, 1), PERK_HANG, "open the engine again");
    perk_engine_free(engine);
}

int main(void) {
    make_scratch();
    some_ids(ids, (int)PERK_COUNT(ids), VOCAB, 1);
    perk_engine *engine = open_small(PERK_MODE_CALLER);
    test_fields(engine);
    test_shared_pages(engine);
    test_positions(engine);
    test_mixing(engine);
    perk_engine_free(engine);
    test_reference();
    opened_fake fake = open_emulator(2);
    if (strstr(EMULATOR_CXX, "NOTFOUND"))
        fprintf(stderr, "without a C++ compiler, no program runs\n");
    else
        test_emulated(&fake);
    test_failed_step(&fake);
    return 0;
}
