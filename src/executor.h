/* An executor runs steps of one graph over one set of weights: the reference executor on the CPU, or the program on a
 * GPU. The engine and the tests speak to both through this table. */
#ifndef PERK_SRC_EXECUTOR_H
#define PERK_SRC_EXECUTOR_H

#include "batch.h"
#include "graph.h"
#include "kernels_src/schedule.h"

typedef struct perk_executor perk_executor;

/* What a step gives back; valid until the next step. */
typedef struct perk_step_result {
    const int32_t *argmax; /* [logit rows]; NULL when the graph has no argmax */
    const float *logits;   /* [logit rows][vocab]; NULL unless asked for */
} perk_step_result;

typedef struct perk_executor_type {
    const char *name; /* "reference", "gpu" */
    /* Runs one step and waits for it. `want_logits`: bring the logits to the host as well. */
    perk_status (*step)(perk_executor *self, const perk_batch *batch, bool want_logits, perk_step_result *result,
                        perk_error *err);
    /* Sets an input, or reads a kept activation, of the last step: fp32 on the host side, [rows][tensor->cols]. */
    perk_status (*write)(perk_executor *self, const perk_tensor *input, const float *values, int64_t rows,
                         perk_error *err);
    perk_status (*read)(perk_executor *self, const perk_tensor *tensor, float *values, int64_t rows, perk_error *err);
    void (*free)(perk_executor *self);
    /* Runs up to `max_steps` steps without the host: fill, the forward pass, commit, with the tokens that argmax picks,
     * until nothing is unfinished. `schedule` stands between two steps, before and after. NULL: it cannot. */
    perk_status (*run)(perk_executor *self, perk_schedule *schedule, uint32_t max_steps, perk_error *err);
} perk_executor_type;

struct perk_executor {
    const perk_executor_type *type;
};

/* Rows of an activation in a step over `batch`. */
static inline int64_t perk_executor_rows(const perk_tensor *tensor, const perk_batch *batch) {
    return perk_tensor_rows(tensor, batch->num_tokens, batch->num_logit_rows);
}

#endif
