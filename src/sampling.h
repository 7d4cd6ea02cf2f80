/* The fields of perk_sampling as a request keeps them. */
#ifndef PERK_SRC_SAMPLING_H
#define PERK_SRC_SAMPLING_H

#include "base.h"
#include "perk/engine.h"

/* Checks the ranges of all fields; ids against the vocabulary. The message names the field. */
perk_status perk_sampling_check(const perk_sampling *sampling, int32_t vocab_size, perk_error *err);

/* The biases, one a token, by rising ids: writes at most bias_count; returns how many. */
int32_t perk_sampling_biases(const perk_sampling *sampling, perk_logit_bias *biases);

/* Copies with the arrays, one bias a token, which perk_sampling_free frees; on failure nothing is left to free. */
perk_status perk_sampling_copy(perk_sampling *copy, const perk_sampling *sampling, perk_error *err);
void perk_sampling_free(perk_sampling *sampling);

/* Whether tokens that were there before are penalized. */
bool perk_sampling_penalizes(const perk_sampling *sampling);
/* Whether logits are changed before a token is picked from them. */
bool perk_sampling_adjusts(const perk_sampling *sampling);
/* Whether a step must bring logits: false when its argmax is all that the request needs. */
bool perk_sampling_needs_logits(const perk_sampling *sampling);
/* Whether `token` is one of the request's own stop tokens. */
bool perk_sampling_stops(const perk_sampling *sampling, int32_t token);
/* Log probabilities at each place of the answer; 0: none. */
int32_t perk_sampling_logprob_count(const perk_sampling *sampling);

#endif
