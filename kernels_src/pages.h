/* The pool of KV pages: who holds which, what a page holds, which is taken next.
 *
 * A page is a number from 0. It has as many owners as there are requests that read it; one without owners is unused. A
 * page that is completely written may be listed under the hash of all tokens up to its end: requests that begin alike
 * find it there and become owners, too, and nobody writes to it any more. A listed page stays listed when its last
 * owner leaves, and is found again until the room is needed: the unused pages stand in one row, those that hold nothing
 * in front, then the listed ones, the longest unused first, and pages are taken from the front.
 */
#ifndef PERK_PAGES_H
#define PERK_PAGES_H

#include "page_hash.h"

typedef struct perk_page {
    perk_page_hash hash; /* of a listed page */
    int32_t owners;
    int32_t listed;
    int32_t before, after; /* its neighbours in the row of unused pages, -1: none */
} perk_page;

typedef struct perk_pool_state {
    int32_t unused, listed, kept; /* how many pages are; kept: unused and listed */
    int32_t first, last;          /* of the row of unused pages, -1: it is empty */
    int32_t reserved;
    uint64_t evictions; /* kept pages whose content was given up */
} perk_pool_state;

typedef struct perk_pool {
    perk_pool_state *state;
    perk_page *pages; /* [page_count] */
    int32_t *table;   /* [table_mask + 1] open addressing: page + 1, or 0 */
    int32_t page_count, table_mask;
} perk_pool;

/* Places of the table: a power of two of which at most half is ever taken. */
PERK_SHARED_CODE uint64_t perk_pool_table_size(int32_t page_count) {
    uint64_t size = 2;
    while (size < 2 * (uint64_t)page_count) size *= 2;
    return size;
}

/* ---- the row of unused pages ---- */

PERK_SHARED_CODE void perk_pool_link(perk_pool *pool, int32_t page, int32_t before, int32_t after) {
    pool->pages[page].before = before;
    pool->pages[page].after = after;
    *(before < 0 ? &pool->state->first : &pool->pages[before].after) = page;
    *(after < 0 ? &pool->state->last : &pool->pages[after].before) = page;
    pool->state->unused++;
}

PERK_SHARED_CODE void perk_pool_unlink(perk_pool *pool, int32_t page) {
    int32_t before = pool->pages[page].before, after = pool->pages[page].after;
    *(before < 0 ? &pool->state->first : &pool->pages[before].after) = after;
    *(after < 0 ? &pool->state->last : &pool->pages[after].before) = before;
    pool->state->unused--;
}

/* All pages unused, in memory of zeros. */
PERK_SHARED_CODE void perk_pool_begin(perk_pool *pool) {
    pool->state->first = pool->state->last = -1;
    for (int32_t page = 0; page < pool->page_count; page++) perk_pool_link(pool, page, pool->state->last, -1);
}

/* ---- the table ---- */

/* Where a page with this hash is looked for first. */
PERK_SHARED_CODE int32_t perk_pool_home(const perk_pool *pool, perk_page_hash hash) {
    return (int32_t)(hash.low & (uint32_t)pool->table_mask);
}

/* Where `hash` is listed, or the empty place where it would be. */
PERK_SHARED_CODE int32_t perk_pool_place(const perk_pool *pool, perk_page_hash hash) {
    int32_t place = perk_pool_home(pool, hash);
    while (pool->table[place] && !perk_page_hash_equal(pool->pages[pool->table[place] - 1].hash, hash))
        place = (place + 1) & pool->table_mask;
    return place;
}

/* The page that holds the tokens with this hash, or -1. */
PERK_SHARED_CODE int32_t perk_pool_find(const perk_pool *pool, perk_page_hash hash) {
    return pool->table[perk_pool_place(pool, hash)] - 1;
}

/* Lets others find a completely written page, unless it or another one already is listed. Returns whether it is new. */
PERK_SHARED_CODE int perk_pool_list(perk_pool *pool, int32_t page, perk_page_hash hash) {
    if (pool->pages[page].listed) return 0;
    int32_t place = perk_pool_place(pool, hash);
    if (pool->table[place]) return 0;
    pool->table[place] = page + 1;
    pool->pages[page].hash = hash;
    pool->pages[page].listed = 1;
    pool->state->listed++;
    return 1;
}

/* Takes a page out of the table; those behind it that would no longer be found from their own place move up. */
PERK_SHARED_CODE void perk_pool_unlist(perk_pool *pool, int32_t page) {
    int32_t mask = pool->table_mask, hole = perk_pool_place(pool, pool->pages[page].hash);
    for (int32_t at = (hole + 1) & mask; pool->table[at]; at = (at + 1) & mask) {
        int32_t home = perk_pool_home(pool, pool->pages[pool->table[at] - 1].hash);
        if (((at - home) & mask) < ((at - hole) & mask)) continue;
        pool->table[hole] = pool->table[at];
        hole = at;
    }
    pool->table[hole] = 0;
    pool->pages[page].listed = 0;
    pool->state->listed--;
}

/* ---- owners ---- */

/* Takes an unused page for a first owner, who may write to it. -1: there is none. */
PERK_SHARED_CODE int32_t perk_pool_take(perk_pool *pool) {
    int32_t page = pool->state->first;
    if (page < 0) return -1;
    perk_pool_unlink(pool, page);
    if (pool->pages[page].listed) {
        perk_pool_unlist(pool, page);
        pool->state->kept--;
        pool->state->evictions++;
    }
    pool->pages[page].owners = 1;
    return page;
}

/* One more owner of a listed page. */
PERK_SHARED_CODE void perk_pool_share(perk_pool *pool, int32_t page) {
    if (pool->pages[page].owners++ > 0) return;
    perk_pool_unlink(pool, page);
    pool->state->kept--;
}

/* One owner less. What begins a text should be given back after what follows it: it is then kept longer. Returns 0, and
 * does nothing, where the page has no owner: a bug of the caller. */
PERK_SHARED_CODE int perk_pool_give(perk_pool *pool, int32_t page) {
    if (page < 0 || page >= pool->page_count || pool->pages[page].owners == 0) return 0;
    if (--pool->pages[page].owners > 0) return 1;
    if (pool->pages[page].listed) {
        perk_pool_link(pool, page, pool->state->last, -1);
        pool->state->kept++;
    } else {
        perk_pool_link(pool, page, -1, pool->state->first); /* warm, and taken first */
    }
    return 1;
}

#endif
