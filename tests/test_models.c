/* The builders take or refuse every kind of config.json; models open with their weights or say what is wrong. */
#include "../models/decoder.h"
#include "../models/models.h"
#include "model.h"
#include "ops/op.h"
#include "temp.h"
#include "test.h"

#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures"

static perk_error err;

static perk_graph *new_graph(void) {
    perk_graph *g;
    CHECK_OK(perk_graph_create(&g, "test", &err));
    return g;
}

/* ---- config.json ---- */

typedef void builder(perk_graph *graph, const json_t *config);

#define SIZES                                                                                                          \
    "\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":3,"                          \
    "\"num_attention_heads\":4,\"num_key_value_heads\":4"

/* The graph of {SIZES, extra}, or its failure. */
static perk_status build_as(builder *family, const char *extra, perk_graph **out) {
    json_error_t where;
    char *text = perk_format("{%s%s%s}", SIZES, *extra ? "," : "", extra);
    json_t *config = json_loads(text, 0, &where);
    CHECK(config, "%s: %s", text, where.text);
    *out = new_graph();
    family(*out, config);
    json_decref(config);
    free(text);
    return perk_graph_check(*out, &err);
}

static perk_status build(const char *extra, perk_graph **out) { return build_as(perk_qwen3_build, extra, out); }

static void build_refused(builder *family, const char *extra, perk_status status, const char *text) {
    perk_graph *g;
    CHECK_FAILS(build_as(family, extra, &g), status, text);
    perk_graph_free(g);
}

static const perk_attention_params *attention_of(const perk_graph *g, int layer) {
    for (int i = 0; i < g->op_count; i++)
        if (g->ops[i]->type == &perk_op_attention && g->ops[i]->kv_layer == layer) return &g->ops[i]->attention;
    CHECK(0, "no layer %d", layer);
    return NULL;
}

static void test_config_accepted(void) {
    perk_graph *g;
    CHECK_OK(build("", &g));
    CHECK(g->kv_layer_count == 3 && g->op_count == 1 + 3 * 8 + 4);
    CHECK(attention_of(g, 0)->head_dim == 128 && attention_of(g, 0)->num_kv_heads == 4,
          "what the architecture defaults to");
    CHECK(perk_graph_find(g, "lm_head.weight") && !perk_graph_find(g, "layers.0.qkv_bias"));
    perk_graph_free(g);

    CHECK_OK(
        build("\"head_dim\":null,\"num_key_value_heads\":2,\"tie_word_embeddings\":true,\"attention_bias\":true", &g));
    CHECK(attention_of(g, 2)->head_dim == 16 && attention_of(g, 2)->num_kv_heads == 2);
    CHECK(!perk_graph_find(g, "lm_head.weight") && perk_graph_find(g, "layers.2.qkv_bias"));
    CHECK(perk_graph_find(g, "model.layers.1.self_attn.o_proj.bias"));
    perk_graph_free(g);

    CHECK_OK(build("\"use_sliding_window\":true,\"sliding_window\":5,\"max_window_layers\":1", &g));
    CHECK(attention_of(g, 0)->window == 0 && attention_of(g, 1)->window == 5 && attention_of(g, 2)->window == 5);
    perk_graph_free(g);
    CHECK_OK(build("\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":0", &g));
    CHECK(attention_of(g, 0)->window == 0);
    perk_graph_free(g);
    CHECK_OK(build("\"use_sliding_window\":false,\"sliding_window\":5,\"max_window_layers\":0", &g));
    CHECK(attention_of(g, 0)->window == 0);
    perk_graph_free(g);

    CHECK_OK(build("\"rope_theta\":100.0,\"head_dim\":4,\"rope_scaling\":null", &g));
    CHECK(attention_of(g, 0)->inv_freq[0] == 1 && attention_of(g, 0)->inv_freq[1] == 0.1f);
    perk_graph_free(g);
    CHECK_OK(build(
        "\"rope_theta\":7.0,\"head_dim\":4,\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":100}", &g));
    CHECK(attention_of(g, 0)->inv_freq[1] == 0.1f, "theta within the group wins");
    perk_graph_free(g);
    CHECK_OK(build("\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,\"attention_factor\":1.5}", &g));
    CHECK(attention_of(g, 0)->rope_scale == 1.5f);
    perk_graph_free(g);
}

/* Which tensors of layer 2 a graph has. */
static bool has(const perk_graph *g, const char *name) {
    char path[96];
    snprintf(path, sizeof path, "model.layers.2.%s", name);
    return perk_graph_find(g, path) != NULL;
}

static void check_windows(const perk_graph *g, int first, int second, int third) {
    CHECK(attention_of(g, 0)->window == first && attention_of(g, 1)->window == second &&
              attention_of(g, 2)->window == third,
          "%d, %d, %d", attention_of(g, 0)->window, attention_of(g, 1)->window, attention_of(g, 2)->window);
}

static void test_llama(void) {
    perk_graph *g;
    CHECK_OK(build_as(perk_llama_build, "", &g));
    CHECK(g->kv_layer_count == 3 && attention_of(g, 0)->head_dim == 16 && !attention_of(g, 2)->q_norm);
    CHECK(!has(g, "self_attn.q_norm.weight") && !has(g, "self_attn.q_proj.bias") && !has(g, "mlp.up_proj.bias"));
    check_windows(g, 0, 0, 0);
    perk_graph_free(g);

    CHECK_OK(build_as(perk_llama_build,
                      "\"head_dim\":32,\"num_key_value_heads\":null,\"attention_bias\":true,\"mlp_bias\":true,"
                      "\"pretraining_tp\":1,\"tie_word_embeddings\":true,\"layer_types\":null,"
                      "\"use_sliding_window\":false,\"sliding_window\":8",
                      &g));
    CHECK(attention_of(g, 1)->head_dim == 32 && attention_of(g, 1)->num_kv_heads == 4);
    CHECK(has(g, "self_attn.q_proj.bias") && has(g, "self_attn.o_proj.bias") && has(g, "mlp.gate_proj.bias"));
    CHECK(has(g, "mlp.down_proj.bias") && !perk_graph_find(g, "lm_head.weight"));
    check_windows(g, 0, 0, 0);
    perk_graph_free(g);

    build_refused(perk_llama_build, "\"pretraining_tp\":2", PERK_UNSUPPORTED, "pretraining_tp");
    build_refused(perk_llama_build, "\"sliding_window\":8", PERK_UNSUPPORTED, "sliding_window");
    build_refused(perk_llama_build, "\"layer_types\":[\"full_attention\",\"sliding_attention\",\"full_attention\"]",
                  PERK_UNSUPPORTED, "layer_types");
    build_refused(perk_llama_build, "\"mlp_bias\":1", PERK_BAD_FORMAT, "mlp_bias");
    build_refused(perk_llama_build, "\"hidden_size\":3", PERK_BAD_FORMAT, "head_dim");
}

static void test_mistral(void) {
    static const char all_full[] = "\"layer_types\":[\"full_attention\",\"full_attention\",\"full_attention\"]";
    perk_graph *g;
    CHECK_OK(build_as(perk_mistral_build, "", &g));
    CHECK(attention_of(g, 0)->head_dim == 16 && !has(g, "self_attn.q_norm.weight") && !has(g, "self_attn.q_proj.bias"));
    check_windows(g, 4096, 4096, 4096);
    perk_graph_free(g);
    CHECK_OK(build_as(perk_mistral_build, "\"sliding_window\":5,\"max_window_layers\":2", &g));
    check_windows(g, 5, 5, 5);
    perk_graph_free(g);
    char *text = perk_format("\"sliding_window\":null,%s", all_full);
    CHECK_OK(build_as(perk_mistral_build, text, &g));
    check_windows(g, 0, 0, 0);
    perk_graph_free(g);
    free(text);

    build_refused(perk_mistral_build, all_full, PERK_UNSUPPORTED, "layer_types");
    build_refused(perk_mistral_build, "\"attention_bias\":true", PERK_UNSUPPORTED, "attention_bias");
    build_refused(perk_mistral_build, "\"mlp_bias\":true", PERK_UNSUPPORTED, "mlp_bias");
    /* a missing key means 8 heads, null as many as there are query heads */
    json_t *config = json_loads("{" SIZES "}", 0, NULL);
    json_object_del(config, "num_key_value_heads");
    g = new_graph();
    perk_mistral_build(g, config);
    CHECK_FAILS(perk_graph_check(g, &err), PERK_BAD_FORMAT, "(8)");
    perk_graph_free(g);
    json_decref(config);
    CHECK_OK(build_as(perk_mistral_build, "\"num_key_value_heads\":null", &g));
    perk_graph_free(g);
}

static void test_qwen2(void) {
    perk_graph *g;
    CHECK_OK(build_as(perk_qwen2_build, "\"max_window_layers\":0", &g));
    CHECK(attention_of(g, 0)->head_dim == 16 && !has(g, "self_attn.q_norm.weight"));
    CHECK(has(g, "self_attn.q_proj.bias") && has(g, "self_attn.v_proj.bias") && !has(g, "self_attn.o_proj.bias"));
    CHECK(!has(g, "mlp.up_proj.bias"));
    check_windows(g, 0, 0, 0);
    perk_graph_free(g);
    CHECK_OK(build_as(perk_qwen2_build,
                      "\"use_sliding_window\":true,\"sliding_window\":5,\"max_window_layers\":2,"
                      "\"attention_bias\":true",
                      &g));
    check_windows(g, 0, 0, 5);
    perk_graph_free(g);
    build_refused(perk_qwen2_build, "\"attention_bias\":false", PERK_UNSUPPORTED, "attention_bias");
    build_refused(perk_qwen2_build, "\"mlp_bias\":true", PERK_UNSUPPORTED, "mlp_bias");
}

/* Which layers have experts; the others have one MLP. */
static void check_sparse(const perk_graph *g, bool first, bool second, bool third) {
    const bool wanted[] = {first, second, third};
    for (int layer = 0; layer < 3; layer++) {
        char router[64], gate[64];
        snprintf(router, sizeof router, "model.layers.%d.mlp.gate.weight", layer);
        snprintf(gate, sizeof gate, "model.layers.%d.mlp.gate_proj.weight", layer);
        CHECK((perk_graph_find(g, router) != NULL) == wanted[layer], "layer %d", layer);
        CHECK((perk_graph_find(g, gate) != NULL) == !wanted[layer], "layer %d", layer);
    }
}

#define MOE "\"num_experts\":6,\"num_experts_per_tok\":2,\"moe_intermediate_size\":40"

static void test_qwen3_moe(void) {
    perk_graph *g;
    CHECK_OK(build_as(perk_qwen3_moe_build, MOE, &g));
    check_sparse(g, true, true, true);
    check_windows(g, 0, 0, 0);
    CHECK(attention_of(g, 0)->head_dim == 16 && has(g, "self_attn.q_norm.weight"));
    const perk_tensor *gate = perk_graph_find(g, "model.layers.2.mlp.experts.*.gate_proj.weight");
    const perk_tensor *down = perk_graph_find(g, "model.layers.2.mlp.experts.*.down_proj.weight");
    const perk_tensor *routed = perk_graph_find(g, "layers.2.route.experts");
    CHECK(gate && gate->experts == 6 && gate->rows == 40 && gate->cols == 64);
    CHECK(down && down->experts == 6 && down->rows == 64 && down->cols == 40);
    CHECK(routed && routed->cols == 2 && !routed->producer->normalises);
    perk_graph_free(g);

    /* what is missing, what older files call otherwise, what switches experts off */
    CHECK_OK(build_as(perk_qwen3_moe_build, "\"norm_topk_prob\":true,\"decoder_sparse_step\":2", &g));
    check_sparse(g, false, true, false);
    gate = perk_graph_find(g, "model.layers.1.mlp.experts.*.gate_proj.weight");
    routed = perk_graph_find(g, "layers.1.route.experts");
    CHECK(gate->experts == 128 && gate->rows == 768 && routed->cols == 8 && routed->producer->normalises);
    perk_graph_free(g);
    CHECK_OK(build_as(perk_qwen3_moe_build,
                      "\"num_local_experts\":16,\"mlp_only_layers\":[0,1,99],\"use_sliding_window\":true,"
                      "\"sliding_window\":5,\"max_window_layers\":2,\"layer_types\":[\"full_attention\"]",
                      &g));
    check_sparse(g, false, false, true);
    check_windows(g, 5, 5, 5);
    perk_graph_free(g);
    CHECK_OK(build_as(perk_qwen3_moe_build, "\"num_experts\":0,\"mlp_only_layers\":null", &g));
    check_sparse(g, false, false, false);
    perk_graph_free(g);

    build_refused(perk_qwen3_moe_build, MOE ",\"mlp_only_layers\":[\"0\"]", PERK_BAD_FORMAT, "mlp_only_layers");
    build_refused(perk_qwen3_moe_build, MOE ",\"mlp_only_layers\":0", PERK_BAD_FORMAT, "mlp_only_layers");
    build_refused(perk_qwen3_moe_build, MOE ",\"decoder_sparse_step\":0", PERK_BAD_FORMAT, "decoder_sparse_step");
    build_refused(perk_qwen3_moe_build, "\"num_experts\":7", PERK_BAD_FORMAT, "num_experts_per_tok");
    build_refused(perk_qwen3_moe_build, MOE ",\"mlp_bias\":true", PERK_UNSUPPORTED, "mlp_bias");
    build_refused(perk_qwen3_build, "\"num_experts\":8", PERK_UNSUPPORTED, "num_experts");
    build_refused(perk_llama_build, "\"num_local_experts\":8", PERK_UNSUPPORTED, "num_local_experts");
}

static void test_config_refused(void) {
    static const struct {
        const char *extra;
        perk_status status;
        const char *text;
    } cases[] = {
        {"\"hidden_act\":\"gelu\"", PERK_UNSUPPORTED, "gelu"},
        {"\"mlp_bias\":true", PERK_UNSUPPORTED, "mlp_bias"},
        {"\"logits_scaling\":8.0", PERK_UNSUPPORTED, "logits_scaling"},
        {"\"use_mup\":true", PERK_UNSUPPORTED, "use_mup"},
        {"\"attn_logit_softcapping\":50.0", PERK_UNSUPPORTED, "attn_logit_softcapping"},
        {"\"clip_qkv\":\"8\"", PERK_UNSUPPORTED, "clip_qkv"},
        {"\"quantization_config\":{\"quant_method\":\"fp8\"}", PERK_UNSUPPORTED, "fp8"},
        {"\"quantization_config\":{}", PERK_UNSUPPORTED, "quantised"},
        {"\"rope_scaling\":{\"rope_type\":\"dynamic\",\"factor\":2.0}", PERK_UNSUPPORTED, "\"dynamic\""},
        {"\"rope_parameters\":{\"rope_type\":\"longrope\"}", PERK_UNSUPPORTED, "\"longrope\""},
        {"\"rope_scaling\":{\"type\":\"linear\"}", PERK_BAD_FORMAT, "rope_scaling.factor"},
        {"\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4}",
         PERK_BAD_FORMAT, "high_freq_factor"},
        {"\"rope_scaling\":{\"type\":7}", PERK_BAD_FORMAT, "rope_scaling.type"},
        {"\"rope_scaling\":[1]", PERK_BAD_FORMAT, "rope_scaling"},
        {"\"rope_parameters\":[1]", PERK_BAD_FORMAT, "rope_parameters"},
        {"\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"default\"}}", PERK_UNSUPPORTED, "type of layer"},
        {"\"partial_rotary_factor\":0.5", PERK_UNSUPPORTED, "partial_rotary_factor"},
        {"\"rope_theta\":-1", PERK_BAD_FORMAT, "rope_theta"},
        {"\"num_key_value_heads\":3", PERK_BAD_FORMAT, "num_key_value_heads"},
        {"\"num_key_value_heads\":0", PERK_BAD_FORMAT, "num_key_value_heads"},
        {"\"head_dim\":33", PERK_BAD_FORMAT, "even"},
        {"\"head_dim\":\"128\"", PERK_BAD_FORMAT, "head_dim"},
        {"\"rms_norm_eps\":-1", PERK_BAD_FORMAT, "rms_norm_eps"},
        {"\"tie_word_embeddings\":\"yes\"", PERK_BAD_FORMAT, "tie_word_embeddings"},
        {"\"sliding_window\":0", PERK_BAD_FORMAT, "sliding_window"},
        {"\"layer_types\":[\"full_attention\"]", PERK_BAD_FORMAT, "3 layers"},
        {"\"layer_types\":[\"full_attention\",\"full_attention\",\"linear_attention\"]", PERK_UNSUPPORTED,
         "linear_attention"},
        {"\"layer_types\":[\"full_attention\",\"full_attention\",4]", PERK_UNSUPPORTED, "no string"},
        {"\"layer_types\":[\"full_attention\",\"full_attention\",\"sliding_attention\"]", PERK_BAD_FORMAT,
         "use_sliding_window"},
    };
    for (size_t i = 0; i < PERK_COUNT(cases); i++)
        build_refused(perk_qwen3_build, cases[i].extra, cases[i].status, cases[i].text);
}

static void test_sizes_required(void) {
    const char *sizes[] = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                           "num_attention_heads"};
    for (size_t i = 0; i < PERK_COUNT(sizes); i++) {
        json_t *config = json_loads("{" SIZES "}", 0, NULL);
        perk_graph *g = new_graph();
        json_object_del(config, sizes[i]);
        perk_qwen3_build(g, config);
        CHECK_FAILS(perk_graph_check(g, &err), PERK_BAD_FORMAT, sizes[i]);
        perk_graph_free(g);
        json_decref(config);
    }
}

/* Any value under any key: a graph or a message, never a crash. */
static void test_odd_values_of(builder *family, const char *fixture) {
    static const char *values[] = {"null",
                                   "true",
                                   "-1",
                                   "0",
                                   "1",
                                   "2",
                                   "7",
                                   "1e300",
                                   "-1e-300",
                                   "3.5",
                                   "1000000",
                                   "9223372036854775807",
                                   "\"\"",
                                   "\"yarn\"",
                                   "\"full_attention\"",
                                   "[]",
                                   "[null]",
                                   "{}",
                                   "{\"type\":\"yarn\"}",
                                   "{\"rope_type\":\"llama3\"}"};
    static const char *groups[] = {"default", "linear", "llama3", "yarn"};
    int built = 0, refused = 0;
    for (size_t group = 0; group < PERK_COUNT(groups); group++) {
        json_t *base = json_load_file(fixture, 0, NULL);
        json_t *rope = json_pack("{s:s,s:f,s:f,s:f,s:i,s:f,s:f,s:b}", "rope_type", groups[group], "factor", 2.0,
                                 "low_freq_factor", 1.0, "high_freq_factor", 4.0, "original_max_position_embeddings",
                                 64, "beta_fast", 32.0, "beta_slow", 1.0, "truncate", 1);
        json_object_set(base, "rope_parameters", rope);
        for (int nested = 0; nested < 2; nested++) {
            const char *key;
            json_t *unused;
            json_object_foreach(nested ? rope : base, key, unused) {
                for (size_t i = 0; i < PERK_COUNT(values); i++) {
                    json_t *config = json_deep_copy(base);
                    json_t *target = nested ? json_object_get(config, "rope_parameters") : config;
                    json_object_set_new(target, key, json_loads(values[i], JSON_DECODE_ANY, NULL));
                    perk_graph *g = new_graph();
                    family(g, config);
                    if (perk_graph_check(g, &err))
                        refused++;
                    else
                        built++;
                    perk_graph_free(g);
                    json_decref(config);
                }
            }
        }
        json_decref(rope);
        json_decref(base);
    }
    CHECK(built > 100 && refused > 100, "%d built, %d refused", built, refused);
}

static void test_config_odd_values(void) {
    test_odd_values_of(perk_qwen3_build, FIXTURES "/qwen3/window_types/config.json");
    test_odd_values_of(perk_qwen2_build, FIXTURES "/qwen2/window/config.json");
    test_odd_values_of(perk_llama_build, FIXTURES "/llama/bias/config.json");
    test_odd_values_of(perk_qwen3_moe_build, FIXTURES "/qwen3_moe/some_layers/config.json");
    test_odd_values_of(perk_mistral_build, FIXTURES "/mistral/full/config.json");
}

/* ---- model folders ---- */

/* A folder with the weights of fixture "bias" and its config with `key` set to `value` (dropped where NULL). */
static void open_changed(const char *key, json_t *value, perk_status status, const char *text) {
    temp_folder folder = temp_make();
    char path[1024];
    perk_model *model;
    CHECK(symlink(FIXTURES "/qwen3/bias/model.safetensors",
                  temp_path(&folder, "model.safetensors", path, sizeof path)) == 0);
    json_t *config = json_load_file(FIXTURES "/qwen3/bias/config.json", 0, NULL);
    if (value)
        json_object_set_new(config, key, value);
    else
        json_object_del(config, key);
    CHECK(json_dump_file(config, temp_path(&folder, "config.json", path, sizeof path), 0) == 0);
    json_decref(config);
    if (status == PERK_OK)
        CHECK_OK(perk_model_open(&model, folder.path, false, 0, &err));
    else
        CHECK_FAILS(perk_model_open(&model, folder.path, false, 0, &err), status, text);
    CHECK((model != NULL) == (status == PERK_OK));
    if (model && !strcmp(key, "eos_token_id"))
        CHECK(model->eos_count == 2 && model->eos_ids[0] == 3 && model->eos_ids[1] == 9);
    perk_model_free(model);
    temp_remove(&folder);
}

static void test_models(void) {
    perk_model *model;
    CHECK_OK(perk_model_open(&model, FIXTURES "/qwen3/gqa5_odd", false, 0, &err));
    CHECK(!strcmp(model->architecture, "Qwen3ForCausalLM") && model->vocab_size == 331 && model->max_positions == 256);
    CHECK(model->eos_count == 0);
    perk_model_free(model);
    perk_model_free(NULL);
    CHECK_FAILS(perk_model_open(&model, FIXTURES "/qwen3/nothing", false, 0, &err), PERK_NOT_FOUND, "nothing");
    CHECK_FAILS(perk_model_open(&model, FIXTURES "/qwen3/nothing", true, 0, &err), PERK_NOT_FOUND, "nothing");
    CHECK_FAILS(perk_model_open(&model, FIXTURES "/qwen3/bias/config.json", false, 0, &err), PERK_NOT_FOUND,
                "without weights");

    open_changed("eos_token_id", json_pack("[i,i]", 3, 9), PERK_OK, "");
    open_changed("architectures", json_pack("[s]", "GPT2LMHeadModel"), PERK_UNSUPPORTED, "knows LlamaForCausalLM");
    open_changed("architectures", NULL, PERK_BAD_FORMAT, "architectures");
    open_changed("architectures", json_pack("[]"), PERK_BAD_FORMAT, "architectures");
    open_changed("num_hidden_layers", json_integer(3), PERK_BAD_FORMAT, "layer_types");
    open_changed("attention_bias", json_false(), PERK_OK, "");
    open_changed("tie_word_embeddings", json_false(), PERK_NOT_FOUND, "lm_head.weight");
    open_changed("intermediate_size", json_integer(50), PERK_BAD_FORMAT, "[50, 32]");
    open_changed("head_dim", json_integer(16), PERK_BAD_FORMAT, "q_proj");
    open_changed("max_position_embeddings", json_string("many"), PERK_BAD_FORMAT, "max_position_embeddings");
    open_changed("eos_token_id", json_string("x"), PERK_BAD_FORMAT, "eos_token_id");
}

/* ---- weights by name ---- */

/* What the log says about a folder with the weights of `fixture` and its config, changed. "" for nothing. */
typedef struct said {
    char text[1024];
    int count;
} said;

static void hear(void *user, perk_log_level level, const char *message) {
    said *heard = user;
    CHECK(level == PERK_LOG_WARNING);
    snprintf(heard->text, sizeof heard->text, "%s", message);
    heard->count++;
}

static said unread_of(const char *fixture, const char *key, json_t *value) {
    temp_folder folder = temp_make();
    char path[1024], stored[512];
    perk_model *model;
    said heard = {0};
    snprintf(stored, sizeof stored, FIXTURES "/%s/model.safetensors", fixture);
    CHECK(symlink(stored, temp_path(&folder, "model.safetensors", path, sizeof path)) == 0);
    snprintf(stored, sizeof stored, FIXTURES "/%s/config.json", fixture);
    json_t *config = json_load_file(stored, 0, NULL);
    json_object_set_new(config, key, value);
    CHECK(json_dump_file(config, temp_path(&folder, "config.json", path, sizeof path), 0) == 0);
    json_decref(config);
    CHECK_OK(perk_model_open(&model, folder.path, false, 0, &err));
    perk_model_report_unread(model, &(perk_log){hear, &heard});
    perk_model_free(model);
    temp_remove(&folder);
    return heard;
}

static void test_unread_weights(void) {
    said experts = unread_of("qwen3_moe/some_layers", "num_local_experts", json_integer(5));
    CHECK(experts.count == 0, "%s", experts.text);
    said heard = unread_of("qwen3/bias", "attention_bias", json_true());
    CHECK(heard.count == 0, "%s", heard.text);
    heard = unread_of("qwen3/bias", "attention_bias", json_false());
    CHECK(heard.count == 1 && strstr(heard.text, "8 stored tensors") && strstr(heard.text, "_proj.bias, ") &&
              strstr(heard.text, ", ...;"),
          "%s", heard.text);
    heard = unread_of("qwen3/gqa1_fp32", "tie_word_embeddings", json_true());
    CHECK(heard.count == 0, "a tied model's copy of the table is harmless: %s", heard.text);
    const perk_weight_table *table = &perk_decoder_weights;
    CHECK(perk_weight_may_be_left(table, "model.layers.31.self_attn.rotary_emb.inv_freq"));
    CHECK(!perk_weight_may_be_left(table, "model.layers..self_attn.rotary_emb.inv_freq"));
    CHECK(!perk_weight_may_be_left(table, "model.layers.3.self_attn.rotary_emb.inv_freq2"));
    CHECK(!perk_weight_may_be_left(table, "model.layers.3.self_attn.q_proj.weight"));
}

/* What a split needs: parts of one matrix are divided alike, and a bias as its matrix gives outputs. */
static void test_weight_table(void) {
    const perk_weight_table *table = &perk_decoder_weights;
    for (size_t i = 0; i < table->count; i++) {
        const perk_weight_row *row = &table->rows[i];
        int parts = 0, same_name = 0;
        CHECK(strlen(row->stored) < 90 && (row->target || row->may_be_left));
        for (size_t k = 0; k < table->count; k++) {
            const perk_weight_row *other = &table->rows[k];
            same_name += !strcmp(row->stored, other->stored);
            if (!row->target || !other->target || strcmp(row->target, other->target) != 0) continue;
            parts++;
            CHECK(row->split == other->split && !row->rows == !other->rows &&
                      (!row->rows || row->cols == other->cols) && row->needs == other->needs,
                  "%s", row->stored);
        }
        CHECK(parts <= PERK_STACK_MAX && same_name == 1, "%s", row->stored);
        CHECK(row->rows || row->split != PERK_SPLIT_ROW, "%s: a vector has no inputs to divide", row->stored);
    }
    perk_graph *g = new_graph();
    perk_weight_map map = {.graph = g, .table = table};
    CHECK(!perk_weight_find(&map, "layers.#.nothing", 0));
    CHECK_FAILS(perk_graph_check(g, &err), PERK_INTERNAL, "layers.#.nothing");
    perk_graph_free(g);
}

int main(void) {
    test_config_accepted();
    test_llama();
    test_mistral();
    test_qwen2();
    test_qwen3_moe();
    test_config_refused();
    test_sizes_required();
    test_config_odd_values();
    test_models();
    test_unread_weights();
    test_weight_table();
    return 0;
}
