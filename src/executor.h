/* An executor runs steps of one graph over one set of weights: the reference executor on the CPU, or the program on a
 * GPU. The engine and the tests speak to both through this table. */
#ifndef PERK_SRC_EXECUTOR_H
#define PERK_SRC_EXECUTOR_H

#include "batch.h"
#include "graph.h"
#include "kernels_src/mail.h"

typedef struct perk_executor perk_executor;

/* What a step gives back; valid until the next step. */
typedef struct perk_step_result {
    const int32_t *argmax; /* [logit rows]; NULL when the graph has no argmax */
    const float *logits;   /* [logit rows][vocab]; NULL unless asked for */
} perk_step_result;

typedef struct perk_launch_options {
    uint32_t max_steps;     /* 0: as many as one launch can count */
    uint32_t idle_limit_ms; /* the launch ends when nothing was unfinished for so long; 0: at once */
} perk_launch_options;

/* Steps that follow each other without the host: fill, the forward pass, commit, with the tokens that requests want.
 * The schedule is with the executor from the first launch until it is taken back, through any number of launches;
 * requests go there by mail, and tokens come back as records. One thread calls. */
typedef struct perk_online_type {
    /* Begins a launch, and does not wait. `schedule`: goes to the executor; NULL: it has it. Where the steps that come
     * are better run by another program, poll lets one launch follow the other: to whoever calls, it is one. */
    perk_status (*launch)(perk_executor *self, const perk_schedule *schedule, const perk_launch_options *options,
                          perk_error *err);
    /* Whether the launch has ended. If it has, all its records can be read. */
    perk_status (*poll)(perk_executor *self, bool *ended, perk_error *err);
    /* Asks for the end of the launch after the step that runs. */
    void (*stop)(perk_executor *self);
    /* A request that was written into an open slot of `schedule` arrives there instead; its slot is read meanwhile. */
    void (*arrive)(perk_executor *self, const perk_schedule *schedule, int32_t slot);
    void (*cancel)(perk_executor *self, int32_t slot);
    /* Copies up to `room` records, in the order of their making; returns how many. `details` [room], may be NULL: of
     * those that have some. The slot of a request may be closed
     * and opened again when the record of its end was read. */
    size_t (*read)(perk_executor *self, perk_token_record *records, perk_draw_record *details, size_t room);
    /* How requests and pages stand: of some step, no older than the last record that was read. */
    perk_standing (*stand)(const perk_executor *self);
    /* After the end of the launch, with all records read: everything is the host's again. Slots that are open or free
     * in `schedule` stay so; mail that was not dealt with is now. */
    perk_status (*take_back)(perk_executor *self, perk_schedule *schedule, perk_error *err);
} perk_online_type;

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
    const perk_online_type *online; /* NULL: it runs single steps alone */
} perk_executor_type;

struct perk_executor {
    const perk_executor_type *type;
};

/* Rows of an activation in a step over `batch`. */
static inline int64_t perk_executor_rows(const perk_tensor *tensor, const perk_batch *batch) {
    return perk_tensor_rows(tensor, batch->num_tokens, batch->num_logit_rows);
}

#endif
