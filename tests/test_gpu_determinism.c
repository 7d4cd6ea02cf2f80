/* The same step, 200 times, on the GPU: the same bits. One op of each kind, with what it makes kept, and the shipped
 * model, as it is (its logits) and with every activation kept; native and portable. Skipped where there is no GPU. */
#include "gpu.h"
#include "gpu_cases.h"
#include "model.h"
#include "test_mode.h"
#include "test_ops.h"

#include <math.h>

enum { RUNS = 200, MODEL_TOKENS = 16, OUTPUTS_MAX = 4 };

static perk_error err;

/* A tensor's values after the first run, and after the one that is compared with it. */
typedef struct snapshot {
    const perk_tensor *tensor;
    int64_t rows;
    float *first, *now;
} snapshot;

static snapshot make_snapshot(const perk_tensor *tensor, size_t rows) {
    size_t count = rows * (size_t)tensor->cols;
    snapshot s = {tensor, (int64_t)rows, calloc(count, sizeof *s.first), calloc(count, sizeof *s.now)};
    CHECK(s.first && s.now);
    return s;
}

static void free_snapshot(snapshot *s) {
    free(s->first);
    free(s->now);
}

static void read_snapshot(perk_executor *executor, const snapshot *s, float *values) {
    CHECK_OK(executor->type->read(executor, s->tensor, values, s->rows, &err));
}

/* The first run's values; poison that stayed would be the same in every run. */
static void begin_snapshot(perk_executor *executor, const snapshot *s, const char *what) {
    size_t cols = (size_t)s->tensor->cols;
    read_snapshot(executor, s, s->first);
    for (size_t i = 0; i < (size_t)s->rows * cols; i++)
        CHECK(isfinite(s->first[i]) && (s->tensor->dtype != PERK_I32 || s->first[i] >= 0), "%s: %s[%zu, %zu] is %g",
              what, s->tensor->name, i / cols, i % cols, (double)s->first[i]);
}

/* Bits, not values: a NaN must be the same NaN, a zero the same zero. */
static void check_same(perk_executor *executor, const snapshot *s, const char *what, int run) {
    size_t count = (size_t)s->rows * (size_t)s->tensor->cols;
    read_snapshot(executor, s, s->now);
    if (memcmp(s->first, s->now, count * sizeof *s->now) == 0) return;
    size_t different = 0, where = count;
    for (size_t i = 0; i < count; i++) {
        if (memcmp(&s->first[i], &s->now[i], sizeof *s->now) == 0) continue;
        if (where == count) where = i;
        different++;
    }
    CHECK(0, "%s: run %d: %zu of %zu elements of %s differ, the first at [%zu, %zu]: %.9g, before %.9g", what, run,
          different, count, s->tensor->name, where / (size_t)s->tensor->cols, where % (size_t)s->tensor->cols,
          (double)s->now[where], (double)s->first[where]);
}

/* ---- ops ---- */

static void repeat_op(const perk_op_case *c, int portable) {
    const perk_test_options options = {.backend = PERK_BACKEND_GPU, .portable = portable, .seed = 7};
    perk_test *test;
    perk_tensor *outputs[OUTPUTS_MAX];
    snapshot snapshots[OUTPUTS_MAX];
    size_t count = OUTPUTS_MAX;
    CHECK_OK(perk_op_case_open(&test, c, &options, outputs, &count, &err));
    CHECK_OK(perk_test_run(test, &err));
    perk_executor *executor = perk_test_executor(test);
    for (size_t i = 0; i < count; i++) {
        snapshots[i] = make_snapshot(outputs[i], perk_test_rows(test, outputs[i]));
        begin_snapshot(executor, &snapshots[i], c->op);
    }
    for (int run = 1; run < RUNS; run++) {
        CHECK_OK(perk_test_repeat(test, &err));
        for (size_t i = 0; i < count; i++) check_same(executor, &snapshots[i], c->op, run);
    }
    for (size_t i = 0; i < count; i++) free_snapshot(&snapshots[i]);
    perk_test_free(test);
    printf("%-8s %-12s %d runs, %zu outputs: the same bits\n", portable ? "portable" : "native", c->op, (int)RUNS,
           count);
}

/* ---- the model ---- */

typedef struct model_run {
    perk_model *model;
    perk_config config;
    perk_executor *executor;
    perk_batch *batch;
    snapshot *snapshots; /* of every op's output with `keep`, else of logits and tokens */
    int count;
} model_run;

static void open_model(model_run *r, const char *folder, int portable, int keep) {
    const perk_gpu_options options = {.portable = portable != 0};
    int32_t ids[MODEL_TOKENS], pages[64];
    CHECK_OK(perk_model_open(&r->model, folder, false, 0, &err));
    perk_graph *graph = r->model->graph;
    for (int i = 0; keep && i < graph->op_count; i++) perk_keep(graph, graph->ops[i]->output);
    r->config = (perk_config){.max_num_batched_tokens = MODEL_TOKENS,
                              .max_num_batched_requests = 1,
                              .max_num_logit_rows = MODEL_TOKENS,
                              .page_size = 16,
                              .max_seq_length = 64};
    CHECK_OK(perk_config_resolve(&r->config, r->model->max_positions, &err));
    CHECK_OK(perk_gpu_create(&r->executor, graph, r->model->checkpoint, &r->config, &options, NULL, &err));
    CHECK_OK(perk_batch_create(&r->batch, &r->config, &err));
    for (int i = 0; i < MODEL_TOKENS; i++) ids[i] = (i * 37 + 11) % r->model->vocab_size;
    for (int i = 0; i < 64; i++) pages[i] = i;
    CHECK_OK(perk_batch_add(r->batch, &r->config, ids, MODEL_TOKENS, 0, pages, 2, &err));
    r->snapshots = calloc((size_t)graph->op_count, sizeof *r->snapshots);
    CHECK(r->snapshots);
    for (int i = 0; i < graph->op_count; i++)
        if (keep || graph->ops[i]->output->dtype != PERK_BF16)
            r->snapshots[r->count++] = make_snapshot(graph->ops[i]->output, MODEL_TOKENS);
}

static void run_model(model_run *r) {
    perk_step_result result;
    CHECK_OK(perk_gpu_poison(r->executor, true, &err));
    CHECK_OK(r->executor->type->step(r->executor, r->batch, false, &result, &err));
}

static void repeat_model(const char *folder, int portable, int keep) {
    model_run r = {0};
    const char *what = keep ? "examples/tiny, all kept" : "examples/tiny";
    open_model(&r, folder, portable, keep);
    run_model(&r);
    for (int i = 0; i < r.count; i++) begin_snapshot(r.executor, &r.snapshots[i], what);
    for (int run = 1; run < RUNS; run++) {
        run_model(&r);
        for (int i = 0; i < r.count; i++) check_same(r.executor, &r.snapshots[i], what, run);
    }
    printf("%-8s %s: %d runs, %d tensors: the same bits\n", portable ? "portable" : "native", what, (int)RUNS, r.count);
    for (int i = 0; i < r.count; i++) free_snapshot(&r.snapshots[i]);
    free(r.snapshots);
    perk_batch_free(r.batch);
    r.executor->type->free(r.executor);
    perk_model_free(r.model);
}

/* ---- cases ---- */

static gpu_cases cases;

#define CASE(call, ...)                                                                                                \
    do {                                                                                                               \
        char name[160];                                                                                                \
        snprintf(name, sizeof name, __VA_ARGS__);                                                                      \
        if (gpu_case_begin(&cases, name)) {                                                                            \
            call;                                                                                                      \
            gpu_case_end();                                                                                            \
        }                                                                                                              \
    } while (0)

int main(int argc, char **argv) {
    char folder[600];
    snprintf(folder, sizeof folder, "%s/examples/tiny", argc > 1 ? argv[1] : PERK_SOURCE_DIR);
    if (!gpu_cases_has_driver()) return TEST_SKIP;
    for (int portable = 0; portable < 2; portable++) {
        for (int keep = 0; keep < 2; keep++)
            CASE(repeat_model(folder, portable, keep), "%s model, keep %d", portable ? "portable" : "native", keep);
        for (int i = 0; perk_op_case_names[i]; i++)
            CASE(repeat_op(perk_op_case_of(perk_op_case_names[i]), portable), "%s %s", portable ? "portable" : "native",
                 perk_op_case_names[i]);
    }
    return gpu_cases_finish(&cases);
}
