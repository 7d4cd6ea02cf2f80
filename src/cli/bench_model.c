#include "bench_model.h"

enum { WARM_UP = 8, MAX_ROWS = 65536, EXACT_CONTEXT = 1024 };

void perk_bench_add_model_options(perk_cli_options *list, perk_bench_options *o) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("model", &o->model, "DIR|config.json", "what to measure"),
        PERK_CLI_OPTION_FLAG("random-weights", &o->random_weights, "draw the weights; the config alone is needed"),
        PERK_CLI_OPTION_INT("page-size", &o->page_size, "N", "positions in a KV page", 16, 4096),
        PERK_CLI_OPTION_FLAG("portable", &o->portable, "sm_80 instructions only"),
        PERK_CLI_OPTION_SEED("seed", &o->seed, "of the random weights, and of arrivals"),
        PERK_CLI_OPTION_INT("threads", &o->threads, "N", "of loading and of the reference", 0, 1024),
        PERK_CLI_OPTION_TEXT("cache-dir", &o->cache_folder, "DIR", "the cubin cache"),
        PERK_CLI_OPTION_FLAG("unlimited-waits", &o->unlimited_waits,
                             "the kernel's waits never give up: shows what their limit costs"),
        PERK_CLI_OPTION_FLAG("no-cache", &o->no_cache, "compile anew, keep nothing"),
        PERK_CLI_OPTION_FLAG("verbose", &o->verbose, "the log on stderr"),
    };
    perk_cli_add(list, items, (int)PERK_COUNT(items));
}

void perk_bench_add_options(perk_cli_options *list, perk_bench_options *o) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_INT("batch", &o->batch, "N", "requests in a step", 1, MAX_ROWS),
        PERK_CLI_OPTION_INT("context", &o->context, "N", "tokens that every request has before", 1, 1 << 20),
        PERK_CLI_OPTION_INT("steps", &o->steps, "N", "steps to time", 1, 100000),
        PERK_CLI_OPTION_INT("max-batched-tokens", &o->tokens, "N",
                            "tokens that the program is built for (at least the batch)", 1, MAX_ROWS),
    };
    perk_bench_add_model_options(list, o);
    perk_cli_add(list, items, (int)PERK_COUNT(items));
}

/* ---- open and close ---- */

perk_status perk_bench_open_model(perk_bench *b, const perk_bench_options *o, perk_error *err) {
    double begin = perk_now();
    *b = (perk_bench){.options = o};
    perk_status status = perk_model_open(&b->model, o->model, o->random_weights != 0, o->seed, err);
    b->report.open_ms = (perk_now() - begin) * 1e3;
    return status;
}

static void free_shape(perk_bench *b) {
    perk_bench_close_gpu(b);
    perk_batch_free(b->batch);
    free(b->pages);
    free(b->ids);
    free(b->chosen);
    free(b->wall_ms);
    free(b->device_ms);
    b->batch = NULL;
    b->pages = b->ids = b->chosen = NULL;
    b->wall_ms = b->device_ms = NULL;
}

perk_status perk_bench_set_shape(perk_bench *b, const perk_bench_options *o, perk_error *err) {
    free_shape(b);
    b->options = o;
    b->config = (perk_config){.max_num_batched_tokens = PERK_MAX(o->tokens, o->batch),
                              .max_num_batched_requests = o->batch,
                              .page_size = o->page_size,
                              .max_seq_length = o->context + o->steps + 2 * WARM_UP};
    perk_status status = perk_config_resolve(&b->config, b->model->max_positions, err);
    if (status == PERK_OK) status = perk_batch_create(&b->batch, &b->config, err);
    if (status != PERK_OK) return status;
    b->pages = perk_calloc((size_t)b->batch->pages_per_request, sizeof *b->pages);
    b->ids = perk_calloc((size_t)b->config.max_num_batched_tokens, sizeof *b->ids);
    b->chosen = perk_calloc((size_t)perk_bench_step_count(b) * (size_t)o->batch, sizeof *b->chosen);
    b->wall_ms = perk_calloc((size_t)o->steps, sizeof *b->wall_ms);
    b->device_ms = perk_calloc((size_t)o->steps, sizeof *b->device_ms);
    if (!b->pages || !b->ids || !b->chosen || !b->wall_ms || !b->device_ms)
        return perk_fail_memory(err, "measurements");
    return PERK_OK;
}

perk_status perk_bench_open(perk_bench *b, const perk_bench_options *o, perk_error *err) {
    perk_status status = perk_bench_open_model(b, o, err);
    return status == PERK_OK ? perk_bench_set_shape(b, o, err) : status;
}

perk_status perk_bench_open_gpu(perk_bench *b, bool profile, perk_error *err) {
    const perk_bench_options *o = b->options;
    const perk_gpu_options gpu = {.portable = o->portable != 0,
                                  .timing = true,
                                  .profile = profile,
                                  .many_steps = o->many_steps != 0,
                                  .unlimited_waits = o->unlimited_waits != 0,
                                  .cache_folder = o->cache_folder,
                                  .no_cache = o->no_cache != 0,
                                  .threads = o->threads,
                                  .log = perk_cli_log(o->verbose)};
    perk_bench_close_gpu(b);
    double begin = perk_now();
    perk_status status =
        perk_gpu_create(&b->gpu, b->model->graph, b->model->checkpoint, &b->config, &gpu, &b->report, err);
    b->report.total_ms = b->report.open_ms + (perk_now() - begin) * 1e3;
    return status;
}

void perk_bench_close_gpu(perk_bench *b) {
    if (b->gpu) b->gpu->type->free(b->gpu);
    b->gpu = NULL;
}

void perk_bench_close(perk_bench *b) {
    free_shape(b);
    perk_model_free(b->model);
    free(b->reference);
}

/* ---- steps ---- */

int32_t perk_bench_token(const perk_bench *b, int32_t request, int32_t position) {
    return (int32_t)(((int64_t)request * 7919 + (int64_t)position * 104729 + 17) % b->model->vocab_size);
}

perk_status perk_bench_add(perk_bench *b, int32_t request, int32_t position, int32_t count, const int32_t *ids,
                           int want_logits, perk_error *err) {
    int32_t per_request = b->batch->pages_per_request;
    for (int32_t i = 0; i < per_request; i++) b->pages[i] = request * per_request + i;
    return perk_batch_add(b->batch, &b->config, ids, count, position, b->pages, want_logits, err);
}

perk_status perk_bench_step_context(perk_bench *b, int32_t request, int32_t position, int32_t count, int want_logits,
                                    perk_error *err) {
    perk_step_result result;
    for (int32_t i = 0; i < count; i++) b->ids[i] = perk_bench_token(b, request, position + i);
    perk_batch_clear(b->batch);
    perk_status status = perk_bench_add(b, request, position, count, b->ids, want_logits, err);
    return status == PERK_OK ? b->gpu->type->step(b->gpu, b->batch, false, &result, err) : status;
}

/* The pages of a request from the given one on: copies of those before it. */
static perk_status repeat_pages(perk_bench *b, int32_t request, int32_t written, perk_error *err) {
    int32_t each = b->batch->pages_per_request, first = request * each;
    perk_status status = PERK_OK;
    for (int32_t page = written; page < each && status == PERK_OK; page += written)
        status = perk_gpu_copy_pages(b->gpu, first, first + page, PERK_MIN(written, each - page), err);
    return status;
}

perk_status perk_bench_prefill(perk_bench *b, perk_error *err) {
    int32_t page_size = b->config.page_size, written = (EXACT_CONTEXT + page_size - 1) / page_size;
    int32_t context = PERK_MIN(b->options->context, written * page_size);
    perk_status status = PERK_OK;
    for (int32_t request = 0; request < b->options->batch && status == PERK_OK; request++) {
        for (int32_t position = 0, count; position < context && status == PERK_OK; position += count) {
            count = PERK_MIN(b->config.max_num_batched_tokens, context - position);
            status = perk_bench_step_context(b, request, position, count, 0, err);
        }
        if (status == PERK_OK && context < b->options->context) status = repeat_pages(b, request, written, err);
    }
    return status;
}

perk_status perk_bench_prompt_step(perk_bench *b, int32_t count, perk_error *err) {
    return perk_bench_step_context(b, 0, b->options->context - count, count, 1, err);
}

/* Adds one token of every request, runs the step, and leaves the tokens that it chose in `next`. */
static perk_status step_decode(perk_bench *b, int32_t position, int32_t *next, double *wall_ms, perk_error *err) {
    perk_step_result result = {0};
    perk_status status = PERK_OK;
    perk_batch_clear(b->batch);
    for (int32_t r = 0; r < b->options->batch && status == PERK_OK; r++)
        status = perk_bench_add(b, r, position, 1, &next[r], 1, err);
    double begin = perk_now();
    if (status == PERK_OK) status = b->gpu->type->step(b->gpu, b->batch, false, &result, err);
    *wall_ms = (perk_now() - begin) * 1e3;
    for (int32_t r = 0; r < b->options->batch && status == PERK_OK; r++) {
        next[r] = result.argmax[r];
        if (next[r] < 0 || next[r] >= b->model->vocab_size)
            status = perk_fail(err, PERK_INTERNAL, "the step at position %d chose token %d", position, next[r]);
    }
    return status;
}

int64_t perk_bench_step_count(const perk_bench *b) { return (int64_t)WARM_UP + b->options->steps; }

perk_status perk_bench_decode(perk_bench *b, perk_error *err) {
    int32_t *next = perk_calloc((size_t)b->options->batch, sizeof *next);
    if (!next) return perk_fail_memory(err, "tokens");
    perk_status status = PERK_OK;
    for (int32_t r = 0; r < b->options->batch; r++) next[r] = perk_bench_token(b, r, b->options->context);
    for (int32_t step = -WARM_UP; step < b->options->steps && status == PERK_OK; step++) {
        double wall_ms;
        status = step_decode(b, b->options->context + WARM_UP + step, next, &wall_ms, err);
        memcpy(b->chosen + (int64_t)(WARM_UP + step) * b->options->batch, next,
               (size_t)b->options->batch * sizeof *next);
        if (status != PERK_OK || step < 0) continue;
        b->wall_ms[step] = wall_ms;
        status = perk_gpu_step_ms(b->gpu, &b->device_ms[step], err);
    }
    free(next);
    return status;
}

/* ---- numbers ---- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double perk_bench_quantile(double *values, int32_t count, double part) {
    qsort(values, (size_t)count, sizeof *values, by_value);
    int32_t index = (int32_t)((double)count * part);
    return values[PERK_MIN(index, count - 1)];
}
