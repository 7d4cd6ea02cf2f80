/* A model on the GPU, with a batch of requests that have a context: what perk bench decode and perk profile run. */
#ifndef PERK_SRC_CLI_BENCH_MODEL_H
#define PERK_SRC_CLI_BENCH_MODEL_H

#include "cli.h"

#include "src/gpu.h"
#include "src/model.h"

typedef struct perk_bench_options {
    const char *model, *cache_folder;
    int random_weights, portable, verbose, no_cache, unlimited_waits;
    int many_steps; /* the program can run many steps a launch */
    int32_t batch, context, steps, tokens, page_size, threads;
    uint64_t seed;
} perk_bench_options;

#define PERK_BENCH_DEFAULTS                                                                                            \
    { .batch = 1, .context = 512, .steps = 64, .page_size = 64, .tokens = 1 }

/* All options, of a command that measures one batch at one context; and those that every measurement has. */
void perk_bench_add_options(perk_cli_options *list, perk_bench_options *options);
void perk_bench_add_model_options(perk_cli_options *list, perk_bench_options *options);

typedef struct perk_bench {
    const perk_bench_options *options; /* borrowed */
    perk_config config;
    perk_model *model;
    perk_executor *gpu;
    perk_batch *batch;
    float *reference; /* [vocabulary] what perk_bench_check compares with; NULL until needed */
    int32_t reference_tokens;
    perk_start_report report;    /* of the executor made last */
    int32_t *pages;              /* [pages a request]: of the request being added */
    int32_t *ids;                /* [tokens a step]: of a step being made */
    double *wall_ms, *device_ms; /* [steps] of the last perk_bench_decode, or wall_ms of perk_bench_launch, in order */
    int32_t *chosen;             /* [perk_bench_step_count][batch] tokens of the last perk_bench_decode */
} perk_bench;

/* The model and a batch; perk_bench_close frees everything, also after a failure. */
perk_status perk_bench_open(perk_bench *bench, const perk_bench_options *options, perk_error *err);
void perk_bench_close(perk_bench *bench);
/* The two parts of perk_bench_open. The second may be called again, for other numbers and the same model: it takes the
 * executor and the batch away that were there. */
perk_status perk_bench_open_model(perk_bench *bench, const perk_bench_options *options, perk_error *err);
perk_status perk_bench_set_shape(perk_bench *bench, const perk_bench_options *options, perk_error *err);

/* The executor, in place of the one before. */
perk_status perk_bench_open_gpu(perk_bench *bench, bool profile, perk_error *err);
void perk_bench_close_gpu(perk_bench *bench);

/* Any fixed text does for speed; the same ids everywhere, so that executors can be compared. */
int32_t perk_bench_token(const perk_bench *bench, int32_t request, int32_t position);
/* Adds tokens of a request to bench->batch. */
perk_status perk_bench_add(perk_bench *bench, int32_t request, int32_t position, int32_t count, const int32_t *ids,
                           int want_logits, perk_error *err);

/* A step of `count` tokens of one request's context. */
perk_status perk_bench_step_context(perk_bench *bench, int32_t request, int32_t position, int32_t count,
                                    int want_logits, perk_error *err);
/* Fills the cache of every request with `context` tokens. */
perk_status perk_bench_prefill(perk_bench *bench, perk_error *err);
/* One step of the last `count` tokens of the first request's context, which makes what is there once more. */
perk_status perk_bench_prompt_step(perk_bench *bench, int32_t count, perk_error *err);
/* `steps` steps of one token of each request, after a few that are not timed. */
perk_status perk_bench_decode(perk_bench *bench, perk_error *err);
/* All of them. */
int64_t perk_bench_step_count(const perk_bench *bench);
/* The same steps in one launch, of an executor with many_steps: bench->wall_ms are those between the tokens of two
 * steps, by the host's clock. PERK_INTERNAL where a token is not the one that perk_bench_decode, which was called
 * before, has got. (bench_launch.c) */
perk_status perk_bench_launch(perk_bench *bench, perk_error *err);

/* ---- is it right? (bench_check.c) ---- */

/* Lets every request of the batch read the same prompt, `chunk` tokens a step. The logits of its last token, a row a
 * request, are valid until the next step. */
perk_status perk_bench_read_prompt(perk_bench *bench, int32_t tokens, int32_t chunk, const float **logits,
                                   perk_error *err);
/* The program that is timed must compute what the reference computes, within the noise of bf16 in a deep network: every
 * row of perk_bench_read_prompt's logits against the reference executor's. *error: the worst row's relative L2 error.
 */
perk_status perk_bench_check(perk_bench *bench, int32_t tokens, int32_t chunk, double *error, perk_error *err);

/* ---- numbers ---- */

/* The value below which `part` of the values lie; sorts them. */
double perk_bench_quantile(double *values, int32_t count, double part);

#endif
