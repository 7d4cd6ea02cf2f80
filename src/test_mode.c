/* Test mode: draws what was not set, opens the executor under test, fills the KV cache, poisons, runs one step. */
#include "test_mode.h"

#include "device.h"
#include "float.h"
#include "gpu.h"
#include "ops/op.h"
#include "program.h"
#include "random_weights.h"
#include "reference.h"
#include "simulator/simulator.h"
#include "stored_weight.h"

#include <stdio.h>
#include <xxhash.h>

enum { MAX_LOGIT_ROWS = 64, DEFAULT_ROWS = 8, DEFAULT_PAGE_SIZE = 16, MAX_POSITIONS = 1 << 22 };

/* Tokens of one request that enter one step. */
typedef struct test_part {
    int32_t request, position, count, logits;
} test_part;

struct perk_test {
    perk_graph *graph;
    perk_test_options options; /* pointers in it are this test's copies */
    perk_test_request *requests;
    int32_t request_count, tokens, logit_rows, positions; /* sums over the requests */
    perk_config config;
    char *arch, *cache_folder;

    perk_given_weight *given; /* of inputs as well; values are owned, and bf16 numbers */
    size_t given_count;
    int32_t *ids;   /* [positions], NULL until set or drawn */
    int32_t *pages; /* [requests][pages a request] */
    float *staged;  /* rows of an input on their way to an executor */
    test_part *parts;
    perk_batch *batch;

    perk_checkpoint *weights;
    perk_executor *tested, *reference; /* reference: NULL until something is compared with it; may be `tested` */
    perk_status (*poison)(perk_executor *executor, bool with_cache, perk_error *err); /* of `tested`; NULL: cannot */
    int tensor_count;                                                                 /* of the graph that ran */
    bool started, ran;
    perk_test_run_report report;
};

/* ---- making it ---- */

static perk_status check_request(const perk_test_request *r, int32_t index, perk_error *err) {
    if (r->history >= 0 && r->tokens >= 1 && r->logits >= 0 && r->logits <= 2) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT,
                     "request %d: history %d, tokens %d, logits %d: needs history >= 0, tokens >= 1, logits 0, 1 or 2",
                     index, r->history, r->tokens, r->logits);
}

static perk_status copy_requests(perk_test *test, const perk_test_options *options, perk_error *err) {
    int32_t rows = options->rows > 0 ? options->rows : DEFAULT_ROWS;
    const perk_test_request whole = {.tokens = rows, .logits = rows <= MAX_LOGIT_ROWS ? 2 : 1};
    const perk_test_request *from = options->requests ? options->requests : &whole;
    int32_t count = options->requests ? options->request_count : 1;
    if (count < 1 || (!options->requests && options->request_count != 0))
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%d requests: needs 1 or more, or no list",
                         options->request_count);
    test->requests = perk_calloc((size_t)count, sizeof *test->requests);
    if (!test->requests) return perk_fail_memory(err, "the test");
    int64_t tokens = 0, positions = 0;
    for (int32_t i = 0; i < count; i++) {
        perk_status status = check_request(&from[i], i, err);
        if (status) return status;
        test->requests[i] = from[i];
        tokens += from[i].tokens;
        positions += (int64_t)from[i].history + from[i].tokens;
        if (positions > MAX_POSITIONS)
            return perk_fail(err, PERK_LIMIT, "a test has at most %d positions in all", (int)MAX_POSITIONS);
        test->logit_rows += from[i].logits == 2 ? from[i].tokens : from[i].logits;
    }
    test->request_count = count;
    test->tokens = (int32_t)tokens;
    test->positions = (int32_t)positions;
    return PERK_OK;
}

static perk_status make_config(perk_test *test, perk_error *err) {
    const perk_test_options *o = &test->options;
    int32_t longest = 0;
    for (int32_t i = 0; i < test->request_count; i++)
        longest = PERK_MAX(longest, test->requests[i].history + test->requests[i].tokens);
    if (o->rows != 0 && o->rows < test->tokens)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "rows %d: the requests have %d tokens in the step", o->rows,
                         test->tokens);
    if (o->max_positions != 0 && o->max_positions < longest)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "max_positions %d: a request has %d", o->max_positions, longest);
    int32_t rows = PERK_MAX(o->rows, test->tokens), dead = rows - test->tokens;
    test->config = (perk_config){.max_num_batched_tokens = rows,
                                 .max_num_batched_requests = test->request_count,
                                 .max_num_logit_rows = PERK_MAX(
                                     PERK_MIN(test->logit_rows + dead, PERK_MAX(test->logit_rows, MAX_LOGIT_ROWS)), 1),
                                 .page_size = o->page_size ? o->page_size : DEFAULT_PAGE_SIZE,
                                 .max_seq_length = PERK_MAX(o->max_positions, longest)};
    return perk_config_resolve(&test->config, 0, err);
}

static perk_status copy_text(const char **text, char **owned, perk_error *err) {
    if (!*text) return PERK_OK;
    *text = *owned = perk_strdup(*text);
    return *owned ? PERK_OK : perk_fail_memory(err, "the test");
}

perk_status perk_test_create(perk_test **out, const perk_test_options *options, perk_error *err) {
    static const perk_test_options defaults = {0};
    *out = NULL;
    if (!options) options = &defaults;
    if (options->backend < PERK_BACKEND_AUTO || options->backend > PERK_BACKEND_REFERENCE)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "backend %d: unknown", (int)options->backend);
    if (options->rows < 0 || options->threads < 0 || options->page_size < 0 || options->max_positions < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "rows %d, threads %d, page_size %d, max_positions %d: must not be negative", options->rows,
                         options->threads, options->page_size, options->max_positions);
    perk_test *test = perk_calloc(1, sizeof *test);
    if (!test) return perk_fail_memory(err, "the test");
    test->options = *options;
    test->options.requests = NULL;
    perk_status status = copy_text(&test->options.arch, &test->arch, err);
    if (!status) status = copy_text(&test->options.cache_folder, &test->cache_folder, err);
    if (!status) status = copy_requests(test, options, err);
    if (!status) status = make_config(test, err);
    if (!status) status = perk_graph_create(&test->graph, "test", err);
    if (status) {
        perk_test_free(test);
        return status;
    }
    *out = test;
    return PERK_OK;
}

static void free_executor(perk_executor *executor) {
    if (executor) executor->type->free(executor);
}

void perk_test_free(perk_test *test) {
    if (!test) return;
    if (test->reference != test->tested) free_executor(test->reference);
    free_executor(test->tested);
    perk_checkpoint_free(test->weights);
    perk_batch_free(test->batch);
    for (size_t i = 0; i < test->given_count; i++) free((void *)(uintptr_t)test->given[i].values);
    free(test->given);
    free(test->ids);
    free(test->pages);
    free(test->staged);
    free(test->parts);
    free(test->requests);
    free(test->arch);
    free(test->cache_folder);
    perk_graph_free(test->graph);
    free(test);
}

perk_graph *perk_test_graph(perk_test *test) { return test ? test->graph : NULL; }

/* ---- values that go in ---- */

size_t perk_test_rows(const perk_test *test, const perk_tensor *tensor) {
    if (!test || !tensor) return 0;
    switch (tensor->kind) {
    case PERK_TENSOR_INPUT: return (size_t)test->positions;
    case PERK_TENSOR_ACTIVATION: return (size_t)perk_tensor_rows(tensor, test->tokens, test->logit_rows);
    default: return (size_t)(tensor->rows * perk_weight_count(tensor));
    }
}

/* That there is a tensor of this test, and that `count` values are all of it. */
static perk_status check_tensor(const perk_test *test, const perk_tensor *tensor, const void *values, size_t count,
                                perk_error *err) {
    if (!test) return perk_fail(err, PERK_INVALID_ARGUMENT, "there is no test (NULL)");
    perk_status status = perk_graph_check(test->graph, err); /* says why a layer call gave NULL */
    if (status) return status;
    if (!tensor || tensor->graph != test->graph)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s is no tensor of this test", tensor ? tensor->name : "NULL");
    size_t rows = perk_test_rows(test, tensor), wanted = rows * (size_t)tensor->cols;
    if (values && count == wanted) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "%s has [%zu][%lld] = %zu values, not %zu%s", tensor->name, rows,
                     (long long)tensor->cols, wanted, count, values ? "" : " at NULL");
}

static perk_given_weight *find_given(const perk_test *test, const perk_tensor *tensor) {
    for (size_t i = 0; i < test->given_count; i++)
        if (test->given[i].tensor == tensor) return &test->given[i];
    return NULL;
}

/* Takes over `values`, also on failure. */
static perk_status give(perk_test *test, const perk_tensor *tensor, float *values, perk_error *err) {
    perk_given_weight *known = find_given(test, tensor);
    if (known) {
        free((void *)(uintptr_t)known->values);
        known->values = values;
        return PERK_OK;
    }
    perk_given_weight *bigger = perk_realloc_array(test->given, test->given_count + 1, sizeof *bigger);
    if (!bigger) {
        free(values);
        return perk_fail_memory(err, tensor->name);
    }
    test->given = bigger;
    test->given[test->given_count++] = (perk_given_weight){tensor, values};
    return PERK_OK;
}

static perk_status fail_late(const char *what, perk_error *err) {
    return perk_fail(err, PERK_INVALID_ARGUMENT, "%s: the test has run; it runs once, make another", what);
}

perk_status perk_test_set(perk_test *test, perk_tensor *tensor, const float *values, size_t count, perk_error *err) {
    perk_status status = check_tensor(test, tensor, values, count, err);
    if (status) return status;
    if (test->started) return fail_late(tensor->name, err);
    if (tensor->kind != PERK_TENSOR_INPUT && tensor->kind != PERK_TENSOR_WEIGHT)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s is %s: values can be given to inputs and to attached weights",
                         tensor->name,
                         tensor->kind == PERK_TENSOR_STACK ? "a stack; give its parts theirs" : "made by a layer call");
    float *copy = perk_calloc(count, sizeof *copy);
    if (!copy) return perk_fail_memory(err, tensor->name);
    for (size_t i = 0; i < count; i++) copy[i] = perk_round_bf16(values[i]);
    return give(test, tensor, copy, err);
}

perk_status perk_test_set_tokens(perk_test *test, const int32_t *ids, size_t count, perk_error *err) {
    if (!test || !ids || count != (size_t)test->positions)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%zu token ids: needs one for each of the test's %d positions",
                         ids ? count : 0, test ? test->positions : 0);
    if (test->started) return fail_late("token ids", err);
    int32_t *copy = perk_calloc(count, sizeof *copy);
    if (!copy) return perk_fail_memory(err, "token ids");
    memcpy(copy, ids, count * sizeof *copy);
    free(test->ids);
    test->ids = copy;
    return PERK_OK;
}

static perk_status draw_inputs(perk_test *test, perk_error *err) {
    for (int i = 0; i < test->graph->tensor_count; i++) {
        const perk_tensor *tensor = test->graph->tensors[i];
        if (tensor->kind != PERK_TENSOR_INPUT || find_given(test, tensor)) continue;
        size_t count = perk_test_rows(test, tensor) * (size_t)tensor->cols;
        uint16_t *drawn = perk_calloc(count, sizeof *drawn);
        float *values = perk_calloc(count, sizeof *values);
        if (drawn && values) {
            perk_random_values(tensor->name, test->options.seed, 0, 1, drawn, count);
            for (size_t k = 0; k < count; k++) values[k] = perk_bf16_to_f32(drawn[k]);
        }
        bool lacks = !drawn || !values;
        free(drawn);
        if (lacks) {
            free(values);
            return perk_fail_memory(err, tensor->name);
        }
        perk_status status = give(test, tensor, values, err);
        if (status) return status;
    }
    return PERK_OK;
}

/* A number in [0, limit) that seed, purpose and index decide. */
static int32_t draw_number(const perk_test *test, const char *purpose, int32_t index, int32_t limit) {
    uint64_t key = XXH3_64bits_withSeed(purpose, strlen(purpose), test->options.seed);
    return (int32_t)(XXH3_64bits_withSeed(&index, sizeof index, key) % (uint64_t)limit);
}

/* Ids that every embed of the graph has a row for. */
static int32_t vocabulary_of(const perk_graph *graph) {
    int64_t rows = INT32_MAX;
    for (int i = 0; i < graph->op_count; i++)
        if (graph->ops[i]->type == &perk_op_embed) rows = PERK_MIN(rows, graph->ops[i]->inputs[PERK_IN_X]->rows);
    return (int32_t)rows;
}

static perk_status draw_tokens(perk_test *test, perk_error *err) {
    int32_t vocabulary = vocabulary_of(test->graph);
    for (int32_t i = 0; test->ids && i < test->positions; i++)
        if (test->ids[i] < 0 || test->ids[i] >= vocabulary)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "token id %d of position %d: ids go from 0 to %d",
                             test->ids[i], i, vocabulary - 1);
    if (test->ids) return PERK_OK;
    test->ids = perk_calloc((size_t)test->positions, sizeof *test->ids);
    if (!test->ids) return perk_fail_memory(err, "token ids");
    for (int32_t i = 0; i < test->positions; i++) test->ids[i] = draw_number(test, "tokens", i, vocabulary);
    return PERK_OK;
}

/* Each request's pages lie scattered over the pool, as they do after a while of serving. */
static perk_status deal_pages(perk_test *test, perk_error *err) {
    int32_t count = test->request_count * test->batch->pages_per_request;
    test->pages = perk_calloc((size_t)count, sizeof *test->pages);
    if (!test->pages) return perk_fail_memory(err, "page tables");
    for (int32_t i = 0; i < count; i++) {
        int32_t other = draw_number(test, "pages", i, i + 1);
        test->pages[i] = test->pages[other];
        test->pages[other] = i;
    }
    return PERK_OK;
}

/* ---- the executor under test ---- */

static void report_program(perk_test *test, const perk_program *program) {
    perk_start_report *report = &test->report.start;
    test->report.compiled = 1;
    report->cache_hit = program->cache_hit;
    report->emit_ms = program->emit_ms + program->lookup_ms;
    report->compile_ms = program->compile_ms;
    report->registers = (int32_t)program->kernel.registers;
    report->spill_bytes = (int32_t)program->spill_bytes;
    report->cubin_bytes = (int32_t)program->cubin_size;
}

/* What a machine can do of the GPU's path when it has none: all but load and launch. */
static perk_status build_for(perk_test *test, const perk_device_desc *device, perk_error *err) {
    const perk_test_options *o = &test->options;
    perk_start_report *report = &test->report.start;
    perk_plan *plan = NULL;
    perk_program program = {0};
    perk_cache *cache = NULL;
    const perk_cache_options cache_options = {.folder = o->cache_folder, .log = o->log, .disabled = o->no_cache != 0};
    double begin = perk_now();
    perk_status status = perk_plan_create(&plan, test->graph, device, &test->config, err);
    if (status) return status;
    double planned = perk_now();
    status = perk_plan_check(plan, err);
    report->plan_ms = (planned - begin) * 1e3;
    report->check_ms = (perk_now() - planned) * 1e3;
    report->shared_bytes = plan->shared_bytes;
    if (!status) status = perk_cache_open(&cache, &cache_options, err);
    if (!status) {
        const perk_program_options build = {.cache = cache, .log = &o->log};
        status = perk_program_build(plan, &build, &program, err);
        if (!status) report_program(test, &program);
    }
    if (status == PERK_NO_COMPILER) {
        perk_log_write(&o->log, PERK_LOG_INFO, "planned, checked and emitted, but not compiled: there is no NVRTC");
        status = PERK_OK;
    }
    perk_program_free(&program);
    perk_cache_free(cache);
    perk_plan_free(plan);
    return status;
}

static perk_status open_gpu(perk_test *test, perk_error *err) {
    const perk_test_options *o = &test->options;
    const perk_gpu_options gpu = {.device = o->device,
                                  .portable = o->portable != 0,
                                  .no_cache = o->no_cache != 0,
                                  .for_racecheck = o->for_racecheck != 0,
                                  .timing = true,
                                  .cache_folder = o->cache_folder,
                                  .threads = o->threads,
                                  .log = o->log};
    perk_status status =
        perk_gpu_create(&test->tested, test->graph, test->weights, &test->config, &gpu, &test->report.start, err);
    test->report.compiled = status == PERK_OK;
    test->poison = perk_gpu_poison;
    return status;
}

static perk_status open_reference(perk_test *test, perk_executor **out, perk_error *err) {
    const perk_reference_options options = {.threads = test->options.threads, .precision = PERK_PRECISION_BF16};
    return perk_reference_create(out, test->graph, test->weights, &test->config, &options, err);
}

/* The tasks of the plan, on the CPU, in an order that the seed draws. */
static perk_status open_simulator(perk_test *test, perk_error *err) {
    const char *arch = test->options.arch ? test->options.arch : "sm_90a";
    perk_simulator_options options = {.order = {.seed = test->options.seed}};
    memset(&test->report.start, 0, sizeof test->report.start);
    perk_status status = perk_device_describe_arch(arch, &options.device, err);
    if (status) return status;
    if (test->options.portable) perk_device_make_portable(&options.device);
    snprintf(test->report.start.arch, sizeof test->report.start.arch, "%s", options.device.arch);
    status = build_for(test, &options.device, err);
    if (status) return status;
    return perk_simulator_create(&test->tested, test->graph, test->weights, &test->config, &options, err);
}

static perk_status open_cpu(perk_test *test, perk_error *err) {
    test->poison = NULL; /* the simulator does so itself; the reference says what is right */
    perk_status status;
    if (test->options.backend == PERK_BACKEND_REFERENCE) {
        status = open_reference(test, &test->tested, err);
        test->reference = test->tested;
    } else {
        status = open_simulator(test, err);
    }
    test->report.start.backend = PERK_BACKEND_REFERENCE;
    snprintf(test->report.start.device, sizeof test->report.start.device, "CPU");
    return status;
}

static perk_status open_tested(perk_test *test, perk_error *err) {
    perk_backend backend = test->options.backend;
    perk_error failure = {0};
    if (backend == PERK_BACKEND_REFERENCE) return open_cpu(test, err);
    perk_status status = open_gpu(test, &failure);
    bool lacks = status == PERK_NO_DRIVER || status == PERK_NO_DEVICE;
    if (backend == PERK_BACKEND_AUTO && lacks) {
        perk_log_write(&test->options.log, PERK_LOG_INFO, "no GPU, running on the CPU: %s", failure.message);
        return open_cpu(test, err);
    }
    if (status && err) *err = failure;
    return status;
}

/* ---- steps ---- */

static int32_t first_position(const perk_test *test, int32_t request) {
    int32_t first = 0;
    for (int32_t i = 0; i < request; i++) first += test->requests[i].history + test->requests[i].tokens;
    return first;
}

static perk_status write_inputs(perk_test *test, perk_executor *executor, int32_t part_count, perk_error *err) {
    for (int i = 0; i < test->graph->tensor_count; i++) {
        const perk_tensor *tensor = test->graph->tensors[i];
        if (tensor->kind != PERK_TENSOR_INPUT) continue;
        const float *values = find_given(test, tensor)->values;
        size_t cols = (size_t)tensor->cols, rows = 0;
        for (int32_t k = 0; k < part_count; k++) {
            const test_part *part = &test->parts[k];
            size_t from = (size_t)first_position(test, part->request) + (size_t)part->position;
            size_t count = (size_t)part->count;
            memcpy(test->staged + rows * cols, values + from * cols, count * cols * sizeof *values);
            rows += count;
        }
        perk_status status = executor->type->write(executor, tensor, test->staged, (int64_t)rows, err);
        if (status) return status;
    }
    return PERK_OK;
}

/* A step over test->parts. */
static perk_status run_parts(perk_test *test, perk_executor *executor, int32_t part_count, perk_error *err) {
    perk_step_result result;
    perk_batch_clear(test->batch);
    for (int32_t k = 0; k < part_count; k++) {
        const test_part *part = &test->parts[k];
        const int32_t *pages = test->pages + (size_t)part->request * (size_t)test->batch->pages_per_request;
        const int32_t *ids = test->ids + first_position(test, part->request) + part->position;
        perk_status status =
            perk_batch_add(test->batch, &test->config, ids, part->count, part->position, pages, part->logits, err);
        if (status) return status;
    }
    perk_status status = write_inputs(test, executor, part_count, err);
    return status ? status : executor->type->step(executor, test->batch, false, &result, err);
}

static perk_status run_history(perk_test *test, perk_executor *executor, perk_error *err) {
    for (int32_t r = 0; r < test->request_count; r++) {
        int32_t history = test->requests[r].history, count;
        for (int32_t done = 0; done < history; done += count) {
            count = PERK_MIN(history - done, test->config.max_num_batched_tokens);
            test->parts[0] = (test_part){.request = r, .position = done, .count = count};
            perk_status status = run_parts(test, executor, 1, err);
            if (status) return perk_fail_prefix(err, status, "filling the KV cache of request %d", r);
        }
    }
    return PERK_OK;
}

static perk_status run_step(perk_test *test, perk_executor *executor, perk_error *err) {
    for (int32_t r = 0; r < test->request_count; r++)
        test->parts[r] = (test_part){r, test->requests[r].history, test->requests[r].tokens, test->requests[r].logits};
    return run_parts(test, executor, test->request_count, err);
}

static perk_status poison(perk_test *test, bool with_cache, perk_error *err) {
    return test->poison ? test->poison(test->tested, with_cache, err) : PERK_OK;
}

static perk_status run_tested(perk_test *test, perk_error *err) {
    perk_status status = poison(test, true, err);
    if (!status) status = run_history(test, test->tested, err);
    if (!status) status = poison(test, false, err);
    double begin = perk_now();
    if (!status) status = run_step(test, test->tested, err);
    test->report.step_ms = (perk_now() - begin) * 1e3;
    if (!status && test->report.start.backend == PERK_BACKEND_GPU)
        status = perk_gpu_step_ms(test->tested, &test->report.step_ms, err);
    return status;
}

perk_status perk_test_repeat(perk_test *test, perk_error *err) {
    if (!test->ran) return perk_fail(err, PERK_INVALID_ARGUMENT, "the test has not run");
    perk_status status = poison(test, false, err);
    return status ? status : run_step(test, test->tested, err);
}

/* ---- the run ---- */

static bool is_read(const perk_graph *graph, const perk_tensor *tensor) {
    for (int i = 0; i < graph->op_count; i++)
        for (int j = 0; j < PERK_OP_INPUTS_MAX; j++)
            if (graph->ops[i]->inputs[j] == tensor) return true;
    return false;
}

static void keep_results(perk_graph *graph) {
    for (int i = 0; i < graph->tensor_count; i++) {
        perk_tensor *tensor = graph->tensors[i];
        if (tensor->kind == PERK_TENSOR_ACTIVATION && !is_read(graph, tensor)) tensor->kept = true;
    }
}

static perk_status allocate(perk_test *test, perk_error *err) {
    size_t widest = 0;
    for (int i = 0; i < test->graph->tensor_count; i++)
        if (test->graph->tensors[i]->kind == PERK_TENSOR_INPUT)
            widest = PERK_MAX(widest, (size_t)test->graph->tensors[i]->cols);
    test->staged = perk_calloc((size_t)test->config.max_num_batched_tokens * widest, sizeof *test->staged);
    test->parts = perk_calloc((size_t)test->request_count, sizeof *test->parts);
    if (!test->staged || !test->parts) return perk_fail_memory(err, "the test");
    return perk_batch_create(&test->batch, &test->config, err);
}

static perk_status prepare(perk_test *test, perk_error *err) {
    perk_status status = perk_graph_check(test->graph, err);
    if (status) return status;
    if (test->graph->op_count == 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "the test's graph has no layer call: there is nothing to run");
    keep_results(test->graph);
    test->graph->frozen = true;
    status = allocate(test, err);
    if (!status) status = draw_inputs(test, err);
    if (!status) status = draw_tokens(test, err);
    if (!status) status = deal_pages(test, err);
    if (!status)
        status = perk_checkpoint_open_given(&test->weights, test->graph, test->options.seed, test->given,
                                            test->given_count, err);
    return status;
}

perk_status perk_test_run(perk_test *test, perk_error *err) {
    if (!test) return perk_fail(err, PERK_INVALID_ARGUMENT, "there is no test (NULL)");
    if (test->started) return fail_late("run", err);
    test->started = true;
    test->report.seed = test->options.seed;
    double begin = perk_now();
    perk_status status = prepare(test, err);
    if (!status) status = open_tested(test, err);
    if (status) return status;
    test->report.executor = test->tested->type->name;
    test->report.start.total_ms = (perk_now() - begin) * 1e3;
    status = run_tested(test, err);
    test->ran = status == PERK_OK;
    return status;
}

const perk_test_run_report *perk_test_report(const perk_test *test) { return &test->report; }

perk_executor *perk_test_executor(perk_test *test) { return test->tested; }

/* ---- values that come out ---- */

static perk_status check_readable(const perk_test *test, const perk_tensor *tensor, perk_error *err) {
    if (!test->ran)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s: the test has not run, or its run failed", tensor->name);
    if (tensor->kind == PERK_TENSOR_STACK)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s is a stack: read its parts", tensor->name);
    if (tensor->kind == PERK_TENSOR_ACTIVATION && !tensor->kept)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "%s may be folded away or overwritten: call perk_keep on it before the run", tensor->name);
    return PERK_OK;
}

static void read_weight(const perk_test *test, const perk_tensor *tensor, float *values, size_t count) {
    size_t each = count / (size_t)perk_weight_count(tensor);
    for (int64_t expert = 0; expert < perk_weight_count(tensor); expert++) {
        char name[PERK_STORED_NAME];
        const uint16_t *stored = perk_checkpoint_find(test->weights, perk_weight_name(tensor, expert, name))->data;
        for (size_t i = 0; i < each; i++) *values++ = perk_bf16_to_f32(stored[i]);
    }
}

perk_status perk_test_read(perk_test *test, const perk_tensor *tensor, float *values, size_t count, perk_error *err) {
    perk_status status = check_tensor(test, tensor, values, count, err);
    if (!status) status = check_readable(test, tensor, err);
    if (status) return status;
    if (tensor->kind == PERK_TENSOR_WEIGHT)
        read_weight(test, tensor, values, count);
    else if (tensor->kind == PERK_TENSOR_INPUT)
        memcpy(values, find_given(test, tensor)->values, count * sizeof *values);
    else
        status = test->tested->type->read(test->tested, tensor, values, (int64_t)perk_test_rows(test, tensor), err);
    return status;
}

static perk_status run_reference(perk_test *test, perk_error *err) {
    if (test->reference) return PERK_OK;
    perk_status status = open_reference(test, &test->reference, err);
    if (!status) status = run_history(test, test->reference, err);
    if (!status) status = run_step(test, test->reference, err);
    if (!status) return PERK_OK;
    free_executor(test->reference);
    test->reference = NULL;
    return perk_fail_prefix(err, status, "the reference executor");
}

perk_status perk_test_compare(perk_test *test, const perk_tensor *tensor, const float *wanted, size_t count,
                              perk_test_difference *out, perk_error *err) {
    *out = (perk_test_difference){0};
    size_t rows = perk_test_rows(test, tensor), all = tensor ? rows * (size_t)tensor->cols : 0;
    if (!wanted && count == 0) count = all;
    perk_status status = check_tensor(test, tensor, wanted ? (const void *)wanted : out, count, err);
    if (status) return status;
    float *got = perk_calloc(all, sizeof *got), *reference = NULL;
    status = got ? perk_test_read(test, tensor, got, all, err) : perk_fail_memory(err, tensor->name);
    if (!status && !wanted && tensor->kind != PERK_TENSOR_ACTIVATION)
        status = perk_fail(err, PERK_INVALID_ARGUMENT, "%s is not made by a layer call", tensor->name);
    if (!status && !wanted) status = run_reference(test, err);
    if (!status && !wanted) {
        reference = perk_calloc(all, sizeof *reference);
        status = reference ? test->reference->type->read(test->reference, tensor, reference, (int64_t)rows, err)
                           : perk_fail_memory(err, tensor->name);
        wanted = reference;
    }
    if (!status) perk_test_measure_by(got, wanted, rows, (size_t)tensor->cols, tensor->dtype == PERK_I32 ? 1 : 0, out);
    free(reference);
    free(got);
    return status;
}
