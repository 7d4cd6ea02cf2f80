/* Printing a graph and its plan, for people and for scripts. */
#ifndef PERK_SRC_PLAN_PRINT_H
#define PERK_SRC_PLAN_PRINT_H

#include "plan.h"

typedef enum perk_plan_format {
    PERK_PLAN_TEXT,           /* layers that repeat are shown once */
    PERK_PLAN_JSON,           /* one object in one line: everything but the tasks */
    PERK_PLAN_JSON_AND_TASKS, /* with an entry a task, in the order of the workers' lists */
} perk_plan_format;

/* Appends the graph's ops, the plan's stages, memory and kinds, the work of the workers and the critical path. Sizes
 * are bytes; GB and MB are powers of ten. tests/test_plan_print.c holds the form of the JSON. */
perk_status perk_plan_print(const perk_plan *plan, perk_plan_format format, perk_buffer *out, perk_error *err);

#endif
