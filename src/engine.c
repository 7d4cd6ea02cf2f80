#include "engine.h"

#include "caller_step.h"
#include "gpu.h"
#include "model.h"
#include "reference.h"
#include "scheduler.h"

#include <pthread.h>
#include <stdio.h>
#include <time.h>

struct perk_engine {
    perk_model *model;
    perk_tokenizer *tokenizer; /* NULL: the folder has none */
    perk_executor *executor;
    perk_scheduler *scheduler;
    perk_batch *batch;          /* of logits, or of the caller; that of requests is the scheduler's */
    perk_caller_pages *callers; /* NULL: pages are the scheduler's */
    perk_config config;
    perk_start_report report;
    perk_mode mode; /* SINGLE where the executor knows no other */
    perk_launch_options launches;
    bool launched;               /* the kernel runs steps by itself */
    double last_news, news_each; /* when tokens came from it, and after how many seconds the next ones may */
    double next_poll;            /* seconds that the next short sleep takes */
    perk_error failure;          /* of a step: closes the engine */
    perk_on_step on_step;        /* NULL: nobody watches */
    void *on_step_user;
};

enum { IDLE_LIMIT_MS = 100 };
/* Tokens are expected after as long as the last ones took: most of that is slept in one piece, what follows in short
 * ones that grow, by shares of it and within limits, so that waiting takes few percent of a core and tokens are late by
 * few percent of a step. */
static const double FIRST_NEWS_SECONDS = 1e-3, SLEPT_SHARE = 0.9, POLLED_SHARE = 1.0 / 64, GROWTH = 1.25,
                    SHORTEST_SLEEP = 20e-6, LONGEST_SLEEP = 20e-3, LONGEST_POLL = 5e-3;

static double milliseconds_since(double start) { return (perk_now() - start) * 1e3; }

/* ---- opening ---- */

/* Reading a large tokenizer.json takes longer than a warm start of the GPU, so it happens beside the rest. */
typedef struct tokenizer_load {
    const char *folder;
    perk_tokenizer *tokenizer;
    perk_status status;
    perk_error err;
    pthread_t thread;
    bool threaded;
} tokenizer_load;

static void *load_tokenizer(void *argument) {
    tokenizer_load *load = argument;
    load->status = perk_tokenizer_load(&load->tokenizer, load->folder, &load->err);
    return NULL;
}

static void tokenizer_load_begin(tokenizer_load *load, const char *folder) {
    load->folder = folder;
    load->threaded = pthread_create(&load->thread, NULL, load_tokenizer, load) == 0;
    if (!load->threaded) load_tokenizer(load);
}

/* Waits for the load. A folder without a tokenizer, or with one of another kind, still runs on token ids. */
static perk_status tokenizer_load_end(tokenizer_load *load, perk_tokenizer **out, const perk_log *log,
                                      perk_error *err) {
    if (load->threaded) pthread_join(load->thread, NULL);
    load->threaded = false;
    *out = load->tokenizer;
    load->tokenizer = NULL;
    if (load->status == PERK_NOT_FOUND) return PERK_OK;
    if (load->status == PERK_UNSUPPORTED) {
        perk_log_write(log, PERK_LOG_WARNING, "no tokenizer, token ids only: %s", load->err.message);
        return PERK_OK;
    }
    if (load->status && err) *err = load->err;
    return load->status;
}

static perk_status open_reference(perk_engine *engine, const perk_engine_options *options, perk_error *err) {
    double start = perk_now();
    perk_reference_options reference = {.threads = options->threads,
                                        .precision = (perk_reference_precision)options->precision};
    perk_status status = perk_reference_create(&engine->executor, engine->model->graph, engine->model->checkpoint,
                                               &engine->config, &reference, err);
    if (status) return status;
    perk_start_report *report = &engine->report;
    report->backend = PERK_BACKEND_REFERENCE;
    snprintf(report->device, sizeof report->device, "CPU");
    report->weights_bytes = perk_checkpoint_bytes(engine->model->checkpoint);
    report->weights_ms = milliseconds_since(start);
    return PERK_OK;
}

static int by_number(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The caller's sizes of a step below max_num_batched_tokens, or else the defaults. */
static void choose_programs(const int32_t wanted[PERK_MAX_PROGRAMS], int32_t most, perk_gpu_options *gpu) {
    static const int32_t defaults[] = {1, 8};
    int32_t sizes[PERK_MAX_PROGRAMS] = {0};
    gpu->smaller_are_optional = true;
    for (int i = 0; i < PERK_MAX_PROGRAMS; i++)
        if ((sizes[i] = wanted[i])) gpu->smaller_are_optional = false;
    for (size_t i = 0; i < PERK_COUNT(defaults) && gpu->smaller_are_optional; i++)
        if (defaults[i] <= most / 2) sizes[i] = defaults[i];
    qsort(sizes, PERK_MAX_PROGRAMS, sizeof *sizes, by_number);
    for (int i = 0; i < PERK_MAX_PROGRAMS; i++) {
        bool again = i > 0 && sizes[i] == sizes[i - 1];
        if (sizes[i] > 0 && sizes[i] < most && !again) gpu->smaller_programs[gpu->smaller_program_count++] = sizes[i];
    }
}

static bool launches_many(perk_mode mode) { return mode == PERK_MODE_COMPLETION || mode == PERK_MODE_ONLINE; }

static perk_status open_gpu(perk_engine *engine, const perk_engine_options *options, perk_error *err) {
    perk_gpu_options gpu = {.device = options->device,
                            .portable = options->portable != 0,
                            .unchecked = options->unchecked != 0,
                            .no_cache = options->no_cache != 0,
                            .many_steps = launches_many(options->mode),
                            .cache_folder = options->cache_folder,
                            .threads = options->threads,
                            .log = options->log,
                            .progress = options->progress};
    choose_programs(options->program_tokens, engine->config.max_num_batched_tokens, &gpu);
    engine->report.backend = PERK_BACKEND_GPU;
    return perk_gpu_create(&engine->executor, engine->model->graph, engine->model->checkpoint, &engine->config, &gpu,
                           &engine->report, err);
}

static perk_status open_executor(perk_engine *engine, const perk_engine_options *options, perk_error *err) {
    if (options->backend == PERK_BACKEND_REFERENCE) return open_reference(engine, options, err);
    perk_error gpu_error = {0};
    double open_ms = engine->report.open_ms;
    perk_status status = open_gpu(engine, options, &gpu_error);
    bool no_gpu = status == PERK_NO_DRIVER || status == PERK_NO_DEVICE;
    if (options->backend == PERK_BACKEND_AUTO && no_gpu) {
        perk_log_write(&options->log, PERK_LOG_INFO, "no GPU, running the reference executor: %s", gpu_error.message);
        engine->report = (perk_start_report){.open_ms = open_ms};
        return open_reference(engine, options, err);
    }
    if (status && err) *err = gpu_error;
    return status;
}

static perk_status check_options(const perk_engine_options *options, perk_error *err) {
    if (options->backend < PERK_BACKEND_AUTO || options->backend > PERK_BACKEND_REFERENCE)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "backend %d: unknown", (int)options->backend);
    if (options->precision < 0 || options->precision > 2)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "precision %d: must be 0, 1 (bf16) or 2 (fp32)",
                         options->precision);
    if (options->mode < PERK_MODE_SINGLE || options->mode > PERK_MODE_CALLER)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "mode %d: unknown", (int)options->mode);
    if (options->steps_a_launch < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "steps_a_launch %d: must be 0 (no limit) or more",
                         options->steps_a_launch);
    if (options->idle_limit_ms < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "idle_limit_ms %d: must be 0 (the default) or more",
                         options->idle_limit_ms);
    if (options->threads < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "threads %d: must be 0 (all cores) or more", options->threads);
    for (int i = 0; i < PERK_MAX_PROGRAMS; i++)
        if (options->program_tokens[i] < 0)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "a program for %d tokens a step: must be 1 or more",
                             options->program_tokens[i]);
    return PERK_OK;
}

/* Programs for larger steps than max_num_batched_tokens could never run; where only programs were asked for, the
 * largest says what max_num_batched_tokens is. */
static perk_status fit_programs(perk_config *config, const int32_t tokens[PERK_MAX_PROGRAMS], perk_error *err) {
    int32_t most = 0;
    for (int i = 0; i < PERK_MAX_PROGRAMS; i++) most = PERK_MAX(most, tokens[i]);
    if (config->max_num_batched_tokens == 0) config->max_num_batched_tokens = most;
    if (most <= config->max_num_batched_tokens) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT,
                     "a program for %d tokens a step: max_num_batched_tokens is %d, and no step is larger", most,
                     config->max_num_batched_tokens);
}

/* The oldest request must always be able to finish (see docs/scheduling.md), so the pool must hold one of
 * max_seq_length. */
static perk_status fit_pool(perk_config *config, bool length_was_asked_for, const perk_log *log, perk_error *err) {
    int64_t positions = (int64_t)config->max_num_pages * config->page_size;
    if (positions >= config->max_seq_length) return PERK_OK;
    if (length_was_asked_for)
        return perk_fail(err, PERK_LIMIT,
                         "max_num_pages %d of page_size %d hold %lld positions, but a request may have max_seq_length "
                         "%d: raise max_num_pages to %lld or lower max_seq_length",
                         config->max_num_pages, config->page_size, (long long)positions, config->max_seq_length,
                         ((long long)config->max_seq_length + config->page_size - 1) / config->page_size);
    perk_log_write(log, PERK_LOG_INFO, "max_seq_length is %lld: what max_num_pages %d of page_size %d hold",
                   (long long)positions, config->max_num_pages, config->page_size);
    config->max_seq_length = (int32_t)positions;
    return PERK_OK;
}

/* Said before anything is loaded: who lacks the memory need not wait for it. */
static void report_memory(const perk_engine *engine, const perk_log *log) {
    const perk_config *config = &engine->config;
    uint64_t positions = (uint64_t)config->max_num_pages * (uint64_t)config->page_size;
    perk_model_memory memory = perk_model_measure(engine->model, positions);
    perk_log_write(log, PERK_LOG_INFO, "in bf16: %.2f GB of weights and %.2f GB of KV cache for %llu positions",
                   (double)memory.weights_bytes * 1e-9, (double)memory.kv_bytes * 1e-9, (unsigned long long)positions);
}

/* All but the executor and the tokenizer, which follow. */
static perk_status open_model(perk_engine *engine, const char *path, const perk_engine_options *options,
                              perk_error *err) {
    perk_status status = perk_model_open(&engine->model, path, options->random_weights != 0, options->seed, err);
    if (status) return status;
    const perk_model *model = engine->model;
    perk_model_report_unread(model, &options->log);
    engine->config = options->config;
    if ((status = fit_programs(&engine->config, options->program_tokens, err))) return status;
    if ((status = perk_config_resolve(&engine->config, model->max_positions, err))) return status;
    bool length_was_asked_for = options->config.max_seq_length != 0;
    if ((status = fit_pool(&engine->config, length_was_asked_for, &options->log, err))) return status;
    report_memory(engine, &options->log);
    if ((status = perk_batch_create(&engine->batch, &engine->config, err))) return status;
    if (options->mode == PERK_MODE_CALLER)
        status = perk_caller_pages_create(&engine->callers, &engine->config, model->vocab_size, err);
    if (status) return status;
    return perk_scheduler_create(&engine->scheduler, &engine->config, model->vocab_size, model->eos_ids,
                                 model->eos_count, !options->no_prefix_sharing, err);
}

static void set_mode(perk_engine *engine, const perk_engine_options *options) {
    if (!launches_many(options->mode)) return;
    if (!engine->executor->type->online) {
        perk_log_write(&options->log, PERK_LOG_INFO, "single steps: the %s executor knows no others",
                       engine->executor->type->name);
        return;
    }
    engine->mode = options->mode;
    engine->news_each = FIRST_NEWS_SECONDS;
    engine->next_poll = SHORTEST_SLEEP;
    if (engine->mode == PERK_MODE_COMPLETION)
        engine->launches.max_steps = (uint32_t)options->steps_a_launch;
    else
        engine->launches.idle_limit_ms = options->idle_limit_ms ? (uint32_t)options->idle_limit_ms : IDLE_LIMIT_MS;
}

perk_status perk_engine_open(perk_engine **out, const char *model_folder, const perk_engine_options *options,
                             perk_error *err) {
    double start = perk_now();
    perk_engine_options defaults = {0};
    if (!options) options = &defaults;
    *out = NULL;
    if (!model_folder) return perk_fail(err, PERK_INVALID_ARGUMENT, "no model folder was given");
    perk_status status = check_options(options, err);
    if (status) return status;
    perk_engine *engine = perk_calloc(1, sizeof *engine);
    if (!engine) return perk_fail_memory(err, "the engine");

    if ((status = open_model(engine, model_folder, options, err))) goto out;
    engine->report.open_ms = milliseconds_since(start);
    tokenizer_load load = {0};
    tokenizer_load_begin(&load, perk_checkpoint_folder(engine->model->checkpoint));
    status = open_executor(engine, options, err);
    perk_status tokenizer_status =
        tokenizer_load_end(&load, &engine->tokenizer, &options->log, status ? NULL : err); /* the first error counts */
    if (!status) status = tokenizer_status;
    if (status) goto out;
    perk_scheduler_set_tokenizer(engine->scheduler, engine->tokenizer);
    set_mode(engine, options);
    engine->report.total_ms = milliseconds_since(start);
    *out = engine;
    engine = NULL;
out:
    perk_engine_free(engine);
    return status;
}

void perk_engine_free(perk_engine *engine) {
    if (!engine) return;
    perk_scheduler_free(engine->scheduler);
    perk_batch_free(engine->batch);
    perk_caller_pages_free(engine->callers);
    if (engine->executor) engine->executor->type->free(engine->executor);
    perk_tokenizer_free(engine->tokenizer);
    perk_model_free(engine->model);
    free(engine);
}

const perk_start_report *perk_engine_report(const perk_engine *engine) { return &engine->report; }

const perk_config *perk_engine_config(const perk_engine *engine) { return &engine->config; }

const perk_tokenizer *perk_engine_tokenizer(const perk_engine *engine) { return engine->tokenizer; }

int32_t perk_engine_vocab_size(const perk_engine *engine) { return engine->model->vocab_size; }

/* ---- steps ---- */

static perk_status check_open(const perk_engine *engine, perk_error *err) {
    if (engine->failure.status && err) *err = engine->failure;
    return engine->failure.status;
}

perk_status perk_engine_check_mode(const perk_engine *engine, perk_error *err) {
    if (!engine->callers) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT,
                     "the engine was opened with PERK_MODE_CALLER, whose steps perk_step_run makes: for requests and "
                     "logits open one of another mode");
}

/* Open, and for requests. */
static perk_status check_own(const perk_engine *engine, perk_error *err) {
    perk_status status = check_open(engine, err);
    return status ? status : perk_engine_check_mode(engine, err);
}

/* Remembers a failed step: what it left in the caches is unknown, so nothing may follow it. */
static perk_status close_after(perk_engine *engine, perk_status status, const perk_error *failure, perk_error *err) {
    engine->failure = *failure;
    engine->failure.status = status;
    engine->launched = false;
    if (err) *err = engine->failure;
    return status;
}

static perk_status run_batch(perk_engine *engine, const perk_batch *batch, bool want_logits, perk_step_result *result,
                             perk_error *err) {
    *result = (perk_step_result){0};
    perk_status status = engine->executor->type->step(engine->executor, batch, want_logits, result, err);
    if (status || !engine->on_step) return status;
    return engine->on_step(engine->on_step_user, engine->executor, engine->model->graph, batch, err);
}

perk_status perk_engine_watch(perk_engine *engine, perk_on_step on_step, void *user, perk_error *err) {
    if (engine->report.backend != PERK_BACKEND_REFERENCE)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "on the GPU activations share memory within a step and cannot be read after it: use the "
                         "reference backend");
    engine->on_step = on_step;
    engine->on_step_user = user;
    return PERK_OK;
}

perk_status perk_engine_check(const perk_engine *engine, const int32_t *prompt, size_t prompt_length,
                              const perk_sampling *sampling, perk_error *err) {
    return perk_scheduler_check(engine->scheduler, prompt, prompt_length, sampling, err);
}

perk_status perk_engine_submit(perk_engine *engine, const int32_t *prompt, size_t prompt_length,
                               const perk_sampling *sampling, perk_request **out, perk_error *err) {
    *out = NULL;
    perk_status status = check_own(engine, err);
    return status ? status : perk_scheduler_submit(engine->scheduler, prompt, prompt_length, sampling, out, err);
}

static perk_status step_once(perk_engine *engine, perk_error *err) {
    const perk_batch *batch;
    bool want_logits;
    perk_step_result result;
    perk_status status = perk_scheduler_fill(engine->scheduler, &batch, &want_logits, err);
    if (status || batch->num_tokens == 0) return status;
    status = run_batch(engine, batch, want_logits, &result, err);
    return status ? status : perk_scheduler_commit(engine->scheduler, &result, err);
}

/* ---- a kernel that goes from step to step by itself ---- */

/* Takes in what has come. Whatever a launch that has ended has made is taken in with it. */
static perk_status exchange(perk_engine *engine, int32_t *news, perk_error *err) {
    int32_t late = 0;
    bool ended = false;
    perk_status status = perk_scheduler_exchange(engine->scheduler, news, err);
    if (!status) status = engine->executor->type->online->poll(engine->executor, &ended, err);
    if (status || !ended) return status;
    engine->launched = false;
    status = perk_scheduler_exchange(engine->scheduler, &late, err);
    *news += late;
    return status;
}

static void sleep_for(double seconds) {
    struct timespec time = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&time, NULL);
}

static perk_status pause_kernel(perk_engine *engine, perk_error *err) {
    perk_status status = PERK_OK;
    if (engine->launched) engine->executor->type->online->stop(engine->executor);
    while (!status && engine->launched) {
        int32_t news;
        status = exchange(engine, &news, err);
        if (!status && engine->launched) sleep_for(SHORTEST_SLEEP);
    }
    return status;
}

/* Where the schedule must be for whatever the host does with requests and pages. */
static perk_status bring_back(perk_engine *engine, perk_error *err) {
    perk_status status = pause_kernel(engine, err);
    return status || !perk_scheduler_is_away(engine->scheduler) ? status
                                                                : perk_scheduler_take_back(engine->scheduler, err);
}

static double clamp(double value, double least, double most) { return value < least ? least : PERK_MIN(value, most); }

/* Seconds until it makes sense to look again. A pause between two texts is no reason to expect another one. */
static double until_news(perk_engine *engine, bool news) {
    if (engine->mode == PERK_MODE_ONLINE && perk_scheduler_unfinished(engine->scheduler) == 0)
        return engine->launches.idle_limit_ms * 1e-3 + LONGEST_POLL; /* until it has ended */
    if (!news) {
        double sleep = engine->next_poll;
        engine->next_poll = PERK_MIN(sleep * GROWTH, LONGEST_POLL);
        return sleep;
    }
    double now = perk_now(), since = now - engine->last_news;
    engine->last_news = now;
    engine->news_each = PERK_MIN(since, engine->news_each * GROWTH);
    engine->next_poll = clamp(engine->news_each * POLLED_SHARE, SHORTEST_SLEEP, LONGEST_POLL);
    return clamp(engine->news_each * SLEPT_SHARE, SHORTEST_SLEEP, LONGEST_SLEEP);
}

/* Where a launch has ended and another follows, the schedule stays where it is. Otherwise it comes home: the host has
 * it, or a kernel that runs. */
static perk_status run_kernel(perk_engine *engine, int32_t *news, perk_error *err) {
    perk_status status = PERK_OK;
    bool was_launched = engine->launched;
    if (was_launched) status = exchange(engine, news, err);
    if (status || engine->launched) return status;
    bool is_over = was_launched && engine->mode == PERK_MODE_COMPLETION;
    if (is_over || perk_scheduler_unfinished(engine->scheduler) == 0) return bring_back(engine, err);
    status = perk_scheduler_launch(engine->scheduler, engine->executor, &engine->launches, err);
    engine->launched = status == PERK_OK;
    return status;
}

perk_status perk_engine_poll(perk_engine *engine, bool *news, double *again, perk_error *err) {
    *news = false;
    *again = 0;
    perk_status status = check_own(engine, err);
    if (status) return status;
    perk_error failure = {0};
    int32_t count = 0;
    status = engine->mode == PERK_MODE_SINGLE ? step_once(engine, &failure) : run_kernel(engine, &count, &failure);
    if (status) return close_after(engine, status, &failure, err);
    *news = engine->mode == PERK_MODE_SINGLE || count > 0;
    if (engine->launched) *again = until_news(engine, *news);
    return PERK_OK;
}

perk_status perk_engine_step(perk_engine *engine, int32_t *running, perk_error *err) {
    bool news;
    double again;
    if (running) *running = 0;
    for (;;) {
        perk_status status = perk_engine_poll(engine, &news, &again, err);
        if (status) return status;
        bool is_done = news || perk_scheduler_unfinished(engine->scheduler) == 0;
        if (again == 0 || (is_done && engine->mode == PERK_MODE_ONLINE)) break;
        sleep_for(again);
    }
    if (running) *running = perk_scheduler_unfinished(engine->scheduler);
    return PERK_OK;
}

perk_status perk_engine_pause(perk_engine *engine, perk_error *err) {
    perk_status status = check_open(engine, err);
    if (status) return status;
    perk_error failure = {0};
    status = bring_back(engine, &failure);
    return status ? close_after(engine, status, &failure, err) : PERK_OK;
}

bool perk_engine_stays(const perk_engine *engine) { return engine->launched; }

void perk_engine_statistics(const perk_engine *engine, perk_engine_stats *out) {
    perk_scheduler_statistics(engine->scheduler, out);
    if (engine->report.backend == PERK_BACKEND_GPU)
        perk_gpu_program_counts(engine->executor, out->program_steps, out->program_launches);
}

/* ---- steps of the caller ---- */

perk_status perk_step_run(perk_engine *engine, const perk_step_request *requests, int32_t request_count,
                          int32_t fetch_logits, perk_step_output *output, perk_error *err) {
    *output = (perk_step_output){0};
    perk_status status = check_open(engine, err);
    if (status) return status;
    if (!engine->callers)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "the engine fills its steps itself: open one with PERK_MODE_CALLER for steps of yours");
    status = perk_caller_step_fill(engine->callers, engine->batch, requests, request_count, err);
    if (status) return status;
    perk_step_result result;
    perk_error failure = {0};
    status = run_batch(engine, engine->batch, fetch_logits != 0, &result, &failure);
    if (status) return close_after(engine, status, &failure, err);
    perk_caller_step_commit(engine->callers, engine->batch);
    *output =
        (perk_step_output){.rows = engine->batch->num_logit_rows, .argmax = result.argmax, .logits = result.logits};
    return PERK_OK;
}

/* ---- generation ---- */

/* Hands the tokens of one request to the caller as they come, with their text. */
typedef struct token_output {
    perk_on_token on_token; /* may be NULL */
    void *user;
    perk_stop_text *text; /* NULL: no tokenizer */
    size_t delivered;
} token_output;

static perk_status deliver(token_output *output, perk_request *request, perk_error *err) {
    size_t count;
    const int32_t *tokens = perk_request_tokens(request, &count);
    for (; output->delivered < count; output->delivered++) {
        if (!output->on_token) continue;
        int32_t token = tokens[output->delivered];
        bool last = output->delivered + 1 == count && perk_request_finish(request) != PERK_FINISH_NONE, found;
        const char *text = "";
        size_t size = 0;
        perk_status status =
            output->text ? perk_stop_text_push(output->text, token, last, &text, &size, &found, err) : PERK_OK;
        if (status) return status;
        if (output->on_token(output->user, token, text, size)) {
            output->delivered++;
            perk_request_cancel(request);
            return PERK_OK;
        }
    }
    return PERK_OK;
}

static perk_status run_request(perk_engine *engine, perk_request *request, token_output *output,
                               perk_generation *generation, perk_error *err) {
    perk_status status = PERK_OK;
    double start = perk_now(), first = 0;
    while (!status && perk_request_finish(request) == PERK_FINISH_NONE) {
        status = perk_engine_step(engine, NULL, err);
        size_t count;
        perk_request_tokens(request, &count);
        if (count > 0 && first == 0) first = perk_now();
        if (!status) status = deliver(output, request, err);
    }
    generation->tokens = (int32_t)output->delivered;
    generation->finish = perk_request_finish(request);
    generation->prefill_ms = ((first > 0 ? first : perk_now()) - start) * 1e3;
    generation->decode_ms = first > 0 ? milliseconds_since(first) : 0;
    return status;
}

perk_status perk_engine_generate(perk_engine *engine, const int32_t *prompt, size_t prompt_length,
                                 const perk_sampling *sampling, perk_on_token on_token, void *user,
                                 perk_generation *generation, perk_error *err) {
    perk_request *request = NULL;
    token_output output = {.on_token = on_token, .user = user};
    perk_generation ignored;
    if (!generation) generation = &ignored;
    *generation = (perk_generation){0};
    perk_status status = perk_engine_submit(engine, prompt, prompt_length, sampling, &request, err);
    if (status) return status;
    generation->prompt_tokens = (int32_t)prompt_length;
    if (on_token && engine->tokenizer)
        status = perk_stop_text_create(&output.text, engine->tokenizer, &request->sampling, err);
    if (!status) status = run_request(engine, request, &output, generation, err);
    perk_stop_text_free(output.text);
    perk_request_free(request);
    return status;
}

perk_status perk_engine_generate_text(perk_engine *engine, const char *prompt, const perk_sampling *sampling,
                                      perk_on_token on_token, void *user, perk_generation *generation,
                                      perk_error *err) {
    if (!engine->tokenizer)
        return perk_fail(err, PERK_NOT_FOUND, "%s has no usable tokenizer.json: give token ids instead of text",
                         perk_checkpoint_folder(engine->model->checkpoint));
    if (!prompt) return perk_fail(err, PERK_INVALID_ARGUMENT, "no prompt was given");
    int32_t *ids;
    size_t count;
    perk_status status = perk_tokenizer_encode(engine->tokenizer, prompt, strlen(prompt), NULL, &ids, &count, err);
    if (status) return status;
    status = perk_engine_generate(engine, ids, count, sampling, on_token, user, generation, err);
    free(ids);
    return status;
}

/* ---- logits ---- */

static perk_status check_ids(const perk_engine *engine, const int32_t *ids, size_t count, perk_error *err) {
    if (count > (size_t)engine->config.max_seq_length)
        return perk_fail(err, PERK_LIMIT,
                         "%zu tokens are more than max_seq_length %d: give fewer, or open with a larger max_seq_length",
                         count, engine->config.max_seq_length);
    for (size_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= engine->model->vocab_size)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "id %d (number %zu) is outside the model's vocabulary of %d",
                             ids[i], i, engine->model->vocab_size);
    return PERK_OK;
}

static perk_status run_chunk(perk_engine *engine, const int32_t *ids, size_t first, int32_t count, const int32_t *pages,
                             perk_step_result *result, perk_error *err) {
    perk_batch_clear(engine->batch);
    perk_status status =
        perk_batch_add(engine->batch, &engine->config, ids + first, count, (int32_t)first, pages, 2, err);
    bool has_programs = engine->report.backend == PERK_BACKEND_GPU;
    if (has_programs) perk_gpu_keep_to_largest(engine->executor, true);
    if (!status) status = run_batch(engine, engine->batch, true, result, err);
    if (has_programs) perk_gpu_keep_to_largest(engine->executor, false);
    if (!status && !result->logits) status = perk_fail(err, PERK_INTERNAL, "the step brought no logits");
    return status;
}

perk_status perk_engine_stream_logits(perk_engine *engine, const int32_t *ids, size_t count, perk_on_logits on_logits,
                                      void *user, perk_error *err) {
    perk_status status = check_own(engine, err);
    if (!status) status = check_ids(engine, ids, count, err);
    if (status || count == 0) return status;
    perk_error lost = {0};
    if ((status = bring_back(engine, &lost))) return close_after(engine, status, &lost, err);
    size_t page_size = (size_t)engine->config.page_size;
    int32_t page_count = (int32_t)perk_ceil_div(count, page_size);
    int32_t *pages = perk_calloc((size_t)engine->batch->pages_per_request, sizeof *pages);
    if (!pages) return perk_fail_memory(err, "a page list");
    if (!perk_scheduler_borrow(engine->scheduler, page_count, pages)) {
        free(pages);
        return perk_fail(err, PERK_INTERNAL, "%d KV pages cannot be had", page_count);
    }
    size_t chunk = (size_t)PERK_MIN(engine->config.max_num_batched_tokens, engine->config.max_num_logit_rows);
    for (size_t first = 0; !status && first < count; first += chunk) {
        int32_t rows = (int32_t)PERK_MIN(chunk, count - first);
        perk_step_result result;
        perk_error failure = {0};
        status = run_chunk(engine, ids, first, rows, pages, &result, &failure);
        if (status)
            close_after(engine, status, &failure, err);
        else
            status = on_logits(user, first, (size_t)rows, result.logits, err);
    }
    perk_scheduler_return(engine->scheduler, pages, page_count);
    free(pages);
    return status;
}

typedef struct logits_copy {
    float *out;
    size_t vocab;
} logits_copy;

static perk_status copy_logits(void *user, size_t first, size_t count, const float *logits, perk_error *err) {
    (void)err;
    logits_copy *copy = user;
    memcpy(copy->out + first * copy->vocab, logits, count * copy->vocab * sizeof *logits);
    return PERK_OK;
}

perk_status perk_engine_logits(perk_engine *engine, const int32_t *ids, size_t count, float *out, perk_error *err) {
    logits_copy copy = {.out = out, .vocab = (size_t)engine->model->vocab_size};
    return perk_engine_stream_logits(engine, ids, count, copy_logits, &copy, err);
}
