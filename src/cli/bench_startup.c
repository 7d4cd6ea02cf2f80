/* perk bench startup: from the start of a process to its first launch, cold and warm. Every start is a process of its
 * own, as a user's is: perk itself with --one-start. Cold starts have an empty cache folder each, warm ones that of the
 * last cold one. All of them read the same prompt, and one more compares its logits with the reference executor's: as
 * equal programs give equal bits, that one speaks for all. */
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <math.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

extern char **environ;

enum { DEFAULT_STARTS = 5, CHECK_TOKENS = 4 };

/* ---- one start, in this process ---- */

typedef struct one_start {
    double draw_ms;  /* of random weights, which no real start has */
    double launch_s; /* perk_now() when the first step began */
    double step_ms;  /* the first step */
    double error;    /* of the check; < 0: not made */
    uint64_t hash;   /* of the logits */
    perk_bench bench;
} one_start;

/* What is drawn would have lain in a file: its time is kept apart, and config and graph are timed by themselves. */
static perk_status open_model(one_start *start, const perk_bench_options *o, perk_error *err) {
    perk_model *described = NULL;
    double begin = perk_now(), described_at = begin;
    if (o->random_weights) {
        perk_status status = perk_model_describe(&described, o->model, err);
        if (status != PERK_OK) return status;
        perk_model_free(described);
        described_at = perk_now();
    }
    perk_status status = perk_bench_open(&start->bench, o, err);
    if (!o->random_weights) return status;
    start->draw_ms = (perk_now() - described_at) * 1e3;
    start->bench.report.open_ms = (described_at - begin) * 1e3;
    return status;
}

static perk_status start_once(one_start *start, const perk_bench_options *o, int32_t tokens, bool check,
                              perk_error *err) {
    const float *logits = NULL;
    perk_bench *b = &start->bench;
    start->error = -1;
    perk_status status = open_model(start, o, err);
    if (status == PERK_OK) status = perk_bench_open_gpu(b, false, err);
    start->launch_s = perk_now();
    if (status == PERK_OK) status = perk_bench_step_context(b, 0, 0, 1, 1, err);
    start->step_ms = (perk_now() - start->launch_s) * 1e3;
    if (status == PERK_OK) status = perk_bench_read_prompt(b, tokens, 1, &logits, err);
    if (status == PERK_OK) start->hash = XXH3_64bits(logits, (size_t)b->model->vocab_size * sizeof *logits);
    if (status == PERK_OK && check) status = perk_bench_check(b, tokens, 1, &start->error, err);
    return status;
}

static int print_start(const perk_bench_command *c, const one_start *start) {
    char hash[20];
    json_t *json = perk_bench_result("start", c->bench.model, start->bench.report.device);
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)start->hash);
    json_object_set_new(json, "entered_us", json_integer((json_int_t)(c->entered * 1e6)));
    json_object_set_new(json, "first_launch_us", json_integer((json_int_t)(start->launch_s * 1e6)));
    json_object_set_new(json, "draw_ms", json_real(start->draw_ms));
    json_object_set_new(json, "first_step_ms", json_real(start->step_ms));
    json_object_set_new(json, "logits_hash", json_string(hash));
    perk_bench_put_check(json, start->error);
    json_object_set_new(json, "start", perk_cli_report_json(&start->bench.report));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

static int measure_one(const perk_bench_command *c) {
    perk_error err = {0};
    one_start start = {0};
    perk_bench_options options = c->bench;
    int32_t tokens = c->check_tokens ? c->check_tokens : CHECK_TOKENS;
    options.batch = options.steps = 1;
    options.context = tokens;
    perk_status status = start_once(&start, &options, tokens, !c->no_check, &err);
    int code = status == PERK_OK ? print_start(c, &start) : perk_cli_fail(&err);
    perk_bench_close(&start.bench);
    return code;
}

/* ---- a start as a process ---- */

static perk_status spawn(char **words, int *from, pid_t *child, perk_error *err) {
    int ends[2];
    posix_spawn_file_actions_t actions;
    if (pipe2(ends, O_CLOEXEC) != 0) return perk_fail(err, PERK_IO, "cannot make a pipe: %s", strerror(errno));
    int error = posix_spawn_file_actions_init(&actions);
    if (!error) {
        error = posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
        if (!error) error = posix_spawn(child, "/proc/self/exe", &actions, NULL, words, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    close(ends[1]);
    *from = ends[0];
    if (!error) return PERK_OK;
    close(ends[0]);
    return perk_fail(err, PERK_IO, "cannot start a process: %s", strerror(error));
}

/* All that the child says; it has ended then. */
static perk_status listen_to(int from, pid_t child, perk_buffer *said, perk_error *err) {
    char chunk[4096];
    ssize_t got;
    int outcome;
    while ((got = read(from, chunk, sizeof chunk)) > 0 || (got < 0 && errno == EINTR))
        if (got > 0) perk_buffer_append(said, chunk, (size_t)got);
    close(from);
    while (waitpid(child, &outcome, 0) < 0)
        if (errno != EINTR) return perk_fail(err, PERK_IO, "lost a process: %s", strerror(errno));
    if (said->failed) return perk_fail_memory(err, "what a start said");
    if (WIFEXITED(outcome) && WEXITSTATUS(outcome) == 0 && said->data) return PERK_OK;
    return perk_fail(err, PERK_INTERNAL, "a start failed; what it said of the reason is above");
}

/* The command line of this process, with what makes it one start. */
static char **child_words(const perk_bench_command *c, const char *folder, bool check) {
    const char *const more[] = {"--one-start", "--json", "--cache-dir", folder, check ? NULL : "--no-check"};
    char **words = perk_calloc((size_t)c->word_count + PERK_COUNT(more) + 3, sizeof *words);
    if (!words) return NULL;
    words[0] = (char *)(uintptr_t) "perk";
    words[1] = (char *)(uintptr_t) "bench";
    memcpy(words + 2, c->words, (size_t)c->word_count * sizeof *words);
    for (size_t i = 0; i < PERK_COUNT(more); i++) words[2 + c->word_count + (int)i] = (char *)(uintptr_t)more[i];
    return words;
}

static perk_status run_child(const perk_bench_command *c, const char *folder, bool check, double *begin, json_t **out,
                             perk_error *err) {
    int from = -1;
    pid_t child = -1;
    perk_buffer said = {0};
    json_error_t malformed;
    char **words = child_words(c, folder, check);
    *out = NULL;
    if (!words) return perk_fail_memory(err, "a command line");
    fflush(NULL);
    *begin = perk_now(); /* the same clock in all processes */
    perk_status status = spawn(words, &from, &child, err);
    if (status == PERK_OK) status = listen_to(from, child, &said, err);
    if (status == PERK_OK) *out = json_loadb(said.data, said.size, 0, &malformed);
    if (status == PERK_OK && !*out)
        status = perk_fail(err, PERK_INTERNAL, "a start said no JSON: %s: %s", malformed.text, said.data);
    perk_buffer_free(&said);
    free(words);
    return status;
}

/* ---- many starts ---- */

/* What is told of a start, in milliseconds: to_first_launch is all of it but the weights; process: before main; the
 * rest as in perk_start_report, of which context runs beside others. */
#define START_PARTS(X)                                                                                                 \
    X(to_first_launch)                                                                                                 \
    X(process) X(open) X(driver) X(context) X(plan) X(check) X(emit) X(compile) X(module) X(weights) X(first_step)
enum {
#define PART_ENUM(name) PART_##name,
    START_PARTS(PART_ENUM)
#undef PART_ENUM
        PARTS
};
static const char *const part_names[] = {
#define PART_NAME(name) #name "_ms",
    START_PARTS(PART_NAME)
#undef PART_NAME
};

typedef struct start_series {
    double *values[PARTS]; /* [starts] */
    perk_bench_spread spread[PARTS];
} start_series;

typedef struct startup {
    const perk_bench_command *command;
    int32_t starts;
    char folder[512]; /* of the caches */
    start_series cold, warm;
    char hash[20], device[128];
    double error; /* of the check; < 0: not made */
} startup;

static double number(const json_t *json, const char *key) { return json_number_value(json_object_get(json, key)); }

static void take_parts(start_series *series, int32_t index, const json_t *said, double begin) {
    const json_t *report = json_object_get(said, "start");
    for (int part = 0; part < PARTS; part++) series->values[part][index] = number(report, part_names[part]);
    double weights = series->values[PART_weights][index] + number(said, "draw_ms");
    series->values[PART_first_step][index] = number(said, "first_step_ms");
    series->values[PART_process][index] = number(said, "entered_us") * 1e-3 - begin * 1e3;
    series->values[PART_to_first_launch][index] = number(said, "first_launch_us") * 1e-3 - begin * 1e3 - weights;
}

/* A start is worth nothing when the cache did not do what was meant, or when the program computed something else. */
static perk_status judge(startup *s, const json_t *said, bool hit, perk_error *err) {
    const json_t *report = json_object_get(said, "start");
    const char *hash = json_string_value(json_object_get(said, "logits_hash"));
    const char *device = json_string_value(json_object_get(report, "device"));
    if (!hash || !device) return perk_fail(err, PERK_INTERNAL, "a start did not say what it computed, or where");
    if (json_is_true(json_object_get(report, "cache_hit")) != hit)
        return perk_fail(err, PERK_INTERNAL, "a %s start %s its program in the cache", hit ? "warm" : "cold",
                         hit ? "did not find" : "found");
    if (s->hash[0] && strcmp(s->hash, hash) != 0)
        return perk_fail(err, PERK_INTERNAL, "two starts of the same program computed different logits (%s, %s)",
                         s->hash, hash);
    snprintf(s->hash, sizeof s->hash, "%s", hash);
    snprintf(s->device, sizeof s->device, "%s", device);
    return PERK_OK;
}

static perk_status run_start(startup *s, const char *folder, bool hit, start_series *series, int32_t index,
                             perk_error *err) {
    json_t *said = NULL;
    double begin = 0;
    bool check = !series; /* the one that is compared is not timed */
    perk_status status = run_child(s->command, folder, check, &begin, &said, err);
    if (status == PERK_OK) status = judge(s, said, hit, err);
    if (status == PERK_OK && series) take_parts(series, index, said, begin);
    if (status == PERK_OK && check) s->error = number(said, "check_relative_error");
    json_decref(said);
    return status;
}

static perk_status run_all(startup *s, perk_error *err) {
    char folder[640] = "";
    perk_status status = PERK_OK;
    for (int32_t i = 0; i < s->starts && status == PERK_OK; i++) {
        snprintf(folder, sizeof folder, "%s/%d", s->folder, i);
        status = run_start(s, folder, false, &s->cold, i, err);
    }
    for (int32_t i = 0; i < s->starts && status == PERK_OK; i++) status = run_start(s, folder, true, &s->warm, i, err);
    if (status == PERK_OK && !s->command->no_check) status = run_start(s, folder, true, NULL, 0, err);
    for (int part = 0; part < PARTS && status == PERK_OK; part++) {
        s->cold.spread[part] = perk_bench_spread_of(s->cold.values[part], s->starts);
        s->warm.spread[part] = perk_bench_spread_of(s->warm.values[part], s->starts);
    }
    return status;
}

/* ---- telling ---- */

static json_t *series_json(const start_series *series) {
    json_t *json = json_object();
    for (int part = 0; part < PARTS; part++) perk_bench_put_spread(json, part_names[part], series->spread[part]);
    return json;
}

static int print_json(const startup *s) {
    const perk_bench_options *o = &s->command->bench;
    json_t *json = perk_bench_result("startup", o->model, s->device);
    json_object_set_new(json, "starts", json_integer(s->starts));
    json_object_set_new(json, "max_batched_tokens", json_integer(PERK_MAX(o->tokens, 1)));
    json_object_set_new(json, "portable", json_boolean(o->portable));
    json_object_set_new(json, "random_weights", json_boolean(o->random_weights));
    json_object_set_new(json, "logits_hash", json_string(s->hash));
    perk_bench_put_check(json, s->error);
    json_object_set_new(json, "cold", series_json(&s->cold));
    json_object_set_new(json, "warm", series_json(&s->warm));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

static int print_text(const startup *s) {
    char check[32], cold[64], warm[64];
    printf("%s  %s  %d cold and %d warm starts; medians (10th, 90th percentile), ms\n", s->command->bench.model,
           s->device, s->starts, s->starts);
    printf("  %-18s %-28s %s\n", "", "cold", "warm");
    for (int part = 0; part < PARTS; part++) {
        const perk_bench_spread *c = &s->cold.spread[part], *w = &s->warm.spread[part];
        snprintf(cold, sizeof cold, "%.1f (%.1f, %.1f)", c->median, c->p10, c->p90);
        snprintf(warm, sizeof warm, "%.1f (%.1f, %.1f)", w->median, w->p10, w->p90);
        printf("  %-18s %-28s %s\n", part_names[part], cold, warm);
    }
    printf("  to_first_launch_ms: from the start of the process, without weights_ms; context_ms runs beside others\n");
    printf("  check: logits %s in all starts; relative error against the reference executor: %s\n", s->hash,
           perk_bench_check_text(s->error, check, sizeof check));
    return PERK_EXIT_OK;
}

/* ---- the whole ---- */

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *at) {
    (void)info, (void)kind, (void)at;
    remove(path);
    return 0;
}

static perk_status make_folder(startup *s, perk_error *err) {
    const char *root = secure_getenv("TMPDIR");
    snprintf(s->folder, sizeof s->folder, "%s/perk-startup-XXXXXX", root && *root ? root : "/tmp");
    if (mkdtemp(s->folder)) return PERK_OK;
    perk_status status = perk_fail(err, PERK_IO, "%s: cannot make a folder: %s", s->folder, strerror(errno));
    s->folder[0] = '\0';
    return status;
}

static perk_status allocate(start_series *series, int32_t starts, perk_error *err) {
    for (int part = 0; part < PARTS; part++) {
        series->values[part] = perk_calloc((size_t)starts, sizeof(double));
        if (!series->values[part]) return perk_fail_memory(err, "times");
    }
    return PERK_OK;
}

static perk_status measure_all(startup *s, perk_error *err) {
    perk_status status = allocate(&s->cold, s->starts, err);
    if (status == PERK_OK) status = allocate(&s->warm, s->starts, err);
    if (status == PERK_OK) status = make_folder(s, err);
    if (status == PERK_OK && setenv("PERK_CACHE_READONLY", "", 1) != 0) status = perk_fail_memory(err, "a variable");
    if (status == PERK_OK) status = run_all(s, err);
    if (s->folder[0]) nftw(s->folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    return status;
}

int perk_bench_measure_startup(const perk_bench_command *c) {
    if (c->one_start) return measure_one(c);
    perk_error err = {0};
    startup s = {.command = c, .starts = c->runs ? c->runs : DEFAULT_STARTS, .error = -1};
    if (c->bench.no_cache) return perk_cli_usage(c->self, "startup with --no-cache would have no warm starts");
    perk_status status = measure_all(&s, &err);
    int code = status != PERK_OK ? perk_cli_fail(&err) : c->json ? print_json(&s) : print_text(&s);
    for (int part = 0; part < PARTS; part++) {
        free(s.cold.values[part]);
        free(s.warm.values[part]);
    }
    return code;
}
