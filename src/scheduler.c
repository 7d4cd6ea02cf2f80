#include "scheduler.h"

#include "sampler.h"

typedef struct request_list {
    perk_request *first, *last;
    int32_t count;
} request_list;

struct perk_scheduler {
    perk_config config;
    int32_t vocab_size;
    int32_t *eos_ids;
    int eos_count;
    perk_pages *pages;
    perk_sampler *sampler;
    request_list unfinished; /* in the order of arrival; those with pages come first */
    request_list finished;   /* kept until their owner frees them */
};

static void list_append(request_list *list, perk_request *request) {
    request->previous = list->last;
    request->next = NULL;
    *(list->last ? &list->last->next : &list->first) = request;
    list->last = request;
    list->count++;
}

static void list_remove(request_list *list, perk_request *request) {
    *(request->previous ? &request->previous->next : &list->first) = request->next;
    *(request->next ? &request->next->previous : &list->last) = request->previous;
    list->count--;
}

perk_status perk_scheduler_create(perk_scheduler **out, const perk_config *config, int32_t vocab_size,
                                  const int32_t *eos_ids, int eos_count, perk_error *err) {
    *out = NULL;
    perk_status status = PERK_OK;
    perk_scheduler *scheduler = perk_calloc(1, sizeof *scheduler);
    if (!scheduler) return perk_fail_memory(err, "the scheduler");
    scheduler->config = *config;
    scheduler->vocab_size = vocab_size;
    scheduler->eos_count = eos_count;
    scheduler->eos_ids = perk_calloc((size_t)eos_count, sizeof *eos_ids);
    if (!scheduler->eos_ids) {
        status = perk_fail_memory(err, "the scheduler");
        goto out;
    }
    if (eos_count) memcpy(scheduler->eos_ids, eos_ids, (size_t)eos_count * sizeof *eos_ids);
    if ((status = perk_pages_create(&scheduler->pages, config->max_num_pages, err))) goto out;
    if ((status = perk_sampler_create(&scheduler->sampler, vocab_size, err))) goto out;
    *out = scheduler;
    scheduler = NULL;
out:
    perk_scheduler_free(scheduler);
    return status;
}

void perk_scheduler_free(perk_scheduler *scheduler) {
    if (!scheduler) return;
    while (scheduler->unfinished.first) perk_request_free(scheduler->unfinished.first);
    while (scheduler->finished.first) perk_request_free(scheduler->finished.first);
    perk_pages_free(scheduler->pages);
    perk_sampler_free(scheduler->sampler);
    free(scheduler->eos_ids);
    free(scheduler);
}

int32_t perk_scheduler_unfinished(const perk_scheduler *scheduler) { return scheduler->unfinished.count; }

const perk_request *perk_scheduler_first(const perk_scheduler *scheduler) { return scheduler->unfinished.first; }

const perk_pages *perk_scheduler_pages(const perk_scheduler *scheduler) { return scheduler->pages; }

/* ---- requests ---- */

static int32_t pages_for(const perk_scheduler *scheduler, int32_t positions) {
    return (int32_t)perk_ceil_div((uint64_t)positions, (uint64_t)scheduler->config.page_size);
}

static perk_status check_prompt(const perk_scheduler *scheduler, const int32_t *prompt, size_t length,
                                perk_error *err) {
    if (!prompt || length == 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "the prompt is empty: a request needs at least one token");
    int32_t room = scheduler->config.max_seq_length;
    if (length >= (size_t)room)
        return perk_fail(err, PERK_LIMIT,
                         "the prompt has %zu tokens, and max_seq_length %d must hold it and at least one token of the "
                         "answer: shorten the prompt or open with a larger max_seq_length",
                         length, room);
    for (size_t i = 0; i < length; i++)
        if (prompt[i] < 0 || prompt[i] >= scheduler->vocab_size)
            return perk_fail(err, PERK_INVALID_ARGUMENT,
                             "token %zu of the prompt is id %d: outside the model's vocabulary of %d", i, prompt[i],
                             scheduler->vocab_size);
    return PERK_OK;
}

perk_status perk_scheduler_submit(perk_scheduler *scheduler, const int32_t *prompt, size_t prompt_length,
                                  const perk_sampling *sampling, perk_request **out, perk_error *err) {
    *out = NULL;
    perk_sampling greedy = {0};
    if (!sampling) sampling = &greedy;
    perk_status status = check_prompt(scheduler, prompt, prompt_length, err);
    if (!status) status = perk_sampling_check(sampling, err);
    if (status) return status;

    int32_t length = (int32_t)prompt_length, room = scheduler->config.max_seq_length - length;
    perk_request *request = perk_calloc(1, sizeof *request);
    if (!request) return perk_fail_memory(err, "a request");
    request->sampling = *sampling;
    request->prompt_length = request->length = length;
    request->limit = length + (sampling->max_tokens ? PERK_MIN(sampling->max_tokens, room) : room);
    request->tokens = perk_calloc((size_t)request->limit, sizeof *request->tokens);
    request->pages = perk_calloc((size_t)pages_for(scheduler, length + room), sizeof *request->pages);
    if (!request->tokens || !request->pages) {
        free(request->tokens);
        free(request->pages);
        free(request);
        return perk_fail_memory(err, "a request");
    }
    memcpy(request->tokens, prompt, prompt_length * sizeof *prompt);
    request->scheduler = scheduler;
    request->logit_row = -1;
    list_append(&scheduler->unfinished, request);
    *out = request;
    return PERK_OK;
}

const int32_t *perk_request_tokens(const perk_request *request, size_t *count) {
    if (count) *count = (size_t)(request->length - request->prompt_length);
    return request->tokens + request->prompt_length;
}

perk_finish perk_request_finish(const perk_request *request) { return request->finish; }

/* Drops the request's cache: what it has computed so far is computed again once it is admitted anew. */
static void set_back(perk_request *request) {
    perk_pages_give(request->scheduler->pages, request->pages, request->page_count);
    memset(request->pages, 0, (size_t)request->page_count * sizeof *request->pages);
    request->page_count = 0;
    request->cached = 0;
    request->scheduled = 0;
    request->logit_row = -1;
}

static void finish(perk_request *request, perk_finish reason) {
    set_back(request);
    request->finish = reason;
    list_remove(&request->scheduler->unfinished, request);
    list_append(&request->scheduler->finished, request);
}

void perk_request_cancel(perk_request *request) {
    if (request->finish == PERK_FINISH_NONE) finish(request, PERK_FINISH_CANCELLED);
}

void perk_request_free(perk_request *request) {
    if (!request) return;
    perk_request_cancel(request);
    list_remove(&request->scheduler->finished, request);
    free(request->tokens);
    free(request->pages);
    free(request);
}

/* ---- making a batch ---- */

/* Sets back the newest request that holds pages and is newer than `request` (NULL: any); false when there is none. */
static bool set_back_newest(perk_scheduler *scheduler, const perk_request *request) {
    perk_request *newest = scheduler->unfinished.last;
    while (newest && newest != request && newest->page_count == 0) newest = newest->previous;
    if (!newest || newest == request) return false;
    set_back(newest);
    return true;
}

/* Gets the pages for `count` more tokens, or for as many as there can be now; returns how many. */
static int32_t reserve_pages(perk_scheduler *scheduler, perk_request *request, int32_t count) {
    perk_pages *pages = scheduler->pages;
    if (request->page_count == 0 && pages_for(scheduler, request->length) > perk_pages_available(pages)) return 0;
    int32_t needed = pages_for(scheduler, request->cached + count) - request->page_count;
    while (needed > perk_pages_available(pages) && set_back_newest(scheduler, request)) {
    }
    if (needed > perk_pages_available(pages)) {
        needed = perk_pages_available(pages);
        count = (request->page_count + needed) * scheduler->config.page_size - request->cached;
    }
    if (!perk_pages_take(pages, needed, request->pages + request->page_count)) return 0;
    request->page_count += needed;
    return count;
}

/* How many tokens of `request` fit into what is left of the batch and of the pages. */
static int32_t choose_count(perk_scheduler *scheduler, const perk_batch *batch, perk_request *request) {
    const perk_config *config = &scheduler->config;
    if (batch->num_requests >= config->max_num_batched_requests) return 0;
    if (batch->num_logit_rows >= config->max_num_logit_rows) return 0;
    int32_t pending = request->length - request->cached;
    int32_t count = PERK_MIN(pending, config->max_num_batched_tokens - batch->num_tokens);
    return count > 0 ? reserve_pages(scheduler, request, count) : 0;
}

perk_status perk_scheduler_fill(perk_scheduler *scheduler, perk_batch *batch, bool *want_logits, perk_error *err) {
    perk_batch_clear(batch);
    *want_logits = false;
    for (perk_request *request = scheduler->unfinished.first; request; request = request->next) {
        int32_t count = choose_count(scheduler, batch, request);
        if (count == 0) break; /* none that came later may overtake */
        bool complete = request->cached + count == request->length;
        int32_t row = batch->num_logit_rows;
        perk_status status = perk_batch_add(batch, &scheduler->config, request->tokens + request->cached, count,
                                            request->cached, request->pages, complete ? 1 : 0, err);
        if (status) return status;
        request->scheduled = count;
        request->logit_row = complete ? row : -1;
        if (complete && request->sampling.temperature > 0) *want_logits = true;
    }
    if (batch->num_tokens == 0 && scheduler->unfinished.first)
        return perk_fail(
            err, PERK_INTERNAL, "the scheduler found no work among %d unfinished requests (%d of %d pages free)",
            scheduler->unfinished.count, perk_pages_available(scheduler->pages), perk_pages_count(scheduler->pages));
    return PERK_OK;
}

/* ---- taking in a result ---- */

static perk_status pick_token(perk_scheduler *scheduler, const perk_request *request, const perk_step_result *result,
                              int32_t *token, perk_error *err) {
    bool greedy = !(request->sampling.temperature > 0);
    if (greedy && result->argmax) {
        *token = result->argmax[request->logit_row];
        if (*token >= 0 && *token < scheduler->vocab_size) return PERK_OK;
        return perk_fail(err, PERK_INTERNAL, "the step gave token %d, outside the model's vocabulary of %d", *token,
                         scheduler->vocab_size);
    }
    if (!result->logits) return perk_fail(err, PERK_INTERNAL, "the step brought no logits to choose a token from");
    const float *logits = result->logits + (size_t)request->logit_row * (size_t)scheduler->vocab_size;
    uint64_t place = (uint64_t)(request->length - request->prompt_length);
    return perk_sampler_pick(scheduler->sampler, logits, &request->sampling, place, token, err);
}

static void append_token(perk_scheduler *scheduler, perk_request *request, int32_t token) {
    request->tokens[request->length++] = token;
    bool end = false;
    for (int i = 0; i < scheduler->eos_count && !request->sampling.ignore_eos; i++)
        if (token == scheduler->eos_ids[i]) end = true;
    if (end || request->length == request->limit) finish(request, end ? PERK_FINISH_STOP : PERK_FINISH_LENGTH);
}

perk_status perk_scheduler_commit(perk_scheduler *scheduler, const perk_step_result *result, perk_error *err) {
    for (perk_request *request = scheduler->unfinished.first, *next; request && request->scheduled; request = next) {
        next = request->next;
        int32_t token = -1;
        perk_status status = PERK_OK;
        if (request->logit_row >= 0) status = pick_token(scheduler, request, result, &token, err);
        if (status) return status;
        request->cached += request->scheduled;
        request->scheduled = 0;
        if (request->logit_row >= 0) append_token(scheduler, request, token);
    }
    return PERK_OK;
}

/* ---- pages for others ---- */

bool perk_scheduler_borrow(perk_scheduler *scheduler, int32_t count, int32_t *pages) {
    if (count < 0 || count > perk_pages_count(scheduler->pages)) return false;
    while (perk_pages_available(scheduler->pages) < count && set_back_newest(scheduler, NULL)) {
    }
    return perk_pages_take(scheduler->pages, count, pages);
}

void perk_scheduler_return(perk_scheduler *scheduler, const int32_t *pages, int32_t count) {
    perk_pages_give(scheduler->pages, pages, count);
}
