#include "scheduler.h"

#include "page_secret.h"
#include "sampler.h"

_Static_assert((int)PERK_END_STOP == PERK_FINISH_STOP && (int)PERK_END_LENGTH == PERK_FINISH_LENGTH &&
                   (int)PERK_END_CANCELLED == PERK_FINISH_CANCELLED,
               "the schedule's reasons are those of the API");

struct perk_request_list {
    perk_request *first, *last;
    int32_t count;
};

struct perk_scheduler {
    perk_config config;
    int32_t vocab_size;
    int32_t eos_ids[PERK_STOP_IDS];
    int eos_count;
    bool share_prefixes;
    uint64_t *block; /* the schedule's state */
    perk_schedule schedule;
    perk_sampler *sampler;
    const perk_tokenizer *tokenizer;                   /* NULL: there is none */
    perk_request **placed_in;                          /* [slots] */
    int32_t *picks;                                    /* [logit rows] */
    perk_executor *away;                               /* who has the schedule; NULL: it is here */
    uint64_t submitted, finished_count, answer_tokens; /* answer_tokens: that requests got */
    perk_request_list queued;                          /* in the order of arrival, for a slot */
    perk_request_list placed;                          /* in a slot */
    perk_request_list finished;                        /* kept until their owner frees them */
};

static void list_append(perk_request_list *list, perk_request *request) {
    request->list = list;
    request->previous = list->last;
    request->next = NULL;
    *(list->last ? &list->last->next : &list->first) = request;
    list->last = request;
    list->count++;
}

static void list_remove(perk_request *request) {
    perk_request_list *list = request->list;
    *(request->previous ? &request->previous->next : &list->first) = request->next;
    *(request->next ? &request->next->previous : &list->last) = request->previous;
    list->count--;
}

static void list_move(perk_request *request, perk_request_list *list) {
    list_remove(request);
    list_append(list, request);
}

perk_schedule_limits perk_scheduler_limits(const perk_config *config) {
    return (perk_schedule_limits){.slots = 2 * config->max_num_batched_requests,
                                  .tokens = config->max_num_batched_tokens,
                                  .requests = config->max_num_batched_requests,
                                  .logit_rows = config->max_num_logit_rows,
                                  .positions = config->max_seq_length,
                                  .page_size = config->page_size,
                                  .page_count = config->max_num_pages};
}

static perk_status create_schedule(perk_scheduler *scheduler, perk_error *err) {
    perk_schedule_limits limits = perk_scheduler_limits(&scheduler->config);
    scheduler->block = perk_calloc(perk_schedule_lay_out(&limits).words, sizeof *scheduler->block);
    scheduler->placed_in = perk_calloc((size_t)limits.slots, sizeof(perk_request *));
    scheduler->picks = perk_calloc((size_t)limits.logit_rows, sizeof *scheduler->picks);
    if (!scheduler->block || !scheduler->placed_in || !scheduler->picks) return perk_fail_memory(err, "the scheduler");
    perk_schedule_bind(&scheduler->schedule, &limits, scheduler->block);
    perk_schedule_begin(&scheduler->schedule);
    return perk_page_secret_draw(scheduler->schedule.secret, err);
}

perk_status perk_scheduler_create(perk_scheduler **out, const perk_config *config, int32_t vocab_size,
                                  const int32_t *eos_ids, int eos_count, bool share_prefixes, perk_error *err) {
    *out = NULL;
    if (eos_count > PERK_STOP_IDS)
        return perk_fail(err, PERK_LIMIT, "%d token ids that end an answer: at most %d can be watched", eos_count,
                         (int)PERK_STOP_IDS);
    perk_scheduler *scheduler = perk_calloc(1, sizeof *scheduler);
    if (!scheduler) return perk_fail_memory(err, "the scheduler");
    scheduler->config = *config;
    scheduler->vocab_size = vocab_size;
    scheduler->share_prefixes = share_prefixes;
    scheduler->eos_count = eos_count;
    if (eos_count) memcpy(scheduler->eos_ids, eos_ids, (size_t)eos_count * sizeof *eos_ids);
    perk_status status = create_schedule(scheduler, err);
    if (!status) status = perk_sampler_create(&scheduler->sampler, vocab_size, err);
    if (status) {
        perk_scheduler_free(scheduler);
        return status;
    }
    *out = scheduler;
    return PERK_OK;
}

void perk_scheduler_free(perk_scheduler *scheduler) {
    if (!scheduler) return;
    perk_request_list *lists[] = {&scheduler->queued, &scheduler->placed, &scheduler->finished};
    for (size_t i = 0; i < PERK_COUNT(lists); i++)
        while (lists[i]->first) perk_request_free(lists[i]->first);
    perk_sampler_free(scheduler->sampler);
    free(scheduler->placed_in);
    free(scheduler->picks);
    free(scheduler->block);
    free(scheduler);
}

void perk_scheduler_set_tokenizer(perk_scheduler *scheduler, const perk_tokenizer *tokenizer) {
    scheduler->tokenizer = tokenizer;
}

int32_t perk_scheduler_unfinished(const perk_scheduler *scheduler) {
    return scheduler->queued.count + scheduler->placed.count;
}

const perk_schedule *perk_scheduler_schedule(const perk_scheduler *scheduler) { return &scheduler->schedule; }

/* ---- requests ---- */

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

perk_status perk_scheduler_check(const perk_scheduler *scheduler, const int32_t *prompt, size_t prompt_length,
                                 const perk_sampling *sampling, perk_error *err) {
    perk_status status = check_prompt(scheduler, prompt, prompt_length, err);
    if (status || !sampling) return status;
    status = perk_sampling_check(sampling, scheduler->vocab_size, err);
    int32_t room = PERK_STOP_IDS - (sampling->ignore_eos ? 0 : scheduler->eos_count);
    if (!status && sampling->stop_token_count > room)
        status = perk_fail(err, PERK_LIMIT, "stop_token_count %d: beside the model's end tokens there is room for %d",
                           sampling->stop_token_count, room);
    if (!status && sampling->stop_string_count && !scheduler->tokenizer)
        status = perk_fail(err, PERK_NOT_FOUND,
                           "stop_strings: the model has no usable tokenizer.json to find them in: use stop_tokens");
    return status;
}

static void free_memory(perk_request *request) {
    perk_stop_text_free(request->text);
    perk_sampling_free(&request->sampling);
    free(request->logprobs);
    free(request->tokens);
    free(request);
}

perk_status perk_scheduler_submit(perk_scheduler *scheduler, const int32_t *prompt, size_t prompt_length,
                                  const perk_sampling *sampling, perk_request **out, perk_error *err) {
    *out = NULL;
    perk_status status = perk_scheduler_check(scheduler, prompt, prompt_length, sampling, err);
    if (status) return status;
    perk_sampling greedy = {0};
    if (!sampling) sampling = &greedy;

    int32_t length = (int32_t)prompt_length, room = scheduler->config.max_seq_length - length;
    perk_request *request = perk_calloc(1, sizeof *request);
    if (!request) return perk_fail_memory(err, "a request");
    if ((status = perk_sampling_copy(&request->sampling, sampling, err))) {
        free(request);
        return status;
    }
    request->prompt_length = request->length = length;
    request->limit = length + (sampling->max_tokens ? PERK_MIN(sampling->max_tokens, room) : room);
    request->tokens = perk_calloc((size_t)request->limit, sizeof *request->tokens);
    size_t logprob_count = (size_t)perk_sampling_logprob_count(sampling);
    if (logprob_count)
        request->logprobs = perk_calloc((size_t)(request->limit - length), logprob_count * sizeof *request->logprobs);
    if (!request->tokens || (logprob_count && !request->logprobs)) status = perk_fail_memory(err, "a request");
    if (!status && sampling->stop_string_count)
        status = perk_stop_text_create(&request->text, scheduler->tokenizer, &request->sampling, err);
    if (status) {
        free_memory(request);
        return status;
    }
    memcpy(request->tokens, prompt, prompt_length * sizeof *prompt);
    request->scheduler = scheduler;
    request->slot = -1;
    request->submitted = perk_now();
    scheduler->submitted++;
    list_append(&scheduler->queued, request);
    *out = request;
    return PERK_OK;
}

const int32_t *perk_request_tokens(const perk_request *request, size_t *count) {
    if (count) *count = (size_t)(request->length - request->prompt_length);
    return request->tokens + request->prompt_length;
}

const perk_logprob *perk_request_logprobs(const perk_request *request, size_t place, size_t *count) {
    size_t each = (size_t)perk_sampling_logprob_count(&request->sampling);
    bool there = each && place < (size_t)(request->length - request->prompt_length);
    if (count) *count = there ? each : 0;
    return there ? request->logprobs + place * each : NULL;
}

perk_finish perk_request_finish(const perk_request *request) { return request->finish; }

/* Appends a token to the answer. *stops: it completes a stop string. */
static perk_status append(perk_request *request, int32_t token, bool *stops, perk_error *err) {
    const char *text;
    size_t size;
    request->tokens[request->length++] = token;
    request->scheduler->answer_tokens++;
    if (request->answered == 0) request->answered = perk_now();
    *stops = false;
    return request->text ? perk_stop_text_push(request->text, token, false, &text, &size, stops, err) : PERK_OK;
}

/* The request is out of the schedule, or never was in it; `slot` is free again, or -1. */
static void finish(perk_request *request, perk_finish reason, int32_t slot) {
    perk_scheduler *scheduler = request->scheduler;
    if (request->slot >= 0) {
        const perk_slot *r = &scheduler->schedule.slots[request->slot];
        request->found = r->found;
        request->set_backs = r->set_backs;
        scheduler->placed_in[request->slot] = NULL;
    }
    if (slot >= 0) perk_schedule_close(&scheduler->schedule, slot);
    request->slot = -1;
    request->finish = reason;
    request->ended = perk_now();
    scheduler->finished_count++;
    list_move(request, &scheduler->finished);
}

/* Ends a request that the schedule would go on with, if it has it. */
static void end(perk_request *request, perk_finish reason) {
    perk_executor *away = request->scheduler->away;
    int32_t slot = request->slot;
    if (slot >= 0 && away)
        away->type->online->cancel(away, slot); /* and the slot is free when the executor says so */
    else if (slot >= 0)
        perk_schedule_cancel(&request->scheduler->schedule, slot);
    finish(request, reason, away ? -1 : slot);
}

void perk_request_cancel(perk_request *request) {
    if (request->finish == PERK_FINISH_NONE) end(request, PERK_FINISH_CANCELLED);
}

void perk_request_free(perk_request *request) {
    if (!request) return;
    perk_request_cancel(request);
    list_remove(request);
    free_memory(request);
}

/* ---- into the schedule ---- */

static void place(perk_scheduler *scheduler, perk_request *request, int32_t slot) {
    perk_slot *r = &scheduler->schedule.slots[slot];
    r->prompt_length = request->prompt_length;
    r->limit = request->limit;
    r->stop_count = request->sampling.ignore_eos ? 0 : scheduler->eos_count;
    memcpy(r->stop_ids, scheduler->eos_ids, sizeof r->stop_ids);
    for (int32_t i = 0; i < request->sampling.stop_token_count; i++)
        r->stop_ids[r->stop_count++] = request->sampling.stop_tokens[i];
    r->rule = perk_sampling_rule(&request->sampling);
    r->rule.bias_count = perk_sampling_slot_biases(&request->sampling, perk_slot_biases(&scheduler->schedule, slot));
    memcpy(perk_slot_tokens(&scheduler->schedule, slot), request->tokens,
           (size_t)request->prompt_length * sizeof *request->tokens);
    r->shares = scheduler->share_prefixes;
    perk_slot_hash(&scheduler->schedule, slot, r->prompt_length / scheduler->config.page_size);
    if (scheduler->away)
        scheduler->away->type->online->arrive(scheduler->away, &scheduler->schedule, slot);
    else
        perk_schedule_arrive(&scheduler->schedule, slot);
    request->slot = slot;
    scheduler->placed_in[slot] = request;
    list_move(request, &scheduler->placed);
}

/* Remembers when a request was worked on for the first time. */
static void note_starts(perk_scheduler *scheduler) {
    const perk_schedule *schedule = &scheduler->schedule;
    double now = perk_now();
    for (int32_t place = 0; place < schedule->state->running; place++) {
        perk_request *request = scheduler->placed_in[schedule->order[place]];
        if (request->started == 0) request->started = now;
    }
}

static void place_queued(perk_scheduler *scheduler) {
    while (scheduler->queued.first) {
        int32_t slot = perk_schedule_open(&scheduler->schedule);
        if (slot < 0) return;
        place(scheduler, scheduler->queued.first, slot);
    }
}

perk_status perk_scheduler_fill(perk_scheduler *scheduler, const perk_batch **batch, bool *want_logits,
                                perk_error *err) {
    perk_schedule *schedule = &scheduler->schedule;
    place_queued(scheduler);
    perk_schedule_fill(schedule);
    note_starts(scheduler);
    *batch = &schedule->batch;
    *want_logits = false;
    for (int32_t row = 0; row < schedule->batch.num_logit_rows; row++)
        if (perk_sampling_needs_logits(&scheduler->placed_in[schedule->logit_slots[row]]->sampling))
            *want_logits = true;
    if (schedule->batch.num_tokens == 0 && schedule->state->unfinished > 0)
        return perk_fail(
            err, PERK_INTERNAL, "the scheduler found no work among %d unfinished requests (%d of %d pages unused)",
            perk_scheduler_unfinished(scheduler), schedule->pool.state->unused, schedule->limits.page_count);
    return PERK_OK;
}

/* ---- taking in a result ---- */

static perk_status pick_token(perk_scheduler *scheduler, perk_request *request, int32_t row,
                              const perk_step_result *result, int32_t *token, perk_error *err) {
    if (!perk_sampling_needs_logits(&request->sampling) && result->argmax) {
        *token = result->argmax[row];
        if (*token >= 0 && *token < scheduler->vocab_size) return PERK_OK;
        return perk_fail(err, PERK_INTERNAL, "the step gave token %d, outside the model's vocabulary of %d", *token,
                         scheduler->vocab_size);
    }
    if (!result->logits) return perk_fail(err, PERK_INTERNAL, "the step brought no logits to choose a token from");
    const float *logits = result->logits + (size_t)row * (size_t)scheduler->vocab_size;
    int32_t answered = request->length - request->prompt_length;
    int32_t logprob_count = perk_sampling_logprob_count(&request->sampling);
    perk_history history = {request->tokens, request->tokens + request->prompt_length, request->prompt_length,
                            answered};
    perk_logprob *logprobs = logprob_count ? request->logprobs + (size_t)answered * (size_t)logprob_count : NULL;
    return perk_sampler_pick(scheduler->sampler, logits, &request->sampling, &history, token, logprobs, err);
}

perk_status perk_scheduler_commit(perk_scheduler *scheduler, const perk_step_result *result, perk_error *err) {
    perk_schedule *schedule = &scheduler->schedule;
    int32_t rows = schedule->batch.num_logit_rows;
    for (int32_t row = 0; row < rows; row++) {
        perk_request *request = scheduler->placed_in[schedule->logit_slots[row]]; /* NULL: cancelled meanwhile */
        perk_status status = PERK_OK;
        if (request) status = pick_token(scheduler, request, row, result, &scheduler->picks[row], err);
        if (status) return status;
    }
    perk_schedule_commit(schedule, scheduler->picks);
    for (int32_t row = 0; row < rows; row++) {
        int32_t slot = schedule->logit_slots[row];
        perk_request *request = scheduler->placed_in[slot];
        bool stops;
        if (!request) continue;
        perk_status status = append(request, scheduler->picks[row], &stops, err);
        if (status) return status;
        if (schedule->slots[slot].state == PERK_SLOT_FINISHED)
            finish(request, stops ? PERK_FINISH_STOP : (perk_finish)schedule->slots[slot].end, slot);
        else if (stops)
            end(request, PERK_FINISH_STOP);
    }
    return PERK_OK;
}

/* ---- steps without the host ---- */

bool perk_scheduler_is_away(const perk_scheduler *scheduler) { return scheduler->away != NULL; }

perk_status perk_scheduler_launch(perk_scheduler *scheduler, perk_executor *executor,
                                  const perk_launch_options *options, perk_error *err) {
    bool is_here = !scheduler->away;
    place_queued(scheduler);
    perk_status status = executor->type->online->launch(executor, is_here ? &scheduler->schedule : NULL, options, err);
    if (!status) scheduler->away = executor;
    return status;
}

/* `details`: of the token, where its request wants log probabilities. */
static perk_status take_token(perk_request *request, int32_t token, const perk_draw_record *details, bool *stops,
                              perk_error *err) {
    if (token < 0 || token >= request->scheduler->vocab_size || request->length == request->limit)
        return perk_fail(err, PERK_INTERNAL, "a request of %d tokens that ends at %d got token %d", request->length,
                         request->limit, token);
    int32_t each = perk_sampling_logprob_count(&request->sampling);
    if (each && !details)
        return perk_fail(err, PERK_INTERNAL, "a token came without the log probabilities that were asked for");
    if (each)
        perk_sampler_logprobs(details, token, each - 1,
                              request->logprobs + (size_t)(request->length - request->prompt_length) * (size_t)each);
    return append(request, token, stops, err);
}

/* One record. The requests of some were cancelled here meanwhile: of them, the slot alone counts. */
static perk_status take_record(perk_scheduler *scheduler, const perk_token_record *record,
                               const perk_draw_record *details, perk_error *err) {
    perk_request *request = scheduler->placed_in[record->slot];
    perk_slot *r = &scheduler->schedule.slots[record->slot];
    bool ends = record->end != PERK_END_NONE;
    if (!request) {
        if (ends) perk_schedule_close(&scheduler->schedule, record->slot);
        return PERK_OK;
    }
    if (request->started == 0) request->started = perk_now();
    bool has_token = record->token >= 0 || (ends && record->end != PERK_END_CANCELLED), stops = false;
    perk_status status =
        has_token ? take_token(request, record->token, record->has_details ? details : NULL, &stops, err) : PERK_OK;
    if (!status && stops && !ends) end(request, PERK_FINISH_STOP);
    if (status || !ends) return status;
    r->found = record->found;
    r->set_backs = record->set_backs;
    finish(request, stops ? PERK_FINISH_STOP : (perk_finish)record->end, record->slot);
    return PERK_OK;
}

perk_status perk_scheduler_exchange(perk_scheduler *scheduler, int32_t *news, perk_error *err) {
    perk_token_record records[64];
    perk_draw_record details[64];
    perk_executor *away = scheduler->away;
    perk_status status = PERK_OK;
    *news = 0;
    for (size_t count; !status && (count = away->type->online->read(away, records, details, PERK_COUNT(records))) > 0;)
        for (size_t i = 0; i < count && !status; i++) {
            status = take_record(scheduler, &records[i], &details[i], err);
            *news += records[i].token >= 0 || records[i].end != PERK_END_NONE;
        }
    if (!status) place_queued(scheduler);
    return status;
}

perk_status perk_scheduler_take_back(perk_scheduler *scheduler, perk_error *err) {
    perk_executor *away = scheduler->away;
    perk_schedule *schedule = &scheduler->schedule;
    perk_status status = away->type->online->take_back(away, schedule, err);
    if (status) return status;
    scheduler->away = NULL;
    for (int32_t slot = 0; slot < schedule->limits.slots; slot++) {
        const perk_request *request = scheduler->placed_in[slot];
        if (!request && schedule->slots[slot].state == PERK_SLOT_FINISHED) perk_schedule_close(schedule, slot);
        if (!request) continue;
        if (schedule->slots[slot].length != request->length)
            return perk_fail(err, PERK_INTERNAL, "a request of %d tokens came back with %d", request->length,
                             schedule->slots[slot].length);
    }
    return PERK_OK;
}

/* ---- statistics ---- */

/* Milliseconds of a phase that ends when the next one begins, or with the request, or is under way. */
static double phase_ms(const perk_request *request, double begin, double end) {
    if (begin == 0) return 0;
    if (end == 0) end = request->ended > 0 ? request->ended : perk_now();
    return (end - begin) * 1e3;
}

void perk_request_statistics(const perk_request *request, perk_request_stats *out) {
    const perk_slot *r = request->slot >= 0 ? &request->scheduler->schedule.slots[request->slot] : NULL;
    double decode_ms = phase_ms(request, request->answered, 0);
    int32_t answered = request->length - request->prompt_length;
    *out = (perk_request_stats){.prompt_tokens = request->prompt_length,
                                .answer_tokens = answered,
                                .found_tokens = r ? r->found : request->found,
                                .set_backs = r ? r->set_backs : request->set_backs,
                                .queue_ms = phase_ms(request, request->submitted, request->started),
                                .prefill_ms = phase_ms(request, request->started, request->answered),
                                .decode_ms = decode_ms};
    if (answered > 1 && decode_ms > 0) out->tokens_per_second = (answered - 1) / (decode_ms * 1e-3);
}

void perk_scheduler_statistics(const perk_scheduler *scheduler, perk_engine_stats *out) {
    const perk_executor *away = scheduler->away;
    const perk_schedule *schedule = &scheduler->schedule;
    const perk_standing standing =
        away ? away->type->online->stand(away) : (perk_standing){*schedule->state, *schedule->pool.state};
    const perk_schedule_state *state = &standing.state;
    const perk_pool_state *pool = &standing.pool;
    int32_t unfinished = perk_scheduler_unfinished(scheduler), pages = schedule->pool.page_count;
    double places = (double)state->steps * scheduler->config.max_num_batched_tokens;
    *out = (perk_engine_stats){
        .submitted = scheduler->submitted,
        .finished = scheduler->finished_count,
        .steps = state->steps,
        .step_tokens = state->step_tokens,
        .answer_tokens = scheduler->answer_tokens,
        .found_tokens = state->found_tokens,
        .set_backs = state->set_backs,
        .evictions = pool->evictions,
        .batch_fill = places > 0 ? (double)state->step_tokens / places : 0,
        .waiting = PERK_MAX(unfinished - state->running, 0), /* one may have been cancelled here alone */
        .running = state->running,
        .pages = pages,
        .pages_in_use = pages - pool->unused,
        .pages_kept = pool->kept};
}

/* ---- pages for others ---- */

bool perk_scheduler_borrow(perk_scheduler *scheduler, int32_t count, int32_t *pages) {
    return perk_schedule_borrow(&scheduler->schedule, count, pages);
}

void perk_scheduler_return(perk_scheduler *scheduler, const int32_t *pages, int32_t count) {
    perk_schedule_return(&scheduler->schedule, pages, count);
}
