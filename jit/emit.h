/* Emission: the CUDA source and the tables made from a plan. */
#ifndef PERK_JIT_EMIT_H
#define PERK_JIT_EMIT_H

#include <stdint.h>

#include "jit/compile.h"
#include "kernels_src/abi.h"
#include "src/plan.h"

#define PERK_KERNEL_NAME "perk_main"

/* The program's source: the plan's numbers as constants, one switch over its kinds of tasks, the kernel's entry. */
perk_status perk_emit_source(const perk_plan *plan, perk_buffer *source, perk_error *err);

/* The device code that programs include, as in-memory headers with #line, so that errors point at kernels_src/.
 * `*headers` [*count] is freed with perk_emit_headers_free. */
perk_status perk_emit_headers(perk_compile_header **headers, size_t *count, perk_error *err);
void perk_emit_headers_free(perk_compile_header *headers, size_t count);

/* The records of all workers: [worker_count][*per_worker], every list closed by PERK_TASK_END. Freed with free(). */
perk_status perk_emit_records(const perk_plan *plan, perk_task_record **records, int *per_worker, perk_error *err);

#endif
