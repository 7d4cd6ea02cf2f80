/* perk bench prefill: how long a prompt takes, from the first of its steps to the last, and what that is in arithmetic.
 * The linear layers' share of it is counted, attention's is not, and the time is that of everything. */
#include "bench.h"

#include "src/ops/op.h"

enum { DEFAULT_ROWS = 64, DEFAULT_PROMPTS = 5, CHECK_ROWS = 64 };

typedef struct prefill_result {
    perk_bench_spread prompt, device; /* milliseconds of a whole prompt */
    double ceiling;                   /* bytes a second */
    double check_error;               /* < 0: not made */
    double flops;                     /* of the linear layers in a prompt */
    double weight_bytes;              /* read in a prompt */
    int32_t steps;                    /* of a prompt */
} prefill_result;

/* One prompt; in the last step, the logits of its last token are wanted. *device_ms, where asked for: the sum of the
 * launches. That costs a call of the driver a step, so the prompt's own time is taken without. */
static perk_status read_prompt(perk_bench *b, double *wall_ms, double *device_ms, perk_error *err) {
    int32_t total = b->options->context, chunk = b->config.max_num_batched_tokens;
    perk_status status = PERK_OK;
    double begin = perk_now(), sum = 0;
    for (int32_t position = 0; position < total && status == PERK_OK; position += chunk) {
        int32_t count = PERK_MIN(chunk, total - position);
        double milliseconds = 0;
        status = perk_bench_step_context(b, 0, position, count, position + count == total, err);
        if (status == PERK_OK && device_ms) status = perk_gpu_step_ms(b->gpu, &milliseconds, err);
        sum += milliseconds;
    }
    if (wall_ms) *wall_ms = (perk_now() - begin) * 1e3;
    if (device_ms) *device_ms = sum;
    return status;
}

static perk_status time_prompts(perk_bench *b, prefill_result *result, perk_error *err) {
    int32_t runs = b->options->steps;
    perk_status status = read_prompt(b, NULL, NULL, err); /* warms up */
    for (int32_t run = 0; run < runs && status == PERK_OK; run++) {
        status = read_prompt(b, &b->wall_ms[run], NULL, err);
        if (status == PERK_OK) status = read_prompt(b, NULL, &b->device_ms[run], err);
    }
    if (status != PERK_OK) return status;
    result->prompt = perk_bench_spread_of(b->wall_ms, runs);
    result->device = perk_bench_spread_of(b->device_ms, runs);
    return PERK_OK;
}

/* Two operations a weight and row. The projection to the vocabulary has the one row whose logits are wanted. */
static void count_work(const perk_bench *b, prefill_result *result) {
    const perk_graph *graph = b->model->graph;
    const perk_plan *plan = perk_gpu_plan(b->gpu);
    int32_t tokens = b->options->context;
    for (int i = 0; i < graph->op_count; i++) {
        const perk_op *op = graph->ops[i];
        if (op->type != &perk_op_linear) continue;
        const perk_tensor *weight = op->inputs[PERK_IN_WEIGHT];
        double rows = op->output->row_kind == PERK_ROWS_TOKENS ? tokens : 1;
        result->flops += 2.0 * (double)weight->rows * (double)weight->cols * rows;
    }
    result->steps = (int32_t)perk_ceil_div((uint64_t)tokens, (uint64_t)b->config.max_num_batched_tokens);
    for (int i = 0; i < plan->task_count; i++)
        result->weight_bytes += (double)plan->tasks[i].stream_bytes * result->steps;
}

static perk_status measure(const perk_bench_command *c, perk_bench *b, prefill_result *result, perk_error *err) {
    int32_t rows = b->config.max_num_batched_tokens, check = c->check_tokens ? c->check_tokens : CHECK_ROWS;
    perk_status status = perk_bench_open_gpu(b, false, err);
    result->check_error = -1;
    if (status == PERK_OK && !c->no_check)
        status = perk_bench_check(b, PERK_MIN(check, b->options->context), rows, &result->check_error, err);
    if (status == PERK_OK) status = time_prompts(b, result, err);
    if (status == PERK_OK) status = perk_gpu_read_ceiling(b->gpu, 7, &result->ceiling, err);
    if (status == PERK_OK) count_work(b, result);
    return status;
}

static double per_second(double amount, double milliseconds) { return amount / (milliseconds * 1e-3); }

static int print_json(const perk_bench *b, const prefill_result *r) {
    const perk_bench_options *o = b->options;
    json_t *json = perk_bench_result("prefill", o->model, b->report.device);
    json_t *rest = json_pack("{s:i, s:i, s:i, s:i, s:b, s:b, s:f, s:f, s:f, s:f, s:f, s:f, s:o}", "prompt_tokens",
                             o->context, "max_batched_tokens", b->config.max_num_batched_tokens, "steps", r->steps,
                             "prompts", o->steps, "portable", o->portable, "random_weights", o->random_weights,
                             "tokens_per_s", per_second(o->context, r->prompt.median), "linear_flops", r->flops,
                             "linear_tflops_per_s", per_second(r->flops * 1e-12, r->prompt.median), "weight_bytes",
                             r->weight_bytes, "read_ceiling_bytes_per_s", r->ceiling, "read_floor_ms",
                             r->weight_bytes / r->ceiling * 1e3, "start", perk_cli_report_json(&b->report));
    perk_bench_put_spread(json, "prompt_ms", r->prompt);
    perk_bench_put_spread(json, "device_ms", r->device);
    perk_bench_put_check(json, r->check_error);
    return perk_cli_print_json(perk_bench_join(json, rest)) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

static int print_text(const perk_bench *b, const prefill_result *r) {
    const perk_bench_options *o = b->options;
    char check[32];
    printf("%s  prompt of %d tokens in %d steps of up to %d  %s%s\n", o->model, o->context, r->steps,
           b->config.max_num_batched_tokens, b->report.device, o->portable ? "  portable" : "");
    printf("  prompt         %9.3f ms (10th, 90th percentile of %d: %.3f, %.3f); on the device %.3f ms (%.3f, %.3f)\n",
           r->prompt.median, o->steps, r->prompt.p10, r->prompt.p90, r->device.median, r->device.p10, r->device.p90);
    printf("  tokens         %9.0f a second\n", per_second(o->context, r->prompt.median));
    printf("  linear layers  %9.1f TFLOP/s over the whole time, attention included; %.3f TFLOP a prompt\n",
           per_second(r->flops * 1e-12, r->prompt.median), r->flops * 1e-12);
    printf("  reading        %9.3f ms for %.3f GB of weights at %.3f TB/s\n", r->weight_bytes / r->ceiling * 1e3,
           r->weight_bytes * 1e-9, r->ceiling * 1e-12);
    printf("  check          %9s relative error against the reference executor\n",
           perk_bench_check_text(r->check_error, check, sizeof check));
    return PERK_EXIT_OK;
}

int perk_bench_measure_prefill(const perk_bench_command *c) {
    perk_error err = {0};
    perk_bench bench = {0};
    prefill_result result = {0};
    perk_bench_options options = c->bench;
    options.context = c->prompt_tokens;
    options.batch = 1;
    options.steps = c->runs ? c->runs : DEFAULT_PROMPTS;
    if (!options.tokens) options.tokens = DEFAULT_ROWS;
    perk_status status = perk_bench_open(&bench, &options, &err);
    if (status == PERK_OK) status = measure(c, &bench, &result, &err);
    int code = status != PERK_OK ? perk_cli_fail(&err)
               : c->json         ? print_json(&bench, &result)
                                 : print_text(&bench, &result);
    perk_bench_close(&bench);
    return code;
}
