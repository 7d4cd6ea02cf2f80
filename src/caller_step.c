#include "caller_step.h"

typedef struct page_use {
    uint64_t step;   /* the last that used it, refused ones included */
    int32_t request; /* that used it there, of several the last */
    bool writes;     /* it wrote there */
    int32_t filled;  /* positions of the page that are in the cache, from its first one on */
} page_use;

struct perk_caller_pages {
    perk_config config;
    int32_t vocab_size;
    uint64_t step;   /* the one that is being filled; the first is 1 */
    int32_t *listed; /* [pages_per_request] a list as perk_batch_add takes it */
    page_use *uses;  /* [max_num_pages] */
};

perk_status perk_caller_pages_create(perk_caller_pages **out, const perk_config *config, int32_t vocab_size,
                                     perk_error *err) {
    *out = NULL;
    perk_caller_pages *pages = perk_calloc(1, sizeof *pages);
    if (!pages) return perk_fail_memory(err, "the caller's pages");
    pages->config = *config;
    pages->vocab_size = vocab_size;
    pages->listed =
        perk_calloc(perk_ceil_div((uint64_t)config->max_seq_length, (uint64_t)config->page_size), sizeof(int32_t));
    pages->uses = perk_calloc((size_t)config->max_num_pages, sizeof *pages->uses);
    if (!pages->listed || !pages->uses) {
        perk_caller_pages_free(pages);
        return perk_fail_memory(err, "the caller's pages");
    }
    *out = pages;
    return PERK_OK;
}

void perk_caller_pages_free(perk_caller_pages *pages) {
    if (!pages) return;
    free(pages->listed);
    free(pages->uses);
    free(pages);
}

/* Pages that `length` positions lie in. */
static int32_t pages_of(const perk_caller_pages *pages, int32_t length) {
    return (int32_t)perk_ceil_div((uint64_t)length, (uint64_t)pages->config.page_size);
}

/* How many of the `length` positions lie in page `place` of a list. */
static int32_t positions_in(const perk_caller_pages *pages, int32_t place, int32_t length) {
    return PERK_MIN(pages->config.page_size, length - place * pages->config.page_size);
}

/* ---- what one request gives ---- */

/* Copies the list to where there is room for as many pages as a batch holds for each request. What is out of range
 * otherwise is for perk_batch_add to say. */
static perk_status list_pages(perk_caller_pages *pages, const perk_step_request *request, perk_error *err) {
    int64_t end = (int64_t)request->position + request->token_count;
    if (request->token_count < 1 || request->position < 0 || end > pages->config.max_seq_length) return PERK_OK;
    int32_t needed = pages_of(pages, (int32_t)end), room = pages_of(pages, pages->config.max_seq_length);
    if (!request->pages) return perk_fail(err, PERK_INVALID_ARGUMENT, "pages is NULL");
    if (request->page_count < needed)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "page_count is %d: positions up to %lld need %d pages of %d",
                         request->page_count, (long long)end - 1, needed, pages->config.page_size);
    memcpy(pages->listed, request->pages, (size_t)needed * sizeof *pages->listed);
    memset(pages->listed + needed, 0, (size_t)(room - needed) * sizeof *pages->listed);
    return PERK_OK;
}

static perk_status check_ids(const perk_caller_pages *pages, const perk_step_request *request, perk_error *err) {
    for (int32_t i = 0; i < request->token_count; i++)
        if (request->token_ids[i] >= pages->vocab_size)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "token_ids[%d] is %d, outside the model's vocabulary of %d", i,
                             request->token_ids[i], pages->vocab_size);
    return PERK_OK;
}

static perk_status add_request(perk_caller_pages *pages, perk_batch *batch, const perk_step_request *request,
                               perk_error *err) {
    if (!request->token_ids) return perk_fail(err, PERK_INVALID_ARGUMENT, "token_ids is NULL");
    perk_status status = list_pages(pages, request, err);
    if (!status)
        status = perk_batch_add(batch, &pages->config, request->token_ids, request->token_count, request->position,
                                pages->listed, (int)request->want_logits, err);
    return status ? status : check_ids(pages, request, err);
}

/* ---- what requests do to each other's pages, and to their own ---- */

static const int32_t *row_of(const perk_batch *batch, int32_t request) {
    return batch->page_table + (size_t)request * (size_t)batch->pages_per_request;
}

static int32_t position_of(const perk_batch *batch, int32_t request) {
    return batch->positions[batch->first_token[request]];
}

/* Nothing in a step orders its writes to the cache with other requests' reads. */
static perk_status use_pages(perk_caller_pages *pages, const perk_batch *batch, int32_t request, perk_error *err) {
    const int32_t *row = row_of(batch, request);
    int32_t count = pages_of(pages, batch->kv_length[request]);
    int32_t first_written = position_of(batch, request) / pages->config.page_size;
    for (int32_t i = 0; i < count; i++) {
        page_use *use = &pages->uses[row[i]];
        bool used = use->step == pages->step, writes = i >= first_written;
        if (used && use->request == request)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "pages[%d] is page %d, which is in the list before", i,
                             row[i]);
        if (used && (writes || use->writes))
            return perk_fail(err, PERK_INVALID_ARGUMENT,
                             "pages[%d] is page %d, which request %d has in the same step, and request %d would write "
                             "positions there: only pages that nobody writes can be shared",
                             i, row[i], use->request, writes ? request : use->request);
        *use = (page_use){.step = pages->step, .request = request, .writes = writes, .filled = use->filled};
    }
    return PERK_OK;
}

static perk_status check_filled(const perk_caller_pages *pages, const perk_batch *batch, int32_t request,
                                perk_error *err) {
    const int32_t *row = row_of(batch, request);
    int32_t position = position_of(batch, request);
    for (int32_t i = 0; i < pages_of(pages, position); i++) {
        int32_t filled = pages->uses[row[i]].filled, needed = positions_in(pages, i, position);
        if (filled < needed)
            return perk_fail(err, PERK_INVALID_ARGUMENT,
                             "position is %d, but page %d (pages[%d]) has %d of the %d positions before it that belong "
                             "there: earlier steps must have written all of them",
                             position, row[i], i, filled, needed);
    }
    return PERK_OK;
}

/* ---- the step ---- */

perk_status perk_caller_step_fill(perk_caller_pages *pages, perk_batch *batch, const perk_step_request *requests,
                                  int32_t request_count, perk_error *err) {
    if (!requests || request_count < 1)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "a step of no requests: it needs 1 or more");
    pages->step++;
    perk_batch_clear(batch);
    for (int32_t i = 0; i < request_count; i++) {
        perk_status status = add_request(pages, batch, &requests[i], err);
        if (!status) status = use_pages(pages, batch, i, err);
        if (!status) status = check_filled(pages, batch, i, err);
        if (status) return perk_fail_prefix(err, status, "request %d", i);
    }
    return PERK_OK;
}

void perk_caller_step_commit(perk_caller_pages *pages, const perk_batch *batch) {
    for (int32_t request = 0; request < batch->num_requests; request++) {
        int32_t length = batch->kv_length[request], first = position_of(batch, request) / pages->config.page_size;
        for (int32_t i = first; i < pages_of(pages, length); i++)
            pages->uses[row_of(batch, request)[i]].filled = positions_in(pages, i, length);
    }
}
