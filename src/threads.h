/* A pool of threads that share loops. The caller is one of them: a pool of one starts no thread. */
#ifndef PERK_SRC_THREADS_H
#define PERK_SRC_THREADS_H

#include "base.h"

typedef struct perk_threads perk_threads;

/* Runs items [begin, end) of a loop; `thread` is from 0 to the pool's count - 1 and tells scratch memory apart. */
typedef void perk_threads_body(void *context, size_t begin, size_t end, int thread);

/* `count` threads, the caller included; 0: as many as the process may run on. */
perk_status perk_threads_create(perk_threads **out, int count, perk_error *err);
void perk_threads_free(perk_threads *threads);
int perk_threads_count(const perk_threads *threads);

/* Runs `body` over `items` in one contiguous chunk a thread, of at least `min_chunk` items unless there is only one
 * chunk, and returns when all are done. One caller at a time; bodies must not call it. */
void perk_threads_run(perk_threads *threads, size_t items, size_t min_chunk, perk_threads_body *body, void *context);

#endif
