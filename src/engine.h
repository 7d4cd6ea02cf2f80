/* The engine's inner face: requests checked without a step in between, logits as they come for callers that must not
 * hold them all, and a look at every step. */
#ifndef PERK_SRC_ENGINE_H
#define PERK_SRC_ENGINE_H

#include "executor.h"
#include "perk/engine.h"

/* What perk_engine_submit would refuse of any engine that runs; asked by any thread at any time. */
perk_status perk_engine_check(const perk_engine *engine, const int32_t *prompt, size_t prompt_length,
                              const perk_sampling *sampling, perk_error *err);

/* Fails where the engine takes no requests, because its caller fills the steps. */
perk_status perk_engine_check_mode(const perk_engine *engine, perk_error *err);

/* Gets rows [first, first + count) of the logits, [count][vocab], valid during the call; a failure ends the run. */
typedef perk_status (*perk_on_logits)(void *user, size_t first, size_t count, const float *logits, perk_error *err);

/* perk_engine_logits, chunk by chunk. */
perk_status perk_engine_stream_logits(perk_engine *engine, const int32_t *ids, size_t count, perk_on_logits on_logits,
                                      void *user, perk_error *err);

/* Gets the executor right after a step over `batch`: what the step made can be read. A failure is the step's. */
typedef perk_status (*perk_on_step)(void *user, perk_executor *executor, const perk_graph *graph,
                                    const perk_batch *batch, perk_error *err);

/* Calls `on_step` after every step from now on. PERK_UNSUPPORTED on the GPU, whose activations share memory. */
perk_status perk_engine_watch(perk_engine *engine, perk_on_step on_step, void *user, perk_error *err);

/* What perk_engine_step does, in pieces: one step, or with a kernel that runs by itself one look at what has come.
 * *news: some request may have new tokens or have ended. *again: seconds after which to look again; 0: nothing runs by
 * itself.
 */
perk_status perk_engine_poll(perk_engine *engine, bool *news, double *again, perk_error *err);
/* Whether a kernel may be on the GPU, with or without something to do. */
bool perk_engine_stays(const perk_engine *engine);

#endif
