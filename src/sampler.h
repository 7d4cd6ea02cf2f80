/* From a row of logits to a token. The distribution, exactly, so that the kernel can compute it too
 * (kernels_src/draw.h, sample.cuh):
 *
 *  1. Bias and penalties change the logits of the tokens that they name (include/perk/engine.h), in fp32, one operation
 *     after the other in the order given there.
 *  2. Temperature 0: the token with the largest logit, of equal ones the lowest id. Else tokens are ranked by logit,
 *     the largest first, of equal ones the lowest id first, and have the weight exp((logit - largest) / temperature),
 *     an integer multiple of 2^-40 (kernels_src/draw.h): sums are the same in every order.
 *  3. top_k keeps the first top_k of the ranking.
 *  4. top_p keeps of these the shortest beginning of the ranking whose weights add up to top_p of all of theirs
 *     (their product rounded down, and at least one unit).
 *  5. min_p keeps of these those with a weight of at least min_p; the first one's is 1.
 *  6. The kept tokens, now in the order of their ids, share [0, sum of their weights); the token in whose share
 *     u * sum falls is drawn. u is uniform in [0, 1) and a function of the seed and of the token's place in its answer
 *     alone, so the same logits give the same tokens whatever else ran in the batch, and also when a request was set
 *     back and its cache computed again.
 *
 * Passes over the vocabulary: one to find the largest logit, another to copy where logits are changed, two to collect
 * and weigh where the temperature is not 0 (one more with top_k), two for log probabilities. */
#ifndef PERK_SRC_SAMPLER_H
#define PERK_SRC_SAMPLER_H

#include "kernels_src/draw.h"
#include "sampling.h"

/* Scratch memory for one vocabulary size; for one thread at a time. */
typedef struct perk_sampler perk_sampler;

perk_status perk_sampler_create(perk_sampler **out, int32_t vocab_size, perk_error *err);
void perk_sampler_free(perk_sampler *sampler);

/* The tokens of a request so far. They are read for penalties only; the answer's length is the new token's place. */
typedef struct perk_history {
    const int32_t *prompt, *answer;
    int32_t prompt_length, answer_length;
} perk_history;

/* Picks a token from `logits` [vocab_size]. `sampling` must have been checked; ids of the history outside the
 * vocabulary are passed over. `logprobs` [perk_sampling_logprob_count] is filled when the request asks for log
 * probabilities and may be NULL otherwise. A logit that is NaN or -inf is never picked. Fails with PERK_INTERNAL when
 * no logit is finite, or one is +inf. */
perk_status perk_sampler_pick(perk_sampler *sampler, const float *logits, const perk_sampling *sampling,
                              const perk_history *history, int32_t *token, perk_logprob *logprobs, perk_error *err);

/* What the kernel needs to know of a request's sampling. */
perk_draw_rule perk_sampling_rule(const perk_sampling *sampling);

/* Its biases for the kernel, one a token: writes at most bias_count; returns how many. */
int32_t perk_sampling_slot_biases(const perk_sampling *sampling, perk_draw_bias *biases);

/* Log probabilities of a token that the kernel has picked, as perk_sampler_pick fills them in. */
void perk_sampler_logprobs(const perk_draw_record *record, int32_t token, int32_t top, perk_logprob *logprobs);

/* log(sum of exp(logits)), from the sum of their weights at temperature 1. */
double perk_log_sum(float largest, uint64_t sum);

/* perk_random_bits as a number in [0, 1). */
double perk_uniform(uint64_t seed, uint64_t place);

#endif
