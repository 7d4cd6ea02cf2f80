/* Steps that the caller fills, for who puts perk inside another engine: which requests there are, their tokens, their
 * KV pages and what follows from the logits are all the caller's; perk runs the forward pass.
 *
 *     perk_engine_options options = {.mode = PERK_MODE_CALLER};
 *     perk_engine_open(&engine, "folder", &options, &err);
 *     perk_step_request requests[] = {{.token_ids = ids, .token_count = 3, .pages = pages, .page_count = 1,
 *                                      .want_logits = PERK_LOGITS_LAST}};
 *     perk_step_run(engine, requests, 1, 0, &output, &err);
 *     output.argmax[0] ...
 *
 * Pages have the numbers 0 to max_num_pages - 1, and each holds page_size positions of one text, in all layers
 * (perk_engine_config has both). The caller says which are whose; perk remembers how many positions of each were
 * written, and nothing else from one step to the next. An engine of this mode takes no requests of its own
 * (perk_engine_submit, perk_engine_step, perk_engine_logits, perk_service_open and what builds on them fail with
 * PERK_INVALID_ARGUMENT), and is used by one thread at a time, as any other.
 */
#ifndef PERK_CALLER_STEP_H
#define PERK_CALLER_STEP_H
#include "perk/engine.h"
#ifdef __cplusplus
extern "C" {
#endif

/* The tokens of a request whose logits are wanted: each is a row of the output. */
typedef enum perk_step_logits { PERK_LOGITS_NONE = 0, PERK_LOGITS_LAST = 1, PERK_LOGITS_ALL = 2 } perk_step_logits;

/* What one request adds in a step: tokens at the positions `position`, position + 1, ... All positions before it were
 * written by earlier steps, by this request or by another that begins alike. A position may be written again: what came
 * after it in its page is then forgotten. */
typedef struct perk_step_request {
    const int32_t *token_ids; /* [token_count] */
    int32_t token_count;      /* 1 or more: a next token, a prompt, a piece of one */
    int32_t position;         /* of the first; the last is below max_seq_length */
    /* [page_count]: pages[i] holds positions i * page_size and on. As many as the positions up to the last one need;
     * more are not looked at. Requests may share pages that none of them writes in this step. */
    const int32_t *pages;
    int32_t page_count;
    perk_step_logits want_logits;
} perk_step_request;

/* Rows in the order of the requests, and of the tokens in each. Valid until the next step. */
typedef struct perk_step_output {
    int32_t rows;
    const int32_t *argmax; /* [rows] the token with the largest logit */
    const float *logits;   /* [rows][perk_engine_vocab_size]; NULL unless asked for */
} perk_step_output;

/* Runs one forward pass and waits for it; on a GPU, in the smallest of the engine's programs that it fits (see
 * program_tokens). `fetch_logits`: 1 brings the logits to the host, 0 the argmax alone. All that `requests` points at
 * is read during the call only.
 *
 * What cannot be run is refused before anything runs, with a message that begins with the number of the request, and
 * changes nothing: PERK_INVALID_ARGUMENT for an engine of another mode, no requests, an id outside the vocabulary, a
 * page that does not exist, that is missing, that one request writes and another one uses, or that lacks positions
 * before `position`; PERK_LIMIT for more tokens, requests, rows or positions than perk_engine_config says. A step that
 * fails in any other way closes the engine: every later call fails in the same way. */
PERK_API perk_status perk_step_run(perk_engine *engine, const perk_step_request *requests, int32_t request_count,
                                   int32_t fetch_logits, perk_step_output *output, perk_error *err);

#ifdef __cplusplus
}
#endif
#endif
