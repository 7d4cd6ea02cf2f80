/* The reference executor: the graph in plain C on the CPU, the definition of what is right. */
#ifndef PERK_SRC_REFERENCE_H
#define PERK_SRC_REFERENCE_H

#include "checkpoint.h"
#include "executor.h"

typedef enum perk_reference_precision {
    PERK_PRECISION_AUTO = 0, /* fp32 activations for fp32 checkpoints, bf16 otherwise */
    PERK_PRECISION_BF16 = 1, /* weights and activations are rounded to bf16 where the GPU rounds */
    PERK_PRECISION_FP32 = 2, /* nothing is rounded */
} perk_reference_precision;

typedef struct perk_reference_options {
    int threads; /* 0: all cores */
    perk_reference_precision precision;
} perk_reference_options;

/* `graph` and `checkpoint` are borrowed and must outlive the executor. `options` may be NULL. */
perk_status perk_reference_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                                  const perk_config *config, const perk_reference_options *options, perk_error *err);

#endif
