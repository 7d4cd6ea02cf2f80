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

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"
#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures/checkpoints"

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

static const char *folder;
static perk_backend backend;
static bool random_weights;
static fake_cuda *fake;

static int take_token(void *user, int32_t token, const char *text, size_t size) {
    (void)user, (void)token;
    CHECK(text[size] == '\0');
    return 0;
}

/* One request step by step, one in one go, and logits. */
static perk_status use_requests(perk_engine *engine) {
    static const int32_t prompt[] = {5, 6, 7};
    static float logits[2 * 2048];
    const perk_sampling random = {.max_tokens = 4, .ignore_eos = 1, .temperature = 0.8f, .top_p = 0.9f, .seed = 3};
    const perk_sampling greedy = {.max_tokens = 3, .ignore_eos = 1};
    perk_request *request;
    CHECK(perk_engine_vocab_size(engine) <= 2048);
    perk_status status = perk_engine_submit(engine, prompt, 3, &random, &request, &err);
    CHECK((status == PERK_OK) == (request != NULL));
    if (!status) status = perk_engine_step(engine, NULL, &err);
    if (!status) status = perk_engine_generate(engine, prompt, 2, &greedy, take_token, NULL, NULL, &err);
    if (!status) status = perk_engine_logits(engine, prompt, 2, logits, &err);
    return status;
}

static perk_status use_engine(void) {
    const perk_engine_options options = {.backend = backend,
                                         .threads = 2,
                                         .random_weights = random_weights,
                                         .cache_folder = scratch,
                                         .config = {.max_num_batched_tokens = 8,
                                                    .max_num_batched_requests = 2,
                                                    .page_size = 16,
                                                    .max_num_pages = 8,
                                                    .max_seq_length = 64}};
    const fake_live none = {0};
    perk_engine *engine;
    perk_status status = perk_engine_open(&engine, folder, &options, &err);
    CHECK((status == PERK_OK) == (engine != NULL));
    if (!status) status = use_requests(engine);
    perk_engine_free(engine);
    CHECK(memcmp(&fake->live, &none, sizeof none) == 0 && fake->swept == 0 && !fake->misuse,
          "something is left on the device");
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

static void choose(const char *model, perk_backend on, bool random) {
    folder = model;
    backend = on;
    random_weights = random;
}

/* ---- the program ---- */

static void open_fake(void) {
    fake_cuda *(*state)(void);
    void *library = dlopen(FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
    CHECK(library, "%s", dlerror());
    *(void **)&state = dlsym(library, "fake_cuda_state");
    CHECK(state);
    fake = state();
    setenv("PERK_LIBCUDA", FAKE_CUDA, 1);
}

int main(void) {
    make_scratch();
    open_fake();
    sweep("tokenizer", use_tokenizer);
    choose(TINY, PERK_BACKEND_REFERENCE, false);
    sweep("reference", use_engine);
    choose(FIXTURES "/sharded", PERK_BACKEND_REFERENCE, false);
    sweep("several files", use_engine);
    choose(FIXTURES "/single", PERK_BACKEND_REFERENCE, true);
    sweep("random weights", use_engine);
    choose(TINY, PERK_BACKEND_GPU, false);
    perk_status status = use_engine(); /* fills the cache */
    if (status == PERK_NO_COMPILER) {
        fprintf(stderr, "skipped the GPU's part: no NVRTC to compile the program with\n");
        return TEST_SKIP;
    }
    CHECK_OK(status);
    sweep("GPU", use_engine);
    return 0;
}
