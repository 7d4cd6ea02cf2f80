#include "config.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#define MAX_TOKEN_ID INT32_MAX

/* Where values come from: an object and the file name that messages give. */
typedef struct source {
    const json_t *object;
    const char *file;
} source;

static source from_config(const json_t *config) { return (source){config, "config.json"}; }

const json_t *perk_config_get(const json_t *config, const char *key) {
    const json_t *value = config;
    while (value && *key) {
        size_t length = strcspn(key, ".");
        value = json_object_getn(value, key, length);
        key += length + (key[length] == '.');
    }
    return json_is_null(value) ? NULL : value;
}

static perk_status fail_missing(source from, const char *key, const char *wanted, perk_error *err) {
    return perk_fail(err, PERK_BAD_FORMAT, "%s: \"%s\" is missing; it must be %s", from.file, key, wanted);
}

/* `value` is shown as JSON text, cut where it is long. */
static perk_status fail_value(source from, const char *key, const char *wanted, const json_t *value, perk_error *err) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(10));
    const char *shown = text ? text : "something else";
    perk_fail(err, PERK_BAD_FORMAT, "%s: \"%s\" must be %s, found %.80s%s", from.file, key, wanted, shown,
              strlen(shown) > 80 ? "..." : "");
    free(text);
    return PERK_BAD_FORMAT;
}

/* Whole floats up to 2^53 are exact; beyond, "4e18" might not be the number that was meant. */
static bool whole_number(const json_t *value, int64_t *out) {
    if (json_is_integer(value)) {
        *out = json_integer_value(value);
        return true;
    }
    double number = json_real_value(value);
    if (!json_is_real(value) || !(fabs(number) <= 0x1p53) || number != floor(number)) return false;
    *out = (int64_t)number;
    return true;
}

static perk_status get_i64(source from, const char *key, int64_t fallback, int64_t min, int64_t max, int64_t *out,
                           perk_error *err) {
    char wanted[96];
    snprintf(wanted, sizeof wanted, "an integer between %" PRId64 " and %" PRId64, min, max);
    const json_t *value = perk_config_get(from.object, key);
    int64_t number = fallback;
    if (!value && fallback == PERK_CONFIG_REQUIRED) return fail_missing(from, key, wanted, err);
    if (value && (!whole_number(value, &number) || number < min || number > max))
        return fail_value(from, key, wanted, value, err);
    *out = number;
    return PERK_OK;
}

static perk_status get_f64(source from, const char *key, double fallback, double min, double max, double *out,
                           perk_error *err) {
    char wanted[96];
    snprintf(wanted, sizeof wanted, "a number between %g and %g", min, max);
    const json_t *value = perk_config_get(from.object, key);
    if (!value && fallback == PERK_CONFIG_REQUIRED_F64) return fail_missing(from, key, wanted, err);
    double number = value ? json_number_value(value) : fallback;
    if (value && (!json_is_number(value) || !(number >= min && number <= max)))
        return fail_value(from, key, wanted, value, err);
    *out = number;
    return PERK_OK;
}

static perk_status get_bool(source from, const char *key, int fallback, bool *out, perk_error *err) {
    const json_t *value = perk_config_get(from.object, key);
    if (!value && fallback == PERK_CONFIG_REQUIRED_BOOL) return fail_missing(from, key, "true or false", err);
    if (value && !json_is_boolean(value)) return fail_value(from, key, "true or false", value, err);
    *out = value ? json_is_true(value) : fallback != 0;
    return PERK_OK;
}

perk_status perk_config_i64(const json_t *config, const char *key, int64_t fallback, int64_t min, int64_t max,
                            int64_t *out, perk_error *err) {
    return get_i64(from_config(config), key, fallback, min, max, out, err);
}

perk_status perk_config_f64(const json_t *config, const char *key, double fallback, double min, double max, double *out,
                            perk_error *err) {
    return get_f64(from_config(config), key, fallback, min, max, out, err);
}

perk_status perk_config_bool(const json_t *config, const char *key, int fallback, bool *out, perk_error *err) {
    return get_bool(from_config(config), key, fallback, out, err);
}

perk_status perk_config_string(const json_t *config, const char *key, const char *fallback, const char **out,
                               perk_error *err) {
    source from = from_config(config);
    const json_t *value = perk_config_get(config, key);
    if (!value && fallback == PERK_CONFIG_REQUIRED_STRING) return fail_missing(from, key, "a string", err);
    if (value && !json_is_string(value)) return fail_value(from, key, "a string", value, err);
    *out = value ? json_string_value(value) : fallback;
    return PERK_OK;
}

static bool has_eos(const perk_generation_defaults *generation, int64_t id) {
    for (size_t i = 0; i < generation->eos_count; i++)
        if (generation->eos[i] == id) return true;
    return false;
}

static perk_status read_eos(source from, perk_generation_defaults *out, perk_error *err) {
    static const char wanted[] = "a token id or a list of at most 16 token ids";
    const json_t *value = perk_config_get(from.object, "eos_token_id");
    size_t count = json_is_array(value) ? json_array_size(value) : 1;
    if (count > PERK_GENERATION_MAX_EOS) return fail_value(from, "eos_token_id", wanted, value, err);
    for (size_t i = 0; i < count; i++) {
        int64_t id;
        const json_t *item = json_is_array(value) ? json_array_get(value, i) : value;
        if (!whole_number(item, &id) || id < 0 || id > MAX_TOKEN_ID)
            return fail_value(from, "eos_token_id", wanted, value, err);
        if (!has_eos(out, id)) out->eos[out->eos_count++] = id;
    }
    return PERK_OK;
}

/* The first of the two files that says anything about `key`. */
static source first_with(source a, source b, const char *key) { return perk_config_get(a.object, key) ? a : b; }

perk_status perk_generation_defaults_read(const json_t *generation, const json_t *config, perk_generation_defaults *out,
                                          perk_error *err) {
    source own = {generation, "generation_config.json"}, model = from_config(config);
    source eos = first_with(own, model, "eos_token_id");
    source bos = first_with(own, model, "bos_token_id");
    source pad = first_with(own, model, "pad_token_id");
    perk_generation_defaults read = {0};
    perk_status status = PERK_OK;
    if (perk_config_get(eos.object, "eos_token_id")) status = read_eos(eos, &read, err);
    if (!status) status = get_i64(bos, "bos_token_id", -1, -1, MAX_TOKEN_ID, &read.bos, err);
    if (!status) status = get_i64(pad, "pad_token_id", -1, -1, MAX_TOKEN_ID, &read.pad, err);
    if (!status) status = get_bool(own, "do_sample", 0, &read.do_sample, err);
    if (!status) status = get_f64(own, "temperature", 1, 0, 1e6, &read.temperature, err);
    if (!status) status = get_f64(own, "top_p", 1, 0, 1, &read.top_p, err);
    if (!status) status = get_f64(own, "min_p", 0, 0, 1, &read.min_p, err);
    if (!status) status = get_f64(own, "repetition_penalty", 1, 1e-6, 1e6, &read.repetition_penalty, err);
    if (!status) status = get_i64(own, "top_k", 0, 0, MAX_TOKEN_ID, &read.top_k, err);
    if (status) return status;
    *out = read;
    return PERK_OK;
}
