/* The graph of the dense decoders. */
#include "decoder.h"

#include <math.h>
#include <stdio.h>

/* A layer in the making. Names in the checkpoint and in the graph are written into `text`, each over the last. */
typedef struct layer {
    perk_graph *graph;
    const perk_decoder *model;
    int64_t number;
    char text[96];
} layer;

static const char *stored(layer *l, const char *name, const char *suffix) {
    snprintf(l->text, sizeof l->text, "model.layers.%lld.%s.%s", (long long)l->number, name, suffix);
    return l->text;
}

static const char *called(layer *l, const char *name, const char *suffix) {
    snprintf(l->text, sizeof l->text, "layers.%lld.%s%s", (long long)l->number, name, suffix);
    return l->text;
}

static perk_tensor *norm(layer *l, const char *name, perk_tensor *x, const char *weight_name) {
    perk_tensor *weight = perk_attach_vector(l->graph, stored(l, weight_name, "weight"), l->model->hidden);
    return perk_rmsnorm(l->graph, called(l, name, ""), x, weight, (float)l->model->norm_eps);
}

/* A linear of the checkpoint: [rows, the input's width], and where the model has it a bias. */
typedef struct projection {
    const char *name;
    int64_t rows;
} projection;

enum { MOST_STACKED = 3 };

/* Projections of the same input, by one matrix: their outputs lie side by side. */
static perk_tensor *project(layer *l, const char *name, perk_tensor *x, int64_t width, const projection *parts,
                            int count, bool biased) {
    perk_tensor *weights[MOST_STACKED], *biases[MOST_STACKED] = {NULL};
    for (int i = 0; i < count; i++) {
        weights[i] = perk_attach_matrix(l->graph, stored(l, parts[i].name, "weight"), parts[i].rows, width);
        if (biased) biases[i] = perk_attach_vector(l->graph, stored(l, parts[i].name, "bias"), parts[i].rows);
    }
    perk_tensor *weight = perk_stack(l->graph, called(l, name, "_weight"), weights, count);
    perk_tensor *bias = perk_stack(l->graph, called(l, name, "_bias"), biases, count);
    return perk_linear(l->graph, called(l, name, ""), x, weight, bias);
}

/* A block's last projection, added to what the block began with. */
static perk_tensor *project_back(layer *l, const char *name, perk_tensor *x, int64_t width, const char *part,
                                 bool biased, perk_tensor *residual) {
    int64_t hidden = l->model->hidden;
    perk_tensor *weight = perk_attach_matrix(l->graph, stored(l, part, "weight"), hidden, width);
    perk_tensor *bias = biased ? perk_attach_vector(l->graph, stored(l, part, "bias"), hidden) : NULL;
    return perk_linear_residual(l->graph, called(l, name, ""), x, weight, bias, residual);
}

static bool slides(const perk_decoder *m, int64_t number) {
    if (!m->layer_types) return number >= m->first_window;
    return !strcmp(json_string_value(json_array_get(m->layer_types, (size_t)number)), "sliding_attention");
}

static perk_tensor *head_norm(layer *l, const char *name) {
    const perk_decoder *m = l->model;
    return m->norms_heads ? perk_attach_vector(l->graph, stored(l, name, "weight"), m->head_dim) : NULL;
}

static perk_tensor *attention(layer *l, perk_tensor *x) {
    const perk_decoder *m = l->model;
    int64_t q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim;
    const projection parts[] = {{"self_attn.q_proj", q}, {"self_attn.k_proj", kv}, {"self_attn.v_proj", kv}};
    perk_tensor *normed = norm(l, "input_norm", x, "input_layernorm");
    perk_tensor *qkv = project(l, "qkv", normed, m->hidden, parts, PERK_COUNT(parts), m->qkv_bias);
    perk_attention_params params = {
        .num_heads = (int32_t)m->heads,
        .num_kv_heads = (int32_t)m->kv_heads,
        .head_dim = (int32_t)m->head_dim,
        .scale = (float)(1 / sqrt((double)m->head_dim)),
        .window = slides(m, l->number) ? (int32_t)m->window : 0,
        .inv_freq = m->rope.inv_freq,
        .rope_scale = m->rope.scale,
        .q_norm = head_norm(l, "self_attn.q_norm"),
        .k_norm = head_norm(l, "self_attn.k_norm"),
        .norm_eps = (float)m->norm_eps,
    };
    perk_tensor *mixed = perk_attention(l->graph, called(l, "attention", ""), qkv, &params);
    return project_back(l, "attention_residual", mixed, q, "self_attn.o_proj", m->out_bias, x);
}

static perk_tensor *mlp(layer *l, perk_tensor *x) {
    const perk_decoder *m = l->model;
    const projection parts[] = {{"mlp.gate_proj", m->intermediate}, {"mlp.up_proj", m->intermediate}};
    perk_tensor *normed = norm(l, "mlp_norm", x, "post_attention_layernorm");
    perk_tensor *gate_up = project(l, "gate_up", normed, m->hidden, parts, PERK_COUNT(parts), m->mlp_bias);
    perk_tensor *inner = perk_silu_mul(l->graph, called(l, "silu_mul", ""), gate_up);
    return project_back(l, "mlp_residual", inner, m->intermediate, "mlp.down_proj", m->mlp_bias, x);
}

static void build_graph(perk_graph *g, const perk_decoder *m) {
    perk_tensor *table = perk_attach_matrix(g, "model.embed_tokens.weight", m->vocab, m->hidden);
    perk_tensor *x = perk_embed(g, "embedding", table);
    for (int64_t number = 0; number < m->layers; number++) {
        layer l = {.graph = g, .model = m, .number = number};
        x = attention(&l, x);
        x = mlp(&l, x);
    }
    perk_tensor *last = perk_select_rows(g, "last_hidden", x);
    perk_tensor *weight = perk_attach_vector(g, "model.norm.weight", m->hidden);
    perk_tensor *normed = perk_rmsnorm(g, "final_norm", last, weight, (float)m->norm_eps);
    perk_tensor *head = m->is_tied ? table : perk_attach_matrix(g, "lm_head.weight", m->vocab, m->hidden);
    perk_tensor *logits = perk_logits(g, "logits", normed, head);
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
