/* Measurements on the device, for perk bench. */
#include "gpu_state.h"

enum { CEILING_CHUNK = 32768, CEILING_SLOTS = 6, CEILING_THREADS = 1024 }; /* as kernels_src/ceiling.cuh */

static perk_gpu *gpu_of(perk_executor *executor) { return (perk_gpu *)executor; }

const perk_plan *perk_gpu_plan(const perk_executor *executor) { return ((const perk_gpu *)executor)->largest->plan; }

perk_status perk_gpu_step_ms(perk_executor *executor, double *milliseconds, perk_error *err) {
    perk_gpu *gpu = gpu_of(executor);
    float elapsed = 0;
    *milliseconds = 0;
    if (!gpu->begin) return PERK_OK;
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    status = perk_driver_check(gpu->driver, gpu->driver->cuEventElapsedTime(&elapsed, gpu->begin, gpu->end), err,
                               "reading a time");
    perk_gpu_leave(gpu);
    *milliseconds = (double)elapsed;
    return status;
}

/* A kernel of perk's own that measures, apart from the executor's program. */
typedef struct probe {
    const char *file, *kernel; /* in kernels_src/ */
    unsigned shared_bytes;     /* of dynamic shared memory */
    bool portable;
    CUmodule module;
    CUfunction function;
} probe;

static perk_status load_probe(perk_gpu *gpu, probe *p, const perk_program *program, perk_error *err) {
    const perk_driver *driver = gpu->driver;
    CUresult result = driver->cuModuleLoadData(&p->module, program->cubin);
    if (result == CUDA_SUCCESS) result = driver->cuModuleGetFunction(&p->function, p->module, p->kernel);
    if (result == CUDA_SUCCESS && p->shared_bytes)
        result = driver->cuFuncSetAttribute(p->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                            (int)p->shared_bytes);
    return perk_driver_check(driver, result, err, "loading %s", p->kernel);
}

static perk_status build_probe(perk_gpu *gpu, probe *p, perk_error *err) {
    perk_program program = {0};
    perk_compile_header *headers = NULL;
    size_t header_count = 0;
    char *text = perk_format("#define PERK_PORTABLE %d\n#define PERK_PROFILE 0\n#include \"abi.h\"\n"
                             "#include \"ptx.cuh\"\n#include \"%s.cuh\"\n",
                             p->portable, p->file);
    char *name = perk_format("%s.cu", p->file);
    perk_status status = text && name ? PERK_OK : perk_fail_memory(err, "a measuring program");
    if (status == PERK_OK) status = perk_emit_headers(&headers, &header_count, err);
    if (status == PERK_OK) {
        const perk_program_source source = {.name = name,
                                            .text = text,
                                            .headers = headers,
                                            .header_count = header_count,
                                            .arch = gpu->largest->plan->device.arch,
                                            .kernel = p->kernel};
        const perk_program_options options = {.driver_version = gpu->driver->version};
        status = perk_program_build_source(&source, &options, &program, err);
    }
    if (status == PERK_OK) status = load_probe(gpu, p, &program, err);
    perk_program_free(&program);
    perk_emit_headers_free(headers, header_count);
    free(name);
    free(text);
    return status;
}

static void unload_probe(perk_gpu *gpu, const probe *p) {
    if (p->module) gpu->driver->cuModuleUnload(p->module);
}

/* ---- the read ceiling ---- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static perk_status time_reads(perk_gpu *gpu, const probe *p, int runs, double *milliseconds, uint64_t chunks,
                              perk_error *err) {
    const perk_driver *driver = gpu->driver;
    CUdeviceptr source = gpu->spaces[PERK_SPACE_WEIGHTS].address, sink = gpu->hang_claim.address;
    void *params[] = {&source, &chunks, &sink};
    CUevent begin = NULL, end = NULL;
    CUresult result = driver->cuEventCreate(&begin, CU_EVENT_DEFAULT);
    if (result == CUDA_SUCCESS) result = driver->cuEventCreate(&end, CU_EVENT_DEFAULT);
    for (int run = -2; run < runs && result == CUDA_SUCCESS; run++) { /* two to warm up */
        float elapsed = 0;
        result = driver->cuEventRecord(begin, gpu->stream);
        if (result == CUDA_SUCCESS)
            result = driver->cuLaunchKernel(p->function, (unsigned)gpu->info.sm_count, 1, 1, CEILING_THREADS, 1, 1,
                                            p->shared_bytes, gpu->stream, params, NULL);
        if (result == CUDA_SUCCESS) result = driver->cuEventRecord(end, gpu->stream);
        if (result == CUDA_SUCCESS) result = driver->cuStreamSynchronize(gpu->stream);
        if (result == CUDA_SUCCESS) result = driver->cuEventElapsedTime(&elapsed, begin, end);
        if (run >= 0) milliseconds[run] = (double)elapsed;
    }
    if (begin) driver->cuEventDestroy(begin);
    if (end) driver->cuEventDestroy(end);
    return perk_driver_check(driver, result, err, "measuring the read ceiling");
}

perk_status perk_gpu_read_ceiling(perk_executor *executor, int runs, double *bytes_per_second, perk_error *err) {
    perk_gpu *gpu = gpu_of(executor);
    bool portable = gpu->largest->plan->device.capability < 90;
    probe p = {.file = "ceiling",
               .kernel = "perk_read_ceiling",
               .shared_bytes = portable ? 0 : CEILING_CHUNK * CEILING_SLOTS,
               .portable = portable};
    uint64_t chunks = gpu->spaces[PERK_SPACE_WEIGHTS].bytes / CEILING_CHUNK;
    *bytes_per_second = 0;
    if (runs < 1) return perk_fail(err, PERK_INVALID_ARGUMENT, "%d runs: give at least 1", runs);
    double *milliseconds = perk_calloc((size_t)runs, sizeof *milliseconds);
    if (!milliseconds) return perk_fail_memory(err, "times");
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) {
        free(milliseconds);
        return status;
    }
    status = build_probe(gpu, &p, err);
    if (status == PERK_OK) status = time_reads(gpu, &p, runs, milliseconds, chunks, err);
    if (status == PERK_OK) {
        qsort(milliseconds, (size_t)runs, sizeof *milliseconds, by_value);
        *bytes_per_second = (double)(chunks * CEILING_CHUNK) / (milliseconds[runs / 2] * 1e-3);
    }
    unload_probe(gpu, &p);
    perk_gpu_leave(gpu);
    free(milliseconds);
    return status;
}

/* ---- a sync over all workers ---- */

/* Of a worker's list: the first sync lines the workers up, the end of the list is a record, too. */
enum { SYNC_TASKS = PERK_GPU_SYNCS + 2, SYNC_RECORDS = SYNC_TASKS + 1, SYNC_WARM_UP = 3 };

typedef struct sync_probe {
    perk_gpu *gpu;
    probe program;
    uint32_t workers;
    size_t records; /* of all workers */
    CUdeviceptr tasks, counters, stamps, hang_claim;
    perk_hang_report *hang;               /* pinned and mapped */
    uint64_t (*read_stamps)[PERK_STAMPS]; /* [records] */
} sync_probe;

/* Task i waits for all workers' task i - 1, on a counter of its own, as the stages of a plan do. */
static perk_status upload_sync_tasks(sync_probe *s, perk_error *err) {
    perk_task_record *list = perk_calloc(s->records, sizeof *list);
    if (!list) return perk_fail_memory(err, "the tasks of a sync");
    for (size_t i = 0; i < s->records; i++) {
        uint32_t position = (uint32_t)(i % SYNC_RECORDS);
        list[i] = (perk_task_record){.task = position, .first = position, .signal_counter = (uint16_t)position};
        list[i].kind = position == SYNC_TASKS ? PERK_TASK_END : 0;
        list[i].scalar = position == 1 || position == SYNC_TASKS - 1; /* is stamped */
        if (position == 0 || position == SYNC_TASKS) continue;
        list[i].wait_counter[0] = position - 1;
        list[i].wait_per_step[0] = list[i].wait_needed[0] = s->workers;
    }
    perk_status status = perk_gpu_upload(s->gpu, s->tasks, list, s->records * sizeof *list, "the tasks of a sync", err);
    free(list);
    return status;
}

static perk_status open_sync(sync_probe *s, perk_error *err) {
    const perk_driver *driver = s->gpu->driver;
    size_t stamp_bytes = s->records * sizeof *s->read_stamps, counter_bytes = SYNC_TASKS * sizeof(uint32_t);
    s->read_stamps = perk_calloc(s->records, sizeof *s->read_stamps);
    if (!s->read_stamps) return perk_fail_memory(err, "time stamps");
    CUresult result = driver->cuMemAlloc(&s->tasks, s->records * sizeof(perk_task_record));
    if (result == CUDA_SUCCESS) result = driver->cuMemAlloc(&s->stamps, stamp_bytes);
    if (result == CUDA_SUCCESS) result = driver->cuMemAlloc(&s->counters, counter_bytes);
    if (result == CUDA_SUCCESS) result = driver->cuMemAlloc(&s->hang_claim, sizeof(uint32_t));
    if (result == CUDA_SUCCESS) result = driver->cuMemsetD8Async(s->stamps, 0, stamp_bytes, s->gpu->stream);
    if (result == CUDA_SUCCESS) result = driver->cuMemsetD8Async(s->counters, 0, counter_bytes, s->gpu->stream);
    if (result == CUDA_SUCCESS) result = driver->cuMemsetD8Async(s->hang_claim, 0, sizeof(uint32_t), s->gpu->stream);
    perk_status status = perk_driver_check(driver, result, err, "reserving memory to measure syncs");
    if (status == PERK_OK)
        status =
            perk_gpu_pin(s->gpu, (void **)&s->hang, sizeof *s->hang, CU_MEMHOSTALLOC_DEVICEMAP, "a hang report", err);
    if (status != PERK_OK) return status;
    memset(s->hang, 0, sizeof *s->hang);
    status = upload_sync_tasks(s, err);
    return status == PERK_OK ? build_probe(s->gpu, &s->program, err) : status;
}

static void close_sync(sync_probe *s) {
    const perk_driver *driver = s->gpu->driver;
    const CUdeviceptr memory[] = {s->tasks, s->stamps, s->counters, s->hang_claim};
    driver->cuStreamSynchronize(s->gpu->stream);
    for (size_t i = 0; i < PERK_COUNT(memory); i++)
        if (memory[i]) driver->cuMemFree(memory[i]);
    if (s->hang) driver->cuMemFreeHost(s->hang);
    unload_probe(s->gpu, &s->program);
    free(s->read_stamps);
}

static perk_status launch_sync(sync_probe *s, uint32_t step, perk_error *err) {
    const perk_driver *driver = s->gpu->driver;
    CUdeviceptr hang = 0;
    CUresult result = driver->cuMemHostGetDevicePointer(&hang, s->hang, 0);
    perk_kernel_args args = {.tasks = (const perk_task_record *)(uintptr_t)s->tasks,
                             .counters = (uint32_t *)(uintptr_t)s->counters,
                             .hang_claim = (uint32_t *)(uintptr_t)s->hang_claim,
                             .hang = (perk_hang_report *)(uintptr_t)hang,
                             .stamps = (uint64_t *)(uintptr_t)s->stamps,
                             .wait_limit_ns = (uint64_t)s->gpu->wait_limit_ms * 1000000u,
                             .step = step};
    void *params[] = {&args};
    if (result == CUDA_SUCCESS)
        result = driver->cuLaunchCooperativeKernel(s->program.function, s->workers, 1, 1, PERK_BLOCK_THREADS, 1, 1,
                                                   s->program.shared_bytes, s->gpu->stream, params);
    if (result == CUDA_SUCCESS) result = driver->cuStreamSynchronize(s->gpu->stream);
    perk_status status = perk_driver_check(driver, result, err, "measuring syncs");
    if (status != PERK_OK || !s->hang->complete) return status;
    return perk_fail(err, PERK_HANG,
                     "launch %u: worker %u waited more than %d ms for counter %u to reach %u, where it stood at %u",
                     step, s->hang->worker, s->gpu->wait_limit_ms, s->hang->counter, s->hang->wanted, s->hang->seen);
}

/* When the last worker had passed the wait of the task at `position`. */
static uint64_t last_ready(const sync_probe *s, size_t position) {
    uint64_t last = 0;
    for (size_t i = position; i < s->records; i += SYNC_RECORDS)
        last = PERK_MAX(last, s->read_stamps[i][PERK_STAMP_READY]);
    return last;
}

static perk_status time_syncs(sync_probe *s, uint32_t step, double *microseconds, perk_error *err) {
    const perk_driver *driver = s->gpu->driver;
    perk_status status = launch_sync(s, step, err);
    if (status != PERK_OK) return status;
    CUresult result = driver->cuMemcpyDtoH(s->read_stamps, s->stamps, s->records * sizeof *s->read_stamps);
    status = perk_driver_check(driver, result, err, "reading the time stamps");
    if (status != PERK_OK) return status;
    uint64_t begin = last_ready(s, 1), end = last_ready(s, SYNC_TASKS - 1);
    if (begin == 0 || end <= begin)
        return perk_fail(err, PERK_INTERNAL, "launch %u left no times: from %llu to %llu ns", step,
                         (unsigned long long)begin, (unsigned long long)end);
    *microseconds = (double)(end - begin) * 1e-3 / PERK_GPU_SYNCS;
    return PERK_OK;
}

/* Every worker has signalled every counter once a launch. */
static perk_status check_sync_counters(const sync_probe *s, uint32_t launches, perk_error *err) {
    uint32_t counters[SYNC_TASKS];
    CUresult result = s->gpu->driver->cuMemcpyDtoH(counters, s->counters, sizeof counters);
    perk_status status = perk_driver_check(s->gpu->driver, result, err, "reading the counters");
    for (size_t i = 0; i < SYNC_TASKS && status == PERK_OK; i++)
        if (counters[i] != launches * s->workers)
            status = perk_fail(err, PERK_INTERNAL, "counter %zu stands at %u after %u launches of %u workers", i,
                               counters[i], launches, s->workers);
    return status;
}

perk_status perk_gpu_sync_times(perk_executor *executor, int runs, double *microseconds, perk_error *err) {
    perk_gpu *gpu = gpu_of(executor);
    const perk_device_desc *device = &gpu->largest->plan->device;
    /* All the shared memory that a block may have: as with any program, no SM has room for two. */
    sync_probe s = {.gpu = gpu,
                    .program = {.file = "sync",
                                .kernel = "perk_sync",
                                .shared_bytes = (unsigned)device->shared_memory,
                                .portable = device->portable},
                    .workers = (uint32_t)device->worker_count,
                    .records = (size_t)device->worker_count * SYNC_RECORDS};
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    status = open_sync(&s, err);
    for (int run = -SYNC_WARM_UP; run < runs && status == PERK_OK; run++) {
        double time = 0;
        status = time_syncs(&s, (uint32_t)(run + SYNC_WARM_UP), &time, err);
        if (run >= 0) microseconds[run] = time;
    }
    if (status == PERK_OK) status = check_sync_counters(&s, (uint32_t)(runs + SYNC_WARM_UP), err);
    close_sync(&s);
    perk_gpu_leave(gpu);
    return status;
}

/* ---- the bus ---- */

static perk_status time_copies(perk_gpu *gpu, CUdeviceptr device, const void *host, size_t bytes,
                               double *bytes_per_second, perk_error *err) {
    enum { COPIES = 16 };
    const perk_driver *driver = gpu->driver;
    CUresult result = driver->cuMemcpyHtoDAsync(device, host, bytes, gpu->stream); /* warms up */
    if (result == CUDA_SUCCESS) result = driver->cuStreamSynchronize(gpu->stream);
    double begin = perk_now();
    for (int i = 0; i < COPIES && result == CUDA_SUCCESS; i++)
        result = driver->cuMemcpyHtoDAsync(device, host, bytes, gpu->stream);
    if (result == CUDA_SUCCESS) result = driver->cuStreamSynchronize(gpu->stream);
    *bytes_per_second = (double)bytes * COPIES / (perk_now() - begin);
    return perk_driver_check(driver, result, err, "measuring the bus");
}

perk_status perk_gpu_bus_speed(perk_executor *executor, double *bytes_per_second, perk_error *err) {
    enum { BUS_BYTES = 64 << 20 };
    perk_gpu *gpu = gpu_of(executor);
    const perk_driver *driver = gpu->driver;
    void *host = NULL;
    CUdeviceptr device = 0;
    *bytes_per_second = 0;
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    CUresult result = driver->cuMemHostAlloc(&host, BUS_BYTES, 0);
    if (result == CUDA_SUCCESS) result = driver->cuMemAlloc(&device, BUS_BYTES);
    status = perk_driver_check(driver, result, err, "reserving memory to measure the bus");
    if (status == PERK_OK) status = time_copies(gpu, device, host, BUS_BYTES, bytes_per_second, err);
    if (host) driver->cuMemFreeHost(host);
    if (device) driver->cuMemFree(device);
    perk_gpu_leave(gpu);
    return status;
}

/* ---- contexts longer than what is worth filling ---- */

perk_status perk_gpu_copy_pages(perk_executor *executor, int32_t from, int32_t to, int32_t count, perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)executor;
    const perk_plan *plan = gpu->largest->plan;
    uint64_t page_bytes = plan->kv_layer_bytes / (uint64_t)plan->config.max_num_pages;
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    for (int layer = 0; layer < plan->graph->kv_layer_count && status == PERK_OK; layer++) {
        CUdeviceptr base = gpu->spaces[PERK_SPACE_KV].address + plan->kv_layer_bytes * (uint64_t)layer;
        CUresult result = gpu->driver->cuMemcpyDtoD(base + page_bytes * (uint64_t)to,
                                                    base + page_bytes * (uint64_t)from, page_bytes * (uint64_t)count);
        status = perk_driver_check(gpu->driver, result, err, "copying KV pages");
    }
    perk_gpu_leave(gpu);
    return status;
}

/* ---- a profiled program's stamps ---- */

perk_status perk_gpu_task_times(perk_executor *executor, perk_task_time *times, perk_error *err) {
    perk_gpu *gpu = gpu_of(executor);
    const perk_plan *plan = gpu->largest->plan;
    if (!plan->profiled) return perk_fail(err, PERK_INVALID_ARGUMENT, "the executor was not made with profile");
    perk_task_time *stamps = perk_calloc(1, gpu->largest->stamps.bytes); /* [workers][tasks_per_worker] */
    perk_status status = stamps ? perk_gpu_enter(gpu, err) : perk_fail_memory(err, "time stamps");
    if (status == PERK_OK) {
        CUresult result = gpu->driver->cuMemcpyDtoH(stamps, gpu->largest->stamps.address, gpu->largest->stamps.bytes);
        status = perk_driver_check(gpu->driver, result, err, "reading the time stamps");
        perk_gpu_leave(gpu);
    }
    for (int w = 0; w < plan->device.worker_count && status == PERK_OK; w++) {
        int begin = plan->worker_begin[w], count = plan->worker_begin[w + 1] - begin;
        memcpy(times + begin, stamps + (size_t)w * (size_t)gpu->largest->tasks_per_worker,
               (size_t)count * sizeof *times);
    }
    free(stamps);
    return status;
}

/* ---- what a step read ---- */

/* Experts that the last step's routing hit. */
static perk_status read_hits(const perk_gpu *gpu, const perk_plan_tensor *routing, uint32_t *hits, perk_error *err) {
    CUdeviceptr from = perk_gpu_address(gpu, gpu->largest, routing) + PERK_ROUTING_HITS * sizeof *hits;
    return perk_driver_check(gpu->driver, gpu->driver->cuMemcpyDtoH(hits, from, sizeof *hits), err, "reading %s",
                             routing->name);
}

perk_status perk_gpu_streamed_bytes(perk_executor *executor, uint64_t *bytes, perk_error *err) {
    perk_gpu *gpu = (perk_gpu *)executor;
    const perk_plan *plan = gpu->largest->plan;
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    *bytes = 0;
    for (int i = 0; i < plan->stage_count && status == PERK_OK; i++) {
        const perk_stream *stream = &plan->stages[i].stream;
        uint32_t matrices = 1;
        if (stream->tensor < 0) continue;
        if (stream->deal != PERK_DEAL_NONE && stream->own_slots)
            matrices = (uint32_t)stream->own_slots;
        else if (stream->deal != PERK_DEAL_NONE)
            status = read_hits(gpu, &plan->tensors[stream->routing], &matrices, err);
        *bytes += (uint64_t)stream->tile_count * (uint64_t)stream->blocks_per_tile * PERK_WEIGHT_BLOCK_BYTES * matrices;
    }
    perk_gpu_leave(gpu);
    return status;
}
