/* perk bench: measurements. decode: milliseconds a step at a batch and a context, beside the read ceiling of the same
 * run, after the same program's logits were compared with the reference executor's. */
#include "bench.h"
#include "bench_model.h"

#include "src/reference.h"

#include <math.h>
#include <time.h>

typedef struct decode_options {
    perk_bench_options bench;
    int json, no_check, page_cache;
    int32_t check_tokens;
} decode_options;

typedef struct decode_run {
    const decode_options *options;
    perk_bench bench;
    double ceiling;                  /* bytes a second */
    double check_error;              /* relative L2 against the reference; < 0: not made */
    uint64_t stream_bytes, kv_bytes; /* read in a step at the measured context */
} decode_run;

/* The logits of a short prompt's last token, from one executor. */
static perk_status last_logits(decode_run *run, perk_executor *executor, float *out, perk_error *err) {
    perk_bench *b = &run->bench;
    perk_step_result result = {0};
    int32_t total = run->options->check_tokens;
    for (int32_t position = 0; position < total; position++) {
        int32_t id = perk_bench_token(b, 0, position);
        perk_batch_clear(b->batch);
        perk_status status = perk_bench_add(b, 0, position, 1, &id, 1, err);
        if (status == PERK_OK) status = executor->type->step(executor, b->batch, position + 1 == total, &result, err);
        if (status != PERK_OK) return status;
    }
    memcpy(out, result.logits, (size_t)b->model->vocab_size * sizeof *out);
    return PERK_OK;
}

/* The program that is timed must compute what the reference computes: within the noise of bf16 in a deep network. */
static perk_status check(decode_run *run, perk_error *err) {
    const double limit = 5e-2;
    perk_bench *b = &run->bench;
    size_t vocab = (size_t)b->model->vocab_size;
    perk_executor *reference = NULL;
    float *got = perk_calloc(vocab, sizeof *got), *want = perk_calloc(vocab, sizeof *want);
    const perk_reference_options options = {.threads = b->options->threads, .precision = PERK_PRECISION_BF16};
    perk_status status = got && want ? PERK_OK : perk_fail_memory(err, "logits");
    if (status == PERK_OK)
        status = perk_reference_create(&reference, b->model->graph, b->model->checkpoint, &b->config, &options, err);
    if (status == PERK_OK) status = last_logits(run, b->gpu, got, err);
    if (status == PERK_OK) status = last_logits(run, reference, want, err);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < vocab && status == PERK_OK; i++) {
        difference += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    run->check_error = sqrt(difference / fmax(norm, 1e-30));
    if (status == PERK_OK && !(run->check_error <= limit))
        status = perk_fail(err, PERK_INTERNAL, "the program's logits differ from the reference's by %.3g (limit %.3g)",
                           run->check_error, limit);
    if (reference) reference->type->free(reference);
    free(got);
    free(want);
    return status;
}

static void count_bytes(decode_run *run) {
    const perk_bench_options *o = run->bench.options;
    const perk_plan *plan = perk_gpu_plan(run->bench.gpu);
    for (int i = 0; i < plan->task_count; i++) run->stream_bytes += plan->tasks[i].stream_bytes;
    uint64_t position_bytes = plan->kv_layer_bytes * (uint64_t)plan->graph->kv_layer_count /
                              ((uint64_t)plan->config.max_num_pages * (uint64_t)plan->config.page_size);
    run->kv_bytes = position_bytes * (uint64_t)o->batch * (uint64_t)(o->context + o->steps / 2);
}

static perk_status measure(decode_run *run, perk_error *err) {
    perk_status status = perk_bench_open(&run->bench, &run->options->bench, err);
    if (status == PERK_OK) status = perk_bench_open_gpu(&run->bench, false, err);
    run->check_error = -1;
    if (status == PERK_OK && !run->options->no_check) status = check(run, err);
    if (status == PERK_OK) status = perk_bench_prefill(&run->bench, err);
    if (status == PERK_OK) status = perk_bench_decode(&run->bench, err);
    if (status == PERK_OK) status = perk_gpu_read_ceiling(run->bench.gpu, 7, &run->ceiling, err);
    if (status == PERK_OK) count_bytes(run);
    return status;
}

static int print_results(decode_run *run) {
    perk_bench *b = &run->bench;
    const perk_bench_options *o = b->options;
    double wall = perk_bench_quantile(b->wall_ms, o->steps, 0.5), p10 = perk_bench_quantile(b->wall_ms, o->steps, 0.1);
    double p90 = perk_bench_quantile(b->wall_ms, o->steps, 0.9);
    double device = perk_bench_quantile(b->device_ms, o->steps, 0.5);
    double bytes = (double)(run->stream_bytes + run->kv_bytes);
    double floor_ms = bytes / run->ceiling * 1e3;
    char date[32];
    time_t now = time(NULL);
    struct tm utc;
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    if (!run->options->json) {
        printf("%s  batch %d  context %d  %s%s\n", o->model, o->batch, o->context, b->report.device,
               o->portable ? "  portable" : "");
        printf("  step          %8.3f ms (p10 %.3f, p90 %.3f); on the device %.3f ms\n", wall, p10, p90, device);
        printf("  read          %8.3f GB weights + %.3f GB KV; floor %.3f ms at %.3f TB/s\n",
               (double)run->stream_bytes * 1e-9, (double)run->kv_bytes * 1e-9, floor_ms, run->ceiling * 1e-12);
        printf("  of the ceiling %6.1f %% (step), %.1f %% (device)\n", 100 * floor_ms / wall, 100 * floor_ms / device);
        printf("  check          relative error %.2e against the reference executor%s\n", run->check_error,
               run->check_error < 0 ? " (not made)" : "");
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
                  o->steps, "portable", o->portable, "step_ms", wall, "step_ms_p10", p10, "step_ms_p90", p90,
                  "device_ms", device, "weight_bytes", (json_int_t)run->stream_bytes, "kv_bytes",
                  (json_int_t)run->kv_bytes, "read_ceiling_bytes_per_s", run->ceiling, "floor_ms", floor_ms,
                  "percent_of_ceiling", 100 * floor_ms / wall, "percent_of_ceiling_device", 100 * floor_ms / device,
                  "check_relative_error", run->check_error, "start", perk_cli_report_json(&b->report));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

static int run_decode(const decode_options *options) {
    perk_error err = {0};
    decode_run run = {.options = options};
    perk_status status = measure(&run, &err);
    int code = status == PERK_OK ? print_results(&run) : perk_cli_fail(&err);
    perk_bench_close(&run.bench);
    return code;
}

int perk_cli_bench(const perk_cli_command *self, int argc, char **argv) {
    decode_options o = {.bench = PERK_BENCH_DEFAULTS, .check_tokens = 4};
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_INT("check-tokens", &o.check_tokens, "N", "prompt of the comparison with the reference", 1, 64),
        PERK_CLI_OPTION_FLAG("no-check", &o.no_check, "do not compare; the result says so"),
        PERK_CLI_OPTION_FLAG("page-cache", &o.page_cache, "load: leave the files in the page cache"),
        PERK_CLI_OPTION_FLAG("json", &o.json, "the result as one JSON object"),
    };
    perk_cli_options options = {0};
    perk_cli_arguments arguments = {0};
    perk_bench_add_options(&options, &o.bench);
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 1, &arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    const char *what = arguments.count == 1 ? arguments.items[0] : "";
    bool is_load = strcmp(what, "load") == 0;
    if (!is_load && strcmp(what, "decode") != 0)
        return perk_cli_usage(self, "say what to measure: perk bench decode, or perk bench load");
    if (!o.bench.model) return perk_cli_usage(self, "--model is missing");
    const perk_bench_load_options load = {.model = o.bench.model,
                                          .threads = o.bench.threads,
                                          .warm = o.page_cache,
                                          .verbose = o.bench.verbose,
                                          .json = o.json};
    return perk_cli_finish(is_load ? perk_bench_load(&load) : run_decode(&o));
}
