/* The GPU executor: plan, check, emit, compile or cache, load, launch. */
#ifndef PERK_SRC_GPU_H
#define PERK_SRC_GPU_H

#include "checkpoint.h"
#include "executor.h"
#include "perk/engine.h"

typedef struct perk_gpu_options {
    int device;
    bool portable, unchecked, no_cache;
    const char *cache_folder;
    int threads; /* of the weight loader; 0: all cores */
    perk_log log;
    perk_progress progress;
} perk_gpu_options;

/* `graph` and `checkpoint` are borrowed; the checkpoint is needed during the call only. Fills the phases of `report`
 * that belong to it. */
perk_status perk_gpu_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                            const perk_config *config, const perk_gpu_options *options, perk_start_report *report,
                            perk_error *err);

#endif
