/* The graph of the decoders. */
#include "decoder.h"

#include <math.h>
#include <stdio.h>

/* A layer in the making. Names in the graph are written into `text`, each over the last. */
typedef struct layer {
    perk_graph *graph;
    const perk_decoder *model;
    const perk_weight_map *weights;
    int64_t number;
    char text[96];
} layer;

static const char *called(layer *l, const char *name) {
    snprintf(l->text, sizeof l->text, "layers.%lld.%s", (long long)l->number, name);
    return l->text;
}

static perk_tensor *weight(const layer *l, const char *target) {
    return perk_weight_find(l->weights, target, l->number);
}

static bool slides(const perk_decoder *m, int64_t number) {
    if (!m->layer_types) return number >= m->first_window;
    return !strcmp(json_string_value(json_array_get(m->layer_types, (size_t)number)), "sliding_attention");
}

static perk_tensor *attention(layer *l, perk_tensor *x) {
    const perk_decoder *m = l->model;
    float eps = (float)m->norm_eps;
    perk_tensor *normed =
        perk_rmsnorm(l->graph, called(l, "input_norm"), x, weight(l, "layers.#.input_norm_weight"), eps);
    perk_tensor *qkv_weight = weight(l, "layers.#.qkv_weight"), *qkv_bias = weight(l, "layers.#.qkv_bias");
    perk_tensor *qkv = perk_linear(l->graph, called(l, "qkv"), normed, qkv_weight, qkv_bias);
    perk_attention_params params = {
        .num_heads = (int32_t)m->heads,
        .num_kv_heads = (int32_t)m->kv_heads,
        .head_dim = (int32_t)m->head_dim,
        .scale = (float)(1 / sqrt((double)m->head_dim)),
        .window = slides(m, l->number) ? (int32_t)m->window : 0,
        .inv_freq = m->rope.inv_freq,
        .rope_scale = m->rope.scale,
        .q_norm = weight(l, "layers.#.q_norm_weight"),
        .k_norm = weight(l, "layers.#.k_norm_weight"),
        .norm_eps = eps,
    };
    perk_tensor *mixed = perk_attention(l->graph, called(l, "attention"), qkv, &params);
    perk_tensor *out_weight = weight(l, "layers.#.out_weight"), *out_bias = weight(l, "layers.#.out_bias");
    return perk_linear_residual(l->graph, called(l, "attention_residual"), mixed, out_weight, out_bias, x);
}

static perk_tensor *mlp_norm(layer *l, perk_tensor *x) {
    perk_tensor *norm_weight = weight(l, "layers.#.mlp_norm_weight");
    return perk_rmsnorm(l->graph, called(l, "mlp_norm"), x, norm_weight, (float)l->model->norm_eps);
}

static perk_tensor *mlp(layer *l, perk_tensor *x) {
    perk_tensor *normed = mlp_norm(l, x);
    perk_tensor *gate_up_weight = weight(l, "layers.#.gate_up_weight"), *bias = weight(l, "layers.#.gate_up_bias");
    perk_tensor *gate_up = perk_linear(l->graph, called(l, "gate_up"), normed, gate_up_weight, bias);
    perk_tensor *inner = perk_silu_mul(l->graph, called(l, "silu_mul"), gate_up);
    perk_tensor *down_weight = weight(l, "layers.#.down_weight"), *down_bias = weight(l, "layers.#.down_bias");
    return perk_linear_residual(l->graph, called(l, "mlp_residual"), inner, down_weight, down_bias, x);
}

/* Whether a layer has experts instead of one MLP. */
static bool is_sparse(const perk_decoder *m, int64_t number) {
    if (!m->experts || (number + 1) % m->sparse_step != 0) return false;
    for (size_t i = 0; i < json_array_size(m->dense_layers); i++)
        if (json_integer_value(json_array_get(m->dense_layers, i)) == number) return false;
    return true;
}

static perk_tensor *experts(layer *l, perk_tensor *x) {
    const perk_decoder *m = l->model;
    perk_tensor *normed = mlp_norm(l, x);
    perk_tensor *router = perk_logits(l->graph, called(l, "router"), normed, weight(l, "layers.#.router_weight"));
    perk_routing routing =
        perk_moe_route(l->graph, called(l, "route"), router, (int32_t)m->top_experts, m->normalises_experts);
    perk_tensor *gate_up_weight = weight(l, "layers.#.experts_gate_up_weight");
    perk_tensor *gate_up = perk_moe_linear(l->graph, called(l, "gate_up"), normed, gate_up_weight, routing.experts);
    perk_tensor *inner = perk_silu_mul(l->graph, called(l, "silu_mul"), gate_up);
    perk_tensor *down_weight = weight(l, "layers.#.experts_down_weight");
    perk_tensor *down = perk_moe_linear(l->graph, called(l, "down"), inner, down_weight, routing.experts);
    return perk_moe_sum(l->graph, called(l, "mlp_residual"), down, routing.shares, x);
}

static perk_weight_map weights_of(perk_graph *graph, const perk_decoder *m) {
    return (perk_weight_map){
        .graph = graph,
        .table = &perk_decoder_weights,
        .sizes = {[PERK_SIZE_VOCAB] = m->vocab,
                  [PERK_SIZE_HIDDEN] = m->hidden,
                  [PERK_SIZE_QUERIES] = m->heads * m->head_dim,
                  [PERK_SIZE_KEYS] = m->kv_heads * m->head_dim,
                  [PERK_SIZE_HEAD] = m->head_dim,
                  [PERK_SIZE_INTERMEDIATE] = m->intermediate,
                  [PERK_SIZE_EXPERTS] = m->experts,
                  [PERK_SIZE_EXPERT_WIDTH] = m->expert_width},
        .features = (m->qkv_bias ? PERK_HAS_QKV_BIAS : 0u) | (m->out_bias ? PERK_HAS_OUT_BIAS : 0u) |
                    (m->mlp_bias ? PERK_HAS_MLP_BIAS : 0u) | (m->norms_heads ? PERK_HAS_HEAD_NORMS : 0u) |
                    (m->is_tied ? 0u : PERK_HAS_OWN_HEAD),
    };
}

static void build_graph(perk_graph *g, const perk_decoder *m) {
    const perk_weight_map weights = weights_of(g, m);
    perk_tensor *table = perk_weight_find(&weights, "embedding_table", 0);
    perk_tensor *x = perk_embed(g, "embedding", table);
    for (int64_t number = 0; number < m->layers; number++) {
        layer l = {.graph = g, .model = m, .weights = &weights, .number = number};
        x = attention(&l, x);
        x = is_sparse(m, number) ? experts(&l, x) : mlp(&l, x);
    }
    perk_tensor *last = perk_select_rows(g, "last_hidden", x);
    perk_tensor *norm_weight = perk_weight_find(&weights, "final_norm_weight", 0);
    perk_tensor *normed = perk_rmsnorm(g, "final_norm", last, norm_weight, (float)m->norm_eps);
    perk_tensor *head = perk_weight_find(&weights, "head_weight", 0);
    perk_tensor *logits = perk_logits(g, "logits", normed, head ? head : table);
    perk_argmax(g, "next_token", logits);
}

void perk_decoder_build(perk_graph *graph, const json_t *config, const perk_decoder_family *family) {
    perk_decoder model;
    perk_error err;
    perk_status status = perk_decoder_read(&model, family, config, &err);
    if (status)
        perk_graph_fail(graph, status, "%s", err.message);
    else
        build_graph(graph, &model);
    free(model.rope.inv_freq);
}
