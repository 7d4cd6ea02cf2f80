/* The GPU executor: plan -> check -> program -> memory -> weights, then one launch a step. */
#include "gpu_state.h"

#include <pthread.h>
#include <stdio.h>

#include "check.h"
#include "float.h"
#include "gpu_many.h"
#include "ops/op.h"

static perk_gpu *gpu_of(perk_executor *self) { return (perk_gpu *)self; }

perk_status perk_gpu_enter(const perk_gpu *gpu, perk_error *err) {
    return perk_driver_check(gpu->driver, gpu->driver->cuCtxPushCurrent(gpu->context), err, "using %s", gpu->info.name);
}

void perk_gpu_leave(const perk_gpu *gpu) {
    CUcontext left;
    gpu->driver->cuCtxPopCurrent(&left);
}

perk_status perk_gpu_upload(const perk_gpu *gpu, CUdeviceptr to, const void *from, size_t bytes, const char *what,
                            perk_error *err) {
    const perk_driver *driver = gpu->driver;
    CUresult result = driver->cuMemcpyHtoDAsync(to, from, bytes, gpu->stream);
    if (result == CUDA_SUCCESS) result = driver->cuStreamSynchronize(gpu->stream);
    return perk_driver_check(driver, result, err, "copying %s to the device", what);
}

CUdeviceptr perk_gpu_address(const perk_gpu *gpu, const perk_gpu_program *program, const perk_plan_tensor *tensor) {
    const perk_gpu_memory *space =
        tensor->space == PERK_SPACE_ACTIVATIONS ? &program->activations : &gpu->spaces[tensor->space];
    return space->address + tensor->offset;
}

/* ---- making it ---- */

static perk_status find_device(perk_gpu *gpu, const perk_gpu_options *options, perk_error *err) {
    perk_status status = perk_driver_open(&gpu->driver, err);
    if (status == PERK_OK) status = perk_driver_device_info(gpu->driver, options->device, &gpu->info, err);
    if (status == PERK_OK && !gpu->info.cooperative_launch)
        status = perk_fail(err, PERK_UNSUPPORTED, "%s cannot launch cooperative kernels", gpu->info.name);
    return status;
}

/* Making the context takes over 100 ms of a start, and nothing until the module is loaded needs it: it is made on a
 * thread beside planning, checking and compiling. */
typedef struct context_thread {
    perk_gpu *gpu;
    pthread_t thread;
    bool started;
    CUresult result;
    double milliseconds;
} context_thread;

static void *retain_context(void *argument) {
    context_thread *t = argument;
    double begin = perk_now();
    t->result = t->gpu->driver->cuDevicePrimaryCtxRetain(&t->gpu->context, t->gpu->info.device);
    t->milliseconds = (perk_now() - begin) * 1e3;
    return NULL;
}

static void begin_context(context_thread *t) {
    t->started = pthread_create(&t->thread, NULL, retain_context, t) == 0;
    if (!t->started) retain_context(t);
}

static perk_status finish_context(context_thread *t, perk_error *err) {
    perk_gpu *gpu = t->gpu;
    const perk_driver *driver = gpu->driver;
    if (t->started) pthread_join(t->thread, NULL);
    t->started = false;
    perk_status status = perk_driver_check(driver, t->result, err, "opening %s", gpu->info.name);
    gpu->context_retained = status == PERK_OK;
    return status;
}

static perk_status open_stream(perk_gpu *gpu, const perk_gpu_options *options, perk_error *err) {
    const perk_driver *driver = gpu->driver;
    CUresult result = driver->cuStreamCreate(&gpu->stream, CU_STREAM_NON_BLOCKING);
    if (result == CUDA_SUCCESS && options->timing) result = driver->cuEventCreate(&gpu->begin, CU_EVENT_DEFAULT);
    if (result == CUDA_SUCCESS && options->timing) result = driver->cuEventCreate(&gpu->end, CU_EVENT_DEFAULT);
    return perk_driver_check(driver, result, err, "making a stream on %s", gpu->info.name);
}

static perk_status pin(perk_gpu *gpu, void **out, size_t bytes, unsigned flags, const char *what, perk_error *err) {
    perk_status status = perk_gpu_pin(gpu, out, bytes, flags, what, err);
    if (status == PERK_OK) memset(*out, 0, bytes);
    return status;
}

/* A results tensor's bytes in the program that has most; 0: the graph has none. */
static size_t most_bytes(const perk_gpu *gpu, bool logits) {
    size_t most = 0;
    for (int i = 0; i < gpu->program_count; i++) {
        const perk_gpu_program *p = &gpu->programs[i];
        int tensor = logits ? p->logits_tensor : p->argmax_tensor;
        if (tensor >= 0) most = PERK_MAX(most, (size_t)p->plan->tensors[tensor].bytes);
    }
    return most;
}

static perk_status open_step_buffers(perk_gpu *gpu, perk_error *err) {
    perk_status status = PERK_OK;
    for (int i = 0; i < gpu->program_count && status == PERK_OK; i++) {
        perk_gpu_program *p = &gpu->programs[i];
        status = pin(gpu, (void **)&p->batch_host, (size_t)p->layout.words * 4, 0, "the batch", err);
    }
    if (status == PERK_OK)
        status = pin(gpu, (void **)&gpu->hang, sizeof *gpu->hang, CU_MEMHOSTALLOC_DEVICEMAP, "the hang report", err);
    if (status == PERK_OK && most_bytes(gpu, false) > 0)
        status = pin(gpu, (void **)&gpu->argmax_host, most_bytes(gpu, false), 0, "tokens", err);
    return status;
}

static perk_status upload_tasks(perk_gpu *gpu, const perk_gpu_program *p, perk_error *err) {
    perk_task_record *records;
    int per_worker;
    perk_status status = perk_emit_records(p->plan, &records, &per_worker, err);
    if (status != PERK_OK) return status;
    size_t bytes = (size_t)p->plan->device.worker_count * (size_t)per_worker * sizeof *records;
    status = perk_gpu_upload(gpu, p->tasks.address, records, bytes, "the task lists", err);
    free(records);
    return status;
}

static void fill_report(const perk_gpu *gpu, perk_start_report *report) {
    const perk_plan *plan = gpu->largest->plan;
    report->backend = PERK_BACKEND_GPU;
    snprintf(report->device, sizeof report->device, "%s", gpu->info.name);
    snprintf(report->arch, sizeof report->arch, "%s", plan->device.arch);
    report->weights_bytes = plan->space_bytes[PERK_SPACE_WEIGHTS] + plan->space_bytes[PERK_SPACE_CONSTANTS];
    for (int i = 0; i < gpu->program_count; i++) {
        const perk_gpu_program *p = &gpu->programs[i];
        report->programs[i].memory_bytes =
            p->activations.bytes + p->tasks.bytes + p->batch.bytes + p->counters.bytes + p->stamps.bytes;
    }
}

/* Everything that lives on the device. With the context current. */
static perk_status fill_device(perk_gpu *gpu, const perk_checkpoint *checkpoint, const perk_gpu_options *options,
                               perk_cache *cache, perk_start_report *report, perk_error *err) {
    perk_status status = open_stream(gpu, options, err);
    if (status == PERK_OK) status = perk_gpu_load_programs(gpu, options, cache, report, err);
    double begin = perk_now();
    if (status == PERK_OK) status = perk_gpu_allocate(gpu, err);
    if (status == PERK_OK) status = open_step_buffers(gpu, err);
    for (int i = 0; i < gpu->program_count && status == PERK_OK; i++)
        status = upload_tasks(gpu, &gpu->programs[i], err);
    if (status == PERK_OK && gpu->largest->plan->many_steps) status = perk_gpu_many_open(gpu, err);
    if (status == PERK_OK) status = perk_gpu_load_weights(gpu, checkpoint, options, cache, err);
    report->weights_ms = (perk_now() - begin) * 1e3;
    return status;
}

static perk_status start(perk_gpu *gpu, const perk_graph *graph, const perk_checkpoint *checkpoint,
                         const perk_gpu_options *options, perk_cache *cache, perk_start_report *report,
                         perk_error *err) {
    double begin = perk_now();
    context_thread context = {.gpu = gpu};
    perk_status status = find_device(gpu, options, err);
    if (status != PERK_OK) return status;
    report->driver_ms = (perk_now() - begin) * 1e3;
    begin_context(&context);
    status = perk_gpu_make_programs(gpu, graph, options, cache, report, err);
    perk_error context_failure = {0};
    perk_status context_status = finish_context(&context, &context_failure);
    report->context_ms = context.milliseconds;
    if (status == PERK_OK && context_status != PERK_OK) {
        if (err) *err = context_failure;
        status = context_status;
    }
    if (status != PERK_OK) return status;
    status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    status = fill_device(gpu, checkpoint, options, cache, report, err);
    perk_gpu_leave(gpu);
    if (status == PERK_OK) fill_report(gpu, report);
    return status;
}

/* ---- steps ---- */

/* A counter's value as it stands in a step. */
static int32_t in_step(const perk_plan *plan, int counter, uint32_t step, uint32_t value) {
    return (int32_t)(value - step * (uint32_t)plan->counter_per_step[counter]);
}

/* What the report's wait was for. */
static void describe_wait(const perk_plan *plan, const perk_hang_report *hang, perk_buffer *text) {
    if (hang->role == PERK_ROLE_DRAW || hang->role == PERK_ROLE_DRAWN) {
        perk_buffer_printf(text, "%s: %u of %u were there",
                           hang->role == PERK_ROLE_DRAW ? "the others that draw it" : "the rows that others draw",
                           hang->seen, hang->wanted);
        return;
    }
    bool is_counter = hang->role == PERK_ROLE_COUNTER || hang->role == PERK_ROLE_STEP_END;
    if (!is_counter || hang->counter >= (uint32_t)plan->counter_count) {
        bool is_input = hang->role == PERK_ROLE_INPUT_FULL || hang->role == PERK_ROLE_INPUT_EMPTY;
        bool arrives = hang->role == PERK_ROLE_RING_FULL || hang->role == PERK_ROLE_INPUT_FULL;
        perk_buffer_printf(text, "%s %s %u of the worker's %s", arrives ? "the arrival of" : "room in the ring for",
                           is_input ? "slice" : "chunk", hang->counter, is_input ? "inputs" : "weights");
        return;
    }
    int counter = (int)hang->counter;
    perk_buffer_printf(text, "%s to reach %d, where it stood at %d", perk_check_counter_text(plan, counter).text,
                       in_step(plan, counter, hang->step, hang->wanted),
                       in_step(plan, counter, hang->step, hang->seen));
}

/* Whoever reported need not be the first who was stuck. Since nobody signals after a report, the first stage that the
 * counters show unfinished is where it began. */
static void describe_origin(const perk_plan *plan, uint32_t step, const uint32_t *counters, perk_buffer *text) {
    int stage = 0;
    while (stage < plan->stage_count - 1 &&
           in_step(plan, plan->stages[stage].counter, step, counters[plan->stages[stage].counter]) >=
               plan->stages[stage].task_count)
        stage++;
    int counter = plan->stages[stage].counter, task = 0;
    while (plan->tasks[task].stage != stage) task++;
    perk_buffer_printf(text, ". The first stage that did not finish is %s: %d of %d tasks have signalled",
                       plan->stages[stage].name, in_step(plan, counter, step, counters[counter]),
                       plan->stages[stage].task_count);
    for (int i = plan->tasks[task].wait_begin; i < plan->tasks[task].wait_end; i++) {
        const perk_wait *wait = &plan->waits[i];
        perk_buffer_printf(text, "; they wait for %d on %s, which stands at %d", wait->needed,
                           perk_check_counter_text(plan, wait->counter).text,
                           in_step(plan, wait->counter, step, counters[wait->counter]));
    }
}

/* Who waited; false when the report names nobody. */
static bool describe_waiter(const perk_plan *plan, const perk_hang_report *hang, perk_buffer *text) {
    if (hang->role == PERK_ROLE_STEP_END || hang->role == PERK_ROLE_DRAWN) {
        perk_buffer_printf(text, "the end of the step");
        return true;
    }
    if (hang->role == PERK_ROLE_DRAW) {
        perk_buffer_printf(text, "worker %u, drawing the token of row %u,", hang->worker, hang->counter);
        return true;
    }
    if (hang->worker >= (uint32_t)plan->device.worker_count ||
        hang->position >= (uint32_t)(plan->worker_begin[hang->worker + 1] - plan->worker_begin[hang->worker]))
        return false;
    int task = plan->worker_begin[hang->worker] + (int)hang->position;
    perk_buffer_printf(text, "task %d, %s, of op %s,", task, perk_check_task_text(plan, task).text,
                       plan->graph->ops[plan->stages[plan->tasks[task].stage].op]->type->name);
    return true;
}

static perk_status fail_hang(perk_gpu *gpu, const perk_gpu_program *p, perk_error *err) {
    const perk_hang_report *hang = gpu->hang;
    const perk_plan *plan = p->plan;
    perk_buffer waiter = {0}, text = {0};
    if (!describe_waiter(plan, hang, &waiter))
        return perk_fail(err, PERK_INTERNAL, "the report of a hang names task %u of worker %u", hang->position,
                         hang->worker);
    uint32_t *counters = perk_calloc((size_t)plan->counter_count, sizeof *counters);
    describe_wait(plan, hang, &text);
    if (counters && perk_gpu_enter(gpu, NULL) == PERK_OK) {
        CUresult result =
            gpu->driver->cuMemcpyDtoH(counters, p->counters.address, (size_t)plan->counter_count * sizeof *counters);
        if (result == CUDA_SUCCESS) describe_origin(plan, hang->step, counters, &text);
        perk_gpu_leave(gpu);
    }
    perk_status status =
        perk_fail(err, PERK_HANG,
                  "step %u: %s waited more than %d ms for %s. The launch has ended; open the engine "
                  "again",
                  hang->step, waiter.data ? waiter.data : "?", gpu->wait_limit_ms, text.data ? text.data : "?");
    free(counters);
    perk_buffer_free(&waiter);
    perk_buffer_free(&text);
    return status;
}

perk_status perk_gpu_fail_step(perk_gpu *gpu, const perk_gpu_program *p, perk_status status, perk_error *err) {
    if (gpu->hang->complete) status = fail_hang(gpu, p, err);
    gpu->failed = true;
    gpu->failure = *err;
    return status;
}

/* The gate of a program of many steps is shut when the launch begins. */
static perk_status shut_gate(perk_gpu *gpu, const perk_many_args *many, perk_error *err) {
    if (!many->desk) return PERK_OK;
    return perk_driver_check(
        gpu->driver,
        gpu->driver->cuMemsetD8Async((CUdeviceptr)(uintptr_t)many->desk, 0, sizeof *many->desk, gpu->stream), err,
        "shutting the gate of the steps");
}

perk_status perk_gpu_launch(perk_gpu *gpu, perk_gpu_program *p, const perk_many_args *many, perk_error *err) {
    perk_many_args one = p->plan->many_steps ? perk_gpu_one_step(gpu, p) : (perk_many_args){0};
    if (!many) many = &one;
    const perk_driver *driver = gpu->driver;
    CUdeviceptr hang = 0;
    perk_status status = perk_driver_check(driver, driver->cuMemHostGetDevicePointer(&hang, gpu->hang, 0), err,
                                           "mapping the hang report");
    if (status == PERK_OK) status = shut_gate(gpu, many, err);
    if (status != PERK_OK) return status;
    perk_kernel_args args = {
        .tasks = (const perk_task_record *)(uintptr_t)p->tasks.address,
        .weights = (const uint8_t *)(uintptr_t)gpu->spaces[PERK_SPACE_WEIGHTS].address,
        .constants = (const uint8_t *)(uintptr_t)gpu->spaces[PERK_SPACE_CONSTANTS].address,
        .activations = (uint8_t *)(uintptr_t)p->activations.address,
        .kv = (uint8_t *)(uintptr_t)gpu->spaces[PERK_SPACE_KV].address,
        .batch = many->batch ? many->batch : (const int32_t *)(uintptr_t)p->batch.address,
        .counters = (uint32_t *)(uintptr_t)p->counters.address,
        .hang_claim = (uint32_t *)(uintptr_t)gpu->hang_claim.address,
        .hang = (perk_hang_report *)(uintptr_t)hang,
        .stamps = (uint64_t *)(uintptr_t)p->stamps.address,
        .wait_limit_ns = (uint64_t)gpu->wait_limit_ms * 1000000u,
        .step = p->steps,
        .many = *many,
    };
    void *params[] = {&args};
    p->launches++;
    return perk_driver_check(driver,
                             driver->cuLaunchCooperativeKernel(p->kernel, (unsigned)p->plan->device.worker_count, 1, 1,
                                                               PERK_BLOCK_THREADS, 1, 1,
                                                               (unsigned)p->plan->shared_bytes, gpu->stream, params),
                             err, "launching the program");
}

/* Starts copying `rows` rows of a plan tensor to the host. */
static perk_status fetch_rows(perk_gpu *gpu, const perk_gpu_program *p, int tensor, int32_t rows, void *host,
                              perk_error *err) {
    const perk_plan_tensor *t = &p->plan->tensors[tensor];
    size_t bytes = (size_t)rows * (size_t)t->row_stride * perk_dtype_size(t->dtype);
    if (bytes == 0) return PERK_OK;
    return perk_driver_check(gpu->driver,
                             gpu->driver->cuMemcpyDtoHAsync(host, perk_gpu_address(gpu, p, t), bytes, gpu->stream), err,
                             "copying %s", t->name);
}

/* Rows that lie `stride` apart move together. */
static void close_gaps(void *values, int32_t rows, size_t width, size_t stride) {
    for (int32_t r = 1; r < rows && stride != width; r++)
        memmove((char *)values + (size_t)r * width, (char *)values + (size_t)r * stride, width);
}

static perk_status fetch_results(perk_gpu *gpu, const perk_gpu_program *p, const perk_batch *batch, bool want_logits,
                                 perk_error *err) {
    perk_status status = PERK_OK;
    int32_t rows = batch->num_logit_rows;
    if (p->argmax_tensor >= 0) status = fetch_rows(gpu, p, p->argmax_tensor, rows, gpu->argmax_host, err);
    if (status != PERK_OK || !want_logits || p->logits_tensor < 0) return status;
    if (!gpu->logits_host) status = pin(gpu, (void **)&gpu->logits_host, most_bytes(gpu, true), 0, "logits", err);
    if (status == PERK_OK) status = fetch_rows(gpu, p, p->logits_tensor, rows, gpu->logits_host, err);
    return status;
}

static void give_results(perk_gpu *gpu, const perk_gpu_program *p, const perk_batch *batch, bool want_logits,
                         perk_step_result *result) {
    *result = (perk_step_result){0};
    if (p->argmax_tensor >= 0) {
        const perk_plan_tensor *t = &p->plan->tensors[p->argmax_tensor];
        close_gaps(gpu->argmax_host, batch->num_logit_rows, sizeof(int32_t), (size_t)t->row_stride * sizeof(int32_t));
        result->argmax = gpu->argmax_host;
    }
    if (want_logits && p->logits_tensor >= 0) {
        const perk_plan_tensor *t = &p->plan->tensors[p->logits_tensor];
        close_gaps(gpu->logits_host, batch->num_logit_rows, (size_t)t->cols * sizeof(float),
                   (size_t)t->row_stride * sizeof(float));
        result->logits = gpu->logits_host;
    }
}

static perk_status record(perk_gpu *gpu, CUevent event, perk_error *err) {
    if (!event) return PERK_OK;
    return perk_driver_check(gpu->driver, gpu->driver->cuEventRecord(event, gpu->stream), err, "recording a time");
}

static bool fits(const perk_batch *batch, const perk_config *config) {
    return batch->num_tokens <= config->max_num_batched_tokens &&
           batch->num_requests <= config->max_num_batched_requests &&
           batch->num_logit_rows <= config->max_num_logit_rows;
}

static perk_gpu_program *choose_program(perk_gpu *gpu, const perk_batch *batch) {
    perk_gpu_program *p = gpu->only_largest ? gpu->largest : gpu->programs;
    while (p < gpu->largest && !fits(batch, &p->plan->config)) p++;
    return p;
}

/* Copies the batch, launches, and waits for the results. Programs may take turns: the stream orders their launches, as
 * it does those of one. With the context current. */
static perk_status run_step(perk_gpu *gpu, perk_gpu_program *p, const perk_batch *batch, bool want_logits,
                            perk_error *err) {
    const perk_driver *driver = gpu->driver;
    perk_gpu_batch_write(p->plan, &p->layout, batch, p->batch_host);
    perk_status status = perk_driver_check(
        driver, driver->cuMemcpyHtoDAsync(p->batch.address, p->batch_host, (size_t)p->layout.words * 4, gpu->stream),
        err, "copying the batch");
    if (status == PERK_OK) status = record(gpu, gpu->begin, err);
    if (status == PERK_OK) status = perk_gpu_launch(gpu, p, NULL, err);
    if (status == PERK_OK) status = record(gpu, gpu->end, err);
    if (status == PERK_OK) status = fetch_results(gpu, p, batch, want_logits, err);
    if (status == PERK_OK)
        status = perk_driver_check(driver, driver->cuStreamSynchronize(gpu->stream), err,
                                   "running step %u of the program for %d tokens", p->steps,
                                   p->plan->config.max_num_batched_tokens);
    return status == PERK_OK && gpu->hang->complete ? PERK_HANG : status;
}

static perk_status gpu_step(perk_executor *self, const perk_batch *batch, bool want_logits, perk_step_result *result,
                            perk_error *err) {
    perk_gpu *gpu = gpu_of(self);
    perk_error local;
    if (!err) err = &local; /* what closes the executor is kept */
    if (gpu->failed) {
        *err = gpu->failure;
        return gpu->failure.status;
    }
    perk_gpu_program *p = choose_program(gpu, batch);
    perk_status status = perk_gpu_enter(gpu, err);
    if (status == PERK_OK) {
        status = run_step(gpu, p, batch, want_logits, err);
        perk_gpu_leave(gpu);
    }
    if (status != PERK_OK) return perk_gpu_fail_step(gpu, p, status, err);
    p->steps++;
    give_results(gpu, p, batch, want_logits, result);
    return PERK_OK;
}

void perk_gpu_keep_to_largest(perk_executor *executor, bool kept) { gpu_of(executor)->only_largest = kept; }

void perk_gpu_program_counts(const perk_executor *executor, uint64_t steps[PERK_MAX_PROGRAMS],
                             uint64_t launches[PERK_MAX_PROGRAMS]) {
    const perk_gpu *gpu = (const perk_gpu *)executor;
    for (int i = 0; i < gpu->program_count; i++) {
        steps[i] = gpu->programs[i].steps;
        launches[i] = gpu->programs[i].launches;
    }
    uint32_t under_way = 0;
    int running = perk_gpu_many_running(gpu, &under_way);
    steps[running] += under_way;
}

/* ---- tensors, for tests ---- */

static perk_status check_rows(const perk_gpu *gpu, int tensor, const perk_tensor *wanted, int64_t rows,
                              perk_error *err) {
    if (tensor < 0)
        return perk_fail(err, PERK_NOT_FOUND, "%s has no memory of its own in the plan; keep it (perk_keep)",
                         wanted->name);
    if (rows < 0 || rows > gpu->largest->plan->tensors[tensor].rows)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s has %d rows, not %lld", wanted->name,
                         gpu->largest->plan->tensors[tensor].rows, (long long)rows);
    return PERK_OK;
}

static perk_status gpu_write(perk_executor *self, const perk_tensor *input, const float *values, int64_t rows,
                             perk_error *err) {
    perk_gpu *gpu = gpu_of(self);
    int index = perk_gpu_tensor(gpu->largest->plan, input);
    perk_status status = check_rows(gpu, index, input, rows, err);
    if (status != PERK_OK) return status;
    const perk_plan_tensor *t = &gpu->largest->plan->tensors[index];
    size_t stride = (size_t)t->row_stride, count = (size_t)rows * stride;
    uint16_t *packed = perk_calloc(count, sizeof *packed);
    if (!packed) return perk_fail_memory(err, input->name);
    for (size_t r = 0; r < (size_t)rows; r++)
        for (size_t c = 0; c < (size_t)t->cols; c++)
            packed[r * stride + c] = perk_f32_to_bf16(values[r * (size_t)t->cols + c]);
    status = perk_gpu_enter(gpu, err);
    if (status == PERK_OK) {
        status = perk_gpu_upload(gpu, perk_gpu_address(gpu, gpu->largest, t), packed, count * sizeof *packed,
                                 input->name, err);
        perk_gpu_leave(gpu);
    }
    free(packed);
    return status;
}

static void widen_row(const perk_plan_tensor *t, const void *row, float *out) {
    for (int32_t c = 0; c < t->cols; c++) {
        if (t->dtype == PERK_BF16)
            out[c] = perk_bf16_to_f32(((const uint16_t *)row)[c]);
        else if (t->dtype == PERK_F32)
            out[c] = ((const float *)row)[c];
        else
            out[c] = (float)((const int32_t *)row)[c];
    }
}

static perk_status gpu_read(perk_executor *self, const perk_tensor *tensor, float *values, int64_t rows,
                            perk_error *err) {
    perk_gpu *gpu = gpu_of(self);
    int index = perk_gpu_tensor(gpu->largest->plan, tensor);
    perk_status status = check_rows(gpu, index, tensor, rows, err);
    if (status != PERK_OK) return status;
    const perk_plan_tensor *t = &gpu->largest->plan->tensors[index];
    size_t row_bytes = (size_t)t->row_stride * perk_dtype_size(t->dtype);
    char *raw = perk_calloc((size_t)rows, row_bytes);
    if (!raw) return perk_fail_memory(err, tensor->name);
    status = perk_gpu_enter(gpu, err);
    if (status == PERK_OK) {
        CUdeviceptr from = perk_gpu_address(gpu, gpu->largest, t);
        status = perk_driver_check(gpu->driver, gpu->driver->cuMemcpyDtoH(raw, from, (size_t)rows * row_bytes), err,
                                   "reading %s", tensor->name);
        perk_gpu_leave(gpu);
    }
    for (int64_t r = 0; r < rows && status == PERK_OK; r++)
        widen_row(t, raw + (size_t)r * row_bytes, values + r * t->cols);
    free(raw);
    return status;
}

enum { POISON = 0xff }; /* all ones: NaN in bf16 and fp32, -1 as an integer */

static perk_status poison_tensor(const perk_gpu *gpu, const perk_plan_tensor *t, perk_error *err) {
    const perk_driver *driver = gpu->driver;
    size_t element = perk_dtype_size(t->dtype), width = (size_t)t->cols * element,
           stride = (size_t)t->row_stride * element, rows = (size_t)t->rows;
    CUresult result = CUDA_SUCCESS;
    if (t->layout == PERK_LAYOUT_WIDE_INPUT && width != stride) return PERK_OK; /* zeros lie anywhere, and must stay */
    if (width == stride) {
        width *= rows;
        rows = 1;
    }
    for (size_t r = 0; r < rows && result == CUDA_SUCCESS; r++)
        result =
            driver->cuMemsetD8Async(perk_gpu_address(gpu, gpu->largest, t) + r * stride, POISON, width, gpu->stream);
    return perk_driver_check(driver, result, err, "poisoning %s", t->name);
}

static perk_status poison_cache(const perk_gpu *gpu, perk_error *err) {
    const perk_gpu_memory *kv = &gpu->spaces[PERK_SPACE_KV];
    return perk_driver_check(gpu->driver, gpu->driver->cuMemsetD8Async(kv->address, POISON, kv->bytes, gpu->stream),
                             err, "poisoning KV pages");
}

static perk_status poison_activations(const perk_gpu *gpu, perk_error *err) {
    const perk_plan *plan = gpu->largest->plan;
    perk_status status = PERK_OK;
    for (int i = 0; i < plan->tensor_count && status == PERK_OK; i++)
        if (plan->tensors[i].space == PERK_SPACE_ACTIVATIONS && !plan->tensors[i].external_input)
            status = poison_tensor(gpu, &plan->tensors[i], err);
    return status;
}

perk_status perk_gpu_poison(perk_executor *executor, bool with_cache, perk_error *err) {
    perk_gpu *gpu = gpu_of(executor);
    perk_status status = perk_gpu_enter(gpu, err);
    if (status != PERK_OK) return status;
    if (with_cache) status = poison_cache(gpu, err);
    if (status == PERK_OK) status = poison_activations(gpu, err);
    perk_gpu_leave(gpu);
    return status;
}

/* ---- the end ---- */

static void release_memory(const perk_gpu *gpu, const perk_gpu_memory *memory) {
    if (memory->address) gpu->driver->cuMemFree(memory->address);
}

static void release_program(const perk_gpu *gpu, const perk_gpu_program *p) {
    const perk_gpu_memory *all[] = {&p->activations, &p->tasks, &p->batch, &p->counters, &p->stamps};
    for (size_t i = 0; i < PERK_COUNT(all); i++) release_memory(gpu, all[i]);
    if (p->batch_host) gpu->driver->cuMemFreeHost(p->batch_host);
    if (p->module) gpu->driver->cuModuleUnload(p->module);
}

/* With the context current. */
static void release_objects(perk_gpu *gpu) {
    const perk_driver *driver = gpu->driver;
    if (gpu->many) perk_gpu_online.stop(&gpu->executor);
    if (gpu->stream) driver->cuStreamSynchronize(gpu->stream);
    perk_gpu_many_close(gpu);
    for (int i = 0; i < PERK_SPACE_COUNT; i++) release_memory(gpu, &gpu->spaces[i]);
    release_memory(gpu, &gpu->hang_claim);
    for (int i = 0; i < gpu->program_count; i++) release_program(gpu, &gpu->programs[i]);
    void *pinned[] = {gpu->hang, gpu->argmax_host, gpu->logits_host};
    for (size_t i = 0; i < PERK_COUNT(pinned); i++)
        if (pinned[i]) driver->cuMemFreeHost(pinned[i]);
    if (gpu->begin) driver->cuEventDestroy(gpu->begin);
    if (gpu->end) driver->cuEventDestroy(gpu->end);
    if (gpu->stream) driver->cuStreamDestroy(gpu->stream);
}

static void gpu_free(perk_executor *self) {
    perk_gpu *gpu = gpu_of(self);
    if (!gpu) return;
    if (gpu->context_retained) {
        if (perk_gpu_enter(gpu, NULL) == PERK_OK) { /* else the objects go with the context */
            release_objects(gpu);
            perk_gpu_leave(gpu);
        }
        gpu->driver->cuDevicePrimaryCtxRelease(gpu->info.device);
    }
    for (int i = 0; i < gpu->program_count; i++) perk_gpu_program_free(&gpu->programs[i]);
    perk_driver_free(gpu->driver);
    free(gpu);
}

static const perk_executor_type gpu_type = {"gpu", gpu_step, gpu_write, gpu_read, gpu_free, NULL};
static const perk_executor_type many_steps_type = {"gpu", gpu_step, gpu_write, gpu_read, gpu_free, &perk_gpu_online};

/* Programs are made on several threads, and whoever listens hears one at a time. */
typedef struct ordered_log {
    pthread_mutex_t lock;
    perk_log to;
} ordered_log;

static void write_in_order(void *user, perk_log_level level, const char *message) {
    ordered_log *log = user;
    pthread_mutex_lock(&log->lock);
    log->to.write(log->to.user, level, message);
    pthread_mutex_unlock(&log->lock);
}

static perk_status check_smaller(const perk_gpu_options *options, const perk_config *config, perk_error *err) {
    int count = options->smaller_program_count;
    if (count < 0 || count >= PERK_MAX_PROGRAMS)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "%d programs for smaller steps than max_num_batched_tokens: an engine holds at most %d", count,
                         PERK_MAX_PROGRAMS - 1);
    for (int i = 0; i < count; i++) {
        int32_t tokens = options->smaller_programs[i], before = i ? options->smaller_programs[i - 1] : 0;
        if (tokens <= before || tokens >= config->max_num_batched_tokens)
            return perk_fail(err, PERK_INVALID_ARGUMENT,
                             "a program for %d tokens a step: must be more than %d and less than "
                             "max_num_batched_tokens %d",
                             tokens, before, config->max_num_batched_tokens);
    }
    return PERK_OK;
}

perk_status perk_gpu_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                            const perk_config *config, const perk_gpu_options *options, perk_start_report *report,
                            perk_error *err) {
    *out = NULL;
    perk_start_report local = {0};
    perk_cache *cache = NULL;
    ordered_log log = {.lock = PTHREAD_MUTEX_INITIALIZER, .to = options->log};
    perk_gpu_options ordered = *options;
    if (options->log.write) ordered.log = (perk_log){write_in_order, &log};
    perk_gpu *gpu = perk_calloc(1, sizeof *gpu);
    if (!gpu) return perk_fail_memory(err, "the GPU executor");
    gpu->executor.type = options->many_steps ? &many_steps_type : &gpu_type;
    gpu->config = *config;
    gpu->wait_limit_ms = options->wait_limit_ms ? options->wait_limit_ms : PERK_GPU_WAIT_LIMIT_MS;
    const perk_cache_options cache_options = {
        .folder = options->cache_folder, .log = ordered.log, .disabled = options->no_cache};
    perk_status status = check_smaller(options, config, err);
    if (status == PERK_OK) status = perk_cache_open(&cache, &cache_options, err);
    if (status == PERK_OK) status = start(gpu, graph, checkpoint, &ordered, cache, report ? report : &local, err);
    perk_cache_free(cache);
    pthread_mutex_destroy(&log.lock);
    if (status != PERK_OK) {
        gpu_free(&gpu->executor);
        return status;
    }
    *out = &gpu->executor;
    return PERK_OK;
}
