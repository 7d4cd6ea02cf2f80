#include "rope.h"

#include "config.h"

#include <math.h>
#include <stdio.h>

#define PI 3.14159265358979323846
#define MAX_POSITIONS ((int64_t)1 << 31)

/* What every type starts from. Keys of `settings` are read through `config`, so that messages give their full path. */
typedef struct rope_source {
    const json_t *config;
    const char *group; /* "rope_scaling" or "rope_parameters" */
    double theta;
    int32_t dim;
} rope_source;

static perk_status get_number(const rope_source *source, const char *name, double fallback, double min, double *out,
                              perk_error *err) {
    char key[96];
    snprintf(key, sizeof key, "%s.%s", source->group, name);
    return perk_config_f64(source->config, key, fallback, min, 1e9, out, err);
}

/* The context that the model was first trained for: beside the group, in it, or the whole context. */
static perk_status get_original_positions(const rope_source *source, double *out, perk_error *err) {
    char key[96];
    int64_t positions = 0;
    snprintf(key, sizeof key, "%s.original_max_position_embeddings", source->group);
    if (perk_config_get(source->config, "original_max_position_embeddings"))
        snprintf(key, sizeof key, "original_max_position_embeddings");
    else if (!perk_config_get(source->config, key))
        snprintf(key, sizeof key, "max_position_embeddings");
    perk_status status = perk_config_i64(source->config, key, 32768, 1, MAX_POSITIONS, &positions, err);
    *out = (double)positions;
    return status;
}

static float power(const rope_source *source, int32_t i) {
    return (float)pow(source->theta, (float)(2 * i) / (float)source->dim);
}

static void fill_default(const rope_source *source, perk_rope *rope) {
    for (int32_t i = 0; i < source->dim / 2; i++) rope->inv_freq[i] = 1 / power(source, i);
}

/* Positions are compressed by a factor. */
static perk_status fill_linear(const rope_source *source, perk_rope *rope, perk_error *err) {
    double factor;
    perk_status status = get_number(source, "factor", PERK_CONFIG_REQUIRED_F64, 1e-6, &factor, err);
    if (status) return status;
    fill_default(source, rope);
    for (int32_t i = 0; i < source->dim / 2; i++) rope->inv_freq[i] /= (float)factor;
    return PERK_OK;
}

/* Long waves are compressed by a factor, short ones kept, those between blended by how often they turn. */
static perk_status fill_llama3(const rope_source *source, perk_rope *rope, perk_error *err) {
    double factor, low, high, positions;
    perk_status status = get_number(source, "factor", PERK_CONFIG_REQUIRED_F64, 1e-6, &factor, err);
    if (!status) status = get_number(source, "low_freq_factor", PERK_CONFIG_REQUIRED_F64, 1e-6, &low, err);
    if (!status) status = get_number(source, "high_freq_factor", PERK_CONFIG_REQUIRED_F64, 1e-6, &high, err);
    if (!status) status = get_original_positions(source, &positions, err);
    if (status) return status;
    if (high <= low)
        return perk_fail(err, PERK_BAD_FORMAT,
                         "config.json: \"%s.high_freq_factor\" (%g) must exceed low_freq_factor (%g)", source->group,
                         high, low);
    fill_default(source, rope);
    for (int32_t i = 0; i < source->dim / 2; i++) {
        double frequency = rope->inv_freq[i], wavelength = 2 * PI / frequency;
        double kept = (positions / wavelength - low) / (high - low);
        kept = PERK_MIN(PERK_MAX(kept, 0), 1);
        rope->inv_freq[i] = (float)((1 - kept) * frequency / factor + kept * frequency);
    }
    return PERK_OK;
}

static double yarn_mscale(double factor, double weight) { return factor <= 1 ? 1 : 0.1 * weight * log(factor) + 1; }

/* The dimension whose wave turns `turns` times over the original context. */
static double yarn_dimension(const rope_source *source, double turns, double positions) {
    return source->dim * log(positions / (turns * 2 * PI)) / (2 * log(source->theta));
}

/* Cos and sin are scaled by "attention_factor", or by what follows from the mscales or from the factor alone. */
static perk_status yarn_scale(const rope_source *source, double factor, float *out, perk_error *err) {
    double given, mscale, all_dim;
    perk_status status = get_number(source, "attention_factor", 0, 1e-6, &given, err);
    if (!status) status = get_number(source, "mscale", 0, 0, &mscale, err);
    if (!status) status = get_number(source, "mscale_all_dim", 0, 0, &all_dim, err);
    if (status) return status;
    if (given != 0)
        *out = (float)given;
    else if (mscale != 0 && all_dim != 0)
        *out = (float)(yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim));
    else
        *out = (float)yarn_mscale(factor, 1);
    return PERK_OK;
}

typedef struct yarn_settings {
    double factor, low, high; /* waves below dimension `low` are kept, above `high` compressed */
} yarn_settings;

static perk_status read_yarn(const rope_source *source, yarn_settings *yarn, perk_error *err) {
    double positions, whole, fast, slow;
    bool truncate;
    char key[96];
    snprintf(key, sizeof key, "%s.truncate", source->group);
    perk_status status = get_original_positions(source, &positions, err);
    if (!status) status = perk_config_f64(source->config, "max_position_embeddings", 32768, 1, 1e10, &whole, err);
    if (!status) status = get_number(source, "factor", whole / positions, 1e-6, &yarn->factor, err);
    if (!status) status = get_number(source, "beta_fast", 32, 1e-6, &fast, err);
    if (!status) status = get_number(source, "beta_slow", 1, 1e-6, &slow, err);
    if (!status) status = perk_config_bool(source->config, key, 1, &truncate, err);
    if (status) return status;
    double low = yarn_dimension(source, fast, positions), high = yarn_dimension(source, slow, positions);
    yarn->low = PERK_MAX(truncate ? floor(low) : low, 0);
    yarn->high = PERK_MIN(truncate ? ceil(high) : high, source->dim - 1);
    if (yarn->low == yarn->high) yarn->high += 0.001; /* a ramp of no width has no slope */
    return PERK_OK;
}

/* Peng et al. 2023. */
static perk_status fill_yarn(const rope_source *source, perk_rope *rope, perk_error *err) {
    yarn_settings yarn = {0};
    perk_status status = read_yarn(source, &yarn, err);
    if (!status) status = yarn_scale(source, yarn.factor, &rope->scale, err);
    if (status) return status;
    for (int32_t i = 0; i < source->dim / 2; i++) {
        double ramp = ((double)i - yarn.low) / (yarn.high - yarn.low);
        ramp = PERK_MIN(PERK_MAX(ramp, 0), 1);
        double frequency = 1 / (double)power(source, i);
        rope->inv_freq[i] = (float)(frequency / yarn.factor * ramp + frequency * (1 - ramp));
    }
    return PERK_OK;
}

static perk_status fill_by_type(const rope_source *source, const char *type, perk_rope *rope, perk_error *err) {
    if (!strcmp(type, "linear")) return fill_linear(source, rope, err);
    if (!strcmp(type, "llama3")) return fill_llama3(source, rope, err);
    if (!strcmp(type, "yarn")) return fill_yarn(source, rope, err);
    if (strcmp(type, "default") != 0)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "config.json: rope type \"%.40s\" is not supported; perk knows default, linear, llama3 and "
                         "yarn",
                         type);
    fill_default(source, rope);
    return PERK_OK;
}

/* The group in force, its type, and theta, which lies in the group or beside it. */
static perk_status read_source(rope_source *source, const char **type, perk_error *err) {
    const json_t *config = source->config, *settings = perk_config_get(config, "rope_scaling");
    char key[96];
    double partial;
    bool empty = !settings || (json_is_object(settings) && json_object_size(settings) == 0);
    source->group = empty ? "rope_parameters" : "rope_scaling";
    settings = perk_config_get(config, source->group);
    if (settings && !json_is_object(settings))
        return perk_fail(err, PERK_BAD_FORMAT, "config.json: \"%s\" must be an object", source->group);
    if (perk_config_get(settings, "full_attention") || perk_config_get(settings, "sliding_attention"))
        return perk_fail(err, PERK_UNSUPPORTED, "config.json: \"%s\" by type of layer is not supported", source->group);
    snprintf(key, sizeof key, "%s.%s", source->group, perk_config_get(settings, "rope_type") ? "rope_type" : "type");
    perk_status status = perk_config_string(config, key, "default", type, err);
    if (!status) status = get_number(source, "partial_rotary_factor", 1, 0, &partial, err);
    if (!status && partial == 1) status = perk_config_f64(config, "partial_rotary_factor", 1, 0, 1, &partial, err);
    if (!status && partial != 1)
        status =
            perk_fail(err, PERK_UNSUPPORTED, "config.json: \"partial_rotary_factor\" %g is not supported", partial);
    if (!status) status = perk_config_f64(config, "rope_theta", 10000, 1.000001, 1e30, &source->theta, err);
    snprintf(key, sizeof key, "%s.rope_theta", source->group);
    if (!status) status = perk_config_f64(config, key, source->theta, 1.000001, 1e30, &source->theta, err);
    return status;
}

perk_status perk_rope_read(perk_rope *out, const json_t *config, int32_t head_dim, perk_error *err) {
    rope_source source = {.config = config, .dim = head_dim};
    const char *type = NULL;
    *out = (perk_rope){.scale = 1};
    perk_status status = read_source(&source, &type, err);
    if (status) return status;
    out->inv_freq = perk_calloc((size_t)head_dim / 2, sizeof *out->inv_freq);
    if (!out->inv_freq) return perk_fail_memory(err, "the rotary frequencies");
    status = fill_by_type(&source, type, out, err);
    for (int32_t i = 0; !status && i < head_dim / 2; i++)
        if (!isfinite(out->inv_freq[i]))
            status = perk_fail(err, PERK_BAD_FORMAT, "config.json: the settings of \"%s\" give no frequency %d",
                               source.group, i);
    if (status) {
        free(out->inv_freq);
        out->inv_freq = NULL;
    }
    return status;
}
