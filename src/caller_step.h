/* The border of a step that the engine's caller fills (perk/step.h): all that comes in is checked here, once. */
#ifndef PERK_SRC_CALLER_STEP_H
#define PERK_SRC_CALLER_STEP_H

#include "batch.h"
#include "perk/step.h"

/* What is known of the pages that the caller hands out. */
typedef struct perk_caller_pages perk_caller_pages;

/* `config` is resolved. */
perk_status perk_caller_pages_create(perk_caller_pages **out, const perk_config *config, int32_t vocab_size,
                                     perk_error *err);
void perk_caller_pages_free(perk_caller_pages *pages);

/* Makes `batch`, which is of the same configuration, from what the caller gave. */
perk_status perk_caller_step_fill(perk_caller_pages *pages, perk_batch *batch, const perk_step_request *requests,
                                  int32_t request_count, perk_error *err);
/* The batch has run: its positions are in the cache. */
void perk_caller_step_commit(perk_caller_pages *pages, const perk_batch *batch);

#endif
