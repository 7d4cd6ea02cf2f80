/* perk profile: when every task of a step ran, from the stamps of a profiled program; as a table, a trace and a page.
 * The same model runs without stamps, too, to say what they cost. */
#include "bench_model.h"

#include "src/plan_facts.h"
#include "src/plan_page.h"
#include "src/plan_trace.h"

typedef struct profile_command {
    perk_bench_options options;
    const char *trace, *html;
    int32_t bandwidth; /* GB/s for the expected times; 0: as measured */
    perk_bench bench;
    double plain_ms, profiled_ms, plain_device_ms, profiled_device_ms; /* medians */
    double bandwidth_measured;                                         /* bytes a second */
    perk_task_time *decode, *prompt;                                   /* prompt: NULL when there was no such step */
} profile_command;

/* ---- measuring ---- */

static perk_status time_decode(perk_bench *bench, double *wall_ms, double *device_ms, perk_error *err) {
    perk_status status = perk_bench_decode(bench, err);
    if (status != PERK_OK) return status;
    *wall_ms = perk_bench_quantile(bench->wall_ms, bench->options->steps, 0.5);
    *device_ms = perk_bench_quantile(bench->device_ms, bench->options->steps, 0.5);
    return PERK_OK;
}

static perk_status run_plain(profile_command *c, perk_error *err) {
    perk_status status = perk_bench_open_gpu(&c->bench, false, err);
    if (status == PERK_OK) status = perk_bench_prefill(&c->bench, err);
    if (status == PERK_OK) status = time_decode(&c->bench, &c->plain_ms, &c->plain_device_ms, err);
    if (status == PERK_OK && !c->bandwidth)
        status = perk_gpu_read_ceiling(c->bench.gpu, 5, &c->bandwidth_measured, err);
    return status;
}

static perk_status read_times(const profile_command *c, perk_task_time **times, perk_error *err) {
    *times = perk_calloc((size_t)perk_gpu_plan(c->bench.gpu)->task_count, sizeof **times);
    return *times ? perk_gpu_task_times(c->bench.gpu, *times, err) : perk_fail_memory(err, "time stamps");
}

static int32_t prompt_tokens(const profile_command *c) {
    return PERK_MIN(c->bench.config.max_num_batched_tokens, c->options.context);
}

static perk_status run_profiled(profile_command *c, perk_error *err) {
    perk_status status = perk_bench_open_gpu(&c->bench, true, err);
    if (status == PERK_OK) status = perk_bench_prefill(&c->bench, err);
    if (status == PERK_OK && prompt_tokens(c) > 1) {
        status = perk_bench_prompt_step(&c->bench, prompt_tokens(c), err);
        if (status == PERK_OK) status = read_times(c, &c->prompt, err);
    }
    if (status == PERK_OK) status = time_decode(&c->bench, &c->profiled_ms, &c->profiled_device_ms, err);
    if (status == PERK_OK) status = read_times(c, &c->decode, err);
    return status;
}

/* ---- telling ---- */

/* A stage's times summed over the layers that have it. */
typedef struct stage_row {
    perk_stage_time measured, expected;
    int count;
} stage_row;

static bool is_same_stage(const perk_plan *plan, int a, int b) {
    perk_layer_name left = perk_layer_name_split(plan->stages[a].name);
    perk_layer_name right = perk_layer_name_split(plan->stages[b].name);
    return (left.layer < 0) == (right.layer < 0) && left.prefix_length == right.prefix_length &&
           strcmp(left.suffix, right.suffix) == 0;
}

static void add_time(perk_stage_time *sum, const perk_stage_time *time) {
    sum->chain += time->chain;
    sum->run += time->run;
    sum->worst += time->worst;
    sum->wait += time->wait;
    sum->read += time->read;
    sum->multiply += time->multiply;
    sum->share += time->share;
    sum->finish += time->finish;
}

/* The row that begins with `stage`; its count is 0 when the stage belongs to the row of an earlier layer. */
static stage_row make_row(const perk_plan *plan, int stage, const perk_stage_time *measured,
                          const perk_stage_time *expected) {
    stage_row row = {0};
    for (int s = 0; s < plan->stage_count; s++) {
        if (!is_same_stage(plan, stage, s)) continue;
        if (s < stage) return (stage_row){0};
        add_time(&row.measured, &measured[s]);
        add_time(&row.expected, &expected[s]);
        row.count++;
    }
    return row;
}

static void print_row(const perk_plan *plan, int stage, const stage_row *row) {
    perk_layer_name name = perk_layer_name_split(plan->stages[stage].name);
    const perk_stage_time *m = &row->measured;
    char text[128];
    if (name.layer < 0)
        snprintf(text, sizeof text, "%s", plan->stages[stage].name);
    else
        snprintf(text, sizeof text, "%.*s.*%s", name.prefix_length, plan->stages[stage].name, name.suffix);
    printf("  %-36s %5d %9.1f %8.2f %8.2f %8.2f %8.2f %8.2f", text, row->count, m->chain, m->chain / row->count,
           row->expected.chain / row->count, m->run / row->count, m->worst / row->count, m->wait / row->count);
    if (m->share > 0)
        printf(" %8.2f %8.2f %8.2f %8.2f", m->read / row->count, m->multiply / row->count, m->share / row->count,
               m->finish / row->count);
    printf("\n");
}

static perk_status print_stages(const perk_plan *plan, const perk_task_time *measured, const perk_plan_load *load,
                                perk_error *err) {
    perk_task_time *expected = perk_calloc((size_t)plan->task_count, sizeof *expected);
    perk_stage_time *stages = perk_calloc(2 * (size_t)plan->stage_count, sizeof *stages);
    perk_status status = expected && stages ? PERK_OK : perk_fail_memory(err, "the stages' times");
    if (status == PERK_OK) status = perk_plan_expect(plan, load, expected, err);
    if (status == PERK_OK) status = perk_plan_stage_times(plan, measured, stages, err);
    if (status == PERK_OK) status = perk_plan_stage_times(plan, expected, stages + plan->stage_count, err);
    if (status == PERK_OK)
        printf("  %-36s %5s %9s %8s %8s %8s %8s %8s %8s %8s %8s %8s   us\n", "stage", "count", "in all", "chain",
               "expected", "run", "longest", "wait", "read", "multiply", "share", "finish");
    for (int s = 0; s < plan->stage_count && status == PERK_OK; s++) {
        stage_row row = make_row(plan, s, stages, stages + plan->stage_count);
        if (row.count > 0) print_row(plan, s, &row);
    }
    free(expected);
    free(stages);
    return status;
}

static perk_plan_load load_of(const profile_command *c, int32_t requests, int32_t tokens, int32_t context) {
    double bandwidth = c->bandwidth ? c->bandwidth * 1e9 : c->bandwidth_measured;
    return (perk_plan_load){.bandwidth = bandwidth, .requests = requests, .tokens = tokens, .context = context};
}

static perk_plan_load decode_load(const profile_command *c) {
    return load_of(c, c->options.batch, 1, c->options.context + c->options.steps);
}

static double percent_more(double value, double base) { return base > 0 ? 100 * (value / base - 1) : 0; }

static perk_status print_report(const profile_command *c, perk_error *err) {
    const perk_bench_options *o = &c->options;
    printf("%s  batch %d  context %d  %s%s\n", o->model, o->batch, o->context, c->bench.report.device,
           o->portable ? "  portable" : "");
    printf("  step, profiled  %8.3f ms, on the device %.3f ms; median of %d\n", c->profiled_ms, c->profiled_device_ms,
           o->steps);
    printf("  step, plain     %8.3f ms, on the device %.3f ms: profiling costs %.2f %%, on the device %.2f %%\n",
           c->plain_ms, c->plain_device_ms, percent_more(c->profiled_ms, c->plain_ms),
           percent_more(c->profiled_device_ms, c->plain_device_ms));
    perk_plan_load load = decode_load(c);
    return print_stages(perk_gpu_plan(c->bench.gpu), c->decode, &load, err);
}

static perk_status write_trace(const profile_command *c, perk_error *err) {
    const perk_trace_step steps[] = {{"decode", c->decode}, {"prompt", c->prompt}};
    perk_buffer text = {0};
    perk_status status = perk_plan_trace(perk_gpu_plan(c->bench.gpu), steps, c->prompt ? 2 : 1, &text, err);
    if (status == PERK_OK) status = perk_cli_write_file(c->trace, text.data, text.size, err);
    perk_buffer_free(&text);
    return status;
}

static perk_status write_page(const profile_command *c, perk_error *err) {
    int32_t prompt = prompt_tokens(c);
    const perk_page_step steps[] = {
        {.name = "decode", .load = decode_load(c), .measured = c->decode},
        {.name = "prompt", .load = load_of(c, 1, prompt, c->options.context - prompt), .measured = c->prompt}};
    perk_buffer page = {0};
    char *title = perk_format("%s on %s", c->options.model, c->bench.report.device);
    perk_status status = title ? PERK_OK : perk_fail_memory(err, "the page");
    if (status == PERK_OK)
        status = perk_plan_page(perk_gpu_plan(c->bench.gpu), title, steps, c->prompt ? 2 : 1, &page, err);
    if (status == PERK_OK) status = perk_cli_write_file(c->html, page.data, page.size, err);
    perk_buffer_free(&page);
    free(title);
    return status;
}

static perk_status profile(profile_command *c, perk_error *err) {
    perk_status status = perk_bench_open(&c->bench, &c->options, err);
    if (status == PERK_OK) status = run_plain(c, err);
    if (status == PERK_OK) status = run_profiled(c, err);
    if (status == PERK_OK) status = print_report(c, err);
    if (status == PERK_OK && c->trace) status = write_trace(c, err);
    if (status == PERK_OK && c->html) status = write_page(c, err);
    return status;
}

int perk_cli_profile(const perk_cli_command *self, int argc, char **argv) {
    profile_command c = {.options = PERK_BENCH_DEFAULTS};
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("json", &c.trace, "FILE", "trace events, which ui.perfetto.dev opens"),
        PERK_CLI_OPTION_TEXT("html", &c.html, "FILE", "a page: the plan with its tasks in measured and expected times"),
        PERK_CLI_OPTION_INT("bandwidth", &c.bandwidth, "N", "GB/s for the expected times; else it is measured", 1,
                            1000000),
    };
    perk_cli_options options = {0};
    perk_bench_add_options(&options, &c.options);
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!c.options.model) return perk_cli_usage(self, "--model is missing");
    perk_error err = {0};
    code = profile(&c, &err) == PERK_OK ? PERK_EXIT_OK : perk_cli_fail(&err);
    perk_bench_close(&c.bench);
    free(c.decode);
    free(c.prompt);
    return perk_cli_finish(code);
}
