/* What happens between two steps: requests arrive, are admitted, get pages and tokens of the next step, take in what
 * the step picked, end. One thread calls, between steps; docs/scheduling.md has the reasons.
 *
 * Requests are served in the order of their arrival: an older one gets its tokens and its pages first. Those that run,
 * that is, hold pages, are therefore always the oldest ones, and what a step has left over after them goes to the next
 * in line:
 *  - a waiting request is admitted when the pages of all its known tokens can be had, and its prompt enters in chunks;
 *  - full pages that hold the very tokens with which a request goes on are shared instead of computed again;
 *  - a running request that needs a page when none is unused takes those of the newest running request, which is set
 *    back: its pages are given up and computed again later, its tokens are kept.
 * The pool holds at least one request of `positions`, so the oldest request always proceeds: nothing can deadlock, and
 * every request ends in its turn.
 *
 * All state lies in one block of memory without any pointers, laid out by the limits: perk_schedule_layout. Whoever
 * works on it has a perk_schedule, which points into the block.
 *
 * Between two steps, the block may go to somebody whose steps have room for fewer or more tokens and rows of logits:
 * what these limits lay out stands at the end, belongs to the step, and lies within the room of the largest.
 */
#ifndef PERK_SCHEDULE_H
#define PERK_SCHEDULE_H

#include "draw.h"
#include "pages.h"
#include "step.h"

enum { PERK_STOP_IDS = 32 }; /* token ids that end a request */

enum { PERK_SLOT_FREE, PERK_SLOT_OPEN, PERK_SLOT_WAITING, PERK_SLOT_RUNNING, PERK_SLOT_FINISHED };

/* Why a request ended. */
enum { PERK_END_NONE, PERK_END_STOP, PERK_END_LENGTH, PERK_END_CANCELLED };

typedef struct perk_schedule_limits {
    int32_t slots;                        /* requests that it knows, in any state */
    int32_t tokens, requests, logit_rows; /* of a step */
    int32_t positions;                    /* of a request */
    int32_t page_size, page_count;        /* page_size: a power of two */
} perk_schedule_limits;

/* One request. */
typedef struct perk_slot {
    int32_t state, end;
    int32_t prompt_length, length; /* tokens known: the prompt, and the answer with it */
    int32_t limit;                 /* the length at which it ends */
    int32_t cached;                /* positions in its pages */
    int32_t row;                   /* of the batch and its page table, while it runs */
    int32_t page_count;            /* in that row */
    int32_t hash_count;            /* full pages whose hashes are known */
    int32_t offered;               /* full pages that were offered to others */
    int32_t scheduled, logit_row;  /* tokens in the step under way; its row of logits, -1: none */
    uint32_t refused_at;           /* the state's `changes` when it was not admitted */
    int32_t found;                 /* positions that were never computed, but found in pages of others */
    int32_t set_backs;
    int32_t shares; /* its pages, with requests that begin alike: commit hashes them */
    int32_t stop_count;
    int32_t stop_ids[PERK_STOP_IDS];
    perk_draw_rule rule; /* how its tokens are picked, for a kernel that does it by itself */
} perk_slot;

/* Of a step. */
typedef struct perk_step_size {
    int32_t tokens, logit_rows;
} perk_step_size;

typedef struct perk_schedule_state {
    int32_t unfinished, running; /* of `order` */
    int32_t free_slots, free_rows;
    uint32_t changes; /* moves when a page is given back, or what a refused request did not find is there */
    int32_t reserved;
    perk_page_hash wanted; /* of the first page that the last refused request did not find; zeros: none */
    uint64_t steps, step_tokens, answer_tokens, found_tokens, set_backs, finished; /* since the beginning */
} perk_schedule_state;

/* How requests and pages stand: how the block begins. */
typedef struct perk_standing {
    perk_schedule_state state;
    perk_pool_state pool;
} perk_standing;

/* Places of the arrays in the block, in 64-bit words. */
typedef struct perk_schedule_layout {
    uint64_t state, slots, secret, tokens, hashes, order, free_slots, free_rows, pool, pages, table;
    uint64_t biases, first_token, token_count, kv_length, page_table;
    uint64_t token_ids, positions, token_request, logit_rows, logit_slots; /* of the step */
    uint64_t words;                                                        /* of the block */
} perk_schedule_layout;

/* A pointer into the block for each array; for one thread. */
typedef struct perk_schedule {
    perk_schedule_limits limits;
    int32_t page_shift;
    perk_schedule_state *state;
    perk_slot *slots;
    perk_page_secret *secret; /* of hashes: whoever owns the block writes it */
    int32_t *tokens;          /* [slots][positions] */
    perk_page_hash *hashes;   /* [slots][pages_per_request] of all tokens up to the end of each full page */
    perk_draw_bias *biases;   /* [slots][PERK_DRAW_BIASES] what the rules ask for */
    int32_t *order;           /* [slots] the unfinished ones by age; those that run come first */
    int32_t *free_slots;      /* stacks */
    int32_t *free_rows;
    perk_pool pool;
    perk_batch batch;     /* of the step under way */
    int32_t *logit_slots; /* [logit rows] whose logits they are */
    int32_t most_rows;    /* rows of logits of the largest step, where others run larger ones; 0: nobody does */
    int32_t is_short;     /* such a step would have more tokens than the batch */
} perk_schedule;

/* ---- the block ---- */

PERK_SHARED_CODE uint64_t perk_schedule_array(uint64_t *next, uint64_t count, uint64_t size) {
    uint64_t place = *next;
    *next += (count * size + 7) / 8;
    return place;
}

PERK_SHARED_CODE perk_schedule_layout perk_schedule_lay_out(const perk_schedule_limits *limits) {
    perk_schedule_layout layout;
    uint64_t next = 0, slots = (uint64_t)limits->slots, positions = (uint64_t)limits->positions;
    uint64_t tokens = (uint64_t)limits->tokens, requests = (uint64_t)limits->requests;
    uint64_t pages = (uint64_t)limits->page_count, logit_rows = (uint64_t)limits->logit_rows;
    uint64_t pages_each = (positions + (uint64_t)limits->page_size - 1) / (uint64_t)limits->page_size;
    layout.state = perk_schedule_array(&next, 1, sizeof(perk_schedule_state));
    layout.pool = perk_schedule_array(&next, 1, sizeof(perk_pool_state)); /* next to it: perk_standing */
    layout.secret = perk_schedule_array(&next, 1, sizeof(perk_page_secret));
    layout.slots = perk_schedule_array(&next, slots, sizeof(perk_slot));
    layout.order = perk_schedule_array(&next, slots, sizeof(int32_t));
    layout.free_slots = perk_schedule_array(&next, slots, sizeof(int32_t));
    layout.free_rows = perk_schedule_array(&next, requests, sizeof(int32_t));
    layout.pages = perk_schedule_array(&next, pages, sizeof(perk_page));
    layout.table = perk_schedule_array(&next, perk_pool_table_size(limits->page_count), sizeof(int32_t));
    layout.first_token = perk_schedule_array(&next, requests, sizeof(int32_t));
    layout.token_count = perk_schedule_array(&next, requests, sizeof(int32_t));
    layout.kv_length = perk_schedule_array(&next, requests, sizeof(int32_t));
    layout.page_table = perk_schedule_array(&next, requests * pages_each, sizeof(int32_t));
    layout.hashes = perk_schedule_array(&next, slots * pages_each, sizeof(perk_page_hash));
    layout.tokens = perk_schedule_array(&next, slots * positions, sizeof(int32_t));
    layout.biases = perk_schedule_array(&next, slots * PERK_DRAW_BIASES, sizeof(perk_draw_bias));
    layout.token_ids = perk_schedule_array(&next, tokens, sizeof(int32_t));
    layout.positions = perk_schedule_array(&next, tokens, sizeof(int32_t));
    layout.token_request = perk_schedule_array(&next, tokens, sizeof(int32_t));
    layout.logit_rows = perk_schedule_array(&next, logit_rows, sizeof(int32_t));
    layout.logit_slots = perk_schedule_array(&next, logit_rows, sizeof(int32_t));
    layout.words = next;
    return layout;
}

PERK_SHARED_CODE void perk_schedule_bind_batch(perk_batch *batch, const perk_schedule_layout *layout, uint64_t *block) {
    batch->num_tokens = batch->num_requests = batch->num_logit_rows = 0;
    batch->token_ids = (int32_t *)(block + layout->token_ids);
    batch->positions = (int32_t *)(block + layout->positions);
    batch->token_request = (int32_t *)(block + layout->token_request);
    batch->logit_rows = (int32_t *)(block + layout->logit_rows);
    batch->first_token = (int32_t *)(block + layout->first_token);
    batch->token_count = (int32_t *)(block + layout->token_count);
    batch->kv_length = (int32_t *)(block + layout->kv_length);
    batch->page_table = (int32_t *)(block + layout->page_table);
}

/* Points into `block`, which has the layout's words and belongs to the caller. */
PERK_SHARED_CODE void perk_schedule_bind(perk_schedule *s, const perk_schedule_limits *limits, uint64_t *block) {
    perk_schedule_layout layout = perk_schedule_lay_out(limits);
    s->limits = *limits;
    for (s->page_shift = 0; (1 << s->page_shift) < limits->page_size;) s->page_shift++;
    s->state = (perk_schedule_state *)(block + layout.state);
    s->slots = (perk_slot *)(block + layout.slots);
    s->secret = (perk_page_secret *)(block + layout.secret);
    s->tokens = (int32_t *)(block + layout.tokens);
    s->hashes = (perk_page_hash *)(block + layout.hashes);
    s->biases = (perk_draw_bias *)(block + layout.biases);
    s->order = (int32_t *)(block + layout.order);
    s->free_slots = (int32_t *)(block + layout.free_slots);
    s->free_rows = (int32_t *)(block + layout.free_rows);
    s->pool.state = (perk_pool_state *)(block + layout.pool);
    s->pool.pages = (perk_page *)(block + layout.pages);
    s->pool.table = (int32_t *)(block + layout.table);
    s->pool.page_count = limits->page_count;
    s->pool.table_mask = (int32_t)(perk_pool_table_size(limits->page_count) - 1);
    s->logit_slots = (int32_t *)(block + layout.logit_slots);
    s->most_rows = s->is_short = 0;
    perk_schedule_bind_batch(&s->batch, &layout, block);
    s->batch.pages_per_request = perk_pieces(limits->positions, limits->page_size);
}

/* The state before anything has arrived, in a block of zeros. */
PERK_SHARED_CODE void perk_schedule_begin(perk_schedule *s) {
    s->state->free_slots = s->limits.slots;
    s->state->free_rows = s->limits.requests;
    for (int32_t i = 0; i < s->limits.slots; i++) s->free_slots[i] = s->limits.slots - 1 - i;
    for (int32_t i = 0; i < s->limits.requests; i++) s->free_rows[i] = s->limits.requests - 1 - i;
    perk_pool_begin(&s->pool);
}

/* ---- arrival ---- */

PERK_SHARED_CODE int32_t *perk_slot_tokens(const perk_schedule *s, int32_t slot) {
    return s->tokens + (uint64_t)slot * (uint64_t)s->limits.positions;
}

PERK_SHARED_CODE perk_draw_bias *perk_slot_biases(const perk_schedule *s, int32_t slot) {
    return s->biases + (uint64_t)slot * PERK_DRAW_BIASES;
}

PERK_SHARED_CODE perk_page_hash *perk_slot_hashes(const perk_schedule *s, int32_t slot) {
    return s->hashes + (uint64_t)slot * (uint64_t)s->batch.pages_per_request;
}

PERK_SHARED_CODE int32_t *perk_slot_pages(const perk_schedule *s, const perk_slot *r) {
    return s->batch.page_table + (uint64_t)r->row * (uint64_t)s->batch.pages_per_request;
}

/* A free slot for a new request, or -1. The caller writes its tokens, prompt_length, limit (above prompt_length, at
 * most the positions), stop ids, rule and biases, and, if it is to share pages, `shares` and the hashes of its prompt:
 * what it is to find must be known before it is computed. Then it arrives. */
PERK_SHARED_CODE int32_t perk_schedule_open(perk_schedule *s) {
    if (s->state->free_slots == 0) return -1;
    int32_t slot = s->free_slots[--s->state->free_slots];
    perk_slot *r = &s->slots[slot];
    r->state = PERK_SLOT_OPEN;
    r->end = PERK_END_NONE;
    r->prompt_length = r->length = r->limit = 0;
    r->cached = r->page_count = r->hash_count = r->offered = r->scheduled = 0;
    r->row = r->logit_row = -1;
    r->found = r->set_backs = r->shares = r->stop_count = r->rule.samples = 0;
    return slot;
}

/* Puts the request in line. */
PERK_SHARED_CODE void perk_schedule_arrive(perk_schedule *s, int32_t slot) {
    perk_slot *r = &s->slots[slot];
    r->state = PERK_SLOT_WAITING;
    r->length = r->prompt_length;
    r->refused_at = s->state->changes - 1;
    s->order[s->state->unfinished++] = slot;
}

/* Gives the slot of a finished request back, or one that was opened for nothing. */
PERK_SHARED_CODE void perk_schedule_close(perk_schedule *s, int32_t slot) {
    s->slots[slot].state = PERK_SLOT_FREE;
    s->free_slots[s->state->free_slots++] = slot;
}

/* ---- pages ---- */

/* Gives the request's pages and its row back. What was listed may be found again, by this request, too. */
PERK_SHARED_CODE void perk_schedule_give_up(perk_schedule *s, perk_slot *r) {
    const int32_t *pages = perk_slot_pages(s, r);
    for (int32_t i = r->page_count - 1; i >= 0; i--) perk_pool_give(&s->pool, pages[i]);
    s->batch.token_count[r->row] = 0;
    s->free_rows[s->state->free_rows++] = r->row;
    s->state->changes++;
    r->row = r->logit_row = -1;
    r->page_count = r->cached = r->offered = r->scheduled = 0;
}

/* Sets the newest running request back: it waits again, in front of all others that do. */
PERK_SHARED_CODE void perk_schedule_set_back(perk_schedule *s) {
    perk_slot *r = &s->slots[s->order[--s->state->running]];
    perk_schedule_give_up(s, r);
    r->state = PERK_SLOT_WAITING;
    r->refused_at = s->state->changes - 1;
    r->set_backs++;
    s->state->set_backs++;
}

/* Full pages of the request that others may have written; not the one of its last token, which it always computes,
 * because nothing else gives its logits. */
PERK_SHARED_CODE int32_t perk_slot_shareable(const perk_schedule *s, const perk_slot *r) {
    return perk_lesser(r->hash_count, (r->length - 1) >> s->page_shift);
}

/* Where the request is at the end of its pages, goes on with those that others have written. */
PERK_SHARED_CODE void perk_schedule_share(perk_schedule *s, int32_t slot) {
    perk_slot *r = &s->slots[slot];
    int32_t *pages = perk_slot_pages(s, r), most = perk_slot_shareable(s, r);
    while (r->page_count < most && r->cached == r->page_count << s->page_shift) {
        int32_t page = perk_pool_find(&s->pool, perk_slot_hashes(s, slot)[r->page_count]);
        if (page < 0) return;
        perk_pool_share(&s->pool, page);
        pages[r->page_count++] = page;
        r->cached += s->limits.page_size;
        r->found += s->limits.page_size;
        s->state->found_tokens += (uint64_t)s->limits.page_size;
    }
}

/* The hashes of the request's first `full` pages, if it shares any. */
PERK_SHARED_CODE void perk_slot_hash(perk_schedule *s, int32_t slot, int32_t full) {
    perk_slot *r = &s->slots[slot];
    if (r->shares && r->hash_count < full)
        r->hash_count = perk_hash_pages(s->secret, perk_slot_tokens(s, slot), s->limits.page_size,
                                        perk_slot_hashes(s, slot), r->hash_count, full);
}

/* Lets others find the full pages that the request has written: of its prompt, and of its answer. */
PERK_SHARED_CODE void perk_schedule_offer(perk_schedule *s, int32_t slot) {
    perk_slot *r = &s->slots[slot];
    perk_slot_hash(s, slot, r->cached >> s->page_shift);
    int32_t full = perk_lesser(r->hash_count, r->cached >> s->page_shift);
    for (; r->offered < full; r->offered++) {
        perk_page_hash hash = perk_slot_hashes(s, slot)[r->offered];
        if (perk_pool_list(&s->pool, perk_slot_pages(s, r)[r->offered], hash) &&
            perk_page_hash_equal(hash, s->state->wanted))
            s->state->changes++;
    }
}

/* Pages that the request would need now: those in the hands of others come for free. */
PERK_SHARED_CODE int32_t perk_schedule_price(perk_schedule *s, int32_t slot) {
    const perk_slot *r = &s->slots[slot];
    int32_t price = perk_pieces(r->length, s->limits.page_size), most = perk_slot_shareable(s, r);
    s->state->wanted.low = s->state->wanted.high = 0;
    for (int32_t i = 0; i < most; i++) {
        perk_page_hash hash = perk_slot_hashes(s, slot)[i];
        int32_t page = perk_pool_find(&s->pool, hash);
        if (page < 0) {
            s->state->wanted = hash;
            break;
        }
        if (s->pool.pages[page].owners > 0) price--;
    }
    return price;
}

/* Whether a request waits for which there may be room: it was not refused as things stand now. */
PERK_SHARED_CODE int perk_schedule_may_admit(const perk_schedule *s) {
    int32_t running = s->state->running;
    return s->state->unfinished > running && s->state->free_rows > 0 &&
           s->slots[s->order[running]].refused_at != s->state->changes;
}

/* Lets the oldest waiting request run, if there is room for all of its known tokens. */
PERK_SHARED_CODE int perk_schedule_admit(perk_schedule *s) {
    if (!perk_schedule_may_admit(s)) return 0;
    int32_t slot = s->order[s->state->running];
    perk_slot *r = &s->slots[slot];
    if (perk_schedule_price(s, slot) > s->pool.state->unused) {
        r->refused_at = s->state->changes;
        return 0;
    }
    r->state = PERK_SLOT_RUNNING;
    r->row = s->free_rows[--s->state->free_rows];
    s->state->running++;
    return 1;
}

/* Gets the pages for `count` more tokens of the request at `place` of the order, or for as many as there can be now;
 * returns how many. */
PERK_SHARED_CODE int32_t perk_schedule_reserve(perk_schedule *s, int32_t place, int32_t count) {
    perk_slot *r = &s->slots[s->order[place]];
    int32_t needed = perk_pieces(r->cached + count, s->limits.page_size) - r->page_count;
    if (needed <= 0) return count;
    while (needed > s->pool.state->unused && s->state->running > place + 1) perk_schedule_set_back(s);
    if (needed > s->pool.state->unused) {
        needed = s->pool.state->unused;
        count = ((r->page_count + needed) << s->page_shift) - r->cached;
    }
    int32_t *pages = perk_slot_pages(s, r);
    for (; needed > 0; needed--) pages[r->page_count++] = perk_pool_take(&s->pool);
    return count;
}

/* ---- making a batch ---- */

/* Up to `count` tokens, but none of a page that the next step can share. */
PERK_SHARED_CODE int32_t perk_schedule_stop_before_shared(const perk_schedule *s, int32_t slot, int32_t count) {
    const perk_slot *r = &s->slots[slot];
    int32_t most = perk_slot_shareable(s, r), end = r->cached + count;
    for (int32_t page = (r->cached >> s->page_shift) + 1; page < most && page << s->page_shift < end; page++)
        if (perk_pool_find(&s->pool, perk_slot_hashes(s, slot)[page]) >= 0) return (page << s->page_shift) - r->cached;
    return count;
}

/* How many tokens of the request at `place` of the order fit into `room` and into what is left of the pages. */
PERK_SHARED_CODE int32_t perk_schedule_choose(perk_schedule *s, int32_t place, int32_t room) {
    int32_t slot = s->order[place];
    if (place == s->state->running && !perk_schedule_admit(s)) return 0;
    perk_schedule_share(s, slot);
    int32_t count = perk_lesser(s->slots[slot].length - s->slots[slot].cached, room);
    if (count > 1) count = perk_schedule_stop_before_shared(s, slot, count);
    return perk_schedule_reserve(s, place, count);
}

PERK_SHARED_CODE int perk_schedule_is_full(const perk_schedule *s) {
    return s->batch.num_tokens == s->limits.tokens || s->batch.num_logit_rows == s->limits.logit_rows;
}

/* Fills the batch with the next step; it stays empty only when nothing is unfinished. Where larger steps are run
 * elsewhere, it finds out whether one of them would have more. */
PERK_SHARED_CODE void perk_schedule_fill(perk_schedule *s) {
    perk_batch *batch = &s->batch;
    for (int32_t place = 0; place < s->state->running; place++) batch->token_count[s->slots[s->order[place]].row] = 0;
    batch->num_tokens = batch->num_requests = batch->num_logit_rows = 0;
    s->is_short = 0;
    for (int32_t place = 0; place < s->state->unfinished && !s->is_short; place++) {
        if (perk_schedule_is_full(s) && batch->num_logit_rows >= s->most_rows) break;
        int32_t count = perk_schedule_choose(s, place, perk_greater(s->limits.tokens - batch->num_tokens, 1));
        if (count == 0) break; /* none that came later may overtake */
        s->is_short = perk_schedule_is_full(s);
        if (s->is_short) break;
        int32_t slot = s->order[place];
        perk_slot *r = &s->slots[slot];
        int complete = r->cached + count == r->length;
        r->scheduled = count;
        r->logit_row = complete ? batch->num_logit_rows : -1;
        if (complete) s->logit_slots[batch->num_logit_rows] = slot;
        perk_batch_put(batch, r->row, perk_slot_tokens(s, slot) + r->cached, count, r->cached, complete);
        s->is_short = !complete && s->most_rows > 0 && batch->num_tokens == s->limits.tokens;
    }
}

/* Takes the batch back, over which no step was run. Its requests keep the pages that they got for it. */
PERK_SHARED_CODE void perk_schedule_drop(perk_schedule *s) {
    for (int32_t place = 0; place < s->state->running; place++) {
        perk_slot *r = &s->slots[s->order[place]];
        r->scheduled = s->batch.token_count[r->row] = 0;
        r->logit_row = -1;
    }
    s->batch.num_tokens = s->batch.num_requests = s->batch.num_logit_rows = 0;
}

/* ---- steps of several sizes ---- */

/* Steps in a row that smaller ones would have done for, after which whoever runs them hands over. That costs 0.1 to
 * 1 ms (the host wakes up, and launches), and as much again when the next prompt takes it back; a smaller step saves
 * 0.3 to 2 ms. So when so many have gone by, about as much was lost as a change in vain costs: whatever comes, it is
 * not much more than twice of what could not be helped. */
enum { PERK_SPARE_STEPS = 8 };

/* Such steps so far, and the most that one of them had. */
typedef struct perk_spare {
    int32_t steps;
    perk_step_size most;
} perk_spare;

/* Who should run the batch. */
enum { PERK_SIZE_FITS, PERK_SIZE_LARGER, PERK_SIZE_SMALLER };

PERK_SHARED_CODE int perk_step_fits(perk_step_size size, perk_step_size room) {
    return size.tokens <= room.tokens && size.logit_rows <= room.logit_rows;
}

/* About what the next step would have if there were room: pages that are found make it less. */
PERK_SHARED_CODE perk_step_size perk_schedule_demand(const perk_schedule *s) {
    perk_step_size size;
    int32_t rows = s->state->free_rows, pages = s->pool.state->unused;
    size.tokens = size.logit_rows = 0;
    for (int32_t place = 0; place < s->state->unfinished && size.tokens < 1 << 24; place++) { /* enough for anybody */
        const perk_slot *r = &s->slots[s->order[place]];
        if (place >= s->state->running) {
            pages -= perk_pieces(r->length, s->limits.page_size);
            if (rows-- == 0 || pages < 0) break;
        }
        size.tokens += r->length - r->cached;
        size.logit_rows++;
    }
    return size;
}

/* Says of the batch, just filled, who should run it. `smaller`: tokens of the next smaller size; 0: there is none. */
PERK_SHARED_CODE int32_t perk_schedule_judge_size(const perk_schedule *s, int32_t smaller, perk_spare *spare) {
    const perk_batch *batch = &s->batch;
    if (s->is_short) return PERK_SIZE_LARGER;
    if (batch->num_tokens > smaller || batch->num_logit_rows > perk_lesser(smaller, s->limits.logit_rows)) {
        spare->steps = spare->most.tokens = spare->most.logit_rows = 0;
        return PERK_SIZE_FITS;
    }
    spare->most.tokens = perk_greater(spare->most.tokens, batch->num_tokens);
    spare->most.logit_rows = perk_greater(spare->most.logit_rows, batch->num_logit_rows);
    return spare->steps++ < PERK_SPARE_STEPS ? PERK_SIZE_FITS : PERK_SIZE_SMALLER;
}

/* ---- taking in a result ---- */

PERK_SHARED_CODE void perk_schedule_end(perk_schedule *s, perk_slot *r, int32_t end) {
    if (r->state == PERK_SLOT_RUNNING) perk_schedule_give_up(s, r);
    r->state = PERK_SLOT_FINISHED;
    r->end = end;
    s->state->finished++;
}

PERK_SHARED_CODE void perk_schedule_append(perk_schedule *s, int32_t slot, int32_t token) {
    perk_slot *r = &s->slots[slot];
    perk_slot_tokens(s, slot)[r->length++] = token;
    s->state->answer_tokens++;
    int32_t end = r->length == r->limit ? PERK_END_LENGTH : PERK_END_NONE;
    for (int32_t i = 0; i < r->stop_count; i++)
        if (token == r->stop_ids[i]) end = PERK_END_STOP;
    if (end != PERK_END_NONE) perk_schedule_end(s, r, end);
}

/* Takes those that are finished out of the order. */
PERK_SHARED_CODE void perk_schedule_close_ranks(perk_schedule *s) {
    int32_t kept = 0, running = 0;
    for (int32_t place = 0; place < s->state->unfinished; place++) {
        int32_t slot = s->order[place];
        if (s->slots[slot].state == PERK_SLOT_FINISHED) continue;
        if (place < s->state->running) running++;
        s->order[kept++] = slot;
    }
    s->state->unfinished = kept;
    s->state->running = running;
}

/* The step is done: its tokens are in the cache, and `picks` [logit rows] are the next ones. */
PERK_SHARED_CODE void perk_schedule_commit(perk_schedule *s, const int32_t *picks) {
    uint64_t finished = s->state->finished;
    for (int32_t place = 0; place < s->state->running; place++) {
        int32_t slot = s->order[place];
        perk_slot *r = &s->slots[slot];
        if (r->scheduled == 0) break; /* nor was any that came later */
        int32_t logit_row = r->logit_row;
        r->cached += r->scheduled;
        r->scheduled = 0;
        r->logit_row = -1;
        perk_schedule_offer(s, slot);
        if (logit_row >= 0) perk_schedule_append(s, slot, picks[logit_row]);
    }
    s->state->steps++;
    s->state->step_tokens += (uint64_t)s->batch.num_tokens;
    if (s->state->finished != finished) perk_schedule_close_ranks(s);
}

/* Ends an unfinished request, between two steps. */
PERK_SHARED_CODE void perk_schedule_cancel(perk_schedule *s, int32_t slot) {
    perk_schedule_end(s, &s->slots[slot], PERK_END_CANCELLED);
    perk_schedule_close_ranks(s);
}

/* ---- a step moved on ----
 * Where the step under way has one token of every running request, and its logits, where all of them go on, and nobody
 * may be admitted, then the next step is the same with a position more for each: commit and fill would do nothing else,
 * unless a token ends its request. */

/* Whether the request, which has one token in the step, does not reach its limit with the next one, has a page for the
 * one after, and completes none that others are to find. */
PERK_SHARED_CODE int perk_slot_goes_on(const perk_slot *r, int32_t page_size) {
    int offers = r->shares && (r->cached + 1) % page_size == 0;
    return r->length + 1 != r->limit && r->cached + 2 <= r->page_count * page_size && !offers;
}

/* ---- pages for others ---- */

/* Takes `count` pages for work outside of any request; where they are in use, running requests are set back. 0: the
 * whole pool has fewer. */
PERK_SHARED_CODE int perk_schedule_borrow(perk_schedule *s, int32_t count, int32_t *pages) {
    if (count < 0 || count > s->limits.page_count) return 0;
    while (s->pool.state->unused < count && s->state->running > 0) perk_schedule_set_back(s);
    if (s->pool.state->unused < count) return 0; /* others have borrowed already */
    for (int32_t i = 0; i < count; i++) pages[i] = perk_pool_take(&s->pool);
    return 1;
}

PERK_SHARED_CODE void perk_schedule_return(perk_schedule *s, const int32_t *pages, int32_t count) {
    for (int32_t i = count - 1; i >= 0; i--) perk_pool_give(&s->pool, pages[i]);
    s->state->changes++;
}

#endif
