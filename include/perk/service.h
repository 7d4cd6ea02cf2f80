/* An engine that runs in a thread of its own: any thread submits, and reads tokens as they come.
 *
 *     perk_service_open(&service, engine, NULL, &err);
 *     perk_service_submit(service, prompt, count, NULL, &id, &err);
 *     do {
 *         perk_service_wait(service, id, tokens, 64, -1, &answer, &err);
 *         ... tokens[0 .. answer.count) ...
 *     } while (answer.finish == PERK_FINISH_NONE);
 *     perk_service_release(service, id, &err);
 *     perk_service_free(service);
 *
 * Every function may be called by any thread at any time, but perk_service_free, which must be the last. While the
 * service has an engine, nobody else steps it, submits to it or frees it; its configuration, report and tokenizer stay
 * readable. A request is known by a number that is never used again, so that what is late or done twice gets
 * PERK_NOT_FOUND instead of somebody else's tokens.
 */
#ifndef PERK_SERVICE_H
#define PERK_SERVICE_H
#include "perk/engine.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct perk_service perk_service;

/* Called by the service's thread between two steps, for each request that has new tokens or has ended. `tokens`, valid
 * during the call, are those since the last one; with a `finish` other than NONE it is the request's last call. The
 * next step begins when all have returned; with PERK_MODE_ONLINE, the next tokens are taken in then. One may still come
 * for a request that another thread has just released. It may submit, poll, cancel and release, but not wait, pause,
 * drain or close. */
typedef void (*perk_on_news)(void *user, uint64_t request, const int32_t *tokens, size_t count, perk_finish finish);

typedef struct perk_service_options {
    int32_t max_unfinished; /* a request beyond is refused with PERK_LIMIT; 0: no limit */
    perk_on_news on_news;   /* may be NULL. What it was told can be polled as well */
    void *user;
} perk_service_options;

/* What was handed out, and how the request stands; `stats` as of its last news. */
typedef struct perk_answer {
    size_t count;       /* tokens written */
    perk_finish finish; /* NONE as long as more may come, or more has come than the caller had room for */
    perk_request_stats stats;
} perk_answer;

/* Takes the engine over, also when it fails to open: it is freed with the service, or at once. `options` may be NULL.
 */
PERK_API perk_status perk_service_open(perk_service **out, perk_engine *engine, const perk_service_options *options,
                                       perk_error *err);
/* Ends all requests as cancelled, and the thread; no kernel stays on the GPU. What was computed can still be polled;
 * submissions are refused. Fails with PERK_INVALID_ARGUMENT in the callback. */
PERK_API perk_status perk_service_close(perk_service *service, perk_error *err);
/* Closes, and frees service and engine. */
PERK_API void perk_service_free(perk_service *service);

/* Queues a request, as perk_engine_submit does, and with the same failures; *request is its number. Further failures:
 * PERK_LIMIT beyond max_unfinished, PERK_CANCELLED when the service drains or is closed, and that of a step which
 * failed. */
PERK_API perk_status perk_service_submit(perk_service *service, const int32_t *prompt, size_t prompt_length,
                                         const perk_sampling *sampling, uint64_t *request, perk_error *err);
/* Hands out up to `capacity` tokens that came since the last call, each once. After a failed step the request ends:
 * what came before is handed out, then the call fails as the step did. PERK_NOT_FOUND: no such request. */
PERK_API perk_status perk_service_poll(perk_service *service, uint64_t request, int32_t *tokens, size_t capacity,
                                       perk_answer *answer, perk_error *err);
/* The same, but waits up to `timeout_ms` (negative: without limit) until there is a token or the request has ended;
 * count 0 and finish NONE: the time is over. */
PERK_API perk_status perk_service_wait(perk_service *service, uint64_t request, int32_t *tokens, size_t capacity,
                                       int32_t timeout_ms, perk_answer *answer, perk_error *err);
/* Copies up to `capacity` of the log probabilities at a place of the answer, as perk_request_logprobs orders them;
 * *count is 0 when the request did not ask for them or the place has no token yet. PERK_NOT_FOUND: no such request. */
PERK_API perk_status perk_service_logprobs(perk_service *service, uint64_t request, size_t place,
                                           perk_logprob *logprobs, size_t capacity, size_t *count, perk_error *err);
/* Ends a request before the next step (with PERK_MODE_ONLINE, the kernel may be at work on it for one more); nothing
 * happens to one that has ended. */
PERK_API perk_status perk_service_cancel(perk_service *service, uint64_t request, perk_error *err);
/* Cancels the request if it is unfinished, and forgets it: its number means nothing any more. */
PERK_API perk_status perk_service_release(perk_service *service, uint64_t request, perk_error *err);

/* ---- for event loops ---- */

/* A descriptor that is readable while some request has news that neither perk_service_news has named nor
 * perk_service_poll handed out. For poll, select and epoll alone; the service's own. */
PERK_API int perk_service_fd(const perk_service *service);
/* Names up to `capacity` requests that have news, those first that have had them the longest. */
PERK_API perk_status perk_service_news(perk_service *service, uint64_t *requests, size_t capacity, size_t *count,
                                       perk_error *err);

/* ---- the whole ---- */

/* Returns when no step runs and no kernel stays on the GPU; none begins until perk_service_resume. Requests may be
 * submitted meanwhile. PERK_CANCELLED: another thread resumed before it returned. */
PERK_API perk_status perk_service_pause(perk_service *service, perk_error *err);
/* Refuses new requests, and returns when all others have ended and no kernel stays on the GPU. Fails with
 * PERK_INVALID_ARGUMENT while paused, and with PERK_CANCELLED when another thread resumed before. */
PERK_API perk_status perk_service_drain(perk_service *service, perk_error *err);
/* Ends a pause, or the refusal of new requests after perk_service_drain. */
PERK_API perk_status perk_service_resume(perk_service *service, perk_error *err);
/* As of the last step. */
PERK_API void perk_service_statistics(perk_service *service, perk_engine_stats *out);

#ifdef __cplusplus
}
#endif
#endif
