/* Every op as a test: shapes, layer calls, and how far a right result may lie from the reference. For perk test-op, the
 * self-test and the GPU tests. */
#ifndef PERK_SRC_TEST_OPS_H
#define PERK_SRC_TEST_OPS_H

#include "base.h"
#include "perk/test.h"

enum { PERK_OP_CASE_REQUESTS_MAX = 8 };

/* Fields that an op does not have are 0. */
typedef struct perk_op_case {
    const char *op;     /* as in perk_op_case_names */
    int32_t rows, live; /* that the program is built for; that the step has (0: all) */
    int32_t in, out;    /* widths; of the vocabulary, too */
    int32_t heads, kv_heads, head_dim, context, window;
    int32_t experts, top_k;
    int32_t requests; /* share the rows; request i has about context * (i + 1) / requests positions before; 0: 1 */
    bool bias, residual, norms;
    bool quick; /* part of the self-test */
} perk_op_case;

/* What test-op calls the ops: each layer call alone, and some that are folded into each other; ends with NULL. */
extern const char *const perk_op_case_names[];

/* The grid: every op over rows, odd widths and the widths of models. */
const perk_op_case *perk_op_grid(size_t *count);
/* Cases of ops that have no device code yet: not in the grid and not among the names, they run in the reference
 * executor alone, and the GPU is refused. */
const perk_op_case *perk_op_reference_grid(size_t *count);
/* The first of either grid for this op; NULL: there is no such op. */
const perk_op_case *perk_op_case_of(const char *op);

/* "8 x 4096 -> 1024 bias"; returns `text`. */
const char *perk_op_case_shape(const perk_op_case *c, char *text, size_t size);

typedef struct perk_op_verdict {
    bool passed;
    bool compared;           /* false: the reference ran, which is compared with nothing */
    char tensor[96];         /* of the outputs the one nearest to, or furthest beyond, its limits */
    perk_test_difference by; /* its difference from the reference */
    double limit, relative_limit;
    char problem[256]; /* what is wrong where that is no difference; "" */
    perk_test_run_report report;
} perk_op_verdict;

/* Runs one case; of `options`, everything but rows, requests and positions applies. Fails where the case cannot run; a
 * mismatch is a verdict. */
perk_status perk_op_case_run(const perk_op_case *c, const perk_test_options *options, perk_op_verdict *out,
                             perk_error *err);

/* The test of a case before its run: graph built, nothing set. The outputs that are compared, up to `*count`. */
perk_status perk_op_case_open(perk_test **out, const perk_op_case *c, const perk_test_options *options,
                              perk_tensor **outputs, size_t *count, perk_error *err);

#endif
