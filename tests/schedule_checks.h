/* For the tests of schedules: random numbers, and what must hold between any two calls, recounted from nothing. */
#ifndef PERK_TESTS_SCHEDULE_CHECKS_H
#define PERK_TESTS_SCHEDULE_CHECKS_H

#include "kernels_src/schedule.h"
#include "sampler.h"
#include "test.h"

#include <stdlib.h>

typedef struct random_draws {
    uint64_t seed, place;
} random_draws;

static inline int roll(random_draws *dice, int low, int high) {
    return low + (int)(perk_uniform(dice->seed, dice->place++) * (high - low + 1));
}

/* Every page has as many owners as there are requests that hold it; the rest stand in the row of unused ones, or are
 * borrowed. */
static inline void check_page_owners(const perk_schedule *s, const int32_t *owners, int32_t borrowed) {
    const perk_pool *pool = &s->pool;
    int32_t held = 0, unused = 0, kept = 0, listed = 0, before = -1, seen_listed = 0;
    for (int32_t page = 0; page < pool->page_count; page++) {
        if (owners[page] == 0 && pool->pages[page].owners == 1)
            borrowed--;
        else
            CHECK(owners[page] == pool->pages[page].owners, "page %d has %d owners, counts %d", page, owners[page],
                  pool->pages[page].owners);
        held += pool->pages[page].owners > 0;
        listed += pool->pages[page].listed;
        if (pool->pages[page].listed) CHECK(perk_pool_find(pool, pool->pages[page].hash) == page);
    }
    CHECK(borrowed == 0, "%d pages are held by nobody", -borrowed);
    for (int32_t page = pool->state->first; page >= 0; before = page, page = pool->pages[page].after) {
        CHECK(pool->pages[page].owners == 0 && pool->pages[page].before == before && ++unused <= pool->page_count);
        CHECK(pool->pages[page].listed >= seen_listed, "an empty page stands behind one that holds something");
        seen_listed = pool->pages[page].listed;
        kept += seen_listed;
    }
    CHECK(pool->state->last == before && pool->state->unused == unused && pool->state->listed == listed &&
          pool->state->kept == kept);
    CHECK(held + unused == pool->page_count, "pages were lost");
    for (int32_t i = 0; i <= pool->table_mask; i++) listed -= pool->table[i] != 0;
    CHECK(listed == 0, "the table holds what is not listed");
}

static inline void check_running(const perk_schedule *s, const perk_slot *r, int32_t *owners, char *rows) {
    CHECK(r->row >= 0 && r->row < s->limits.requests && !rows[r->row]++, "row %d", r->row);
    CHECK(r->page_count * s->limits.page_size >= r->cached && r->cached < r->length);
    CHECK(r->offered <= r->page_count && r->hash_count * s->limits.page_size <= r->length);
    CHECK(!r->shares || r->hash_count >= r->cached >> s->page_shift);
    for (int32_t i = 0; i < r->page_count; i++) {
        int32_t page = perk_slot_pages(s, r)[i];
        CHECK(page >= 0 && page < s->limits.page_count);
        owners[page]++;
        /* Who may still write is alone. */
        if ((i + 1) * s->limits.page_size > r->cached)
            CHECK(s->pool.pages[page].owners == 1 && !s->pool.pages[page].listed, "page %d is shared too early", page);
    }
}

/* `borrowed`: pages that somebody outside of the requests has taken. */
static inline void check_schedule(const perk_schedule *s, int32_t borrowed) {
    int32_t *owners = calloc((size_t)s->limits.page_count, sizeof *owners), in_use = 0;
    char *rows = calloc((size_t)s->limits.requests, 1), *slots = calloc((size_t)s->limits.slots, 1);
    CHECK(owners && rows && slots && s->state->running <= s->state->unfinished);
    for (int32_t place = 0; place < s->state->unfinished; place++) {
        const perk_slot *r = &s->slots[s->order[place]];
        CHECK(!slots[s->order[place]]++, "slot %d stands in the order twice", s->order[place]);
        CHECK(r->state == (place < s->state->running ? PERK_SLOT_RUNNING : PERK_SLOT_WAITING));
        if (r->state == PERK_SLOT_RUNNING)
            check_running(s, r, owners, rows);
        else
            CHECK(r->page_count == 0 && r->row == -1 && r->cached == 0);
    }
    for (int32_t slot = 0; slot < s->limits.slots; slot++) in_use += s->slots[slot].state != PERK_SLOT_FREE;
    CHECK(s->state->free_slots == s->limits.slots - in_use);
    CHECK(s->state->free_rows == s->limits.requests - s->state->running);
    check_page_owners(s, owners, borrowed);
    free(owners);
    free(rows);
    free(slots);
}

#endif
