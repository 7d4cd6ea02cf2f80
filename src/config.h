/* Checked access to the numbers of a model's config.json, for model builders.
 *
 * `key` may be a path into nested objects, its parts joined by dots: "rope_scaling.factor". A missing key, and one
 * whose value is null (or whose parent is), counts as absent: then *out is the fallback, or, where the fallback is the
 * REQUIRED mark, the call fails with PERK_BAD_FORMAT. A value of the wrong type or out of range always fails and leaves
 * *out alone. Messages read like config.json: "num_attention_heads" must be an integer between 1 and 65536, found "abc"
 */
#ifndef PERK_SRC_CONFIG_H
#define PERK_SRC_CONFIG_H

#include "base.h"

#include <jansson.h>

#define PERK_CONFIG_REQUIRED INT64_MIN          /* fallback of perk_config_i64 */
#define PERK_CONFIG_REQUIRED_F64 (-0x1p1023)    /* fallback of perk_config_f64 */
#define PERK_CONFIG_REQUIRED_BOOL (-1)          /* fallback of perk_config_bool */
#define PERK_CONFIG_REQUIRED_STRING ((char *)0) /* fallback of perk_config_string */

/* The value at `key`, borrowed from `config`; NULL when absent. For shapes that the getters below do not cover. */
const json_t *perk_config_get(const json_t *config, const char *key);

/* min <= *out <= max. A float such as 4096.0 is accepted where it is whole. */
perk_status perk_config_i64(const json_t *config, const char *key, int64_t fallback, int64_t min, int64_t max,
                            int64_t *out, perk_error *err);

/* min <= *out <= max; integers are accepted. */
perk_status perk_config_f64(const json_t *config, const char *key, double fallback, double min, double max, double *out,
                            perk_error *err);

/* `fallback` is 0, 1 or PERK_CONFIG_REQUIRED_BOOL. */
perk_status perk_config_bool(const json_t *config, const char *key, int fallback, bool *out, perk_error *err);

/* *out is borrowed from `config`, or is the fallback itself. */
perk_status perk_config_string(const json_t *config, const char *key, const char *fallback, const char **out,
                               perk_error *err);

#define PERK_GENERATION_MAX_EOS 16

/* How the model's authors want it sampled and where it ends. */
typedef struct perk_generation_defaults {
    int64_t eos[PERK_GENERATION_MAX_EOS]; /* token ids that end a text, each once */
    size_t eos_count;                     /* 0: none is known */
    int64_t bos, pad;                     /* -1: none */
    bool do_sample;                       /* false: greedy */
    double temperature, top_p, min_p, repetition_penalty;
    int64_t top_k; /* 0: no limit */
} perk_generation_defaults;

/* Reads generation_config.json (`generation`, NULL when the folder has none); bos, eos and pad fall back to those of
 * config.json (`config`, may be NULL), the rest to what leaves the distribution alone. eos_token_id may be a number or
 * a list. Fails with PERK_BAD_FORMAT. */
perk_status perk_generation_defaults_read(const json_t *generation, const json_t *config, perk_generation_defaults *out,
                                          perk_error *err);

#endif
