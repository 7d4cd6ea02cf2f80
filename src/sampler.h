/* From a row of logits to a token: temperature, then top-k, top-p and min-p in that order, then a draw.
 *
 * The draw is a function of the seed and of the token's place in its answer alone, so the same logits give the same
 * tokens whatever else ran in the batch, and also when a request was set back and its cache computed again. */
#ifndef PERK_SRC_SAMPLER_H
#define PERK_SRC_SAMPLER_H

#include "base.h"
#include "perk/engine.h"

/* Scratch memory for one vocabulary size; for one thread at a time. */
typedef struct perk_sampler perk_sampler;

perk_status perk_sampler_create(perk_sampler **out, int32_t vocab_size, perk_error *err);
void perk_sampler_free(perk_sampler *sampler);

/* Checks the ranges of all fields. */
perk_status perk_sampling_check(const perk_sampling *sampling, perk_error *err);

/* Picks a token from `logits` [vocab_size]; `place` counts the tokens of the answer from 0. `sampling` must have been
 * checked. A logit that is NaN or -inf is never picked. Fails with PERK_INTERNAL when no logit is finite, or one is
 * +inf. */
perk_status perk_sampler_pick(perk_sampler *sampler, const float *logits, const perk_sampling *sampling, uint64_t place,
                              int32_t *token, perk_error *err);

/* Uniform in [0, 1), 53 bits, from a counter: no state, so any place can be drawn at any time. */
double perk_uniform(uint64_t seed, uint64_t place);

#endif
