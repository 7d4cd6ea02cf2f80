/* What one step works on. Filled by the scheduler (or by a caller that owns the loop), read by every executor. */
#ifndef PERK_SRC_BATCH_H
#define PERK_SRC_BATCH_H

#include "base.h"
#include "perk/config.h"

/* Tokens of one request are neighbouring rows with rising positions. All arrays are owned by the batch and sized by the
 * configuration. */
typedef struct perk_batch {
    int32_t num_tokens, num_requests, num_logit_rows;
    int32_t pages_per_request; /* the width of page_table: ceil(max_seq_length / page_size) */
    int32_t *token_ids;        /* [tokens] */
    int32_t *positions;        /* [tokens] position of the token in its request, from 0 */
    int32_t *token_request;    /* [tokens] row of `first_token`, ... and page_table */
    int32_t *logit_rows;       /* [logit rows] the token row whose logits are wanted */
    int32_t *first_token;      /* [requests] its first token row in this step */
    int32_t *token_count;      /* [requests] its tokens in this step */
    int32_t *kv_length;        /* [requests] positions in its cache once this step is done */
    int32_t *page_table;       /* [requests][pages_per_request] page of positions i * page_size ... */
} perk_batch;

perk_status perk_batch_create(perk_batch **out, const perk_config *config, perk_error *err);
void perk_batch_free(perk_batch *batch);
void perk_batch_clear(perk_batch *batch);
/* Appends `count` tokens of one request, whose cache already holds `position` tokens; `want_logits`: 0 none, 1 of the
 * last token, 2 of all. `pages` [pages_per_request] is copied. Fails with PERK_LIMIT when the batch is full. */
perk_status perk_batch_add(perk_batch *batch, const perk_config *config, const int32_t *token_ids, int32_t count,
                           int32_t position, const int32_t *pages, int want_logits, perk_error *err);

#endif
