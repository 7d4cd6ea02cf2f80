/* What perk bench can measure, one file each. */
#ifndef PERK_SRC_CLI_BENCH_H
#define PERK_SRC_CLI_BENCH_H

#include "bench_model.h"
#include "bench_serve.h"

/* The command line; what it does not say is 0. */
typedef struct perk_bench_command {
    const perk_cli_command *self; /* for messages */
    perk_bench_options bench;
    const char *batches, *contexts; /* lists: "1,8,32" */
    int32_t prompt_tokens;
    int32_t check_tokens;
    int32_t runs; /* starts, prompts or launches */
    perk_serve_options serve;
    int page_cache, one_start, no_check, json;
    char **words; /* the words as they were, without "perk bench" */
    int word_count;
    double entered; /* perk_now() when the command began */
} perk_bench_command;

/* Each prints its result and returns an exit code. */
int perk_bench_measure_decode(const perk_bench_command *command);
int perk_bench_measure_prefill(const perk_bench_command *command);
int perk_bench_measure_startup(const perk_bench_command *command);
int perk_bench_measure_load(const perk_bench_command *command);
int perk_bench_measure_sync(const perk_bench_command *command);
int perk_bench_measure_serve(const perk_bench_command *command);

/* ---- results (bench_result.c) ---- */

typedef struct perk_bench_spread {
    double median, p10, p90; /* of few values, p10 and p90 are the least and the greatest */
} perk_bench_spread;

/* Sorts the values. */
perk_bench_spread perk_bench_spread_of(double *values, int32_t count);

/* A result's JSON object, with what every result has: what, model (where there is one), device, date, perk's version.
 * NULL: out of memory, which the calls below and perk_cli_print_json accept. */
json_t *perk_bench_result(const char *what, const char *model, const char *device);
/* One object of two; both are used up. NULL when one of them is, or memory is out. */
json_t *perk_bench_join(json_t *json, json_t *more);
/* Puts NAME, NAME_p10 and NAME_p90. */
void perk_bench_put_spread(json_t *json, const char *name, perk_bench_spread spread);
/* Puts what the check said: a relative error, or null where it was not made. */
void perk_bench_put_check(json_t *json, double error);
/* "1.2e-02", or "not made"; in the caller's buffer. */
const char *perk_bench_check_text(double error, char *text, size_t size);

#endif
