/* What a profiled program would have left in args->stamps, and in args->counters. */
#ifndef FAKE_STAMPS_H
#define FAKE_STAMPS_H

#include <stddef.h>

#include "kernels_src/abi.h"

/* args->tasks has `per_worker` records for each worker, the last of each list a PERK_TASK_END. */
void fake_stamps_fill(const perk_kernel_args *args, unsigned workers, size_t per_worker);

#endif
