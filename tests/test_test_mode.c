/* Test mode without a GPU: what it refuses, the values of every op in the reference executor against numbers computed
 * here, the unit of differences on constructed cases, the path to a GPU on the fake driver of tests/fake_cuda. */
#include "fake_cuda/fake_cuda.h"
#include "src/float.h"
#include "src/gpu_state.h"
#include "src/ops/op.h"
#include "src/test_mode.h"
#include "src/test_ops.h"
#include "test_cache.h"

#include <dlfcn.h>
#include <math.h>

#define FAKE PERK_BINARY_DIR "/libfake_cuda.so"

static perk_error err;

static perk_test_options on_reference(int rows) {
    return (perk_test_options){.backend = PERK_BACKEND_REFERENCE, .rows = rows, .seed = 11, .threads = 1};
}

static perk_test *create(const perk_test_options *options) {
    perk_test *test;
    CHECK_OK(perk_test_create(&test, options, &err));
    return test;
}

static float *read_all(perk_test *test, const perk_tensor *tensor, size_t cols) {
    size_t count = perk_test_rows(test, tensor) * cols;
    float *values = calloc(count ? count : 1, sizeof *values);
    CHECK(values);
    CHECK_OK(perk_test_read(test, tensor, values, count, &err));
    return values;
}

/* A result that is rounded once lies within half a unit of the exact one. */
static void check_exact(perk_test *test, const perk_tensor *tensor, const float *wanted, size_t count) {
    perk_test_difference d;
    CHECK_OK(perk_test_compare(test, tensor, wanted, count, &d, &err));
    CHECK(d.worst <= 0.51 && d.count == count && d.unusable == 0, "%g units at [%zu, %zu]: %g, wanted %g", d.worst,
          d.row, d.col, d.got, d.wanted);
}

/* ---- what is refused ---- */

static void test_bad_options(void) {
    perk_test *test;
    perk_test_options o = {.backend = (perk_backend)7};
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "backend 7");
    CHECK(test == NULL);
    o = (perk_test_options){.rows = -1};
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "negative");
    o = (perk_test_options){.page_size = 17};
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "page_size");
    o = (perk_test_options){.request_count = 1};
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "no list");
    perk_test_request requests[] = {{.tokens = 3}, {.tokens = 0}};
    o = (perk_test_options){.requests = requests, .request_count = 2};
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "request 1: history 0, tokens 0");
    requests[1].tokens = 4;
    o.rows = 6;
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "7 tokens in the step");
    o.rows = 0;
    o.max_positions = 3;
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_INVALID_ARGUMENT, "max_positions 3");
    requests[0].history = INT32_MAX;
    CHECK_FAILS(perk_test_create(&test, &o, &err), PERK_LIMIT, "positions");
    perk_test_free(create(NULL));
    perk_test_free(NULL);
}

static void test_bad_calls(void) {
    perk_test_options o = on_reference(2);
    perk_test *test = create(&o), *other = create(&o);
    perk_graph *graph = perk_test_graph(test);
    float values[64] = {0};
    int32_t ids[2] = {0, 0};
    perk_test_difference d;
    CHECK_FAILS(perk_test_run(NULL, &err), PERK_INVALID_ARGUMENT, "no test");
    CHECK(perk_test_graph(NULL) == NULL && perk_test_rows(test, NULL) == 0);
    perk_tensor *x = perk_input(graph, "x", 8), *w = perk_attach_matrix(graph, "w", 4, 8);
    perk_tensor *v = perk_attach_matrix(graph, "v", 4, 8), *stack = perk_stack(graph, "s", (perk_tensor *[]){w, v}, 2);
    perk_tensor *between = perk_linear(graph, "between", x, stack, NULL), *y = perk_silu_mul(graph, "y", between);
    CHECK_FAILS(perk_test_set(NULL, x, values, 16, &err), PERK_INVALID_ARGUMENT, "NULL");
    CHECK_FAILS(perk_test_set(test, NULL, values, 16, &err), PERK_INVALID_ARGUMENT, "NULL is no tensor");
    CHECK_FAILS(perk_test_set(other, x, values, 16, &err), PERK_INVALID_ARGUMENT, "x is no tensor of this test");
    CHECK_FAILS(perk_test_set(test, x, NULL, 16, &err), PERK_INVALID_ARGUMENT, "at NULL");
    CHECK_FAILS(perk_test_set(test, x, values, 8, &err), PERK_INVALID_ARGUMENT, "x has [2][8] = 16 values, not 8");
    CHECK_FAILS(perk_test_set(test, w, values, 16, &err), PERK_INVALID_ARGUMENT, "w has [4][8]");
    CHECK_FAILS(perk_test_set(test, stack, values, 64, &err), PERK_INVALID_ARGUMENT, "a stack");
    CHECK_FAILS(perk_test_set(test, y, values, 8, &err), PERK_INVALID_ARGUMENT, "made by a layer call");
    CHECK_FAILS(perk_test_set_tokens(test, ids, 3, &err), PERK_INVALID_ARGUMENT, "2 positions");
    CHECK_FAILS(perk_test_set_tokens(test, NULL, 2, &err), PERK_INVALID_ARGUMENT, "2 positions");
    CHECK_FAILS(perk_test_read(test, y, values, 8, &err), PERK_INVALID_ARGUMENT, "has not run");
    CHECK_FAILS(perk_test_compare(test, y, NULL, 0, &d, &err), PERK_INVALID_ARGUMENT, "has not run");
    CHECK(perk_test_report(test)->executor == NULL);

    CHECK_OK(perk_test_set(test, x, values, 16, &err)); /* twice: the second counts */
    values[3] = 1.00390625f;                            /* between two bf16 numbers: rounded to the even one */
    CHECK_OK(perk_test_set(test, x, values, 16, &err));
    CHECK_OK(perk_test_run(test, &err));
    CHECK_FAILS(perk_test_run(test, &err), PERK_INVALID_ARGUMENT, "runs once");
    CHECK_FAILS(perk_test_set(test, x, values, 16, &err), PERK_INVALID_ARGUMENT, "make another");
    CHECK_FAILS(perk_test_set_tokens(test, ids, 2, &err), PERK_INVALID_ARGUMENT, "make another");
    CHECK_OK(perk_test_read(test, x, values, 16, &err));
    CHECK(values[3] == 1 && values[2] == 0);
    CHECK_FAILS(perk_test_read(test, between, values, 16, &err), PERK_INVALID_ARGUMENT, "perk_keep");
    CHECK_FAILS(perk_test_read(test, stack, values, 64, &err), PERK_INVALID_ARGUMENT, "read its parts");
    CHECK_FAILS(perk_test_compare(test, x, NULL, 0, &d, &err), PERK_INVALID_ARGUMENT, "layer call");
    CHECK_FAILS(perk_test_compare(test, NULL, NULL, 0, &d, &err), PERK_INVALID_ARGUMENT, "NULL");
    CHECK_OK(perk_test_compare(test, y, NULL, 0, &d, &err));
    CHECK(d.worst == 0 && d.count == 8);
    CHECK(perk_silu_mul(graph, "late", y) == NULL);
    CHECK_FAILS(perk_test_read(test, y, values, 8, &err), PERK_INVALID_ARGUMENT, "late: the graph is in use");
    perk_test_free(test);

    CHECK_FAILS(perk_test_run(other, &err), PERK_INVALID_ARGUMENT, "no layer call");
    CHECK_FAILS(perk_test_run(other, &err), PERK_INVALID_ARGUMENT, "runs once");
    perk_test_free(other);
}

/* The graph's own failure is what every later call reports. */
static void test_bad_graph(void) {
    perk_test_options o = on_reference(2);
    perk_test *test = create(&o);
    perk_graph *graph = perk_test_graph(test);
    perk_tensor *x = perk_input(graph, "x", 9), *y = perk_silu_mul(graph, "y", x);
    float values[18] = {0};
    CHECK_FAILS(perk_test_set(test, y, values, 18, &err), PERK_INVALID_ARGUMENT, "even width");
    CHECK_FAILS(perk_test_run(test, &err), PERK_INVALID_ARGUMENT, "even width");
    CHECK_FAILS(perk_test_read(test, x, values, 18, &err), PERK_INVALID_ARGUMENT, "even width");
    perk_test_free(test);

    test = create(&o);
    int32_t ids[] = {3, 4};
    perk_embed(perk_test_graph(test), "y", perk_attach_matrix(perk_test_graph(test), "table", 4, 8));
    CHECK_OK(perk_test_set_tokens(test, ids, 2, &err));
    CHECK_FAILS(perk_test_run(test, &err), PERK_INVALID_ARGUMENT, "token id 4 of position 1: ids go from 0 to 3");
    perk_test_free(test);
}

/* ---- values ---- */

/* out[r][o] = sum x[r][i] w[o][i] */
static void multiply(float *out, const float *x, const float *w, int rows, int in, int outs) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) {
            double sum = 0;
            for (int i = 0; i < in; i++) sum += (double)x[r * in + i] * (double)w[o * in + i];
            out[r * outs + o] = (float)sum;
        }
}

static void test_linear(void) {
    enum { ROWS = 3, IN = 37, OUT = 11 };
    perk_test_options o = on_reference(ROWS);
    perk_test *test = create(&o);
    perk_graph *g = perk_test_graph(test);
    perk_tensor *x = perk_input(g, "x", IN), *residual = perk_input(g, "residual", OUT);
    perk_tensor *w = perk_attach_matrix(g, "w", OUT, IN), *bias = perk_attach_vector(g, "bias", OUT);
    perk_tensor *y = perk_linear_residual(g, "y", x, w, bias, residual);
    float given[OUT * IN], wanted[ROWS * OUT];
    for (int i = 0; i < OUT * IN; i++) given[i] = (float)((i * 29) % 41 - 20) / 16;
    CHECK_OK(perk_test_set(test, w, given, OUT * IN, &err));
    CHECK_OK(perk_test_run(test, &err));
    float *xs = read_all(test, x, IN), *ws = read_all(test, w, IN), *biases = read_all(test, bias, OUT);
    float *residuals = read_all(test, residual, OUT);
    CHECK(!memcmp(ws, given, sizeof given), "the weights are those that were given");
    multiply(wanted, xs, ws, ROWS, IN, OUT);
    for (int i = 0; i < ROWS * OUT; i++) wanted[i] += biases[i % OUT] + residuals[i];
    check_exact(test, y, wanted, ROWS * OUT);
    CHECK(strcmp(perk_test_report(test)->executor, "reference") == 0 && perk_test_report(test)->seed == 11);
    CHECK(!perk_test_report(test)->compiled && perk_test_report(test)->start.arch[0] == '\0');
    free(xs);
    free(ws);
    free(biases);
    free(residuals);
    perk_test_free(test);
}

static void test_rows_alone(void) {
    enum { ROWS = 5, WIDTH = 24 };
    perk_test_options o = on_reference(ROWS);
    perk_test *test = create(&o);
    perk_graph *g = perk_test_graph(test);
    perk_tensor *x = perk_input(g, "x", WIDTH), *gain = perk_attach_vector(g, "gain", WIDTH);
    perk_tensor *norm = perk_rmsnorm(g, "norm", x, gain, 1e-5f), *silu = perk_silu_mul(g, "silu", x);
    perk_tensor *gelu = perk_gelu_mul(g, "gelu", x);
    CHECK_OK(perk_test_run(test, &err));
    float *xs = read_all(test, x, WIDTH), *gains = read_all(test, gain, WIDTH);
    float normed[ROWS * WIDTH], by_silu[ROWS * WIDTH / 2], by_gelu[ROWS * WIDTH / 2];
    for (int r = 0; r < ROWS; r++) {
        double square = 0;
        for (int i = 0; i < WIDTH; i++) square += (double)xs[r * WIDTH + i] * (double)xs[r * WIDTH + i];
        for (int i = 0; i < WIDTH; i++)
            normed[r * WIDTH + i] = (float)((double)xs[r * WIDTH + i] / sqrt(square / WIDTH + 1e-5) * (double)gains[i]);
        for (int i = 0; i < WIDTH / 2; i++) {
            double gate = (double)xs[r * WIDTH + i], up = (double)xs[r * WIDTH + WIDTH / 2 + i];
            double inner = sqrt(2 / acos(-1)) * (gate + 0.044715 * gate * gate * gate);
            by_silu[r * WIDTH / 2 + i] = (float)(gate / (1 + exp(-gate)) * up);
            by_gelu[r * WIDTH / 2 + i] = (float)(gate / 2 * (1 + tanh(inner)) * up);
        }
    }
    check_exact(test, norm, normed, ROWS * WIDTH);
    check_exact(test, silu, by_silu, ROWS * WIDTH / 2);
    check_exact(test, gelu, by_gelu, ROWS * WIDTH / 2);
    free(xs);
    free(gains);
    perk_test_free(test);
}

/* Two requests: logits of all three tokens of the first, of the last of the second. */
static void test_vocabulary(void) {
    enum { VOCABULARY = 13, WIDTH = 16, TOKENS = 5, LOGITS = 4 };
    static const perk_test_request requests[] = {{.tokens = 3, .logits = 2}, {.tokens = 2, .logits = 1}};
    static const int32_t ids[TOKENS] = {4, 0, 12, 7, 7}, rows[LOGITS] = {0, 1, 2, 4};
    perk_test_options o = on_reference(0);
    o.requests = requests;
    o.request_count = 2;
    perk_test *test = create(&o);
    perk_graph *g = perk_test_graph(test);
    perk_tensor *table = perk_attach_matrix(g, "table", VOCABULARY, WIDTH), *x = perk_embed(g, "x", table);
    perk_tensor *picked = perk_select_rows(g, "picked", x), *logits = perk_logits(g, "logits", picked, table);
    perk_tensor *argmax = perk_argmax(g, "argmax", logits);
    perk_keep(g, x);
    perk_keep(g, picked);
    perk_keep(g, logits);
    CHECK_OK(perk_test_set_tokens(test, ids, TOKENS, &err));
    CHECK_OK(perk_test_run(test, &err));
    CHECK(perk_test_rows(test, x) == TOKENS && perk_test_rows(test, logits) == LOGITS);
    float *ts = read_all(test, table, WIDTH), wanted_x[TOKENS * WIDTH], wanted_rows[LOGITS * WIDTH];
    float wanted[LOGITS * VOCABULARY], best[LOGITS];
    for (int t = 0; t < TOKENS; t++) memcpy(wanted_x + t * WIDTH, ts + ids[t] * WIDTH, WIDTH * sizeof *ts);
    for (int r = 0; r < LOGITS; r++) memcpy(wanted_rows + r * WIDTH, ts + ids[rows[r]] * WIDTH, WIDTH * sizeof *ts);
    multiply(wanted, wanted_rows, ts, LOGITS, WIDTH, VOCABULARY);
    for (int r = 0; r < LOGITS; r++) best[r] = (float)ids[rows[r]]; /* a row's product with itself, most likely */
    perk_test_difference d;
    CHECK_OK(perk_test_compare(test, x, wanted_x, TOKENS * WIDTH, &d, &err));
    CHECK(d.worst == 0);
    CHECK_OK(perk_test_compare(test, picked, wanted_rows, LOGITS * WIDTH, &d, &err));
    CHECK(d.worst == 0);
    CHECK_OK(perk_test_compare(test, logits, wanted, LOGITS * VOCABULARY, &d, &err));
    CHECK(d.worst < 1e-3);
    CHECK_OK(perk_test_compare(test, argmax, best, LOGITS, &d, &err));
    CHECK(d.worst == 0, "row %zu: %g, wanted %g", d.row, d.got, d.wanted);
    best[2] += 3;
    CHECK_OK(perk_test_compare(test, argmax, best, LOGITS, &d, &err));
    CHECK(d.worst == 3 && d.row == 2, "integers have the unit 1: %g", d.worst);
    free(ts);
    perk_test_free(test);
}

enum { HEADS = 4, KV_HEADS = 2, DIM = 8, QKV = (HEADS + 2 * KV_HEADS) * DIM };

static perk_tensor *add_attention(perk_graph *g, perk_tensor *qkv, int window) {
    static const float inv_freq[DIM / 2] = {1, 0.1f, 0.01f, 0.001f};
    const perk_attention_params params = {.num_heads = HEADS,
                                          .num_kv_heads = KV_HEADS,
                                          .head_dim = DIM,
                                          .scale = 0.5f,
                                          .window = window,
                                          .inv_freq = inv_freq,
                                          .rope_scale = 1,
                                          .norm_eps = 1e-6f};
    return perk_attention(g, "y", qkv, &params);
}

/* Queries of zero look at all that they see alike: the result is the mean of the values so far, in the window. */
static void test_attention(void) {
    enum { TOKENS = 3, HISTORY = 20, POSITIONS = TOKENS + HISTORY, WINDOW = 22 };
    static const perk_test_request requests[] = {{.history = HISTORY, .tokens = TOKENS}};
    perk_test_options o = on_reference(4);
    o.requests = requests;
    o.request_count = 1;
    perk_test *test = create(&o);
    perk_tensor *qkv = perk_input(perk_test_graph(test), "qkv", QKV);
    perk_tensor *y = add_attention(perk_test_graph(test), qkv, WINDOW);
    static float values[POSITIONS * QKV], wanted[TOKENS * HEADS * DIM];
    for (int p = 0; p < POSITIONS; p++)
        for (int i = HEADS * DIM; i < QKV; i++) values[p * QKV + i] = (float)((p * 31 + i * 17) % 29 - 14) / 8;
    CHECK_OK(perk_test_set(test, qkv, values, POSITIONS * QKV, &err));
    CHECK_OK(perk_test_run(test, &err));
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < HEADS * DIM; i++) {
            int last = HISTORY + t, first = last + 1 - WINDOW > 0 ? last + 1 - WINDOW : 0;
            int column = (HEADS + KV_HEADS + i / DIM / (HEADS / KV_HEADS)) * DIM + i % DIM;
            double sum = 0;
            for (int p = first; p <= last; p++) sum += (double)values[p * QKV + column];
            wanted[t * HEADS * DIM + i] = (float)(sum / (last + 1 - first));
        }
    check_exact(test, y, wanted, TOKENS * HEADS * DIM);
    perk_test_free(test);
}

/* Tokens behind a history give what they give in one step with it; a neighbour in the batch changes nothing. */
static void test_history(void) {
    enum { ALL = 24, BEHIND = 5 };
    perk_test_options o = on_reference(ALL);
    perk_test *whole = create(&o);
    perk_tensor *qkv = perk_input(perk_test_graph(whole), "qkv", QKV);
    perk_tensor *y = add_attention(perk_test_graph(whole), qkv, 0);
    CHECK_OK(perk_test_run(whole, &err));
    float *values = read_all(whole, qkv, QKV), *wanted = read_all(whole, y, HEADS * DIM);

    const perk_test_request requests[] = {{.history = 3, .tokens = 2}, {.history = ALL - BEHIND, .tokens = BEHIND}};
    perk_test_options two = on_reference(8);
    two.requests = requests;
    two.request_count = 2;
    perk_test *cut = create(&two);
    perk_tensor *cut_qkv = perk_input(perk_test_graph(cut), "qkv", QKV);
    perk_tensor *cut_y = add_attention(perk_test_graph(cut), cut_qkv, 0);
    static float both[(5 + ALL) * QKV];
    CHECK(perk_test_rows(cut, cut_qkv) == 5 + ALL);
    memcpy(both + (size_t)5 * QKV, values, ALL * QKV * sizeof *values);
    CHECK_OK(perk_test_set(cut, cut_qkv, both, (5 + ALL) * QKV, &err));
    CHECK_OK(perk_test_run(cut, &err));
    float *got = read_all(cut, cut_y, HEADS * DIM);
    CHECK(!memcmp(got + (size_t)2 * HEADS * DIM, wanted + (size_t)(ALL - BEHIND) * HEADS * DIM,
                  BEHIND * HEADS * DIM * sizeof *got));
    CHECK_OK(perk_test_repeat(cut, &err));
    float *again = read_all(cut, cut_y, HEADS * DIM);
    CHECK(!memcmp(got, again, (size_t)(2 + BEHIND) * HEADS * DIM * sizeof *got));
    free(values);
    free(wanted);
    free(got);
    free(again);
    perk_test_free(whole);
    perk_test_free(cut);
}

/* The same seed draws the same, another seed other numbers; inputs have deviation 1. */
static void test_draws(void) {
    enum { ROWS = 64, WIDTH = 256 };
    float *first = NULL;
    for (int run = 0; run < 3; run++) {
        perk_test_options o = on_reference(ROWS);
        o.seed = run < 2 ? 5 : 6;
        perk_test *test = create(&o);
        perk_tensor *x = perk_input(perk_test_graph(test), "x", WIDTH);
        perk_silu_mul(perk_test_graph(test), "y", x);
        CHECK_OK(perk_test_run(test, &err));
        float *values = read_all(test, x, WIDTH);
        double square = 0;
        for (int i = 0; i < ROWS * WIDTH; i++) {
            square += (double)values[i] * (double)values[i];
            CHECK(values[i] == perk_round_bf16(values[i]));
        }
        CHECK(fabs(square / (ROWS * WIDTH) - 1) < 0.05, "variance %g", square / (ROWS * WIDTH));
        if (first) CHECK((memcmp(first, values, ROWS * WIDTH * sizeof *values) == 0) == (run == 1));
        if (!first) first = values;
        if (first != values) free(values);
        perk_test_free(test);
    }
    free(first);
}

/* ---- differences ---- */

static perk_test_difference measured(const float *got, const float *wanted, size_t rows, size_t cols) {
    perk_test_difference d;
    perk_test_measure(got, wanted, rows, cols, &d);
    return d;
}

static void test_units(void) {
    const float up = 1 + 0x1p-7f, down = 1 - 0x1p-8f; /* the bf16 neighbours of 1 */
    CHECK(measured((float[]){up}, (float[]){1}, 1, 1).worst == 1);
    CHECK(measured((float[]){1}, (float[]){up}, 1, 1).worst == 1);
    CHECK(measured((float[]){down}, (float[]){1}, 1, 1).worst == 0.5);
    CHECK(measured((float[]){1}, (float[]){down}, 1, 1).worst == 1);
    CHECK(measured((float[]){-3}, (float[]){3}, 1, 1).worst == 6 * 64);
    CHECK(measured((float[]){0}, (float[]){0}, 1, 1).worst == 0);
    CHECK(measured((float[]){0x1p-133f}, (float[]){0}, 1, 1).worst == 1, "the smallest bf16 number");

    /* A small element has its row's unit, not its own, and not that of another row. */
    const float wanted[] = {4,        -4, 4, 0x1p-10f, /* root mean square near 3.46: unit 2^-6 */
                            0x1p-10f, 0,  0, 0};       /* 2^-11: the element's own, 2^-17 */
    float got[8];
    memcpy(got, wanted, sizeof got);
    got[3] += 0x1p-6f;
    perk_test_difference d = measured(got, wanted, 2, 4);
    CHECK(d.worst == 1 && d.row == 0 && d.col == 3 && d.count == 8 && d.unusable == 0, "%g", d.worst);
    CHECK(fabs(d.relative - 0x1p-6 / sqrt(48)) < 1e-6, "%g", d.relative);
    got[4] += 0x1p-16f;
    d = measured(got, wanted, 2, 4);
    CHECK(d.worst == 2 && d.row == 1 && d.col == 0 && d.wanted == 0x1p-10, "%g", d.worst);

    got[5] = NAN;
    d = measured(got, wanted, 2, 4);
    CHECK(isinf(d.worst) && isinf(d.relative) && d.unusable == 1 && d.row == 1 && d.col == 1 && isnan(d.got));
    CHECK(measured((float[]){-INFINITY}, (float[]){-INFINITY}, 1, 1).worst == 0);
    CHECK(isinf(measured((float[]){INFINITY}, (float[]){-INFINITY}, 1, 1).worst));
    CHECK(measured((float[]){1}, (float[]){NAN}, 1, 1).unusable == 1);
    CHECK(measured(NULL, NULL, 0, 7).worst == 0);
}

/* ---- ops as cases ---- */

static void run_quick(const perk_op_case *cases, size_t count, const perk_test_options *o) {
    for (size_t i = 0; i < count; i++) {
        perk_op_verdict verdict;
        char shape[128];
        if (!cases[i].quick) continue;
        memset(&err, 0, sizeof err);
        CHECK_OK(perk_op_case_run(&cases[i], o, &verdict, &err));
        CHECK(verdict.passed && !verdict.compared && verdict.by.worst == 0, "%s: %s %g %s", cases[i].op,
              perk_op_case_shape(&cases[i], shape, sizeof shape), verdict.by.worst, verdict.problem);
    }
}

/* Whether the graph of a case has an op of this type. */
static bool builds(const perk_op_case *c, const perk_op_type *type) {
    perk_test_options o = on_reference(0);
    o.backend = PERK_BACKEND_AUTO;
    perk_test *test;
    perk_tensor *output;
    size_t count = 1;
    CHECK_OK(perk_op_case_open(&test, c, &o, &output, &count, &err));
    const perk_graph *graph = perk_test_graph(test);
    bool found = false;
    for (int i = 0; i < graph->op_count; i++) found = found || graph->ops[i]->type == type;
    perk_test_free(test);
    return found;
}

static bool covers(const perk_op_case *cases, size_t count, const perk_op_type *type) {
    bool covered = false;
    for (size_t i = 0; i < count && !covered; i++) covered = cases[i].quick && builds(&cases[i], type);
    return covered;
}

static void test_grid(void) {
    static const perk_op_type *const registered[] = {
#define PERK_OP(name) &perk_op_##name,
#include "src/ops/ops.def"
#undef PERK_OP
    };
    size_t count;
    const perk_op_case *grid = perk_op_grid(&count);
    CHECK(count * 2 <= 130, "%zu cases, each a native and a portable program", count);
    for (int i = 0; perk_op_case_names[i]; i++) {
        const perk_op_case *c = perk_op_case_of(perk_op_case_names[i]);
        CHECK(c && c->quick, "%s has no quick case in the grid", perk_op_case_names[i]);
    }
    for (size_t i = 0; i < PERK_COUNT(registered); i++)
        CHECK(covers(grid, count, registered[i]), "no quick case of the grid builds %s", registered[i]->name);
    CHECK(perk_op_case_of("nonsense") == NULL);
    perk_test_options o = on_reference(0);
    run_quick(grid, count, &o);
    perk_op_verdict verdict;
    perk_op_case bad = *perk_op_case_of("linear");
    bad.live = bad.rows + 1;
    CHECK_FAILS(perk_op_case_run(&bad, &o, &verdict, &err), PERK_INVALID_ARGUMENT, "9 of 8 rows");
    bad = (perk_op_case){.op = "nonsense", .rows = 1};
    CHECK_FAILS(perk_op_case_run(&bad, &o, &verdict, &err), PERK_NOT_FOUND, "nonsense");
    bad = (perk_op_case){.op = "attention", .rows = 1, .heads = 1, .kv_heads = 1, .head_dim = 4000};
    CHECK_FAILS(perk_op_case_run(&bad, &o, &verdict, &err), PERK_INVALID_ARGUMENT, "head_dim 4000");
}

/* ---- towards a GPU ---- */

/* Planned, checked, emitted, and compiled where there is a compiler; refused where a GPU would refuse. */
static void test_without_gpu(void) {
    setenv("PERK_LIBCUDA", "/nonexistent/libcuda.so", 1);
    perk_test_options o = {.rows = 2, .threads = 1, .cache_folder = scratch, .arch = "sm_120a"};
    perk_test *test = create(&o);
    perk_graph *g = perk_test_graph(test);
    perk_rmsnorm(g, "y", perk_input(g, "x", 40), perk_attach_vector(g, "gain", 40), 0);
    CHECK_OK(perk_test_run(test, &err));
    const perk_test_run_report *report = perk_test_report(test);
    CHECK(strcmp(report->start.arch, "sm_120a") == 0 && report->start.shared_bytes > 0);
    CHECK(report->start.backend == PERK_BACKEND_REFERENCE && report->compiled == (report->start.cubin_bytes > 0));
    if (!report->compiled) fprintf(stderr, "no NVRTC: nothing was compiled\n");
    perk_test_free(test);

    o.arch = "sm_75";
    test = create(&o);
    perk_silu_mul(perk_test_graph(test), "y", perk_input(perk_test_graph(test), "x", 40));
    CHECK_FAILS(perk_test_run(test, &err), PERK_UNSUPPORTED, "8.0");
    perk_test_free(test);
    o = (perk_test_options){.rows = 1025};
    test = create(&o);
    perk_silu_mul(perk_test_graph(test), "y", perk_input(perk_test_graph(test), "x", 40));
    CHECK_FAILS(perk_test_run(test, &err), PERK_UNSUPPORTED, "at most 1024 rows");
    perk_test_free(test);
    o = (perk_test_options){.rows = 65, .arch = "sm_100a"};
    test = create(&o);
    perk_silu_mul(perk_test_graph(test), "y", perk_input(perk_test_graph(test), "x", 40));
    CHECK_FAILS(perk_test_run(test, &err), PERK_UNSUPPORTED, "at most 64 rows");
    perk_test_free(test);
    o = (perk_test_options){.rows = 65, .backend = PERK_BACKEND_GPU};
    test = create(&o);
    perk_silu_mul(perk_test_graph(test), "y", perk_input(perk_test_graph(test), "x", 40));
    CHECK_FAILS(perk_test_run(test, &err), PERK_NO_DRIVER, "/nonexistent/libcuda.so");
    perk_test_free(test);
}

/* Every op by the tasks of its plan, with the folds, tiles and splits that a GPU would run. */
static void test_on_simulator(void) {
    size_t count;
    const perk_op_case *grid = perk_op_grid(&count);
    setenv("PERK_LIBCUDA", "/nonexistent/libcuda.so", 1);
    for (size_t i = 0; i < count * 2; i++) {
        const perk_op_case *c = &grid[i / 2];
        const perk_test_options o = {.threads = 1, .cache_folder = scratch, .portable = i % 2, .seed = 100 + i};
        perk_op_verdict v;
        char shape[128];
        if (!c->quick) continue;
        perk_op_case_shape(c, shape, sizeof shape);
        CHECK_OK(perk_op_case_run(c, &o, &v, &err));
        CHECK(v.compared && strcmp(v.report.executor, "simulator") == 0, "%s", v.report.executor);
        CHECK(v.passed, "%s %s: %s: %g of %g units, relative %g of %g %s", c->op, shape, v.tensor, v.by.worst, v.limit,
              v.by.relative, v.relative_limit, v.problem);
    }
}

static fake_cuda *fake;
static void (*reset_fake)(void);

static bool open_fake(void) {
    void *library = dlopen(FAKE, RTLD_NOW | RTLD_LOCAL);
    if (!library) return false;
    fake_cuda *(*state)(void);
    *(void **)&state = dlsym(library, "fake_cuda_state");
    *(void **)&reset_fake = dlsym(library, "fake_cuda_reset");
    CHECK(state && reset_fake, "%s", dlerror());
    fake = state();
    setenv("PERK_LIBNVRTC", FAKE, 1);
    return true;
}

static void check_released(void) {
    const fake_live none = {0};
    CHECK(!memcmp(&fake->live, &none, sizeof none) && !fake->misuse, "%s: %s", fake->misused_in, fake->misuse);
}

static perk_test_options on_fake(int32_t history) {
    static perk_test_request request;
    request = (perk_test_request){.history = history, .tokens = 3, .logits = 2};
    return (perk_test_options){.backend = PERK_BACKEND_GPU,
                               .rows = 8,
                               .requests = &request,
                               .request_count = 1,
                               .threads = 1,
                               .seed = 3,
                               .cache_folder = scratch};
}

/* The fake launches compute nothing: all that can be read is poison, which is infinitely far from anything. */
static void test_poison(void) {
    enum { WIDTH = 100, STRIDE = 128 };
    reset_fake();
    perk_test_options o = on_fake(0);
    perk_test *test = create(&o);
    perk_graph *g = perk_test_graph(test);
    perk_tensor *x = perk_input(g, "x", WIDTH), *w = perk_attach_matrix(g, "w", WIDTH, WIDTH);
    perk_tensor *y = perk_linear(g, "y", x, w, NULL), *picked = perk_select_rows(g, "picked", y);
    perk_tensor *argmax = perk_argmax(g, "argmax", perk_logits(g, "logits", picked, w));
    perk_keep(g, y);
    CHECK_OK(perk_test_run(test, &err));
    CHECK(strcmp(perk_test_report(test)->executor, "gpu") == 0 && perk_test_report(test)->compiled);
    perk_test_difference d;
    CHECK_OK(perk_test_compare(test, y, NULL, 0, &d, &err));
    CHECK(isinf(d.worst) && d.unusable == 3 * WIDTH && isnan(d.got) && isfinite(d.wanted));
    float *choices = read_all(test, argmax, 1), *in = read_all(test, x, WIDTH);
    CHECK(choices[0] == -1 && choices[2] == -1);

    const perk_gpu *gpu = (const perk_gpu *)perk_test_executor(test);
    int seen = 0;
    for (int i = 0; i < gpu->largest->plan->tensor_count; i++) {
        const perk_plan_tensor *t = &gpu->largest->plan->tensors[i];
        if (t->space != PERK_SPACE_ACTIVATIONS || t->dtype != PERK_BF16 || t->cols != WIDTH) continue;
        const uint16_t *rows = (const uint16_t *)(uintptr_t)perk_gpu_address(gpu, gpu->largest, t);
        CHECK(t->row_stride == STRIDE && t->rows == 8);
        seen++;
        for (int r = 0; r < 8; r++)
            for (int c = 0; c < STRIDE; c++) {
                uint16_t value = rows[r * STRIDE + c];
                if (c >= WIDTH)
                    CHECK(value == 0, "%s[%d, %d]: the padding must stay zero", t->name, r, c);
                else if (t->external_input)
                    CHECK(r >= 3 || perk_bf16_to_f32(value) == in[r * WIDTH + c], "%s is the host's", t->name);
                else
                    CHECK(value == 0xffff, "%s[%d, %d] is not poisoned", t->name, r, c);
            }
    }
    CHECK(seen == 3, "x, y and picked: %d", seen);
    free(choices);
    free(in);
    perk_test_free(test);
    check_released();
}

/* One step, and as many before it as the history takes. */
static long count_launches(int32_t history) {
    reset_fake();
    perk_test_options o = on_fake(history);
    perk_test *test = create(&o);
    perk_silu_mul(perk_test_graph(test), "y", perk_input(perk_test_graph(test), "x", 40));
    CHECK_OK(perk_test_run(test, &err));
    long launches = fake->launches;
    CHECK_OK(perk_test_repeat(test, &err));
    CHECK(fake->launches == launches + 1);
    perk_test_free(test);
    check_released();
    return launches;
}

/* Every call of the driver fails once: the run fails with a message, or did without; nothing is left. */
static void test_faults(void) {
    long calls = 1;
    for (long n = 0; n <= calls; n++) {
        reset_fake();
        fake->device.sm_count = 4;
        perk_test_options o = on_fake(10);
        perk_test *test = create(&o);
        perk_tensor *y = perk_silu_mul(perk_test_graph(test), "y", perk_input(perk_test_graph(test), "x", 40));
        float values[60];
        fake->fault = (fake_fault){.call = n, .result = CUDA_ERROR_UNKNOWN};
        memset(&err, 0, sizeof err);
        perk_status status = perk_test_run(test, &err);
        if (n == 0) calls = fake->calls;
        CHECK(status == PERK_OK || strlen(err.message) > 20, "call %ld: %s", n, err.message);
        CHECK(n > 0 || status == PERK_OK, "%s", err.message);
        if (status) CHECK_FAILS(perk_test_read(test, y, values, 60, &err), PERK_INVALID_ARGUMENT, "its run failed");
        perk_test_free(test);
        check_released();
    }
    CHECK(calls > 40, "%ld calls", calls);
}

int main(void) {
    make_scratch();
    test_bad_options();
    test_bad_calls();
    test_bad_graph();
    test_linear();
    test_rows_alone();
    test_vocabulary();
    test_attention();
    test_history();
    test_draws();
    test_units();
    test_grid();
    test_without_gpu();
    bool has_fake = open_fake(); /* whose compiler takes no time */
    test_on_simulator();
    if (!has_fake) {
        fprintf(stderr, "the fake driver is not built: the path to a GPU is not tested\n");
        return 0;
    }
    setenv("PERK_LIBCUDA", FAKE, 1);
    test_poison();
    CHECK(count_launches(20) == count_launches(0) + 3);
    test_faults();
    return 0;
}
