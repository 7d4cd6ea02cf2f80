/* The layer calls of mixtures of experts: what they refuse, and the reference executor against plain formulas. Whole
 * models of such layers are in test_reference. */
#include "device.h"
#include "graph_checks.h"
#include "model.h"
#include "perk/test.h"
#include "plan.h"
#include "random_weights.h"
#include "reference_state.h"
#include "stored_weight.h"

#include <math.h>

static perk_error err;

/* ---- shapes ---- */

enum { EXPERTS = 5, TOP = 3, WIDTH = 24, INNER = 11, ROWS = 9 };

/* A sparse MLP with every call in it. */
typedef struct sparse_mlp {
    perk_tensor *x, *router_weight, *gate, *up, *down_weight;
    perk_tensor *logits, *gate_up, *inner, *down, *out;
    perk_routing routing;
} sparse_mlp;

static sparse_mlp add_mlp(perk_graph *g, int32_t normalises) {
    sparse_mlp m = {.x = perk_input(g, "x", WIDTH)};
    m.router_weight = perk_attach_matrix(g, "router_weight", EXPERTS, WIDTH);
    m.gate = perk_attach_experts(g, "experts.*.gate", EXPERTS, INNER, WIDTH);
    m.up = perk_attach_experts(g, "experts.*.up", EXPERTS, INNER, WIDTH);
    m.down_weight = perk_attach_experts(g, "experts.*.down", EXPERTS, WIDTH, INNER);
    m.logits = perk_logits(g, "router", m.x, m.router_weight);
    m.routing = perk_moe_route(g, "route", m.logits, TOP, normalises);
    perk_tensor *both = perk_stack(g, "gate_up_weight", (perk_tensor *[]){m.gate, m.up}, 2);
    m.gate_up = perk_moe_linear(g, "gate_up", m.x, both, m.routing.experts);
    m.inner = perk_silu_mul(g, "inner", m.gate_up);
    m.down = perk_moe_linear(g, "down", m.inner, m.down_weight, m.routing.experts);
    m.out = perk_moe_sum(g, "out", m.down, m.routing.shares, m.x);
    return m;
}

static void test_shapes(void) {
    perk_graph *g = new_graph();
    sparse_mlp m = add_mlp(g, 1);
    CHECK_OK(perk_graph_check(g, &err));
    CHECK(m.routing.experts->dtype == PERK_I32 && m.routing.experts->cols == TOP);
    CHECK(m.routing.shares->dtype == PERK_F32 && m.routing.shares->cols == TOP);
    CHECK(perk_graph_find(g, "route.experts") == m.routing.experts && perk_graph_find(g, "route.shares"));
    CHECK(m.gate_up->row_kind == PERK_ROWS_PAIRS && m.gate_up->slots == TOP && m.gate_up->cols == 2 * INNER);
    CHECK(m.inner->row_kind == PERK_ROWS_PAIRS && m.inner->slots == TOP && m.inner->cols == INNER);
    CHECK(m.out->row_kind == PERK_ROWS_TOKENS && m.out->cols == WIDTH && perk_tensor_rows(m.down, 4, 1) == 12);
    const perk_tensor *both = perk_graph_find(g, "gate_up_weight");
    CHECK(both->experts == EXPERTS && both->rows == 2 * INNER && both->cols == WIDTH);
    CHECK(perk_attach_experts(g, "experts.*.up", EXPERTS, INNER, WIDTH) == m.up);
    perk_graph_free(g);
}

static void test_refusals(void) {
    static const struct {
        const char *text;
        int number;
    } cases[] = {
        {"pick 6 of 5", 0},   {"pick 0 of 5", 1},       {"a row for each token", 2}, {"does not take rows of 24", 3},
        {"does not take", 4}, {"not numbers", 5},       {"not numbers", 6},          {"neither for each token", 7},
        {"needs pairs", 8},   {"needs pairs", 9},       {"the residual x2", 10},     {"one *", 11},
        {"one *", 12},        {"found 0", 13},          {"does not fit", 14},        {"does not take", 15},
        {"not a matrix", 16}, {"residual gate_up", 17}, {"qkv must be", 18},         {"already", 19}};
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_graph *g = new_graph();
        sparse_mlp m = add_mlp(g, 0);
        perk_tensor *experts = m.routing.experts, *narrow = perk_input(g, "x2", WIDTH - 1);
        switch (cases[i].number) {
        case 0: perk_moe_route(g, "a", m.logits, 6, 0); break;
        case 1: perk_moe_route(g, "a", m.logits, 0, 0); break;
        case 2: perk_moe_route(g, "a", m.gate_up, 1, 0); break;
        case 3: perk_moe_linear(g, "a", m.x, m.router_weight, experts); break;
        case 4: perk_moe_linear(g, "a", narrow, m.gate, experts); break;
        case 5: perk_moe_linear(g, "a", m.x, m.gate, m.routing.shares); break;
        case 6: perk_moe_linear(g, "a", m.x, perk_attach_experts(g, "*", EXPERTS + 1, 1, WIDTH), experts); break;
        case 7: {
            perk_routing other = perk_moe_route(g, "other", m.logits, TOP - 1, 0);
            perk_moe_linear(g, "a", m.inner, m.down_weight, other.experts);
            break;
        }
        case 8: perk_moe_sum(g, "a", m.x, m.routing.shares, m.x); break;
        case 9: perk_moe_sum(g, "a", m.down, m.x, m.x); break;
        case 10: perk_moe_sum(g, "a", m.down, m.routing.shares, narrow); break;
        case 11: perk_attach_experts(g, "experts.1.up", EXPERTS, 2, 2); break;
        case 12: perk_attach_experts(g, "experts.*.*.up", EXPERTS, 2, 2); break;
        case 13: perk_attach_experts(g, "e.*", 0, 2, 2); break;
        case 14: perk_stack(g, "a", (perk_tensor *[]){m.gate, m.router_weight}, 2); break;
        case 15: perk_linear(g, "a", m.x, m.gate, NULL); break;
        case 16: perk_embed(g, "a", m.gate); break;
        case 17:
            perk_linear_residual(g, "a", m.x, perk_attach_matrix(g, "w", 2 * INNER, WIDTH), NULL, m.gate_up);
            break;
        case 18: {
            const float frequency = 1;
            const perk_attention_params p = {
                .num_heads = 9, .num_kv_heads = 1, .head_dim = 2, .scale = 1, .inv_freq = &frequency};
            perk_attention(g, "a", m.gate_up, &p);
            break;
        }
        default: perk_moe_route(g, "route", m.logits, 1, 0);
        }
        check_refused(g, cases[i].text);
    }
}

/* ---- arithmetic, in bf16 as on the GPU ---- */

static float *read_all(perk_test *test, perk_tensor *tensor) {
    size_t count = perk_test_rows(test, tensor) * (size_t)tensor->cols;
    float *values = calloc(count, sizeof *values);
    CHECK_OK(perk_test_read(test, tensor, values, count, &err));
    return values;
}

/* The experts of one row by sorting, and their shares. */
static void check_route(const float *logits, const float *experts, const float *shares, bool normalises) {
    double all = 0, picked = 0;
    bool taken[EXPERTS] = {false};
    for (int i = 0; i < EXPERTS; i++) all += exp((double)logits[i]);
    for (int s = 0; s < TOP; s++) {
        int best = -1;
        for (int i = 0; i < EXPERTS; i++)
            if (!taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
        CHECK((int)experts[s] == best, "slot %d: expert %g, not %d", s, (double)experts[s], best);
        taken[best] = true;
        picked += exp((double)logits[best]);
    }
    for (int s = 0; s < TOP; s++) {
        double wanted = exp((double)logits[(int)experts[s]]) / (normalises ? picked : all);
        CHECK(fabs(shares[s] - wanted) < 1e-6, "slot %d: %g, not %g", s, (double)shares[s], wanted);
    }
}

/* One rounding apart, at most. */
static void check_near(float got, double wanted, const char *what) {
    CHECK(fabs((double)got - wanted) <= 0x1p-8 * fabs(wanted) + 1e-6, "%s: %g, not %g", what, (double)got, wanted);
}

static void check_product(const float *got, const float *w, int rows, int cols, const float *in, const char *what) {
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int i = 0; i < cols; i++) sum += (double)w[r * cols + i] * (double)in[i];
        check_near(got[r], sum, what);
    }
}

/* Everything that a test of the MLP can read. */
typedef struct mlp_values {
    float *x, *gate, *up, *down_weight;
    float *logits, *experts, *shares, *gate_up, *inner, *down, *out;
} mlp_values;

static perk_test *run_mlp(int32_t normalises, const float *x, const float *router_weight, mlp_values *v) {
    const perk_test_options options = {.backend = PERK_BACKEND_REFERENCE, .rows = ROWS, .threads = 2, .seed = 3};
    perk_test *test;
    CHECK_OK(perk_test_create(&test, &options, &err));
    perk_graph *g = perk_test_graph(test);
    sparse_mlp m = add_mlp(g, normalises);
    perk_tensor *kept[] = {m.logits, m.routing.experts, m.routing.shares, m.gate_up, m.inner, m.down};
    for (size_t i = 0; i < PERK_COUNT(kept); i++) perk_keep(g, kept[i]);
    if (x) CHECK_OK(perk_test_set(test, m.x, x, ROWS * WIDTH, &err));
    if (router_weight) CHECK_OK(perk_test_set(test, m.router_weight, router_weight, EXPERTS * WIDTH, &err));
    CHECK_OK(perk_test_run(test, &err));
    CHECK(perk_test_rows(test, m.down) == ROWS * TOP && perk_test_rows(test, m.gate) == EXPERTS * INNER);
    perk_tensor *tensors[] = {m.x,       m.gate,  m.up,   m.down_weight, m.logits, m.routing.experts, m.routing.shares,
                              m.gate_up, m.inner, m.down, m.out};
    float **values[] = {&v->x,      &v->gate,    &v->up,    &v->down_weight, &v->logits, &v->experts,
                        &v->shares, &v->gate_up, &v->inner, &v->down,        &v->out};
    for (size_t i = 0; i < PERK_COUNT(values); i++) *values[i] = read_all(test, tensors[i]);
    return test;
}

static void free_mlp(perk_test *test, const mlp_values *v) {
    float *all[] = {v->x,      v->gate,    v->up,    v->down_weight, v->logits, v->experts,
                    v->shares, v->gate_up, v->inner, v->down,        v->out};
    for (size_t i = 0; i < PERK_COUNT(all); i++) free(all[i]);
    perk_test_free(test);
}

/* Each op of one pair, over what it really got. */
static void check_pair(const mlp_values *v, int token, int pair) {
    int expert = (int)v->experts[pair];
    const float *both = v->gate_up + pair * 2 * INNER, *inner = v->inner + pair * INNER, *x = v->x + token * WIDTH;
    check_product(both, v->gate + expert * INNER * WIDTH, INNER, WIDTH, x, "gate");
    check_product(both + INNER, v->up + expert * INNER * WIDTH, INNER, WIDTH, x, "up");
    for (int i = 0; i < INNER; i++) {
        double gate = (double)both[i];
        check_near(inner[i], gate / (1 + exp(-gate)) * (double)both[INNER + i], "silu_mul");
    }
    check_product(v->down + pair * WIDTH, v->down_weight + expert * WIDTH * INNER, WIDTH, INNER, inner, "down");
}

static void test_values(int32_t normalises) {
    mlp_values v;
    perk_test *test = run_mlp(normalises, NULL, NULL, &v);
    for (int t = 0; t < ROWS; t++) {
        check_route(v.logits + t * EXPERTS, v.experts + t * TOP, v.shares + t * TOP, normalises);
        for (int pair = t * TOP; pair < (t + 1) * TOP; pair++) check_pair(&v, t, pair);
        for (int i = 0; i < WIDTH; i++) {
            double sum = (double)v.x[t * WIDTH + i];
            for (int pair = t * TOP; pair < (t + 1) * TOP; pair++)
                sum += (double)v.shares[pair] * (double)v.down[pair * WIDTH + i];
            check_near(v.out[t * WIDTH + i], sum, "sum");
        }
    }
    free_mlp(test, &v);
}

/* Equal logits go to the lowest numbers; logits that are no numbers still pick experts that there are. */
static void test_odd_logits(void) {
    float same[EXPERTS * WIDTH], x[ROWS * WIDTH];
    mlp_values v;
    for (int i = 0; i < EXPERTS * WIDTH; i++) same[i] = (float)(i % WIDTH) / 16;
    for (int i = 0; i < ROWS * WIDTH; i++) x[i] = i < WIDTH ? NAN : (float)(i % 7) / 8;
    perk_test *test = run_mlp(1, x, same, &v);
    for (int s = 0; s < TOP; s++)
        CHECK(v.experts[s] >= 0 && v.experts[s] < EXPERTS && v.experts[s] == (float)s && isnan(v.shares[s]));
    for (int i = TOP; i < ROWS * TOP; i++)
        CHECK(v.experts[i] == (float)(i % TOP) && fabsf(v.shares[i] - 1.0f / TOP) < 1e-6f);
    free_mlp(test, &v);
}

/* A plan says that it cannot be made, by the name of the first op that has no device code. */
static void test_plan_refused(void) {
    perk_device_desc device;
    perk_plan *plan;
    perk_config config = {.max_num_batched_tokens = 4, .max_seq_length = 64};
    CHECK_OK(perk_device_describe_arch("sm_90a", &device, &err));
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    perk_graph *g = new_graph();
    add_mlp(g, 1);
    CHECK_FAILS(perk_plan_create(&plan, g, &device, &config, &err), PERK_UNSUPPORTED, "route.experts: moe_route");
    CHECK(!plan);
    perk_graph_free(g);
}

/* ---- weights ---- */

#define FIXTURE PERK_SOURCE_DIR "/tests/fixtures/qwen3_moe/top2"

/* bf16 experts stay where the checkpoint is mapped. */
static void test_no_copy(void) {
    perk_model *model;
    perk_executor *executor;
    perk_config config = {.max_num_batched_tokens = 4, .max_seq_length = 32};
    const perk_reference_options options = {.threads = 1, .precision = PERK_PRECISION_BF16};
    char name[PERK_STORED_NAME];
    CHECK_OK(perk_model_open(&model, FIXTURE, false, 0, &err));
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_reference_create(&executor, model->graph, model->checkpoint, &config, &options, &err));
    const perk_tensor *down = perk_graph_find(model->graph, "model.layers.1.mlp.experts.*.down_proj.weight");
    const perk_reference_weight *weight = &((const perk_reference *)executor)->weights[down->index];
    CHECK(perk_weight_count(down) == 7 && weight->experts && !weight->owned);
    for (int64_t i = 0; i < 7; i++) {
        const perk_checkpoint_tensor *stored = perk_checkpoint_find(model->checkpoint, perk_weight_name(down, i, name));
        CHECK(stored && weight->experts[i].data == stored->data && !weight->experts[i].owned, "%s", name);
    }
    executor->type->free(executor);
    perk_model_free(model);
}

/* One matrix of one expert lacks: its own name is in the message. */
static void test_missing_expert(void) {
    perk_graph *g = new_graph();
    perk_checkpoint *weights;
    perk_executor *executor;
    perk_config config = {.max_num_batched_tokens = 4, .max_seq_length = 32};
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    add_mlp(g, 1);
    CHECK_OK(perk_checkpoint_open_given(&weights, g, 1, NULL, 0, &err));
    CHECK(perk_checkpoint_count(weights) == 1 + 3 * EXPERTS && perk_checkpoint_find(weights, "experts.4.up"));
    perk_graph *more = new_graph();
    add_mlp(more, 1);
    perk_attach_experts(more, "experts.*.third", EXPERTS, 1, 1);
    CHECK_FAILS(perk_reference_create(&executor, more, weights, &config, NULL, &err), PERK_NOT_FOUND,
                "\"experts.0.third\" is missing");
    perk_checkpoint_free(weights);
    perk_graph_free(more);
    perk_graph_free(g);
}

/* ---- the model that these calls are for ---- */

/* One GPU of 80 GB holds it with 32k positions. */
static void test_memory_of_30b(void) {
    perk_model *model;
    CHECK_OK(perk_model_describe(&model, PERK_SOURCE_DIR "/bench/configs/qwen3-30b-a3b", &err));
    perk_model_memory memory = perk_model_measure(model, 32768);
    CHECK(memory.weights_bytes == (uint64_t)30532122624 * 2, "%llu", (unsigned long long)memory.weights_bytes);
    CHECK(memory.kv_bytes == (uint64_t)32768 * 48 * 2 * 4 * 128 * 2, "%llu", (unsigned long long)memory.kv_bytes);
    CHECK(memory.weights_bytes + memory.kv_bytes < (uint64_t)80000000000);
    perk_model_free(model);
}

int main(void) {
    test_shapes();
    test_refusals();
    test_values(0);
    test_values(1);
    test_odd_logits();
    test_plan_refused();
    test_no_copy();
    test_missing_expert();
    test_memory_of_30b();
    return 0;
}
