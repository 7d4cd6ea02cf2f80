/* perk: test mode. A few layer calls, alone, through the whole pipeline: lowered, checked, emitted, compiled or taken
 * from the cache, loaded, and run exactly once, with every activation poisoned before. What comes out is compared with
 * values of the caller's, or with what the reference executor makes of the same inputs and weights.
 *
 *     perk_test *test;
 *     perk_error err = {0};
 *     perk_test_options options = {.rows = 8, .seed = 1};
 *     perk_test_difference difference;
 *     perk_status status = perk_test_create(&test, &options, &err);
 *     if (status == PERK_OK) {
 *         perk_graph *graph = perk_test_graph(test);
 *         perk_tensor *x = perk_input(graph, "x", 512), *w = perk_attach_matrix(graph, "w", 1000, 512);
 *         perk_tensor *y = perk_linear(graph, "y", x, w, NULL);
 *         status = perk_test_run(test, &err);
 *         if (status == PERK_OK) status = perk_test_compare(test, y, NULL, 0, &difference, &err);
 *     }
 *     perk_test_free(test);
 *
 * examples/test_op.c is the same as a program. What is not set is drawn from the seed: a test needs no data.
 *
 * A test is used by one thread at a time. Values are fp32 on this side, row by row; inputs and weights are rounded to
 * bf16 when they are set.
 */
#ifndef PERK_TEST_H
#define PERK_TEST_H
#include "perk/engine.h"
#include "perk/graph.h"
#ifdef __cplusplus
extern "C" {
#endif

/* One request's part of the step: `tokens` rows, behind `history` positions that its KV cache holds before. */
typedef struct perk_test_request {
    int32_t history; /* filled by steps of the same program on inputs of their own, before the one step that counts */
    int32_t tokens;  /* 1 or more */
    int32_t logits;  /* rows of logits that are wanted: 0 none, 1 of the last token, 2 of all */
} perk_test_request;

/* Zero is right everywhere. */
typedef struct perk_test_options {
    /* Where the test runs. PERK_BACKEND_AUTO on a machine without a GPU lowers, checks and emits for `arch`, compiles
     * where there is an NVRTC, and runs the plan's tasks on the CPU instead, in an order that the seed draws.
     * PERK_BACKEND_REFERENCE does none of that: it runs the reference. */
    perk_backend backend;
    int32_t device, portable;          /* as in perk_engine_options */
    const char *arch;                  /* of PERK_BACKEND_AUTO without a GPU; NULL: "sm_90a" */
    int32_t rows;                      /* rows that the program is built for; 0: as many as the requests have tokens */
    const perk_test_request *requests; /* copied; NULL: one request of `rows` tokens (0: 8), logits of all */
    int32_t request_count;
    int32_t page_size;     /* of the KV cache; 0: 16, the smallest, so that short tests cross pages */
    int32_t max_positions; /* a request may have; 0: as many as the longest has */
    int32_t threads;       /* of the reference executor and of loading; 0: all cores */
    uint64_t seed;         /* of everything that is not set */
    const char *cache_folder;
    int32_t no_cache;
    int32_t for_racecheck; /* the program is one that compute-sanitizer's racecheck can follow (docs/testing.md) */
    perk_log log;
} perk_test_options;

typedef struct perk_test perk_test;

/* `options` may be NULL. PERK_INVALID_ARGUMENT for numbers out of range. */
PERK_API perk_status perk_test_create(perk_test **out, const perk_test_options *options, perk_error *err);
PERK_API void perk_test_free(perk_test *test);

/* The graph to fill with tensors and layer calls; owned by the test. Outputs that no layer call reads are kept; others
 * can be read once perk_keep was called on them, which also keeps them from being folded into their neighbours. Nothing
 * can be added after the run. */
PERK_API perk_graph *perk_test_graph(perk_test *test);

/* ---- before the run ---- */

/* Gives the values of an input or of an attached weight (a part, not a stack). `count` must be theirs: a vector has
 * [length], a matrix [rows][cols], one of experts [count][rows][cols], an input [positions][width]: for each request in
 * turn its history, then its tokens. Setting again replaces. Unset inputs are normal with deviation 1; unset weights
 * are drawn as for random weights: matrices keep the size of activations, norm weights lie around 1, biases around 0.
 */
PERK_API perk_status perk_test_set(perk_test *test, perk_tensor *tensor, const float *values, size_t count,
                                   perk_error *err);
/* Gives the token ids for embed, [positions]. Unset ones are drawn from the smallest table's rows. */
PERK_API perk_status perk_test_set_tokens(perk_test *test, const int32_t *ids, size_t count, perk_error *err);

/* ---- the run ---- */

/* Compiles and runs, once. What the program should write is filled with NaN before (integers with -1), on a GPU the KV
 * cache as well, so that what it does not write cannot pass. A second run is PERK_INVALID_ARGUMENT, whether or not the
 * first went well. */
PERK_API perk_status perk_test_run(perk_test *test, perk_error *err);

typedef struct perk_test_run_report {
    const char *executor;    /* what ran: "gpu", "simulator" (tasks on the CPU), "reference"; static */
    perk_start_report start; /* how it got there; without a GPU `arch` is what was compiled for */
    int32_t compiled;        /* 1: a cubin was made, or found in the cache */
    double step_ms;          /* of the one step: device time on a GPU, wall clock else */
    uint64_t seed;           /* for repeating it */
} perk_test_run_report;

/* Valid until the test is freed; zeroed before the run. */
PERK_API const perk_test_run_report *perk_test_report(const perk_test *test);

/* ---- after the run ---- */

/* Rows that perk_test_read gives: of an activation those of the step (tokens, or rows of logits), of an input all
 * positions, of a weight its own. 0 for NULL. */
PERK_API size_t perk_test_rows(const perk_test *test, const perk_tensor *tensor);
/* The values of a kept activation after the step; of an input or a weight, what went in, drawn or set. `count` must be
 * rows times width. */
PERK_API perk_status perk_test_read(perk_test *test, const perk_tensor *tensor, float *values, size_t count,
                                    perk_error *err);

/* How far values are from those wanted.
 *
 * The unit is bf16 rounding: the distance between neighbouring bf16 numbers, 2^-7 of the power of two below a number.
 * Each element is measured with the unit of its wanted value, or of its row's root mean square where that is larger:
 * an element far below its row comes from terms that cancel, and is as exact as the terms are, not as it is small. So
 * a result that is rounded once differs from the exact one by at most 0.5, and two such results of nearly equal sums
 * by at most 1. int32 tensors have the unit 1. NaN, and infinity where the same infinity is not wanted, are infinitely
 * far. */
typedef struct perk_test_difference {
    double worst;           /* units, of the worst element */
    double relative;        /* relative L2 error over all elements */
    size_t row, col;        /* of the worst element (the first of equals) */
    double got, wanted;     /* there */
    size_t count, unusable; /* elements compared; infinitely far among them */
} perk_test_difference;

/* Compares a kept activation with `wanted` [rows][width], or with the reference executor's values (NULL, count 0),
 * which is made and run on the first such call. */
PERK_API perk_status perk_test_compare(perk_test *test, const perk_tensor *tensor, const float *wanted, size_t count,
                                       perk_test_difference *out, perk_error *err);
/* The same for plain arrays of floats. Thread-safe. */
PERK_API void perk_test_measure(const float *got, const float *wanted, size_t rows, size_t cols,
                                perk_test_difference *out);

#ifdef __cplusplus
}
#endif
#endif
