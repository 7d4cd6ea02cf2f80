/* Every op alone on the GPU against the reference executor: fresh random inputs, kept outputs poisoned by the step
 * before, errors in units of bf16 rounding. Skipped where there is no GPU. */
#include "driver.h"
#include "float.h"
#include "gpu.h"
#include "gpu_cases.h"
#include "random_weights.h"
#include "reference.h"

#include <math.h>

static perk_error err;
static int portable;
static uint64_t random_state = 88172645463325252u;

static float random_value(void) { /* roughly normal, deviation 1 */
    float sum = 0;
    for (int i = 0; i < 12; i++) {
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        sum += (float)(random_state >> 40) / (float)(1 << 24);
    }
    return sum - 6;
}

/* One graph in both executors. */
typedef struct bench {
    const char *what;
    perk_graph *graph;
    perk_config config;
    perk_checkpoint *weights;
    perk_executor *gpu, *reference;
    perk_batch *batch;
} bench;

static char config_path[512];

static void open_bench(bench *b, const char *what, int tokens, int requests, int max_seq) {
    memset(b, 0, sizeof *b);
    b->what = what;
    b->config = (perk_config){.max_num_batched_tokens = tokens,
                              .max_num_batched_requests = requests,
                              .max_num_logit_rows = tokens,
                              .page_size = 16,
                              .max_seq_length = max_seq};
    CHECK_OK(perk_config_resolve(&b->config, 0, &err));
    CHECK_OK(perk_graph_create(&b->graph, what, &err));
}

static void start_bench(bench *b) {
    CHECK_OK(perk_graph_check(b->graph, &err));
    CHECK_OK(perk_checkpoint_open_random(&b->weights, config_path, b->graph, 7, &err));
    const perk_gpu_options gpu = {.portable = portable != 0};
    const perk_reference_options reference = {.precision = PERK_PRECISION_BF16};
    CHECK_OK(perk_gpu_create(&b->gpu, b->graph, b->weights, &b->config, &gpu, NULL, &err));
    CHECK_OK(perk_reference_create(&b->reference, b->graph, b->weights, &b->config, &reference, &err));
    CHECK_OK(perk_batch_create(&b->batch, &b->config, &err));
}

static void close_bench(bench *b) {
    perk_batch_free(b->batch);
    if (b->gpu) b->gpu->type->free(b->gpu);
    if (b->reference) b->reference->type->free(b->reference);
    perk_checkpoint_free(b->weights);
    perk_graph_free(b->graph);
}

/* Request r has pages r * pages_per_request + 0, 1, ... */
static void add_tokens(bench *b, int request, int position, int count, int vocab, int want_logits) {
    int32_t ids[64], pages[256];
    for (int i = 0; i < count; i++) ids[i] = (request * 31 + (position + i) * 17 + 5) % vocab;
    for (int i = 0; i < b->batch->pages_per_request; i++) pages[i] = request * b->batch->pages_per_request + i;
    CHECK_OK(perk_batch_add(b->batch, &b->config, ids, count, position, pages, want_logits, &err));
}

static void write_input(bench *b, perk_tensor *input, int rows, float *values) {
    for (int64_t i = 0; i < rows * input->cols; i++) values[i] = perk_bf16_to_f32(perk_f32_to_bf16(random_value()));
    CHECK_OK(b->gpu->type->write(b->gpu, input, values, rows, &err));
    CHECK_OK(b->reference->type->write(b->reference, input, values, rows, &err));
}

static void step_both(bench *b, perk_step_result *gpu, perk_step_result *reference) {
    CHECK_OK(b->gpu->type->step(b->gpu, b->batch, true, gpu, &err));
    CHECK_OK(b->reference->type->step(b->reference, b->batch, true, reference, &err));
}

/* Largest difference in units of bf16 rounding of the row's largest value, and the relative L2 error. */
static void compare(const bench *b, const char *what, const float *got, const float *want, size_t count, double limit) {
    double difference = 0, norm = 0, worst = 0, top = 0;
    for (size_t i = 0; i < count; i++) {
        CHECK(isfinite(got[i]), "%s %s: element %zu is %g, wanted %g", b->what, what, i, (double)got[i],
              (double)want[i]);
        double d = (double)got[i] - (double)want[i];
        difference += d * d;
        norm += (double)want[i] * (double)want[i];
        worst = fmax(worst, fabs(d));
        top = fmax(top, fabs((double)want[i]));
    }
    double relative = sqrt(difference / fmax(norm, 1e-30));
    printf("%-8s %-34s %-10s relative %.2e (limit %.0e), worst %.2e of top %.2e\n", portable ? "portable" : "native",
           b->what, what, relative, limit, worst, top);
    fflush(stdout);
    CHECK(relative <= limit, "%s %s", b->what, what);
}

static void compare_tensor(bench *b, perk_tensor *tensor, int rows, double limit) {
    size_t count = (size_t)rows * (size_t)tensor->cols;
    float *got = malloc(count * sizeof *got), *want = malloc(count * sizeof *want);
    CHECK_OK(b->gpu->type->read(b->gpu, tensor, got, rows, &err));
    CHECK_OK(b->reference->type->read(b->reference, tensor, want, rows, &err));
    compare(b, tensor->name, got, want, count, limit);
    free(got);
    free(want);
}

/* Poison: a step on other inputs first, so that a value that is never written is seen. */
static void run_input_op(bench *b, perk_tensor *input, perk_tensor *residual, perk_tensor *out, int rows,
                         double limit) {
    int64_t widest = residual && residual->cols > input->cols ? residual->cols : input->cols;
    float *values = malloc((size_t)rows * (size_t)widest * sizeof *values);
    perk_step_result gpu, reference;
    for (int pass = 0; pass < 2; pass++) {
        int live = pass == 0 ? rows : rows > 1 ? rows - 1 : 1;
        perk_batch_clear(b->batch);
        add_tokens(b, 0, 0, live, 100, 2);
        write_input(b, input, rows, values);
        if (residual) write_input(b, residual, rows, values);
        step_both(b, &gpu, &reference);
        compare_tensor(b, out, live, limit);
    }
    free(values);
}

static void test_linear(int rows, int in, int out, int bias, int with_residual) {
    bench b;
    char what[64];
    snprintf(what, sizeof what, "linear %d x %d -> %d%s%s", rows, in, out, bias ? " bias" : "",
             with_residual ? " +res" : "");
    open_bench(&b, what, rows, 1, 64);
    perk_tensor *x = perk_input(b.graph, "x", in), *w = perk_attach_matrix(b.graph, "w", out, in);
    perk_tensor *bias_tensor = bias ? perk_attach_vector(b.graph, "b", out) : NULL;
    perk_tensor *residual = with_residual ? perk_input(b.graph, "residual", out) : NULL;
    perk_tensor *y = residual ? perk_linear_residual(b.graph, "y", x, w, bias_tensor, residual)
                              : perk_linear(b.graph, "y", x, w, bias_tensor);
    perk_keep(b.graph, y);
    start_bench(&b);
    run_input_op(&b, x, residual, y, rows, 4e-3);
    close_bench(&b);
}

static void test_norm(int rows, int width) {
    bench b;
    char what[64];
    snprintf(what, sizeof what, "rmsnorm %d x %d", rows, width);
    open_bench(&b, what, rows, 1, 64);
    perk_tensor *x = perk_input(b.graph, "x", width);
    perk_tensor *y = perk_rmsnorm(b.graph, "y", x, perk_attach_vector(b.graph, "g", width), 1e-6f);
    perk_keep(b.graph, y);
    start_bench(&b);
    run_input_op(&b, x, NULL, y, rows, 3e-3);
    close_bench(&b);
}

static void test_silu(int rows, int width) {
    bench b;
    char what[64];
    snprintf(what, sizeof what, "silu_mul %d x %d", rows, width);
    open_bench(&b, what, rows, 1, 64);
    perk_tensor *x = perk_input(b.graph, "x", 2 * width), *y = perk_silu_mul(b.graph, "y", x);
    perk_keep(b.graph, y);
    start_bench(&b);
    run_input_op(&b, x, NULL, y, rows, 3e-3);
    close_bench(&b);
}

/* Norm and silu folded into one linear: what a layer's gate and up projections are. */
static void test_mlp(int rows, int hidden, int inner) {
    bench b;
    char what[64];
    snprintf(what, sizeof what, "norm+gate_up+silu %d x %d, %d", rows, hidden, inner);
    open_bench(&b, what, rows, 1, 64);
    perk_tensor *x = perk_input(b.graph, "x", hidden);
    perk_tensor *n = perk_rmsnorm(b.graph, "n", x, perk_attach_vector(b.graph, "g", hidden), 1e-6f);
    perk_tensor *parts[] = {perk_attach_matrix(b.graph, "gate", inner, hidden),
                            perk_attach_matrix(b.graph, "up", inner, hidden)};
    perk_tensor *y =
        perk_silu_mul(b.graph, "y", perk_linear(b.graph, "gu", n, perk_stack(b.graph, "gate_up", parts, 2), NULL));
    perk_keep(b.graph, y);
    start_bench(&b);
    run_input_op(&b, x, NULL, y, rows, 6e-3);
    close_bench(&b);
}

static void test_vocabulary(int rows, int hidden, int vocab) {
    bench b;
    char what[64];
    snprintf(what, sizeof what, "embed+logits+argmax %d x %d, %d", rows, hidden, vocab);
    open_bench(&b, what, rows, 1, 64);
    perk_tensor *table = perk_attach_matrix(b.graph, "table", vocab, hidden);
    perk_tensor *x = perk_embed(b.graph, "x", table);
    perk_tensor *s = perk_select_rows(b.graph, "s", x);
    perk_tensor *logits = perk_logits(b.graph, "logits", s, table);
    perk_argmax(b.graph, "next", logits);
    perk_keep(b.graph, x);
    perk_keep(b.graph, s);
    start_bench(&b);
    perk_step_result gpu, reference;
    for (int live = rows; live > 0; live = live / 2) {
        perk_batch_clear(b.batch);
        add_tokens(&b, 0, 0, live, vocab, live % 2 ? 1 : 2);
        step_both(&b, &gpu, &reference);
        int count = b.batch->num_logit_rows;
        compare_tensor(&b, x, live, 0);
        compare_tensor(&b, s, count, 0);
        compare(&b, "logits", gpu.logits, reference.logits, (size_t)count * (size_t)vocab, 1e-5);
        for (int i = 0; i < count; i++) {
            CHECK(gpu.argmax[i] >= 0 && gpu.argmax[i] < vocab, "%d", gpu.argmax[i]);
            const float *row = gpu.logits + (size_t)i * (size_t)vocab;
            for (int v = 0; v < vocab; v++)
                CHECK(row[v] < row[gpu.argmax[i]] || (row[v] == row[gpu.argmax[i]] && v >= gpu.argmax[i]), "row %d", i);
        }
    }
    close_bench(&b);
}

/* Prompts in chunks and single tokens of several requests, over page boundaries. */
static void test_attention(int heads, int kv_heads, int dim, int tokens, int norms, int window) {
    bench b;
    char what[64];
    snprintf(what, sizeof what, "attention %d/%d x %d, T%d%s%s", heads, kv_heads, dim, tokens, norms ? " norm" : "",
             window ? " window" : "");
    open_bench(&b, what, tokens, tokens < 4 ? tokens : 4, 256);
    int width = (heads + 2 * kv_heads) * dim;
    float inv_freq[128];
    for (int i = 0; i < dim / 2; i++) inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)dim);
    perk_tensor *qkv = perk_input(b.graph, "qkv", width);
    perk_attention_params params = {.num_heads = heads,
                                    .num_kv_heads = kv_heads,
                                    .head_dim = dim,
                                    .scale = 1 / sqrtf((float)dim),
                                    .window = window,
                                    .inv_freq = inv_freq,
                                    .rope_scale = 1,
                                    .norm_eps = 1e-6f};
    if (norms) {
        params.q_norm = perk_attach_vector(b.graph, "q_norm", dim);
        params.k_norm = perk_attach_vector(b.graph, "k_norm", dim);
    }
    perk_tensor *y = perk_attention(b.graph, "y", qkv, &params);
    perk_keep(b.graph, y);
    start_bench(&b);
    float *values = malloc((size_t)tokens * (size_t)width * sizeof *values);
    int lengths[3] = {0, 0, 0};
    perk_step_result gpu, reference;
    for (int step = 0; step < 12; step++) {
        int room = tokens;
        perk_batch_clear(b.batch);
        for (int r = 0; r < 3 && room > 0; r++) {
            int count = (step + r) % 3 == 0 ? (room + 1) / 2 : 1;
            if (lengths[r] + count > 250) continue;
            add_tokens(&b, r, lengths[r], count, 100, 1);
            lengths[r] += count;
            room -= count;
        }
        write_input(&b, qkv, tokens, values);
        step_both(&b, &gpu, &reference);
        if (step % 4 == 3) compare_tensor(&b, y, b.batch->num_tokens, 6e-3);
    }
    free(values);
    close_bench(&b);
}

static gpu_cases cases;

#define CASE(call)                                                                                                     \
    do {                                                                                                               \
        if (gpu_case_begin(&cases, #call)) {                                                                           \
            call;                                                                                                      \
            gpu_case_end();                                                                                            \
        }                                                                                                              \
    } while (0)

static void probe_device(void) {
    perk_driver *driver;
    perk_status status = perk_driver_open(&driver, &err);
    if (status != PERK_OK) fprintf(stderr, "skipped, no GPU: %s\n", err.message);
    _exit(status == PERK_OK ? 0 : TEST_SKIP);
}

static void run_all(void) {
    CASE(test_linear(1, 512, 2112, 0, 0));
    CASE(test_linear(1, 1024, 4096, 1, 1));
    CASE(test_linear(8, 4096, 1024, 0, 1));
    CASE(test_linear(3, 72, 100, 1, 0));
    CASE(test_linear(16, 3072, 1024, 0, 0));
    CASE(test_linear(64, 1024, 2048, 1, 1));
    CASE(test_norm(5, 72));
    CASE(test_norm(64, 4096));
    CASE(test_silu(7, 100));
    CASE(test_mlp(1, 1024, 3072));
    CASE(test_mlp(8, 256, 1000));
    CASE(test_mlp(64, 512, 520));
    CASE(test_vocabulary(1, 256, 1031));
    CASE(test_vocabulary(8, 1024, 5000));
    CASE(test_attention(4, 2, 64, 8, 1, 0));
    CASE(test_attention(16, 8, 128, 1, 1, 0));
    CASE(test_attention(32, 8, 128, 16, 1, 0));
    CASE(test_attention(10, 2, 96, 64, 0, 0));
    CASE(test_attention(8, 8, 32, 16, 0, 40));
}

int main(int argc, char **argv) {
    snprintf(config_path, sizeof config_path, "%s/bench/configs/qwen3-0.6b/config.json",
             argc > 1 ? argv[1] : PERK_SOURCE_DIR);
    int probe = 0;
    pid_t child = fork();
    if (child == 0) probe_device();
    waitpid(child, &probe, 0);
    if (probe != 0) return TEST_SKIP;
    for (portable = 0; portable < 2; portable++) run_all();
    return gpu_cases_finish(&cases);
}
