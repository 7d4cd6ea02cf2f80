/* config.json of the decoders, read as transformers reads it: what a missing key means differs from what null
 * means, and both differ between families. */
#include "config.h"
#include "decoder.h"

enum {
    MAX_LAYERS = 1024,
    MAX_WIDTH = 1 << 20,
    MAX_HEADS = 4096,
    MAX_HEAD_DIM = 4096,
    MAX_VOCAB = 1 << 26,
    MAX_EXPERTS = 4096
};

/* ---- what is refused ---- */

typedef struct foreign_field {
    const char *key;
    double harmless; /* the value that changes nothing; so do null and false */
} foreign_field;

/* Fields of related networks that change what is computed. */
static const foreign_field foreign_fields[] = {
    {"pretraining_tp", 1},
    {"rope_interleaved", 0},
    {"attn_logit_softcapping", 0},
    {"final_logit_softcapping", 0},
    {"clip_qkv", 0},
    {"logit_scale", 1},
    {"logits_scaling", 1},
    {"embedding_multiplier", 1},
    {"residual_multiplier", 1},
    {"attention_multiplier", 0},
    {"use_mup", 0},
    {"mup_denominator", 0},
    {"scale_emb", 1},
    {"scale_depth", 0},
    {"dim_model_base", 0},
};
/* Those of networks with experts, where the family has none. */
static const foreign_field expert_fields[] = {{"num_experts", 0}, {"num_local_experts", 0}};

static perk_status refuse_foreign_fields(const foreign_field *fields, size_t count, const json_t *config,
                                         perk_error *err) {
    for (size_t i = 0; i < count; i++) {
        const json_t *value = perk_config_get(config, fields[i].key);
        if (!value || json_is_false(value)) continue;
        if (json_is_number(value) && json_number_value(value) == fields[i].harmless) continue;
        return perk_fail(err, PERK_UNSUPPORTED, "config.json: \"%s\" is not supported; perk computes as with %g",
                         fields[i].key, fields[i].harmless);
    }
    return PERK_OK;
}

static perk_status refuse_unknown(const perk_decoder_family *family, const json_t *config, perk_error *err) {
    const char *activation = NULL, *method = NULL;
    perk_status status = perk_config_string(config, "hidden_act", "silu", &activation, err);
    if (!status && strcmp(activation, "silu") != 0)
        status = perk_fail(err, PERK_UNSUPPORTED, "config.json: \"hidden_act\" %.40s is not supported; %s uses silu",
                           activation, family->name);
    if (!status) status = refuse_foreign_fields(foreign_fields, PERK_COUNT(foreign_fields), config, err);
    if (!status && !family->has_experts)
        status = refuse_foreign_fields(expert_fields, PERK_COUNT(expert_fields), config, err);
    if (status || !perk_config_get(config, "quantization_config")) return status;
    method = json_string_value(perk_config_get(config, "quantization_config.quant_method"));
    return perk_fail(err, PERK_UNSUPPORTED,
                     "config.json: \"quantization_config\": weights quantised by \"%.40s\" are not supported; use the "
                     "bf16 checkpoint",
                     method ? method : "?");
}

/* ---- what is read ---- */

/* An integer whose missing key stands for the family's value (0: it has none), and whose null for `derived`. */
static perk_status read_derived(const json_t *config, const char *key, int64_t of_family, int64_t derived, int64_t min,
                                int64_t max, int64_t *out, perk_error *err) {
    bool is_missing = !json_object_get(config, key);
    return perk_config_i64(config, key, is_missing && of_family ? of_family : derived, min, max, out, err);
}

static perk_status read_heads(perk_decoder *m, const perk_decoder_family *family, const json_t *config,
                              perk_error *err) {
    perk_status status =
        perk_config_i64(config, "num_attention_heads", PERK_CONFIG_REQUIRED, 1, MAX_HEADS, &m->heads, err);
    if (!status)
        status =
            read_derived(config, "num_key_value_heads", family->kv_heads, m->heads, 1, MAX_HEADS, &m->kv_heads, err);
    if (!status)
        status = read_derived(config, "head_dim", family->head_dim, m->hidden / m->heads, 2, MAX_HEAD_DIM, &m->head_dim,
                              err);
    if (status) return status;
    if (m->heads % m->kv_heads != 0)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "config.json: \"num_attention_heads\" (%lld) must be a multiple of \"num_key_value_heads\" "
                         "(%lld)",
                         (long long)m->heads, (long long)m->kv_heads);
    if (m->head_dim < 2 || m->head_dim % 2 != 0)
        return perk_fail(err, PERK_BAD_FORMAT, "config.json: \"head_dim\" (%lld) must be even and not 0",
                         (long long)m->head_dim);
    return PERK_OK;
}

static perk_status read_sizes(perk_decoder *m, const json_t *config, perk_error *err) {
    const int64_t required = PERK_CONFIG_REQUIRED;
    perk_status status = perk_config_i64(config, "vocab_size", required, 1, MAX_VOCAB, &m->vocab, err);
    if (!status) status = perk_config_i64(config, "hidden_size", required, 1, MAX_WIDTH, &m->hidden, err);
    if (!status) status = perk_config_i64(config, "intermediate_size", required, 1, MAX_WIDTH, &m->intermediate, err);
    if (!status) status = perk_config_i64(config, "num_hidden_layers", required, 1, MAX_LAYERS, &m->layers, err);
    return status;
}

/* A switch that the family does not have: the config may only say what is so anyway. */
static perk_status check_fixed(const perk_decoder_family *family, const json_t *config, const char *key, bool fixed,
                               perk_error *err) {
    bool value;
    perk_status status = perk_config_bool(config, key, fixed, &value, err);
    if (!status && value != fixed)
        status = perk_fail(err, PERK_UNSUPPORTED, "config.json: \"%s\" %s is not supported for %s", key,
                           value ? "true" : "false", family->name);
    return status;
}

static perk_status read_biases(perk_decoder *m, const perk_decoder_family *family, const json_t *config,
                               perk_error *err) {
    perk_status status;
    if (family->biases == PERK_BIAS_CONFIGURED) {
        status = perk_config_bool(config, "attention_bias", 0, &m->qkv_bias, err);
        m->out_bias = m->qkv_bias;
    } else {
        m->qkv_bias = family->biases == PERK_BIAS_QKV;
        status = check_fixed(family, config, "attention_bias", m->qkv_bias, err);
    }
    if (status) return status;
    if (family->reads_mlp_bias) return perk_config_bool(config, "mlp_bias", 0, &m->mlp_bias, err);
    return check_fixed(family, config, "mlp_bias", false, err);
}

/* ---- windows ---- */

static perk_status check_layer_types(const perk_decoder *m, const perk_decoder_family *family, perk_error *err) {
    if (!json_is_array(m->layer_types) || json_array_size(m->layer_types) != (size_t)m->layers)
        return perk_fail(err, PERK_BAD_FORMAT, "config.json: \"layer_types\" must list %lld layers",
                         (long long)m->layers);
    for (size_t i = 0; i < (size_t)m->layers; i++) {
        const char *type = json_string_value(json_array_get(m->layer_types, i));
        bool slides = type && !strcmp(type, "sliding_attention");
        if (!type || (!slides && strcmp(type, "full_attention") != 0))
            return perk_fail(err, PERK_UNSUPPORTED,
                             "config.json: \"layer_types\"[%zu] is %.40s; perk knows full_attention and "
                             "sliding_attention",
                             i, type ? type : "no string");
        if (family->windows != PERK_WINDOW_SOME_LAYERS && slides != (m->window > 0))
            return perk_fail(err, PERK_UNSUPPORTED,
                             "config.json: \"layer_types\"[%zu] %s is not supported: all layers of this %s are alike",
                             i, type, family->name);
        if (slides && !m->window)
            return perk_fail(err, PERK_BAD_FORMAT,
                             "config.json: \"layer_types\"[%zu] slides, but \"use_sliding_window\" is off", i);
    }
    return PERK_OK;
}

static perk_status read_windows(perk_decoder *m, const perk_decoder_family *family, const json_t *config,
                                perk_error *err) {
    const json_t *given = json_object_get(config, "sliding_window");
    bool slides = true;
    perk_status status = perk_config_i64(config, "sliding_window", 4096, 1, INT32_MAX, &m->window, err);
    if (!status && family->windows != PERK_WINDOW_ALL_LAYERS)
        status =
            perk_config_bool(config, "use_sliding_window", family->windows == PERK_WINDOW_NEVER && given, &slides, err);
    if (status) return status;
    if (!slides || json_is_null(given)) m->window = 0;
    if (m->window && family->windows == PERK_WINDOW_NEVER)
        return perk_fail(err, PERK_UNSUPPORTED, "config.json: \"sliding_window\" is not supported for %s",
                         family->name);
    if (family->windows == PERK_WINDOW_SOME_LAYERS)
        status = perk_config_i64(config, "max_window_layers", 28, 0, INT32_MAX, &m->first_window, err);
    if (family->windows != PERK_WINDOW_ALL_IF_USED) m->layer_types = perk_config_get(config, "layer_types");
    if (!status && m->layer_types) status = check_layer_types(m, family, err);
    return status;
}

/* ---- experts ---- */

static perk_status read_dense_layers(perk_decoder *m, const json_t *config, perk_error *err) {
    m->dense_layers = perk_config_get(config, "mlp_only_layers");
    bool is_list = !m->dense_layers || json_is_array(m->dense_layers);
    for (size_t i = 0; is_list && i < json_array_size(m->dense_layers); i++)
        is_list = json_is_integer(json_array_get(m->dense_layers, i));
    if (is_list) return PERK_OK;
    return perk_fail(err, PERK_BAD_FORMAT, "config.json: \"mlp_only_layers\" must be a list of layer numbers");
}

static perk_status read_experts(perk_decoder *m, const perk_decoder_family *family, const json_t *config,
                                perk_error *err) {
    if (!family->has_experts) return PERK_OK;
    const char *key = json_object_get(config, "num_experts") ? "num_experts" : "num_local_experts";
    perk_status status = perk_config_i64(config, key, 128, 0, MAX_EXPERTS, &m->experts, err);
    if (!status) status = perk_config_i64(config, "num_experts_per_tok", 8, 1, MAX_EXPERTS, &m->top_experts, err);
    if (!status) status = perk_config_i64(config, "moe_intermediate_size", 768, 1, MAX_WIDTH, &m->expert_width, err);
    if (!status) status = perk_config_bool(config, "norm_topk_prob", 0, &m->normalises_experts, err);
    if (!status) status = perk_config_i64(config, "decoder_sparse_step", 1, 1, INT32_MAX, &m->sparse_step, err);
    if (!status) status = read_dense_layers(m, config, err);
    if (!status && m->experts && m->top_experts > m->experts)
        status = perk_fail(err, PERK_BAD_FORMAT,
                           "config.json: \"num_experts_per_tok\" (%lld) must be at most \"num_experts\" (%lld)",
                           (long long)m->top_experts, (long long)m->experts);
    return status;
}

perk_status perk_decoder_read(perk_decoder *out, const perk_decoder_family *family, const json_t *config,
                              perk_error *err) {
    *out = (perk_decoder){.norms_heads = family->norms_heads};
    perk_status status = refuse_unknown(family, config, err);
    if (!status) status = read_sizes(out, config, err);
    if (!status) status = read_heads(out, family, config, err);
    if (!status) status = read_biases(out, family, config, err);
    if (!status) status = read_windows(out, family, config, err);
    if (!status) status = read_experts(out, family, config, err);
    if (!status) status = perk_config_f64(config, "rms_norm_eps", 1e-6, 0, 1, &out->norm_eps, err);
    if (!status) status = perk_config_bool(config, "tie_word_embeddings", 0, &out->is_tied, err);
    if (!status) status = perk_rope_read(&out->rope, config, (int32_t)out->head_dim, err);
    return status;
}
