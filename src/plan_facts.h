/* Facts about a plan that all who print or draw it share. */
#ifndef PERK_SRC_PLAN_FACTS_H
#define PERK_SRC_PLAN_FACTS_H

#include "plan.h"

typedef struct perk_plan_facts {
    int tasks_min, tasks_median, tasks_max; /* of a worker */
    uint64_t stream_min, stream_max;        /* bytes of a worker */
    uint64_t stream_total;                  /* weights a step */
    double imbalance_percent;               /* how far the busiest worker's stream exceeds the mean */
    uint64_t space_bytes[PERK_SPACE_COUNT]; /* the KV cache with all layers and pages */
    const perk_task **sample;               /* [stages] one task; those of a stage wait for the same counters */
    uint64_t *stage_stream;                 /* [stages] bytes */
    int *stage_of_counter;                  /* [counters] -1: none */
    bool *op_has_stage;                     /* [graph ops] else it is folded into another's */
    int *critical, critical_count;          /* the longest chain of stages that wait for each other, in order */
} perk_plan_facts;

perk_status perk_plan_facts_gather(const perk_plan *plan, perk_plan_facts *facts, perk_error *err);
void perk_plan_facts_free(perk_plan_facts *facts);

/* The parts of shared memory that barriers, and slices of wide linears' inputs, take. */
int perk_plan_barrier_bytes(const perk_plan *plan);
int perk_plan_input_bytes(const perk_plan *plan);

/* True when the stage does work of `op`: its own, or work that was folded into it. */
bool perk_plan_stage_does(const perk_plan *plan, const perk_plan_facts *facts, int stage, const perk_op *op);

/* "layers.12.qkv" is "layers", 12, ".qkv". A name without a number among its parts is all suffix, and layer is -1. */
typedef struct perk_layer_name {
    int prefix_length;
    long layer;
    const char *suffix;
} perk_layer_name;
perk_layer_name perk_layer_name_split(const char *name);

#endif
