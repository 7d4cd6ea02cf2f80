/* Measured steps as trace events, which ui.perfetto.dev and chrome://tracing open. */
#ifndef PERK_SRC_PLAN_TRACE_H
#define PERK_SRC_PLAN_TRACE_H

#include "plan_times.h"

typedef struct perk_trace_step {
    const char *name;            /* "decode" */
    const perk_task_time *tasks; /* [plan->task_count] */
} perk_trace_step;

/* Appends a JSON object in the trace event format: one process with a thread for each worker, on which a task is an
 * event for its wait, if it waited, and one for its run; and a thread of the steps, which follow each other with a gap
 * in between. Times are microseconds since the first step began. */
perk_status perk_plan_trace(const perk_plan *plan, const perk_trace_step *steps, int step_count, perk_buffer *out,
                            perk_error *err);

#endif
