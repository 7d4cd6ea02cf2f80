/* The reference executor against transformers (tests/fixtures/<family>, made by make_models.py): logits in fp32, greedy
 * tokens, and the same bits however the tokens are cut into steps, pages, batches and threads. */
#include "activation.h"
#include "executor.h"
#include "float.h"
#include "model.h"
#include "ops/op.h"
#include "random_weights.h"
#include "reference.h"
#include "reference_math.h"
#include "test.h"

#include <dirent.h>
#include <math.h>

#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures"
#define TOLERANCE 1e-4
enum { MAX_PROMPTS = 8, MAX_LENGTH = 256 };

static perk_error err;

typedef struct prompt {
    int32_t ids[MAX_LENGTH], greedy[MAX_LENGTH];
    int count, greedy_count;
    const float *expected; /* [count][vocab] */
} prompt;

typedef struct fixture {
    char folder[512];
    perk_model *model;
    perk_safetensors *expected;
    prompt prompts[MAX_PROMPTS];
    int prompt_count;
} fixture;

static int read_ids(const json_t *list, int32_t *out) {
    size_t count = json_array_size(list);
    CHECK(count > 0 && count <= MAX_LENGTH);
    for (size_t i = 0; i < count; i++) out[i] = (int32_t)json_integer_value(json_array_get(list, i));
    return (int)count;
}

static void open_fixture(fixture *f, const char *name) {
    char path[1024];
    json_error_t where;
    memset(f, 0, sizeof *f);
    snprintf(f->folder, sizeof f->folder, "%s/%s", FIXTURES, name);
    CHECK_OK(perk_model_open(&f->model, f->folder, false, 0, &err));
    snprintf(path, sizeof path, "%s/expected.safetensors", f->folder);
    CHECK_OK(perk_safetensors_open(&f->expected, path, 0, &err));
    const perk_safetensors_tensor *logits = perk_safetensors_at(f->expected, 0);
    CHECK(logits && logits->dtype == PERK_F32 && logits->dims[1] == f->model->vocab_size);
    snprintf(path, sizeof path, "%s/cases.json", f->folder);
    json_t *cases = json_load_file(path, 0, &where);
    CHECK(cases != NULL, "%s: %s", path, where.text);
    const json_t *ids = json_object_get(cases, "ids"), *greedy = json_object_get(cases, "greedy");
    const float *expected = logits->data;
    f->prompt_count = (int)json_array_size(ids);
    CHECK(f->prompt_count > 0 && f->prompt_count <= MAX_PROMPTS);
    for (int i = 0; i < f->prompt_count; i++) {
        prompt *p = &f->prompts[i];
        p->count = read_ids(json_array_get(ids, (size_t)i), p->ids);
        p->greedy_count = read_ids(json_array_get(greedy, (size_t)i), p->greedy);
        p->expected = expected;
        expected += (size_t)p->count * (size_t)f->model->vocab_size;
    }
    json_decref(cases);
}

static void close_fixture(fixture *f) {
    perk_safetensors_free(f->expected);
    perk_model_free(f->model);
}

/* ---- running ---- */

typedef struct setup {
    int chunk; /* tokens of a request a step; 0: all */
    int page_size, threads;
    perk_reference_precision precision;
} setup;

typedef struct runner {
    perk_executor *executor;
    perk_batch *batch;
    perk_config config;
    int32_t vocab;
} runner;

static runner start(const fixture *f, setup s) {
    runner r = {.vocab = f->model->vocab_size};
    r.config = (perk_config){.max_num_batched_tokens = MAX_LENGTH,
                             .max_num_batched_requests = MAX_PROMPTS,
                             .max_num_logit_rows = MAX_LENGTH,
                             .page_size = s.page_size,
                             .max_seq_length = 160};
    perk_reference_options options = {.threads = s.threads, .precision = s.precision};
    CHECK_OK(perk_config_resolve(&r.config, f->model->max_positions, &err));
    CHECK_OK(perk_reference_create(&r.executor, f->model->graph, f->model->checkpoint, &r.config, &options, &err));
    CHECK_OK(perk_batch_create(&r.batch, &r.config, &err));
    return r;
}

static void stop(runner *r) {
    perk_batch_free(r->batch);
    r->executor->type->free(r->executor);
}

/* The pages of request `number`: scattered over the pool, last first. */
static const int32_t *pages_of(const runner *r, int number, int32_t *pages) {
    for (int i = 0; i < r->batch->pages_per_request; i++)
        pages[i] = r->config.max_num_pages - 1 - (i * MAX_PROMPTS + number);
    return pages;
}

/* One step with whatever was added; copies its logits to `out` (may be NULL) and gives the tokens chosen. */
static const int32_t *step(runner *r, float *out) {
    perk_step_result result;
    CHECK_OK(r->executor->type->step(r->executor, r->batch, true, &result, &err));
    CHECK(result.argmax && result.logits);
    if (out) memcpy(out, result.logits, (size_t)r->batch->num_logit_rows * (size_t)r->vocab * sizeof *out);
    return result.argmax;
}

/* All logits of one prompt, which the caller frees, and optionally the greedy tokens after it. */
static float *run_alone(const fixture *f, const prompt *p, setup s, int32_t *greedy) {
    runner r = start(f, s);
    int32_t pages[MAX_LENGTH], next = 0;
    float *logits = calloc((size_t)p->count * (size_t)r.vocab, sizeof *logits);
    int chunk = s.chunk ? s.chunk : p->count;
    for (int at = 0; at < p->count; at += chunk) {
        int count = PERK_MIN(chunk, p->count - at);
        perk_batch_clear(r.batch);
        CHECK_OK(perk_batch_add(r.batch, &r.config, p->ids + at, count, at, pages_of(&r, 3, pages), 2, &err));
        next = step(&r, logits + (size_t)at * (size_t)r.vocab)[count - 1];
    }
    for (int i = 0; greedy && i < p->greedy_count; i++) {
        greedy[i] = next;
        perk_batch_clear(r.batch);
        CHECK_OK(perk_batch_add(r.batch, &r.config, &next, 1, p->count + i, pages_of(&r, 3, pages), 1, &err));
        next = step(&r, NULL)[0];
    }
    stop(&r);
    return logits;
}

/* ---- comparing ---- */

typedef struct difference {
    double worst, l2; /* of a row, relative to its largest logit; of all */
} difference;

static difference compare(const float *found, const float *expected, int rows, int vocab) {
    double square = 0, norm = 0;
    difference d = {0};
    for (int row = 0; row < rows; row++) {
        double largest = 0, worst = 0;
        for (int i = 0; i < vocab; i++) {
            double e = expected[row * vocab + i], delta = found[row * vocab + i] - e;
            largest = fmax(largest, fabs(e));
            worst = isnan(delta) ? INFINITY : fmax(worst, fabs(delta));
            square += delta * delta;
            norm += e * e;
        }
        d.worst = fmax(d.worst, worst / largest);
    }
    d.l2 = sqrt(square / norm);
    return d;
}

static void test_against_transformers(const fixture *f, const char *name) {
    setup s = {.page_size = 16, .threads = 1, .precision = PERK_PRECISION_FP32};
    for (int i = 0; i < f->prompt_count; i++) {
        const prompt *p = &f->prompts[i];
        int32_t greedy[MAX_LENGTH];
        float *logits = run_alone(f, p, s, greedy);
        difference d = compare(logits, p->expected, p->count, f->model->vocab_size);
        printf("%-22s prompt %d of %2d tokens: worst %.1e, l2 %.1e\n", name, i, p->count, d.worst, d.l2);
        CHECK(d.worst < TOLERANCE && d.l2 < TOLERANCE, "%s prompt %d: worst %g, l2 %g", name, i, d.worst, d.l2);
        CHECK(!memcmp(greedy, p->greedy, (size_t)p->greedy_count * sizeof *greedy), "%s prompt %d: tokens", name, i);
        free(logits);
    }
}

static void check_same(const float *a, const float *b, const prompt *p, int vocab, const char *what) {
    CHECK(!memcmp(a, b, (size_t)p->count * (size_t)vocab * sizeof *a), "%s changes the logits", what);
}

/* The same bits for every way to cut the same work. */
static void test_cuts(const fixture *f, perk_reference_precision precision) {
    static const setup others[] = {{1, 16, 1, 0}, {3, 16, 2, 0}, {7, 32, 1, 0}, {0, 64, 5, 0}, {16, 16, 3, 0}};
    setup first = {.page_size = 16, .threads = 1, .precision = precision};
    for (int i = 0; i < f->prompt_count; i++) {
        const prompt *p = &f->prompts[i];
        float *whole = run_alone(f, p, first, NULL);
        for (size_t k = 0; k < PERK_COUNT(others); k++) {
            setup s = others[k];
            s.precision = precision;
            float *cut = run_alone(f, p, s, NULL);
            check_same(whole, cut, p, f->model->vocab_size, "another chunk, page size or number of threads");
            free(cut);
        }
        free(whole);
    }
}

/* Several requests in each step, each with its own chunk, in changing order. */
static void test_together(const fixture *f, perk_reference_precision precision) {
    enum { REQUESTS = 5 };
    setup s = {.page_size = 16, .threads = 2, .precision = precision};
    runner r = start(f, s);
    int32_t pages[MAX_LENGTH];
    size_t vocab = (size_t)r.vocab;
    int done[REQUESTS] = {0}, added = 1;
    float *logits[REQUESTS], *all = calloc(MAX_LENGTH * vocab, sizeof *all);
    for (int q = 0; q < REQUESTS; q++) logits[q] = calloc(MAX_LENGTH * vocab, sizeof **logits);
    for (int round = 0; added; round++) {
        int order[REQUESTS], counts[REQUESTS];
        added = 0;
        perk_batch_clear(r.batch);
        for (int k = 0; k < REQUESTS; k++) {
            int q = (k * 2 + round) % REQUESTS;
            const prompt *p = &f->prompts[q % f->prompt_count];
            int count = PERK_MIN(1 + (q * 5 + round) % 9, p->count - done[q]);
            if (count == 0 || (q + round) % 3 == 0) count = done[q] < p->count ? PERK_MIN(1, p->count - done[q]) : 0;
            if (count == 0) continue;
            CHECK_OK(
                perk_batch_add(r.batch, &r.config, p->ids + done[q], count, done[q], pages_of(&r, q, pages), 2, &err));
            order[added] = q;
            counts[added++] = count;
        }
        if (!added) break;
        step(&r, all);
        const float *row = all;
        for (int k = 0; k < added; k++) {
            memcpy(logits[order[k]] + (size_t)done[order[k]] * vocab, row, (size_t)counts[k] * vocab * sizeof *row);
            row += (size_t)counts[k] * vocab;
            done[order[k]] += counts[k];
        }
    }
    for (int q = 0; q < REQUESTS; q++) {
        const prompt *p = &f->prompts[q % f->prompt_count];
        float *alone = run_alone(f, p, s, NULL);
        CHECK(done[q] == p->count);
        check_same(alone, logits[q], p, r.vocab, "company");
        free(alone);
        free(logits[q]);
    }
    free(all);
    stop(&r);
}

static int compare_doubles(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* The median of the rows' relative L2 errors. */
static double median_row(const float *found, const float *expected, int rows, int vocab) {
    double errors[MAX_LENGTH];
    for (int row = 0; row < rows; row++)
        errors[row] = compare(found + row * vocab, expected + row * vocab, 1, vocab).l2;
    qsort(errors, (size_t)rows, sizeof *errors, compare_doubles);
    return errors[rows / 2];
}

static bool has_experts(const perk_graph *graph) {
    for (int i = 0; i < graph->op_count; i++)
        if (graph->ops[i]->type == &perk_op_moe_route) return true;
    return false;
}

/* bf16 arithmetic stays near fp32, and every activation is a bf16 number. A token whose router all but ties goes to
 * another expert than in fp32 then, and its row is another: with experts, most rows must be near. */
static void test_bf16(const fixture *f, const char *name) {
    setup s = {.page_size = 16, .threads = 1, .precision = PERK_PRECISION_BF16};
    const prompt *p = &f->prompts[0];
    float *logits = run_alone(f, p, s, NULL);
    difference d = compare(logits, p->expected, p->count, f->model->vocab_size);
    double median = median_row(logits, p->expected, p->count, f->model->vocab_size);
    printf("%-22s bf16: worst %.1e, l2 %.1e, median row %.1e\n", name, d.worst, d.l2, median);
    CHECK(median > 1e-4 && median < 0.03, "%s: median row %g", name, median);
    CHECK(d.l2 > 1e-4 && (d.l2 < 0.05 || has_experts(f->model->graph)), "%s: l2 %g", name, d.l2);
    free(logits);

    runner r = start(f, s);
    int32_t pages[MAX_LENGTH];
    CHECK_OK(perk_batch_add(r.batch, &r.config, p->ids, p->count, 0, pages_of(&r, 0, pages), 1, &err));
    step(&r, NULL);
    for (int i = 0; i < f->model->graph->op_count; i++) {
        const perk_tensor *output = f->model->graph->ops[i]->output;
        if (output->dtype != PERK_BF16) continue;
        size_t rows = (size_t)perk_tensor_rows(output, p->count, 1), n = rows * (size_t)output->cols;
        float *values = calloc(n, sizeof *values);
        CHECK_OK(r.executor->type->read(r.executor, output, values, (int64_t)rows, &err));
        for (size_t k = 0; k < n; k++) CHECK(values[k] == perk_round_bf16(values[k]), "%s", output->name);
        free(values);
    }
    stop(&r);
}

/* AUTO is fp32 for fp32 checkpoints and bf16 for the others. */
static void test_auto(const fixture *f, perk_reference_precision expected) {
    const prompt *p = &f->prompts[0];
    setup automatic = {.page_size = 16, .threads = 1}, named = automatic;
    named.precision = expected;
    float *a = run_alone(f, p, automatic, NULL), *b = run_alone(f, p, named, NULL);
    check_same(a, b, p, f->model->vocab_size, "AUTO");
    free(a);
    free(b);
}

static void test_bad_calls(const fixture *f) {
    setup s = {.page_size = 16, .threads = 1};
    runner r = start(f, s);
    perk_step_result result;
    int32_t pages[MAX_LENGTH], id = r.vocab;
    const perk_tensor *logits = perk_graph_find(f->model->graph, "logits");
    float value[1] = {0};
    CHECK_FAILS(r.executor->type->step(r.executor, r.batch, true, &result, &err), PERK_INVALID_ARGUMENT, "0 tokens");
    CHECK_OK(perk_batch_add(r.batch, &r.config, &id, 1, 0, pages_of(&r, 0, pages), 1, &err));
    CHECK_FAILS(r.executor->type->step(r.executor, r.batch, true, &result, &err), PERK_INVALID_ARGUMENT, "vocabulary");
    CHECK_FAILS(r.executor->type->read(r.executor, logits, value, 2, &err), PERK_INVALID_ARGUMENT, "logits");
    CHECK_FAILS(r.executor->type->write(r.executor, logits, value, 1, &err), PERK_INVALID_ARGUMENT, "input");
    stop(&r);
    perk_executor *executor;
    perk_config config = {0};
    perk_reference_options options = {.threads = -1};
    CHECK_FAILS(perk_reference_create(&executor, f->model->graph, f->model->checkpoint, &config, &options, &err),
                PERK_INVALID_ARGUMENT, "threads");
    CHECK(!executor);
    config.page_size = 17;
    CHECK_FAILS(perk_reference_create(&executor, f->model->graph, f->model->checkpoint, &config, NULL, &err),
                PERK_INVALID_ARGUMENT, "page_size");
}

/* ---- the parts ---- */

static void test_dots(void) {
    enum { ROWS = 9, VECTORS = 7, N = 83 };
    static float w[ROWS * N], x[VECTORS * N], out[VECTORS * ROWS];
    for (int i = 0; i < ROWS * N; i++) w[i] = (float)((i * 37) % 101 - 50) / 64;
    for (int i = 0; i < VECTORS * N; i++) x[i] = (float)((i * 53) % 97 - 48) / 64;
    for (size_t n = 1; n <= N; n += 3) {
        perk_math_dots(out, ROWS, w, ROWS, x, VECTORS, n);
        for (size_t v = 0; v < VECTORS; v++)
            for (size_t r = 0; r < ROWS; r++) {
                double sum = 0;
                for (size_t i = 0; i < n; i++) sum += (double)w[r * n + i] * x[v * n + i];
                CHECK(fabs(sum - out[v * ROWS + r]) < 1e-4);
                CHECK(out[v * ROWS + r] == perk_math_dot(w + r * n, x + v * n, n), "the order of the sum changed");
            }
    }
    static uint16_t narrow[N];
    static float wide[N];
    for (int i = 0; i < N; i++) narrow[i] = (uint16_t)(i * 797);
    perk_math_widen_bf16(wide, narrow, N);
    for (int i = 0; i < N; i++) CHECK(perk_f32_bits(wide[i]) == (uint32_t)narrow[i] << 16);
}

/* A layer alone, fed through perk_input, with drawn weights; expectations in double. */
static void test_layers_alone(void) {
    enum { WIDTH = 37, OUT = 11, ROWS = 3 };
    perk_graph *g;
    perk_checkpoint *weights;
    perk_executor *executor;
    perk_batch *batch;
    perk_config config = {.max_num_batched_tokens = 4, .max_seq_length = 32};
    CHECK_OK(perk_graph_create(&g, "layers", &err));
    perk_tensor *x = perk_input(g, "x", WIDTH), *r = perk_input(g, "r", 2 * OUT);
    perk_tensor *norm = perk_rmsnorm(g, "norm", x, perk_attach_vector(g, "norm.weight", WIDTH), 1e-5f);
    perk_tensor *parts[] = {perk_attach_matrix(g, "a", OUT, WIDTH), perk_attach_matrix(g, "b", OUT, WIDTH)};
    perk_tensor *biases[] = {perk_attach_vector(g, "a.bias", OUT), perk_attach_vector(g, "b.bias", OUT)};
    perk_tensor *linear =
        perk_linear_residual(g, "linear", norm, perk_stack(g, "ab", parts, 2), perk_stack(g, "ab.bias", biases, 2), r);
    perk_tensor *silu = perk_silu_mul(g, "silu", linear);
    CHECK_OK(perk_graph_check(g, &err));
    CHECK_OK(perk_checkpoint_open_random(&weights, FIXTURES "/qwen3/bias/config.json", g, 7, &err));
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_batch_create(&batch, &config, &err));
    perk_reference_options options = {.threads = 2, .precision = PERK_PRECISION_FP32};
    CHECK_OK(perk_reference_create(&executor, g, weights, &config, &options, &err));

    float in[ROWS * WIDTH], add[ROWS * 2 * OUT], normed[ROWS * WIDTH], sums[ROWS * 2 * OUT], out[ROWS * OUT];
    for (int i = 0; i < ROWS * WIDTH; i++) in[i] = (float)((i * 31) % 23 - 11) / 8;
    for (int i = 0; i < ROWS * 2 * OUT; i++) add[i] = (float)((i * 17) % 13 - 6) / 8;
    CHECK_OK(executor->type->write(executor, x, in, ROWS, &err));
    CHECK_OK(executor->type->write(executor, r, add, ROWS, &err));
    int32_t ids[ROWS] = {0}, pages[1] = {0};
    perk_step_result result;
    CHECK_OK(perk_batch_add(batch, &config, ids, ROWS, 0, pages, 0, &err));
    CHECK_OK(executor->type->step(executor, batch, true, &result, &err));
    CHECK(!result.argmax && !result.logits);
    CHECK_OK(executor->type->read(executor, norm, normed, ROWS, &err));
    CHECK_OK(executor->type->read(executor, linear, sums, ROWS, &err));
    CHECK_OK(executor->type->read(executor, silu, out, ROWS, &err));

    for (int row = 0; row < ROWS; row++) {
        const uint16_t *scale = perk_checkpoint_find(weights, "norm.weight")->data;
        double square = 0;
        for (int i = 0; i < WIDTH; i++) square += (double)in[row * WIDTH + i] * in[row * WIDTH + i];
        for (int i = 0; i < WIDTH; i++) {
            double value = in[row * WIDTH + i] / sqrt(square / WIDTH + 1e-5) * perk_bf16_to_f32(scale[i]);
            CHECK(fabs(value - normed[row * WIDTH + i]) < 1e-5);
        }
        for (int o = 0; o < 2 * OUT; o++) {
            const uint16_t *w = perk_checkpoint_find(weights, o < OUT ? "a" : "b")->data;
            const uint16_t *bias = perk_checkpoint_find(weights, o < OUT ? "a.bias" : "b.bias")->data;
            double sum = (double)perk_bf16_to_f32(bias[o % OUT]) + add[row * 2 * OUT + o];
            for (int i = 0; i < WIDTH; i++)
                sum += (double)perk_bf16_to_f32(w[o % OUT * WIDTH + i]) * normed[row * WIDTH + i];
            CHECK(fabs(sum - sums[row * 2 * OUT + o]) < 1e-5);
        }
        for (int o = 0; o < OUT; o++) {
            double gate = sums[row * 2 * OUT + o], up = sums[row * 2 * OUT + OUT + o];
            CHECK(fabs(gate / (1 + exp(-gate)) * up - out[row * OUT + o]) < 1e-5);
        }
    }
    executor->type->free(executor);
    perk_batch_free(batch);
    perk_checkpoint_free(weights);
    perk_graph_free(g);
}

/* Equal logits: the lowest index wins. Rows of a table that are equal give equal logits. */
static void test_argmax_ties(const fixture *f) {
    setup s = {.page_size = 16, .threads = 1, .precision = PERK_PRECISION_FP32};
    runner r = start(f, s);
    int32_t pages[MAX_LENGTH];
    perk_step_result result;
    CHECK_OK(perk_batch_add(r.batch, &r.config, f->prompts[0].ids, 5, 0, pages_of(&r, 0, pages), 2, &err));
    CHECK_OK(r.executor->type->step(r.executor, r.batch, true, &result, &err));
    for (int row = 0; row < 5; row++) {
        const float *logits = result.logits + row * r.vocab;
        for (int i = 0; i < r.vocab; i++) {
            CHECK(logits[i] <= logits[result.argmax[row]]);
            if (i < result.argmax[row]) CHECK(logits[i] < logits[result.argmax[row]]);
        }
    }
    stop(&r);
}

static void test_random_weights(void) {
    const char *config = PERK_SOURCE_DIR "/tests/fixtures/qwen3/gqa5_odd/config.json";
    perk_model *a, *b, *c;
    CHECK_OK(perk_model_open(&a, config, true, 1, &err));
    CHECK_OK(perk_model_open(&b, PERK_SOURCE_DIR "/tests/fixtures/qwen3/gqa5_odd", true, 1, &err));
    CHECK_OK(perk_model_open(&c, config, true, 2, &err));
    CHECK(perk_checkpoint_has_weights(a->checkpoint) && perk_checkpoint_count(a->checkpoint) > 0);
    for (size_t i = 0; i < perk_checkpoint_count(a->checkpoint); i++) {
        const perk_checkpoint_tensor *t = perk_checkpoint_at(a->checkpoint, i);
        const perk_checkpoint_tensor *same = perk_checkpoint_find(b->checkpoint, t->name);
        const perk_checkpoint_tensor *other = perk_checkpoint_find(c->checkpoint, t->name);
        CHECK(same && other && same->bytes == t->bytes && t->data != same->data);
        CHECK(!memcmp(t->data, same->data, (size_t)t->bytes), "%s", t->name);
        CHECK(memcmp(t->data, other->data, (size_t)t->bytes), "%s", t->name);
        const uint16_t *values = t->data;
        double n = (double)t->bytes / 2, sum = 0, square = 0;
        for (size_t k = 0; k < t->bytes / 2; k++) {
            sum += perk_bf16_to_f32(values[k]);
            square += (double)perk_bf16_to_f32(values[k]) * perk_bf16_to_f32(values[k]);
        }
        double mean = sum / n, deviation = sqrt(square / n - mean * mean);
        double wanted = t->ndim == 1 ? 0.1 : 1 / sqrt((double)t->dims[1]);
        CHECK(fabs(mean - (t->ndim == 1)) < 5 * wanted / sqrt(n), "%s: mean %g", t->name, mean);
        CHECK(fabs(deviation / wanted - 1) < 5 / sqrt(n), "%s: deviation %g of %g", t->name, deviation, wanted);
    }
    perk_model_free(a);
    perk_model_free(b);
    perk_model_free(c);
}

static void test_fixture(const char *name, bool is_odd) {
    fixture f;
    open_fixture(&f, name);
    test_against_transformers(&f, name);
    test_bf16(&f, name);
    test_cuts(&f, PERK_PRECISION_FP32);
    test_cuts(&f, PERK_PRECISION_BF16);
    test_together(&f, is_odd ? PERK_PRECISION_FP32 : PERK_PRECISION_BF16);
    test_auto(&f, strcmp(name, "qwen3/gqa1_fp32") ? PERK_PRECISION_BF16 : PERK_PRECISION_FP32);
    test_argmax_ties(&f);
    test_bad_calls(&f);
    close_fixture(&f);
}

/* All fixtures of a family; returns how many. */
static int test_family(const char *family) {
    char path[512];
    int tested = 0;
    snprintf(path, sizeof path, "%s/%s", FIXTURES, family);
    DIR *folder = opendir(path);
    CHECK(folder != NULL, "%s", path);
    for (struct dirent *entry; (entry = readdir(folder));) {
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%.200s", family, entry->d_name);
        test_fixture(path, tested++ % 2);
    }
    closedir(folder);
    return tested;
}

/* Against the formulas in double, over all that is not rounded away. */
static void test_activations(void) {
    for (int i = -4000; i <= 4000; i++) {
        double x = i / 256.0, inner = sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x);
        double silu = x / (1 + exp(-x)), gelu = x / (1 + exp(-2 * inner));
        CHECK(fabs(gelu - x / 2 * (1 + tanh(inner))) < 1e-14, "the two forms of gelu at %g", x);
        CHECK(perk_activate(PERK_ACTIVATION_NONE, (float)x) == (float)x);
        CHECK(fabs(perk_activate(PERK_ACTIVATION_SILU, (float)x) - silu) <= 2e-5 * fabs(silu), "silu(%g)", x);
        CHECK(fabs(perk_activate(PERK_ACTIVATION_GELU_TANH, (float)x) - gelu) <= 2e-5 * fabs(gelu) + 1e-37,
              "gelu_tanh(%g)", x);
    }
}

int main(void) {
    test_dots();
    test_activations();
    test_layers_alone();
    test_random_weights();
    CHECK(test_family("qwen3") == 12);
    CHECK(test_family("qwen2") == 3);
    CHECK(test_family("llama") == 3);
    CHECK(test_family("mistral") == 2);
    CHECK(test_family("qwen3_moe") == 3);
    return 0;
}
