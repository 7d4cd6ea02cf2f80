/* perk bench serve: an engine behind a service under requests that arrive when they like, measured and checked at the
 * same time; --soak for long. */
#include "bench.h"

#include <math.h>

/* Where an answer may differ from the one that the request gets alone: on a GPU keys, values and logits depend on the
 * batch as far as the rounding of bf16 goes, and so does a choice between two tokens that are that close. */
static const double NEAR_TIE = 0.1;

void perk_serve_add_options(perk_cli_options *list, perk_serve_options *o) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_FLOAT("rate", &o->rate, "R", "serve: arrivals a second; 4", 0.001, 1e6),
        PERK_CLI_OPTION_FLOAT("duration", &o->duration, "S", "serve: seconds in which they come; 10", 0.001, 1e6),
        PERK_CLI_OPTION_TEXT("trace", &o->trace, "FILE", "serve: arrivals as the file says"),
        PERK_CLI_OPTION_TEXT("prompts", &o->prompts, "N-N", "serve: tokens of a prompt; 16-256"),
        PERK_CLI_OPTION_TEXT("answers", &o->answers, "N-N", "serve: tokens of an answer; 16-128"),
        PERK_CLI_OPTION_FLOAT("cancels", &o->cancels, "P", "serve: share of requests that are cancelled; 0", 0, 1),
        PERK_CLI_OPTION_FLOAT("alike", &o->alike, "P", "serve: share of prompts that begin like others; 0", 0, 1),
        PERK_CLI_OPTION_INT("checks", &o->checks, "N", "serve: answers compared with those of the request alone; 8", 1,
                            10000),
        PERK_CLI_OPTION_FLAG("soak", &o->soak, "serve: 600 s, with cancels, prompts alike and few pages"),
        PERK_CLI_OPTION_INT("max-unfinished", &o->max_unfinished, "N", "serve: a request beyond is refused", 1,
                            1 << 20),
        PERK_CLI_OPTION_INT("max-seq-length", &o->max_seq_length, "N",
                            "serve: prompt and answer; the longest that come", 1, INT32_MAX),
        PERK_CLI_OPTION_INT("max-pages", &o->max_pages, "N", "serve: KV pages in the pool", 1, INT32_MAX),
        PERK_CLI_OPTION_CHOICE("backend", &o->backend, "auto|gpu|reference", "serve: auto: the GPU where there is one"),
        PERK_CLI_OPTION_CHOICE("mode", &o->mode, PERK_CLI_MODES, "serve: how steps follow each other on a GPU"),
    };
    perk_cli_add(list, items, (int)PERK_COUNT(items));
}

typedef struct serve_bench {
    const perk_bench_command *command;
    perk_serve_options options; /* with all defaults filled in */
    perk_engine_options engine;
    perk_serve_plan plan;
    perk_serve_result result;
    perk_start_report report;
    uint64_t compared_tokens;
    int32_t compared, near_ties; /* answers; of them, those that parted at two tokens that were nearly alike */
} serve_bench;

/* ---- defaults ---- */

static void fill_options(serve_bench *b) {
    perk_serve_options *o = &b->options;
    const bool soak = o->soak != 0;
    if (!o->rate) o->rate = soak ? 20 : 4;
    if (!o->duration && !o->trace) o->duration = soak ? 600 : 10;
    if (!o->prompts) o->prompts = "16-256";
    if (!o->answers) o->answers = "16-128";
    if (!o->checks) o->checks = soak ? 64 : 8;
    if (b->command->no_check) o->checks = 0;
    if (soak && !o->cancels) o->cancels = 0.25f;
    if (soak && !o->alike) o->alike = 0.5f;
}

/* Few pages: enough for the longest request, and for a quarter of what a full batch could need. */
static perk_status fill_engine(serve_bench *b, perk_error *err) {
    const perk_bench_options *o = &b->command->bench;
    char *end = NULL;
    long batch = b->command->batches ? strtol(b->command->batches, &end, 10) : 8;
    if (end && (*end || batch < 1 || batch > 65536))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "--batch must be one whole number from 1 to 65536 here");
    if (o->unlimited_waits)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "--unlimited-waits is for the other measurements");
    int32_t length = b->options.max_seq_length ? b->options.max_seq_length : b->plan.longest;
    perk_config *config = &b->engine.config;
    *config = (perk_config){.max_num_batched_tokens = o->tokens ? o->tokens : PERK_MAX(16, (int32_t)batch),
                            .max_num_batched_requests = (int32_t)batch,
                            .page_size = o->page_size,
                            .max_num_pages = b->options.max_pages,
                            .max_seq_length = length};
    if (b->options.soak && !config->max_num_pages) {
        int64_t each = (int64_t)perk_ceil_div((uint64_t)length, (uint64_t)o->page_size);
        config->max_num_pages = (int32_t)PERK_MIN(PERK_MAX(each, each * batch / 4), INT32_MAX);
    }
    if (b->options.soak && !b->options.max_unfinished) b->options.max_unfinished = (int32_t)batch * 4;
    b->engine.backend = (perk_backend)b->options.backend;
    b->engine.mode = (perk_mode)b->options.mode;
    b->engine.threads = o->threads;
    b->engine.portable = o->portable;
    b->engine.random_weights = o->random_weights;
    b->engine.seed = o->seed;
    b->engine.cache_folder = o->cache_folder;
    b->engine.no_cache = o->no_cache;
    b->engine.log = perk_cli_log(o->verbose);
    return PERK_OK;
}

/* ---- the same requests alone ---- */

static perk_status answer_alone(const serve_bench *b, perk_engine *engine, perk_serve_sample *sample, int32_t *prompt,
                                perk_error *err) {
    const perk_serve_request *request = &b->plan.requests[sample->request];
    perk_sampling sampling = perk_serve_sampling(request);
    perk_request *alone;
    int32_t running = 1;
    sampling.logprobs = 1;
    sampling.top_logprobs = 2;
    perk_serve_prompt(&b->plan, sample->request, perk_engine_vocab_size(engine), prompt);
    perk_status status = perk_engine_submit(engine, prompt, (size_t)request->prompt_tokens, &sampling, &alone, err);
    if (status) return perk_fail_prefix(err, status, "request %zu", sample->request);
    while (!status && running) status = perk_engine_step(engine, &running, err);
    const int32_t *tokens = perk_request_tokens(alone, &sample->alone_count);
    for (size_t i = 0; i < sample->alone_count && !status; i++) {
        const perk_logprob *top = perk_request_logprobs(alone, i, NULL);
        sample->alone[i] = tokens[i];
        sample->gap[i] = top[1].logprob - top[2].logprob;
    }
    perk_request_free(alone);
    return status;
}

/* By an engine of their own, so that they find no pages that the measured ones left, nor the other way round. */
static perk_status answer_samples_alone(const serve_bench *b, perk_error *err) {
    perk_engine_options options = b->engine;
    perk_engine *engine;
    if (b->plan.sample_count == 0) return PERK_OK;
    options.no_prefix_sharing = 1;
    options.mode = PERK_MODE_SINGLE;
    int32_t *prompt = perk_calloc((size_t)b->plan.longest_prompt, sizeof *prompt);
    if (!prompt) return perk_fail_memory(err, "a prompt");
    perk_status status = perk_engine_open(&engine, b->command->bench.model, &options, err);
    for (int32_t i = 0; i < b->plan.sample_count && !status; i++)
        if (b->plan.samples[i].is_taken) status = answer_alone(b, engine, &b->plan.samples[i], prompt, err);
    perk_engine_free(engine);
    free(prompt);
    return status;
}

/* Counts the sample; what comes after a near tie answers another text, and says nothing. */
static perk_status compare_sample(serve_bench *b, const perk_serve_sample *sample, perk_error *err) {
    const bool exact = b->report.backend == PERK_BACKEND_REFERENCE;
    size_t same = 0;
    if (sample->read_count > sample->alone_count)
        return perk_fail(err, PERK_INTERNAL, "request %zu gets %zu tokens alone and %zu in the batch", sample->request,
                         sample->alone_count, sample->read_count);
    while (same < sample->read_count && sample->read[same] == sample->alone[same]) same++;
    b->compared += sample->read_count > 0;
    b->compared_tokens += same;
    if (same == sample->read_count) return PERK_OK;
    if (exact || !((double)sample->gap[same] <= NEAR_TIE))
        return perk_fail(err, PERK_INTERNAL,
                         "request %zu: token %zu of the answer is %d, and alone it is %d, which is ahead of the next "
                         "token by %.3g",
                         sample->request, same, sample->read[same], sample->alone[same], (double)sample->gap[same]);
    b->near_ties++;
    return PERK_OK;
}

/* ---- the result ---- */

static double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

static void put_times(json_t *json, const char *name, const perk_serve_times *times) {
    static const struct {
        const char *suffix;
        double part;
    } parts[] = {{"p50", 0.5}, {"p99", 0.99}};
    for (size_t i = 0; i < PERK_COUNT(parts); i++) {
        char key[64];
        snprintf(key, sizeof key, "%s_ms_%s", name, parts[i].suffix);
        json_object_set_new(json, key, json_real(perk_serve_quantile(times, parts[i].part)));
    }
}

static json_t *setup_json(const serve_bench *b) {
    const perk_serve_options *o = &b->options;
    const perk_config *config = &b->engine.config;
    json_t *json = json_pack("{s:b, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:I, s:b, s:o}", "soak", o->soak, "batch",
                             config->max_num_batched_requests, "max_batched_tokens", config->max_num_batched_tokens,
                             "page_size", config->page_size, "max_pages", b->result.stats.pages, "max_seq_length",
                             config->max_seq_length, "max_unfinished", o->max_unfinished, "cancels", (double)o->cancels,
                             "alike", (double)o->alike, "seed", (json_int_t)b->plan.seed, "random_weights",
                             b->engine.random_weights, "start", perk_cli_report_json(&b->report));
    static const char *const modes[] = {"single", "completion", "online"}; /* PERK_CLI_MODES */
    json_object_set_new(json, "mode", json_string(modes[b->engine.mode]));
    json_object_set_new(json, "duration_s", o->duration > 0 ? json_real((double)o->duration) : json_null());
    if (o->trace) json_object_set_new(json, "trace", json_string(o->trace));
    if (o->trace) return json;
    json_object_set_new(json, "rate", json_real((double)o->rate));
    json_object_set_new(json, "prompts", json_string(o->prompts));
    json_object_set_new(json, "answers", json_string(o->answers));
    return json;
}

/* What each program ran, in how many launches. */
static json_t *programs_json(const serve_bench *b) {
    const perk_engine_stats *s = &b->result.stats;
    json_t *programs = json_array();
    for (int i = 0; i < b->report.program_count; i++)
        json_array_append_new(programs, json_pack("{s:i, s:I, s:I}", "tokens", b->report.programs[i].tokens, "steps",
                                                  (json_int_t)s->program_steps[i], "launches",
                                                  (json_int_t)s->program_launches[i]));
    return programs;
}

static json_t *result_json(const serve_bench *b) {
    const perk_serve_result *r = &b->result;
    const perk_engine_stats *s = &r->stats;
    json_t *json = json_pack("{s:I, s:I, s:I, s:I, s:f, s:f, s:I, s:I, s:f, s:I, s:I, s:I, s:i}", "requests",
                             (json_int_t)r->submitted, "refused", (json_int_t)r->refused, "cancelled",
                             (json_int_t)r->cancelled, "tokens", (json_int_t)r->tokens, "seconds", r->seconds,
                             "tokens_per_s", share((double)r->tokens, r->seconds), "steps", (json_int_t)s->steps,
                             "step_tokens", (json_int_t)s->step_tokens, "batch_fill", s->batch_fill, "found_tokens",
                             (json_int_t)s->found_tokens, "set_backs", (json_int_t)s->set_backs, "evictions",
                             (json_int_t)s->evictions, "most_unfinished", r->most_unfinished);
    json_t *rest =
        json_pack("{s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:i, s:I, s:i, s:i}", "cpu_percent",
                  100 * share(r->process_cpu, r->seconds), "service_thread_cpu_percent",
                  100 * share(r->service_cpu, r->seconds), "reader_cpu_percent", 100 * share(r->reader_cpu, r->seconds),
                  "submitter_cpu_percent", 100 * share(r->submitter_cpu, r->seconds), "rss_begin_bytes",
                  (json_int_t)r->rss_begin, "rss_middle_bytes", (json_int_t)r->rss_middle, "rss_end_bytes",
                  (json_int_t)r->rss_end, "compared_answers", b->compared, "compared_tokens",
                  (json_int_t)b->compared_tokens, "near_ties", b->near_ties, "pages_in_use_at_end", s->pages_in_use);
    json_object_set_new(json, "program_turns", programs_json(b));
    put_times(json, "first_token", &r->first_token);
    put_times(json, "next_token", &r->next_token);
    put_times(json, "queue", &r->queue);
    return perk_bench_join(json, rest);
}

static void print_times(const char *what, const perk_serve_times *times) {
    printf("  %-22s %10.3f %10.3f\n", what, perk_serve_quantile(times, 0.5), perk_serve_quantile(times, 0.99));
}

static void print_text(const serve_bench *b) {
    const perk_serve_result *r = &b->result;
    const perk_engine_stats *s = &r->stats;
    printf("%s  %s  %llu requests in %.1f s, %llu refused, %llu cancelled; at most %d unfinished\n",
           b->command->bench.model, b->report.device, (unsigned long long)r->submitted, r->seconds,
           (unsigned long long)r->refused, (unsigned long long)r->cancelled, r->most_unfinished);
    printf("  %-22s %10s %10s\n", "milliseconds", "p50", "p99");
    print_times("to the first token", &r->first_token);
    print_times("to each next token", &r->next_token);
    print_times("of the first, queued", &r->queue);
    printf("  %llu tokens, %.1f a second; %llu steps, %.1f %% full; %llu positions found, %llu set back, %llu pages "
           "evicted\n",
           (unsigned long long)r->tokens, share((double)r->tokens, r->seconds), (unsigned long long)s->steps,
           100 * s->batch_fill, (unsigned long long)s->found_tokens, (unsigned long long)s->set_backs,
           (unsigned long long)s->evictions);
    for (int i = 0; i < b->report.program_count; i++)
        printf("  program for %d tokens: %llu steps in %llu launches\n", b->report.programs[i].tokens,
               (unsigned long long)s->program_steps[i], (unsigned long long)s->program_launches[i]);
    printf("  CPU, %% of one core: process %.1f, service's thread %.1f, reader %.1f, submitter %.1f\n",
           100 * share(r->process_cpu, r->seconds), 100 * share(r->service_cpu, r->seconds),
           100 * share(r->reader_cpu, r->seconds), 100 * share(r->submitter_cpu, r->seconds));
    printf("  memory, MB: %.1f at the beginning, %.1f in the middle, %.1f at the end\n", (double)r->rss_begin * 1e-6,
           (double)r->rss_middle * 1e-6, (double)r->rss_end * 1e-6);
    printf("  no token lost or repeated, no page held at the end; ");
    if (b->plan.sample_count)
        printf("%llu tokens of %d answers are those of the requests alone, %d parted at a near tie\n",
               (unsigned long long)b->compared_tokens, b->compared, b->near_ties);
    else
        printf("answers were not compared\n");
}

static bool print_result(const serve_bench *b) {
    if (!b->command->json) return print_text(b), true;
    json_t *json = perk_bench_result("serve", b->command->bench.model, b->report.device);
    return perk_cli_print_json(perk_bench_join(perk_bench_join(json, setup_json(b)), result_json(b)));
}

/* ---- the command ---- */

static int prepare(serve_bench *b) {
    perk_error err = {0};
    perk_status status = perk_serve_plan_make(&b->plan, &b->options, b->command->bench.seed, &err);
    if (!status) status = fill_engine(b, &err);
    if (status == PERK_INVALID_ARGUMENT) return perk_cli_usage(b->command->self, "%s", err.message);
    return status ? perk_cli_fail(&err) : PERK_EXIT_GO_ON;
}

static perk_status measure(serve_bench *b, perk_error *err) {
    perk_engine *engine;
    perk_serve_run *run = NULL;
    perk_status status = perk_engine_open(&engine, b->command->bench.model, &b->engine, err);
    if (status) return status;
    b->report = *perk_engine_report(engine);
    b->engine.config = *perk_engine_config(engine);
    status = perk_serve_run_open(&run, &b->plan, engine, b->options.max_unfinished, err);
    if (!status) status = perk_serve_run_all(run, &b->result, err);
    perk_serve_run_free(run);
    if (!status) status = answer_samples_alone(b, err);
    for (int32_t i = 0; i < b->plan.sample_count && !status; i++) status = compare_sample(b, &b->plan.samples[i], err);
    return status;
}

int perk_bench_measure_serve(const perk_bench_command *c) {
    perk_error err = {0};
    serve_bench *b = perk_calloc(1, sizeof *b); /* its times are large */
    if (!b) {
        perk_fail_memory(&err, "times");
        return perk_cli_fail(&err);
    }
    b->command = c;
    b->options = c->serve;
    fill_options(b);
    int code = prepare(b);
    if (code == PERK_EXIT_GO_ON)
        code = measure(b, &err) ? perk_cli_fail(&err) : print_result(b) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
    perk_serve_plan_free(&b->plan);
    free(b);
    return code;
}
