/* Checked getters over config.json, and what generation_config.json says. */
#include "src/config.h"
#include "test.h"

static const char config_text[] =
    "{\"layers\": 28, \"whole\": 4096.0, \"part\": 1.5, \"heads\": \"abc\", \"eps\": 1e-6, \"tied\": true,"
    " \"act\": \"silu\", \"nothing\": null, \"huge\": 1e300, \"rope\": {\"theta\": 10000, \"inner\": {\"x\": 7}},"
    " \"eos_token_id\": 5, \"bos_token_id\": 1, \"list\": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,"
    " 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]}";

static json_t *parse(const char *text) {
    json_t *json = json_loads(text, 0, NULL);
    CHECK(json, "%s", text);
    return json;
}

static void check_numbers(const json_t *config) {
    perk_error err;
    int64_t i = -5;
    double f = -5;
    CHECK_OK(perk_config_i64(config, "layers", PERK_CONFIG_REQUIRED, 1, 100, &i, &err));
    CHECK(i == 28);
    CHECK_OK(perk_config_i64(config, "whole", PERK_CONFIG_REQUIRED, 1, 65536, &i, &err));
    CHECK(i == 4096);
    CHECK_OK(perk_config_i64(config, "absent", 3, 1, 100, &i, &err));
    CHECK(i == 3);
    CHECK_OK(perk_config_i64(config, "nothing", -1, 1, 100, &i, &err)); /* a fallback may lie outside the range */
    CHECK(i == -1);
    CHECK_OK(perk_config_i64(config, "rope.inner.x", PERK_CONFIG_REQUIRED, 1, 100, &i, &err));
    CHECK(i == 7);
    CHECK_FAILS(perk_config_i64(config, "heads", 8, 1, 65536, &i, &err), PERK_BAD_FORMAT,
                "config.json: \"heads\" must be an integer between 1 and 65536, found \"abc\"");
    CHECK_FAILS(perk_config_i64(config, "part", 8, 1, 65536, &i, &err), PERK_BAD_FORMAT, "found 1.5");
    CHECK_FAILS(perk_config_i64(config, "huge", 8, 1, INT64_MAX, &i, &err), PERK_BAD_FORMAT, "found 1e300");
    CHECK_FAILS(perk_config_i64(config, "layers", 8, 1, 27, &i, &err), PERK_BAD_FORMAT, "between 1 and 27, found 28");
    CHECK_FAILS(perk_config_i64(config, "layers.x", PERK_CONFIG_REQUIRED, 1, 2, &i, &err), PERK_BAD_FORMAT, "missing");
    CHECK_FAILS(perk_config_i64(config, "nothing", PERK_CONFIG_REQUIRED, 1, 2, &i, &err), PERK_BAD_FORMAT,
                "config.json: \"nothing\" is missing; it must be an integer between 1 and 2");
    CHECK_FAILS(perk_config_i64(config, "list", 8, 1, 2, &i, &err), PERK_BAD_FORMAT, "...");
    CHECK(i == 7, "a failure must leave the value alone");
    CHECK(perk_config_i64(config, "list", 8, 1, 2, &i, NULL) == PERK_BAD_FORMAT, "err may be NULL");

    CHECK_OK(perk_config_f64(config, "eps", PERK_CONFIG_REQUIRED_F64, 0, 1, &f, &err));
    CHECK(f == 1e-6);
    CHECK_OK(perk_config_f64(config, "rope.theta", 1.0, 1, 1e12, &f, &err));
    CHECK(f == 10000.0);
    CHECK_OK(perk_config_f64(config, "rope.absent", 0.25, 1, 1e12, &f, &err));
    CHECK(f == 0.25);
    CHECK_FAILS(perk_config_f64(config, "tied", 1, 0, 1, &f, &err), PERK_BAD_FORMAT,
                "a number between 0 and 1, found true");
    CHECK_FAILS(perk_config_f64(config, "absent", PERK_CONFIG_REQUIRED_F64, 0, 1, &f, &err), PERK_BAD_FORMAT,
                "missing");
    CHECK_FAILS(perk_config_f64(config, "huge", 1, 0, 1e12, &f, &err), PERK_BAD_FORMAT, "1e+12");
}

static void check_others(const json_t *config) {
    perk_error err;
    bool b = false;
    const char *text = NULL;
    CHECK_OK(perk_config_bool(config, "tied", PERK_CONFIG_REQUIRED_BOOL, &b, &err));
    CHECK(b);
    CHECK_OK(perk_config_bool(config, "absent", 0, &b, &err));
    CHECK(!b);
    CHECK_FAILS(perk_config_bool(config, "layers", 0, &b, &err), PERK_BAD_FORMAT, "must be true or false, found 28");
    CHECK_FAILS(perk_config_bool(config, "absent", PERK_CONFIG_REQUIRED_BOOL, &b, &err), PERK_BAD_FORMAT, "missing");
    CHECK_OK(perk_config_string(config, "act", PERK_CONFIG_REQUIRED_STRING, &text, &err));
    CHECK(strcmp(text, "silu") == 0);
    CHECK_OK(perk_config_string(config, "absent", "gelu", &text, &err));
    CHECK(strcmp(text, "gelu") == 0);
    CHECK_FAILS(perk_config_string(config, "layers", "", &text, &err), PERK_BAD_FORMAT, "must be a string, found 28");
    CHECK_FAILS(perk_config_string(config, "absent", NULL, &text, &err), PERK_BAD_FORMAT, "missing");
    CHECK(perk_config_get(config, "rope.inner") && !perk_config_get(config, "rope..inner"));
    CHECK(!perk_config_get(config, "nothing") && !perk_config_get(config, "layers.x") && !perk_config_get(NULL, "x"));
}

static perk_status read_generation(const char *text, const json_t *config, perk_generation_defaults *out,
                                   perk_error *err) {
    json_t *generation = text ? parse(text) : NULL;
    perk_status status = perk_generation_defaults_read(generation, config, out, err);
    json_decref(generation);
    return status;
}

static void check_generation(const json_t *config) {
    perk_error err;
    perk_generation_defaults g;
    CHECK_OK(read_generation(NULL, NULL, &g, &err));
    CHECK(g.eos_count == 0 && g.bos == -1 && g.pad == -1 && !g.do_sample && g.temperature == 1 && g.top_k == 0 &&
          g.top_p == 1 && g.min_p == 0 && g.repetition_penalty == 1);
    CHECK_OK(read_generation(NULL, config, &g, &err));
    CHECK(g.eos_count == 1 && g.eos[0] == 5 && g.bos == 1);
    CHECK_OK(read_generation("{\"eos_token_id\": [7, 8, 7], \"do_sample\": true, \"temperature\": 0.6, \"top_k\": 20}",
                             config, &g, &err));
    CHECK(g.eos_count == 2 && g.eos[0] == 7 && g.eos[1] == 8 && g.bos == 1 && g.do_sample && g.temperature == 0.6 &&
          g.top_k == 20);
    CHECK_OK(read_generation("{\"eos_token_id\": null}", config, &g, &err));
    CHECK(g.eos_count == 1 && g.eos[0] == 5);
    CHECK_OK(read_generation("{\"eos_token_id\": []}", config, &g, &err));
    CHECK(g.eos_count == 0);
    static const char *const bad[] = {
        "-1",     "\"x\"",      "[1, \"x\"]",
        "[[1]]",  "1.5",        "{}",
        "[null]", "4294967296", "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]"};
    for (size_t i = 0; i < PERK_COUNT(bad); i++) {
        char text[256];
        snprintf(text, sizeof text, "{\"eos_token_id\": %s}", bad[i]);
        g.eos_count = 77;
        CHECK_FAILS(read_generation(text, config, &g, &err), PERK_BAD_FORMAT,
                    "generation_config.json: \"eos_token_id\" must be");
        CHECK(g.eos_count == 77, "a failure must leave the result alone");
    }
    CHECK_FAILS(read_generation("{\"temperature\": -1}", config, &g, &err), PERK_BAD_FORMAT,
                "generation_config.json: \"temperature\"");
    CHECK_FAILS(read_generation("{\"do_sample\": 1}", config, &g, &err), PERK_BAD_FORMAT, "\"do_sample\"");
}

int main(void) {
    json_t *config = parse(config_text);
    check_numbers(config);
    check_others(config);
    check_generation(config);
    json_decref(config);
    return 0;
}
