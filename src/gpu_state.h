/* The GPU executor's state, shared by its files: context and step (gpu.c), its
 * programs (gpu_programs.c), memory and weights (gpu_load.c). */
#ifndef PERK_SRC_GPU_STATE_H
#define PERK_SRC_GPU_STATE_H

#include "gpu.h"

#include "device.h"
#include "driver.h"
#include "gpu_batch.h"
#include "program.h"

/* One allocation of device memory. */
typedef struct perk_gpu_memory {
    CUdeviceptr address;
    uint64_t bytes;
} perk_gpu_memory;

/* What a program has of its own. Weights, constants and KV pages belong to the executor: all its programs find them in
 * the same place (src/plan_shared.h). Activations are not shared, although one step runs at a time: what lies between a
 * row's width and its stride must stay 0, and where that is differs. */
typedef struct perk_gpu_program {
    perk_plan *plan;
    perk_program program;
    perk_batch_layout layout;
    CUmodule module;
    CUfunction kernel;

    perk_gpu_memory activations, tasks, batch, counters;
    perk_gpu_memory stamps; /* of a profiled program: [workers][tasks_per_worker][PERK_STAMPS] */
    int tasks_per_worker;
    int32_t *batch_host;              /* pinned */
    int argmax_tensor, logits_tensor; /* in the plan; -1: the graph has none */
    uint32_t steps;                   /* completed by this program: what its counters stand at */
    uint64_t launches;
} perk_gpu_program;

typedef struct perk_gpu {
    perk_executor executor; /* first: the executor's table leads here */
    perk_driver *driver;
    perk_device_info info;
    CUcontext context;
    bool context_retained;
    CUstream stream;

    perk_config config;
    perk_gpu_program programs[PERK_MAX_PROGRAMS]; /* by rising tokens */
    int program_count;
    perk_gpu_program *largest; /* the last: that of `config` */
    bool only_largest;         /* steps keep to it */

    perk_gpu_memory spaces[PERK_SPACE_COUNT]; /* but activations, which are a program's own */
    /* One launch runs at a time, and nothing follows a hang: one report does for all programs. */
    perk_gpu_memory hang_claim;
    perk_hang_report *hang;     /* pinned and mapped */
    int32_t *argmax_host;       /* pinned, [logit rows][row stride] of whichever program has most */
    float *logits_host;         /* the same, made on first use */
    struct perk_gpu_many *many; /* of programs of many steps */
    CUevent begin, end;         /* around a launch; NULL without timing */
    int32_t wait_limit_ms;
    bool failed; /* a launch failed: the context is gone */
    perk_error failure;
} perk_gpu;

/* Makes the executor's context current on this thread until perk_gpu_leave, which gives the caller's back. After a
 * failed perk_gpu_enter there is nothing to leave. */
perk_status perk_gpu_enter(const perk_gpu *gpu, perk_error *err);
void perk_gpu_leave(const perk_gpu *gpu);

/* Page-locked host memory that the device can reach, not cleared; freed with cuMemFreeHost. */
perk_status perk_gpu_pin(const perk_gpu *gpu, void **out, size_t bytes, unsigned flags, const char *what,
                         perk_error *err);

/* Copies from pageable memory and waits. In the order of the executor's stream, which cuMemcpyHtoD would not keep: that
 * may return before the bytes are there. The message says "copying <what> to the device". */
perk_status perk_gpu_upload(const perk_gpu *gpu, CUdeviceptr to, const void *from, size_t bytes, const char *what,
                            perk_error *err);

/* Whether the driver has said of an image that it cannot be used here. Of one from the cache that is no failure yet: it
 * is logged as a warning, and the program is to be made anew. */
bool perk_gpu_refuses(const perk_program *program, CUresult result, const perk_log *log);

/* Keeps what went wrong in a step of a program, or the hang that was reported: the executor is of no use any more. */
perk_status perk_gpu_fail_step(perk_gpu *gpu, const perk_gpu_program *program, perk_status status, perk_error *err);
/* Launches a program. `many`: what a program of many steps does, NULL: one step over the batch that was copied. */
perk_status perk_gpu_launch(perk_gpu *gpu, perk_gpu_program *program, const perk_many_args *many, perk_error *err);

/* Memory for many steps a launch, and its end (gpu_many.c). With the context current. */
perk_status perk_gpu_many_open(perk_gpu *gpu, perk_error *err);
void perk_gpu_many_close(perk_gpu *gpu);
/* The arguments of a program for one step over a batch that the host has made. */
perk_many_args perk_gpu_one_step(const perk_gpu *gpu, const perk_gpu_program *program);
/* The program whose launch of many steps is under way, or was the last; and the steps that it has done in it. */
int perk_gpu_many_running(const perk_gpu *gpu, uint32_t *steps);

/* Plans, checks, emits and compiles the programs, side by side, largest included, and fills their part of the report.
 * Sees to it that they can share what they share. */
perk_status perk_gpu_make_programs(perk_gpu *gpu, const perk_graph *graph, const perk_gpu_options *options,
                                   perk_cache *cache, perk_start_report *report, perk_error *err);
/* Loads their modules. With the context current. */
perk_status perk_gpu_load_programs(perk_gpu *gpu, const perk_gpu_options *options, perk_cache *cache,
                                   perk_start_report *report, perk_error *err);
/* Gives back the host memory of one. */
void perk_gpu_program_free(perk_gpu_program *program);

/* The activation in the plan that holds a tensor of the graph; -1: none does. */
int perk_gpu_tensor(const perk_plan *plan, const perk_tensor *tensor);
/* Where a tensor of the program lies on the device. */
CUdeviceptr perk_gpu_address(const perk_gpu *gpu, const perk_gpu_program *program, const perk_plan_tensor *tensor);

/* Reserves all device memory of all programs. PERK_DEVICE_MEMORY says how much was needed for what, and how much is
 * free.
 */
perk_status perk_gpu_allocate(perk_gpu *gpu, perk_error *err);

/* Copies and packs the weights, and fills the rope tables. */
perk_status perk_gpu_load_weights(perk_gpu *gpu, const perk_checkpoint *checkpoint, const perk_gpu_options *options,
                                  perk_cache *cache, perk_error *err);

#endif
