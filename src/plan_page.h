/* The page that draws a graph, its plan, and when its tasks ran: one HTML file that needs nothing else. */
#ifndef PERK_SRC_PLAN_PAGE_H
#define PERK_SRC_PLAN_PAGE_H

#include "plan_model.h"

/* A step to draw, as expected and, if it was measured, as measured. */
typedef struct perk_page_step {
    const char *name; /* "decode" */
    perk_plan_load load;
    const perk_task_time *measured; /* [plan->task_count], or NULL */
} perk_page_step;

/* Appends the page; it opens with the first step. Title and names may be anything that is UTF-8. */
perk_status perk_plan_page(const perk_plan *plan, const char *title, const perk_page_step *steps, int step_count,
                           perk_buffer *out, perk_error *err);

#endif
