/* The graph API refuses what makes no sense; the Qwen3 builder takes or refuses every kind of config.json; models open
 * with their weights or say what is wrong. */
#include "../models/models.h"
#include "model.h"
#include "ops/op.h"
#include "temp.h"
#include "test.h"

#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures/qwen3"

static perk_error err;

/* ---- layer calls ---- */

static perk_graph *new_graph(void) {
    perk_graph *g;
    CHECK_OK(perk_graph_create(&g, "test", &err));
    return g;
}

/* The graph failed with `text`; frees it. */
static void check_refused(perk_graph *g, const char *text) {
    CHECK_FAILS(perk_graph_check(g, &err), PERK_INVALID_ARGUMENT, text);
    perk_graph_free(g);
}

static void test_good_graph(void) {
    perk_graph *g = new_graph();
    perk_tensor *table = perk_attach_matrix(g, "table", 50, 8);
    perk_tensor *x = perk_embed(g, "x", table);
    perk_tensor *y = perk_rmsnorm(g, "y", x, perk_attach_vector(g, "norm", 8), 1e-6f);
    perk_tensor *logits = perk_logits(g, "logits", perk_select_rows(g, "rows", y), table);
    perk_tensor *token = perk_argmax(g, "token", logits);
    CHECK_OK(perk_graph_check(g, &err));
    CHECK(g->op_count == 5 && logits->dtype == PERK_F32 && logits->cols == 50 && token->dtype == PERK_I32);
    CHECK(x->row_kind == PERK_ROWS_TOKENS && logits->row_kind == PERK_ROWS_LOGITS);
    CHECK(perk_graph_find(g, "y") == y && !perk_graph_find(g, "z") && y->producer == g->ops[1]);
    CHECK(perk_attach_matrix(g, "table", 50, 8) == table, "a tied weight is one tensor");
    CHECK(perk_stack(g, "none", (perk_tensor *[]){NULL, NULL}, 2) == NULL);
    perk_keep(g, y);
    CHECK(y->kept);
    CHECK_OK(perk_graph_check(g, &err));
    for (int i = 0; i < g->op_count; i++) CHECK(g->ops[i]->type->reference && g->ops[i]->index == i);
    perk_graph_free(g);
    perk_graph_free(NULL);
}

static void test_stack(void) {
    perk_graph *g = new_graph();
    perk_tensor *a = perk_attach_matrix(g, "a", 3, 8), *b = perk_attach_matrix(g, "b", 5, 8);
    perk_tensor *ab = perk_stack(g, "ab", (perk_tensor *[]){a, b}, 2);
    CHECK(ab && ab->rows == 8 && ab->cols == 8 && ab->part_count == 2);
    perk_stack(g, "abc", (perk_tensor *[]){a, perk_attach_matrix(g, "c", 3, 9)}, 2);
    check_refused(g, "stack abc");
    g = new_graph();
    a = perk_attach_matrix(g, "a", 3, 8);
    perk_stack(g, "half", (perk_tensor *[]){a, NULL}, 2);
    check_refused(g, "half");
    g = new_graph();
    a = perk_attach_matrix(g, "a", 3, 8);
    perk_stack(g, "five", (perk_tensor *[]){a, a, a, a, a}, 5);
    check_refused(g, "5 parts");
}

static void test_refusals(void) {
    perk_graph *g = new_graph();
    perk_rmsnorm(g, "n", perk_input(g, "x", 8), perk_attach_vector(g, "w", 9), 1e-6f);
    perk_input(g, "later", 8);
    CHECK(!perk_graph_find(g, "later"), "calls after the first failure do nothing");
    check_refused(g, "rmsnorm n");
    g = new_graph();
    perk_linear(g, "l", perk_input(g, "x", 8), perk_attach_matrix(g, "w", 4, 7), NULL);
    check_refused(g, "linear l");
    g = new_graph();
    perk_linear(g, "l", perk_input(g, "x", 8), perk_attach_matrix(g, "w", 4, 8), perk_attach_vector(g, "b", 5));
    check_refused(g, "bias b");
    g = new_graph();
    perk_linear_residual(g, "l", perk_input(g, "x", 8), perk_attach_matrix(g, "w", 4, 8), NULL, perk_input(g, "r", 5));
    check_refused(g, "residual r");
    g = new_graph();
    perk_silu_mul(g, "s", perk_input(g, "x", 7));
    check_refused(g, "even");
    g = new_graph();
    perk_argmax(g, "a", perk_input(g, "x", 8));
    check_refused(g, "fp32");
    g = new_graph();
    perk_input(g, "x", 8);
    perk_input(g, "x", 8);
    check_refused(g, "already");
    g = new_graph();
    perk_attach_matrix(g, "w", 0, 8);
    check_refused(g, "not a shape");
    g = new_graph();
    perk_rmsnorm(g, "n", NULL, perk_attach_vector(g, "w", 9), 1e-6f);
    check_refused(g, "NULL");
    g = new_graph();
    perk_graph *other = new_graph();
    perk_silu_mul(g, "s", perk_input(other, "x", 8));
    perk_graph_free(other);
    check_refused(g, "another graph");
}

static void test_attention_refusals(void) {
    const float frequencies[4] = {1, 1, 1, 1};
    const perk_attention_params good = {
        .num_heads = 4, .num_kv_heads = 2, .head_dim = 8, .scale = 1, .inv_freq = frequencies, .rope_scale = 1};
    for (int i = 0; i < 6; i++) {
        perk_graph *g = new_graph();
        perk_tensor *qkv = perk_input(g, "qkv", i == 5 ? 63 : 64);
        perk_attention_params p = good;
        if (i == 1) p.num_kv_heads = 3;
        if (i == 2) p.head_dim = 7;
        if (i == 3) p.inv_freq = NULL;
        if (i == 4) p.q_norm = perk_attach_vector(g, "q_norm", 9);
        perk_tensor *out = perk_attention(g, "a", qkv, &p);
        if (i) {
            check_refused(g, "attention a");
            continue;
        }
        CHECK_OK(perk_graph_check(g, &err));
        CHECK(out->cols == 32 && g->kv_layer_count == 1 && g->ops[0]->attention.inv_freq != frequencies);
        perk_graph_free(g);
    }
}

/* ---- config.json ---- */

#define SIZES                                                                                                          \
    "\"vocab_size\":100,\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":3,"                          \
    "\"num_attention_heads\":4"

/* The graph of {SIZES, extra}, or its failure. */
static perk_status build(const char *extra, perk_graph **out) {
    json_error_t where;
    char *text = perk_format("{%s%s%s}", SIZES, *extra ? "," : "", extra);
    json_t *config = json_loads(text, 0, &where);
    CHECK(config, "%s: %s", text, where.text);
    *out = new_graph();
    perk_qwen3_build(*out, config);
    json_decref(config);
    free(text);
    return perk_graph_check(*out, &err);
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

static void test_config_refused(void) {
    static const struct {
        const char *extra;
        perk_status status;
        const char *text;
    } cases[] = {
        {"\"hidden_act\":\"gelu\"", PERK_UNSUPPORTED, "gelu"},
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
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_graph *g;
        CHECK_FAILS(build(cases[i].extra, &g), cases[i].status, cases[i].text);
        perk_graph_free(g);
    }
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
static void test_config_odd_values(void) {
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
        json_t *base = json_load_file(FIXTURES "/window_types/config.json", 0, NULL);
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
                    perk_qwen3_build(g, config);
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

/* ---- model folders ---- */

/* A folder with the weights of fixture "bias" and its config with `key` set to `value` (dropped where NULL). */
static void open_changed(const char *key, json_t *value, perk_status status, const char *text) {
    temp_folder folder = temp_make();
    char path[1024];
    perk_model *model;
    CHECK(symlink(FIXTURES "/bias/model.safetensors", temp_path(&folder, "model.safetensors", path, sizeof path)) == 0);
    json_t *config = json_load_file(FIXTURES "/bias/config.json", 0, NULL);
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
    CHECK_OK(perk_model_open(&model, FIXTURES "/gqa5_odd", false, 0, &err));
    CHECK(!strcmp(model->architecture, "Qwen3ForCausalLM") && model->vocab_size == 331 && model->max_positions == 256);
    CHECK(model->eos_count == 0);
    perk_model_free(model);
    perk_model_free(NULL);
    CHECK_FAILS(perk_model_open(&model, FIXTURES "/nothing", false, 0, &err), PERK_NOT_FOUND, "nothing");
    CHECK_FAILS(perk_model_open(&model, FIXTURES "/nothing", true, 0, &err), PERK_NOT_FOUND, "nothing");
    CHECK_FAILS(perk_model_open(&model, FIXTURES "/bias/config.json", false, 0, &err), PERK_NOT_FOUND,
                "without weights");

    open_changed("eos_token_id", json_pack("[i,i]", 3, 9), PERK_OK, "");
    open_changed("architectures", json_pack("[s]", "GPT2LMHeadModel"), PERK_UNSUPPORTED, "knows Qwen3ForCausalLM");
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

int main(void) {
    test_good_graph();
    test_stack();
    test_refusals();
    test_attention_refusals();
    test_config_accepted();
    test_config_refused();
    test_config_odd_values();
    test_models();
    return 0;
}
