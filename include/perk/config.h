/* The sizes that a program is built for. They become constants in the emitted source. */
#ifndef PERK_CONFIG_H
#define PERK_CONFIG_H
#include "perk/base.h"
#ifdef __cplusplus
extern "C" {
#endif

/* 0 in any field means the default, which perk_config_resolve fills in. */
typedef struct perk_config {
    int32_t max_num_batched_tokens;   /* tokens of all requests in one step; default 16 */
    int32_t max_num_batched_requests; /* requests in one step; default 8, at most max_num_batched_tokens */
    int32_t max_num_logit_rows;       /* rows of logits in one step; default max_num_batched_requests */
    int32_t page_size;                /* positions in a KV page: a power of two from 16 to 4096; default 64 */
    int32_t max_num_pages;            /* pages in the pool; default: every request may reach max_seq_length */
    int32_t max_seq_length;           /* positions of one request, prompt and answer; default: the smaller of 4096 and
                                         the model's max_position_embeddings */
} perk_config;

/* Fills the defaults and checks the ranges; `model_max_positions` bounds max_seq_length (0: unknown). */
PERK_API perk_status perk_config_resolve(perk_config *config, int32_t model_max_positions, perk_error *err);

#ifdef __cplusplus
}
#endif
#endif
