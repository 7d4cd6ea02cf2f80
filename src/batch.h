/* What one step works on. Filled by the scheduler (or by a caller that owns the loop), read by every executor. */
#ifndef PERK_SRC_BATCH_H
#define PERK_SRC_BATCH_H

#include "base.h"
#include "kernels_src/step.h"
#include "perk/config.h"

/* perk_batch itself is of kernels_src/step.h, since the kernel makes some, too. */
perk_status perk_batch_create(perk_batch **out, const perk_config *config, perk_error *err);
void perk_batch_free(perk_batch *batch);
void perk_batch_clear(perk_batch *batch);
/* Appends `count` tokens of one request, whose cache already holds `position` tokens; `want_logits`: 0 none, 1 of the
 * last token, 2 of all. `pages` [pages_per_request] is copied. Fails with PERK_LIMIT when the batch is full. */
perk_status perk_batch_add(perk_batch *batch, const perk_config *config, const int32_t *token_ids, int32_t count,
                           int32_t position, const int32_t *pages, int want_logits, perk_error *err);

#endif
