#include "batch.h"

perk_status perk_batch_create(perk_batch **out, const perk_config *config, perk_error *err) {
    *out = NULL;
    perk_batch *batch = perk_calloc(1, sizeof *batch);
    if (!batch) return perk_fail_memory(err, "a batch");
    size_t tokens = (size_t)config->max_num_batched_tokens, requests = (size_t)config->max_num_batched_requests;
    size_t pages = perk_ceil_div((uint64_t)config->max_seq_length, (uint64_t)config->page_size);
    batch->pages_per_request = (int32_t)pages;
    batch->token_ids = perk_calloc(tokens, sizeof(int32_t));
    batch->positions = perk_calloc(tokens, sizeof(int32_t));
    batch->token_request = perk_calloc(tokens, sizeof(int32_t));
    batch->logit_rows = perk_calloc((size_t)config->max_num_logit_rows, sizeof(int32_t));
    batch->first_token = perk_calloc(requests, sizeof(int32_t));
    batch->token_count = perk_calloc(requests, sizeof(int32_t));
    batch->kv_length = perk_calloc(requests, sizeof(int32_t));
    batch->page_table = perk_calloc(requests * pages, sizeof(int32_t));
    if (!batch->token_ids || !batch->positions || !batch->token_request || !batch->logit_rows || !batch->first_token ||
        !batch->token_count || !batch->kv_length || !batch->page_table) {
        perk_batch_free(batch);
        return perk_fail_memory(err, "a batch");
    }
    *out = batch;
    return PERK_OK;
}

void perk_batch_free(perk_batch *batch) {
    if (!batch) return;
    free(batch->token_ids);
    free(batch->positions);
    free(batch->token_request);
    free(batch->logit_rows);
    free(batch->first_token);
    free(batch->token_count);
    free(batch->kv_length);
    free(batch->page_table);
    free(batch);
}

void perk_batch_clear(perk_batch *batch) { batch->num_tokens = batch->num_requests = batch->num_logit_rows = 0; }

static perk_status check_tokens(const perk_config *config, const int32_t *token_ids, int32_t count, int32_t position,
                                perk_error *err) {
    if (count < 1 || position < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%d tokens at position %d: a request adds 1 or more, from 0 on",
                         count, position);
    if (count > config->max_seq_length || position > config->max_seq_length - count)
        return perk_fail(err, PERK_LIMIT, "%d tokens at position %d reach beyond max_seq_length %d", count, position,
                         config->max_seq_length);
    for (int32_t i = 0; i < count; i++)
        if (token_ids[i] < 0)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "token id %d: ids are not negative", token_ids[i]);
    return PERK_OK;
}

/* The pages that the request's positions lie in; the rest of the list says nothing yet. */
static perk_status check_pages(const perk_config *config, const int32_t *pages, int32_t length, perk_error *err) {
    for (int32_t i = 0; (int64_t)i * config->page_size < length; i++)
        if (pages[i] < 0 || pages[i] >= config->max_num_pages)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "page %d of a request is %d: the pool has pages 0 to %d", i,
                             pages[i], config->max_num_pages - 1);
    return PERK_OK;
}

static perk_status check_room(const perk_batch *batch, const perk_config *config, int32_t count, int32_t logits,
                              perk_error *err) {
    if (count <= config->max_num_batched_tokens - batch->num_tokens &&
        batch->num_requests < config->max_num_batched_requests &&
        logits <= config->max_num_logit_rows - batch->num_logit_rows)
        return PERK_OK;
    return perk_fail(err, PERK_LIMIT,
                     "the batch is full: it holds %d tokens, %d requests, %d rows of logits; %d, 1 and %d more exceed "
                     "its %d, %d and %d",
                     batch->num_tokens, batch->num_requests, batch->num_logit_rows, count, logits,
                     config->max_num_batched_tokens, config->max_num_batched_requests, config->max_num_logit_rows);
}

perk_status perk_batch_add(perk_batch *batch, const perk_config *config, const int32_t *token_ids, int32_t count,
                           int32_t position, const int32_t *pages, int want_logits, perk_error *err) {
    if (want_logits < 0 || want_logits > 2)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "want_logits is %d: must be 0, 1 or 2", want_logits);
    int32_t logits = want_logits == 2 ? count : want_logits;
    perk_status status = check_tokens(config, token_ids, count, position, err);
    if (!status) status = check_pages(config, pages, position + count, err);
    if (!status) status = check_room(batch, config, count, logits, err);
    if (status) return status;

    int32_t request = batch->num_requests;
    perk_batch_put(batch, request, token_ids, count, position, logits);
    size_t width = (size_t)batch->pages_per_request;
    memcpy(batch->page_table + (size_t)request * width, pages, width * sizeof *pages);
    return PERK_OK;
}
