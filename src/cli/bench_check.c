/* perk bench: no time without a comparison of the same program with the reference executor. */
#include "bench_model.h"

#include "src/reference.h"

#include <math.h>

enum { REFERENCE_ROWS = 64 }; /* tokens that the reference takes at a time */

/* Who reads a prompt: the program that is timed, or the reference. All borrowed. */
typedef struct prompt_reader {
    perk_executor *executor;
    const perk_config *config;
    perk_batch *batch;
    int32_t *pages, *ids; /* scratch: of a request, of a step */
    int32_t requests;     /* that read the same prompt side by side */
} prompt_reader;

static perk_status read_part(const prompt_reader *reader, int32_t position, int32_t count, bool is_last,
                             perk_step_result *result, perk_error *err) {
    int32_t pages_each = reader->batch->pages_per_request;
    perk_status status = PERK_OK;
    perk_batch_clear(reader->batch);
    for (int32_t r = 0; r < reader->requests && status == PERK_OK; r++) {
        for (int32_t i = 0; i < pages_each; i++) reader->pages[i] = r * pages_each + i;
        status =
            perk_batch_add(reader->batch, reader->config, reader->ids, count, position, reader->pages, is_last, err);
    }
    if (status == PERK_OK) status = reader->executor->type->step(reader->executor, reader->batch, is_last, result, err);
    return status;
}

static perk_status read_prompt(const prompt_reader *reader, const perk_bench *b, int32_t tokens, int32_t chunk,
                               const float **logits, perk_error *err) {
    perk_step_result result = {0};
    perk_status status = PERK_OK;
    for (int32_t position = 0; position < tokens && status == PERK_OK; position += chunk) {
        int32_t count = PERK_MIN(chunk, tokens - position);
        for (int32_t i = 0; i < count; i++) reader->ids[i] = perk_bench_token(b, 0, position + i);
        status = read_part(reader, position, count, position + count == tokens, &result, err);
    }
    *logits = result.logits;
    if (status == PERK_OK && !result.logits)
        status = perk_fail(err, PERK_UNSUPPORTED, "the model makes no logits to compare");
    return status;
}

perk_status perk_bench_read_prompt(perk_bench *b, int32_t tokens, int32_t chunk, const float **logits,
                                   perk_error *err) {
    const prompt_reader reader = {b->gpu, &b->config, b->batch, b->pages, b->ids, b->options->batch};
    return read_prompt(&reader, b, tokens, chunk, logits, err);
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
    return perk_reference_create(&run->executor, b->model->graph, b->model->checkpoint, &run->config, &options, err);
}

static perk_status run_reference(reference_run *run, const perk_bench *b, int32_t tokens, float *out, perk_error *err) {
    const prompt_reader reader = {run->executor, &run->config, run->batch, run->pages, run->ids, 1};
    const float *logits;
    perk_status status = read_prompt(&reader, b, tokens, REFERENCE_ROWS, &logits, err);
    if (status == PERK_OK) memcpy(out, logits, (size_t)b->model->vocab_size * sizeof *out);
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
