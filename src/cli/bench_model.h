/* A model on the GPU, with a batch of requests that have a context: what perk bench decode and perk profile run. */
#ifndef PERK_SRC_CLI_BENCH_MODEL_H
#define PERK_SRC_CLI_BENCH_MODEL_H

#include "cli.h"

#include "src/gpu.h"
#include "src/model.h"

typedef struct perk_bench_options {
    const char *model, *cache_folder;
    int random_weights, portable, verbose, no_cache, unlimited_waits;
    int32_t batch, context, steps, tokens, page_size, threads;
    uint64_t seed;
} perk_bench_options;

#define PERK_BENCH_DEFAULTS                                                                                            \
    { .batch = 1, .context = 512, .steps = 64, .page_size = 64, .tokens = 1 }

void perk_bench_add_options(perk_cli_options *list, perk_bench_options *options);

typedef struct perk_bench {
    const perk_bench_options *options; /* borrowed */
    perk_config config;
    perk_model *model;
    perk_executor *gpu;
    perk_batch *batch;
    perk_start_report report;    /* of the executor made last */
    int32_t *pages;              /* [pages a request]: of the request being added */
    double *wall_ms, *device_ms; /* [steps] of the last perk_bench_decode, in their order */
} perk_bench;

/* The model and a batch; perk_bench_close frees everything, also after a failure. */
perk_status perk_bench_open(perk_bench *bench, const perk_bench_options *options, perk_error *err);
void perk_bench_close(perk_bench *bench);

/* The executor, in place of the one before. */
perk_status perk_bench_open_gpu(perk_bench *bench, bool profile, perk_error *err);
void perk_bench_close_gpu(perk_bench *bench);

/* Any fixed text does for speed; the same ids everywhere, so that executors can be compared. */
int32_t perk_bench_token(const perk_bench *bench, int32_t request, int32_t position);
/* Adds tokens of a request to bench->batch. */
perk_status perk_bench_add(perk_bench *bench, int32_t request, int32_t position, int32_t count, const int32_t *ids,
                           int want_logits, perk_error *err);

/* Fills the cache of every request with `context` tokens. */
perk_status perk_bench_prefill(perk_bench *bench, perk_error *err);
/* One step of the last `count` tokens of the first request's context, which makes what is there once more. */
perk_status perk_bench_prompt_step(perk_bench *bench, int32_t count, perk_error *err);
/* `steps` steps of one token of each request, after a few that are not timed. */
perk_status perk_bench_decode(perk_bench *bench, perk_error *err);

/* The value below which `part` of the values lie; sorts them. */
double perk_bench_quantile(double *values, int32_t count, double part);

#endif
