/* Measurements on the device, for perk bench. */
#include "gpu_state.h"

enum { CEILING_CHUNK = 32768, CEILING_SLOTS = 6, CEILING_THREADS = 1024 }; /* as kernels_src/ceiling.cuh */

static perk_gpu *gpu_of(perk_executor *executor) { return (perk_gpu *)executor; }

const perk_plan *perk_gpu_plan(const perk_executor *executor) { return ((const perk_gpu *)executor)->plan; }

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

static perk_status build_ceiling(perk_gpu *gpu, CUmodule *module, CUfunction *function, perk_error *err) {
    perk_program program = {0};
    perk_compile_header *headers = NULL;
    size_t header_count = 0;
    bool portable = gpu->plan->device.capability < 90;
    perk_status status = perk_emit_headers(&headers, &header_count, err);
    if (status != PERK_OK) return status;
    const perk_program_source source = {
        .name = "ceiling.cu",
        .text = portable
                    ? "#define PERK_PORTABLE 1\n#include \"abi.h\"\n#include \"ptx.cuh\"\n#include \"ceiling.cuh\"\n"
                    : "#define PERK_PORTABLE 0\n#include \"abi.h\"\n#include \"ptx.cuh\"\n#include \"ceiling.cuh\"\n",
        .headers = headers,
        .header_count = header_count,
        .arch = gpu->plan->device.arch,
        .kernel = "perk_read_ceiling"};
    const perk_program_options options = {.driver_version = gpu->driver->version};
    status = perk_program_build_source(&source, &options, &program, err);
    if (status == PERK_OK) {
        CUresult result = gpu->driver->cuModuleLoadData(module, program.cubin);
        if (result == CUDA_SUCCESS) result = gpu->driver->cuModuleGetFunction(function, *module, "perk_read_ceiling");
        if (result == CUDA_SUCCESS && !portable)
            result = gpu->driver->cuFuncSetAttribute(*function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                     CEILING_CHUNK * CEILING_SLOTS);
        status = perk_driver_check(gpu->driver, result, err, "loading the ceiling program");
    }
    perk_program_free(&program);
    perk_emit_headers_free(headers, header_count);
    return status;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static perk_status time_reads(perk_gpu *gpu, CUfunction function, int runs, double *milliseconds, uint64_t chunks,
                              perk_error *err) {
    const perk_driver *driver = gpu->driver;
    CUdeviceptr source = gpu->spaces[PERK_SPACE_WEIGHTS].address, sink = gpu->hang_claim.address;
    void *params[] = {&source, &chunks, &sink};
    unsigned shared = gpu->plan->device.capability < 90 ? 0 : CEILING_CHUNK * CEILING_SLOTS;
    CUevent begin = NULL, end = NULL;
    CUresult result = driver->cuEventCreate(&begin, CU_EVENT_DEFAULT);
    if (result == CUDA_SUCCESS) result = driver->cuEventCreate(&end, CU_EVENT_DEFAULT);
    for (int run = -2; run < runs && result == CUDA_SUCCESS; run++) { /* two to warm up */
        float elapsed = 0;
        result = driver->cuEventRecord(begin, gpu->stream);
        if (result == CUDA_SUCCESS)
            result = driver->cuLaunchKernel(function, (unsigned)gpu->info.sm_count, 1, 1, CEILING_THREADS, 1, 1, shared,
                                            gpu->stream, params, NULL);
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
    CUmodule module = NULL;
    CUfunction function = NULL;
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
    status = build_ceiling(gpu, &module, &function, err);
    if (status == PERK_OK) status = time_reads(gpu, function, runs, milliseconds, chunks, err);
    if (status == PERK_OK) {
        qsort(milliseconds, (size_t)runs, sizeof *milliseconds, by_value);
        *bytes_per_second = (double)(chunks * CEILING_CHUNK) / (milliseconds[runs / 2] * 1e-3);
    }
    if (module) gpu->driver->cuModuleUnload(module);
    perk_gpu_leave(gpu);
    free(milliseconds);
    return status;
}

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

perk_status perk_gpu_task_times(perk_executor *executor, perk_task_time *times, perk_error *err) {
    perk_gpu *gpu = gpu_of(executor);
    const perk_plan *plan = gpu->plan;
    if (!plan->profiled) return perk_fail(err, PERK_INVALID_ARGUMENT, "the executor was not made with profile");
    perk_task_time *stamps = perk_calloc(1, gpu->stamps.bytes); /* [workers][tasks_per_worker] */
    perk_status status = stamps ? perk_gpu_enter(gpu, err) : perk_fail_memory(err, "time stamps");
    if (status == PERK_OK) {
        CUresult result = gpu->driver->cuMemcpyDtoH(stamps, gpu->stamps.address, gpu->stamps.bytes);
        status = perk_driver_check(gpu->driver, result, err, "reading the time stamps");
        perk_gpu_leave(gpu);
    }
    for (int w = 0; w < plan->device.worker_count && status == PERK_OK; w++) {
        int begin = plan->worker_begin[w], count = plan->worker_begin[w + 1] - begin;
        memcpy(times + begin, stamps + (size_t)w * (size_t)gpu->tasks_per_worker, (size_t)count * sizeof *times);
    }
    free(stamps);
    return status;
}
