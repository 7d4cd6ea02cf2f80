/* Many steps a launch, on a GPU executor that was made with `many_steps`: requests go into the mailbox at any time, the
 * kernel admits, batches, picks and ends by itself, tokens come back through a ring (kernels_src/mail.h,
 * many_steps.cuh).
 *
 * Threads: perk_gpu_many_run blocks for the length of a launch, in a thread of its own if the others are to be called
 * meanwhile. All others belong to one thread, and never touch the driver. A program of many steps also runs single
 * steps over the caller's batches (the executor's `step`), between launches; the two must not share pages. */
#ifndef PERK_SRC_GPU_MANY_H
#define PERK_SRC_GPU_MANY_H

#include "gpu.h"
#include "kernels_src/mail.h"

typedef struct perk_gpu_arrival {
    const int32_t *prompt;
    int32_t prompt_length;
    int32_t limit; /* the length, prompt and answer, at which it ends: above prompt_length, at most max_seq_length */
    const int32_t *stop_ids;
    int32_t stop_count;
    const perk_sampling *sampling; /* NULL: greedy. Of it counts how tokens are picked; the end is said above */
    bool share_prefix;             /* its pages, with others that begin alike */
} perk_gpu_arrival;

/* Posts a request; all of it is copied. `*slot` names it in the records of its tokens until that of its end. PERK_LIMIT
 * when all slots are taken: read records first. */
perk_status perk_gpu_many_submit(perk_executor *executor, const perk_gpu_arrival *arrival, int32_t *slot,
                                 perk_error *err);
/* Asks for the end of a request; its last record says how it ended. Nothing when it has. */
void perk_gpu_many_cancel(perk_executor *executor, int32_t slot);
/* Copies up to `room` records, in the order of their making; returns how many. `details` [room], may be NULL: of those
 * that have some, for perk_sampler_logprobs. */
size_t perk_gpu_many_read(perk_executor *executor, perk_token_record *records, perk_draw_record *details, size_t room);
/* PERK_COMMAND_*: of the launch that runs, and of all that follow until it is taken back with PERK_COMMAND_NONE. STOP
 * ends a launch after the step that runs, DRAIN as soon as nothing is unfinished. */
void perk_gpu_many_command(perk_executor *executor, uint32_t command);

typedef struct perk_gpu_many_result {
    uint32_t end;        /* PERK_LAUNCH_*, but LARGER and SMALLER */
    uint32_t steps;      /* of this launch */
    uint32_t unfinished; /* requests that the kernel knows */
    uint32_t undealt;    /* mails that it has not dealt with yet */
} perk_gpu_many_result;

/* One launch, until it ends by itself: of one program after another, as steps grow and shrink. Another one goes on
 * where it ended. */
perk_status perk_gpu_many_run(perk_executor *executor, const perk_launch_options *options, perk_gpu_many_result *result,
                              perk_error *err);

/* The executor's `online`: the schedule is the caller's, and goes to the device and back. Its limits are those of
 * perk_plan_schedule_limits. An executor is used so, or through what stands above, not both. */
extern const perk_online_type perk_gpu_online;

/* For tests, between launches: the kernel's state of requests and pages, copied into `block` (the words of
 * perk_schedule_lay_out over perk_plan_schedule_limits). */
perk_status perk_gpu_many_schedule(perk_executor *executor, uint64_t *block, perk_error *err);

#endif
