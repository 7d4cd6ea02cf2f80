/* Allocation number n fails, for every n, in every public entry point that allocates: engines on the reference executor
 * and on the fake driver, warm and cold, tokenizers, chats, the cache, and what the commands do. Always
 * PERK_OUT_OF_MEMORY, or success where perk can do without; nothing leaks (under the sanitizers), nothing crashes. An
 * engine whose step failed is closed, every other one goes on and gives the same tokens.
 *
 * The linker leads perk's own calls of the malloc family here (--wrap). Those of the libraries below perk are told
 * apart by where they come from, and fail in sweeps of their own (not under the sanitizers, whose malloc it is then).
 */
#include "open_fake.h"
#include "perk/service.h"
#include "perk/step.h"
#include "perk/test.h"
#include "src/base.h"
#include "test_cache.h"

#include "src/cli/cli.h"

#include <link.h>
#include <stdatomic.h>
#include <stdint.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"
#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures/checkpoints"
#define EXPERTS PERK_SOURCE_DIR "/tests/fixtures/qwen3_moe/some_layers"

static perk_error err;

/* ---- the hook ---- */

static atomic_long allocations; /* since arm() */
static atomic_long failing;     /* 0: none */
static atomic_bool lasting, struck, paused;
static uintptr_t library_begin, library_end; /* whose calls count instead of perk's; 0: perk's */

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
char *__real_strdup(const char *text);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *old, size_t size);
char *__wrap_strdup(const char *text);

static bool fails(void) {
    if (paused) return false;
    long number = atomic_fetch_add(&allocations, 1) + 1, n = failing;
    if (n == 0 || number < n || (number > n && !lasting)) return false;
    struck = true;
    return true;
}

static bool perk_fails(void) { return library_begin == 0 && fails(); }

void *__wrap_malloc(size_t size) { return perk_fails() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { return perk_fails() ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *old, size_t size) { return perk_fails() ? NULL : __real_realloc(old, size); }
char *__wrap_strdup(const char *text) { return perk_fails() ? NULL : __real_strdup(text); }

/* ---- the hook for the libraries ---- */

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAS_OWN_MALLOC 1
#endif
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(HAS_OWN_MALLOC)
#define CAN_FAIL_LIBRARIES 1
#else
#define CAN_FAIL_LIBRARIES 0
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/lsan_interface.h>
#endif

#if CAN_FAIL_LIBRARIES
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *old, size_t size);

static bool library_fails(const void *caller) {
    return (uintptr_t)caller >= library_begin && (uintptr_t)caller < library_end && fails();
}

#define EXPORT __attribute__((visibility("default")))
EXPORT void *malloc(size_t size) { return library_fails(__builtin_return_address(0)) ? NULL : __libc_malloc(size); }
EXPORT void *calloc(size_t count, size_t size) {
    return library_fails(__builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}
EXPORT void *realloc(void *old, size_t size) {
    return library_fails(__builtin_return_address(0)) ? NULL : __libc_realloc(old, size);
}
#endif

static int take_code_of(struct dl_phdr_info *info, size_t size, void *name) {
    (void)size;
    if (!strstr(info->dlpi_name, name)) return 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            library_begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            library_end = library_begin + info->dlpi_phdr[i].p_memsz;
        }
    return 1;
}

static void count_calls_of(const char *library) {
    library_begin = library_end = 0;
    if (library) CHECK(dl_iterate_phdr(take_code_of, (void *)(uintptr_t)library) == 1, "%s", library);
}

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

/* ---- what is swept: engines ---- */

enum { ANSWER = 3 };

static const char *folder, *cache_folder; /* no cache: NULL */
static perk_backend backend;
static bool random_weights;
static fake_cuda *fake;
static int32_t answer[ANSWER]; /* what an engine gives that nothing failed in */
static bool has_answer;

typedef struct token_list {
    int32_t items[ANSWER];
    int count;
} token_list;

static int take_token(void *user, int32_t token, const char *text, size_t size) {
    token_list *list = user;
    CHECK(text[size] == '\0' && list->count < ANSWER);
    list->items[list->count++] = token;
    return 0;
}

/* The tokens of a prompt; they are always the same. */
static perk_status generate(perk_engine *engine) {
    static const int32_t prompt[] = {5, 6};
    const perk_sampling greedy = {.max_tokens = ANSWER, .ignore_eos = 1};
    token_list list = {.count = 0};
    perk_status status = perk_engine_generate(engine, prompt, 2, &greedy, take_token, &list, NULL, &err);
    if (status) return status;
    CHECK(list.count == ANSWER);
    if (!has_answer) memcpy(answer, list.items, sizeof answer);
    has_answer = true;
    CHECK(memcmp(answer, list.items, sizeof answer) == 0, "other tokens than before");
    return PERK_OK;
}

static perk_status generate_from_text(perk_engine *engine) {
    static const char *const stops[] = {"not in there"};
    const perk_sampling greedy = {.max_tokens = ANSWER, .ignore_eos = 1, .stop_strings = stops, .stop_string_count = 1};
    token_list list = {.count = 0};
    if (!perk_engine_tokenizer(engine)) return PERK_OK;
    return perk_engine_generate_text(engine, "Once upon", &greedy, take_token, &list, NULL, &err);
}

/* One request step by step, two in one go, and logits. *in_step: the failure was a step's. */
static perk_status use_requests(perk_engine *engine, bool *in_step) {
    static const int32_t prompt[] = {5, 6, 7};
    static float logits[2 * 2048];
    const perk_sampling random = {.max_tokens = 4, .ignore_eos = 1, .temperature = 0.8f, .top_p = 0.9f, .seed = 3};
    perk_request *request;
    CHECK(perk_engine_vocab_size(engine) <= 2048);
    perk_status status = perk_engine_submit(engine, prompt, 3, &random, &request, &err);
    CHECK((status == PERK_OK) == (request != NULL));
    if (!status) *in_step = (status = perk_engine_step(engine, NULL, &err)) != PERK_OK;
    if (!status) status = generate(engine);
    if (!status) status = generate_from_text(engine);
    if (!status) status = perk_engine_logits(engine, prompt, 2, logits, &err);
    return status;
}

/* After a failure, with memory again: closed for good in the same words, or as good as new. A failed step closes. */
static void check_usable_or_closed(perk_engine *engine, bool in_step) {
    const perk_error first = err;
    const int32_t id = 1;
    perk_request *request;
    paused = true;
    if (in_step || perk_engine_step(engine, NULL, &err) != PERK_OK) {
        CHECK_FAILS(perk_engine_step(engine, NULL, &err), PERK_OUT_OF_MEMORY, first.message);
        CHECK_FAILS(perk_engine_submit(engine, &id, 1, NULL, &request, &err), PERK_OUT_OF_MEMORY, first.message);
    } else {
        CHECK_OK(generate(engine));
    }
    err = first;
    paused = false;
}

static perk_status use_engine(void) {
    const perk_engine_options options = {.backend = backend,
                                         .threads = 2,
                                         .random_weights = random_weights,
                                         .cache_folder = cache_folder,
                                         .no_cache = !cache_folder,
                                         .config = {.max_num_batched_tokens = 8,
                                                    .max_num_batched_requests = 2,
                                                    .page_size = 16,
                                                    .max_num_pages = 8,
                                                    .max_seq_length = 64}};
    const fake_live none = {0};
    perk_engine *engine;
    bool in_step = false;
    perk_status status = perk_engine_open(&engine, folder, &options, &err);
    CHECK((status == PERK_OK) == (engine != NULL));
    if (!status) status = use_requests(engine, &in_step);
    if (engine && status) check_usable_or_closed(engine, in_step);
    perk_engine_free(engine);
    CHECK(memcmp(&fake->live, &none, sizeof none) == 0 && fake->swept == 0 && !fake->misuse,
          "something is left on the device");
    return status;
}

/* A service: it opens or not, takes a request or not, and the request ends well or with the failure. */
static perk_status use_service(void) {
    static const int32_t prompt[] = {5, 6, 7};
    const perk_engine_options options = {.backend = backend, .threads = 1, .random_weights = random_weights};
    const perk_sampling sampling = {.max_tokens = 3, .ignore_eos = 1};
    perk_engine *engine;
    perk_service *service = NULL;
    perk_answer got = {0};
    uint64_t id = 0;
    int32_t tokens[3];
    size_t count = 0;
    perk_status status = perk_engine_open(&engine, folder, &options, &err);
    if (!status) status = perk_service_open(&service, engine, NULL, &err);
    CHECK((status == PERK_OK) == (service != NULL));
    if (!status) status = perk_service_submit(service, prompt, 3, &sampling, &id, &err);
    CHECK((status == PERK_OK) == (id != 0));
    while (!status && got.finish == PERK_FINISH_NONE) {
        status = perk_service_wait(service, id, tokens + count, 3 - count, -1, &got, &err);
        count += got.count;
    }
    CHECK(status || count == 3);
    if (id) CHECK(perk_service_release(service, id, NULL) == PERK_OK);
    perk_service_free(service);
    return status;
}

/* Steps that the caller fills. */
static perk_status use_steps(void) {
    static const int32_t ids[] = {5, 6, 7}, page = 3;
    const perk_engine_options options = {
        .backend = backend, .mode = PERK_MODE_CALLER, .threads = 1, .random_weights = random_weights};
    perk_engine *engine;
    perk_status status = perk_engine_open(&engine, folder, &options, &err);
    CHECK((status == PERK_OK) == (engine != NULL));
    for (int32_t i = 0; i < 3 && !status; i++) {
        const perk_step_request request = {&ids[i], 1, i, &page, 1, PERK_LOGITS_LAST};
        perk_step_output output;
        status = perk_step_run(engine, &request, 1, 1, &output, &err);
        CHECK(output.rows == (status == PERK_OK));
    }
    perk_engine_free(engine);
    return status;
}

/* ---- text ---- */

/* jansson 2.14 does not look whether the buffer of the string that it reads could grow: where it could not, the string
 * lacks a byte, and the parse succeeds. perk cannot see that. */
static bool may_go_unnoticed;
static long unnoticed;

/* What a tokenizer gave that nothing failed in. */
typedef struct known_ids {
    int32_t *ids;
    size_t count;
} known_ids;
static known_ids known_bytes, known_marks;

static void check_ids(known_ids *known, const int32_t *ids, size_t count) {
    if (!known->ids) {
        known->count = count;
        known->ids = __real_malloc(count * sizeof *ids);
        CHECK(known->ids);
        memcpy(known->ids, ids, count * sizeof *ids);
    }
    bool same = count == known->count && memcmp(ids, known->ids, count * sizeof *ids) == 0;
    CHECK(same || may_go_unnoticed, "other ids than before");
    unnoticed += !same;
}

/* A text there and back. */
static perk_status use_loaded(const perk_tokenizer *tokenizer, known_ids *known) {
    static const char text[] = "Once upon a time, <|im_start|> it was l\xc3\xa9ger: 12345\n\n  ok";
    perk_text_stream *stream = NULL;
    int32_t *ids = NULL;
    char *back = NULL;
    size_t count = 0, size = 0;
    const char *piece;
    perk_status status = perk_tokenizer_encode(tokenizer, text, strlen(text), NULL, &ids, &count, &err);
    if (!status) check_ids(known, ids, count);
    if (!status) status = perk_tokenizer_decode(tokenizer, ids, count, 0, &back, &size, &err);
    if (!status) status = perk_text_stream_new(&stream, tokenizer, 1, &err);
    for (size_t i = 0; i < count && !status; i++) status = perk_text_stream_push(stream, ids[i], &piece, &size, &err);
    perk_text_stream_free(stream);
    free(ids);
    free(back);
    return status;
}

static perk_status use_tokenizer(void) {
    perk_tokenizer *tokenizer;
    perk_status status = perk_tokenizer_load(&tokenizer, TINY, &err);
    CHECK((status == PERK_OK) == (tokenizer != NULL));
    if (!status) status = use_loaded(tokenizer, &known_bytes);
    perk_tokenizer_free(tokenizer);
    return status;
}

static perk_status use_sentencepiece(void) {
    perk_tokenizer *tokenizer = NULL;
    char *json = NULL;
    size_t size = 0;
    const char *path = PERK_SOURCE_DIR "/tests/fixtures/tokenizer_sentencepiece.json";
    perk_status status = perk_read_file(path, 1 << 20, &json, &size, &err);
    if (!status) status = perk_tokenizer_load_buffer(&tokenizer, json, size, &err);
    if (!status) status = use_loaded(tokenizer, &known_marks);
    perk_tokenizer_free(tokenizer);
    free(json);
    return status;
}

static perk_status use_chat(void) {
    static const perk_chat_message messages[] = {{"system", "Be brief."}, {"user", "Hello"}};
    static const perk_chat_family families[] = {PERK_CHAT_QWEN3, PERK_CHAT_LLAMA3, PERK_CHAT_DEEPSEEK,
                                                PERK_CHAT_MISTRAL};
    perk_status status = PERK_OK;
    for (size_t i = 0; i < PERK_COUNT(families) && !status; i++) {
        char *text = NULL;
        status = perk_chat_format_as(families[i], messages, 2, 1, &text, &err);
        CHECK((status == PERK_OK) == (text != NULL));
        free(text);
    }
    return status;
}

/* ---- test mode ---- */

static perk_status use_test_mode(void) {
    const perk_test_options options = {.backend = backend, .rows = 4, .seed = 1, .threads = 1, .cache_folder = scratch};
    perk_test_difference difference;
    perk_test *test;
    perk_status status = perk_test_create(&test, &options, &err);
    if (status) return status;
    perk_graph *graph = perk_test_graph(test);
    perk_tensor *x = perk_input(graph, "x", 256), *w = perk_attach_matrix(graph, "w", 64, 256);
    perk_tensor *y = perk_linear(graph, "y", x, w, NULL);
    status = perk_test_run(test, &err);
    if (!status) status = perk_test_compare(test, y, NULL, 0, &difference, &err);
    perk_test_free(test);
    return status;
}

/* ---- the cache, which never makes a start fail ---- */

static perk_status make_small(void *user, perk_cache_blob *out, perk_error *error) {
    (void)error;
    *out = (perk_cache_blob){__real_malloc(4), 4};
    CHECK(out->data);
    memcpy(out->data, user, 4);
    return PERK_OK;
}

static int visit_entry(void *user, const perk_cache_entry *entry) {
    (void)user, (void)entry;
    return 0;
}

static void get_small(perk_cache *cache, uint32_t number) {
    static char bytes[] = "data";
    perk_cache_blob blob;
    const perk_cache_key key = {.bytes = {(uint8_t)number}};
    CHECK_OK(perk_cache_get_or_make(cache, &key, make_small, bytes, &blob, NULL, &err));
    CHECK(blob.size == 4 && memcmp(blob.data, bytes, 4) == 0);
    perk_cache_blob_free(&blob);
}

static perk_status use_cache(void) {
    perk_cache *cache;
    perk_cache_key key;
    path_text place = path_in(scratch, "small");
    const char *others[] = {scratch};
    const perk_cache_options options = {.folder = place.text, .read_only_folders = others, .read_only_count = 1};
    perk_cache_key_builder *builder = perk_cache_key_begin();
    perk_cache_key_add(builder, "a", "b", 1);
    perk_status status = perk_cache_key_finish(builder, &key, &err);
    if (!status) status = perk_cache_open(&cache, &options, &err);
    if (status) return status;
    for (uint32_t i = 0; i < 3; i++) get_small(cache, i / 2); /* missed, hit, missed */
    status = perk_cache_list(cache, visit_entry, NULL, &err);
    if (!status) status = perk_cache_verify(cache, 1, NULL, &err);
    if (!status) status = perk_cache_prune(cache, 100, NULL, &err);
    if (!status) status = perk_cache_clear(cache, NULL, &err);
    perk_cache_free(cache);
    return status;
}

/* ---- the commands ---- */

static int said, true_stderr; /* a file for what a command says; the way out for what the test and a sanitizer say */
static int (*command)(const perk_cli_command *self, int argc, char **argv);
static const char *command_line[8];

/* What a command says is its error. */
static perk_status use_command(void) {
    const perk_cli_command self = {.name = "test", .summary = "", .usage = ""};
    char *arguments[PERK_COUNT(command_line) + 1] = {NULL};
    int count = 0;
    for (; count < (int)PERK_COUNT(command_line) && command_line[count]; count++)
        arguments[count] = (char *)(uintptr_t)command_line[count];
    CHECK(ftruncate(said, 0) == 0 && dup2(said, STDERR_FILENO) >= 0);
    int code = command(&self, count, arguments);
    fflush(stdout);
    CHECK(fflush(stderr) == 0 && dup2(true_stderr, STDERR_FILENO) >= 0);
    ssize_t size = pread(said, err.message, sizeof err.message - 1, 0);
    CHECK(size >= 0);
    err.message[size] = '\0';
    CHECK(code == PERK_EXIT_OK || code == PERK_EXIT_FAILURE, "%d: %s", code, err.message);
    return err.status = code == PERK_EXIT_OK ? PERK_OK : PERK_OUT_OF_MEMORY; /* the words tell */
}

static void check(const char *what, perk_status status, long n) {
    CHECK(status == PERK_OK || status == PERK_OUT_OF_MEMORY, "%s, allocation %ld%s: %s: %s", what, n,
          lasting ? " and all after it" : "", perk_status_text(status), err.message);
    CHECK(!status || (err.status == status && strstr(err.message, "memory")), "%s, allocation %ld: %s", what, n,
          err.message);
}

static const char *only = ""; /* sweeps whose name contains it */

static void sweep(const char *what, perk_status (*use)(void)) {
    if (!strstr(what, only)) return;
    arm(0, false);
    CHECK_OK(use());
    long count = disarm(), refused = 0, survived = 0;
    double start = perk_now();
    CHECK(count > 2, "%s: %ld", what, count);
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
    CHECK(refused > count / 2, "%ld of %ld", refused, count);
#if !CAN_FAIL_LIBRARIES
    CHECK(!__lsan_do_recoverable_leak_check(), "%s leaks", what);
#endif
    fprintf(stderr, "%s: %ld allocations; out of memory %ld times, done without %ld times; %.1f s\n", what, count,
            refused, survived, perk_now() - start);
}

/* Calls of a library fail: every one of the first 200, then some. by_its_name: it says that it was memory. */
static void sweep_library(const char *library, const char *what, perk_status (*use)(void), bool by_its_name) {
    if (!CAN_FAIL_LIBRARIES || !strstr(library, only)) return;
    count_calls_of(library);
    may_go_unnoticed = !by_its_name;
    unnoticed = 0;
    arm(0, false);
    CHECK_OK(use());
    long count = disarm(), tried = 0, refused = 0, unnamed = 0;
    CHECK(count > 1, "%s in %s: %ld", library, what, count);
    for (int all_after = 0; all_after < 2; all_after++)
        for (long n = 1; n <= count; n += n < 200 ? 1 : 1 + count / 50, tried++) {
            memset(&err, 0, sizeof err);
            arm(n, all_after);
            perk_status status = use();
            disarm();
            refused += status != PERK_OK;
            unnamed += status != PERK_OK && status != PERK_OUT_OF_MEMORY;
            CHECK(status == PERK_OK || (err.status == status && strlen(err.message) > 20), "%s: %s", what, err.message);
            CHECK(!by_its_name || status == PERK_OK || status == PERK_OUT_OF_MEMORY, "%s in %s, %ld: %s", library, what,
                  n, err.message);
        }
    count_calls_of(NULL);
    fprintf(stderr, "%s in %s: %ld allocations, %ld failed: refused %ld times, %ld as something else; unnoticed %ld\n",
            library, what, count, tried, refused, unnamed, unnoticed);
}

static void choose(const char *model, perk_backend on, bool random) {
    has_answer = false;
    folder = model;
    backend = on;
    random_weights = random;
    cache_folder = scratch;
}

static void sweep_engines(void) {
    choose(TINY, PERK_BACKEND_REFERENCE, false);
    sweep("reference", use_engine);
    choose(FIXTURES "/sharded", PERK_BACKEND_REFERENCE, false);
    sweep("several files", use_engine);
    choose(FIXTURES "/single", PERK_BACKEND_REFERENCE, true);
    sweep("random weights", use_engine);
    sweep("service", use_service);
    sweep("steps of the caller", use_steps);
    choose(EXPERTS, PERK_BACKEND_REFERENCE, false);
    sweep("experts", use_engine);
    choose(EXPERTS, PERK_BACKEND_REFERENCE, true);
    sweep("experts, random weights", use_engine);
    choose(TINY, PERK_BACKEND_GPU, false);
    CHECK_OK(use_engine()); /* fills the cache */
    sweep("GPU", use_engine);
    cache_folder = NULL;
    sweep("GPU, compiling", use_engine);
}

static void sweep_test_mode(void) {
    backend = PERK_BACKEND_REFERENCE;
    sweep("test mode, reference", use_test_mode);
    backend = PERK_BACKEND_GPU;
    sweep("test mode, GPU", use_test_mode);
}

static void sweep_command(const char *what, int (*run)(const perk_cli_command *, int, char **),
                          const char *const arguments[8]) {
    command = run;
    memcpy(command_line, arguments, sizeof command_line);
    sweep(what, use_command);
}

#define LINE(...) ((const char *const[8]){__VA_ARGS__})

/* Their results go nowhere, and what they say is kept in a file, from which use_command reads it. */
static void sweep_commands(void) {
    said = open(path_in(scratch, "said").text, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    true_stderr = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
    CHECK(said >= 0 && true_stderr >= 0 && freopen("/dev/null", "w", stdout));
#if !CAN_FAIL_LIBRARIES
    __sanitizer_set_report_fd((void *)(intptr_t)true_stderr);
#endif
    put_file(path_in(scratch, "ids.json").text, "[[5, 6, 7]]", 11);
    static const char prompts[] = "{\"prompt\": \"Once\", \"max_tokens\": 2, \"stop_tokens\": [1], \"logit_bias\": "
                                  "{\"3\": 2}, \"logprobs\": true}\n"
                                  "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}], \"max_tokens\": 1}\n";
    path_text ids = path_in(scratch, "ids.json"), cubin = path_in(scratch, "out.cubin");
    sweep_command("perk plan", perk_cli_plan, LINE("--model", TINY));
    sweep_command("perk plan --json", perk_cli_plan, LINE("--model", TINY, "--json", "--tasks"));
    sweep_command("perk plan --html", perk_cli_plan,
                  LINE("--model", TINY, "--html", path_in(scratch, "plan.html").text));
    sweep_command("perk compile", perk_cli_compile, LINE("--model", TINY, "--no-cache", "--out", cubin.text));
    sweep_command("perk tokenize", perk_cli_tokenize, LINE("--model", TINY, "Once upon a time"));
    sweep_command("perk logits", perk_cli_logits,
                  LINE("--model", TINY, "--ids", ids.text, "--backend", "reference", "--perplexity"));
    sweep_command("perk logits, dump", perk_cli_logits,
                  LINE("--model", FIXTURES "/single", "--ids", ids.text, "--backend=reference", "--dump-activations",
                       path_in(scratch, "dump").text));
    put_file(path_in(scratch, "prompts.jsonl").text, prompts, strlen(prompts));
    sweep_command("perk run --prompts", perk_cli_run,
                  LINE("--model", TINY, "--prompts", path_in(scratch, "prompts.jsonl").text, "--backend", "reference"));
    sweep_command("perk bench sync", perk_cli_bench, LINE("sync", "--runs", "1", "--no-cache", "--json"));
    sweep_command("perk bench decode", perk_cli_bench,
                  LINE("decode", "--model", TINY, "--no-check", "--no-cache", "--context=4", "--steps=1"));
    sweep_command("perk bench prefill", perk_cli_bench,
                  LINE("prefill", "--model", TINY, "--no-check", "--prompt-tokens=4", "--runs=1", "--no-cache"));
    static const char arrivals[] =
        "{\"arrival_s\": 0, \"prompt_tokens\": 2, \"answer_tokens\": 2}\n"
        "{\"arrival_s\": 0, \"prompt_tokens\": 1, \"answer_tokens\": 9, \"cancel_after\": 1}\n";
    put_file(path_in(scratch, "trace.jsonl").text, arrivals, strlen(arrivals));
    sweep_command("perk bench serve", perk_cli_bench,
                  LINE("serve", "--model", FIXTURES "/single", "--backend=reference", "--threads=1", "--json",
                       "--trace", path_in(scratch, "trace.jsonl").text));
    sweep_command("perk cache list", perk_cli_cache, LINE("list", "--cache-dir", scratch));
}

/* ---- the program ---- */

static void sweep_libraries(void) {
    choose(TINY, PERK_BACKEND_GPU, false);
    sweep_library("libpcre2-8", "tokenizer", use_tokenizer, true);
    sweep_library("libxxhash", "GPU", use_engine, true);
    sweep_library("libjansson", "tokenizer", use_tokenizer, false);
    choose(TINY, PERK_BACKEND_REFERENCE, false);
    sweep_library("libjansson", "reference", use_engine, false);
    sweep_library("libc.so", "reference", use_engine, true);
}

int main(int argc, char **argv) {
    if (argc > 1) only = argv[1];
    make_scratch();
    fake = open_fake().driver;
    sweep("tokenizer", use_tokenizer);
    sweep("tokenizer with byte fallback", use_sentencepiece);
    sweep("chats", use_chat);
    sweep("cache", use_cache);
    sweep_engines();
    sweep_test_mode();
    sweep_libraries();
    sweep_commands();
    free(known_bytes.ids);
    free(known_marks.ids);
    return 0;
}
