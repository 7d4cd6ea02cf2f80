/* Small decoder-like graphs, configurations, devices and batches, drawn from a seed. Header only: a test is one
 * program. */
#ifndef PERK_TESTS_RANDOM_GRAPH_H
#define PERK_TESTS_RANDOM_GRAPH_H

#include "src/batch.h"
#include "src/device.h"
#include "src/random_weights.h"
#include "test.h"

#include <math.h>

enum { RANDOM_GRAPH_KEPT = 8, RANDOM_GRAPH_STEPS = 6 };
enum { RANDOM_GRAPH_OWN_TOP = 3 }; /* experts of a token, with own_routing */

typedef struct random_graph {
    uint64_t state; /* of the draws */
    perk_graph *graph;
    perk_config config;
    perk_device_desc device;
    perk_checkpoint *weights;
    perk_tensor *logits;
    perk_tensor *kept[RANDOM_GRAPH_KEPT];
    int kept_count;
    int vocab, most_experts;
    bool keeps_experts;
    char names[4][128];
    unsigned next_name;
    /* a few steps: prompts in chunks, single tokens */
    perk_batch *batches[RANDOM_GRAPH_STEPS];
    int step_count;
} random_graph;

/* How large it may become. */
typedef struct random_graph_limits {
    int layers, hidden, heads, workers, tokens, steps;
    int experts;      /* 0: no layer has any */
    bool own_routing; /* steps of one token, whose experts nobody else asks for: tasks pick them by themselves */
} random_graph_limits;

static inline int random_graph_below(random_graph *g, int bound) {
    g->state ^= g->state << 13;
    g->state ^= g->state >> 7;
    g->state ^= g->state << 17;
    return (int)((uint32_t)(g->state >> 32) % (uint32_t)bound);
}
static inline bool random_graph_chance(random_graph *g, int percent) { return random_graph_below(g, 100) < percent; }
/* From `low` to `high`. */
static inline int random_graph_between(random_graph *g, int low, int high) {
    return low + random_graph_below(g, PERK_MAX(1, high - low + 1));
}

/* ---- the graph ---- */

/* Valid until the fourth call after it. */
static inline const char *random_graph_name(random_graph *g, int layer, const char *what) {
    char *name = g->names[g->next_name++ % 4];
    snprintf(name, sizeof g->names[0], "layers.%d.%s", layer, what);
    return name;
}

static inline void random_graph_keep(random_graph *g, perk_tensor *tensor, int percent) {
    if (g->kept_count == RANDOM_GRAPH_KEPT || !random_graph_chance(g, percent)) return;
    perk_keep(g->graph, tensor);
    g->kept[g->kept_count++] = tensor;
}

/* Weights of `rows` rows altogether, in one piece or stacked. */
static inline perk_tensor *random_graph_weight(random_graph *g, int layer, const char *what, const int *rows, int parts,
                                               int cols) {
    perk_tensor *stacked[PERK_STACK_MAX];
    char name[64];
    int total = 0;
    for (int i = 0; i < parts; i++) {
        snprintf(name, sizeof name, "%s.%d", what, i);
        total += rows[i];
        stacked[i] = NULL;
    }
    if (random_graph_chance(g, 30))
        return cols ? perk_attach_matrix(g->graph, random_graph_name(g, layer, what), total, cols)
                    : perk_attach_vector(g->graph, random_graph_name(g, layer, what), total);
    for (int i = 0; i < parts; i++) {
        snprintf(name, sizeof name, "%s.%d", what, i);
        const char *full = random_graph_name(g, layer, name);
        stacked[i] =
            cols ? perk_attach_matrix(g->graph, full, rows[i], cols) : perk_attach_vector(g->graph, full, rows[i]);
    }
    return perk_stack(g->graph, random_graph_name(g, layer, what), stacked, parts);
}

static inline perk_tensor *random_graph_norm(random_graph *g, int layer, const char *what, perk_tensor *x, int width) {
    char name[64];
    snprintf(name, sizeof name, "%s.weight", what);
    perk_tensor *weight = perk_attach_vector(g->graph, random_graph_name(g, layer, name), width);
    perk_tensor *out = perk_rmsnorm(g->graph, random_graph_name(g, layer, what), x, weight, 1e-6f);
    random_graph_keep(g, out, 10);
    return out;
}

static inline perk_tensor *random_graph_attention(random_graph *g, int layer, perk_tensor *x, int hidden,
                                                  perk_attention_params params) {
    int dim = params.head_dim;
    int rows[] = {params.num_heads * dim, params.num_kv_heads * dim, params.num_kv_heads * dim};
    perk_tensor *weight = random_graph_weight(g, layer, "qkv.weight", rows, 3, hidden);
    perk_tensor *bias = random_graph_chance(g, 30) ? random_graph_weight(g, layer, "qkv.bias", rows, 3, 0) : NULL;
    perk_tensor *qkv = perk_linear(g->graph, random_graph_name(g, layer, "qkv"), x, weight, bias);
    random_graph_keep(g, qkv, 10);
    if (random_graph_chance(g, 50))
        params.q_norm = perk_attach_vector(g->graph, random_graph_name(g, layer, "qn"), dim);
    if (random_graph_chance(g, 50))
        params.k_norm = perk_attach_vector(g->graph, random_graph_name(g, layer, "kn"), dim);
    if (random_graph_chance(g, 30)) params.window = random_graph_between(g, 1, 20);
    return perk_attention(g->graph, random_graph_name(g, layer, "attention"), qkv, &params);
}

/* A layer's mixture of experts. */
static inline perk_tensor *random_graph_experts(random_graph *g, int layer, perk_tensor *x, perk_tensor *normed,
                                                int hidden) {
    int experts = random_graph_between(g, 1, g->most_experts), top = random_graph_between(g, 1, PERK_MIN(4, experts));
    if (!g->keeps_experts) { /* the same in all layers */
        experts = g->most_experts;
        top = PERK_MIN(RANDOM_GRAPH_OWN_TOP, experts);
    }
    int ffn = random_graph_between(g, 3, hidden);
    perk_tensor *weight = perk_attach_matrix(g->graph, random_graph_name(g, layer, "router.weight"), experts, hidden);
    perk_tensor *router = perk_logits(g->graph, random_graph_name(g, layer, "router"), normed, weight);
    perk_routing routing =
        perk_moe_route(g->graph, random_graph_name(g, layer, "route"), router, top, random_graph_chance(g, 50));
    random_graph_keep(g, g->keeps_experts ? routing.experts : router, 100);
    perk_tensor *parts[2];
    for (int i = 0; i < 2; i++)
        parts[i] =
            perk_attach_experts(g->graph, random_graph_name(g, layer, i ? "*.up" : "*.gate"), experts, ffn, hidden);
    perk_tensor *stack = perk_stack(g->graph, random_graph_name(g, layer, "gate_up.weight"), parts, 2);
    perk_tensor *wide =
        perk_moe_linear(g->graph, random_graph_name(g, layer, "gate_up"), normed, stack, routing.experts);
    random_graph_keep(g, wide, 20);
    perk_tensor *product = perk_silu_mul(g->graph, random_graph_name(g, layer, "product"), wide);
    weight = perk_attach_experts(g->graph, random_graph_name(g, layer, "*.down"), experts, hidden, ffn);
    perk_tensor *down =
        perk_moe_linear(g->graph, random_graph_name(g, layer, "down"), product, weight, routing.experts);
    random_graph_keep(g, down, 20);
    return perk_moe_sum(g->graph, random_graph_name(g, layer, "sum"), down, routing.shares, x);
}

static inline perk_tensor *random_graph_layer(random_graph *g, int layer, perk_tensor *x, int hidden,
                                              const perk_attention_params *params) {
    perk_tensor *normed = random_graph_norm(g, layer, "norm", x, hidden);
    perk_tensor *mixed = random_graph_attention(g, layer, normed, hidden, *params);
    perk_tensor *weight = perk_attach_matrix(g->graph, random_graph_name(g, layer, "o.weight"), hidden,
                                             params->num_heads * params->head_dim);
    if (random_graph_chance(g, 80))
        x = perk_linear_residual(g->graph, random_graph_name(g, layer, "o"), mixed, weight, NULL, x);
    else
        x = perk_linear(g->graph, random_graph_name(g, layer, "o"), mixed, weight, NULL);
    random_graph_keep(g, x, 20);
    if (random_graph_chance(g, 15)) return x;
    normed = random_graph_norm(g, layer, "mlp_norm", x, hidden);
    if (g->most_experts && random_graph_chance(g, 80)) return random_graph_experts(g, layer, x, normed, hidden);
    int ffn = random_graph_between(g, 17, 2 * hidden), rows[] = {ffn, ffn};
    weight = random_graph_weight(g, layer, "gate_up.weight", rows, 2, hidden);
    perk_tensor *bias = random_graph_chance(g, 20) ? random_graph_weight(g, layer, "gate_up.bias", rows, 2, 0) : NULL;
    perk_tensor *wide = perk_linear(g->graph, random_graph_name(g, layer, "gate_up"), normed, weight, bias);
    random_graph_keep(g, wide, 20); /* then the product is a stage of its own */
    perk_tensor *product =
        (layer % 2 ? perk_gelu_mul : perk_silu_mul)(g->graph, random_graph_name(g, layer, "product"), wide);
    weight = perk_attach_matrix(g->graph, random_graph_name(g, layer, "down.weight"), hidden, ffn);
    bias = random_graph_chance(g, 30) ? perk_attach_vector(g->graph, random_graph_name(g, layer, "down.bias"), hidden)
                                      : NULL;
    return perk_linear_residual(g->graph, random_graph_name(g, layer, "down"), product, weight, bias, x);
}

static inline void random_graph_build(random_graph *g, const random_graph_limits *most) {
    static const float frequencies[32] = {1.0f, 0.75f, 0.56f, 0.42f, 0.32f, 0.24f, 0.18f, 0.13f,
                                          0.1f, 0.07f, 0.06f, 0.04f, 0.03f, 0.02f, 0.01f, 0.01f};
    int hidden = random_graph_between(g, 16, most->hidden), layers = random_graph_between(g, 1, most->layers);
    int kv_heads = random_graph_between(g, 1, PERK_MIN(2, most->heads));
    perk_attention_params params = {.num_kv_heads = kv_heads,
                                    .num_heads = kv_heads * random_graph_between(g, 1, most->heads / kv_heads),
                                    .head_dim = random_graph_chance(g, 60) ? 32 : 64,
                                    .inv_freq = frequencies,
                                    .rope_scale = 1,
                                    .norm_eps = 1e-6f};
    params.scale = 1 / sqrtf((float)params.head_dim);
    g->vocab = random_graph_between(g, 20, 90);
    perk_tensor *table = perk_attach_matrix(g->graph, "embed.weight", g->vocab, hidden);
    perk_tensor *x = perk_embed(g->graph, "embed", table);
    random_graph_keep(g, x, 10);
    for (int i = 0; i < layers; i++) x = random_graph_layer(g, i, x, hidden, &params);
    random_graph_keep(g, x, 10);
    x = perk_select_rows(g->graph, "selected", x);
    x = random_graph_norm(g, layers, "norm", x, hidden);
    perk_tensor *head =
        random_graph_chance(g, 50) ? table : perk_attach_matrix(g->graph, "head.weight", g->vocab, hidden);
    g->logits = perk_logits(g->graph, "logits", x, head);
    perk_argmax(g->graph, "next", g->logits);
}

/* ---- batches ---- */

static inline void random_graph_step(random_graph *g, perk_batch *batch, int *lengths) {
    perk_error err = {0};
    int32_t ids[64], pages[64];
    const perk_config *c = &g->config;
    bool is_full = random_graph_chance(g, 40); /* as many tokens and rows of logits as there may be */
    for (int r = 0; r < c->max_num_batched_requests; r++) {
        int room = PERK_MIN(c->max_num_batched_tokens - batch->num_tokens, c->max_seq_length - lengths[r]);
        bool is_last = r == c->max_num_batched_requests - 1 && batch->num_tokens == 0;
        if (room < 1 || (!is_last && random_graph_chance(g, 20))) continue;
        int count = lengths[r] == 0 || random_graph_chance(g, 20) ? random_graph_between(g, 1, room) : 1;
        if (is_full && random_graph_chance(g, 60)) count = room;
        int rows = c->max_num_logit_rows - batch->num_logit_rows;
        int logits = PERK_MIN(is_full ? 2 : random_graph_below(g, 3), rows);
        if (logits == 2 && count > rows) logits = 1;
        for (int i = 0; i < count; i++) ids[i] = random_graph_below(g, g->vocab);
        for (int i = 0; i < batch->pages_per_request; i++) pages[i] = i * c->max_num_batched_requests + r;
        CHECK_OK(perk_batch_add(batch, c, ids, count, lengths[r], pages, logits, &err));
        lengths[r] += count;
    }
}

static inline void random_graph_fill_batches(random_graph *g, int most) {
    perk_error err = {0};
    int lengths[16] = {0};
    for (g->step_count = 0; g->step_count < most; g->step_count++) {
        perk_batch **batch = &g->batches[g->step_count];
        CHECK_OK(perk_batch_create(batch, &g->config, &err));
        random_graph_step(g, *batch, lengths);
        if ((*batch)->num_tokens > 0) continue;
        perk_batch_free(*batch); /* every request is at its end */
        return;
    }
}

/* ---- the whole ---- */

static inline void random_graph_free(random_graph *g) {
    for (int i = 0; i < g->step_count; i++) perk_batch_free(g->batches[i]);
    perk_checkpoint_free(g->weights);
    perk_graph_free(g->graph);
    memset(g, 0, sizeof *g);
}

static inline void random_graph_make(random_graph *g, uint64_t seed, const random_graph_limits *most) {
    perk_error err = {0};
    memset(g, 0, sizeof *g);
    g->most_experts = most->experts;
    g->keeps_experts = !most->own_routing;
    g->state = 0x853c49e6748fea9bu * (2 * seed + 1);
    for (int i = 0; i < 8; i++) random_graph_below(g, 2);
    CHECK_OK(perk_graph_create(&g->graph, "random", &err));
    random_graph_build(g, most);
    CHECK_OK(perk_graph_check(g->graph, &err));
    int tokens = most->own_routing ? 1 : random_graph_between(g, 1, most->tokens);
    g->config = (perk_config){.max_num_batched_tokens = tokens,
                              .max_num_batched_requests = random_graph_between(g, 1, PERK_MIN(3, tokens)),
                              .page_size = 16,
                              .max_seq_length = random_graph_between(g, 20, 48)};
    if (random_graph_chance(g, 30)) g->config.max_num_logit_rows = tokens;
    CHECK_OK(perk_config_resolve(&g->config, 0, &err));
    CHECK_OK(perk_device_describe_arch("sm_90a", &g->device, &err));
    if (random_graph_chance(g, 50)) perk_device_make_portable(&g->device);
    g->device.worker_count = random_graph_between(g, 1, most->workers);
    if (random_graph_chance(g, 25)) g->device.shared_memory = 72 * 1024; /* little room: fewer norms are folded */
    CHECK_OK(
        perk_checkpoint_open_random(&g->weights, PERK_SOURCE_DIR "/examples/tiny/config.json", g->graph, seed, &err));
    random_graph_fill_batches(g, PERK_MIN(most->steps, (int)RANDOM_GRAPH_STEPS));
}

#endif
