/* One thread owns the engine and its requests. All that others want of it lies in an inbox; all that they may know,
 * it publishes under the lock. */
#include "perk/service.h"

#include "engine.h"
#include "sampling.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

typedef struct service_request service_request;

enum { TIMER_SLACK_NS = 1000 }; /* of the thread's short sleeps; 50,000 by default */

struct service_request {
    uint64_t id;
    /* of the inbox; under the lock */
    service_request *next_in_inbox;
    bool in_inbox, submitted, cancel_wanted, released;
    int32_t *prompt; /* until the engine has it */
    size_t prompt_length;
    perk_sampling sampling;
    /* of the service's thread */
    service_request *next_active;
    perk_request *request; /* NULL: the engine does not know it */
    size_t delivered;      /* tokens that the callback has seen */
    /* published; under the lock. Tokens stay where they are, and more are added behind */
    service_request *previous_news, *next_news;
    bool has_news;
    const int32_t *tokens;
    const perk_logprob *logprobs; /* [published][logprob_count], NULL: not asked for; they stay where they are, too */
    size_t logprob_count;
    size_t published, taken;
    perk_finish finish;
    perk_status status; /* of what ended it, if that was a failure */
    perk_request_stats stats;
};

/* A request's number: how often the place was used, and the place from 1. */
typedef struct table_place {
    service_request *request; /* NULL: free */
    uint32_t uses, next_free; /* place + 1 */
} table_place;

struct perk_service {
    perk_engine *engine;
    perk_service_options options;
    pthread_t thread;
    int fd;
    pthread_mutex_t lock;                /* guards all below */
    pthread_cond_t work, news, idle;     /* for the thread; for who waits for a request; for who waits for the thread */
    service_request *inbox, *inbox_last; /* in the order of arrival */
    service_request *first_news, *last_news;
    table_place *table;
    uint32_t table_size, free_place; /* free_place: + 1; 0: none */
    int32_t unfinished;
    bool started, paused, draining, closing, closed, ended, stepping;
    perk_error failure; /* of a step */
    perk_engine_stats stats;
    service_request *active; /* the thread's own: those that the engine has, by age */
};

/* ---- requests by number ---- */

static perk_status grow_table(perk_service *service, perk_error *err) {
    uint32_t size = service->table_size ? service->table_size * 2 : 16;
    table_place *table = size > service->table_size ? perk_realloc_array(service->table, size, sizeof *table) : NULL;
    if (!table) return perk_fail_memory(err, "a request");
    for (uint32_t i = service->table_size; i < size; i++)
        table[i] = (table_place){.next_free = i + 1 < size ? i + 2 : 0};
    service->free_place = service->table_size + 1;
    service->table = table;
    service->table_size = size;
    return PERK_OK;
}

/* There is a free place. */
static void table_add(perk_service *service, service_request *request) {
    uint32_t place = service->free_place;
    table_place *at = &service->table[place - 1];
    service->free_place = at->next_free;
    at->request = request;
    request->id = (uint64_t)++at->uses << 32 | place;
}

static void table_remove(perk_service *service, const service_request *request) {
    uint32_t place = (uint32_t)request->id;
    service->table[place - 1].request = NULL;
    service->table[place - 1].next_free = service->free_place;
    service->free_place = place;
}

static perk_status find(const perk_service *service, uint64_t id, service_request **out, perk_error *err) {
    uint32_t place = (uint32_t)id;
    *out = NULL;
    if (place >= 1 && place <= service->table_size && service->table[place - 1].uses == id >> 32)
        *out = service->table[place - 1].request;
    if (*out) return PERK_OK;
    return perk_fail(err, PERK_NOT_FOUND, "request %llu is none of this service's, or was released before",
                     (unsigned long long)id);
}

/* ---- news ---- */

static void add_news(perk_service *service, service_request *request) {
    if (request->has_news || request->released) return;
    uint64_t one = 1;
    if (!service->first_news && write(service->fd, &one, sizeof one) != sizeof one) return; /* cannot be full */
    request->has_news = true;
    request->previous_news = service->last_news;
    request->next_news = NULL;
    *(service->last_news ? &service->last_news->next_news : &service->first_news) = request;
    service->last_news = request;
}

static void drop_news(perk_service *service, service_request *request) {
    if (!request->has_news) return;
    request->has_news = false;
    service_request *previous = request->previous_news, *next = request->next_news;
    *(previous ? &previous->next_news : &service->first_news) = next;
    *(next ? &next->previous_news : &service->last_news) = previous;
    uint64_t count;
    if (!service->first_news && read(service->fd, &count, sizeof count) != sizeof count) return; /* was empty */
}

/* ---- the thread ---- */

/* Into the thread's hands, with the lock. */
static void put_in_inbox(perk_service *service, service_request *request) {
    if (request->in_inbox) return;
    request->in_inbox = true;
    request->next_in_inbox = NULL;
    *(service->inbox ? &service->inbox_last->next_in_inbox : &service->inbox) = request;
    service->inbox_last = request;
    pthread_cond_signal(&service->work);
}

static void free_request(service_request *request) {
    perk_request_free(request->request);
    perk_sampling_free(&request->sampling);
    free(request->prompt);
    free(request);
}

/* Makes what has become of a request known; returns whether there was anything. */
static bool publish(perk_service *service, service_request *request) {
    size_t count = request->published;
    perk_finish finish = request->status ? PERK_FINISH_CANCELLED : PERK_FINISH_NONE;
    if (request->request) {
        request->tokens = perk_request_tokens(request->request, &count);
        if (!finish) finish = perk_request_finish(request->request);
    }
    if (count == request->published && finish == request->finish) return false;
    if (request->request) perk_request_statistics(request->request, &request->stats);
    if (request->request) request->logprobs = perk_request_logprobs(request->request, 0, &request->logprob_count);
    if (finish && !request->finish) service->unfinished--;
    request->published = count;
    request->finish = finish;
    add_news(service, request);
    return true;
}

static void hand_to_engine(perk_service *service, service_request *request) {
    request->submitted = true;
    request->status = perk_engine_submit(service->engine, request->prompt, request->prompt_length, &request->sampling,
                                         &request->request, NULL);
    perk_sampling_free(&request->sampling);
    free(request->prompt);
    request->prompt = NULL;
    service_request **link = &service->active;
    while (*link) link = &(*link)->next_active;
    request->next_active = NULL;
    *link = request;
}

static void leave_active(perk_service *service, service_request *request) {
    service_request **link = &service->active;
    while (*link && *link != request) link = &(*link)->next_active;
    if (*link) *link = request->next_active;
}

/* Does what others want: takes requests in, cancels them, frees them. */
static void empty_inbox(perk_service *service) {
    while (service->inbox) {
        service_request *request = service->inbox;
        service->inbox = request->next_in_inbox;
        request->in_inbox = false;
        if (!request->submitted) hand_to_engine(service, request);
        if (request->cancel_wanted && request->request) perk_request_cancel(request->request);
        if (!request->released) continue;
        if (!request->finish) service->unfinished--;
        leave_active(service, request);
        free_request(request);
    }
}

static bool publish_all(perk_service *service) {
    bool news = false;
    for (service_request *request = service->active; request; request = request->next_active) {
        if (service->failure.status && !request->finish) request->status = service->failure.status;
        if (publish(service, request)) news = true;
    }
    perk_engine_statistics(service->engine, &service->stats);
    if (news) pthread_cond_broadcast(&service->news);
    if (service->unfinished == 0) pthread_cond_broadcast(&service->idle);
    return news;
}

/* Calls back, without the lock: nobody but this thread changes what is read here. */
static void deliver(const perk_service *service, service_request *request) {
    size_t count = request->published, first = request->delivered;
    request->delivered = count;
    if (!service->options.on_news || (count == first && !request->finish)) return;
    service->options.on_news(service->options.user, request->id, count > first ? request->tokens + first : NULL,
                             count - first, request->finish);
}

/* With the lock, which is given up meanwhile. */
static void deliver_all(perk_service *service) {
    pthread_mutex_unlock(&service->lock);
    for (service_request *request = service->active, *next; request; request = next) {
        next = request->next_active;
        deliver(service, request);
        if (request->finish) leave_active(service, request);
    }
    pthread_mutex_lock(&service->lock);
}

/* Returns in how many seconds to look again at a kernel that runs by itself; 0: there is nothing to wait for. */
static double step(perk_service *service) {
    perk_error failure = {0};
    bool news;
    double again;
    service->stepping = true;
    pthread_mutex_unlock(&service->lock);
    perk_status status = perk_engine_poll(service->engine, &news, &again, &failure);
    pthread_mutex_lock(&service->lock);
    if (status) service->failure = failure;
    return again;
}

/* A kernel that stays leaves the GPU; nothing happens where none does. What it has made until then is published with
 * the rest. */
static void leave_gpu(perk_service *service) {
    perk_error failure = {0};
    pthread_mutex_unlock(&service->lock);
    perk_status status = perk_engine_pause(service->engine, &failure);
    pthread_mutex_lock(&service->lock);
    if (status && !service->failure.status) service->failure = failure;
}

static bool must_leave_gpu(const perk_service *service) {
    return service->paused || (service->draining && service->unfinished == 0);
}

static bool can_step(const perk_service *service) {
    if (service->paused || service->failure.status) return false;
    for (const service_request *request = service->active; request; request = request->next_active)
        if (!request->finish && !(request->request && perk_request_finish(request->request))) return true;
    return false;
}

static void cancel_all(perk_service *service) {
    empty_inbox(service);
    for (service_request *request = service->active; request; request = request->next_active)
        if (request->request) perk_request_cancel(request->request);
    publish_all(service);
}

static struct timespec time_in(int64_t nanoseconds) {
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += nanoseconds / 1000000000;
    end.tv_nsec += (long)(nanoseconds % 1000000000);
    if (end.tv_nsec >= 1000000000) {
        end.tv_nsec -= 1000000000;
        end.tv_sec++;
    }
    return end;
}

/* One round; returns the seconds to wait before the next, unless somebody wants something. Negative: without limit. */
static double serve_once(perk_service *service) {
    double again = -1;
    empty_inbox(service);
    bool runs = perk_engine_stays(service->engine) && !service->paused && !service->failure.status;
    if (can_step(service) || runs) again = step(service);
    if (perk_engine_stays(service->engine) && must_leave_gpu(service)) leave_gpu(service);
    if (publish_all(service)) deliver_all(service);
    service->stepping = perk_engine_stays(service->engine);
    if (!service->stepping && must_leave_gpu(service)) pthread_cond_broadcast(&service->idle);
    bool wanted = service->inbox || service->closing || (service->stepping && must_leave_gpu(service));
    if (wanted) return 0;
    return again > 0 ? again : can_step(service) ? 0 : -1;
}

static void *serve(void *argument) {
    perk_service *service = argument;
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS);
    pthread_mutex_lock(&service->lock);
    while (!service->closing) {
        double seconds = serve_once(service);
        if (seconds < 0) {
            pthread_cond_wait(&service->work, &service->lock);
        } else if (seconds > 0) {
            struct timespec end = time_in((int64_t)(seconds * 1e9));
            pthread_cond_timedwait(&service->work, &service->lock, &end);
        }
    }
    leave_gpu(service);
    cancel_all(service);
    deliver_all(service);
    empty_inbox(service); /* of the callbacks */
    service->stepping = false;
    service->ended = true;
    pthread_cond_broadcast(&service->idle);
    pthread_mutex_unlock(&service->lock);
    return NULL;
}

/* ---- opening and closing ---- */

/* Signals are for the threads of the program that embeds perk. */
static perk_status start_thread(perk_service *service, perk_error *err) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int failure = pthread_create(&service->thread, NULL, serve, service);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    service->started = failure == 0;
    service->closed = service->ended = !service->started;
    if (!failure) return PERK_OK;
    return perk_fail(err, PERK_INTERNAL, "the service's thread could not be started: %s", strerror(failure));
}

/* Both cannot fail on Linux: attributes are small numbers. */
static void init_locks(perk_service *service) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&service->lock, NULL);
    pthread_cond_init(&service->work, &monotonic);
    pthread_cond_init(&service->news, &monotonic);
    pthread_cond_init(&service->idle, NULL);
    pthread_condattr_destroy(&monotonic);
}

perk_status perk_service_open(perk_service **out, perk_engine *engine, const perk_service_options *options,
                              perk_error *err) {
    *out = NULL;
    if (!engine) return perk_fail(err, PERK_INVALID_ARGUMENT, "a service needs an engine");
    perk_status status = perk_engine_check_mode(engine, err);
    if (status) {
        perk_engine_free(engine);
        return status;
    }
    perk_service *service = options && options->max_unfinished < 0 ? NULL : perk_calloc(1, sizeof *service);
    if (!service) {
        perk_engine_free(engine);
        if (!options || options->max_unfinished >= 0) return perk_fail_memory(err, "the service");
        return perk_fail(err, PERK_INVALID_ARGUMENT, "max_unfinished %d: must be 0 (no limit) or more",
                         options->max_unfinished);
    }
    service->engine = engine;
    if (options) service->options = *options;
    init_locks(service);
    perk_engine_statistics(engine, &service->stats);
    service->closed = service->ended = true;
    service->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (service->fd < 0) status = perk_fail(err, PERK_IO, "no event descriptor can be had: %s", strerror(errno));
    if (!status) status = start_thread(service, err);
    if (status) {
        perk_service_free(service);
        return status;
    }
    *out = service;
    return PERK_OK;
}

static perk_status refuse_callback(const perk_service *service, const char *what, perk_error *err) {
    if (!service->started || !pthread_equal(pthread_self(), service->thread)) return PERK_OK;
    return perk_fail(err, PERK_INVALID_ARGUMENT, "the service's callback may not %s: its own thread would wait for it",
                     what);
}

perk_status perk_service_close(perk_service *service, perk_error *err) {
    perk_status status = refuse_callback(service, "close", err);
    if (status) return status;
    pthread_mutex_lock(&service->lock);
    bool first = !service->closing && !service->closed;
    service->closing = true;
    pthread_cond_signal(&service->work);
    if (first) {
        pthread_mutex_unlock(&service->lock);
        pthread_join(service->thread, NULL);
        pthread_mutex_lock(&service->lock);
        service->closed = true;
        pthread_cond_broadcast(&service->idle);
    }
    while (!service->closed) pthread_cond_wait(&service->idle, &service->lock);
    pthread_mutex_unlock(&service->lock);
    return PERK_OK;
}

void perk_service_free(perk_service *service) {
    if (!service) return;
    perk_service_close(service, NULL);
    for (uint32_t i = 0; i < service->table_size; i++)
        if (service->table[i].request) free_request(service->table[i].request);
    free(service->table);
    if (service->fd >= 0) close(service->fd);
    pthread_cond_destroy(&service->work);
    pthread_cond_destroy(&service->news);
    pthread_cond_destroy(&service->idle);
    pthread_mutex_destroy(&service->lock);
    perk_engine_free(service->engine);
    free(service);
}

/* ---- for any thread ---- */

static perk_status check_open(const perk_service *service, perk_error *err) {
    if (service->failure.status && err) *err = service->failure;
    if (service->failure.status) return service->failure.status;
    if (service->closing) return perk_fail(err, PERK_CANCELLED, "the service is closed");
    if (service->draining)
        return perk_fail(err, PERK_CANCELLED, "the service drains and takes no requests: perk_service_resume ends it");
    int32_t most = service->options.max_unfinished;
    if (most && service->unfinished >= most)
        return perk_fail(err, PERK_LIMIT,
                         "%d requests are unfinished, as many as max_unfinished allows: try again "
                         "when one has ended",
                         most);
    return PERK_OK;
}

static service_request *make_request(const int32_t *prompt, size_t prompt_length, const perk_sampling *sampling) {
    service_request *request = perk_calloc(1, sizeof *request);
    if (!request) return NULL;
    request->prompt = perk_calloc(prompt_length, sizeof *prompt);
    request->prompt_length = prompt_length;
    request->stats.prompt_tokens = (int32_t)prompt_length;
    if (!request->prompt || (sampling && perk_sampling_copy(&request->sampling, sampling, NULL))) {
        free(request->prompt);
        free(request);
        return NULL;
    }
    memcpy(request->prompt, prompt, prompt_length * sizeof *prompt);
    return request;
}

perk_status perk_service_submit(perk_service *service, const int32_t *prompt, size_t prompt_length,
                                const perk_sampling *sampling, uint64_t *id, perk_error *err) {
    *id = 0;
    perk_status status = perk_engine_check(service->engine, prompt, prompt_length, sampling, err);
    if (status) return status;
    service_request *request = make_request(prompt, prompt_length, sampling);
    if (!request) return perk_fail_memory(err, "a request");
    pthread_mutex_lock(&service->lock);
    status = check_open(service, err);
    if (!status && service->free_place == 0) status = grow_table(service, err);
    if (!status) {
        table_add(service, request);
        put_in_inbox(service, request);
        service->unfinished++;
        *id = request->id;
    }
    pthread_mutex_unlock(&service->lock);
    if (status) free_request(request);
    return status;
}

/* Hands out what is there. */
static perk_status take(perk_service *service, service_request *request, int32_t *tokens, size_t capacity,
                        perk_answer *answer, perk_error *err) {
    size_t count = PERK_MIN(capacity, request->published - request->taken);
    if (count) memcpy(tokens, request->tokens + request->taken, count * sizeof *tokens);
    request->taken += count;
    /* A failure is told by a call of its own. */
    bool all = request->taken == request->published && (!request->status || count == 0);
    *answer =
        (perk_answer){.count = count, .finish = all ? request->finish : PERK_FINISH_NONE, .stats = request->stats};
    if (all) drop_news(service, request);
    if (!request->status || !all) return PERK_OK;
    if (service->failure.status != request->status)
        return perk_fail(err, request->status, "the engine did not take the request: %s",
                         perk_status_text(request->status));
    if (err) *err = service->failure;
    return request->status;
}

perk_status perk_service_poll(perk_service *service, uint64_t id, int32_t *tokens, size_t capacity, perk_answer *answer,
                              perk_error *err) {
    service_request *request;
    *answer = (perk_answer){0};
    pthread_mutex_lock(&service->lock);
    perk_status status = find(service, id, &request, err);
    if (!status) status = take(service, request, tokens, capacity, answer, err);
    pthread_mutex_unlock(&service->lock);
    return status;
}

perk_status perk_service_logprobs(perk_service *service, uint64_t id, size_t place, perk_logprob *logprobs,
                                  size_t capacity, size_t *count, perk_error *err) {
    service_request *request;
    *count = 0;
    pthread_mutex_lock(&service->lock);
    perk_status status = find(service, id, &request, err);
    if (!status && request->logprobs && place < request->published) {
        *count = PERK_MIN(capacity, request->logprob_count);
        if (*count) memcpy(logprobs, request->logprobs + place * request->logprob_count, *count * sizeof *logprobs);
    }
    pthread_mutex_unlock(&service->lock);
    return status;
}

perk_status perk_service_wait(perk_service *service, uint64_t id, int32_t *tokens, size_t capacity, int32_t timeout_ms,
                              perk_answer *answer, perk_error *err) {
    service_request *request;
    *answer = (perk_answer){0};
    perk_status status = refuse_callback(service, "wait", err);
    if (status) return status;
    struct timespec end = time_in((int64_t)PERK_MAX(timeout_ms, 0) * 1000000);
    bool late = timeout_ms == 0;
    pthread_mutex_lock(&service->lock);
    /* Looked up anew each time: it may be released meanwhile. */
    while (!(status = find(service, id, &request, err)) && !late && request->taken == request->published &&
           !request->finish) {
        if (timeout_ms < 0)
            pthread_cond_wait(&service->news, &service->lock);
        else
            late = pthread_cond_timedwait(&service->news, &service->lock, &end) == ETIMEDOUT;
    }
    if (!status) status = take(service, request, tokens, capacity, answer, err);
    pthread_mutex_unlock(&service->lock);
    return status;
}

perk_status perk_service_cancel(perk_service *service, uint64_t id, perk_error *err) {
    service_request *request;
    pthread_mutex_lock(&service->lock);
    perk_status status = find(service, id, &request, err);
    if (!status && !request->finish) {
        request->cancel_wanted = true;
        put_in_inbox(service, request);
    }
    pthread_mutex_unlock(&service->lock);
    return status;
}

perk_status perk_service_release(perk_service *service, uint64_t id, perk_error *err) {
    service_request *request;
    pthread_mutex_lock(&service->lock);
    perk_status status = find(service, id, &request, err);
    if (!status) {
        drop_news(service, request);
        table_remove(service, request);
        request->released = request->cancel_wanted = true;
        pthread_cond_broadcast(&service->news); /* for who waits for it */
        if (service->ended)
            free_request(request);
        else
            put_in_inbox(service, request);
    }
    pthread_mutex_unlock(&service->lock);
    return status;
}

/* ---- for event loops ---- */

int perk_service_fd(const perk_service *service) { return service->fd; }

perk_status perk_service_news(perk_service *service, uint64_t *requests, size_t capacity, size_t *count,
                              perk_error *err) {
    (void)err;
    *count = 0;
    pthread_mutex_lock(&service->lock);
    while (service->first_news && *count < capacity) {
        requests[(*count)++] = service->first_news->id;
        drop_news(service, service->first_news);
    }
    pthread_mutex_unlock(&service->lock);
    return PERK_OK;
}

/* ---- the whole ---- */

perk_status perk_service_pause(perk_service *service, perk_error *err) {
    perk_status status = refuse_callback(service, "pause", err);
    if (status) return status;
    pthread_mutex_lock(&service->lock);
    service->paused = true;
    pthread_cond_signal(&service->work);
    while (service->stepping && service->paused) pthread_cond_wait(&service->idle, &service->lock);
    if (!service->paused) status = perk_fail(err, PERK_CANCELLED, "perk_service_resume ended it at once");
    pthread_mutex_unlock(&service->lock);
    return status;
}

perk_status perk_service_drain(perk_service *service, perk_error *err) {
    perk_status status = refuse_callback(service, "drain", err);
    if (status) return status;
    pthread_mutex_lock(&service->lock);
    if (service->paused)
        status = perk_fail(err, PERK_INVALID_ARGUMENT, "a paused service cannot drain: perk_service_resume first");
    else
        service->draining = true;
    pthread_cond_signal(&service->work);
    while (!status && service->draining && (service->unfinished > 0 || service->stepping) && !service->ended)
        pthread_cond_wait(&service->idle, &service->lock);
    if (!status && !service->draining && (service->unfinished > 0 || service->stepping))
        status = perk_fail(err, PERK_CANCELLED, "perk_service_resume ended it before all requests had ended");
    pthread_mutex_unlock(&service->lock);
    return status;
}

perk_status perk_service_resume(perk_service *service, perk_error *err) {
    (void)err;
    pthread_mutex_lock(&service->lock);
    service->paused = service->draining = false;
    pthread_cond_signal(&service->work);
    pthread_cond_broadcast(&service->idle);
    pthread_mutex_unlock(&service->lock);
    return PERK_OK;
}

void perk_service_statistics(perk_service *service, perk_engine_stats *out) {
    pthread_mutex_lock(&service->lock);
    *out = service->stats;
    pthread_mutex_unlock(&service->lock);
}
