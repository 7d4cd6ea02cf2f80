/* perk bench serve: what arrives when (serve_arrivals.c), the service that it arrives at (serve_run.c), and the command
 * with its checks (bench_serve.c). */
#ifndef PERK_SRC_CLI_BENCH_SERVE_H
#define PERK_SRC_CLI_BENCH_SERVE_H

#include "cli.h"

#include "perk/service.h"

/* The command line; what it does not say is 0. */
typedef struct perk_serve_options {
    const char *trace;                 /* a file of arrivals, in place of drawn ones */
    const char *prompts, *answers;     /* "LEAST-MOST" tokens */
    float rate, duration;              /* arrivals a second; seconds in which they come */
    float cancels, alike;              /* shares of the requests */
    int32_t max_seq_length, max_pages; /* of the engine */
    int32_t max_unfinished;            /* a request beyond is refused; 0: none is */
    int32_t checks;                    /* answers to compare with those that the request gets alone */
    int backend, mode, soak;
} perk_serve_options;

void perk_serve_add_options(perk_cli_options *list, perk_serve_options *options);

/* ---- arrivals (serve_arrivals.c) ---- */

typedef struct perk_serve_request {
    double arrival; /* seconds after the beginning */
    int32_t prompt_tokens, answer_tokens;
    int32_t cancel_after; /* tokens of the answer; -1: never */
    int32_t text;         /* requests of the same one have prompts that begin alike; -1: none does */
    int32_t sample;       /* in the plan's samples; -1: not compared */
} perk_serve_request;

/* A request whose answer is compared; room for the longest. */
typedef struct perk_serve_sample {
    bool is_taken; /* by a request that the service took; else there is nothing to compare */
    size_t request;
    int32_t *alone, *read; /* tokens */
    float *gap;            /* from the best token to the next, alone; natural logarithm */
    size_t alone_count, read_count;
} perk_serve_sample;

typedef struct perk_serve_plan {
    perk_serve_request *requests; /* by arrival */
    size_t count, capacity;
    perk_serve_sample *samples; /* [sample_count] one of each equal part of the requests */
    int32_t sample_count;
    int32_t longest_prompt, longest_answer, longest; /* tokens; `longest` of prompt and answer together */
    uint64_t seed;
} perk_serve_plan;

/* The same options and seed make the same plan. perk_serve_plan_free is due also after a failure. */
perk_status perk_serve_plan_make(perk_serve_plan *plan, const perk_serve_options *options, uint64_t seed,
                                 perk_error *err);
void perk_serve_plan_free(perk_serve_plan *plan);
/* The service took the request: it becomes a sample if it is the first of its part. */
void perk_serve_sample_taken(perk_serve_plan *plan, size_t request);
/* Writes a request's prompt: [prompt_tokens] ids below `vocab`. */
void perk_serve_prompt(const perk_serve_plan *plan, size_t request, int32_t vocab, int32_t *ids);
/* How all requests are sampled: greedy, to their last token. */
perk_sampling perk_serve_sampling(const perk_serve_request *request);

/* ---- times: any number of them in fixed memory, to 0.1 % (serve_run.c) ---- */

enum { PERK_SERVE_BUCKETS = 12288 };

typedef struct perk_serve_times {
    uint64_t counts[PERK_SERVE_BUCKETS], total;
} perk_serve_times;

/* The time, in milliseconds, below which `part` of the times lie; 0 when there are none. */
double perk_serve_quantile(const perk_serve_times *times, double part);

/* ---- the run (serve_run.c) ---- */

typedef struct perk_serve_result {
    perk_serve_times first_token, next_token, queue;
    uint64_t submitted, refused, cancelled, tokens;             /* cancelled: before their last token */
    double seconds;                                             /* from the first arrival to the last token */
    double process_cpu, service_cpu, submitter_cpu, reader_cpu; /* seconds in all, and of these threads */
    uint64_t rss_begin, rss_middle, rss_end;                    /* bytes; middle: when half of the arrivals have come */
    int32_t most_unfinished;
    perk_engine_stats stats; /* after the last request was released */
} perk_serve_result;

/* A service with `engine`, which it takes over, also when this fails; `plan` is needed until perk_serve_run_free. */
typedef struct perk_serve_run perk_serve_run;
perk_status perk_serve_run_open(perk_serve_run **out, perk_serve_plan *plan, perk_engine *engine,
                                int32_t max_unfinished, perk_error *err);
/* Lets all requests arrive, reads their answers, those of the samples into the plan, and waits for the last. Fails when
 * a token is lost or repeated, a page is still held, or the service fails. Once; the caller makes *result zero. */
perk_status perk_serve_run_all(perk_serve_run *run, perk_serve_result *result, perk_error *err);
void perk_serve_run_free(perk_serve_run *run);

#endif
