/* perk bench: measurements. decode: milliseconds a step at a batch and a context, beside the read ceiling of the same
 * run, after the same program's logits were compared with the reference executor's. */
#include "bench.h"

#include "src/gpu.h"
#include "src/model.h"
#include "src/reference.h"

#include <math.h>
#include <time.h>

typedef struct bench_options {
    const char *model, *cache_folder;
    int random_weights, portable, json, no_check, verbose, no_cache, page_cache, stages;
    int32_t batch, context, steps, tokens, page_size, check_tokens, threads;
    uint64_t seed;
} bench_options;

typedef struct bench_state {
    const bench_options *options;
    perk_config config;
    perk_model *model;
    perk_executor *gpu;
    perk_batch *batch;
    perk_start_report report;
    int32_t *pages;                  /* [pages a request]: of the request being added */
    double *wall_ms, *device_ms;     /* [steps] */
    double ceiling;                  /* bytes a second */
    double check_error;              /* relative L2 against the reference; < 0: not made */
    uint64_t stream_bytes, kv_bytes; /* read in a step at the measured context */
} bench_state;

/* Any fixed text does for speed; the check compares the same ids in both executors. */
static int32_t some_token(const bench_state *b, int32_t request, int32_t position) {
    return (int32_t)(((int64_t)request * 7919 + (int64_t)position * 104729 + 17) % b->model->vocab_size);
}

static perk_status add_tokens(bench_state *b, perk_batch *batch, int32_t request, int32_t position, int32_t count,
                              const int32_t *ids, int want_logits, perk_error *err) {
    int32_t per_request = batch->pages_per_request;
    for (int32_t i = 0; i < per_request; i++) b->pages[i] = request * per_request + i;
    return perk_batch_add(batch, &b->config, ids, count, position, b->pages, want_logits, err);
}

/* Fills the cache of every request with `context` tokens. */
static perk_status prefill(bench_state *b, perk_error *err) {
    perk_step_result result;
    int32_t ids[64];
    for (int32_t request = 0; request < b->options->batch; request++)
        for (int32_t position = 0; position < b->options->context;) {
            int32_t count = PERK_MIN(b->config.max_num_batched_tokens, b->options->context - position);
            for (int32_t i = 0; i < count; i++) ids[i] = some_token(b, request, position + i);
            perk_batch_clear(b->batch);
            perk_status status = add_tokens(b, b->batch, request, position, count, ids, 0, err);
            if (status == PERK_OK) status = b->gpu->type->step(b->gpu, b->batch, false, &result, err);
            if (status != PERK_OK) return status;
            position += count;
        }
    return PERK_OK;
}

static perk_status decode(bench_state *b, perk_error *err) {
    enum { WARM_UP = 8 };
    perk_step_result result = {0};
    int32_t *next = perk_calloc((size_t)b->options->batch, sizeof *next);
    if (!next) return perk_fail_memory(err, "tokens");
    perk_status status = PERK_OK;
    for (int32_t r = 0; r < b->options->batch; r++) next[r] = some_token(b, r, b->options->context);
    for (int32_t step = -WARM_UP; step < b->options->steps && status == PERK_OK; step++) {
        perk_batch_clear(b->batch);
        for (int32_t r = 0; r < b->options->batch && status == PERK_OK; r++)
            status = add_tokens(b, b->batch, r, b->options->context + WARM_UP + step, 1, &next[r], 1, err);
        double begin = perk_now();
        if (status == PERK_OK) status = b->gpu->type->step(b->gpu, b->batch, false, &result, err);
        double end = perk_now();
        for (int32_t r = 0; r < b->options->batch && status == PERK_OK; r++) {
            next[r] = result.argmax[r];
            if (next[r] < 0 || next[r] >= b->model->vocab_size)
                status = perk_fail(err, PERK_INTERNAL, "step %d chose token %d", step, next[r]);
        }
        if (status == PERK_OK && step >= 0) {
            b->wall_ms[step] = (end - begin) * 1e3;
            status = perk_gpu_step_ms(b->gpu, &b->device_ms[step], err);
        }
    }
    free(next);
    return status;
}

/* The logits of a short prompt's last token, from one executor. */
static perk_status last_logits(bench_state *b, perk_executor *executor, float *out, perk_error *err) {
    perk_step_result result = {0};
    int32_t total = b->options->check_tokens;
    for (int32_t position = 0; position < total; position++) {
        int32_t id = some_token(b, 0, position);
        perk_batch_clear(b->batch);
        perk_status status = add_tokens(b, b->batch, 0, position, 1, &id, 1, err);
        if (status == PERK_OK) status = executor->type->step(executor, b->batch, position + 1 == total, &result, err);
        if (status != PERK_OK) return status;
    }
    memcpy(out, result.logits, (size_t)b->model->vocab_size * sizeof *out);
    return PERK_OK;
}

/* The program that is timed must compute what the reference computes: within the noise of bf16 in a deep network. */
static perk_status check(bench_state *b, perk_error *err) {
    const double limit = 5e-2;
    size_t vocab = (size_t)b->model->vocab_size;
    perk_executor *reference = NULL;
    float *got = perk_calloc(vocab, sizeof *got), *want = perk_calloc(vocab, sizeof *want);
    const perk_reference_options options = {.threads = b->options->threads, .precision = PERK_PRECISION_BF16};
    perk_status status = got && want ? PERK_OK : perk_fail_memory(err, "logits");
    if (status == PERK_OK)
        status = perk_reference_create(&reference, b->model->graph, b->model->checkpoint, &b->config, &options, err);
    if (status == PERK_OK) status = last_logits(b, b->gpu, got, err);
    if (status == PERK_OK) status = last_logits(b, reference, want, err);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < vocab && status == PERK_OK; i++) {
        difference += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    b->check_error = sqrt(difference / fmax(norm, 1e-30));
    if (status == PERK_OK && !(b->check_error <= limit))
        status = perk_fail(err, PERK_INTERNAL, "the program's logits differ from the reference's by %.3g (limit %.3g)",
                           b->check_error, limit);
    if (reference) reference->type->free(reference);
    free(got);
    free(want);
    return status;
}

static void count_bytes(bench_state *b) {
    const perk_plan *plan = perk_gpu_plan(b->gpu);
    for (int i = 0; i < plan->task_count; i++) b->stream_bytes += plan->tasks[i].stream_bytes;
    uint64_t position_bytes = plan->kv_layer_bytes * (uint64_t)plan->graph->kv_layer_count /
                              ((uint64_t)plan->config.max_num_pages * (uint64_t)plan->config.page_size);
    b->kv_bytes =
        position_bytes * (uint64_t)b->options->batch * (uint64_t)(b->options->context + b->options->steps / 2);
}

static perk_status open_all(bench_state *b, perk_error *err) {
    const bench_options *o = b->options;
    double begin = perk_now();
    b->config = (perk_config){.max_num_batched_tokens = PERK_MAX(o->tokens, o->batch),
                              .max_num_batched_requests = o->batch,
                              .page_size = o->page_size,
                              .max_seq_length = o->context + o->steps + 16};
    perk_status status = perk_model_open(&b->model, o->model, o->random_weights != 0, o->seed, err);
    if (status == PERK_OK) status = perk_config_resolve(&b->config, b->model->max_positions, err);
    if (status == PERK_OK) status = perk_batch_create(&b->batch, &b->config, err);
    if (status != PERK_OK) return status;
    b->report.open_ms = (perk_now() - begin) * 1e3;
    b->pages = perk_calloc((size_t)b->batch->pages_per_request, sizeof *b->pages);
    b->wall_ms = perk_calloc((size_t)o->steps, sizeof *b->wall_ms);
    b->device_ms = perk_calloc((size_t)o->steps, sizeof *b->device_ms);
    if (!b->pages || !b->wall_ms || !b->device_ms) return perk_fail_memory(err, "measurements");
    const perk_gpu_options gpu = {.portable = o->portable != 0,
                                  .timing = true,
                                  .profile = o->stages != 0,
                                  .cache_folder = o->cache_folder,
                                  .no_cache = o->no_cache != 0,
                                  .threads = o->threads,
                                  .log = perk_cli_log(o->verbose)};
    return perk_gpu_create(&b->gpu, b->model->graph, b->model->checkpoint, &b->config, &gpu, &b->report, err);
}

static perk_status measure(bench_state *b, perk_error *err) {
    perk_status status = open_all(b, err);
    b->check_error = -1;
    if (status == PERK_OK && !b->options->no_check) status = check(b, err);
    if (status == PERK_OK) status = prefill(b, err);
    if (status == PERK_OK) status = decode(b, err);
    if (status == PERK_OK) status = perk_gpu_read_ceiling(b->gpu, 7, &b->ceiling, err);
    if (status == PERK_OK) count_bytes(b);
    return status;
}

static void close_all(bench_state *b) {
    if (b->gpu) b->gpu->type->free(b->gpu);
    perk_batch_free(b->batch);
    perk_model_free(b->model);
    free(b->pages);
    free(b->wall_ms);
    free(b->device_ms);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int print_results(bench_state *b) {
    const bench_options *o = b->options;
    size_t n = (size_t)o->steps;
    qsort(b->wall_ms, n, sizeof *b->wall_ms, by_value);
    qsort(b->device_ms, n, sizeof *b->device_ms, by_value);
    double wall = b->wall_ms[n / 2], device = b->device_ms[n / 2];
    double bytes = (double)(b->stream_bytes + b->kv_bytes);
    double floor_ms = bytes / b->ceiling * 1e3;
    char date[32];
    time_t now = time(NULL);
    struct tm utc;
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    if (!o->json) {
        printf("%s  batch %d  context %d  %s%s\n", o->model, o->batch, o->context, b->report.device,
               o->portable ? "  portable" : "");
        printf("  step          %8.3f ms (p10 %.3f, p90 %.3f); on the device %.3f ms\n", wall, b->wall_ms[n / 10],
               b->wall_ms[n * 9 / 10], device);
        printf("  read          %8.3f GB weights + %.3f GB KV; floor %.3f ms at %.3f TB/s\n",
               (double)b->stream_bytes * 1e-9, (double)b->kv_bytes * 1e-9, floor_ms, b->ceiling * 1e-12);
        printf("  of the ceiling %6.1f %% (step), %.1f %% (device)\n", 100 * floor_ms / wall, 100 * floor_ms / device);
        printf("  check          relative error %.2e against the reference executor%s\n", b->check_error,
               b->check_error < 0 ? " (not made)" : "");
        printf("  start          driver %.0f, context %.0f, plan %.1f, check %.1f, emit %.1f, compile %.0f%s, module "
               "%.1f, weights %.0f ms "
               "(%.2f GB/s)\n",
               b->report.driver_ms, b->report.context_ms, b->report.plan_ms, b->report.check_ms, b->report.emit_ms,
               b->report.compile_ms, b->report.cache_hit ? " (cached)" : "", b->report.module_ms, b->report.weights_ms,
               (double)b->report.weights_bytes * 1e-6 / b->report.weights_ms);
        return PERK_EXIT_OK;
    }
    json_t *json =
        json_pack("{s:s, s:s, s:s, s:i, s:i, s:i, s:b, s:f, s:f, s:f, s:f, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:o}",
                  "what", "decode", "model", o->model, "date", date, "batch", o->batch, "context", o->context, "steps",
                  o->steps, "portable", o->portable, "step_ms", wall, "step_ms_p10", b->wall_ms[n / 10], "step_ms_p90",
                  b->wall_ms[n * 9 / 10], "device_ms", device, "weight_bytes", (json_int_t)b->stream_bytes, "kv_bytes",
                  (json_int_t)b->kv_bytes, "read_ceiling_bytes_per_s", b->ceiling, "floor_ms", floor_ms,
                  "percent_of_ceiling", 100 * floor_ms / wall, "percent_of_ceiling_device", 100 * floor_ms / device,
                  "check_relative_error", b->check_error, "start", perk_cli_report_json(&b->report));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

/* The stages of all layers under one name: "layers.7.qkv" counts as "layers.*.qkv". */
static void general_name(const char *name, char out[96]) {
    int layer = 0, used = 0;
    if (sscanf(name, "layers.%d.%n", &layer, &used) == 1 && used > 0)
        snprintf(out, 96, "layers.*.%s", name + used);
    else
        snprintf(out, 96, "%s", name);
}

static int print_stages(bench_state *b) {
    const perk_plan *plan = perk_gpu_plan(b->gpu);
    perk_error err = {0};
    perk_stage_time *times = perk_calloc((size_t)plan->stage_count, sizeof *times);
    if (!times || perk_gpu_stage_times(b->gpu, times, &err) != PERK_OK) {
        free(times);
        return perk_cli_fail(&err);
    }
    printf("  %-36s %5s %9s %8s %8s %8s %8s   us\n", "stage", "count", "in all", "chain", "run", "longest", "wait");
    for (int s = 0; s < plan->stage_count; s++) {
        char name[96], other[96];
        perk_stage_time sum = {0};
        int count = 0;
        general_name(plan->stages[s].name, name);
        for (int t = 0; t < plan->stage_count; t++) {
            general_name(plan->stages[t].name, other);
            if (strcmp(name, other) != 0) continue;
            if (t < s) break; /* printed with its first layer */
            sum.chain += times[t].chain;
            sum.run += times[t].run;
            sum.worst += times[t].worst;
            sum.wait += times[t].wait;
            count++;
        }
        if (count > 0)
            printf("  %-36s %5d %9.1f %8.2f %8.2f %8.2f %8.2f\n", name, count, sum.chain, sum.chain / count,
                   sum.run / count, sum.worst / count, sum.wait / count);
    }
    free(times);
    return PERK_EXIT_OK;
}

static int run_bench(const bench_options *options) {
    perk_error err = {0};
    bench_state state = {.options = options};
    perk_status status = measure(&state, &err);
    int code = status == PERK_OK ? print_results(&state) : perk_cli_fail(&err);
    if (code == PERK_EXIT_OK && options->stages) code = print_stages(&state);
    close_all(&state);
    return code;
}

int perk_cli_bench(const perk_cli_command *self, int argc, char **argv) {
    bench_options o = {.batch = 1, .context = 512, .steps = 64, .page_size = 64, .check_tokens = 4, .tokens = 1};
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("model", &o.model, "DIR|config.json", "what to measure"),
        PERK_CLI_OPTION_FLAG("random-weights", &o.random_weights, "draw the weights; the config alone is needed"),
        PERK_CLI_OPTION_INT("batch", &o.batch, "N", "requests in a step", 1, 64),
        PERK_CLI_OPTION_INT("context", &o.context, "N", "tokens that every request has before", 1, 1 << 20),
        PERK_CLI_OPTION_INT("steps", &o.steps, "N", "steps to time", 1, 100000),
        PERK_CLI_OPTION_INT("max-batched-tokens", &o.tokens, "N",
                            "tokens that the program is built for (at least the batch)", 1, 64),
        PERK_CLI_OPTION_INT("page-size", &o.page_size, "N", "positions in a KV page", 16, 4096),
        PERK_CLI_OPTION_INT("check-tokens", &o.check_tokens, "N", "prompt of the comparison with the reference", 1, 64),
        PERK_CLI_OPTION_FLAG("no-check", &o.no_check, "do not compare; the result says so"),
        PERK_CLI_OPTION_FLAG("portable", &o.portable, "sm_80 instructions only"),
        PERK_CLI_OPTION_SEED("seed", &o.seed, "of the random weights"),
        PERK_CLI_OPTION_INT("threads", &o.threads, "N", "of loading and of the reference", 0, 1024),
        PERK_CLI_OPTION_TEXT("cache-dir", &o.cache_folder, "DIR", "the cubin cache"),
        PERK_CLI_OPTION_FLAG("no-cache", &o.no_cache, "compile anew, keep nothing"),
        PERK_CLI_OPTION_FLAG("stages", &o.stages, "decode: a profiled program, and where the last step's time went"),
        PERK_CLI_OPTION_FLAG("page-cache", &o.page_cache, "load: leave the files in the page cache"),
        PERK_CLI_OPTION_FLAG("verbose", &o.verbose, "the log on stderr"),
        PERK_CLI_OPTION_FLAG("json", &o.json, "the result as one JSON object"),
    };
    perk_cli_options options = {0};
    perk_cli_arguments arguments = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 1, &arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    const char *what = arguments.count == 1 ? arguments.items[0] : "";
    bool is_load = strcmp(what, "load") == 0;
    if (!is_load && strcmp(what, "decode") != 0)
        return perk_cli_usage(self, "say what to measure: perk bench decode, or perk bench load");
    if (!o.model) return perk_cli_usage(self, "--model is missing");
    const perk_bench_load_options load = {
        .model = o.model, .threads = o.threads, .warm = o.page_cache, .verbose = o.verbose, .json = o.json};
    return perk_cli_finish(is_load ? perk_bench_load(&load) : run_bench(&o));
}
