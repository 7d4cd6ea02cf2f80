/* From requests to batches, step by step.
 *
 * Requests are served in the order of their arrival: an older one gets its tokens and its pages first. Those that hold
 * pages are therefore always the oldest ones, and what a step has left over after them goes to the next in line:
 *  - a waiting request is admitted when the pages of all its known tokens are free, and its prompt enters in chunks;
 *  - a running request that needs a page when none is free takes those of the newest running request, which is set
 *    back: its cache is dropped and computed again later, its tokens are kept.
 * The pool holds at least one request of max_seq_length, so the oldest request always proceeds: nothing can deadlock,
 * and every request is finished in its turn.
 */
#ifndef PERK_SRC_SCHEDULER_H
#define PERK_SRC_SCHEDULER_H

#include "batch.h"
#include "executor.h"
#include "pages.h"
#include "perk/engine.h"

typedef struct perk_scheduler perk_scheduler;

struct perk_request {
    perk_scheduler *scheduler;
    perk_request *previous, *next; /* in the scheduler's list of unfinished or of finished requests */
    perk_sampling sampling;
    int32_t *tokens; /* [limit] the prompt, then the answer */
    int32_t prompt_length, length, limit;
    int32_t cached;     /* positions that are in the KV cache */
    int32_t *pages;     /* [pages of max_seq_length], 0 past page_count */
    int32_t page_count; /* 0: waiting */
    int32_t scheduled;  /* tokens in the step under way */
    int32_t logit_row;  /* in the step under way; -1: none */
    perk_finish finish;
};

/* `config` is resolved; `eos_ids` (tokens that end an answer) are copied. */
perk_status perk_scheduler_create(perk_scheduler **out, const perk_config *config, int32_t vocab_size,
                                  const int32_t *eos_ids, int eos_count, perk_error *err);
/* Frees all requests with it. */
void perk_scheduler_free(perk_scheduler *scheduler);

/* Queues a request. Fails with PERK_INVALID_ARGUMENT (no token, an id outside the vocabulary, bad sampling numbers) or
 * PERK_LIMIT (the prompt leaves no room in max_seq_length). */
perk_status perk_scheduler_submit(perk_scheduler *scheduler, const int32_t *prompt, size_t prompt_length,
                                  const perk_sampling *sampling, perk_request **out, perk_error *err);
int32_t perk_scheduler_unfinished(const perk_scheduler *scheduler);
const perk_request *perk_scheduler_first(const perk_scheduler *scheduler); /* the oldest unfinished one, or NULL */
const perk_pages *perk_scheduler_pages(const perk_scheduler *scheduler);

/* Fills `batch` with the next step; it stays empty only when no request is unfinished. *want_logits: some request
 * samples, so the step must bring logits. */
perk_status perk_scheduler_fill(perk_scheduler *scheduler, perk_batch *batch, bool *want_logits, perk_error *err);
/* Takes the step's result in: new tokens, finished requests, their pages. */
perk_status perk_scheduler_commit(perk_scheduler *scheduler, const perk_step_result *result, perk_error *err);

/* Takes `count` pages for work outside of any request; where they are not free, running requests are set back. False
 * when the whole pool has fewer. They are given back with perk_scheduler_return. */
bool perk_scheduler_borrow(perk_scheduler *scheduler, int32_t count, int32_t *pages);
void perk_scheduler_return(perk_scheduler *scheduler, const int32_t *pages, int32_t count);

#endif
