/* From requests to batches on the host: the owner of a schedule (kernels_src/schedule.h), which decides what runs, with
 * what the kernel has no use for: requests without end in the queue, answers that their owners read, sampling.
 * docs/scheduling.md says how the two fit. */
#ifndef PERK_SRC_SCHEDULER_H
#define PERK_SRC_SCHEDULER_H

#include "executor.h"
#include "kernels_src/schedule.h"
#include "perk/engine.h"
#include "stop_text.h"

typedef struct perk_scheduler perk_scheduler;
typedef struct perk_request_list perk_request_list;

struct perk_request {
    perk_scheduler *scheduler;
    perk_request_list *list; /* of the scheduler's, the one that it stands in */
    perk_request *previous, *next;
    perk_sampling sampling; /* with arrays of its own */
    perk_stop_text *text;   /* in which stop strings are looked for; NULL: there are none */
    perk_logprob *logprobs; /* [answer's limit][perk_sampling_logprob_count]; NULL: not asked for */
    int32_t *tokens;        /* [limit] the prompt, then the answer */
    int32_t prompt_length, length, limit;
    int32_t slot; /* of the schedule; -1: it is queued, or finished */
    perk_finish finish;
    int32_t found, set_backs;                   /* once it is finished; before, its slot has them */
    double submitted, started, answered, ended; /* perk_now; 0: not yet */
};

/* `config` is resolved; `eos_ids` (tokens that end an answer) are copied. `share_prefixes`: requests that begin alike
 * share pages. */
perk_status perk_scheduler_create(perk_scheduler **out, const perk_config *config, int32_t vocab_size,
                                  const int32_t *eos_ids, int eos_count, bool share_prefixes, perk_error *err);
/* Frees all requests with it. */
void perk_scheduler_free(perk_scheduler *scheduler);

/* For stop strings; without one they are refused. Borrowed as long as there are requests. */
void perk_scheduler_set_tokenizer(perk_scheduler *scheduler, const perk_tokenizer *tokenizer);

/* Queues a request. Fails with PERK_INVALID_ARGUMENT (no token, an id outside the vocabulary, bad sampling numbers),
 * PERK_LIMIT (the prompt leaves no room in max_seq_length) or PERK_NOT_FOUND (stop strings, and no tokenizer). */
perk_status perk_scheduler_submit(perk_scheduler *scheduler, const int32_t *prompt, size_t prompt_length,
                                  const perk_sampling *sampling, perk_request **out, perk_error *err);
/* What perk_scheduler_submit refuses; reads nothing that ever changes, so any thread may ask. */
perk_status perk_scheduler_check(const perk_scheduler *scheduler, const int32_t *prompt, size_t prompt_length,
                                 const perk_sampling *sampling, perk_error *err);
int32_t perk_scheduler_unfinished(const perk_scheduler *scheduler);
void perk_scheduler_statistics(const perk_scheduler *scheduler, perk_engine_stats *out);
const perk_schedule *perk_scheduler_schedule(const perk_scheduler *scheduler);

/* Makes the next step: *batch belongs to the scheduler and is valid until the next call; it is empty only when no
 * request is unfinished. *want_logits: some request samples, so the step must bring logits. */
perk_status perk_scheduler_fill(perk_scheduler *scheduler, const perk_batch **batch, bool *want_logits,
                                perk_error *err);
/* Takes the step's result in: new tokens, finished requests, their pages. */
perk_status perk_scheduler_commit(perk_scheduler *scheduler, const perk_step_result *result, perk_error *err);

/* Of the schedule of this configuration. As many requests again as run wait in slots, so that a kernel can go on with
 * them by itself. */
perk_schedule_limits perk_scheduler_limits(const perk_config *config);

/* ---- steps without the host (executor->type->online) ----
 * The schedule is with an executor from the first launch until it is taken back. Meanwhile requests can be submitted,
 * cancelled and freed as ever, but no step can be filled and no page borrowed. */

bool perk_scheduler_is_away(const perk_scheduler *scheduler);
/* Begins a launch; all that is queued goes along, as far as there are slots. */
perk_status perk_scheduler_launch(perk_scheduler *scheduler, perk_executor *executor,
                                  const perk_launch_options *options, perk_error *err);
/* Takes in the tokens that have come, and sends what is queued after them. *news: how many requests have some. */
perk_status perk_scheduler_exchange(perk_scheduler *scheduler, int32_t *news, perk_error *err);
/* After the last launch has ended and all its tokens were taken in. */
perk_status perk_scheduler_take_back(perk_scheduler *scheduler, perk_error *err);

/* Takes `count` pages for work outside of any request; where they are in use, running requests are set back. False
 * when the whole pool has fewer. They are given back with perk_scheduler_return. */
bool perk_scheduler_borrow(perk_scheduler *scheduler, int32_t count, int32_t *pages);
void perk_scheduler_return(perk_scheduler *scheduler, const int32_t *pages, int32_t count);

#endif
