#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#define MAX_THREADS 1024

typedef struct helper {
    perk_threads *pool;
    pthread_t thread;
    int number; /* from 1: the caller is 0 */
} helper;

struct perk_threads {
    int count; /* with the caller */
    helper *helpers;
    int started;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t begun, ended;
    uint64_t loop; /* counts perk_threads_run calls; a change wakes the helpers */
    bool closing;
    int running; /* helpers that have not finished this loop */
    perk_threads_body *body;
    void *context;
    size_t items;
    size_t chunks; /* threads that take part */
};

static void run_chunk(const perk_threads *pool, size_t number) {
    size_t begin = pool->items * number / pool->chunks, end = pool->items * (number + 1) / pool->chunks;
    if (begin < end) pool->body(pool->context, begin, end, (int)number);
}

static void *help(void *argument) {
    const helper *self = argument;
    perk_threads *pool = self->pool;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->loop == seen && !pool->closing) pthread_cond_wait(&pool->begun, &pool->lock);
        if (pool->closing) break;
        seen = pool->loop;
        if ((size_t)self->number >= pool->chunks) continue;
        pthread_mutex_unlock(&pool->lock);
        run_chunk(pool, (size_t)self->number);
        pthread_mutex_lock(&pool->lock);
        if (--pool->running == 0) pthread_cond_signal(&pool->ended);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Signals are for the threads of the program that embeds perk, not for these. */
static perk_status start_helpers(perk_threads *pool, perk_error *err) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int failure = 0;
    while (!failure && pool->started < pool->count - 1) {
        helper *next = &pool->helpers[pool->started];
        *next = (helper){.pool = pool, .number = pool->started + 1};
        failure = pthread_create(&next->thread, NULL, help, next);
        if (!failure) pool->started++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!failure) return PERK_OK;
    return perk_fail(err, PERK_LIMIT, "cannot start thread %d of %d: %s; ask for fewer threads", pool->started + 2,
                     pool->count, strerror(failure));
}

static int usable_cores(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    return PERK_MAX(CPU_COUNT(&set), 1);
}

perk_status perk_threads_create(perk_threads **out, int count, perk_error *err) {
    *out = NULL;
    if (count < 0 || count > MAX_THREADS)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%d threads: must be from 0 (all cores) to %d", count,
                         MAX_THREADS);
    perk_threads *pool = perk_calloc(1, sizeof *pool);
    if (!pool) return perk_fail_memory(err, "the thread pool");
    pool->count = count ? count : PERK_MIN(usable_cores(), MAX_THREADS);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->begun, NULL);
    pthread_cond_init(&pool->ended, NULL);
    pool->helpers = perk_calloc((size_t)pool->count, sizeof *pool->helpers);
    perk_status status = pool->helpers ? start_helpers(pool, err) : perk_fail_memory(err, "the thread pool");
    if (status) {
        perk_threads_free(pool);
        return status;
    }
    *out = pool;
    return PERK_OK;
}

void perk_threads_free(perk_threads *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->closing = true;
    pthread_cond_broadcast(&pool->begun);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->helpers[i].thread, NULL);
    pthread_cond_destroy(&pool->ended);
    pthread_cond_destroy(&pool->begun);
    pthread_mutex_destroy(&pool->lock);
    free(pool->helpers);
    free(pool);
}

int perk_threads_count(const perk_threads *pool) { return pool->count; }

void perk_threads_run(perk_threads *pool, size_t items, size_t min_chunk, perk_threads_body *body, void *context) {
    size_t chunks = PERK_MIN((size_t)pool->count, items / PERK_MAX(min_chunk, (size_t)1));
    if (chunks <= 1) {
        if (items) body(context, 0, items, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->body = body;
    pool->context = context;
    pool->items = items;
    pool->chunks = chunks;
    pool->running = (int)chunks - 1;
    pool->loop++;
    pthread_cond_broadcast(&pool->begun);
    pthread_mutex_unlock(&pool->lock);
    run_chunk(pool, 0);
    pthread_mutex_lock(&pool->lock);
    while (pool->running) pthread_cond_wait(&pool->ended, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}
