/* perk bench: no time without a comparison of the same program with the reference executor. */
#include "bench_model.h"

#include "src/reference.h"

#include <math.h>

enum { REFERENCE_ROWS = 64 }; /* tokens that the reference takes at a time */

perk_status perk_bench_read_prompt(perk_bench *b, int32_t tokens, int32_t chunk, const float **logits,
                                   perk_error *err) {
    perk_step_result result = {0};
    perk_status status = PERK_OK;
    for (int32_t position = 0; position < tokens && status == PERK_OK; position += chunk) {
        int32_t count = PERK_MIN(chunk, tokens - position);
        bool is_last = position + count == tokens;
        for (int32_t i = 0; i < count; i++) b->ids[i] = perk_bench_token(b, 0, position + i);
        perk_batch_clear(b->batch);
        for (int32_t r = 0; r < b->options->batch && status == PERK_OK; r++)
            status = perk_bench_add(b, r, position, count, b->ids, is_last, err);
        if (status == PERK_OK) status = b->gpu->type->step(b->gpu, b->batch, is_last, &result, err);
    }
    *logits = result.logits;
    if (status == PERK_OK && !result.logits)
        status = perk_fail(err, PERK_UNSUPPORTED, "the model makes no logits to compare");
    return status;
}

typedef struct reference_run {
    perk_config config;
    perk_executor *executor;
    perk_batch *batch;
    int32_t *pages;
    int32_t ids[REFERENCE_ROWS];
} reference_run;

static perk_status open_reference(reference_run *run, const perk_bench *b, int32_t tokens, perk_error *err) {
    const perk_reference_options options = {.threads = b->options->threads, .precision = PERK_PRECISION_BF16};
    run->config = (perk_config){.max_num_batched_tokens = PERK_MIN(tokens, REFERENCE_ROWS),
                                .max_num_batched_requests = 1,
                                .page_size = b->config.page_size,
                                .max_seq_length = tokens};
    perk_status status = perk_config_resolve(&run->config, b->model->max_positions, err);
    if (status == PERK_OK) status = perk_batch_create(&run->batch, &run->config, err);
    if (status != PERK_OK) return status;
    run->pages = perk_calloc((size_t)run->batch->pages_per_request, sizeof *run->pages);
    if (!run->pages) return perk_fail_memory(err, "the reference's pages");
    for (int32_t i = 0; i < run->batch->pages_per_request; i++) run->pages[i] = i;
    return perk_reference_create(&run->executor, b->model->graph, b->model->checkpoint, &run->config, &options, err);
}

static perk_status run_reference(reference_run *run, const perk_bench *b, int32_t tokens, float *out, perk_error *err) {
    perk_step_result result = {0};
    perk_status status = PERK_OK;
    for (int32_t position = 0; position < tokens && status == PERK_OK; position += REFERENCE_ROWS) {
        int32_t count = PERK_MIN(REFERENCE_ROWS, tokens - position);
        bool is_last = position + count == tokens;
        for (int32_t i = 0; i < count; i++) run->ids[i] = perk_bench_token(b, 0, position + i);
        perk_batch_clear(run->batch);
        status = perk_batch_add(run->batch, &run->config, run->ids, count, position, run->pages, is_last, err);
        if (status == PERK_OK) status = run->executor->type->step(run->executor, run->batch, is_last, &result, err);
    }
    if (status == PERK_OK) memcpy(out, result.logits, (size_t)b->model->vocab_size * sizeof *out);
    return status;
}

/* The reference's logits depend on model and prompt alone: programs of several shapes are compared with the same. */
static perk_status need_reference(perk_bench *b, int32_t tokens, perk_error *err) {
    if (b->reference && b->reference_tokens == tokens) return PERK_OK;
    reference_run run = {.executor = NULL};
    free(b->reference);
    b->reference = perk_calloc((size_t)b->model->vocab_size, sizeof *b->reference);
    b->reference_tokens = 0;
    perk_status status = b->reference ? open_reference(&run, b, tokens, err) : perk_fail_memory(err, "logits");
    if (status == PERK_OK) status = run_reference(&run, b, tokens, b->reference, err);
    if (status == PERK_OK) b->reference_tokens = tokens;
    if (run.executor) run.executor->type->free(run.executor);
    perk_batch_free(run.batch);
    free(run.pages);
    return status;
}

static double relative_error(const float *got, const float *want, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    return sqrt(difference / fmax(norm, 1e-30));
}

perk_status perk_bench_check(perk_bench *b, int32_t tokens, int32_t chunk, double *error, perk_error *err) {
    const double limit = 5e-2;
    const float *logits = NULL;
    size_t vocab = (size_t)b->model->vocab_size;
    perk_status status = need_reference(b, tokens, err);
    if (status == PERK_OK) status = perk_bench_read_prompt(b, tokens, chunk, &logits, err);
    *error = 0;
    for (int32_t r = 0; r < b->options->batch && status == PERK_OK; r++) {
        double row = relative_error(logits + (size_t)r * vocab, b->reference, vocab);
        if (!(row <= limit))
            status = perk_fail(err, PERK_INTERNAL,
                               "the program's logits differ from the reference's by %.3g in row %d of %d (limit %.3g)",
                               row, r, b->options->batch, limit);
        *error = fmax(*error, row);
    }
    return status;
}
