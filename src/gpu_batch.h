/* The step's batch as the kernel reads it: tokens, pages, and attention cut into pieces of nearly equal length. */
#ifndef PERK_SRC_GPU_BATCH_H
#define PERK_SRC_GPU_BATCH_H

#include "batch.h"
#include "jit/emit.h"

/* Writes `batch` into `words` [layout->words]. The batch fits the plan's configuration. */
void perk_gpu_batch_write(const perk_plan *plan, const perk_batch_layout *layout, const perk_batch *batch,
                          int32_t *words);

#endif
