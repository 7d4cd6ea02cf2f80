/* Rotary position embedding (Su et al. 2021) as config.json describes it, with its ways to stretch the context. */
#ifndef PERK_MODELS_ROPE_H
#define PERK_MODELS_ROPE_H

#include "base.h"

#include <jansson.h>

typedef struct perk_rope {
    float *inv_freq; /* [head_dim / 2] radians a position; free() */
    float scale;     /* multiplies cos and sin */
} perk_rope;

/* Reads "rope_scaling" or, where that is absent, "rope_parameters", and "rope_theta" from either or from beside them.
 * Types: default, linear, llama3, yarn; others fail with PERK_UNSUPPORTED, by name. `head_dim` is even. */
perk_status perk_rope_read(perk_rope *out, const json_t *config, int32_t head_dim, perk_error *err);

#endif
