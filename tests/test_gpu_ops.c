/* Every op alone on the GPU against the reference executor, over the grid of src/test_ops.c (which has the limits, and
 * why): native and portable, fresh inputs in every run, everything poisoned before. Skipped where there is no GPU.
 *
 * A failure names op, shape, tensor, element and seed; PERK_TEST_SEED=N repeats that run's numbers, and
 * `perk test-op OP ... --seed N` one case of it. */
#include "gpu_cases.h"
#include "op_cases.h"

#include <time.h>

static perk_error err;

static uint64_t choose_seed(void) {
    const char *given = getenv("PERK_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : (uint64_t)time(NULL);
    printf("PERK_TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

static void show(const perk_op_case *c, const char *shape, int portable, const perk_op_verdict *v) {
    printf("%-9s%-9s%-12sworst %6.3f of %-6g relative %7.1e of %-5g %9.3f ms  %s\n", v->passed ? "ok" : "MISMATCH",
           portable ? "portable" : "native", c->op, v->by.worst, v->limit, v->by.relative, v->relative_limit,
           v->report.step_ms, shape);
    fflush(stdout);
}

/* Steps of more than 8 tokens: linears on wgmma, which only Hopper has; of more than 64 nobody else has any. */
static const perk_op_case wide[] = {
    {.op = "linear", .rows = 16, .in = 4096, .out = 6144},
    {.op = "linear", .rows = 17, .live = 9, .in = 12288, .out = 4096, .residual = true},
    {.op = "linear", .rows = 32, .in = 12288, .out = 4096, .residual = true},
    {.op = "linear", .rows = 33, .in = 1100, .out = 999, .bias = true, .residual = true},
    {.op = "linear", .rows = 64, .live = 50, .in = 2048, .out = 2048, .residual = true},
    {.op = "linear", .rows = 64, .in = 4096, .out = 4096, .residual = true},
    {.op = "mlp", .rows = 32, .in = 4096, .out = 12288},
    {.op = "mlp", .rows = 64, .live = 41, .in = 1000, .out = 3000},
    {.op = "vocabulary", .rows = 32, .in = 1024, .out = 32000},
    {.op = "vocabulary", .rows = 64, .live = 60, .in = 4096, .out = 151936},
    {.op = "decoder",
     .rows = 64,
     .live = 63,
     .in = 512,
     .out = 1000,
     .heads = 8,
     .kv_heads = 2,
     .head_dim = 64,
     .context = 300,
     .norms = true},
    ODD_DECODER(24, 19),
    {.op = "linear", .rows = 128, .in = 1024, .out = 4096, .bias = true},
    {.op = "linear", .rows = 256, .in = 4096, .out = 6144},
    {.op = "linear", .rows = 256, .live = 70, .in = 12288, .out = 4096, .residual = true},
    {.op = "linear", .rows = 100, .in = 1100, .out = 999, .bias = true, .residual = true},
    {.op = "mlp", .rows = 256, .in = 4096, .out = 12288},
    {.op = "mlp", .rows = 200, .live = 129, .in = 1000, .out = 3000},
    {.op = "linear", .rows = 1024, .in = 4096, .out = 4096, .residual = true},
    {.op = "mlp", .rows = 700, .live = 300, .in = 1000, .out = 3000},
    {.op = "vocabulary", .rows = 128, .in = 1024, .out = 32000},
    {.op = "decoder",
     .rows = 256,
     .in = 512,
     .out = 1000,
     .heads = 8,
     .kv_heads = 2,
     .head_dim = 64,
     .context = 300,
     .norms = true},
    ODD_DECODER(128, 90),
    {.op = "attention", .rows = 256, .heads = 32, .kv_heads = 8, .head_dim = 128, .context = 1024, .norms = true},
    {.op = "attention",
     .rows = 256,
     .live = 250,
     .heads = 64,
     .kv_heads = 8,
     .head_dim = 128,
     .context = 500,
     .requests = 7},
    {.op = "attention", .rows = 200, .heads = 10, .kv_heads = 2, .head_dim = 64, .context = 300, .window = 90},
    {.op = "attention", .rows = 128, .live = 127, .heads = 16, .kv_heads = 16, .head_dim = 64, .requests = 3},
    {.op = "attention", .rows = 128, .heads = 8, .kv_heads = 2, .head_dim = 96, .context = 100},
};

static void run_case(const perk_op_case *c, int portable, uint64_t seed) {
    const perk_test_options options = {.backend = PERK_BACKEND_GPU, .portable = portable, .seed = seed};
    perk_op_verdict v;
    char shape[128];
    perk_op_case_shape(c, shape, sizeof shape);
    perk_status status = perk_op_case_run(c, &options, &v, &err);
    if (c->rows > 64 && status == PERK_UNSUPPORTED && strstr(err.message, "at most 64 rows")) {
        printf("not on this GPU: %s %s\n", c->op, shape);
        return;
    }
    CHECK(status == PERK_OK, "%s %s: %s: %s", c->op, shape, perk_status_text(status), err.message);
    show(c, shape, portable, &v);
    CHECK(v.compared, "%s %s ran on %s", c->op, shape, v.report.executor);
    CHECK(v.report.start.spill_bytes == 0, "%s %s spills %d bytes", c->op, shape, v.report.start.spill_bytes);
    CHECK(v.passed, "%s %s: %s[%zu, %zu] is %g, wanted %g; %zu of %zu elements are NaN or infinite; %s", c->op, shape,
          v.tensor, v.by.row, v.by.col, v.by.got, v.by.wanted, v.by.unusable, v.by.count, v.problem);
}

static void run_grid(gpu_cases *cases, const perk_op_case *grid, size_t count, int portable, uint64_t seed) {
    for (size_t i = 0; i < count; i++) {
        char name[160], shape[128];
        snprintf(name, sizeof name, "%s %s %s", portable ? "portable" : "native", grid[i].op,
                 perk_op_case_shape(&grid[i], shape, sizeof shape));
        if (gpu_case_begin(cases, name)) {
            run_case(&grid[i], portable, seed);
            gpu_case_end();
        }
    }
}

int main(void) {
    static gpu_cases cases;
    size_t count;
    const perk_op_case *grid = perk_op_grid(&count);
    if (!gpu_cases_has_driver()) return TEST_SKIP;
    uint64_t seed = choose_seed();
    for (int portable = 0; portable < 2; portable++) run_grid(&cases, grid, count, portable, seed);
    run_grid(&cases, wide, PERK_COUNT(wide), 0, seed);
    return gpu_cases_finish(&cases);
}
