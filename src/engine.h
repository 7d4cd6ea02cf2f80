/* The engine's inner face: logits as they come, for callers that must not hold them all. */
#ifndef PERK_SRC_ENGINE_H
#define PERK_SRC_ENGINE_H

#include "base.h"
#include "perk/engine.h"

/* Gets rows [first, first + count) of the logits, [count][vocab], valid during the call; a failure ends the run. */
typedef perk_status (*perk_on_logits)(void *user, size_t first, size_t count, const float *logits, perk_error *err);

/* perk_engine_logits, chunk by chunk. */
perk_status perk_engine_stream_logits(perk_engine *engine, const int32_t *ids, size_t count, perk_on_logits on_logits,
                                      void *user, perk_error *err);

#endif
