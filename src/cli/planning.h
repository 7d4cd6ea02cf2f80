/* From a model to a plan, without weights and without a GPU: what perk compile and perk plan share. */
#ifndef PERK_SRC_CLI_PLANNING_H
#define PERK_SRC_CLI_PLANNING_H

#include "cli.h"

#include "src/model.h"
#include "src/plan.h"

typedef struct perk_cli_planning {
    const char *path, *arch; /* of the model; of the device */
    int32_t workers;         /* 0: of the architecture's usual device */
    uint64_t shared_memory;  /* bytes a block; 0: the same */
    int portable, json;
    perk_config config;

    perk_model *model; /* without weights */
    perk_plan *plan;
    double graph_ms, plan_ms;
} perk_cli_planning;

void perk_cli_add_planning(perk_cli_options *options, perk_cli_planning *planning);
/* Makes graph and plan of what the options say; perk_cli_planning_free frees them, also after a failure. */
perk_status perk_cli_make_plan(perk_cli_planning *planning, perk_error *err);
void perk_cli_planning_free(perk_cli_planning *planning);

#endif
