/* Allocation number n fails, for every n: while an engine opens, makes a step and gives logits, on the reference
 * executor and on the fake driver; while a tokenizer is read and used. Always PERK_OUT_OF_MEMORY, or success where
 * perk can do without; nothing leaks (under the sanitizers), nothing crashes.
 *
 * The linker leads perk's own calls of the malloc family here (--wrap). Those inside libraries are left alone: jansson
 * 2.14 does not survive all failures of its own. */
#include "fake_cuda.h"
#include "perk/engine.h"
#include "src/base.h"
#include "test_cache.h"

#include <stdatomic.h>
#include <stdint.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

static perk_error err;

/* ---- the hook ---- */

static atomic_long allocations; /* since arm() */
static atomic_long failing;     /* 0: none */
static atomic_bool lasting, struck;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
char *__real_strdup(const char *text);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *old, size_t size);
char *__wrap_strdup(const char *text);

static bool fails(void) {
    long number = atomic_fetch_add(&allocations, 1) + 1, n = failing;
    if (n == 0 || number < n || (number > n && !lasting)) return false;
    struck = true;
    return true;
}

void *__wrap_malloc(size_t size) { return fails() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { return fails() ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *old, size_t size) { return fails() ? NULL : __real_realloc(old, size); }
char *__wrap_strdup(const char *text) { return fails() ? NULL : __real_strdup(text); }

static void arm(long n, bool all_after) {
    failing = n;
    lasting = all_after;
    struck = false;
    allocations = 0;
}

static long disarm(void) {
    failing = 0;
    return allocations;
}

/* ---- what is swept ---- */

static perk_backend backend;
static float logits[2 * 2048];

static perk_status use_engine(void) {
    static const int32_t prompt[] = {5, 6, 7};
    const perk_sampling sampling = {.max_tokens = 4, .ignore_eos = 1, .temperature = 0.8f, .top_p = 0.9f, .seed = 3};
    const perk_engine_options options = {.backend = backend,
                                         .threads = 2,
                                         .cache_folder = scratch,
                                         .config = {.max_num_batched_tokens = 8,
                                                    .max_num_batched_requests = 2,
                                                    .page_size = 16,
                                                    .max_num_pages = 8,
                                                    .max_seq_length = 64}};
    perk_engine *engine;
    perk_request *request;
    perk_status status = perk_engine_open(&engine, TINY, &options, &err);
    CHECK((status == PERK_OK) == (engine != NULL));
    if (status) return status;
    CHECK(perk_engine_vocab_size(engine) == 2048);
    status = perk_engine_submit(engine, prompt, 3, &sampling, &request, &err);
    CHECK((status == PERK_OK) == (request != NULL));
    if (!status) status = perk_engine_step(engine, NULL, &err);
    if (!status) status = perk_engine_generate(engine, prompt, 2, NULL, NULL, NULL, NULL, &err);
    if (!status) status = perk_engine_logits(engine, prompt, 2, logits, &err);
    perk_engine_free(engine);
    return status;
}

static perk_status use_tokenizer(void) {
    static const char text[] = "Once upon a time, <|im_start|> it was l\xc3\xa9ger: 12345\n\n  ok";
    perk_tokenizer *tokenizer;
    perk_text_stream *stream = NULL;
    int32_t *ids = NULL;
    char *back = NULL;
    size_t count = 0, size = 0;
    const char *piece;
    perk_status status = perk_tokenizer_load(&tokenizer, TINY, &err);
    CHECK((status == PERK_OK) == (tokenizer != NULL));
    if (!status) status = perk_tokenizer_encode(tokenizer, text, strlen(text), NULL, &ids, &count, &err);
    if (!status) status = perk_tokenizer_decode(tokenizer, ids, count, 0, &back, &size, &err);
    if (!status) status = perk_text_stream_new(&stream, tokenizer, 1, &err);
    for (size_t i = 0; i < count && !status; i++) status = perk_text_stream_push(stream, ids[i], &piece, &size, &err);
    perk_text_stream_free(stream);
    free(ids);
    free(back);
    perk_tokenizer_free(tokenizer);
    return status;
}

static void check(const char *what, perk_status status, long n) {
    CHECK(status == PERK_OK || status == PERK_OUT_OF_MEMORY, "%s, allocation %ld%s: %s: %s", what, n,
          lasting ? " and all after it" : "", perk_status_text(status), err.message);
    CHECK(!status || (err.status == status && strstr(err.message, "memory")), "%s, allocation %ld: %s", what, n,
          err.message);
}

static void sweep(const char *what, perk_status (*use)(void)) {
    arm(0, false);
    CHECK_OK(use());
    long count = disarm(), refused = 0, survived = 0;
    double start = perk_now();
    CHECK(count > 5, "%s: %ld", what, count);
    for (int all_after = 0; all_after < 2; all_after++)
        for (long n = 1; n <= count; n++) {
            memset(&err, 0, sizeof err);
            arm(n, all_after);
            perk_status status = use();
            disarm();
            check(what, status, n);
            refused += status != PERK_OK;
            survived += status == PERK_OK && struck;
        }
    CHECK(refused > count, "%ld of %ld", refused, count);
    fprintf(stderr, "%s: %ld allocations; out of memory %ld times, done without %ld times; %.1f s\n", what, count,
            refused, survived, perk_now() - start);
}

/* ---- the program ---- */

int main(void) {
    make_scratch();
    setenv("PERK_LIBCUDA", FAKE_CUDA, 1);
    sweep("tokenizer", use_tokenizer);
    backend = PERK_BACKEND_REFERENCE;
    sweep("reference", use_engine);
    backend = PERK_BACKEND_GPU;
    perk_status status = use_engine(); /* fills the cache */
    if (status == PERK_NO_COMPILER) {
        fprintf(stderr, "skipped the GPU's part: no NVRTC to compile the program with\n");
        return TEST_SKIP;
    }
    CHECK_OK(status);
    sweep("GPU", use_engine);
    return 0;
}
