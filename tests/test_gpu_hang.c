/* Plans that are broken on purpose and brought past the checker, on a GPU: the kernel gives up after the limit, the
 * report names the wait, the executor is closed, and everything else on the GPU goes on. Skipped where there is none.
 */
#include "config.h"
#include "driver.h"
#include "gpu.h"
#include "gpu_cases.h"
#include "model.h"

enum { LIMIT_MS = 300, PATIENCE_SECONDS = 10, MAX_VOCAB = 4096 };

static perk_error err;
static char folder[512];
static perk_model *model;
static perk_config small = {.max_num_batched_tokens = 4,
                            .max_num_batched_requests = 1,
                            .page_size = 16,
                            .max_num_pages = 8,
                            .max_seq_length = 64};

/* What a case does to the plan, and what it finds there. */
typedef struct breakage {
    void (*alter)(perk_plan *plan, void *user);
    char stage[96]; /* where it must show */
    perk_status checker;
} breakage;

static int find_stage(const perk_plan *plan, const char *name) {
    for (int i = 0; i < plan->stage_count; i++)
        if (strcmp(plan->stages[i].name, name) == 0) return i;
    CHECK(false, "the plan has no stage %s", name);
    return -1;
}

static void remember(breakage *b, const perk_plan *plan, int stage) {
    perk_error refusal = {0};
    snprintf(b->stage, sizeof b->stage, "%s", plan->stages[stage].name);
    b->checker = perk_plan_check(plan, &refusal);
}

/* All tasks of a stage wait for one signal more than there are. */
static void want_too_much(perk_plan *plan, void *user) {
    int stage = find_stage(plan, "layers.1.mlp_residual");
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].wait_begin; j < plan->tasks[i].wait_end && plan->tasks[i].stage == stage; j++)
            plan->waits[j].needed = plan->counter_per_step[plan->waits[j].counter] + 1;
    remember(user, plan, stage);
}

/* The producers leave out a stage that the consumers expect. These take the next stage's weights for it and so on,
 * until the last weights are missing. */
static void stream_nothing(perk_plan *plan, void *user) {
    plan->stages[find_stage(plan, "layers.2.qkv")].stream.tile_count = 0;
    remember(user, plan, find_stage(plan, "logits"));
}

static perk_executor *open_executor(breakage *b) {
    perk_executor *gpu = NULL;
    const perk_gpu_options options = {.wait_limit_ms = b ? LIMIT_MS : 0, .alter = b ? b->alter : NULL, .alter_user = b};
    CHECK_OK(perk_gpu_create(&gpu, model->graph, model->checkpoint, &small, &options, NULL, &err));
    return gpu;
}

/* Steps over a prompt; the logits of the last one go to `logits`. */
static perk_status run(perk_executor *executor, float *logits) {
    int32_t pages[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    perk_batch *batch;
    perk_status status = PERK_OK;
    CHECK_OK(perk_batch_create(&batch, &small, &err));
    for (int step = 0; step < 4 && status == PERK_OK; step++) {
        int32_t ids[4];
        perk_step_result result;
        for (int i = 0; i < 4; i++) ids[i] = (step * 4 + i) * 7 % model->vocab_size;
        perk_batch_clear(batch);
        CHECK_OK(perk_batch_add(batch, &small, ids, 4, step * 4, pages, 1, &err));
        status = executor->type->step(executor, batch, true, &result, &err);
        if (status == PERK_OK) memcpy(logits, result.logits, (size_t)model->vocab_size * sizeof *logits);
    }
    perk_batch_free(batch);
    return status;
}

static void expect_hang(breakage *b, const char *text) {
    static float logits[MAX_VOCAB];
    perk_executor *gpu = open_executor(b);
    CHECK(b->checker == PERK_UNSAFE_PLAN, "the checker lets the broken plan pass");
    double begin = perk_now();
    char origin[160];
    snprintf(origin, sizeof origin, "The first stage that did not finish is %s: ", b->stage);
    CHECK_FAILS(run(gpu, logits), PERK_HANG, origin);
    double seconds = perk_now() - begin;
    CHECK(strstr(err.message, text), "%s", err.message);
    CHECK(seconds < PATIENCE_SECONDS, "%.1f s", seconds);
    printf("%.3f s: %s\n", seconds, err.message);
    CHECK_FAILS(run(gpu, logits), PERK_HANG, origin); /* it stays closed */
    gpu->type->free(gpu);
}

/* A healthy executor on the same GPU and in the same context computes the same before, beside and after a hang. */
static void test_hang(void (*alter)(perk_plan *plan, void *user), const char *text) {
    static float before[MAX_VOCAB], after[MAX_VOCAB], anew[MAX_VOCAB];
    size_t bytes = (size_t)model->vocab_size * sizeof *before;
    breakage b = {.alter = alter};
    perk_executor *healthy = open_executor(NULL);
    CHECK_OK(run(healthy, before));
    expect_hang(&b, text);
    CHECK_OK(run(healthy, after));
    CHECK(memcmp(before, after, bytes) == 0, "a hang changed what another executor computes");
    healthy->type->free(healthy);
    healthy = open_executor(NULL);
    CHECK_OK(run(healthy, anew));
    CHECK(memcmp(before, anew, bytes) == 0, "a hang changed what an executor opened later computes");
    healthy->type->free(healthy);
}

static bool has_gpu(void) {
    int probe = 0;
    pid_t child = fork(); /* a process that has used the driver must not fork */
    if (child == 0) {
        perk_driver *driver;
        perk_status status = perk_driver_open(&driver, &err);
        if (status != PERK_OK) fprintf(stderr, "skipped, no GPU: %s\n", err.message);
        _exit(status != PERK_OK);
    }
    waitpid(child, &probe, 0);
    return probe == 0;
}

int main(int argc, char **argv) {
    gpu_cases cases = {0};
    snprintf(folder, sizeof folder, "%s/examples/tiny", argc > 1 ? argv[1] : PERK_SOURCE_DIR);
    if (!has_gpu()) return TEST_SKIP;
    CHECK_OK(perk_model_open(&model, folder, false, 0, &err));
    CHECK_OK(perk_config_resolve(&small, model->max_positions, &err));
    CHECK(model->vocab_size <= MAX_VOCAB, "%d", model->vocab_size);
    if (gpu_case_begin(&cases, "a wait for what cannot come")) {
        test_hang(want_too_much, "tasks have signalled; they wait for ");
        gpu_case_end();
    }
    if (gpu_case_begin(&cases, "weights that nobody streams")) {
        test_hang(stream_nothing, "waited more than 300 ms for ");
        gpu_case_end();
    }
    perk_model_free(model);
    return gpu_cases_finish(&cases);
}
