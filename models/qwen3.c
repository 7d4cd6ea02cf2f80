/* Qwen3 (Qwen Team 2025, "Qwen3 Technical Report"), dense: pre-norm transformer layers with grouped-query attention
 * (Ainslie et al. 2023), RMS-normalised query and key heads, rotary positions and SwiGLU. */
#include "config.h"
#include "models.h"
#include "rope.h"

#include <math.h>
#include <stdio.h>

enum { MAX_LAYERS = 1024, MAX_WIDTH = 1 << 20, MAX_HEADS = 4096, MAX_HEAD_DIM = 4096, MAX_VOCAB = 1 << 26 };

typedef struct qwen3 {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim;
    double norm_eps;
    bool tied, biased;
    int64_t window;       /* of the layers that slide */
    bool slides;          /* any may */
    int64_t first_window; /* layers from here on slide, where "layer_types" does not say */
    const json_t *layer_types;
    perk_rope rope;
} qwen3;

/* ---- config.json ---- */

static perk_status read_sizes(qwen3 *m, const json_t *config, perk_error *err) {
    const int64_t required = PERK_CONFIG_REQUIRED;
    perk_status status = perk_config_i64(config, "vocab_size", required, 1, MAX_VOCAB, &m->vocab, err);
    if (!status) status = perk_config_i64(config, "hidden_size", required, 1, MAX_WIDTH, &m->hidden, err);
    if (!status) status = perk_config_i64(config, "intermediate_size", required, 1, MAX_WIDTH, &m->intermediate, err);
    if (!status) status = perk_config_i64(config, "num_hidden_layers", required, 1, MAX_LAYERS, &m->layers, err);
    if (!status) status = perk_config_i64(config, "num_attention_heads", required, 1, MAX_HEADS, &m->heads, err);
    if (!status) status = perk_config_i64(config, "num_key_value_heads", m->heads, 1, MAX_HEADS, &m->kv_heads, err);
    if (status) return status;
    /* null asks for the quotient; where the key is missing, the architecture's own value holds */
    int64_t head_dim = json_object_get(config, "head_dim") ? m->hidden / m->heads : 128;
    status = perk_config_i64(config, "head_dim", head_dim, 2, MAX_HEAD_DIM, &m->head_dim, err);
    if (status) return status;
    if (m->heads % m->kv_heads != 0)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "config.json: \"num_attention_heads\" (%lld) must be a multiple of \"num_key_value_heads\" "
                         "(%lld)",
                         (long long)m->heads, (long long)m->kv_heads);
    if (m->head_dim % 2 != 0)
        return perk_fail(err, PERK_BAD_FORMAT, "config.json: \"head_dim\" (%lld) must be even", (long long)m->head_dim);
    return PERK_OK;
}

static perk_status read_windows(qwen3 *m, const json_t *config, perk_error *err) {
    perk_status status = perk_config_bool(config, "use_sliding_window", 0, &m->slides, err);
    if (!status) status = perk_config_i64(config, "sliding_window", 4096, 1, INT32_MAX, &m->window, err);
    if (!status) status = perk_config_i64(config, "max_window_layers", 28, 0, INT32_MAX, &m->first_window, err);
    if (status) return status;
    /* null turns windows off */
    if (json_is_null(json_object_get(config, "sliding_window"))) m->slides = false;
    m->layer_types = perk_config_get(config, "layer_types");
    if (m->layer_types && (!json_is_array(m->layer_types) || json_array_size(m->layer_types) != (size_t)m->layers))
        return perk_fail(err, PERK_BAD_FORMAT, "config.json: \"layer_types\" must list %lld layers",
                         (long long)m->layers);
    for (size_t i = 0; i < json_array_size(m->layer_types); i++) {
        const char *type = json_string_value(json_array_get(m->layer_types, i));
        bool slides = type && !strcmp(type, "sliding_attention");
        if (!type || (!slides && strcmp(type, "full_attention") != 0))
            return perk_fail(err, PERK_UNSUPPORTED,
                             "config.json: \"layer_types\"[%zu] is %.40s; perk knows full_attention and "
                             "sliding_attention",
                             i, type ? type : "no string");
        if (slides && !m->slides)
            return perk_fail(err, PERK_BAD_FORMAT,
                             "config.json: \"layer_types\"[%zu] slides, but \"use_sliding_window\" is off", i);
    }
    return PERK_OK;
}

static perk_status refuse_unknown(const json_t *config, perk_error *err) {
    const char *activation = NULL, *method = NULL;
    perk_status status = perk_config_string(config, "hidden_act", "silu", &activation, err);
    if (!status && strcmp(activation, "silu") != 0)
        status = perk_fail(err, PERK_UNSUPPORTED, "config.json: hidden_act \"%.40s\" is not supported; Qwen3 uses silu",
                           activation);
    if (status || !perk_config_get(config, "quantization_config")) return status;
    method = json_string_value(perk_config_get(config, "quantization_config.quant_method"));
    return perk_fail(err, PERK_UNSUPPORTED,
                     "config.json: weights quantised by \"%.40s\" are not supported; use the bf16 checkpoint",
                     method ? method : "?");
}

static perk_status read_config(qwen3 *m, const json_t *config, perk_error *err) {
    perk_status status = refuse_unknown(config, err);
    if (!status) status = read_sizes(m, config, err);
    if (!status) status = read_windows(m, config, err);
    if (!status) status = perk_config_f64(config, "rms_norm_eps", 1e-6, 0, 1, &m->norm_eps, err);
    if (!status) status = perk_config_bool(config, "tie_word_embeddings", 0, &m->tied, err);
    if (!status) status = perk_config_bool(config, "attention_bias", 0, &m->biased, err);
    if (!status) status = perk_rope_read(&m->rope, config, (int32_t)m->head_dim, err);
    return status;
}

/* ---- the graph ---- */

/* Names of layer `layer` in the checkpoint and in the graph; `text` holds the last one made. */
typedef struct layer_names {
    int64_t layer;
    char text[96];
} layer_names;

static const char *stored(layer_names *names, const char *name) {
    snprintf(names->text, sizeof names->text, "model.layers.%lld.%s", (long long)names->layer, name);
    return names->text;
}

static const char *called(layer_names *names, const char *name) {
    snprintf(names->text, sizeof names->text, "layers.%lld.%s", (long long)names->layer, name);
    return names->text;
}

static perk_tensor *norm(perk_graph *g, const qwen3 *m, layer_names *names, const char *name, perk_tensor *x,
                         const char *weight_name) {
    perk_tensor *weight = perk_attach_vector(g, stored(names, weight_name), m->hidden);
    return perk_rmsnorm(g, called(names, name), x, weight, (float)m->norm_eps);
}

static bool layer_slides(const qwen3 *m, int64_t layer) {
    if (!m->layer_types) return m->slides && layer >= m->first_window;
    return !strcmp(json_string_value(json_array_get(m->layer_types, (size_t)layer)), "sliding_attention");
}

/* Queries, keys and values in one matrix: [query heads; key heads; value heads]. */
static perk_tensor *project_qkv(perk_graph *g, const qwen3 *m, layer_names *names, perk_tensor *x) {
    int64_t q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim;
    perk_tensor *weights[] = {perk_attach_matrix(g, stored(names, "self_attn.q_proj.weight"), q, m->hidden),
                              perk_attach_matrix(g, stored(names, "self_attn.k_proj.weight"), kv, m->hidden),
                              perk_attach_matrix(g, stored(names, "self_attn.v_proj.weight"), kv, m->hidden)};
    perk_tensor *biases[3] = {NULL};
    if (m->biased) {
        biases[0] = perk_attach_vector(g, stored(names, "self_attn.q_proj.bias"), q);
        biases[1] = perk_attach_vector(g, stored(names, "self_attn.k_proj.bias"), kv);
        biases[2] = perk_attach_vector(g, stored(names, "self_attn.v_proj.bias"), kv);
    }
    perk_tensor *weight = perk_stack(g, called(names, "qkv_weight"), weights, 3);
    perk_tensor *bias = perk_stack(g, called(names, "qkv_bias"), biases, 3);
    return perk_linear(g, called(names, "qkv"), x, weight, bias);
}

static perk_tensor *attention(perk_graph *g, const qwen3 *m, layer_names *names, perk_tensor *x) {
    perk_tensor *normed = norm(g, m, names, "input_norm", x, "input_layernorm.weight");
    perk_tensor *qkv = project_qkv(g, m, names, normed);
    perk_attention_params params = {
        .num_heads = (int32_t)m->heads,
        .num_kv_heads = (int32_t)m->kv_heads,
        .head_dim = (int32_t)m->head_dim,
        .scale = (float)(1 / sqrt((double)m->head_dim)),
        .window = layer_slides(m, names->layer) ? (int32_t)m->window : 0,
        .inv_freq = m->rope.inv_freq,
        .rope_scale = m->rope.scale,
        .q_norm = perk_attach_vector(g, stored(names, "self_attn.q_norm.weight"), m->head_dim),
        .k_norm = perk_attach_vector(g, stored(names, "self_attn.k_norm.weight"), m->head_dim),
        .norm_eps = (float)m->norm_eps,
    };
    perk_tensor *mixed = perk_attention(g, called(names, "attention"), qkv, &params);
    perk_tensor *weight =
        perk_attach_matrix(g, stored(names, "self_attn.o_proj.weight"), m->hidden, m->heads * m->head_dim);
    perk_tensor *bias = m->biased ? perk_attach_vector(g, stored(names, "self_attn.o_proj.bias"), m->hidden) : NULL;
    return perk_linear_residual(g, called(names, "attention_residual"), mixed, weight, bias, x);
}

static perk_tensor *mlp(perk_graph *g, const qwen3 *m, layer_names *names, perk_tensor *x) {
    perk_tensor *normed = norm(g, m, names, "mlp_norm", x, "post_attention_layernorm.weight");
    perk_tensor *weights[] = {perk_attach_matrix(g, stored(names, "mlp.gate_proj.weight"), m->intermediate, m->hidden),
                              perk_attach_matrix(g, stored(names, "mlp.up_proj.weight"), m->intermediate, m->hidden)};
    perk_tensor *gate_up = perk_stack(g, called(names, "gate_up_weight"), weights, 2);
    perk_tensor *both = perk_linear(g, called(names, "gate_up"), normed, gate_up, NULL);
    perk_tensor *inner = perk_silu_mul(g, called(names, "silu_mul"), both);
    perk_tensor *down = perk_attach_matrix(g, stored(names, "mlp.down_proj.weight"), m->hidden, m->intermediate);
    return perk_linear_residual(g, called(names, "mlp_residual"), inner, down, NULL, x);
}

static void build_graph(perk_graph *g, const qwen3 *m) {
    perk_tensor *table = perk_attach_matrix(g, "model.embed_tokens.weight", m->vocab, m->hidden);
    perk_tensor *x = perk_embed(g, "embedding", table);
    for (int64_t layer = 0; layer < m->layers; layer++) {
        layer_names names = {.layer = layer};
        x = attention(g, m, &names, x);
        x = mlp(g, m, &names, x);
    }
    perk_tensor *last = perk_select_rows(g, "last_hidden", x);
    perk_tensor *weight = perk_attach_vector(g, "model.norm.weight", m->hidden);
    perk_tensor *normed = perk_rmsnorm(g, "final_norm", last, weight, (float)m->norm_eps);
    perk_tensor *head = m->tied ? table : perk_attach_matrix(g, "lm_head.weight", m->vocab, m->hidden);
    perk_tensor *logits = perk_logits(g, "logits", normed, head);
    perk_argmax(g, "next_token", logits);
}

void perk_qwen3_build(perk_graph *graph, const json_t *config) {
    qwen3 model = {0};
    perk_error err;
    perk_status status = read_config(&model, config, &err);
    if (status)
        perk_graph_fail(graph, status, "%s", err.message);
    else
        build_graph(graph, &model);
    free(model.rope.inv_freq);
}
