/* perk test-op: an op alone, through the whole pipeline, against the reference executor. */
#include "test_op.h"

#include <math.h>

/* ---- one case ---- */

static const char *verdict_text(const perk_op_verdict *v, perk_status status) {
    if (status) return "not run";
    if (!v->passed) return "MISMATCH";
    return v->compared ? "ok" : "ran";
}

static void print_row(const perk_op_case *c, const perk_op_verdict *v, bool portable, perk_status status,
                      const perk_error *err) {
    char shape[128], numbers[128] = "";
    if (!status && v->compared)
        snprintf(numbers, sizeof numbers, "worst %6.3f of %-6g relative %7.1e of %-5g %9.3f ms", v->by.worst, v->limit,
                 v->by.relative, v->relative_limit, v->report.step_ms);
    printf("%-9s%-12s%-9s%-10s%-66s  %s\n", verdict_text(v, status), c->op, portable ? "portable" : "native",
           status ? "-" : v->report.executor, numbers, perk_op_case_shape(c, shape, sizeof shape));
    if (status)
        printf("         %s: %s\n", perk_status_text(status), err->message);
    else if (!v->passed && v->problem[0])
        printf("         %s\n", v->problem);
    else if (!v->passed)
        printf("         %s[%zu, %zu] is %g, wanted %g; %zu of %zu elements are NaN or infinite; seed %llu\n",
               v->tensor, v->by.row, v->by.col, v->by.got, v->by.wanted, v->by.unusable, v->by.count,
               (unsigned long long)v->report.seed);
    fflush(stdout);
}

/* JSON has no NaN and no infinity. */
static json_t *number(double value) { return isfinite(value) ? json_real(value) : json_null(); }

static json_t *case_json(const perk_op_case *c, const perk_op_verdict *v, bool portable, perk_status status,
                         const perk_error *err) {
    char shape[128];
    json_t *json = json_pack("{s:s, s:s, s:b, s:s}", "op", c->op, "shape", perk_op_case_shape(c, shape, sizeof shape),
                             "portable", portable, "verdict", verdict_text(v, status));
    if (status) {
        json_object_set_new(json, "error", json_string(err->message));
        return json;
    }
    const perk_start_report *start = &v->report.start;
    json_t *ran = json_pack(
        "{s:s, s:s, s:s, s:b, s:I, s:f, s:f, s:f, s:f, s:i, s:i, s:b}", "backend", v->report.executor, "device",
        start->device, "arch", start->arch, "compared", v->compared, "seed", (json_int_t)v->report.seed, "step_ms",
        v->report.step_ms, "plan_ms", start->plan_ms, "check_ms", start->check_ms, "compile_ms", start->compile_ms,
        "registers", (int)start->registers, "spill_bytes", (int)start->spill_bytes, "cache_hit", start->cache_hit != 0);
    json_object_update_new(json, ran);
    if (v->problem[0]) json_object_set_new(json, "problem", json_string(v->problem));
    if (!v->compared) return json;
    json_object_update_new(
        json, json_pack("{s:s, s:o, s:o, s:o, s:o, s:[I, I], s:o, s:o, s:I, s:I}", "tensor", v->tensor, "worst",
                        number(v->by.worst), "limit", number(v->limit), "relative", number(v->by.relative),
                        "relative_limit", number(v->relative_limit), "at", (json_int_t)v->by.row, (json_int_t)v->by.col,
                        "got", number(v->by.got), "wanted", number(v->by.wanted), "elements", (json_int_t)v->by.count,
                        "unusable", (json_int_t)v->by.unusable));
    return json;
}

void perk_cli_run_op_cases(const perk_op_case *cases, size_t count, const perk_test_options *options,
                           const perk_cli_test_output *output, perk_cli_test_tally *tally) {
    for (size_t i = 0; i < count; i++) {
        perk_error err = {0};
        perk_op_verdict verdict;
        perk_status status = perk_op_case_run(&cases[i], options, &verdict, &err);
        bool failed = status || !verdict.passed, portable = options->portable != 0;
        if (failed)
            tally->failed++;
        else
            tally->passed++;
        if (!failed && !verdict.compared) tally->uncompared++;
        if (output->list) json_array_append_new(output->list, case_json(&cases[i], &verdict, portable, status, &err));
        if (output->print && (failed || !output->failed_only)) print_row(&cases[i], &verdict, portable, status, &err);
    }
}

/* ---- the command ---- */

typedef struct test_op_options {
    perk_op_case shape; /* numbers: -1 where the option is absent */
    int bias, residual, norms;
    int all, backend, portable, no_cache, for_racecheck, verbose, json;
    perk_test_options options;
} test_op_options;

static void add_options(perk_cli_options *options, test_op_options *t) {
    perk_op_case *c = &t->shape;
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_FLAG("all", &t->all, "a grid of shapes of every op"),
        PERK_CLI_OPTION_INT("rows", &c->rows, "N", "tokens of the step, for which the program is built", 1, 4096),
        PERK_CLI_OPTION_INT("live", &c->live, "N", "of them, those that the step has", 1, 4096),
        PERK_CLI_OPTION_INT("in", &c->in, "N", "width that goes in", 1, 1 << 20),
        PERK_CLI_OPTION_INT("out", &c->out, "N", "width that comes out; of the vocabulary", 1, 1 << 20),
        PERK_CLI_OPTION_FLAG("bias", &t->bias, "linear"),
        PERK_CLI_OPTION_FLAG("residual", &t->residual, "linear"),
        PERK_CLI_OPTION_INT("heads", &c->heads, "N", "attention, decoder: query heads", 1, 4096),
        PERK_CLI_OPTION_INT("kv-heads", &c->kv_heads, "N", "attention, decoder: key and value heads", 1, 4096),
        PERK_CLI_OPTION_INT("head-dim", &c->head_dim, "N", "attention, decoder", 2, 1024),
        PERK_CLI_OPTION_FLAG("norms", &t->norms, "attention, decoder: norms of queries and keys"),
        PERK_CLI_OPTION_INT("context", &c->context, "N", "positions before the step's, at most", 0, 1 << 20),
        PERK_CLI_OPTION_INT("window", &c->window, "N", "that attention sees; 0: all positions", 0, 1 << 20),
        PERK_CLI_OPTION_INT("experts", &c->experts, "N", "moe_*, experts: of the layer", 1, 65536),
        PERK_CLI_OPTION_INT("top-k", &c->top_k, "N", "moe_*, experts: of a token", 1, 65536),
        PERK_CLI_OPTION_INT("requests", &c->requests, "N", "that share the rows", 1, PERK_OP_CASE_REQUESTS_MAX),
        PERK_CLI_OPTION_SEED("seed", &t->options.seed, "of inputs and weights; else of the clock"),
        PERK_CLI_OPTION_CHOICE("backend", &t->backend, "auto|gpu|reference", "auto: the GPU where there is one"),
        PERK_CLI_OPTION_INT("device", &t->options.device, "N", "which GPU, from 0", 0, 1023),
        PERK_CLI_OPTION_TEXT("arch", &t->options.arch, "ARCH", "to compile for where there is no GPU: sm_90a"),
        PERK_CLI_OPTION_FLAG("portable", &t->portable, "nothing newer than sm_80 instructions"),
        PERK_CLI_OPTION_FLAG("for-racecheck", &t->for_racecheck,
                             "a program that compute-sanitizer's racecheck can follow"),
        PERK_CLI_OPTION_INT("threads", &t->options.threads, "N", "CPU threads; 0: all cores", 0, 4096),
        PERK_CLI_OPTION_TEXT("cache-dir", &t->options.cache_folder, "DIR", "of compiled programs"),
        PERK_CLI_OPTION_FLAG("no-cache", &t->no_cache, "compile anew, keep nothing"),
        PERK_CLI_OPTION_FLAG("verbose", &t->verbose, "the log on stderr, with what the compiler says"),
        PERK_CLI_OPTION_FLAG("json", &t->json, "the result as one JSON object"),
    };
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

/* Numbers that were not given are those of the op's first case in the grid; flags are those that were given. */
static perk_op_case chosen_case(const perk_op_case *standard, const test_op_options *t) {
    perk_op_case c = *standard;
    const perk_op_case *given = &t->shape;
    const struct {
        int32_t *to, from;
    } numbers[] = {{&c.rows, given->rows},         {&c.in, given->in},
                   {&c.out, given->out},           {&c.heads, given->heads},
                   {&c.kv_heads, given->kv_heads}, {&c.head_dim, given->head_dim},
                   {&c.context, given->context},   {&c.window, given->window},
                   {&c.experts, given->experts},   {&c.top_k, given->top_k},
                   {&c.requests, given->requests}};
    for (size_t i = 0; i < PERK_COUNT(numbers); i++)
        if (numbers[i].from >= 0) *numbers[i].to = numbers[i].from;
    c.live = given->live > 0 ? given->live : given->rows > 0 ? 0 : c.live;
    if (given->requests < 0) c.requests = PERK_MIN(c.requests, c.live ? c.live : c.rows);
    c.bias = t->bias != 0;
    c.residual = t->residual != 0;
    c.norms = t->norms != 0;
    return c;
}

static int unknown_op(const perk_cli_command *command, const char *op) {
    perk_buffer known = {0};
    int count = 0;
    for (; perk_op_case_names[count]; count++) perk_buffer_printf(&known, " %s", perk_op_case_names[count]);
    const char *near = perk_cli_nearest(op, perk_op_case_names, count);
    int code = perk_cli_usage(command, "unknown op \"%s\"; %s%s%s there are:%s", op, near ? "did you mean \"" : "",
                              near ? near : "", near ? "\"?" : "", known.data ? known.data : "");
    perk_buffer_free(&known);
    return code;
}

static int finish(const perk_cli_test_tally *tally, json_t *list, bool json) {
    int code = tally->failed ? PERK_EXIT_FAILURE : PERK_EXIT_OK;
    if (json) {
        json_t *all = json_pack("{s:i, s:i, s:i, s:O}", "passed", tally->passed, "failed", tally->failed, "uncompared",
                                tally->uncompared, "cases", list);
        return perk_cli_print_json(all) ? code : PERK_EXIT_FAILURE;
    }
    printf("%d passed, %d failed\n", tally->passed, tally->failed);
    if (tally->uncompared)
        printf("%d of them ran in the reference executor, and were compared with nothing\n", tally->uncompared);
    return code;
}

int perk_cli_test_op(const perk_cli_command *self, int argc, char **argv) {
    test_op_options t = {.shape = {.rows = -1,
                                   .live = -1,
                                   .in = -1,
                                   .out = -1,
                                   .heads = -1,
                                   .kv_heads = -1,
                                   .head_dim = -1,
                                   .context = -1,
                                   .window = -1,
                                   .experts = -1,
                                   .top_k = -1,
                                   .requests = -1}};
    perk_cli_options options = {0};
    perk_cli_arguments arguments;
    t.options.seed = (uint64_t)(perk_now() * 1e6);
    add_options(&options, &t);
    int code = perk_cli_parse(self, &options, argc, argv, 1, &arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    if ((arguments.count == 1) == (t.all != 0)) return perk_cli_usage(self, "name one op, or give --all");
    const perk_op_case *standard = t.all ? NULL : perk_op_case_of(arguments.items[0]);
    if (!t.all && !standard) return unknown_op(self, arguments.items[0]);

    t.options.backend = (perk_backend)t.backend;
    t.options.portable = t.portable;
    t.options.no_cache = t.no_cache;
    t.options.for_racecheck = t.for_racecheck;
    if (t.verbose) t.options.log = perk_cli_log(1);
    size_t count = 1;
    perk_op_case chosen = {0};
    const perk_op_case *cases = &chosen;
    if (t.all)
        cases = perk_op_grid(&count);
    else
        chosen = chosen_case(standard, &t);
    json_t *list = json_array();
    const perk_cli_test_output output = {.list = list, .print = !t.json};
    perk_cli_test_tally tally = {0};
    perk_cli_run_op_cases(cases, count, &t.options, &output, &tally);
    code = finish(&tally, list, t.json != 0);
    json_decref(list);
    return code;
}
