/* perk bench decode: milliseconds a step by batch and context, beside the read ceiling of the same run, after the same
 * program's logits were compared with the reference executor's. --many-steps: the steps follow each other in one
 * launch, and their tokens are compared with those of a launch a step. */
#include "bench.h"

#include <errno.h>

enum { MAX_LIST = 32, MAX_BATCH = 65536, MAX_CONTEXT = 1 << 20 };

typedef struct number_list {
    int32_t items[MAX_LIST];
    int count;
} number_list;

/* What was measured at one batch and one context. */
typedef struct decode_result {
    perk_bench_spread step, device; /* milliseconds; device: of a launch a step */
    double mean;                    /* of the steps */
    double ceiling;                 /* bytes a second */
    double floor_ms;
    double check_error;              /* < 0: not made */
    uint64_t stream_bytes, kv_bytes; /* read in a step: the last one; at the measured context */
} decode_result;

static int parse_list(const perk_bench_command *c, const char *option, const char *text, int32_t max,
                      number_list *list) {
    for (const char *at = text;; at++) {
        char *end;
        errno = 0;
        long value = strtol(at, &end, 10);
        if (errno || end == at || (*end && *end != ',') || value < 1 || value > max || list->count == MAX_LIST)
            return perk_cli_usage(c->self,
                                  "--%s must be up to %d whole numbers from 1 to %d with commas between, not \"%s\"",
                                  option, (int)MAX_LIST, max, text);
        list->items[list->count++] = (int32_t)value;
        if (*end == '\0') return PERK_EXIT_GO_ON;
        at = end;
    }
}

static void count_floor(const perk_bench *b, decode_result *result) {
    const perk_bench_options *o = b->options;
    const perk_plan *plan = perk_gpu_plan(b->gpu);
    uint64_t position_bytes = plan->kv_layer_bytes * (uint64_t)plan->graph->kv_layer_count /
                              ((uint64_t)plan->config.max_num_pages * (uint64_t)plan->config.page_size);
    result->kv_bytes = position_bytes * (uint64_t)o->batch * (uint64_t)(o->context + o->steps / 2);
    result->floor_ms = (double)(result->stream_bytes + result->kv_bytes) / result->ceiling * 1e3;
}

static perk_status measure(const perk_bench_command *c, perk_bench *b, decode_result *result, perk_error *err) {
    int32_t steps = b->options->steps;
    perk_status status = perk_bench_open_gpu(b, false, err);
    result->check_error = -1;
    if (status == PERK_OK && !c->no_check)
        status = perk_bench_check(b, c->check_tokens ? c->check_tokens : 4, 1, &result->check_error, err);
    if (status == PERK_OK) status = perk_bench_prefill(b, err);
    if (status == PERK_OK) status = perk_bench_decode(b, err);
    if (status == PERK_OK && b->options->many_steps) status = perk_bench_launch(b, err);
    if (status == PERK_OK) status = perk_gpu_streamed_bytes(b->gpu, &result->stream_bytes, err);
    if (status == PERK_OK) status = perk_gpu_read_ceiling(b->gpu, 7, &result->ceiling, err);
    if (status != PERK_OK) return status;
    for (int32_t i = 0; i < steps; i++) result->mean += b->wall_ms[i] / steps;
    result->step = perk_bench_spread_of(b->wall_ms, steps);
    result->device = perk_bench_spread_of(b->device_ms, steps);
    count_floor(b, result);
    return PERK_OK;
}

static bool print_json(const perk_bench *b, const decode_result *r) {
    const perk_bench_options *o = b->options;
    json_t *json = perk_bench_result("decode", o->model, b->report.device);
    json_t *rest =
        json_pack("{s:i, s:i, s:i, s:b, s:f, s:i, s:b, s:b, s:I, s:I, s:f, s:f, s:f, s:f, s:o}", "batch", o->batch,
                  "context", o->context, "steps", o->steps, "many_steps_a_launch", o->many_steps, "step_ms_mean",
                  r->mean, "max_batched_tokens", b->config.max_num_batched_tokens, "portable", o->portable,
                  "random_weights", o->random_weights, "weight_bytes", (json_int_t)r->stream_bytes, "kv_bytes",
                  (json_int_t)r->kv_bytes, "read_ceiling_bytes_per_s", r->ceiling, "floor_ms", r->floor_ms,
                  "percent_of_ceiling", 100 * r->floor_ms / r->step.median, "percent_of_ceiling_device",
                  100 * r->floor_ms / r->device.median, "start", perk_cli_report_json(&b->report));
    perk_bench_put_spread(json, "step_ms", r->step);
    perk_bench_put_spread(json, "device_ms", r->device);
    perk_bench_put_check(json, r->check_error);
    return perk_cli_print_json(perk_bench_join(json, rest)) && fflush(stdout) == 0;
}

static void print_head(const perk_bench *b) {
    const perk_bench_options *o = b->options;
    printf("%s  %s%s  medians of %d steps%s (10th, 90th percentile)\n", o->model, b->report.device,
           o->portable ? "  portable" : "", o->steps, o->many_steps ? " of one launch" : "");
    printf("  %5s %7s  %-26s %-26s %-15s %7s %8s %9s %9s  %s\n", "batch", "context", "step, ms", "on the device, ms",
           "weights, KV, GB", "TB/s", "floor,ms", "of it,%", "device,%", "check");
}

static void print_row(const perk_bench *b, const decode_result *r) {
    const perk_bench_options *o = b->options;
    char step[64], device[64], bytes[64], check[32];
    snprintf(step, sizeof step, "%.3f (%.3f, %.3f)", r->step.median, r->step.p10, r->step.p90);
    snprintf(device, sizeof device, "%.3f (%.3f, %.3f)", r->device.median, r->device.p10, r->device.p90);
    snprintf(bytes, sizeof bytes, "%.3f + %.3f", (double)r->stream_bytes * 1e-9, (double)r->kv_bytes * 1e-9);
    printf("  %5d %7d  %-26s %-26s %-15s %7.3f %8.3f %9.1f %9.1f  %s\n", o->batch, o->context, step, device, bytes,
           r->ceiling * 1e-12, r->floor_ms, 100 * r->floor_ms / r->step.median, 100 * r->floor_ms / r->device.median,
           perk_bench_check_text(r->check_error, check, sizeof check));
}

/* Every batch at every context: a program each. Results are printed as they come, so that a failure keeps those before
 * it. */
static perk_status measure_all(const perk_bench_command *c, perk_bench *b, const number_list *batches,
                               const number_list *contexts, perk_error *err) {
    perk_bench_options options = c->bench;
    perk_status status = perk_bench_open_model(b, &options, err);
    for (int i = 0; i < batches->count * contexts->count && status == PERK_OK; i++) {
        decode_result result = {0};
        options.batch = batches->items[i / contexts->count];
        options.context = contexts->items[i % contexts->count];
        status = perk_bench_set_shape(b, &options, err);
        if (status == PERK_OK) status = measure(c, b, &result, err);
        if (status == PERK_OK && c->json && !print_json(b, &result))
            status = perk_fail(err, PERK_IO, "the result of batch %d, context %d was not written", options.batch,
                               options.context);
        if (status != PERK_OK || c->json) continue;
        if (i == 0) print_head(b);
        print_row(b, &result);
        fflush(stdout);
    }
    perk_bench_close(b); /* before its options end */
    return status;
}

int perk_bench_measure_decode(const perk_bench_command *c) {
    perk_error err = {0};
    perk_bench bench = {0};
    number_list batches = {0}, contexts = {0};
    int code = parse_list(c, "batch", c->batches ? c->batches : "1", MAX_BATCH, &batches);
    if (code == PERK_EXIT_GO_ON)
        code = parse_list(c, "context", c->contexts ? c->contexts : "512", MAX_CONTEXT, &contexts);
    if (code != PERK_EXIT_GO_ON) return code;
    return measure_all(c, &bench, &batches, &contexts, &err) == PERK_OK ? PERK_EXIT_OK : perk_cli_fail(&err);
}
